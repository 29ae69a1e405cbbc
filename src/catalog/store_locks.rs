//! The locks of a store as a whole, for whoever changes which records there are. In a store that lies in a
//! pool, a lock of the pool's comes with each.

use crate::base::root::records::Claim;
use crate::base::root::{create_dir_durable, files};
use crate::base::{Context, Result, locks};
use crate::catalog::Catalog;
use crate::catalog::lock::pool::await_claim;
use nix::fcntl::{Flock, OFlag};
use std::fs::File;

/// The lock of all records of a store, for whoever makes, deletes or clears away some, for short
/// moments: an flock on `volumes/`.
pub(crate) struct RecordsLock {
    // Let go of before the other one: who takes that finds this one free.
    _claim: Option<Claim>,
    _folder: Flock<File>,
}

impl RecordsLock {
    /// Waits until nobody else has it.
    pub(crate) fn acquire(catalog: &Catalog) -> Result<Self> {
        let path = catalog.root().volumes();
        let attempt = || format!("lock {}", path.display());
        create_dir_durable(&path)?;
        let folder = files::folder(&path).context(attempt)?;
        let folder = locks::lock_whole(folder).context(attempt)?;
        Ok(RecordsLock { _claim: await_claim(&path)?, _folder: folder })
    }
}

/// The lock of the names of all volumes of a store, for whoever gives a volume one: an flock on
/// `names.lock`. It comes before the [`RecordsLock`]. Whoever has it may wait for the host process of an
/// attached volume, whose clients may wait for the [`RecordsLock`].
pub(crate) struct NamesLock {
    _claim: Option<Claim>,
    _file: Flock<File>,
}

impl NamesLock {
    /// Waits until nobody else has it.
    pub(crate) fn acquire(catalog: &Catalog) -> Result<Self> {
        let path = catalog.root().path().join("names.lock");
        let attempt = || format!("lock {}", path.display());
        create_dir_durable(catalog.root().path())?;
        let file = files::open_with(&path, OFlag::O_WRONLY | OFlag::O_CREAT);
        let file = locks::lock_whole(file.context(attempt)?).context(attempt)?;
        Ok(NamesLock { _claim: await_claim(&path)?, _file: file })
    }
}
