//! Which chains are being served, in memory that outlives this process: the front-end keeps it, and a
//! back-end that comes after a crash resubmits what it finds there.
//!
//! Source: vhost-user protocol, "Inflight I/O tracking", split virtqueue. The layout of a queue's part:
//!
//! ```text
//! 0  u64 features   8  u16 version   10 u16 desc_num   12 u16 last_batch_head   14 u16 used_idx
//! 16 desc_num times:  u8 inflight, 5 bytes unused, u16 next, u64 counter
//! ```
//!
//! The memory is the front-end's as well: what is read here is checked like anything that it sends.

use crate::vhost::shared;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

const VERSION: u16 = 1;
const HEADER: usize = 16;
const ENTRY: usize = 16;
/// Parts of queues begin at multiples of this.
const ALIGN: usize = 64;

const AT_VERSION: usize = 8;
const AT_DESC_NUM: usize = 10;
const AT_LAST_BATCH_HEAD: usize = 12;
const AT_USED_IDX: usize = 14;

/// What GET_INFLIGHT_FD and SET_INFLIGHT_FD say of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// Bytes in use.
    pub size: u64,
    /// Where they begin in the file.
    pub offset: u64,
    /// Queues that have a part.
    pub queues: u16,
    /// Entries of each part.
    pub queue_size: u16,
}

impl Description {
    /// A fresh region for that many queues of that size.
    pub fn new(queues: u16, queue_size: u16) -> Self {
        let size = (usize::from(queues) * part_len(queue_size)) as u64;
        Description { size, offset: 0, queues, queue_size }
    }

    /// Memory for it: zero bytes, which mean "never used", in a file that cannot change its size.
    pub fn create(&self) -> io::Result<OwnedFd> {
        let fd = memfd_create("sealblk-inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&fd, self.size as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(fd)
    }
}

/// The region of a session.
pub struct Inflight {
    map: MmapRegion<()>,
    description: Description,
}

impl Inflight {
    /// Maps what the front-end gave.
    pub fn map(description: Description, fd: OwnedFd) -> io::Result<Arc<Self>> {
        const WHAT: &str = "in-flight region";
        let Description { size, offset, queues, queue_size } = description;
        if Description::new(queues, queue_size).size > size {
            return Err(shared::invalid(WHAT, "too small for its queues"));
        }
        if !offset.is_multiple_of(4096) {
            return Err(shared::invalid(WHAT, "its offset is not page-aligned"));
        }
        // A front-end that makes its own, after a migration, can seal it: no other file is taken.
        let map = shared::map(WHAT, fd, offset, size)?;
        Ok(Arc::new(Inflight { map, description }))
    }

    /// What it is, and its file once more.
    pub fn shared(&self) -> io::Result<(Description, OwnedFd)> {
        Ok((self.description, shared::file_of(&self.map)?.0))
    }

    /// The part of queue `index`, for a ring of `size` entries, if there is one that is large enough.
    pub fn queue(self: &Arc<Self>, index: usize, size: u16) -> Option<InflightQueue> {
        let fits = index < usize::from(self.description.queues) && size <= self.description.queue_size;
        fits.then(|| InflightQueue {
            region: self.clone(),
            base: index * part_len(self.description.queue_size),
            size,
            unanswered: size,
            counter: 0,
            batch: Vec::with_capacity(size.into()),
        })
    }
}

/// One queue's part, used by the queue's thread.
pub struct InflightQueue {
    region: Arc<Inflight>,
    base: usize,
    size: u16,
    /// The most chains that can be in flight when we come.
    unanswered: u16,
    /// For the next chain: chains are resubmitted in the order in which they came.
    counter: u64,
    /// Heads answered but not yet published.
    batch: Vec<u16>,
}

impl InflightQueue {
    /// This log for a ring whose driver has made `unanswered` chains available beyond the used ones. More
    /// marks than that are those of a ring that is no more.
    pub fn for_unanswered(self, unanswered: u16) -> Self {
        InflightQueue { unanswered, ..self }
    }

