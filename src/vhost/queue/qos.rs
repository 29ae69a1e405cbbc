//! Limits on a volume's requests and bytes a second, shared by its queues.
//!
//! A token bucket each, kept as one number: the time at which the bucket would be back to level. A request is
//! let in while that time is not in the future, and moves it on by what the request costs; idleness lets it
//! fall behind by the burst at most. So a request of any size gets in, and those behind it pay.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What is saved up at least.
const MIN_BURST: Duration = Duration::from_millis(10);

/// What the operator allows. Zero means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests a second.
    pub iops: u64,
    /// Bytes a second.
    pub throughput: u64,
    /// How much of the limits an idle volume saves up: their amount in that time.
    pub burst: Duration,
}

/// The buckets. Limits may change at any time.
pub struct Qos {
    begun: Instant,
    requests: Bucket,
    bytes: Bucket,
}

impl Qos {
    /// Buckets with these limits, full.
    pub fn new(limits: Limits) -> Self {
        let qos = Qos { begun: Instant::now(), requests: Bucket::default(), bytes: Bucket::default() };
        qos.set(limits);
        qos
    }

    /// Puts other limits in force. What is owed under the old ones is forgiven: it is a time, which
    /// would be wrong under the new.
    pub fn set(&self, limits: Limits) {
        self.set_at(self.begun.elapsed().as_nanos() as u64, limits);
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        let burst = Duration::from_nanos(self.bytes.burst.load(Ordering::Relaxed));
        Limits { iops: self.requests.rate(), throughput: self.bytes.rate(), burst }
    }

    fn set_at(&self, now: u64, limits: Limits) {
        // A wait ends a little late: without some credit, every delay would be lost for good.
        let burst = limits.burst.max(MIN_BURST).as_nanos();
        let burst = u64::try_from(burst).unwrap_or(u64::MAX).min(u64::MAX / 4);
        self.requests.set(limits.iops, burst, now);
        self.bytes.set(limits.throughput, burst, now);
    }

    /// Lets a request of `bytes` in, or says how long to wait before asking again.
    pub fn admit(&self, bytes: u64) -> Result<(), Duration> {
        if !self.requests.is_limited() && !self.bytes.is_limited() {
            return Ok(());
        }
        self.admit_at(self.begun.elapsed().as_nanos() as u64, bytes)
    }

    fn admit_at(&self, now: u64, bytes: u64) -> Result<(), Duration> {
        match self.requests.debt(now).max(self.bytes.debt(now)) {
            0 => {
                self.requests.charge(now, 1);
                self.bytes.charge(now, bytes);
                Ok(())
            }
            debt => Err(Duration::from_nanos(debt)),
        }
    }
}

impl Default for Qos {
    /// No limits.
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

#[derive(Default)]
struct Bucket {
    /// Units a second; 0: no limit.
    rate: AtomicU64,
    /// Nanoseconds that the level may fall behind.
    burst: AtomicU64,
    /// When it is level again, in nanoseconds since the beginning.
    level: AtomicU64,
}

impl Bucket {
    fn set(&self, rate: u64, burst: u64, now: u64) {
        self.level.fetch_min(now, Ordering::Relaxed);
        self.burst.store(burst, Ordering::Relaxed);
        self.rate.store(rate, Ordering::Relaxed);
    }

    fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    fn is_limited(&self) -> bool {
        self.rate() != 0
    }

    fn debt(&self, now: u64) -> u64 {
        if self.is_limited() { self.level.load(Ordering::Relaxed).saturating_sub(now) } else { 0 }
    }

    fn charge(&self, now: u64, units: u64) {
        let rate = self.rate();
        if rate == 0 {
            return;
        }
        let cost = u128::from(units) * 1_000_000_000 / u128::from(rate);
        let cost = u64::try_from(cost).unwrap_or(u64::MAX / 4);
        let oldest = now.saturating_sub(self.burst.load(Ordering::Relaxed));
        let add = |level: u64| Some(level.max(oldest).saturating_add(cost));
        // The closure always returns a value, so the update cannot fail.
        let _ = self.level.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Requests of `bytes` that get in during each second, for a driver that never stops asking.
    fn admitted(qos: &Qos, bytes: u64, from: u64, seconds: u64) -> u64 {
        let (mut now, mut count) = (from * SECOND, 0);
        while now < (from + seconds) * SECOND {
            match qos.admit_at(now, bytes) {
                Ok(()) => count += 1,
                Err(wait) => now += wait.as_nanos() as u64,
            }
        }
        count
    }

    fn near(count: u64, expected: u64) -> bool {
        count.abs_diff(expected) <= expected / 100 + 1
    }

    #[test]
    fn the_rate_is_kept_and_an_idle_volume_saves_up_a_burst() {
        let qos = Qos::new(Limits { iops: 1000, throughput: 0, burst: Duration::from_secs(2) });
        // Two seconds of savings are spent at once, then the rate holds.
        assert!(near(admitted(&qos, 4096, 100, 1), 3000));
        assert!(near(admitted(&qos, 4096, 101, 5), 5000));
        // No more than the burst is saved, however long it was idle.
        assert!(near(admitted(&qos, 4096, 10_000, 1), 3000));
    }

    #[test]
    fn bytes_are_limited_too_and_no_request_is_too_large() {
        let qos = Qos::new(Limits { iops: 0, throughput: 1 << 20, burst: Duration::ZERO });
        assert!(near(admitted(&qos, 4096, 1, 4), 4 * 256));
        assert!(near(admitted(&qos, 8 << 20, 10, 32), 4));
    }

    #[test]
    fn a_debt_under_an_old_limit_is_forgiven() {
        let qos = Qos::new(Limits { iops: 0, throughput: 1, burst: Duration::ZERO });
        assert!(qos.admit_at(SECOND, 1 << 30).is_ok());
        assert!(qos.admit_at(2 * SECOND, 1).is_err());
        qos.set_at(2 * SECOND, Limits { iops: 0, throughput: 1 << 30, burst: Duration::ZERO });
        assert!(near(admitted(&qos, 1 << 20, 3, 1), 1024));
    }

    #[test]
    fn the_stricter_limit_holds_and_limits_can_change() {
        let qos = Qos::new(Limits { iops: 100, throughput: 1 << 30, burst: Duration::ZERO });
        assert!(near(admitted(&qos, 4096, 1, 10), 1000));
        qos.set_at(20 * SECOND, Limits { iops: 1000, throughput: 40_960, burst: Duration::ZERO });
        assert!(near(admitted(&qos, 4096, 20, 10), 100));
        qos.set(Limits::default());
        assert_eq!((0..10_000).filter(|_| qos.admit(1 << 20).is_ok()).count(), 10_000);
    }
}
