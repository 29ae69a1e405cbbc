//! Data of frozen layers that a command moves to the layer below, and layers that hold nothing afterwards.
//!
//! The host process reads on all the while. What it knows of the layers beside their bytes is its layer map:
//! it notes there where data is going to be before that is gone from where it was. A read that finds nothing
//! in the upper layer asks the map only then, and finds it below.

use super::PATIENCE;
use crate::backing::Backing;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::{LayerId, leaving};
use crate::host::control::conversation::Conversation;
use crate::host::control::moved::MoveDown;
use crate::host::state::{Record, State, gone};
use crate::image::lock::{Access, ImageLock};
use std::sync::Arc;

impl Record {
    /// Notes where the data will be, lets go of the image locks of the two layers, and has
    /// the client move it.
    ///
    /// # Errors
    /// `NotFound` if the volume was detached; `Usage` for layers that are not two frozen ones of it;
    /// `Busy` while its layers are being copied up; what the client says, or does not say in time. The image
    /// locks are this process's again then.
    pub fn move_down(&self, wanted: &MoveDown, client: &mut Conversation<'_>) -> Result<()> {
        let locks = self.note_move(wanted)?;
        locks.iter().for_each(|(_, lock)| lock.give_way());
        let done = client.have_moved(PATIENCE);
        for (layer, lock) in locks {
            if let Err(e) = lock.take(&self.catalog.shown_place(layer), Access::Read) {
                log::error!("{e}: it is served all the same");
            }
        }
        done
    }

    fn note_move(&self, wanted: &MoveDown) -> Result<Vec<(LayerId, Arc<ImageLock>)>> {
        let MoveDown { upper, lower, start, end } = *wanted;
        let state = self.state();
        let state = state.as_ref().ok_or_else(gone)?;
        let disk = state.serving()?.disk();
        if state.metadata.layout().hydrate().is_some() {
            return Err(Error::new(Kind::Busy, "its lower layers are being copied up"));
        }
        let (from, to) = (position(state, upper)?, position(state, lower)?);
        if from == 0 || from >= to {
            return Err(Error::new(Kind::Usage, "data moves from a frozen layer to one below it"));
        }
        let map = disk.map().ok_or_else(gone)?;
        let height = (state.layers.len() - to) as u8;
        let backing = &state.layers[from].backing;
        if backing.is_memory() {
            // A queue may be looking at it just now.
            let serving = state.serving()?;
            let _paused = serving.pause(PATIENCE).context(|| "wait for what is in flight")?;
            backing.forget_memory(start..end);
        }
        let mut at = start;
        while let Some(data) = backing.next_data(0, at)?.filter(|data| data.start < end) {
            at = data.end.min(end);
            map.mark(data.start..at, height);
        }
        Ok(vec![(upper, state.layers[from].image_lock.clone()), (lower, state.layers[to].image_lock.clone())])
    }

    /// Takes frozen layers that hold nothing out of the chain.
    ///
    /// # Errors
    /// `Usage` for a layer that holds something; `Busy` while a snapshot is being made or layers are being
    /// copied up; as [`Record::change`].
    pub fn let_go_of_empty(&self, layers: &[LayerId]) -> Result<()> {
        if self.hydrator.is_noting() {
            return Err(Error::new(Kind::Busy, "a snapshot was made just now; try again"));
        }
        self.change(|state| {
            if state.metadata.layout().hydrate().is_some() {
                return Err(Error::new(Kind::Busy, "its lower layers are being copied up"));
            }
            for &layer in layers {
                let position = position(state, layer)?;
                if position == 0 || state.layers[position].backing.next_data(0, 0)?.is_some() {
                    return Err(Error::new(Kind::Usage, format!("layer {layer} is no empty frozen one")));
                }
            }
            self.take_out(state, layers, |catalog, lock, metadata, key| {
                leaving::commit_empty(catalog, lock, metadata, layers, key)
            })
        })
    }
}

fn position(state: &State, layer: LayerId) -> Result<usize> {
    let found = state.metadata.layers().iter().position(|known| known.id == layer);
    found.ok_or_else(|| Error::new(Kind::Usage, format!("{layer} is no layer of the volume")))
}
