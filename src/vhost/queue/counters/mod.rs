//! What one queue has done since its thread was started, counted by the thread alone, and read by whoever
//! wants to know, at any time: also while the thread waits for a disk or a VMM.
//!
//! A counter is written by one thread: it takes a load and a store and no locked operation, and the cache
//! line stays where the thread runs until somebody reads it. Nothing is allocated for a request. What is read
//! is not of one moment: a request may be in one counter already and not yet in another.
//!
//! The clock is not read for each request. Polling reads it before and after, and the same is taken for
//! requests that come and go in a turn of the loop; where a turn answers many, it is read once for sixteen of
//! them. So a request counts as seen when the thread began to take what is available, and as answered a
//! moment after the driver can see the answer.
#![forbid(unsafe_code)]

pub mod histogram;
mod stats;
mod tally;

pub use stats::{CipherStats, KindStats, Latencies, PauseStats, QueueStats, StallStats};
pub(super) use tally::Tally;

use crate::virtio::Op;
use histogram::Recorder;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A number that one thread writes.
#[derive(Default)]
struct Counter(AtomicU64);

impl Counter {
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    #[inline]
    fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    #[inline]
    fn add(&self, n: u64) {
        self.set(self.get().wrapping_add(n));
    }

    #[inline]
    fn raise(&self, n: u64) {
        if n > self.get() {
            self.set(n);
        }
    }
}

/// What kinds of request are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpKind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    /// What asks for the disk's serial, and what makes no sense.
    Other,
}

impl OpKind {
    /// The kind of a request.
    pub(super) fn of(op: &Op) -> Self {
        match op {
            Op::Read { .. } => OpKind::Read,
            Op::Write { .. } => OpKind::Write,
            Op::Flush => OpKind::Flush,
            Op::Discard { .. } => OpKind::Discard,
            Op::WriteZeroes { .. } => OpKind::WriteZeroes,
            Op::GetId => OpKind::Other,
        }
    }
}

/// Why a request waits before it is given to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The volume's limits.
    Limits,
    /// There is no buffer, or no room in the disk's queue; or a copy is under way at that place.
    Room,
}

/// A wait that is not over.
#[derive(Clone, Copy)]
pub(super) struct Stall {
    cause: Cause,
    since: u64,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Failed,
    Unsupported,
}

struct OfKind {
    requests: Counter,
    bytes: Counter,
    errors: Counter,
    latency: Recorder,
}

#[derive(Default)]
struct OfCause {
    count: Counter,
    nanos: Counter,
}

const KINDS: usize = 6;
/// Requests in flight whose age is known: the most that a ring of ours has.
const SLOTS: usize = 1024;
const LINE: usize = 16;

/// Times of sixteen slots, on cache lines of their own.
#[derive(Default)]
#[repr(align(128))]
struct Slots([Counter; LINE]);

/// One queue's counters. On cache lines of their own.
#[repr(align(128))]
pub struct Counters {
    /// Times are nanoseconds since then, and one more: 0 is no time.
    epoch: Instant,
    kinds: [OfKind; KINDS],
    waiting: Recorder,
    causes: [OfCause; 2],
    unsupported: Counter,
    depth: Counter,
    depth_max: Counter,
    ring_runs: Counter,
    polls: Counter,
    polls_found: Counter,
    sleeps: Counter,
    pauses: Counter,
    pause_nanos: Counter,
    pause_longest: Counter,
    paused_since: Counter,
    cipher_samples: Counter,
    cipher_bytes: Counter,
    cipher_nanos: Counter,
    /// When the request of each slot was seen; 0 for a slot without one.
    seen: Box<[Slots]>,
}

impl Counters {
    pub(super) fn new() -> Arc<Self> {
        let kind = |_| OfKind {
            requests: Counter::default(),
            bytes: Counter::default(),
            errors: Counter::default(),
            latency: Recorder::new(),
        };
        Arc::new(Counters {
            epoch: Instant::now(),
            kinds: std::array::from_fn(kind),
            waiting: Recorder::new(),
            causes: Default::default(),
            unsupported: Counter::default(),
            depth: Counter::default(),
            depth_max: Counter::default(),
            ring_runs: Counter::default(),
            polls: Counter::default(),
            polls_found: Counter::default(),
            sleeps: Counter::default(),
            pauses: Counter::default(),
            pause_nanos: Counter::default(),
            pause_longest: Counter::default(),
            paused_since: Counter::default(),
            cipher_samples: Counter::default(),
            cipher_bytes: Counter::default(),
            cipher_nanos: Counter::default(),
            seen: (0..SLOTS / LINE).map(|_| Slots::default()).collect(),
        })
    }

    fn at(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.epoch);
        since.as_secs() * 1_000_000_000 + u64::from(since.subsec_nanos()) + 1
    }

    fn now(&self) -> u64 {
        self.at(Instant::now())
    }

    fn slot(&self, slot: u16) -> Option<&Counter> {
        let slot = usize::from(slot);
        self.seen.get(slot / LINE).map(|line| &line.0[slot % LINE])
    }

    /// What is counted until now.
    pub fn read(&self) -> QueueStats {
        let kind = |kind: OpKind| {
            let OfKind { requests, bytes, errors, .. } = &self.kinds[kind as usize];
            KindStats { requests: requests.get(), bytes: bytes.get(), errors: errors.get() }
        };
        let cause = |cause: Cause| {
            let OfCause { count, nanos } = &self.causes[cause as usize];
            StallStats { count: count.get(), total_ns: nanos.get() }
        };
        let seen = self.seen.iter().flat_map(|line| &line.0).map(Counter::get).filter(|&at| at != 0);
        let (oldest, paused) = (seen.min(), Some(self.paused_since.get()).filter(|&at| at != 0));
        // After what is compared with it.
        let now = self.now();
        QueueStats {
            ring_runs: self.ring_runs.get() != 0,
            read: kind(OpKind::Read),
            write: kind(OpKind::Write),
            flush: kind(OpKind::Flush),
            discard: kind(OpKind::Discard),
            write_zeroes: kind(OpKind::WriteZeroes),
            other: kind(OpKind::Other),
            unsupported: self.unsupported.get(),
            depth: self.depth.get(),
            depth_max: self.depth_max.get(),
            oldest_in_flight_ns: oldest.map(|at| now.saturating_sub(at)),
            throttled: cause(Cause::Limits),
            no_room: cause(Cause::Room),
            polls: self.polls.get(),
            polls_found: self.polls_found.get(),
            sleeps: self.sleeps.get(),
            pauses: PauseStats {
                count: self.pauses.get(),
                total_ns: self.pause_nanos.get(),
                longest_ns: self.pause_longest.get(),
                now_ns: paused.map(|at| now.saturating_sub(at)),
            },
            cipher: CipherStats {
                samples: self.cipher_samples.get(),
                bytes: self.cipher_bytes.get(),
                total_ns: self.cipher_nanos.get(),
            },
        }
    }

    /// How long requests took until now.
    pub fn latencies(&self) -> Latencies {
        let of = |kind: OpKind| self.kinds[kind as usize].latency.read();
        Latencies {
            read: of(OpKind::Read),
            write: of(OpKind::Write),
            flush: of(OpKind::Flush),
            discard: of(OpKind::Discard),
            write_zeroes: of(OpKind::WriteZeroes),
            waiting: self.waiting.read(),
        }
    }
}
