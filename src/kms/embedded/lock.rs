//! The lock between the processes that use one store: `kms/lock`, never replaced, never written.
//!
//! Byte 1 is the store: shared to read, exclusive to change. Byte 0 is a turnstile that everybody passes first,
//! and where a writer stays: without it readers that overlap could keep a writer out for ever.

use super::plain::failed;
use crate::kms::KmsError;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The lock, held until it is dropped.
///
/// It belongs to the open file, so that two threads of one process exclude each other too.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits until nobody changes the store; needs no write permission. `None` if there is no store's folder.
    pub fn shared(path: &Path) -> Result<Option<Self>, KmsError> {
        let opened = match File::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => open_or_create(path),
            opened => opened,
        };
        let file = match opened {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|e| failed("lock the KMS store", path, &e))?,
        };
        let lock = |kind, byte| set(&file, kind, byte, path);
        lock(libc::F_RDLCK, 0)?;
        lock(libc::F_RDLCK, 1)?;
        lock(libc::F_UNLCK, 0)?;
        Ok(Some(Lock { _file: file }))
    }

    /// Waits until nobody uses the store. Makes the lock's file if it is not there.
    pub fn exclusive(path: &Path) -> Result<Self, KmsError> {
        let file = open_or_create(path).map_err(|e| failed("lock the KMS store", path, &e))?;
        set(&file, libc::F_WRLCK, 0, path)?;
        set(&file, libc::F_WRLCK, 1, path)?;
        Ok(Lock { _file: file })
    }
}

fn open_or_create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn set(file: &File, kind: i32, byte: i64, path: &Path) -> Result<(), KmsError> {
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLKW(&lock)) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(failed("lock the KMS store", path, &e.into())),
        }
    }
}
