//! What is read of counters: numbers, that are added up and compared.
#![forbid(unsafe_code)]

use super::KINDS;
use super::histogram::Histogram;
use serde::{Deserialize, Serialize};

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
