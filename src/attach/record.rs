//! The metadata of an attached volume. While it is attached, its host process alone may replace `volume.json`, and does
//! it here.

use crate::error::{Context, Error, Kind, Result};
use crate::volume::catalog::Catalog;
use crate::volume::lock::VolumeLock;
use crate::volume::rewrap::Rewrapped;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An attached volume's place in the store.
pub struct Record {
    catalog: Catalog,
    /// None once the volume is given up.
    lock: Mutex<Option<VolumeLock>>,
}

impl Record {
    /// Of the volume that `lock` is of.
    pub fn new(catalog: Catalog, lock: VolumeLock) -> Self {
        Record { catalog, lock: Mutex::new(Some(lock)) }
    }

    /// Notes, durably, how a data key is wrapped now.
    ///
    /// # Errors
    /// As [`crate::volume::Metadata::rewrap`] and [`Catalog::store`]; the file is as it was then.
    pub fn rewrap(&self, new: &Rewrapped) -> Result<()> {
        let lock = self.lock();
        let gone = || Error::new(Kind::NotFound, "it was detached just now");
        let lock = lock.as_ref().ok_or_else(gone)?;
        let mut metadata = self.catalog.load(lock.volume())?;
        metadata.rewrap(new)?;
        self.catalog.store(lock, &mut metadata).context(|| format!("rewrap {}", lock.volume()))
    }

    /// Gives the volume up: the next may have it.
    pub fn release(&self) {
        drop(self.lock().take());
    }

    fn lock(&self) -> MutexGuard<'_, Option<VolumeLock>> {
        // It is whole even if somebody panicked while holding it.
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
