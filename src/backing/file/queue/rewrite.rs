//! Writes to a disk whose blocks are larger than the volume's sectors: blocks of which a write has a part are read first,
//! and written back with it.
//!
//! The other way would be the page cache, for the parts or for everything. For the parts it cannot be had: a page that
//! was read for them while a write past the cache is on its way holds what was there before, and goes to the disk
//! later, over that write; the file systems' locks are let go before such a write has ended. For everything, each byte
//! is copied once more and held twice, and what is aligned, which is nearly all, pays for what is not. So all transfers
//! are whole blocks past the cache, and what keeps them apart is [`Turns`].
//!
//! **A cut of the power** can lose nothing of the sectors beside. They are written with what was read from the same
//! block, and a disk writes a logical block whole or not at all. Nobody changes the block between, since the turn is this
//! write's alone. A process that is killed between the two has written nothing; what it had handed over is ended by the
//! kernel before the next may open the layer for writing.
//!
//! **A sector that is not in the layer** stays so: it is read as zeros, and written as zeros.

use crate::backing::file::queue::{Move, Work};
use crate::backing::file::turns::{Edges, Ticket, Turns};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

/// What a queue does in turn with the others of its layer, slot by slot.
pub(super) struct Rewriting {
    turns: Arc<Turns>,
    wake: Arc<EventFd>,
    slots: Vec<Option<Held>>,
    /// Slots whose turn has not come, the oldest first.
    waiting: Vec<u32>,
    /// The queue ends: nothing is begun any more.
    closing: bool,
}

/// A turn, and what is still to be done in it.
struct Held {
    ticket: Ticket,
    fill: Fill,
    work: Option<Work>,
}

/// What is read before a write.
#[derive(Default)]
pub(super) struct Fill {
    /// One after the other.
    pub(super) reads: [Option<Move>; 2],
    /// Which bytes of the buffer's pages are copied where, when all is read.
    pub(super) copies: [Option<(Range<usize>, usize)>; 2],
}

/// The next thing to do in a slot.
pub(super) struct Next {
    pub(super) work: Work,
    /// What to copy before, in the buffer's pages.
    pub(super) copies: [Option<(Range<usize>, usize)>; 2],
}

impl Rewriting {
    pub(super) fn new(turns: Arc<Turns>, slots: usize) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Rewriting {
            turns,
            wake: Arc::new(wake),
            slots: (0..slots).map(|_| None).collect(),
            waiting: Vec::with_capacity(slots),
            closing: false,
        })
    }

    /// What becomes readable when a turn may have come.
    pub(super) fn wake_fd(&self) -> RawFd {
        self.wake.as_fd().as_raw_fd()
    }

    /// Has `work`, after `fill`, done in turn for these bytes. Returns what to do now, if the turn has come.
    pub(super) fn begin(
        &mut self,
        slot: u32,
        bytes: Range<u64>,
        edges: Edges,
        fill: Fill,
        work: Work,
    ) -> Option<Next> {
        let (ticket, has_come) = self.turns.take(bytes, edges, &self.wake);
        self.slots[slot as usize] = Some(Held { ticket, fill, work: Some(work) });
        if has_come {
            return self.after(slot, true);
        }
        self.waiting.push(slot);
        None
    }

    /// What to do next in a slot in which something was done, well or not; nothing if that was all, and the turn is given
    /// back.
    pub(super) fn after(&mut self, slot: u32, well: bool) -> Option<Next> {
        let held = self.slots[slot as usize].as_mut()?;
        if well && !self.closing {
            let read = held.fill.reads.iter_mut().find_map(Option::take);
            if let Some(read) = read {
                return Some(Next { work: Work::Move(read), copies: [None, None] });
            }
            if let Some(work) = held.work.take() {
                return Some(Next { work, copies: std::mem::take(&mut held.fill.copies) });
            }
        }
        let held = self.slots[slot as usize].take()?;
        self.turns.give_back(held.ticket);
        None
    }

    /// Whether what is done in a slot comes before its write.
    pub(super) fn is_reading(&self, slot: u32) -> bool {
        self.slots[slot as usize].as_ref().is_some_and(|held| held.work.is_some())
    }

    /// Takes note of having been woken.
    pub(super) fn woken(&self) {
        // An empty counter is no error.
        let _ = self.wake.read();
    }

    /// The next slot whose turn has come, and what to do in it.
    pub(super) fn next_turn(&mut self) -> Option<(u32, Next)> {
        let has_come = |&slot: &u32| {
            self.slots[slot as usize].as_ref().is_none_or(|held| self.turns.has_come(&held.ticket))
        };
        let place = self.waiting.iter().position(has_come)?;
        let slot = self.waiting.remove(place);
        Some((slot, self.after(slot, true)?))
    }

    /// Gives up whatever has not begun, and goes on with nothing that has; returns the slots of the first.
    pub(super) fn close(&mut self) -> Vec<u32> {
        self.closing = true;
        let waiting = std::mem::take(&mut self.waiting);
        for &slot in &waiting {
            self.after(slot, false);
        }
        waiting
    }
}
