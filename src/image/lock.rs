//! QEMU's image locks on a layer's file, so that QEMU's tools and machines keep off it, and so that we keep
//! off a file which they have open.
//!
//! QEMU (docs/system/images "Image locking", block/file-posix.c) tells others about each of its permissions
//! by shared OFD locks on single bytes: byte 100+n "I use permission n", byte 200+n "I do not share
//! permission n". Whoever wants in takes its own locks first and then asks whether anybody's contradict: so
//! of two that come at the same time at most both fail, and never both get in.

use crate::base::locks::{self, Bytes};
use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result};
use crate::image::writers::{self, Writers};
use nix::fcntl::OFlag;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// QEMU's permissions, by their bit's number.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const WRITE_UNCHANGED: i64 = 2;
const RESIZE: i64 = 3;

/// How often, and after how long, it is looked for a writer who may be about to close the file: two seconds
/// in all.
const LOOKS: u32 = 41;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// What is going to be done with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading alone: others may read too.
    Read,
    /// Reading and writing: others may not even read, since what they see would fit together only by luck.
    ReadWrite,
}

impl Access {
    fn used(self) -> &'static [i64] {
        match self {
            Access::Read => &[CONSISTENT_READ],
            Access::ReadWrite => &[CONSISTENT_READ, WRITE],
        }
    }

    fn unshared(self) -> &'static [i64] {
        match self {
            Access::Read => &[WRITE, RESIZE],
            Access::ReadWrite => &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE],
        }
    }
}

/// A file that QEMU sees as in use, for as long as this lives.
#[derive(Debug)]
pub struct ImageLock {
    file: File,
    /// Whether another process has the open file as well, and what becomes of the lock is its affair.
    is_others: AtomicBool,
}

impl ImageLock {
    /// Locks the file at `path` for `access`. A block device that is going to be written is claimed besides,
    /// for as long as the lock lives: nobody can mount it, nor make it a part of LVM or RAID, meanwhile.
    ///
    /// # Errors
    /// `Busy` if QEMU, or another program that keeps its rules, has the file open in a way that does not go
    /// together with `access`; and if a device is claimed already.
    pub fn acquire(path: &Path, access: Access) -> Result<Self> {
        let attempt = || format!("lock {}", path.display());
        // Without O_CREAT, O_EXCL means nothing for anything but a block device.
        let claim = if access == Access::ReadWrite { OFlag::O_EXCL } else { OFlag::empty() };
        let file = files::open_layer(path, OFlag::O_RDONLY | claim).map_err(|e| match e.kind() {
            ErrorKind::ResourceBusy => claimed(path),
            _ => e.into(),
        });
        Self::on(file.context(attempt)?, path, access)
    }

    /// Locks a file that is open, and that `path` meant, for messages.
    ///
    /// # Errors
    /// As for [`ImageLock::acquire`].
    pub fn of(file: &File, path: &Path, access: Access) -> Result<Self> {
        // The locks are an open file's; a copy of the descriptor would share it.
        let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Self::on(again.context(|| format!("lock {}", path.display()))?, path, access)
    }

    /// Takes the lock by `file`, which was opened for this alone.
    fn on(file: File, path: &Path, access: Access) -> Result<Self> {
        let lock = ImageLock { file, is_others: AtomicBool::new(false) };
        lock.take(path, access)?;
        Ok(lock)
    }

    /// The lock of another process, which has passed its open `file`: that process's until
    /// [`ImageLock::keep`].
    pub(crate) fn of_another(file: File) -> Self {
        ImageLock { file, is_others: AtomicBool::new(true) }
    }

    /// This process has the lock from now on, and no other.
    pub(crate) fn keep(&self) {
        self.is_others.store(false, Ordering::Relaxed);
    }

    /// Another process, to which the open file was passed, has the lock from now on.
    pub(crate) fn leave(&self) {
        self.is_others.store(true, Ordering::Relaxed);
    }

    /// Gives all up for a moment: others may do with the file what they like, until it is
    /// [taken again](ImageLock::take).
    pub fn give_way(&self) {
        locks::unlock(&self.file, Bytes::ALL);
    }

