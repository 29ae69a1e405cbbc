//! What is changed of a volume while it is attached, without its guest noticing more than slowness.
//!
//! Every change of the layers goes the same way ([`Record::change`], [`switch`]), and its
//! order is why nothing is lost:
//!
//! 1. hydration stops: what is being copied goes into a layer that the change may freeze or drop;
//! 2. whatever takes time is made ready, and may still fail, while the guest goes on;
//! 3. the queues are **paused**: nothing is in flight, so what was acknowledged is in the layers;
//! 4. every queue **prepares**: it opens the layers to come, so that nothing can fail any
//!    more but the record;
//! 5. the record is **committed**: `volume.json` is replaced, which is the moment;
//! 6. the queues **resume** with the new layers, and hydration begins again.
//!
//! Whatever fails before the commit, the queues go on as they were, and what was made for
//! the change is removed.

pub mod hydrate;
mod moved;
mod rekey;
mod resize;
mod snapshot;
mod top;

use crate::base::{Context, Error, Kind, Result};
use crate::disk::Disk;
use crate::host::state::{Record, State, gone};
use crate::volume::layers::Layer;
use std::sync::Arc;
use std::time::Duration;

/// How long what is in flight may take to end, and a client to do its part.
const PATIENCE: Duration = Duration::from_secs(10);

impl Record {
    /// Has a served volume changed by `change`, while nothing of it is hydrated.
    ///
    /// # Errors
    /// `NotFound` if the volume was detached, or handed over; `Busy` if it is attached
    /// read-only; what `change` says.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut state = self.state();
        let state = state.as_mut().ok_or_else(gone)?;
        check_writable(state)?;
        self.hydrator.stop();
        let done = change(state);
        self.hydrator.begin(state);
        done
    }
}

/// # Errors
/// `NotFound` if the volume is not served any more; `Busy` if it is attached read-only.
fn check_writable(state: &State) -> Result<()> {
    let _is_served = state.serving()?;
    match state.read_only {
        true => Err(Error::new(Kind::Busy, "it is attached read-only; detach it first")),
        false => Ok(()),
    }
}

/// Has the queues go on with other layers. `next` makes those layers, and the disk over them, of
/// the disk that stands still; `commit` replaces the record. Returns what `commit` does, and how
/// long the queues stood still.
///
/// # Errors
/// What kept the queues from standing still or from opening the layers; what `next` and `commit` say. The
/// queues go on as they were.
fn switch<T>(
    state: &mut State,
    next: impl FnOnce(&Arc<Disk>, &State) -> Result<(Disk, Vec<Layer>)>,
    commit: impl FnOnce(&mut State) -> Result<T>,
) -> Result<(T, Duration)> {
    let serving = state.serving()?;
    let mut paused = serving.pause(PATIENCE).context(|| "wait for what is in flight")?;
    let (disk, layers) = next(paused.disk(), state)?;
    paused.prepare(Arc::new(disk)).context(|| "let the queues open its layers")?;
    let done = commit(state)?;
    let pause = paused.resume();
    state.layers = layers;
    Ok((done, pause))
}
