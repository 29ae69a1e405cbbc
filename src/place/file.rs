//! A folder as a place: an object is a file, with the folders of its name.
//!
//! The folder may lie on a medium or a share that others can write, so no symbolic link is
//! followed below it. An object has its name when all of it is there: it is written under a name
//! of its own, `<name>.<random>.tmp`, and renamed, or linked where none may be replaced. It is
//! durable after [`Objects::sync`]. What an interrupted put has left is listed like any other
//! object, and nobody knows its name.

use super::{Listed, ObjectName, Objects, Put};
use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result};
use nix::fcntl::OFlag;
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The folder at `path`, without symbolic links.
///
/// # Errors
/// `NotFound` if there is none.
pub(super) fn check(path: &Path) -> Result<PathBuf> {
    let real = path.canonicalize().map_err(|e| match e.kind() {
        ErrorKind::NotFound => Error::new(
            Kind::NotFound,
            "there is no such folder; make it, where the medium or the share is mounted",
        ),
        _ => e.into(),
    })?;
    files::folder(&real)?;
    Ok(real)
}

/// One thread's way to the folder.
pub(super) struct Folder {
    path: PathBuf,
    /// For what syncs all that was put.
    opened: File,
    /// The folders that are known to be there.
    there: HashSet<PathBuf>,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let opened = files::folder(path)?;
        Ok(Folder { path: path.to_owned(), opened, there: HashSet::new() })
    }

    fn at(&self, name: &ObjectName) -> PathBuf {
        self.path.join(name.as_str())
    }

    /// Makes the folders that a name has, below the place's own, which is never made.
    fn make_folders(&mut self, path: &Path) -> io::Result<()> {
        let mut missing = Vec::new();
        for above in path.ancestors().skip(1).take_while(|above| *above != self.path) {
            if self.there.contains(above) {
                break;
            }
            missing.push(above.to_owned());
        }
        for folder in missing.into_iter().rev() {
            match std::fs::create_dir(&folder) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            // Whatever has the name, it is a folder and no link to one.
            files::folder(&folder)?;
            self.there.insert(folder);
        }
        Ok(())
    }

    fn write(&mut self, path: &Path, bytes: &[u8], put: Put) -> io::Result<bool> {
        self.make_folders(path)?;
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}.tmp", uuid::Uuid::new_v4().simple()));
        let temporary = PathBuf::from(temporary);
        let write = || -> io::Result<bool> {
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
            let mut file = files::open_with(&temporary, flags)?;
            file.write_all(bytes)?;
            match put {
                Put::Replace => files::rename(&temporary, path).map(|()| true),
                Put::IfNew => match link(&temporary, path) {
                    Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
                    linked => linked.map(|()| true),
                },
            }
        };
        let written = write();
        if !matches!((&written, put), (Ok(true), Put::Replace)) {
            // Best effort: the error that matters is the first one.
            let _ = files::remove(&temporary);
        }
        written
    }
}

/// Gives the file `from` the name `to`, unless something has that. File systems of removable media have no
/// links: there the name is looked for first.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::hard_link(from, to) {
        Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => {
            if files::exists(to) {
                return Err(ErrorKind::AlreadyExists.into());
            }
            files::rename(from, to)
        }
        linked => linked,
    }
}

impl Objects for Folder {
    fn get(&mut self, name: &ObjectName, max: usize) -> Result<Option<Vec<u8>>> {
        match files::read(&self.at(name), max as u64) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).context(|| format!("read {name}")),
        }
    }

    fn exists(&mut self, name: &ObjectName) -> Result<bool> {
        Ok(files::exists(&self.at(name)))
    }

    fn put(&mut self, name: &ObjectName, bytes: Vec<u8>, put: Put) -> Result<bool> {
        self.write(&self.at(name), &bytes, put).context(|| format!("write {name}"))
    }

    fn list(&mut self, folder: &ObjectName) -> Result<Vec<Listed>> {
        let path = self.at(folder);
        let attempt = || format!("list {folder}");
        let names = match files::names(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            names => names.context(attempt)?,
        };
        let mut listed = Vec::new();
        for name in names {
            // What is called otherwise is none of ours.
            let Some(Ok(object)) = name.to_str().map(|name| ObjectName::new(format!("{folder}/{name}")))
            else {
                continue;
            };
            match path.join(&name).symlink_metadata() {
                Ok(found) if found.is_file() => {
                    listed.push(Listed { name: object, modified: found.mtime() });
                }
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e).context(attempt),
            }
        }
        Ok(listed)
    }

    fn remove(&mut self, name: &ObjectName) -> Result<()> {
        match files::remove(&self.at(name)) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.context(|| format!("remove {name}")),
        }
    }

    fn sync(&mut self) -> Result<()> {
        nix::unistd::syncfs(&self.opened).context(|| "make what was put durable")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ObjectName {
        ObjectName::new(text).unwrap()
    }

    #[test]
    fn an_object_is_put_listed_read_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = Folder::open(&check(dir.path()).unwrap()).unwrap();
        let a = name("x/y/a");
        assert_eq!(folder.get(&a, 10).unwrap(), None);
        assert_eq!(folder.list(&name("x/y")).unwrap(), []);
        assert!(folder.put(&a, b"one".to_vec(), Put::IfNew).unwrap());
        assert!(!folder.put(&a, b"two".to_vec(), Put::IfNew).unwrap());
        assert_eq!(folder.get(&a, 3).unwrap().unwrap(), b"one");
        assert!(folder.put(&a, b"three".to_vec(), Put::Replace).unwrap());
        assert!(folder.get(&a, 3).is_err(), "it is too long");
        assert_eq!(folder.get(&a, 5).unwrap().unwrap(), b"three");
        std::fs::write(dir.path().join("x/y/Other"), "not ours").unwrap();
        let listed = folder.list(&name("x/y")).unwrap();
        assert_eq!(listed.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["x/y/a"]);
        folder.sync().unwrap();
        folder.remove(&a).unwrap();
        folder.remove(&a).unwrap();
        assert!(!folder.exists(&a).unwrap());
        let left: Vec<_> = std::fs::read_dir(dir.path().join("x/y")).unwrap().collect();
        assert_eq!(left.len(), 1, "no temporary file of ours is left");
    }

    #[test]
    fn no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "secret").unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("x")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("secret"), dir.path().join("a")).unwrap();
        let mut folder = Folder::open(&check(dir.path()).unwrap()).unwrap();
        assert!(folder.get(&name("a"), 10).is_err() && folder.get(&name("x/secret"), 10).is_err());
        assert!(folder.put(&name("x/new"), vec![1], Put::Replace).is_err());
        assert!(folder.list(&name("x")).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}
