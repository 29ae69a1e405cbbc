//! An attached volume is made larger: the top layer's file grows while the guest goes on, and the queues are paused only to
//! go on with a disk of the new size.

use crate::base::{Context, Error, Kind, Result};
use crate::catalog::grow::Growth;
use crate::host::state::{Record, State, gone};
use crate::virtio::{Geometry, SECTOR_SIZE};
use crate::volume::layers::{self, Layer};
use std::sync::Arc;
use std::time::Duration;

/// How long what is in flight may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

impl Record {
    /// Makes the volume `size` bytes large. When this returns, `volume.json` says so, durably, and requests are judged by
    /// it; the device's configuration is still to show it. Whatever fails, the volume goes on as if nothing had been.
    ///
    /// # Errors
    /// `Busy` if it is attached read-only; as [`Growth::begin`]; what keeps the queues from going on with it.
    pub fn resize(&self, size: u64) -> Result<()> {
        let mut state = self.state();
        let state = state.as_mut().ok_or_else(gone)?;
        if state.read_only {
            return Err(Error::new(Kind::Busy, "it is attached read-only; detach it first"));
        }
        // What is being copied goes into the layer as this disk has it.
        self.hydrator.stop();
        let done = self.grow(size, state);
        self.hydrator.begin(state, false);
        done
    }

    fn grow(&self, size: u64, state: &mut State) -> Result<()> {
        let serving = state.serving()?;
        let top = state.layers.first().ok_or_else(gone)?.clone();
        let growth = Growth::begin(&self.catalog, &state.lock, &state.metadata, size, top.store.file())?;
        let ready = || {
            let store = top.store.lengthened().context(|| "open the top layer anew")?;
            let mut next = state.layers.clone();
            next[0] = Layer { store: Arc::new(store), ..top.clone() };
            let mut paused = serving.pause(PATIENCE).context(|| "wait for what is in flight")?;
            let geometry = Geometry { sectors: size / SECTOR_SIZE, ..paused.disk().geometry() };
            let disk = paused.disk().with_layers(geometry, layers::chain(&next));
            let disk = disk.context(|| "open its layers")?;
            let disk = disk.hydrating_lowest(state.metadata.layout().leaving());
            paused.prepare(Arc::new(disk)).context(|| "let the queues open it")?;
            Ok((paused, next))
        };
        let (paused, next) = match ready() {
            Ok(ready) => ready,
            Err(e) => {
                growth.cancel(&self.catalog, &state.lock);
                return Err(e);
            }
        };
        let key = state.seal_key.as_ref();
        growth.commit(&self.catalog, &state.lock, &mut state.metadata, key)?;
        let pause = paused.resume();
        state.layers = next;
        log::info!("it has {size} bytes; the queues stood still for {pause:?}");
        Ok(())
    }
}
