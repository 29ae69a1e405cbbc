//! Writes to a disk whose blocks are larger than the volume's sectors: blocks of which a write has a part are
//! read first, and written back with it.
//!
//! The other way would be the page cache, for the parts or for everything. For the parts it cannot be
//! had: a page that was read for them while a write past the cache is on its way holds what was there
//! before, and goes to the disk later, over that write; the file systems' locks are let go before such a
//! write has ended. For everything, each byte is copied once more and held twice, and what is aligned,
//! which is nearly all, pays for what is not. So all transfers are whole blocks past the cache, and what
//! keeps them apart is [`Turns`].
//!
//! **A cut of the power** can lose nothing of the sectors beside. They are written with what was read from
//! the same block, and a disk writes a logical block whole or not at all. Nobody changes the block between,
//! since the turn is this write's alone. A process that is killed between the two has written nothing; what
//! it had handed over is ended by the kernel before the next may open the layer for writing.
//!
//! **A sector that is not in the layer** stays so: it is read as zeros, and written as zeros.

use super::work::{Move, Way, Work};
use super::{FileQueue, Pending};
use crate::backing::Buffer;
use crate::backing::file::turns::{Edges, Ticket, Turns};
use crate::reactor::pool::PAGE;
use crate::reactor::{Reactor, Token, Uring, Watched};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::Arc;

/// Pages of a buffer for what is read of blocks that are written in part: the first and the last.
pub(super) const SPARE: usize = 2;

/// What a queue does in turn with the others of its layer, slot by slot.
pub(super) struct Rewriting {
    turns: Arc<Turns>,
    wake: Arc<EventFd>,
    /// Wakes the thread when a turn may have come.
    woken: Watched,
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
struct Fill {
    /// One after the other.
    reads: [Option<Move>; 2],
    /// Which bytes of the buffer's pages are copied where, when all is read.
    copies: [Option<(Range<usize>, usize)>; 2],
}

/// The next thing to do in a slot.
pub(super) struct Next {
    work: Work,
    /// What to copy before, in the buffer's pages.
    copies: [Option<(Range<usize>, usize)>; 2],
}

impl Rewriting {
    pub(super) fn new(uring: &Rc<Uring>, turns: Arc<Turns>, slots: usize) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let reactor: Rc<dyn Reactor> = uring.clone();
        let woken = Watched::new(&reactor, wake.as_fd().as_raw_fd());
        Ok(Rewriting {
            turns,
            wake: Arc::new(wake),
            woken,
            slots: (0..slots).map(|_| None).collect(),
            waiting: Vec::with_capacity(slots),
            closing: false,
        })
    }

    /// Has `work`, after `fill`, done in turn for these bytes. Returns what to do now, if the turn has come.
    fn begin(&mut self, slot: u32, bytes: Range<u64>, edges: Edges, fill: Fill, work: Work) -> Option<Next> {
        let (ticket, has_come) = self.turns.take(bytes, edges, &self.wake);
        self.slots[slot as usize] = Some(Held { ticket, fill, work: Some(work) });
        if has_come {
            return self.after(slot, true);
        }
        self.waiting.push(slot);
        None
    }

    /// What to do next in a slot in which something was done, well or not; nothing if that was all,
    /// and the turn is given back.
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

    /// Whether this is the wake-up for a turn, which is taken note of then.
    pub(super) fn is_woken_by(&self, token: Token) -> bool {
        let ours = *self.woken == token;
        if ours {
            // An empty counter is no error.
            let _ = self.wake.read();
        }
        ours
    }

    /// The next slot whose turn has come, and what to do in it.
    fn next_turn(&mut self) -> Option<(u32, Next)> {
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

impl FileQueue {
    /// Hands an operation over when those before it have left the blocks that it writes in part.
    pub(super) fn start_in_turn(&mut self, slot: u32, pending: Pending) {
        let (bytes, edges, fill) = match (&pending.work, &pending.buffer) {
            (Work::Move(moving @ Move { way: Way::Write { .. }, .. }), Some(buffer)) => {
                let bytes = moving.offset..moving.offset + u64::from(moving.span.len);
                let (edges, fill) = self.fill(moving, buffer);
                (bytes, edges, fill)
            }
            (Work::Zero { offset, len, .. }, _) => {
                assert!((offset | len) & (u64::from(self.unit) - 1) == 0, "whole units are made zeros");
                (*offset..offset + len, [None, None], Fill::default())
            }
            _ => return self.submit_again(slot, pending),
        };
        let work = pending.work;
        self.pending[slot as usize] = Some(pending);
        let next = self.rewriting.as_mut().and_then(|r| r.begin(slot, bytes, edges, fill, work));
        self.go_on(slot, next);
    }

    /// What must be read before a write of whole units that a buffer has a part of: none,
    /// or the first and the last.
    fn fill(&self, write: &Move, buffer: &Buffer) -> (Edges, Fill) {
        let (unit, len) = (self.unit as usize, write.span.len as usize);
        let (start, end) = (buffer.skip(), buffer.skip() + buffer.len());
        let before = start % unit;
        let behind = len - before - buffer.len();
        let (first, last) = (write.offset, write.offset + (len - unit) as u64);
        let edges = [(before > 0).then_some(first), (behind > 0).then_some(last)];
        let spare = end.next_multiple_of(PAGE);
        let read = |offset: u64, at: usize, len: usize| {
            let span = self.pool.span(buffer, at, len);
            Some(Move { way: Way::Read, offset, span, need: span.len, ..*write })
        };
        // Where the pages' last unit is read to, behind the others.
        let (reads, last_at) = match edges {
            [None, None] => return (edges, Fill::default()),
            _ if len <= SPARE * unit => ([read(first, spare, len), None], spare + len - unit),
            [Some(_), Some(_)] => ([read(first, spare, unit), read(last, spare + PAGE, unit)], spare + PAGE),
            [Some(_), None] => ([read(first, spare, unit), None], spare),
            [None, Some(_)] => ([read(last, spare, unit), None], spare),
        };
        let copies = [
            (before > 0).then_some((spare..spare + before, start - before)),
            (behind > 0).then_some((last_at + unit - behind..last_at + unit, end)),
        ];
        (edges, Fill { reads, copies })
    }

    /// Does what comes next in a slot, if anything does now.
    pub(super) fn go_on(&mut self, slot: u32, next: Option<Next>) {
        let Some(Next { work, copies }) = next else { return };
        let Some(mut pending) = self.pending[slot as usize].take() else { return };
        if let Some(buffer) = &mut pending.buffer {
            let pages = self.pool.whole(buffer);
            for (from, to) in copies.into_iter().flatten() {
                pages.copy_within(from, to);
            }
        }
        pending.work = work;
        self.submit_again(slot, pending);
    }

    /// Begins what waited for its turn, as far as that has come.
    pub(super) fn take_turns(&mut self) {
        while let Some((slot, next)) = self.rewriting.as_mut().and_then(Rewriting::next_turn) {
            self.go_on(slot, Some(next));
        }
    }
}
