//! A new top layer for an attached volume: a snapshot and a new data key both take one.
//!
//! The process that serves the volume is confined, and makes files in its own volume's folder alone: it makes
//! the layer there, and the command that asked links that to where layers lie.

use super::{PATIENCE, switch};
use crate::backing::file::Place;
use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::freeze::{Freeze, Maker};
use crate::catalog::layer_file::make_layer;
use crate::catalog::metadata::LayerRecord;
use crate::catalog::{Catalog, LayerId};
use crate::disk::{Cipher, Disk};
use crate::host::control::conversation::Conversation;
use crate::host::state::{Record, State, gone};
use crate::image::lock::Access;
use crate::volume::layers::{self, Layer};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long the queues may stand still for other volumes that are to be paused as well.
const HOLD: Duration = Duration::from_secs(5);

/// A new top layer that a volume is to have.
pub(super) struct NewTop<C> {
    /// The id that the command has chosen.
    pub(super) id: LayerId,
    /// How the layer is going to be encrypted.
    pub(super) cipher: C,
    /// How many of the layers below it are going to be hydrated from, counted from the lowest.
    pub(super) leaving: usize,
}

impl Record {
    /// Freezes the volume's top, and has the queues go on with a new one above it. `commit` replaces the
    /// record. Returns what `commit` does, and how long the queues stood still.
    ///
    /// # Errors
    /// What keeps the layer from being made, linked or opened; as [`switch`]. The volume goes on
    /// with the top that it had.
    pub(super) fn freeze_top<T>(
        &self,
        state: &mut State,
        new: NewTop<impl FnOnce(&State, &LayerRecord) -> Result<Cipher>>,
        client: &mut Conversation<'_>,
        commit: impl FnOnce(Freeze, &mut State) -> Result<T>,
    ) -> Result<(T, Duration)> {
        let NewTop { id, cipher, leaving } = new;
        let freeze = Freeze::begin(&self.catalog, &state.lock, &state.metadata, Maker::Host(id))?;
        let record = *freeze.new_top();
        let mut freeze = Some(freeze);
        let opened =
            cipher(state, &record).and_then(|cipher| open(&self.catalog, state, cipher, &record, client));
        let done = opened.and_then(|(top, hold)| {
            let next = |disk: &Arc<Disk>, state: &State| above(disk, state, top, leaving);
            switch(state, next, |state| {
                if hold {
                    client.hold(HOLD)?;
                }
                let freeze = freeze.take().expect("the commit comes once");
                commit(freeze, state)
            })
        });
        if let Some(freeze) = freeze {
            freeze.cancel(&self.catalog, &state.lock);
        }
        if done.is_ok() {
            // Nobody writes the old top any more: others may read it.
            state.layers[1].image_lock.stop_writing();
        }
        done
    }
}

/// Makes the new layer, has the client link it, opens it, and brings most of what is not on disk yet there,
/// so that the pause is short. Returns whether the client wants to be asked before the commit.
fn open(
    catalog: &Catalog,
    state: &State,
    cipher: Cipher,
    new_top: &LayerRecord,
    client: &mut Conversation<'_>,
) -> Result<(Layer, bool)> {
    let path = catalog.own_layer_path(state.metadata.id(), new_top.id);
    make_layer(&path, &catalog.folder(state.metadata.id()), new_top.size, false)?;
    let hold = client.have_layer_linked(PATIENCE)?;
    let block_size = state.metadata.sector_size().bytes();
    is_linked(&path, &catalog.layer_path(new_top.id))?;
    let top = state.layers.first().ok_or_else(gone)?;
    // By the name that it has in the volume's folder: the other one is not this process's to open.
    let layer = Layer::open(&Place::whole(path), Access::ReadWrite, block_size, cipher, Some(top))?;
    top.backing.sync_data().context(|| "sync the top layer")?;
    Ok((layer, hold))
}

/// Looks whether the client has done its part.
fn is_linked(own: &Path, layer: &Path) -> Result<()> {
    match layer.symlink_metadata() {
        Ok(there) if files::is_same(&there, &own.symlink_metadata()?) => Ok(()),
        // The process may run as a user who sees nothing but his own volume's folder.
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Ok(()),
        _ => Err(Error::new(Kind::NotFound, format!("{} was not made", layer.display()))),
    }
}

/// The layers with `top` above what was the top, which is synced and from here on only
/// read; and the disk over them.
fn above(disk: &Arc<Disk>, state: &State, top: Layer, leaving: usize) -> Result<(Disk, Vec<Layer>)> {
    disk.flush().context(|| "sync the top layer")?;
    let old_top = state.layers.first().ok_or_else(gone)?;
    let frozen = old_top.backing.frozen().context(|| "open the layer for reading")?;
    let frozen = Layer { backing: Arc::new(frozen), ..old_top.clone() };
    let next: Vec<Layer> = [top, frozen].into_iter().chain(state.layers[1..].iter().cloned()).collect();
    let disk = disk.with_new_top(layers::chain(&next)).context(|| "open its layers")?;
    Ok((disk.hydrating_lowest(leaving), next))
}
