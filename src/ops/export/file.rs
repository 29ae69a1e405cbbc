//! A file that is made by an export: it has no name until all of it is there.
//!
//! So what an export that is killed has written is gone with it. Where the file system has no files without a
//! name, or where another file is replaced, the file has a name of its own for a time: the target's, then a
//! random number, then `.partial`. It is locked by then. One that nobody has locked was left by an export
//! that was killed; the next export to the same target removes it.
#![forbid(unsafe_code)]

use crate::base::locks::{self, Bytes};
use crate::base::root::parent_of;
use crate::base::{Context, Error, Kind, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, geteuid, linkat, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

const PARTIAL: &[u8] = b".partial";
/// Digits of the random number.
const DIGITS: usize = 32;

/// A file that is to be made.
pub(super) struct NewFile<'a> {
    path: &'a Path,
    replace: bool,
    name: &'a OsStr,
    folder: File,
    made: Option<Made>,
}

/// The file, which has not its name yet.
struct Made {
    file: File,
    /// Another one, if it has one.
    partial: Option<OsString>,
}

impl<'a> NewFile<'a> {
    /// Looks whether such a file can be made.
    ///
    /// # Errors
    /// `Busy` for a file that is there and is not to be replaced; those of opening its folder.
    pub(super) fn new(path: &'a Path, replace: bool) -> Result<Self> {
        let Some(name) = path.file_name() else {
            return Err(Error::new(Kind::Usage, format!("{} is no file's name", path.display())));
        };
        if !replace && path.symlink_metadata().is_ok() {
            return Err(is_there(path));
        }
        let folder = parent_of(path);
        let folder = File::open(folder).context(|| format!("open {}", folder.display()))?;
        Ok(NewFile { path, replace, name, folder, made: None })
    }

    /// The folder that it is made in.
    pub(super) fn folder(&self) -> &'a Path {
        parent_of(self.path)
    }

    /// Makes it, empty, and so long.
    pub(super) fn begin(&mut self, size: u64) -> Result<()> {
        self.clear_remains();
        let made = self.make().context(|| format!("make {}", self.path.display()))?;
        let file = &self.made.insert(made).file;
        file.set_len(size).context(|| format!("write {}", self.path.display()))
    }

    fn make(&self) -> Result<Made> {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        match openat(&self.folder, ".", flags | OFlag::O_TMPFILE, mode()) {
            Ok(file) => return Ok(Made { file: file.into(), partial: None }),
            // What file systems, and kernels, say that do not have it.
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL | Errno::ENOSYS) => {}
            Err(e) => return Err(e.into()),
        }
        let partial = self.partial_name();
        let path = self.path.with_file_name(&partial);
        log::warn!(
            "this file system has no files without a name: if this is killed, {} stays, in the clear, until \
             it is removed or something is exported to {} again",
            path.display(),
            self.path.display()
        );
        let flags = flags | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let file = File::from(openat(&self.folder, &*partial, flags, mode())?);
        let made = Made { file, partial: Some(partial) };
        locks::try_lock(&made.file, locks::Kind::Exclusive, Bytes::ALL)?;
        Ok(made)
    }

    fn partial_name(&self) -> OsString {
        let mut name = self.name.to_os_string();
        name.push(format!(".{}", uuid::Uuid::new_v4().simple()));
        name.push(OsStr::from_bytes(PARTIAL));
        name
    }

    /// Writes bytes into it.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let file = &self.made.as_ref().expect("begun before it is written").file;
        file.write_all_at(bytes, at).context(|| format!("write {}", self.path.display()))
    }

    /// Makes it durable, and gives it its name.
    pub(super) fn finish(&mut self) -> Result<()> {
        let made = self.made.as_mut().expect("begun before it is finished");
        made.file.sync_all().context(|| format!("write {}", self.path.display()))?;
        self.give_name().context(|| format!("name {}", self.path.display()))?;
        self.folder.sync_all().context(|| format!("sync the folder of {}", self.path.display()))
    }

    fn give_name(&mut self) -> Result<()> {
        let partial_name = self.partial_name();
        let made = self.made.as_mut().expect("begun before it is finished");
        if made.partial.is_none() {
            match link(&made.file, &self.folder, self.name) {
                Err(Errno::EEXIST) if self.replace => {
                    // Only a rename replaces a file. All of this one is there.
                    locks::try_lock(&made.file, locks::Kind::Exclusive, Bytes::ALL)?;
                    link(&made.file, &self.folder, &partial_name)?;
                    made.partial = Some(partial_name);
                }
                Err(Errno::EEXIST) => return Err(is_there(self.path)),
                linked => return Ok(linked?),
            }
        }
        let partial = made.partial.as_deref().expect("it has another name");
        let flags = if self.replace { RenameFlags::empty() } else { RenameFlags::RENAME_NOREPLACE };
        match renameat2(&self.folder, partial, &self.folder, self.name, flags) {
            Err(Errno::EEXIST) => return Err(is_there(self.path)),
            // This file system cannot say "unless there is one".
            Err(Errno::EINVAL) if !self.replace => {
                if self.path.symlink_metadata().is_ok() {
                    return Err(is_there(self.path));
                }
                renameat2(&self.folder, partial, &self.folder, self.name, RenameFlags::empty())?;
            }
            renamed => renamed?,
        }
        made.partial = None;
        Ok(())
    }

    /// Removes what exports to this target have left that were killed.
    fn clear_remains(&self) {
        let listed =
            nix::dir::Dir::openat(&self.folder, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        // What can be written into without being listed is left as it is.
        let Ok(mut listed) = listed else { return };
        let names: Vec<OsString> = listed
            .iter()
            .flatten()
            .map(|entry| OsString::from_vec(entry.file_name().to_bytes().to_owned()))
            .filter(|name| is_partial_of(name, self.name))
            .collect();
        for name in names {
            let path: PathBuf = self.path.with_file_name(&name);
            match self.clear(&name) {
                Ok(true) => log::warn!("removed {}, which an export left that was killed", path.display()),
                Ok(false) => {}
                Err(e) => {
                    log::warn!("{} is left, in the clear, by an export that was killed: {e}", path.display())
                }
            }
        }
    }

    /// Removes a file that nobody writes any more. Returns whether it did.
    fn clear(&self, name: &OsStr) -> Result<bool> {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = File::from(openat(&self.folder, name, flags, Mode::empty())?);
        let found = file.metadata()?;
        let is_ours = found.is_file() && found.uid() == geteuid().as_raw();
        if !is_ours || !locks::try_lock(&file, locks::Kind::Exclusive, Bytes::ALL)? {
            return Ok(false);
        }
        unlinkat(&self.folder, name, UnlinkatFlags::NoRemoveDir)?;
        Ok(true)
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        let Some(partial) = self.made.take().and_then(|made| made.partial) else { return };
        match unlinkat(&self.folder, &*partial, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(e) => {
                log::error!("{} is left, in the clear: {e}", self.path.with_file_name(partial).display())
            }
        }
    }
}

