//! An attached volume is made larger: the top layer's file grows while the guest goes on, and the queues are
//! paused only to go on with a disk of the new size.

use super::switch;
use crate::base::{Context, Result};
use crate::catalog::grow::Growth;
use crate::disk::Disk;
use crate::host::state::{Record, State, gone};
use crate::virtio::{SECTOR_SIZE, Shape};
use crate::volume::layers::{self, Layer};
use std::sync::Arc;

impl Record {
    /// Makes the volume `size` bytes large. When this returns, `volume.json` says so, durably, and
    /// requests are judged by it; the device's configuration is still to show it. Whatever fails, the
    /// volume goes on as if nothing had been.
    ///
    /// # Errors
    /// As [`Growth::begin`], [`Record::change`] and [`switch`].
    pub fn resize(&self, size: u64) -> Result<()> {
        self.change(|state| self.grow(size, state))
    }

    fn grow(&self, size: u64, state: &mut State) -> Result<()> {
        let top = state.layers.first().ok_or_else(gone)?.clone();
        let growth = Growth::begin(&self.catalog, &state.lock, &state.metadata, size, &top.backing)?;
        let mut growth = Some(growth);
        let longer = top.backing.lengthened(size).context(|| "open the top layer anew");
        let done = longer.and_then(|backing| {
            let next = |disk: &Arc<Disk>, state: &State| {
                let mut next = state.layers.clone();
                next[0] = Layer { backing: Arc::new(backing), ..top.clone() };
                let shape = Shape { sectors: size / SECTOR_SIZE, ..disk.shape() };
                let disk = disk.with_layers(shape, layers::chain(&next)).context(|| "open its layers")?;
                Ok((disk.hydrating_lowest(state.metadata.layout().leaving()), next))
            };
            switch(state, next, |state| {
                let growth = growth.take().expect("the commit comes once");
                let key = state.seal_key.as_ref();
                growth.commit(&self.catalog, &state.lock, &mut state.metadata, key)
            })
        });
        if let Some(growth) = growth {
            growth.cancel(&self.catalog, &state.lock);
        }
        let ((), pause) = done?;
        log::info!("it has {size} bytes; the queues stood still for {pause:?}");
        Ok(())
    }
}
