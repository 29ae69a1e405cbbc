//! A snapshot of an attached volume: the queues are paused, the top layer is synced and frozen, and they go on with a
//! new one.
//!
//! This process, which is confined, writes in its own volume's folder alone: it makes the new layer there, and the command
//! that asked links that to where layers lie and writes the snapshot's record.

use crate::base::{Context, Error, Kind, Result};
use crate::catalog::freeze::{Freeze, Maker};
use crate::catalog::layer_file::make_layer;
use crate::catalog::metadata::LayerRecord;
use crate::catalog::snapshot::Wanted;
use crate::catalog::{Catalog, Snapshot};
use crate::crypt::Dek;
use crate::crypt::xts::{DataUnit, Engine, new_cipher};
use crate::disk::Cipher;
use crate::host::control::conversation::{Conversation, Frozen};
use crate::host::state::{Record, State, gone};
use crate::image::lock::Access;
use crate::vhost::pause::Paused;
use crate::volume::layers::{self, Layer};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long what is in flight may take to end.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long the queues may stand still for other volumes that are to be paused as well.
const HOLD: Duration = Duration::from_secs(5);

impl Record {
    /// Makes a snapshot, step by step as the client says. Whatever fails before the commit, the volume goes on as if
    /// nothing had been.
    pub fn snapshot(&self, engine: Engine, wanted: Wanted, client: &mut Conversation<'_>) -> Result<Frozen> {
        let mut state = self.state();
        let state = state.as_mut().ok_or_else(gone)?;
        let _is_served = state.serving()?;
        if state.read_only {
            return Err(Error::new(Kind::Busy, "it is attached read-only; detach it first"));
        }
        // What is being copied goes into the layer that takes the writes, whichever that is.
        self.hydrator.stop();
        let frozen = self.freeze(engine, wanted, client, state);
        self.hydrator.begin(state, frozen.is_ok());
        frozen
    }

    fn freeze(
        &self,
        engine: Engine,
        wanted: Wanted,
        client: &mut Conversation<'_>,
        state: &mut State,
    ) -> Result<Frozen> {
        let maker = Maker::Host(wanted.layer);
        let freeze = Freeze::begin(&self.catalog, &state.lock, &state.metadata, maker)?;
        let new_top = *freeze.new_top();
        let ready = cipher(state, engine, &new_top)
            .and_then(|cipher| open_top(&self.catalog, state, cipher, &new_top, client));
        let (layer, hold) = match ready {
            Ok(ready) => ready,
            Err(e) => {
                freeze.cancel(&self.catalog, &state.lock);
                return Err(e);
            }
        };
        let serving = state.serving()?;
        let ready =
            serving.pause(PATIENCE).context(|| "wait for what is in flight").and_then(|mut paused| {
                let leaving = state.metadata.layout().leaving();
                let next = get_ready(&mut paused, state, layer, leaving, hold.then_some(client))?;
                Ok((paused, next))
            });
        let (paused, next) = match ready {
            Ok(ready) => ready,
            Err(e) => {
                freeze.cancel(&self.catalog, &state.lock);
                return Err(e);
            }
        };
        let (snapshot, pause) = commit(&self.catalog, freeze, paused, state, next, wanted)?;
        log::info!("{} is frozen; the queues stood still for {pause:?}", snapshot.id());
        Ok(Frozen::new(&snapshot, pause))
    }
}

/// Makes the new layer, has the client link it, opens it, and brings most of what is not on disk yet there, so that the pause is
/// short. Answers whether the client wants to be asked before the commit.
pub(crate) fn open_top(
    catalog: &Catalog,
    state: &State,
    cipher: Cipher,
    new_top: &LayerRecord,
    client: &mut Conversation<'_>,
) -> Result<(Layer, bool)> {
    let path = catalog.own_layer_path(state.metadata.id(), new_top.id);
    make_layer(&path, new_top.size, false)?;
    let hold = client.have_layer_linked(PATIENCE)?;
    let block_size = state.metadata.sector_size().bytes();
    is_linked(&path, &catalog.layer_path(new_top.id))?;
    // By the name that it has there: the other one is not this process's to open.
    let top = state.layers.first().ok_or_else(gone)?;
    let layer = Layer::open(&path, Access::ReadWrite, block_size, cipher, Some(top))?;
    top.store.file().sync_data().context(|| "sync the top layer")?;
    Ok((layer, hold))
}

/// Looks whether the client has done its part.
fn is_linked(own: &Path, layer: &Path) -> Result<()> {
    let id = |path| std::fs::symlink_metadata(path).map(|m: std::fs::Metadata| (m.dev(), m.ino()));
    match id(layer) {
        Ok(there) if there == id(own)? => Ok(()),
        // The process may run as a user who sees nothing but his own volume's folder.
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        _ => Err(Error::new(Kind::NotFound, format!("{} was not made", layer.display()))),
    }
}

/// The new top has the key of the old one; a mask, which is no secret, is each layer's own.
fn cipher(state: &State, engine: Engine, layer: &LayerRecord) -> Result<Cipher> {
    if !layer.masked {
        return Ok(state.layers.first().and_then(|top| top.cipher.clone()));
    }
    let unit = DataUnit::from_bytes(state.metadata.sector_size().bytes() as usize);
    let unit = unit.expect("sector sizes are data units");
    Ok(Some(Arc::from(new_cipher(engine, &Dek::mask_of_layer(layer.id.as_bytes())?, unit)?)))
}

/// Everything that can fail, while the queues stand still: the old top is synced, and each queue has opened the new
/// layers, of which the lowest so many are leaving. With a `client`, it is told, and has to say that it shall go on.
pub(crate) fn get_ready(
    paused: &mut Paused<'_>,
    state: &State,
    new_top: Layer,
    leaving: usize,
    client: Option<&mut Conversation<'_>>,
) -> Result<Vec<Layer>> {
    paused.disk().flush().context(|| "sync the top layer")?;
    let old_top = state.layers.first().ok_or_else(gone)?;
    let frozen = old_top.store.frozen().context(|| "open the layer for reading")?;
    let frozen = Layer { store: Arc::new(frozen), ..old_top.clone() };
    let next: Vec<Layer> = [new_top, frozen].into_iter().chain(state.layers[1..].iter().cloned()).collect();
    let disk = paused.disk().with_new_top(layers::chain(&next)).context(|| "open its layers")?;
    let disk = disk.hydrating_lowest(leaving);
    paused.prepare(Arc::new(disk)).context(|| "let the queues open its layers")?;
    if let Some(client) = client {
        client.hold(HOLD)?;
    }
    Ok(next)
}

fn commit(
    catalog: &Catalog,
    freeze: Freeze,
    paused: Paused<'_>,
    state: &mut State,
    next: Vec<Layer>,
    wanted: Wanted,
) -> Result<(Snapshot, Duration)> {
    let key = state.seal_key.as_ref();
    let snapshot = freeze.commit(catalog, &state.lock, &mut state.metadata, wanted.id, wanted.label, key)?;
    let pause = paused.resume();
    // Nobody writes the old top any more: others may read it.
    next[1].image_lock.stop_writing();
    state.layers = next;
    Ok((snapshot, pause))
}
