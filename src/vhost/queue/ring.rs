//! The split ring of one queue while it runs: chains come out, used entries go in, a batch at a time.
//!
//! virtio-queue keeps the ring's state, checks its addresses and rules its notifications. Entries are read
//! and written here: the used ring is published once a batch, and a chain may be walked again after a crash.

use crate::vhost::dirty::{GuestMemory, RingLog};
use crate::virtio::chain::Chain;
use crate::virtio::{self, Parsed, Segment, Shape, memory};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

/// Bytes before the elements of the available ring: flags and idx.
const AVAIL_HEADER: u64 = 4;
/// Bytes in an element of the available ring: a head.
const AVAIL_ELEMENT: u64 = 2;
/// Bytes before the elements of the used ring: flags and idx.
const USED_HEADER: u64 = 4;
/// Bytes in an element of the used ring: id and len.
const USED_ELEMENT: u64 = 8;

/// A ring whose addresses were checked to lie in guest memory.
pub struct Ring {
    mem: Arc<GuestMemory>,
    queue: Queue,
    log: RingLog,
    /// Available index as it was last seen.
    avail: u16,
    /// Used index that the driver has seen; the queue's `next_used` runs ahead of it within a batch.
    published: u16,
    event_idx: bool,
}

/// Where a ring stands when it stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Next available index to look at.
    pub next_avail: u16,
    /// Next used index to write.
    pub next_used: u16,
}

impl Ring {
    /// A ring over `queue`, which is ready and knows its addresses and positions; what is written goes into
    /// `log`. `None` if the addresses are not valid in `mem`.
    pub fn new(mem: Arc<GuestMemory>, queue: Queue, log: RingLog) -> Option<Self> {
        let wraps =
            [queue.desc_table(), queue.avail_ring(), queue.used_ring()].iter().any(|&a| a > u64::MAX >> 1);
        if wraps || !queue.is_valid(&*mem) {
            return None;
        }
        let (avail, published) = (queue.next_avail(), queue.next_used());
        Some(Ring { avail, published, event_idx: queue.event_idx_enabled(), mem, queue, log })
    }

    /// Guest memory, as the front-end gave it when the ring started.
    pub fn mem(&self) -> &Arc<GuestMemory> {
        &self.mem
    }

    /// Goes on in other memory, which has all regions that there were before, where they were: what was
    /// checked stays true.
    pub fn grow_memory(&mut self, mem: Arc<GuestMemory>) {
        self.mem = mem;
    }

