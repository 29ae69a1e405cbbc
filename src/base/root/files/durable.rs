//! Folders and files that are there after a power cut, or not there at all.

use super::{Place, folder, give, link, open, open_guarded, open_with, remove, rename};
use crate::base::root::{parent_of, records};
use crate::base::{Context, Result, spare};
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fstat};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

/// Makes `dir` and its parents, mode 0700, each for the owner of the folder that it lies in, and makes the
/// new entries durable.
pub fn create_dir_durable(dir: &Path) -> Result<()> {
    if let Some((records, folder)) = records::folder(dir) {
        records.make_folder(folder).context(|| format!("create folder {}", dir.display()))?;
    }
    create_local_folder(dir)
}

/// As [`create_dir_durable`], for what this host alone has in a folder of records.
pub(crate) fn create_local_folder(dir: &Path) -> Result<()> {
    let attempt = || format!("create folder {}", dir.display());
    match folder(dir) {
        Ok(_) => return Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e).context(attempt),
    }
    let parent = parent_of(dir);
    if parent != dir {
        create_local_folder(parent)?;
    }
    let Place { folder: inside, name } = Place::of(dir).context(attempt)?;
    match spare::with(|| Ok(nix::sys::stat::mkdirat(&inside, name, Mode::S_IRWXU)?)) {
        Ok(()) => {
            let owner = fstat(&inside).context(attempt)?;
            let made = open_guarded(&inside, Path::new(name), OFlag::O_RDONLY | OFlag::O_DIRECTORY);
            made.and_then(|made| give(&made, dir, &owner)).context(attempt)?;
            inside.sync_all().context(|| format!("sync folder {}", parent.display()))
        }
        Err(e) if e.kind() == ErrorKind::AlreadyExists => folder(dir).map(drop).context(attempt),
        Err(e) => Err(e).context(attempt),
    }
}

/// fsyncs a folder, so that names made, renamed or removed in it survive a power cut.
pub fn sync_dir(dir: &Path) -> Result<()> {
    if records::folder(dir).is_some() {
        // Each step there is durable by itself.
        return Ok(());
    }
    folder(dir).and_then(|d| d.sync_all()).context(|| format!("sync folder {}", dir.display()))
}

/// Replaces `path` with `bytes`, mode 0600, atomically and durably: temporary file, fsync, rename,
/// fsync of the folder. After a power cut the file holds the old bytes or the new, never a mixture.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some((records, record)) = records::record(path) {
        return records.replace(record, bytes).context(|| format!("write {}", path.display()));
    }
    write_and(path, bytes, rename)
}

/// As [`replace_file`], where there is no such file yet.
///
/// # Errors
/// `Other`, if there is one: it stays as it is.
pub fn create_file(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some((records, record)) = records::record(path) {
        return records.create(record, bytes).context(|| format!("write {}", path.display()));
    }
    write_and(path, bytes, |tmp, path| {
        link(&open(tmp)?, tmp, path)?;
        remove(tmp)
    })
}

fn write_and(path: &Path, bytes: &[u8], name: impl Fn(&Path, &Path) -> io::Result<()>) -> Result<()> {
    let tmp = {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.tmp", uuid::Uuid::new_v4().simple()));
        path.with_file_name(name)
    };
    let write = || -> io::Result<()> {
        let mut file = open_with(&tmp, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        name(&tmp, path)
    };
    // Best effort: the error that matters is the first one.
    let write = || write().inspect_err(|_| drop(remove(&tmp)));
    spare::with(write).context(|| format!("write {}", path.display()))?;
    sync_dir(parent_of(path))
}
