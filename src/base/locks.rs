//! Locks on files that other processes honour: on ranges of bytes, and on whole files.
//!
//! A lock on a range is an open-file-description (OFD) lock, fcntl_locking(2): the kernel's own, tied to the
//! open file and not to the process, so that two threads exclude each other as well, and gone when the last
//! descriptor is closed, however its holder ends.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use std::fs::File;
use std::io;

/// How a range is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Others may lock it in this way too.
    Shared,
    /// Nobody else may lock it.
    Exclusive,
}

/// Bytes of a file that are locked; they need not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    start: i64,
    len: i64,
}

impl Bytes {
    /// Every byte, wherever the file's end is and will be.
    pub const ALL: Bytes = Bytes::range(0, 0);

    /// The one byte at `at`.
    pub const fn one(at: i64) -> Self {
        Bytes::range(at, 1)
    }

    /// `len` bytes from `start` on; a `len` of 0 reaches to the end, wherever that will be.
    pub const fn range(start: i64, len: i64) -> Self {
        Bytes { start, len }
    }

    fn lock(self, kind: libc::c_int) -> libc::flock {
        libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.start,
            l_len: self.len,
            // The kernel insists on 0 for OFD locks.
            l_pid: 0,
        }
    }
}

impl Kind {
    fn of_fcntl(self) -> libc::c_int {
        match self {
            Kind::Shared => libc::F_RDLCK,
            Kind::Exclusive => libc::F_WRLCK,
        }
    }
}

/// Locks `bytes` unless another open file has a lock there that excludes it. Returns
/// whether it is locked now.
pub fn try_lock(file: &File, kind: Kind, bytes: Bytes) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&bytes.lock(kind.of_fcntl()))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Waits until `bytes` can be locked, and locks them.
pub fn lock(file: &File, kind: Kind, bytes: Bytes) -> io::Result<()> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLKW(&bytes.lock(kind.of_fcntl()))) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Whether another open file has a lock on some of `bytes` that would exclude one of this
/// kind. Takes nothing.
pub fn is_locked_against(file: &File, kind: Kind, bytes: Bytes) -> io::Result<bool> {
    let mut found = bytes.lock(kind.of_fcntl());
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

/// Gives up the locks of this open file on `bytes`. Closing a descriptor alone would not, while a child
/// process that is just being started still has a copy of it.
pub fn unlock(file: &File, bytes: Bytes) {
    // Unlocking fails for no reason that closing would not see to.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&bytes.lock(libc::F_UNLCK)));
}

/// Waits until nobody else has a lock on the whole file, and locks it (flock(2)) until the answer is dropped.
pub fn lock_whole(file: File) -> io::Result<Flock<File>> {
    Ok(Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e)?)
}
