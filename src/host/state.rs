//! An attached volume's place in the store, and what it takes to change it. While it is attached, its host
//! process alone may replace `volume.json`, and does it here.

use crate::base::sync::Locked;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::VolumeLock;
use crate::catalog::metadata::VolumeName;
use crate::catalog::rewrap::{Rewrapped, SlotChange};
use crate::catalog::{Catalog, Metadata};
use crate::crypt::SealKey;
use crate::host::changes::hydrate::Hydrator;
use crate::vhost::tenure::Serving;
use crate::volume::layers::Layer;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// What the host process knows of its volume.
pub struct Record {
    pub(super) catalog: Catalog,
    /// `None` while another process has the volume.
    state: Mutex<Option<State>>,
    /// What hydrates the volume from its leaving layers.
    pub(super) hydrator: Hydrator,
}

/// The volume as it is now. The metadata is what was proved right at the attach and changed since by this
/// process: what stands in the file meanwhile is never asked.
pub(crate) struct State {
    pub(super) lock: VolumeLock,
    pub(super) metadata: Metadata,
    pub(super) read_only: bool,
    /// `None` for an unencrypted volume.
    pub(super) seal_key: Option<SealKey>,
    /// The top first; none once the queues have ended.
    pub(super) layers: Vec<Layer>,
    /// Not owned: its end is the attachment's, whatever is going on here.
    pub(super) serving: Weak<Serving>,
}

impl Record {
    /// Of a volume that this process does not have yet.
    pub fn new(catalog: Catalog, hydrator: Hydrator) -> Arc<Self> {
        Arc::new_cyclic(|record| Record {
            catalog,
            state: Mutex::default(),
            hydrator: hydrator.of(record.clone()),
        })
    }

    /// Of the volume as it was opened, from now on.
    pub(super) fn hold(&self, state: State) {
        *self.state() = Some(state);
    }

    /// Notes what the guest wants of its writes, for whoever serves it after this process.
    pub fn note_write_through(&self, write_through: bool) {
        if let Some(state) = &mut *self.state() {
            state.lock.note_write_through(write_through);
        }
    }

    /// Notes, durably, how a data key is wrapped now.
    ///
    /// # Errors
    /// As [`Metadata::rewrap`] and [`Catalog::save`]; the file is as it was then.
    pub fn rewrap(&self, new: &Rewrapped) -> Result<()> {
        self.change_wrapping(|next| next.rewrap(new))
    }

    /// Notes, durably, that a data key has one slot more, or less.
    ///
    /// # Errors
    /// As [`Metadata::change_slot`] and [`Catalog::save`]; the file is as it was then.
    pub fn change_slot(&self, change: &SlotChange) -> Result<()> {
        self.change_wrapping(|next| next.change_slot(change))
    }

    fn change_wrapping(&self, change: impl FnOnce(&mut Metadata) -> Result<()>) -> Result<()> {
        let mut state = self.state();
        let state = state.as_mut().ok_or_else(gone)?;
        let mut next = state.metadata.clone();
        change(&mut next)?;
        let id = next.id();
        self.catalog.save(&state.lock, &mut next).context(|| format!("rewrap {id}"))?;
        state.metadata = next;
        Ok(())
    }

    /// Notes the volume's name, durably, or that it has none.
    ///
    /// # Errors
    /// As [`Catalog::save`]; the file is as it was then.
    pub fn rename(&self, name: Option<VolumeName>) -> Result<()> {
        let mut state = self.state();
        let state = state.as_mut().ok_or_else(gone)?;
        let mut next = state.metadata.renamed(name);
        let id = next.id();
        self.catalog.save(&state.lock, &mut next).context(|| format!("rename {id}"))?;
        state.metadata = next;
        Ok(())
    }

    /// Waits for a change that is under way; from now on there is none that has to do with the queues. The
    /// keys of the layers are let go.
    pub fn stop_serving(&self) {
        if let Some(state) = self.state().as_mut() {
            state.serving = Weak::new();
            state.layers.clear();
            state.seal_key = None;
        }
        self.hydrator.end();
    }

    /// Whether this process has the volume.
    pub fn has_volume(&self) -> bool {
        self.state().is_some()
    }

    /// Gives the volume up: the next may have it. Returns whether this process had it.
    pub fn release(&self) -> bool {
        let Some(State { lock, .. }) = self.state().take() else { return false };
        if let Err(e) = self.catalog.forget_own_layers(&lock) {
            log::warn!("{e}; the next command that has {} tries again", lock.volume());
        }
        true
    }

    pub(super) fn state(&self) -> MutexGuard<'_, Option<State>> {
        // It is whole even if somebody panicked while holding it.
        self.state.locked()
    }
}

impl State {
    /// The queues, while the volume is served.
    pub(super) fn serving(&self) -> Result<Arc<Serving>> {
        self.serving.upgrade().ok_or_else(gone)
    }
}

pub(super) fn gone() -> Error {
    Error::new(Kind::NotFound, "it was detached, or handed over, just now")
}
