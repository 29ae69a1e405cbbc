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

use crate::virtio::Op;
use histogram::{Histogram, Recorder};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

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
/// So many answers are worth a look at the clock.
const MANY: usize = 16;

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

/// Requests of one kind that were answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindStats {
    /// How many, those that failed among them.
    pub requests: u64,
    /// Bytes that those moved, discarded or cleared which did not fail.
    pub bytes: u64,
    /// How many were answered with an I/O error.
    pub errors: u64,
}

/// Waits of requests before they were given to the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StallStats {
    /// How often a request began to wait.
    pub count: u64,
    /// How long they waited in all. Requests that still wait are not in it.
    pub total_ns: u64,
}

/// Times in which the queue stood still, for a snapshot or another change of layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseStats {
    /// How many are over.
    pub count: u64,
    /// How long they were in all.
    pub total_ns: u64,
    /// How long the longest was.
    pub longest_ns: u64,
    /// How long the present one lasts.
    pub now_ns: Option<u64>,
}

/// The cipher's time between guest memory and buffers, copying included, in those transfers that were
/// measured: one of [`crate::disk::cipher_time::EVERY`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CipherStats {
    /// How many were measured.
    pub samples: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Their time.
    pub total_ns: u64,
}

/// What one queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStats {
    /// Whether a driver's ring is being served.
    pub ring_runs: bool,
    /// Reads.
    pub read: KindStats,
    /// Writes.
    pub write: KindStats,
    /// Flushes.
    pub flush: KindStats,
    /// Discards.
    pub discard: KindStats,
    /// Writes of zeroes.
    pub write_zeroes: KindStats,
    /// Requests for the serial, and those that make no sense.
    pub other: KindStats,
    /// Requests that were answered as unsupported.
    pub unsupported: u64,
    /// Requests in flight.
    pub depth: u64,
    /// The most that were in flight at a time.
    pub depth_max: u64,
    /// How long the oldest request in flight is there.
    pub oldest_in_flight_ns: Option<u64>,
    /// Waits for the volume's limits.
    pub throttled: StallStats,
    /// Waits for a buffer, for room in the disk's queue, or for a copy to be out of the way.
    pub no_room: StallStats,
    /// How often the thread looked for work before it would sleep.
    pub polls: u64,
    /// How often it found some.
    pub polls_found: u64,
    /// How often it slept.
    pub sleeps: u64,
    /// Times in which the queue stood still.
    pub pauses: PauseStats,
    /// The cipher's time.
    pub cipher: CipherStats,
}

impl KindStats {
    fn add(&mut self, other: &KindStats) {
        self.requests = self.requests.saturating_add(other.requests);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.errors = self.errors.saturating_add(other.errors);
    }

    /// What came after `earlier`.
    pub fn since(&self, earlier: &KindStats) -> KindStats {
        KindStats {
            requests: self.requests.saturating_sub(earlier.requests),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            errors: self.errors.saturating_sub(earlier.errors),
        }
    }
}

impl StallStats {
    fn add(&mut self, other: &StallStats) {
        self.count = self.count.saturating_add(other.count);
        self.total_ns = self.total_ns.saturating_add(other.total_ns);
    }
}

