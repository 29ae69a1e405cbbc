//! What a host process keeps of its volume's data keys, as long as it may have to open the volume again: when
//! it takes the volume over from another process, or back. What the volume does not need any more is wiped.

use crate::base::sync::Locked;
use crate::base::{Error, Kind, Result};
use crate::catalog::Metadata;
use crate::kms::KmsKey;
use crate::volume::kept::Kept;
use std::sync::{Arc, Mutex, MutexGuard};

/// What is kept of the data keys of one volume, in whatever order once it is sealed.
pub(crate) struct Keyring(Mutex<Vec<Kept>>);

impl Keyring {
    /// With these, which are in the order of the volume's keys.
    pub(super) fn new(kept: Vec<Kept>) -> Arc<Self> {
        Arc::new(Keyring(Mutex::new(kept)))
    }

    /// Adds one that the volume gets.
    pub(super) fn add(&self, kept: Kept) {
        self.lock().push(kept);
    }

    /// Wipes those that the volume has not, or not any more.
    pub(super) fn keep(&self, volume: &Metadata) {
        if let Some(needed) = self.find(volume) {
            *self.lock() = needed;
        }
    }

    /// Wipes all.
    pub(super) fn wipe(&self) {
        self.lock().clear();
    }

    /// What is kept of the volume's data keys, in the order of its keys.
    ///
    /// # Errors
    /// `Busy` if it has others now.
    pub(super) fn of(&self, volume: &Metadata) -> Result<Vec<Kept>> {
        let message = || format!("{} has got other data keys meanwhile; attach it anew", volume.id());
        self.find(volume).ok_or_else(|| Error::new(Kind::Busy, message()))
    }

    /// The KMS keys that have given the volume's data keys, in the order of its keys.
    pub(super) fn used(&self, volume: &Metadata) -> Vec<KmsKey> {
        let kept = self.find(volume).unwrap_or_default();
        kept.iter().map(|kept| kept.by().clone()).collect()
    }

    fn find(&self, volume: &Metadata) -> Option<Vec<Kept>> {
        let mine = self.lock();
        if !volume.is_sealed() {
            // Nothing else tells them apart, and it can have got no other: that takes a seal.
            return (mine.len() == volume.keys().len()).then(|| mine.clone());
        }
        let of = |check: Option<[u8; 16]>| mine.iter().find(|kept| Some(kept.check()) == check).cloned();
        volume.keys().iter().map(|key| of(key.check())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Kept>> {
        // It is a whole list even if somebody panicked while holding it.
        self.0.locked()
    }
}
