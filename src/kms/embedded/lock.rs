//! The lock between the processes that use one store: `kms/lock`, never replaced, never written.
//!
//! Byte 1 is the store: shared to read, exclusive to change. Byte 0 is a turnstile that everybody passes
//! first, and where a writer stays: without it readers that overlap could keep a writer out for ever. Far
//! behind these each key has a byte of its own: for whoever tells another region of that key.

use crate::base::locks::{self, Bytes};
use crate::base::root::files;
use crate::kms::KmsError;
use crate::kms::embedded::plain::failed;
use nix::fcntl::OFlag;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use uuid::Uuid;

const TURNSTILE: Bytes = Bytes::one(0);
const STORE: Bytes = Bytes::one(1);

/// The lock, held until it is dropped.
///
/// It belongs to the open file, so that two threads of one process exclude each other too.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits until nobody changes the store; needs no write permission. `None` if there is no store's folder.
    pub(super) fn shared(path: &Path) -> Result<Option<Self>, KmsError> {
        let opened = match files::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => open_or_create(path),
            opened => opened,
        };
        let file = match opened {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|e| failed("lock the KMS store", path, &e))?,
        };
        let lock = |byte| lock(&file, locks::Kind::Shared, byte, path);
        lock(TURNSTILE)?;
        lock(STORE)?;
        locks::unlock(&file, TURNSTILE);
        Ok(Some(Lock { _file: file }))
    }

    /// Waits until nobody uses the store. Makes the lock's file if it is not there.
    pub(super) fn exclusive(path: &Path) -> Result<Self, KmsError> {
        let file = open_or_create(path).map_err(|e| failed("lock the KMS store", path, &e))?;
        lock(&file, locks::Kind::Exclusive, TURNSTILE, path)?;
        lock(&file, locks::Kind::Exclusive, STORE, path)?;
        Ok(Lock { _file: file })
    }

    /// Waits until nobody else tells another region of this key, or asks one about it. Whoever has this lock
    /// may take the others.
    pub(super) fn telling_of(path: &Path, key: Uuid) -> Result<Self, KmsError> {
        let file = open_or_create(path).map_err(|e| failed("lock the KMS store", path, &e))?;
        // Two keys with one byte would wait for each other, and nothing else.
        let byte = (1 << 62) | (key.as_u64_pair().1 >> 2) as i64;
        lock(&file, locks::Kind::Exclusive, Bytes::one(byte), path)?;
        Ok(Lock { _file: file })
    }
}

fn open_or_create(path: &Path) -> std::io::Result<File> {
    files::open_with(path, OFlag::O_RDWR | OFlag::O_CREAT)
}

fn lock(file: &File, kind: locks::Kind, byte: Bytes, path: &Path) -> Result<(), KmsError> {
    locks::lock(file, kind, byte).map_err(|e| failed("lock the KMS store", path, &e))
}