    /// Looks at what an earlier back-end left, given the used index that the driver sees. Returns the heads
    /// to serve again, oldest first. They are in flight from here on.
    pub fn recover(&mut self, used_idx: u16) -> Vec<u16> {
        if self.load_u16(AT_VERSION) != VERSION || self.load_u16(AT_DESC_NUM) != self.size {
            self.reset(used_idx);
            return Vec::new();
        }
        self.settle_last_batch(used_idx);
        let mut found: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.is_in_flight(head))
            .map(|head| (self.counter_of(head), head))
            .collect();
        if found.len() > usize::from(self.unanswered) {
            self.reset(used_idx);
            return Vec::new();
        }
        found.sort_unstable();
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        found.into_iter().map(|(_, head)| head).collect()
    }

    /// Notes that a chain was taken, before it has any effect. `head` is below the ring's size.
    pub fn take(&mut self, head: u16) {
        let entry = self.entry(head);
        self.store_u64(entry + 8, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.store_u8(entry, 1);
    }

    /// Notes that a chain was answered; it counts with the next [`InflightQueue::published`].
    pub fn answer(&mut self, head: u16) {
        let last = self.load_u16(AT_LAST_BATCH_HEAD);
        self.store_u16(self.entry(head) + 6, last);
        self.store_u16(AT_LAST_BATCH_HEAD, head);
        self.batch.push(head);
    }

    /// Notes that the driver sees the answers up to `used_idx`.
    pub fn published(&mut self, used_idx: u16) {
        for i in 0..self.batch.len() {
            self.store_u8(self.entry(self.batch[i]), 0);
        }
        self.batch.clear();
        self.store_u16(AT_USED_IDX, used_idx);
    }

    /// A crash between publishing and noting it leaves answered chains marked: those of the last batch.
    fn settle_last_batch(&mut self, used_idx: u16) {
        let answered = used_idx.wrapping_sub(self.load_u16(AT_USED_IDX));
        let mut head = self.load_u16(AT_LAST_BATCH_HEAD);
        // More than a ring's worth is no batch: then the ring was set up anew, and its marks mean nothing.
        if answered > self.size {
            return self.reset(used_idx);
        }
        for _ in 0..answered {
            if head >= self.size {
                return self.reset(used_idx);
            }
            self.store_u8(self.entry(head), 0);
            head = self.load_u16(self.entry(head) + 6);
        }
        self.store_u16(AT_USED_IDX, used_idx);
    }

    fn reset(&mut self, used_idx: u16) {
        for head in 0..self.size {
            self.store_u8(self.entry(head), 0);
        }
        self.store_u16(AT_LAST_BATCH_HEAD, 0);
        self.store_u16(AT_DESC_NUM, self.size);
        self.store_u16(AT_USED_IDX, used_idx);
        self.store_u16(AT_VERSION, VERSION);
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.load::<u8>(self.entry(head)) == 1
    }

    fn counter_of(&self, head: u16) -> u64 {
        self.load(self.entry(head) + 8)
    }

    fn entry(&self, head: u16) -> usize {
        HEADER + usize::from(head) * ENTRY
    }

    fn load_u16(&self, at: usize) -> u16 {
        self.load(at)
    }

    fn store_u8(&self, at: usize, value: u8) {
        self.store(at, value);
    }

    fn store_u16(&self, at: usize, value: u16) {
        self.store(at, value);
    }

    fn store_u64(&self, at: usize, value: u64) {
        self.store(at, value);
    }

    // Offsets lie inside the map, aligned, since `Inflight::queue` gives only parts that fit and `head` is
    // below the ring's size. The process may be killed between any two stores, but not see them out of order:
    // release and acquire keep the compiler to it, and another process that looks later sees all of them.

    fn load<T: vm_memory::AtomicAccess>(&self, at: usize) -> T {
        self.region.map.as_volatile_slice().load(self.base + at, Ordering::Acquire).expect("inside the map")
    }

    fn store<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        self.region
            .map
            .as_volatile_slice()
            .store(value, self.base + at, Ordering::Release)
            .expect("inside the map");
    }
}

