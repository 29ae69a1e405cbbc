//! Hydration: in the background, what the lowest layers hold comes up into the top, under the top's key.
//!
//! It is what re-keys a volume (a new key above), encrypts one in place (plaintext below), flattens a chain
//! (the same key), and makes a full copy (an empty top above a snapshot's layers). It goes through the volume
//! once, in chunks: reads each through all layers and writes what came from the leaving ones into the top,
//! while the fence keeps the guest out of that chunk. So what the guest has written always wins: it is in the
//! top when the chunk is read, and stays, or it comes later, over the copy.
//!
//! Afterwards every sector that a leaving layer has is in the top, or in a layer between, for good: a guest's
//! discard makes holes only where nothing lies below. All of that is durable when it is said to be
//! [complete](End::Complete); then the caller may record the volume as having the other layers alone, and
//! only then take these away from it.
//!
//! A copy leaves a part of the file system free for guests ([`Reserve`]): below that it waits, and goes on by
//! itself when there is space again.
//!
//! There is no state to keep. One that was stopped or killed begins at the beginning and finds in the top
//! what it had brought there. Whoever changes the disk's layers stops it first.
//!
//! **With 4096-byte blocks** a block can be partly in the top: after a power cut during its first
//! write. It is then written whole. XTS treats each 16 bytes of a data unit by themselves, so what was
//! in the top stays as it was.

use crate::base::error::attempted;
use crate::base::space::{Reserve, Shortage, is_for_space};
use crate::base::sync::Locked;
use crate::disk::map::LayerMap;
use crate::disk::{Disk, WaitingQueue};
use crate::virtio::SECTOR_SIZE;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes copied at a time, for which a guest may have to wait; a buffer's length.
const CHUNK: u64 = 256 << 10;
/// Operations at a time.
const DEPTH: u16 = 16;
/// How often one that waits looks whether it was stopped or its rate changed.
const LOOK: Duration = Duration::from_millis(100);
/// How often one that waits for space asks how much there is: nothing tells.
const LOOK_FOR_SPACE: Duration = Duration::from_secs(1);
/// What has to be free beyond the reserve before a copy that waits for space goes on: with less, it would
/// wait again at once.
const ENOUGH: u64 = 16 << 20;

/// Who is told that a copy waits for space, and that it goes on.
pub type TellOfSpace<'a> = &'a dyn Fn(Option<&Shortage>);

/// How a hydration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything is in the top layer, durably.
    Complete,
    /// The hydration was stopped.
    Stopped,
}

/// A hydration of a disk, as those see it who do not do it.
pub struct Hydration {
    disk: Arc<Disk>,
    map: Arc<LayerMap>,
    /// Bytes a second; 0: no limit.
    rate: AtomicU64,
    reserve: Mutex<Reserve>,
    /// What it waits for.
    shortage: Mutex<Option<Shortage>>,
    stop: AtomicBool,
    stopped: (Mutex<()>, Condvar),
    /// Bytes still to be looked at; `u64::MAX` until that is known.
    left: AtomicU64,
    /// Where to begin: after a file system that was full, everything before this is in the top.
    from: AtomicU64,
}

impl Hydration {
    /// A hydration of `disk` at no more than `rate` bytes a second (0: no limit), which leaves nothing free
    /// unless it [is told to](Hydration::set_reserve).
    ///
    /// # Errors
    /// `InvalidInput` unless the disk is made for it ([`Disk::hydrating`]).
    pub fn new(disk: Arc<Disk>, rate: u64) -> io::Result<Arc<Self>> {
        let Some(map) = disk.map().filter(|_| disk.fence().is_some()).cloned() else {
            let message = "the disk is not made to be hydrated";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        };
        Ok(Arc::new(Hydration {
            disk,
            map,
            rate: rate.into(),
            reserve: Mutex::new(Reserve::NONE),
            shortage: Mutex::default(),
            stop: false.into(),
            stopped: Default::default(),
            left: u64::MAX.into(),
            from: 0.into(),
        }))
    }

