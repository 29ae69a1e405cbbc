//! How long things took, as counts in buckets: sixteen of one width between a power of two and the next.
//!
//! So a time that is read from a bucket is at most a sixteenth longer than it was, and never shorter. Times
//! below a microsecond (1024 ns) lie in buckets 64 ns wide; those above two minutes are all in the last one,
//! and the longest time of all is kept exactly. This is HdrHistogram's idea; no crate has one that one thread
//! writes, without a lock, while others read.
#![forbid(unsafe_code)]

use crate::vhost::queue::counters::Counter;
use serde::{Deserialize, Serialize};

/// The buckets of one width: `1 << BITS` of them.
const BITS: u32 = 4;
/// The first power of two, in nanoseconds, from which on buckets grow.
const FIRST: u32 = 10;
/// The power of two that the last bucket ends at: 137 seconds.
const LAST: u32 = 37;
/// How many buckets there are.
pub const BUCKETS: usize = ((LAST - FIRST + 1) << BITS) as usize;

/// The bucket that has this time.
#[inline]
fn bucket_of(nanos: u64) -> usize {
    let nanos = nanos.min((1 << LAST) - 1);
    // What is below the first power of two is one more row, of narrow buckets.
    let power = (u64::BITS - 1 - (nanos | 1).leading_zeros()).max(FIRST - 1);
    let row = power - (FIRST - 1);
    if row == 0 {
        return (nanos >> (FIRST - BITS)) as usize;
    }
    let within = (nanos >> (power - BITS)) & ((1 << BITS) - 1);
    ((row << BITS) as u64 + within) as usize
}

/// Where a bucket ends, in nanoseconds: all times in it are shorter.
pub fn end_of(bucket: usize) -> u64 {
    let (row, within) = (bucket as u32 >> BITS, bucket as u64 & ((1 << BITS) - 1));
    if row == 0 {
        return (within + 1) << (FIRST - BITS);
    }
    ((1 << BITS) + within + 1) << (row - 1 + FIRST - BITS)
}

/// A histogram that one thread writes, and others read at any time.
pub(super) struct Recorder {
    sum: Counter,
    max: Counter,
    buckets: [Counter; BUCKETS],
}

impl Recorder {
    pub(super) fn new() -> Self {
        let buckets = std::array::from_fn(|_| Counter::default());
        Recorder { sum: Counter::default(), max: Counter::default(), buckets }
    }

    /// Notes a time. Only the one thread that writes does this.
    #[inline]
    pub(super) fn record(&self, nanos: u64) {
        self.buckets[bucket_of(nanos)].add(1);
        self.sum.add(nanos);
        self.max.raise(nanos);
    }

    pub(super) fn read(&self) -> Histogram {
        let filled = self.buckets.iter().map(Counter::get).enumerate().filter(|(_, count)| *count > 0);
        let buckets = filled.map(|(bucket, count)| (bucket as u16, count)).collect();
        Histogram { sum_ns: self.sum.get(), max_ns: self.max.get(), buckets }
    }
}

/// A histogram as it was read. What is in it may come from another process, and is then a claim: nothing here
/// fails, whatever the numbers are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// All times together.
    pub sum_ns: u64,
    /// The longest time.
    pub max_ns: u64,
    /// The buckets that have any: which, and how many times lie in it; in ascending order.
    pub buckets: Vec<(u16, u64)>,
}

impl Histogram {
    /// How many times were noted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    /// The time on average; none of nothing.
    pub fn mean_ns(&self) -> Option<u64> {
        self.sum_ns.checked_div(self.count())
    }

    /// The time that a share of all times (0 to 1) did not exceed: at most a sixteenth more than
    /// it was. None of nothing.
    pub fn quantile_ns(&self, share: f64) -> Option<u64> {
        let count = self.count();
        let wanted = ((count as f64 * share).ceil() as u64).clamp(1, count.max(1));
        let mut below: u64 = 0;
        self.buckets.iter().find_map(|(bucket, count)| {
            below = below.saturating_add(*count);
            (below >= wanted).then(|| end_of(usize::from(*bucket).min(BUCKETS - 1)).min(self.max_ns))
        })
    }