    /// Takes the lock on the file that it is on; `path` is for messages.
    ///
    /// # Errors
    /// As for [`ImageLock::acquire`].
    pub fn take(&self, path: &Path, access: Access) -> Result<()> {
        let attempt = || format!("lock {}", path.display());
        let lock = self;
        let used = access.used().iter().map(|n| USED + n);
        let unshared = access.unshared().iter().map(|n| UNSHARED + n);
        for byte in used.chain(unshared) {
            if !locks::try_lock(&lock.file, locks::Kind::Shared, Bytes::one(byte)).context(attempt)? {
                return Err(in_use(path));
            }
        }
        // Somebody must not use what we do not share, nor refuse to share what we use.
        let contrary_use = access.unshared().iter().map(|n| USED + n);
        let contrary_refusal = access.used().iter().map(|n| UNSHARED + n);
        for byte in contrary_use.chain(contrary_refusal) {
            let (kind, byte) = (locks::Kind::Exclusive, Bytes::one(byte));
            if locks::is_locked_against(&lock.file, kind, byte).context(attempt)? {
                return Err(in_use(path));
            }
        }
        Ok(())
    }

    /// Looks whether anybody has the file open for writing; `path` is for messages. Returns whether that
    /// could be told, which of a block device it never can.
    ///
    /// # Errors
    /// `Busy` if somebody has, and does not close it soon: a process that is just being started has, for a
    /// moment, what the one that starts it has open.
    pub(crate) fn check_nobody_writes(&self, path: &Path) -> Result<bool> {
        let mut looks = (0..LOOKS).map(|look| {
            std::thread::sleep(if look == 0 { Duration::ZERO } else { BETWEEN_LOOKS });
            writers::of(&self.file)
        });
        match looks.find(|found| *found != Writers::Somebody).unwrap_or(Writers::Somebody) {
            Writers::Nobody => Ok(true),
            Writers::Unknown => Ok(false),
            Writers::Somebody => {
                let who = writers::one_of(&self.file).unwrap_or_else(|| "another process".into());
                let message = format!(
                    "{who} has {} open for writing; end that first (\"lsof\" names all who have it open)",
                    path.display()
                );
                Err(Error::new(Kind::Busy, message))
            }
        }
    }

    /// The file, open for reading.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Whether what is locked is `file`, and not another that had its name for a moment.
    pub fn is_on(&self, file: &File) -> std::io::Result<bool> {
        Ok(files::is_same(&self.file.metadata()?, &file.metadata()?))
    }

    /// Lets others read too: from now on this is as if it had been acquired for [`Access::Read`].
    pub fn stop_writing(&self) {
        let gone = |of: fn(Access) -> &'static [i64], base| {
            let kept = of(Access::Read);
            of(Access::ReadWrite).iter().filter(move |n| !kept.contains(n)).map(move |n| base + n)
        };
        for byte in gone(Access::used, USED).chain(gone(Access::unshared, UNSHARED)) {
            // Unlocking needs nothing that could be short; were it to fail, others would
            // be kept off needlessly.
            locks::unlock(&self.file, Bytes::one(byte));
        }
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        if !*self.is_others.get_mut() {
            locks::unlock(&self.file, Bytes::ALL);
        }
    }
}

/// The error for a device that somebody has claimed.
fn claimed(path: &Path) -> Error {
    let message = format!(
        "{} is mounted, in part or as a whole, or another program has it for itself (LVM, RAID, swap, \
         another sealblk); end that first (\"lsblk\" shows who has it)",
        path.display()
    );
    Error::new(Kind::Busy, message)
}

fn in_use(path: &Path) -> Error {
    Error::new(
        Kind::Busy,
        format!(
            "{} is open in QEMU, one of its tools, or another sealblk; end that first (\"lsof\" names it)",
            path.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_same_name_is_not_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        let first = File::create(&path).unwrap();
        let lock = ImageLock::acquire(&path, Access::Read).unwrap();
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        let second = File::create(&path).unwrap();
        assert!(lock.is_on(&first).unwrap() && !lock.is_on(&second).unwrap());
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let get = |access| ImageLock::acquire(file.path(), access);
        let reader = get(Access::Read).unwrap();
        let second = get(Access::Read).unwrap();
        assert_eq!(get(Access::ReadWrite).unwrap_err().kind(), Kind::Busy);
        drop((reader, second));
        let writer = get(Access::ReadWrite).unwrap();
        assert_eq!(get(Access::Read).unwrap_err().kind(), Kind::Busy);
        assert_eq!(get(Access::ReadWrite).unwrap_err().kind(), Kind::Busy);
        writer.stop_writing();
        let reader = get(Access::Read).unwrap();
        assert_eq!(get(Access::ReadWrite).unwrap_err().kind(), Kind::Busy);
        drop((writer, reader));
        assert!(get(Access::ReadWrite).is_ok());
    }
}