    /// Says that `len` bytes of guest memory at `addr` were written.
    pub fn mark_dirty(&self, addr: GuestAddress, len: u64) {
        self.log.mark(addr.0, len);
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where it stands.
    pub fn position(&self) -> Position {
        Position { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Whether the driver has made a chain available that was not popped yet. Cheap enough to poll.
    pub fn has_available(&self) -> bool {
        self.queue.avail_idx(&*self.mem, Ordering::Acquire).is_ok_and(|idx| idx.0 != self.queue.next_avail())
    }

    /// How many chains the driver has made available beyond the used ones, taken or not.
    pub fn unanswered(&self) -> u16 {
        let idx = self.queue.avail_idx(&*self.mem, Ordering::Acquire);
        idx.map_or(0, |idx| idx.0.wrapping_sub(self.queue.next_used()))
    }

    /// Takes the next available chain; returns its head, below the ring's size. An error means that the
    /// driver broke the ring's rules.
    pub fn pop(&mut self) -> Result<Option<u16>, Error> {
        let next = self.queue.next_avail();
        if self.avail == next {
            // Looked at once for all that it shows.
            self.avail = self.queue.avail_idx(&*self.mem, Ordering::Acquire)?.0;
        }
        match self.avail.wrapping_sub(next) {
            0 => return Ok(None),
            // More than the ring has room for.
            n if n > self.queue.size() => return Err(Error::InvalidAvailRingIndex),
            _ => {}
        }
        let at = AVAIL_HEADER + u64::from(next % self.queue.size()) * AVAIL_ELEMENT;
        let addr = GuestAddress(self.queue.avail_ring()).unchecked_add(at);
        let head = u16::from_le(memory::read(&*self.mem, addr).map_err(Error::GuestMemory)?);
        if head >= self.queue.size() {
            return Err(Error::InvalidDescriptorIndex);
        }
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(Some(head))
    }

    /// Parses the chain at `head`, its data runs going to `data`; `None` if it cannot be answered.
    pub fn parse(&self, head: u16, shape: &Shape, data: &mut Vec<Segment>) -> Option<Parsed> {
        let table = GuestAddress(self.queue.desc_table());
        let chain = Chain::new(&*self.mem, table, self.queue.size(), head);
        virtio::parse(&*self.mem, chain, shape, data)
    }

    /// Leaves out what an earlier back-end has taken: with that many chains in flight, the next available
    /// index follows from the used one.
    pub fn skip_in_flight(&mut self, count: u16) {
        self.avail = self.queue.next_used().wrapping_add(count);
        self.queue.set_next_avail(self.avail);
    }

    /// Writes a used entry; the driver sees it after [`Ring::publish`]. `head` is below the ring's size.
    pub fn add_used(&mut self, head: u16, len: u32) {
        let next = self.queue.next_used();
        let at = USED_HEADER + u64::from(next % self.queue.size()) * USED_ELEMENT;
        let addr = GuestAddress(self.queue.used_ring()).unchecked_add(at);
        let element = u64::from(len) << 32 | u64::from(head);
        // Valid since `new`: the ring lies in guest memory, which stays mapped as long as we hold it.
        if let Err(e) = memory::write(&*self.mem, addr, element.to_le()) {
            log::error!("used ring at {:#x}: {e}", addr.0);
        }
        self.log.mark_used(at, USED_ELEMENT);
        self.queue.set_next_used(next.wrapping_add(1));
    }

    /// How many answers the driver has not been shown yet.
    pub fn unpublished(&self) -> u16 {
        self.queue.next_used().wrapping_sub(self.published)
    }

    /// Lets the driver see what was added since the last time. Returns nothing if there was nothing, else
    /// whether the driver wants to be interrupted.
    pub fn publish(&mut self) -> Option<bool> {
        let (old, new) = (self.published, self.queue.next_used());
        if old == new {
            return None;
        }
        let idx = GuestAddress(self.queue.used_ring()).unchecked_add(2);
        if let Err(e) = self.mem.store(new.to_le(), idx, Ordering::Release) {
            log::error!("used ring index at {:#x}: {e}", idx.0);
        }
        self.log.mark_used(2, 2);
        self.published = new;
        // The index must be visible before we read whether the driver sleeps (virtio 1.3, 2.7.13.3).
        fence(Ordering::SeqCst);
        Some(self.wants_interrupt(old, new))
    }

    fn wants_interrupt(&self, old: u16, new: u16) -> bool {
        let avail = GuestAddress(self.queue.avail_ring());
        if self.event_idx {
            let used_event = avail.unchecked_add(4 + 2 * u64::from(self.queue.size()));
            let event = self.mem.load(used_event, Ordering::Relaxed).map_or(old, u16::from_le);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = self.mem.load(avail, Ordering::Relaxed).map_or(0, u16::from_le);
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver to kick for the next chain; returns whether one is there already.
    pub fn enable_kicks(&mut self) -> bool {
        let there = self.queue.enable_notification(&*self.mem).unwrap_or(false);
        let at = if self.event_idx { USED_HEADER + USED_ELEMENT * u64::from(self.queue.size()) } else { 0 };
        self.log.mark_used(at, 2);
        there
    }

    /// Asks the driver not to kick. Without effect under EVENT_IDX, where one kick is all that comes.
    pub fn disable_kicks(&mut self) {
        if !self.event_idx && self.queue.disable_notification(&*self.mem).is_ok() {
            self.log.mark_used(0, 2);
        }
    }
}
