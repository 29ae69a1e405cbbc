//! A snapshot of an attached volume: its top layer is frozen, and the queues go on with a new one. The
//! command that asked for it writes the snapshot's record.

use super::top::NewTop;
use crate::base::Result;
use crate::catalog::SnapshotId;
use crate::catalog::metadata::LayerRecord;
use crate::catalog::snapshot::Wanted;
use crate::crypt::xts::Engine;
use crate::disk::Cipher;
use crate::host::control::conversation::{Conversation, Frozen};
use crate::host::state::{Record, State};
use crate::volume::layers::mask;

impl Record {
    /// Makes a snapshot, step by step as the client says. Whatever fails before the commit, the volume goes
    /// on as if nothing had been.
    ///
    /// # Errors
    /// As [`Record::change`] and [`Record::freeze_top`].
    pub fn snapshot(&self, engine: Engine, wanted: Wanted, client: &mut Conversation<'_>) -> Result<Frozen> {
        let id = wanted.id;
        self.change(|state| {
            let cipher = |state: &State, layer: &LayerRecord| cipher(state, engine, layer);
            let new = NewTop { id: wanted.layer, cipher, leaving: state.metadata.layout().leaving() };
            let (snapshot, pause) = self.freeze_top(state, new, client, |freeze, state| {
                let State { lock, metadata, seal_key, .. } = state;
                freeze.commit(&self.catalog, lock, metadata, wanted.id, wanted.label, seal_key.as_ref())
            })?;
            // The command that makes a snapshot writes its record now, which takes that the volume still
            // names the snapshot's layers.
            self.hydrator.stay_for(id);
            log::info!("{} is frozen; the queues stood still for {pause:?}", snapshot.id());
            Ok(Frozen::new(&snapshot, pause))
        })
    }
}

impl Record {
    /// The record of a snapshot is written: it needs the volume no more.
    pub fn noted(&self, snapshot: SnapshotId) {
        self.hydrator.noted(snapshot);
    }
}

/// The new top has the key of the old one; a mask, which is no secret, is each layer's own.
fn cipher(state: &State, engine: Engine, layer: &LayerRecord) -> Result<Cipher> {
    if layer.masked {
        return mask(layer, engine, state.metadata.sector_size());
    }
    Ok(state.layers.first().and_then(|top| top.cipher.clone()))
}