fn mode() -> Mode {
    Mode::S_IRUSR | Mode::S_IWUSR
}

/// Gives a file that has no name one.
fn link(file: &File, folder: &File, name: &OsStr) -> Result<(), Errno> {
    let file = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, file.as_str(), folder, name, AtFlags::AT_SYMLINK_FOLLOW)
}

fn is_partial_of(name: &OsStr, target: &OsStr) -> bool {
    let rest = name.as_bytes().strip_prefix(target.as_bytes()).and_then(|rest| rest.strip_prefix(b"."));
    let number = rest.and_then(|rest| rest.strip_suffix(PARTIAL));
    number.is_some_and(|number| {
        number.len() == DIGITS && number.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

fn is_there(path: &Path) -> Error {
    Error::new(Kind::Busy, format!("there is a {} already; --force replaces it", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_export_to_the_same_target_left_is_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a.img");
        let number = "0123456789abcdef0123456789abcdef";
        let gone = format!("a.img.{number}.partial");
        let kept = [
            format!("b.img.{number}.partial"),
            "a.img.partial".into(),
            format!("a.img.{}.partial", &number[1..]),
            format!("a.img.{}.partial", number.to_uppercase()),
            format!("a.img.{number}.partial.gz"),
        ];
        for name in kept.iter().chain([&gone]) {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        let new = NewFile::new(&target, false).unwrap();
        // Whoever has it locked is writing it.
        let busy = File::options().write(true).open(folder.path().join(&gone)).unwrap();
        assert!(locks::try_lock(&busy, locks::Kind::Exclusive, Bytes::ALL).unwrap());
        new.clear_remains();
        assert!(folder.path().join(&gone).exists());
        drop(busy);
        new.clear_remains();
        assert!(!folder.path().join(&gone).exists());
        assert!(kept.iter().all(|name| folder.path().join(name).exists()));
    }

    #[test]
    fn it_has_its_name_when_it_is_finished_and_replaces_what_it_may() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a.img");
        let names = || std::fs::read_dir(folder.path()).unwrap().count();
        let write = |replace| {
            let mut new = NewFile::new(&target, replace)?;
            new.begin(8192)?;
            new.write(4096, b"data")?;
            Ok::<_, Error>(new)
        };
        drop(write(false).unwrap());
        assert_eq!(names(), 0);
        // Somebody is faster.
        let mut slow = write(false).unwrap();
        write(false).unwrap().finish().unwrap();
        assert_eq!(slow.finish().unwrap_err().kind(), Kind::Busy);
        drop(slow);
        assert_eq!(NewFile::new(&target, false).err().unwrap().kind(), Kind::Busy);
        write(true).unwrap().finish().unwrap();
        assert_eq!((names(), std::fs::metadata(&target).unwrap().len()), (1, 8192));
        assert_eq!(std::fs::metadata(&target).unwrap().mode() & 0o777, 0o600);
    }
}