    /// How many bytes of the volume may still be in lower layers alone; `None` until that is known, soon
    /// after it has begun. What the guest writes meanwhile need not be copied and is counted nevertheless.
    pub fn left(&self) -> Option<u64> {
        Some(self.left.load(Ordering::Relaxed)).filter(|&left| left != u64::MAX)
    }

    /// The rate: bytes a second, 0: no limit.
    pub fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    /// Changes the rate: bytes a second, 0: no limit.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// How much of the file system it leaves free.
    pub fn reserve(&self) -> Reserve {
        *self.reserve.locked()
    }

    /// Changes how much of the file system it leaves free.
    pub fn set_reserve(&self, reserve: Reserve) {
        *self.reserve.locked() = reserve;
        self.wake();
    }

    /// Has one that waits look again. Under the lock: it would not notice between its look and its wait.
    fn wake(&self) {
        let _guard = self.stopped.0.locked();
        self.stopped.1.notify_all();
    }

    /// What it waits for; none if it has the space that it needs.
    pub fn shortage(&self) -> Option<Shortage> {
        *self.shortage.locked()
    }

    /// Makes [`Hydration::run`] end soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Does it, in the calling thread.
    ///
    /// # Errors
    /// `ResourceBusy` if another is at it; what the backing says, with the place. It can be run again then.
    pub fn run(&self) -> io::Result<End> {
        self.run_telling(&|_| ())
    }

