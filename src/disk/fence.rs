//! Keeps what the guest does and a background copy of the same place apart, while a volume is hydrated.
//!
//! The copy reads a range through all layers and writes what it found into the top. A guest's write
//! between the two would be undone by it. A guest's read meanwhile could find half of a sector, where a
//! file system does not keep a read and a write of the same bytes apart, and take the other half's zeros
//! for ciphertext. So both wait until the copy has left the range, and the copy begins only when none of
//! them is in flight in it.
//!
//! Each queue has a [`Lane`]: a list of what it has in flight and the range being copied, under a lock
//! of its own. The copy first puts the range into every lane, after which nothing can begin in it any
//! more, and then waits for each lane to have nothing in it. Whoever is refused is woken through the
//! lane's event descriptor. A queue that is opened later finds the range there. The lists are as long
//! as the queue has buffers.
//!
//! There is a fence only in a disk that is [made to be hydrated](crate::disk::Disk::hydrating), so that it
//! costs nothing elsewhere and has seen every operation from the beginning.

use crate::base::sync::Locked;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How often a waiter looks whether it is to give up.
const LOOK: Duration = Duration::from_millis(50);

/// What lanes of one disk have in common.
#[derive(Default)]
pub(crate) struct Fence {
    lanes: Mutex<Lanes>,
    /// Somebody copies.
    taken: AtomicBool,
}

#[derive(Default)]
struct Lanes {
    open: Vec<Arc<Lane>>,
    /// The sectors being copied.
    copying: Range<u64>,
}

struct Lane {
    state: Mutex<State>,
    left: Condvar,
    wake: EventFd,
}

struct State {
    /// By buffer: the sectors in flight.
    busy: Vec<(usize, Range<u64>)>,
    copying: Range<u64>,
    /// Somebody was refused and waits.
    refused: bool,
}

impl Fence {
    /// A lane for a queue of at most `most` buffers.
    pub(super) fn open(self: &Arc<Self>, most: usize) -> io::Result<OpenLane> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let mut lanes = self.lanes.locked();
        let state = State { busy: Vec::with_capacity(most), copying: lanes.copying.clone(), refused: false };
        let lane = Arc::new(Lane { state: Mutex::new(state), left: Condvar::new(), wake });
        lanes.open.push(lane.clone());
        Ok(OpenLane { fence: self.clone(), lane })
    }

    /// Lets one copy at a time; returns whether this is it.
    pub(crate) fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }

    /// The copy is over.
    pub(crate) fn give_back(&self) {
        self.taken.store(false, Ordering::Release);
    }

    /// Whether somebody copies.
    pub(super) fn is_taken(&self) -> bool {
        self.taken.load(Ordering::Acquire)
    }

    /// Keeps everybody out of `sectors` and waits until nobody is in it; gives up when `stop` is set, and
    /// returns whether it has not. Either way [`Fence::leave`] follows.
    pub(crate) fn enter(&self, sectors: &Range<u64>, stop: &AtomicBool) -> bool {
        let open = {
            let mut lanes = self.lanes.locked();
            lanes.copying = sectors.clone();
            for lane in &lanes.open {
                lane.state.locked().copying = sectors.clone();
            }
            lanes.open.clone()
        };
        // Not under the lock, which a queue that is being closed wants.
        open.iter().all(|lane| lane.wait_for_nobody_in(sectors, stop))
    }

    /// Lets everybody in again.
    pub(crate) fn leave(&self) {
        let mut lanes = self.lanes.locked();
        lanes.copying = 0..0;
        for lane in &lanes.open {
            let mut state = lane.state.locked();
            state.copying = 0..0;
            if std::mem::take(&mut state.refused)
                && let Err(e) = lane.wake.write(1)
            {
                log::error!("waking a queue that waits for a copy: {e}");
            }
        }
    }
}

impl Lane {
    fn wait_for_nobody_in(&self, sectors: &Range<u64>, stop: &AtomicBool) -> bool {
        let mut state = self.state.locked();
        while state.busy.iter().any(|(_, busy)| meet(busy, sectors)) {
            if stop.load(Ordering::Relaxed) {
                return false;
            }
            state = self.left.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// A queue's lane. Dropping it, after the queue itself has ended, takes out what was left in it.
pub(super) struct OpenLane {
    fence: Arc<Fence>,
    lane: Arc<Lane>,
}

impl OpenLane {
    /// What becomes readable when somebody who was refused may try again.
    pub(super) fn wake_fd(&self) -> RawFd {
        self.lane.wake.as_fd().as_raw_fd()
    }

    /// Takes note of having been woken.
    pub(super) fn woken(&self) {
        // An empty counter is no error.
        let _ = self.lane.wake.read();
    }

    /// Notes that the buffer at `place` is going to be used for `sectors`; refused while
    /// they are being copied.
    pub(super) fn enter(&self, place: usize, sectors: Range<u64>) -> bool {
        let mut state = self.lane.state.locked();
        if meet(&sectors, &state.copying) {
            state.refused = true;
            return false;
        }
        state.busy.push((place, sectors));
        true
    }

    /// Notes that the buffer at `place` is not used any more.
    pub(super) fn leave(&self, place: usize) {
        let mut state = self.lane.state.locked();
        if let Some(index) = state.busy.iter().position(|(busy, _)| *busy == place) {
            let (_, sectors) = state.busy.swap_remove(index);
            if meet(&sectors, &state.copying) {
                self.lane.left.notify_all();
            }
        }
    }
}

impl Drop for OpenLane {
    fn drop(&mut self) {
        self.fence.lanes.locked().open.retain(|lane| !Arc::ptr_eq(lane, &self.lane));
        self.lane.state.locked().busy.clear();
        self.lane.left.notify_all();
    }
}

fn meet(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
