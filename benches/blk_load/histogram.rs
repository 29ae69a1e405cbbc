//! Latencies in a log-linear histogram: 64 buckets for every power of two, so that a value is known to 1.6 %.

const BITS: u32 = 6;
const LINEAR: u64 = 1 << BITS;

/// Counts of nanoseconds.
pub struct Histogram {
    buckets: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: vec![0; bucket(u64::MAX) + 1], total: 0 }
    }
}

impl Histogram {
    /// Counts one value.
    pub fn record(&mut self, ns: u64) {
        self.buckets[bucket(ns)] += 1;
        self.total += 1;
    }

    /// Adds another histogram's counts.
    pub fn add(&mut self, other: &Histogram) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.total += other.total;
    }

    /// The value below or at which `share` (0 to 1) of the counts lie, nanoseconds; 0 if nothing was counted.
    pub fn quantile(&self, share: f64) -> u64 {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle(index);
            }
        }
        0
    }
}

fn bucket(value: u64) -> usize {
    if value < LINEAR {
        return value as usize;
    }
    let power = u64::BITS - 1 - value.leading_zeros();
    let within = (value >> (power - BITS)) - LINEAR;
    (u64::from(power - BITS + 1) * LINEAR + within) as usize
}

fn middle(index: usize) -> u64 {
    let (block, within) = (index as u64 / LINEAR, index as u64 % LINEAR);
    if block == 0 {
        return within;
    }
    let width = 1 << (block - 1);
    (LINEAR + within) * width + width / 2
}
