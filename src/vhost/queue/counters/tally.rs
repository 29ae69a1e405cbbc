//! The writing end of a queue's counters.
#![forbid(unsafe_code)]

use super::{Cause, Counters, OpKind, Outcome, Stall};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// So many answers are worth a look at the clock.
const MANY: usize = 16;

/// A request whose answer the driver cannot see yet.
struct Finished {
    kind: OpKind,
    seen: u64,
    waited: u64,
}

/// The writing end, for the queue's thread while it serves one ring.
pub(in crate::vhost::queue) struct Tally {
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
    pub(in crate::vhost::queue) fn new(counters: Arc<Counters>, size: u16) -> Self {
        counters.ring_runs.set(1);
        let depth_max = counters.depth_max.get();
        let finished = Vec::with_capacity(size.into());
        Tally { counters, now: 0, stale: true, depth: 0, depth_max, finished, pause: None }
    }

    /// The thread has waited, or may have.
    #[inline]
    pub(in crate::vhost::queue) fn waited(&mut self) {
        self.stale = true;
    }

    /// The clock was read.
    #[inline]
    pub(in crate::vhost::queue) fn clock(&mut self, at: Instant) {
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
    pub(in crate::vhost::queue) fn seen(&mut self, slot: u16) {
        let now = self.time();
        if let Some(seen) = self.counters.slot(slot) {
            seen.set(now);
        }
        self.depth += 1;
        self.depth_max = self.depth_max.max(self.depth);
    }

    /// A chain that is no request was answered.
    pub(in crate::vhost::queue) fn malformed(&mut self) {
        let other = &self.counters.kinds[OpKind::Other as usize];
        other.requests.add(1);
        other.errors.add(1);
    }

    /// A request waits, as it did before or for another cause. Returns its present wait; what is over of
    /// it is added to `waited`.
    pub(in crate::vhost::queue) fn stalled(
        &mut self,
        before: Option<Stall>,
        cause: Cause,
        waited: &mut u64,
    ) -> Stall {
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
    pub(in crate::vhost::queue) fn goes_on(&mut self, stall: Stall, waited: &mut u64) {
        let nanos = self.time().saturating_sub(stall.since);
        self.counters.causes[stall.cause as usize].nanos.add(nanos);
        // What has waited is told from what has not.
        *waited += nanos.max(1);
    }

    /// A request is answered, which the driver will be shown.
    #[inline]
    pub(in crate::vhost::queue) fn finished(
        &mut self,
        slot: u16,
        kind: OpKind,
        bytes: u64,
        outcome: Outcome,
        waited: u64,
    ) {
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
    pub(in crate::vhost::queue) fn shown(&mut self) {
        if self.finished.len() >= MANY {
            self.read_clock();
        }
    }

    /// The thread goes on without a look at the clock.
    #[inline]
    pub(in crate::vhost::queue) fn settle(&mut self) {
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
    pub(in crate::vhost::queue) fn note_depth(&mut self) {
        self.counters.depth.set(self.depth);
        self.counters.depth_max.set(self.depth_max);
    }

    /// The thread has looked for work before it would sleep.
    #[inline]
    pub(in crate::vhost::queue) fn polled(&self, found: bool) {
        self.counters.polls.add(1);
        self.counters.polls_found.add(found.into());
    }

    /// The thread sleeps now.
    #[inline]
    pub(in crate::vhost::queue) fn sleeps(&self) {
        self.counters.sleeps.add(1);
    }

    /// Nothing more is begun, for a pause.
    pub(in crate::vhost::queue) fn pause_begins(&mut self) {
        self.read_clock();
        self.pause = Some(self.now);
        self.counters.paused_since.set(self.now);
    }

    /// The pause is over, if there was one.
    pub(in crate::vhost::queue) fn pause_ends(&mut self) {
        let Some(since) = self.pause.take() else { return };
        self.read_clock();
        let nanos = self.now.saturating_sub(since);
        self.counters.pauses.add(1);
        self.counters.pause_nanos.add(nanos);
        self.counters.pause_longest.raise(nanos);
        self.counters.paused_since.set(0);
    }

    /// So much was measured of the cipher's time.
    pub(in crate::vhost::queue) fn cipher(&self, samples: u64, bytes: u64, time: Duration) {
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
    use super::super::KindStats;
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