impl QueueStats {
    /// Each kind by its name, what is of no kind included.
    pub fn kinds(&self) -> [(&'static str, &KindStats); KINDS] {
        [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
            ("discard", &self.discard),
            ("write_zeroes", &self.write_zeroes),
            ("other", &self.other),
        ]
    }

    /// Requests that were answered with an I/O error.
    pub fn errors(&self) -> u64 {
        self.kinds().iter().fold(0, |sum, (_, kind)| sum.saturating_add(kind.errors))
    }

    /// Adds those of another queue. The oldest request is that of both, and so is the longest pause; queues
    /// are paused together.
    pub fn add(&mut self, other: &QueueStats) {
        self.ring_runs |= other.ring_runs;
        self.read.add(&other.read);
        self.write.add(&other.write);
        self.flush.add(&other.flush);
        self.discard.add(&other.discard);
        self.write_zeroes.add(&other.write_zeroes);
        self.other.add(&other.other);
        for (sum, more) in [
            (&mut self.unsupported, other.unsupported),
            (&mut self.depth, other.depth),
            (&mut self.depth_max, other.depth_max),
            (&mut self.polls, other.polls),
            (&mut self.polls_found, other.polls_found),
            (&mut self.sleeps, other.sleeps),
            (&mut self.cipher.samples, other.cipher.samples),
            (&mut self.cipher.bytes, other.cipher.bytes),
            (&mut self.cipher.total_ns, other.cipher.total_ns),
        ] {
            *sum = sum.saturating_add(more);
        }
        self.oldest_in_flight_ns = self.oldest_in_flight_ns.max(other.oldest_in_flight_ns);
        self.throttled.add(&other.throttled);
        self.no_room.add(&other.no_room);
        let (ours, theirs) = (&mut self.pauses, &other.pauses);
        ours.count = ours.count.max(theirs.count);
        ours.total_ns = ours.total_ns.max(theirs.total_ns);
        ours.longest_ns = ours.longest_ns.max(theirs.longest_ns);
        ours.now_ns = ours.now_ns.max(theirs.now_ns);
    }
}

/// How long requests took, from when they were seen until the driver could see the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// Reads.
    pub read: Histogram,
    /// Writes.
    pub write: Histogram,
    /// Flushes.
    pub flush: Histogram,
    /// Discards.
    pub discard: Histogram,
    /// Writes of zeroes.
    pub write_zeroes: Histogram,
    /// How long those waited before they were given to the disk that waited at all, whatever they were.
    pub waiting: Histogram,
}

impl Latencies {
    /// Those of each kind by its name.
    pub fn kinds(&self) -> [(&'static str, &Histogram); 5] {
        [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
            ("discard", &self.discard),
            ("write_zeroes", &self.write_zeroes),
        ]
    }

    /// Adds those of another queue.
    pub fn add(&mut self, other: &Latencies) {
        self.read.add(&other.read);
        self.write.add(&other.write);
        self.flush.add(&other.flush);
        self.discard.add(&other.discard);
        self.write_zeroes.add(&other.write_zeroes);
        self.waiting.add(&other.waiting);
    }

    /// Those of what came after `earlier`.
    pub fn since(&self, earlier: &Latencies) -> Latencies {
        Latencies {
            read: self.read.since(&earlier.read),
            write: self.write.since(&earlier.write),
            flush: self.flush.since(&earlier.flush),
            discard: self.discard.since(&earlier.discard),
            write_zeroes: self.write_zeroes.since(&earlier.write_zeroes),
            waiting: self.waiting.since(&earlier.waiting),
        }
    }
}

/// A request whose answer the driver cannot see yet.
struct Finished {
    kind: OpKind,
    seen: u64,
    waited: u64,
}

/// The writing end, for the queue's thread while it serves one ring.
pub(super) struct Tally {
    counters: Arc<Counters>,
    /// What the clock said last, and whether that is too long ago.
    now: u64,
    stale: bool,
    depth: u64,
    depth_max: u64,
    finished: Vec<Finished>,
    pause: Option<u64>,
}

impl Tally {
    /// For a ring of this size. There is one at a time for a queue.
    pub(super) fn new(counters: Arc<Counters>, size: u16) -> Self {
        counters.ring_runs.set(1);
        let depth_max = counters.depth_max.get();
        let finished = Vec::with_capacity(size.into());
        Tally { counters, now: 0, stale: true, depth: 0, depth_max, finished, pause: None }
    }

    /// The thread has waited, or may have.
    #[inline]
    pub(super) fn waited(&mut self) {
        self.stale = true;
    }

    /// The clock was read.
    #[inline]
    pub(super) fn clock(&mut self, at: Instant) {
        self.now = self.counters.at(at);
        self.stale = false;
        if !self.finished.is_empty() {
            self.note_latencies();
        }
    }