    /// As [`Hydration::run`]; `tell` is told each time that the copy begins to wait for space, and that it
    /// goes on.
    ///
    /// # Errors
    /// As for that.
    pub fn run_telling(&self, tell: TellOfSpace<'_>) -> io::Result<End> {
        let Some(fence) = self.disk.fence().filter(|fence| fence.take()) else {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "it is being hydrated already"));
        };
        let result = Copier::new(self).and_then(|mut copier| copier.copy_all(tell));
        // After an error, a write may have been in flight until the copier's queue was closed just now.
        fence.leave();
        fence.give_back();
        *self.shortage.locked() = None;
        result
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits until the rate, which may change meanwhile, allows more than `bytes` since then. Returns when
    /// that was; not if it was stopped.
    fn wait(&self, since: Instant, bytes: u64) -> Option<Instant> {
        let mut guard = self.stopped.0.locked();
        loop {
            let (now, rate) = (Instant::now(), self.rate());
            let nanos = (bytes * 1_000_000_000).checked_div(rate).unwrap_or(0);
            let due = since + Duration::from_nanos(nanos);
            let left = due.saturating_duration_since(now);
            if self.is_stopped() {
                return None;
            }
            if left.is_zero() {
                // What was not used is not saved up.
                return Some(if now - due < LOOK { due } else { now });
            }
            let woken = self.stopped.1.wait_timeout(guard, left.min(LOOK));
            guard = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Hydration {
    /// Waits until there is space for one more chunk. Returns whether there is: not if it was stopped.
    fn wait_for_space(&self, tell: TellOfSpace<'_>) -> io::Result<bool> {
        let mut more = CHUNK;
        loop {
            let (space, reserve) = (self.disk.space()?, self.reserve());
            let short = space.and_then(|space| Shortage::of(&space, reserve, more));
            let before = std::mem::replace(&mut *self.shortage.locked(), short);
            if short.is_some() != before.is_some() {
                tell(short.as_ref());
            }
            if short.is_none() {
                return Ok(true);
            }
            more = ENOUGH.min(self.left().unwrap_or(ENOUGH).max(CHUNK));
            let guard = self.stopped.0.locked();
            if self.is_stopped() {
                return Ok(false);
            }
            if self.reserve() == reserve {
                drop(self.stopped.1.wait_timeout(guard, LOOK_FOR_SPACE));
            }
        }
    }
}

/// What copies.
struct Copier<'a> {
    hydration: &'a Hydration,
    /// A chunk's plaintext is in its memory between the layers.
    queue: WaitingQueue,
    /// Bytes copied since then, which count for the rate.
    copied: (Instant, u64),
}

impl<'a> Copier<'a> {
    fn new(hydration: &'a Hydration) -> io::Result<Self> {
        let queue = hydration.disk.open_free_queue(DEPTH)?;
        let queue = WaitingQueue::new(queue, CHUNK as usize)?;
        Ok(Copier { hydration, queue, copied: (Instant::now(), 0) })
    }

    fn copy_all(&mut self, tell: TellOfSpace<'_>) -> io::Result<End> {
        let Hydration { disk, map, left, .. } = self.hydration;
        let (size, stays) = (disk.shape().sectors * SECTOR_SIZE, disk.leaving() + 1);
        while !map.wait(LOOK) {
            if self.hydration.is_stopped() {
                return Ok(End::Stopped);
            }
        }
        let mut at = self.hydration.from.swap(0, Ordering::Relaxed);
        left.store(map.bytes_below(stays, at..size), Ordering::Relaxed);
        while let Some(found) = map.next_below(stays, at).filter(|&found| found < size) {
            let start = found - found % CHUNK;
            at = start + CHUNK;
            let bytes = start..size.min(at);
            let below = map.bytes_below(stays, bytes.clone());
            let (since, copied) = self.copied;
            let Some(now) = self.hydration.wait(since, copied) else { return Ok(End::Stopped) };
            self.copied = (now, bytes.end - bytes.start);
            if !self.hydration.wait_for_space(tell)? {
                return Ok(End::Stopped);
            }
            match self.copy(bytes) {
                Ok(true) => {}
                Ok(false) => return Ok(End::Stopped),
                Err(e) => {
                    if is_for_space(&e) {
                        self.hydration.from.store(start, Ordering::Relaxed);
                    }
                    return Err(e);
                }
            }
            let counted = |left: u64| Some(left.saturating_sub(below));
            let _ = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted);
        }
        self.queue.flush()?;
        left.store(0, Ordering::Relaxed);
        Ok(End::Complete)
    }

    /// Hydrates a chunk while nobody else is in it. Returns whether that was done: not if
    /// it was stopped before.
    fn copy(&mut self, bytes: Range<u64>) -> io::Result<bool> {
        let hydration = self.hydration;
        let Some(fence) = hydration.disk.fence() else { return Ok(false) };
        let (sector, len) = (bytes.start / SECTOR_SIZE, bytes.end - bytes.start);
        // While the fence is closed a guest's requests wait, which are not to wait for a place.
        let attempt = |e| attempted(format_args!("hydrating {len} bytes at {}", bytes.start), e);
        if !self.queue.has_come(sector, len as usize, &hydration.stop).map_err(attempt)? {
            return Ok(false);
        }
        let alone = fence.enter(&(sector..bytes.end / SECTOR_SIZE), &hydration.stop);
        let copied = if alone { self.hydrate(sector, len as usize) } else { Ok(false) };
        // After an error, other writes of the chunk may be in flight, which would land on what a guest writes
        // there now: it is left when the queue is closed.
        let copied = copied.map_err(attempt)?;
        fence.leave();
        Ok(copied)
    }

    /// Reads a chunk, and writes what came from the leaving layers into the top. Returns whether that was
    /// done: not if it was stopped while it waited for what is still to come.
    fn hydrate(&mut self, sector: u64, len: usize) -> io::Result<bool> {
        let Some(runs) = self.read(sector, len)? else { return Ok(false) };
        for run in runs {
            let start = ((run.start - sector) * SECTOR_SIZE) as usize;
            self.queue.write(run.start, start, ((run.end - run.start) * SECTOR_SIZE) as usize)?;
        }
        self.queue.finish().map(|()| true)
    }

    /// Reads a chunk. Returns which runs of its blocks have sectors that came from the leaving layers.
    fn read(&mut self, sector: u64, len: usize) -> io::Result<Option<Vec<Range<u64>>>> {
        let Some(place) = self.queue.read_unless(sector, len, &self.hydration.stop)? else {
            return Ok(None);
        };
        let block = self.hydration.disk.shape().block_sectors();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for first in (0..len as u64 / SECTOR_SIZE).step_by(block as usize) {
            if !(first..first + block).any(|i| self.queue.came_from_leaving(place, i as usize)) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == sector + first => run.end += block,
                _ => runs.push(sector + first..sector + first + block),
            }
        }
        Ok(Some(runs))
    }
}
