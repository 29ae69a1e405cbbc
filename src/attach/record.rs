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
    /// None while another process has the volume.
    lock: Mutex<Option<VolumeLock>>,
}

impl Record {
    /// Of a volume that this process does not have yet.
    pub fn new(catalog: Catalog) -> Self {
        Record { catalog, lock: Mutex::default() }
    }

    /// Of the volume that `lock` is of, from now on.
    pub fn hold(&self, lock: VolumeLock) {
        *self.lock() = Some(lock);
    }

    /// Notes, durably, how a data key is wrapped now.
    ///
    /// # Errors
    /// As [`crate::volume::Metadata::rewrap`] and [`Catalog::store`]; the file is as it was then.
    pub fn rewrap(&self, new: &Rewrapped) -> Result<()> {
        let lock = self.lock();
        let gone = || Error::new(Kind::Busy, "it is being handed over, or detached; try again");
        let lock = lock.as_ref().ok_or_else(gone)?;
        let mut metadata = self.catalog.load(lock.volume())?;
        metadata.rewrap(new)?;
        self.catalog.store(lock, &mut metadata).context(|| format!("rewrap {}", lock.volume()))
    }

    /// Whether the guest wants writes to be durable when they complete.
    pub fn write_through(&self) -> bool {
        self.lock().as_ref().is_some_and(VolumeLock::write_through)
    }

    /// Notes what the guest wants, for whoever serves it after this process.
    pub fn note_write_through(&self, write_through: bool) {
        if let Some(lock) = &mut *self.lock() {
            lock.note_write_through(write_through);
        }
    }

    /// Gives the volume up: the next may have it. Answers whether this process had it.
    pub fn release(&self) -> bool {
        self.lock().take().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<VolumeLock>> {
        // It is whole even if somebody panicked while holding it.
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
