//! What a volume did in a time, from what its host process had counted at both ends of it: the numbers that
//! `iostat` shows of a disk.
#![forbid(unsafe_code)]

use crate::host::stats::Stats;
use crate::vhost::queue::counters::histogram::Histogram;
use crate::vhost::queue::counters::{KindStats, Latencies, QueueStats};
use serde::Serialize;

const SECOND: f64 = 1e9;
const MILLISECOND: f64 = 1e6;

/// Requests of one kind in a time.
#[derive(Clone, Debug, Serialize)]
pub struct Rate {
    /// How many were answered.
    pub requests: u64,
    /// Bytes of those that did not fail.
    pub bytes: u64,
    /// How many failed.
    pub errors: u64,
    /// Requests a second.
    pub per_second: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// How long they took.
    #[serde(flatten)]
    pub took: Took,
}

/// How long requests took, in milliseconds; none of no requests. Shares are at most a sixteenth too long, and
/// never too short.
#[derive(Clone, Debug, Serialize)]
pub struct Took {
    /// On average.
    pub await_ms: Option<f64>,
    /// The half of them took no longer.
    pub p50_ms: Option<f64>,
    /// 99 of 100.
    pub p99_ms: Option<f64>,
    /// 999 of 1000.
    pub p99_9_ms: Option<f64>,
    /// All of them.
    pub max_ms: Option<f64>,
}

impl Took {
    fn of(histogram: &Histogram) -> Self {
        let quantile = |share| histogram.quantile_ns(share).map(|ns| ns as f64 / MILLISECOND);
        let count = histogram.count();
        Took {
            await_ms: (count > 0).then(|| histogram.sum_ns as f64 / count as f64 / MILLISECOND),
            p50_ms: quantile(0.5),
            p99_ms: quantile(0.99),
            p99_9_ms: quantile(0.999),
            max_ms: quantile(1.0),
        }
    }
}

/// What a volume did in a time.
#[derive(Clone, Debug, Serialize)]
pub struct Rates {
    /// How long that was.
    pub seconds: f64,
    /// Whether that began with the attach.
    pub since_attach: bool,
    /// Reads.
    pub read: Rate,
    /// Writes.
    pub write: Rate,
    /// Flushes.
    pub flush: Rate,
    /// Discards.
    pub discard: Rate,
    /// Writes of zeroes.
    pub write_zeroes: Rate,
    /// Reads and writes together.
    pub both: Took,
    /// Waits before the disk, of those requests that waited.
    pub waited: Took,
    /// Requests in flight on average (iostat's aqu-sz).
    pub queue_length: f64,
    /// Requests of any kind that failed.
    pub errors: u64,
    /// Requests a second that began to wait for the limits of the volume.
    pub throttled_per_second: f64,
    /// Nanoseconds that the cipher takes for 4096 bytes, copying included, from a sample of the time; none
    /// if nothing was measured.
    pub cipher_ns_per_4k: Option<f64>,
}

impl Rates {
    /// What was done between two looks; without an earlier one, or if the volume was attached anew
    /// meanwhile, since the attach.
    pub fn between(earlier: Option<&Stats>, later: &Stats) -> Self {
        let earlier = earlier.filter(|earlier| earlier.since_ns <= later.since_ns);
        let since_attach = earlier.is_none();
        let nothing = Stats::default();
        let earlier = earlier.unwrap_or(&nothing);
        let seconds = ((later.since_ns - earlier.since_ns) as f64 / SECOND).max(1e-9);
        let (before, after) = (earlier.total(), later.total());
        let took = later.latencies.since(&earlier.latencies);
        let rate =
            |of: fn(&QueueStats) -> &KindStats, took: fn(&Latencies) -> &Histogram, all: &Latencies| {
                let KindStats { requests, bytes, errors } = of(&after).since(of(&before));
                Rate {
                    requests,
                    bytes,
                    errors,
                    per_second: requests as f64 / seconds,
                    bytes_per_second: bytes as f64 / seconds,
                    took: Took::of(took(all)),
                }
            };
        let mut both = took.read.clone();
        both.add(&took.write);
        let in_flight: u64 =
            took.kinds().iter().fold(0, |sum, (_, histogram)| sum.saturating_add(histogram.sum_ns));
        let cipher_bytes = after.cipher.bytes.saturating_sub(before.cipher.bytes);
        let cipher_ns = after.cipher.total_ns.saturating_sub(before.cipher.total_ns);
        let throttled = after.throttled.count.saturating_sub(before.throttled.count);
        Rates {
            seconds,
            since_attach,
            read: rate(|q| &q.read, |l| &l.read, &took),
            write: rate(|q| &q.write, |l| &l.write, &took),
            flush: rate(|q| &q.flush, |l| &l.flush, &took),
            discard: rate(|q| &q.discard, |l| &l.discard, &took),
            write_zeroes: rate(|q| &q.write_zeroes, |l| &l.write_zeroes, &took),
            both: Took::of(&both),
            waited: Took::of(&took.waiting),
            queue_length: in_flight as f64 / SECOND / seconds,
            errors: after.errors().saturating_sub(before.errors()),
            throttled_per_second: throttled as f64 / seconds,
            cipher_ns_per_4k: (cipher_bytes > 0).then(|| cipher_ns as f64 / cipher_bytes as f64 * 4096.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(since_ns: u64, reads: u64) -> Stats {
        let read = KindStats { requests: reads, bytes: reads * 4096, errors: reads / 10 };
        let queue = QueueStats { read, ..QueueStats::default() };
        let histogram =
            Histogram { sum_ns: reads * 2_000_000, max_ns: 2_000_000, buckets: vec![(200, reads)] };
        let latencies = Latencies { read: histogram, ..Latencies::default() };
        Stats { since_ns, queues: vec![queue, queue], latencies, ..Stats::default() }
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let (earlier, later) = (stats(2_000_000_000, 50), stats(4_000_000_000, 100));
        let rates = Rates::between(Some(&earlier), &later);
        assert!(!rates.since_attach);
        assert_eq!((rates.seconds, rates.read.requests, rates.read.per_second), (2.0, 100, 50.0));
        assert_eq!((rates.read.bytes_per_second, rates.errors), (50.0 * 4096.0, 10));
        assert_eq!(rates.read.took.await_ms, Some(2.0));
        assert_eq!(rates.queue_length, 0.05);
        assert_eq!((rates.write.took.await_ms, rates.both.p99_ms.is_some()), (None, true));
    }

    #[test]
    fn a_volume_that_was_attached_anew_begins_anew() {
        let rates = Rates::between(Some(&stats(9_000_000_000, 500)), &stats(1_000_000_000, 10));
        assert!(rates.since_attach);
        assert_eq!((rates.seconds, rates.read.requests), (1.0, 20));
        assert!(Rates::between(None, &Stats::default()).read.per_second == 0.0);
    }
}