    /// How many times were below `nanos`, for one that is the end of a bucket; for another, how many were
    /// surely.
    pub fn below(&self, nanos: u64) -> u64 {
        let is_below = |(bucket, _): &&(u16, u64)| end_of(usize::from(*bucket).min(BUCKETS - 1)) <= nanos;
        self.buckets.iter().filter(is_below).fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    /// Adds what another one has.
    pub fn add(&mut self, other: &Histogram) {
        let mut counts = self.counts();
        for (bucket, count) in &other.buckets {
            let there = counts.entry(*bucket).or_default();
            *there = there.saturating_add(*count);
        }
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
        self.buckets = counts.into_iter().collect();
    }

    /// What came after `earlier`. The longest time of that is not known: it is the end of the last bucket, or
    /// the longest of all, if that is less.
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        let mut counts = self.counts();
        for (bucket, count) in &earlier.buckets {
            if let Some(there) = counts.get_mut(bucket) {
                *there = there.saturating_sub(*count);
            }
        }
        counts.retain(|_, count| *count > 0);
        let last = counts.keys().next_back().map(|bucket| end_of(usize::from(*bucket).min(BUCKETS - 1)));
        Histogram {
            sum_ns: self.sum_ns.saturating_sub(earlier.sum_ns),
            max_ns: last.map_or(0, |end| end.min(self.max_ns)),
            buckets: counts.into_iter().collect(),
        }
    }

    fn counts(&self) -> std::collections::BTreeMap<u16, u64> {
        self.buckets.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_lies_in_a_bucket_at_most_a_sixteenth_wide() {
        let mut last = None;
        for nanos in (0..1u64 << 14).chain((14..LAST).flat_map(|p| [(1 << p) - 1, 1 << p, (1 << p) + 12345]))
        {
            let bucket = bucket_of(nanos);
            let (begin, end) = (bucket.checked_sub(1).map_or(0, end_of), end_of(bucket));
            assert!((begin..end).contains(&nanos), "{nanos} in {begin}..{end}");
            assert!(end - begin <= (begin / 16).max(64), "{begin}..{end}");
            last = last.max(Some(bucket));
        }
        assert_eq!(end_of(BUCKETS - 1), 1 << LAST);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(last, Some(BUCKETS - 16));
    }

    #[test]
    fn what_is_read_is_at_most_a_sixteenth_longer_than_it_was() {
        let recorder = Recorder::new();
        let times: Vec<u64> = (0..10_000u64).map(|n| 2_000 + n * n).collect();
        times.iter().for_each(|&nanos| recorder.record(nanos));
        let read = recorder.read();
        assert_eq!((read.count(), read.max_ns), (10_000, 2_000 + 9_999 * 9_999));
        assert_eq!(read.sum_ns, times.iter().sum::<u64>());
        for share in [0.0, 0.5, 0.99, 0.999, 1.0] {
            let rank = ((10_000.0 * share) as usize).clamp(1, 10_000);
            let (exact, read) = (times[rank - 1], read.quantile_ns(share).unwrap());
            assert!(exact <= read && read <= exact + exact / 16 + 1, "{share}: {exact} is read as {read}");
        }
        assert_eq!(Histogram::default().quantile_ns(0.5), None);
        assert_eq!(Histogram::default().mean_ns(), None);
    }

    #[test]
    fn what_was_added_and_taken_away_again_is_what_was_there() {
        let (first, second) = (Recorder::new(), Recorder::new());
        for nanos in [100, 5_000, 70_000, 70_001] {
            first.record(nanos);
        }
        for nanos in [100, 900_000] {
            second.record(nanos);
        }
        let mut both = first.read();
        both.add(&second.read());
        assert_eq!((both.count(), both.max_ns, both.below(1024)), (6, 900_000, 2));
        let rest = both.since(&first.read());
        assert_eq!((&rest.buckets, rest.sum_ns), (&second.read().buckets, 900_100));
        assert_eq!(both.since(&both).count(), 0);
    }

    #[test]
    fn a_histogram_that_makes_no_sense_breaks_nothing() {
        let strange: Histogram =
            serde_json::from_str(r#"{"sum_ns":7,"max_ns":9,"buckets":[[65535,18446744073709551615],[3,5]]}"#)
                .unwrap();
        let mut sum = strange.clone();
        sum.add(&strange);
        assert_eq!(sum.quantile_ns(1.0), Some(9));
        assert_eq!(sum.below(u64::MAX), u64::MAX);
        assert_eq!(Histogram::default().since(&strange), Histogram::default());
    }
}