    fn read_clock(&mut self) {
        self.clock(Instant::now());
    }

    #[inline]
    fn time(&mut self) -> u64 {
        if self.stale {
            self.read_clock();
        }
        self.now
    }

    /// A request has come.
    #[inline]
    pub(super) fn seen(&mut self, slot: u16) {
        let now = self.time();
        if let Some(seen) = self.counters.slot(slot) {
            seen.set(now);
        }
        self.depth += 1;
        self.depth_max = self.depth_max.max(self.depth);
    }

    /// A chain that is no request was answered.
    pub(super) fn malformed(&mut self) {
        let other = &self.counters.kinds[OpKind::Other as usize];
        other.requests.add(1);
        other.errors.add(1);
    }

    /// A request waits, as it did before or for another cause. Returns its present wait; what is over of
    /// it is added to `waited`.
    pub(super) fn stalled(&mut self, before: Option<Stall>, cause: Cause, waited: &mut u64) -> Stall {
        match before {
            Some(stall) if stall.cause == cause => stall,
            before => {
                if let Some(stall) = before {
                    self.goes_on(stall, waited);
                }
                self.counters.causes[cause as usize].count.add(1);
                Stall { cause, since: self.time() }
            }
        }
    }

    /// A request waits no longer; how long it did is added to `waited`.
    pub(super) fn goes_on(&mut self, stall: Stall, waited: &mut u64) {
        let nanos = self.time().saturating_sub(stall.since);
        self.counters.causes[stall.cause as usize].nanos.add(nanos);
        // What has waited is told from what has not.
        *waited += nanos.max(1);
    }

    /// A request is answered, which the driver will be shown.
    #[inline]
    pub(super) fn finished(&mut self, slot: u16, kind: OpKind, bytes: u64, outcome: Outcome, waited: u64) {
        let of_kind = &self.counters.kinds[kind as usize];
        of_kind.requests.add(1);
        match outcome {
            Outcome::Done => of_kind.bytes.add(bytes),
            Outcome::Failed => of_kind.errors.add(1),
            Outcome::Unsupported => self.counters.unsupported.add(1),
        }
        self.depth -= 1;
        let Some(seen) = self.counters.slot(slot) else { return };
        let finished = Finished { kind, seen: seen.get(), waited };
        seen.set(0);
        self.finished.push(finished);
    }

    /// The driver can see all answers. If they are few, the next look at the clock does for them.
    #[inline]
    pub(super) fn shown(&mut self) {
        if self.finished.len() >= MANY {
            self.read_clock();
        }
    }

    /// The thread goes on without a look at the clock.
    #[inline]
    pub(super) fn settle(&mut self) {
        if !self.finished.is_empty() {
            self.read_clock();
        }
    }

    fn note_latencies(&mut self) {
        for Finished { kind, seen, waited } in self.finished.drain(..) {
            self.counters.kinds[kind as usize].latency.record(self.now.saturating_sub(seen));
            if waited > 0 {
                self.counters.waiting.record(waited);
            }
        }
    }

    /// Shows others how many requests are in flight.
    #[inline]
    pub(super) fn note_depth(&mut self) {
        self.counters.depth.set(self.depth);
        self.counters.depth_max.set(self.depth_max);
    }

    /// The thread has looked for work before it would sleep.
    #[inline]
    pub(super) fn polled(&self, found: bool) {
        self.counters.polls.add(1);
        self.counters.polls_found.add(found.into());
    }

    /// The thread sleeps now.
    #[inline]
    pub(super) fn sleeps(&self) {
        self.counters.sleeps.add(1);
    }

    /// Nothing more is begun, for a pause.
    pub(super) fn pause_begins(&mut self) {
        self.read_clock();
        self.pause = Some(self.now);
        self.counters.paused_since.set(self.now);
    }

