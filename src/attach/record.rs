//! An attached volume's place in the store, and what it takes to change it. While it is attached, its host process alone
//! may replace `volume.json`, and does it here.

use crate::crypt::SealKey;
use crate::error::{Context, Error, Kind, Result};
use crate::vhost::backend::Device;
use crate::volume::Metadata;
use crate::volume::catalog::Catalog;
use crate::volume::layers::Layer;
use crate::volume::lock::VolumeLock;
use crate::volume::rewrap::Rewrapped;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// What the host process knows of its volume.
pub struct Record {
    pub(super) catalog: Catalog,
    /// None once the volume is given up.
    state: Mutex<Option<State>>,
}

/// The volume as it is now. The metadata is what was proved right at the attach and changed since by this process: what
/// stands in the file meanwhile is never asked.
pub(super) struct State {
    pub(super) lock: VolumeLock,
    pub(super) metadata: Metadata,
    pub(super) read_only: bool,
    /// None for an unencrypted volume.
    pub(super) seal_key: Option<SealKey>,
    /// The top first; none once the queues have ended.
    pub(super) layers: Vec<Layer>,
    /// Not owned: its end is the attachment's, whatever is going on here.
    device: Weak<Device>,
}

impl Record {
    /// Of the volume that `lock` is of, opened so.
    pub fn new(
        catalog: Catalog,
        lock: VolumeLock,
        metadata: Metadata,
        seal_key: Option<SealKey>,
        layers: Vec<Layer>,
        read_only: bool,
    ) -> Self {
        let state = State { lock, metadata, read_only, seal_key, layers, device: Weak::new() };
        Record { catalog, state: Mutex::new(Some(state)) }
    }

    /// The device that serves the volume from now on.
    pub fn serve(&self, device: &Arc<Device>) {
        if let Some(state) = self.state().as_mut() {
            state.device = Arc::downgrade(device);
        }
    }

    /// Notes, durably, how a data key is wrapped now.
    ///
    /// # Errors
    /// As [`Metadata::rewrap`] and [`Catalog::store`]; the file is as it was then.
    pub fn rewrap(&self, new: &Rewrapped) -> Result<()> {
        let mut state = self.state();
        let state = state.as_mut().ok_or_else(gone)?;
        let mut next = state.metadata.clone();
        next.rewrap(new)?;
        let id = next.id();
        self.catalog.store(&state.lock, &mut next).context(|| format!("rewrap {id}"))?;
        state.metadata = next;
        Ok(())
    }

    /// Waits for a change that is under way; from now on there is none that has to do with the queues. The keys of the
    /// layers are let go.
    pub fn stop_serving(&self) {
        if let Some(state) = self.state().as_mut() {
            state.device = Weak::new();
            state.layers.clear();
            state.seal_key = None;
        }
    }

    /// Gives the volume up: the next may have it.
    pub fn release(&self) {
        let Some(State { lock, .. }) = self.state().take() else { return };
        if let Err(e) = self.catalog.forget_own_layers(&lock) {
            log::warn!("{e}; the next command that has {} tries again", lock.volume());
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, Option<State>> {
        // It is whole even if somebody panicked while holding it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The device, while the volume is served.
    pub(super) fn device(&self) -> Result<Arc<Device>> {
        self.device.upgrade().ok_or_else(gone)
    }
}

pub(super) fn gone() -> Error {
    Error::new(Kind::NotFound, "it was detached just now")
}