fn part_len(queue_size: u16) -> usize {
    (HEADER + usize::from(queue_size) * ENTRY).next_multiple_of(ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(queues: u16, size: u16) -> Arc<Inflight> {
        let description = Description::new(queues, size);
        Inflight::map(description, description.create().unwrap()).unwrap()
    }

    #[test]
    fn a_fresh_region_has_nothing_in_flight() {
        assert!(region(2, 8).queue(1, 8).unwrap().recover(77).is_empty());
        assert!(region(2, 8).queue(2, 8).is_none());
        assert!(region(2, 8).queue(0, 16).is_none());
    }

    #[test]
    fn what_was_taken_and_not_answered_comes_back_in_order() {
        let region = region(2, 8);
        let mut queue = region.queue(1, 8).unwrap();
        queue.recover(0);
        for head in [5, 2, 7, 0] {
            queue.take(head);
        }
        queue.answer(2);
        queue.published(1);
        // Another back-end, after a crash.
        let mut next = region.queue(1, 8).unwrap();
        assert_eq!(next.recover(1), [5, 7, 0]);
        assert!(region.queue(0, 8).unwrap().recover(0).is_empty(), "another queue's part is untouched");
    }

    #[test]
    fn a_batch_that_the_driver_saw_is_not_served_again() {
        let region = region(1, 8);
        let mut queue = region.queue(0, 8).unwrap();
        queue.recover(65534);
        for head in 0..5 {
            queue.take(head);
        }
        queue.answer(3);
        queue.answer(1);
        queue.answer(0);
        // Killed after the used index moved on by three, before that was noted.
        assert_eq!(region.queue(0, 8).unwrap().recover(65534u16.wrapping_add(3)), [2, 4]);
    }

    #[test]
    fn a_batch_that_the_driver_did_not_see_is_served_again() {
        let region = region(1, 8);
        let mut queue = region.queue(0, 8).unwrap();
        queue.recover(10);
        queue.take(6);
        queue.take(4);
        queue.answer(4);
        assert_eq!(region.queue(0, 8).unwrap().recover(10), [6, 4]);
    }

    #[test]
    fn marks_of_a_ring_that_was_set_up_anew_mean_nothing() {
        let region = region(1, 8);
        let mut queue = region.queue(0, 8).unwrap();
        queue.recover(1000);
        queue.take(1);
        assert!(region.queue(0, 8).unwrap().recover(0).is_empty());
        // Nor do they where the index tells nothing: a driver that has made nothing
        // available waits for nothing.
        queue.recover(0);
        queue.take(1);
        assert!(region.queue(0, 8).unwrap().for_unanswered(0).recover(0).is_empty());
    }

    #[test]
    fn a_region_that_does_not_fit_its_description_is_refused() {
        let good = Description::new(1, 8);
        for bad in [
            Description { size: good.size - 1, ..good },
            Description { queues: 2, ..good },
            Description { queue_size: 1024, ..good },
            Description { offset: 4096, ..good },
            Description { offset: 1, ..good },
            Description { offset: u64::MAX - 4095, ..good },
        ] {
            assert!(Inflight::map(bad, good.create().unwrap()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn garbage_in_the_region_does_no_harm() {
        let region = region(1, 16);
        let mut seed = 7u64;
        for _ in 0..2000 {
            for at in (0..part_len(16)).step_by(8) {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                region.map.as_volatile_slice().store(seed, at, Ordering::Relaxed).unwrap();
            }
            let mut queue = region.queue(0, 16).unwrap();
            queue.store_u16(AT_VERSION, VERSION);
            queue.store_u16(AT_DESC_NUM, 16);
            let used = queue.load_u16(AT_USED_IDX).wrapping_add((seed >> 60) as u16);
            let heads = queue.recover(used);
            assert!(heads.iter().all(|&h| h < 16) && heads.len() <= 16);
        }
    }
}