    /// The pause is over, if there was one.
    pub(super) fn pause_ends(&mut self) {
        let Some(since) = self.pause.take() else { return };
        self.read_clock();
        let nanos = self.now.saturating_sub(since);
        self.counters.pauses.add(1);
        self.counters.pause_nanos.add(nanos);
        self.counters.pause_longest.raise(nanos);
        self.counters.paused_since.set(0);
    }

    /// So much was measured of the cipher's time.
    pub(super) fn cipher(&self, samples: u64, bytes: u64, time: Duration) {
        self.counters.cipher_samples.add(samples);
        self.counters.cipher_bytes.add(bytes);
        self.counters.cipher_nanos.add(time.as_nanos() as u64);
    }
}

impl Drop for Tally {
    /// The ring is served no longer. Requests that are lost with it, if the thread dies, are not in flight.
    fn drop(&mut self) {
        self.settle();
        self.counters.seen.iter().flat_map(|line| &line.0).for_each(|seen| seen.set(0));
        self.counters.depth.set(0);
        self.counters.paused_since.set(0);
        self.counters.ring_runs.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_in_flight_is_seen_with_its_age_and_is_counted_when_the_driver_sees_the_answer() {
        let counters = Counters::new();
        let mut tally = Tally::new(counters.clone(), 8);
        tally.seen(3);
        tally.seen(5);
        tally.note_depth();
        let read = counters.read();
        assert!(read.ring_runs && read.oldest_in_flight_ns.is_some());
        assert_eq!((read.depth, read.depth_max), (2, 2));
        tally.finished(3, OpKind::Write, 4096, Outcome::Done, 0);
        tally.finished(5, OpKind::Read, 512, Outcome::Failed, 0);
        assert_eq!(counters.latencies().write.count(), 0, "nobody was shown the answer");
        tally.settle();
        tally.note_depth();
        let (read, latencies) = (counters.read(), counters.latencies());
        assert_eq!((read.depth, read.depth_max, read.oldest_in_flight_ns), (0, 2, None));
        assert_eq!(read.write, KindStats { requests: 1, bytes: 4096, errors: 0 });
        assert_eq!(read.read, KindStats { requests: 1, bytes: 0, errors: 1 });
        assert_eq!((latencies.write.count(), latencies.read.count(), latencies.flush.count()), (1, 1, 0));
        drop(tally);
        assert!(!counters.read().ring_runs);
    }

    #[test]
    fn waits_are_counted_once_for_each_cause_and_time_is_added_up() {
        let counters = Counters::new();
        let mut tally = Tally::new(counters.clone(), 8);
        tally.seen(0);
        let mut waited = 0;
        let stall = tally.stalled(None, Cause::Limits, &mut waited);
        let stall = tally.stalled(Some(stall), Cause::Limits, &mut waited);
        assert_eq!((counters.read().throttled.count, waited), (1, 0));
        let stall = tally.stalled(Some(stall), Cause::Room, &mut waited);
        tally.goes_on(stall, &mut waited);
        let read = counters.read();
        assert_eq!((read.throttled.count, read.no_room.count), (1, 1));
        assert!(waited > 0);
        tally.finished(0, OpKind::Flush, 0, Outcome::Done, waited);
        tally.settle();
        assert_eq!(counters.latencies().waiting.sum_ns, waited);
    }

    #[test]
    fn a_pause_that_goes_on_is_seen_and_a_thread_that_dies_leaves_nothing_in_flight() {
        let counters = Counters::new();
        let mut tally = Tally::new(counters.clone(), 8);
        tally.pause_begins();
        assert!(counters.read().pauses.now_ns.is_some());
        tally.pause_ends();
        tally.pause_ends();
        let pauses = counters.read().pauses;
        assert_eq!((pauses.count, pauses.now_ns), (1, None));
        assert!(pauses.longest_ns > 0 && pauses.longest_ns == pauses.total_ns);
        tally.seen(7);
        tally.note_depth();
        drop(tally);
        let read = counters.read();
        assert_eq!((read.depth, read.oldest_in_flight_ns), (0, None));
    }
}
