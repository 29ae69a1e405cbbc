//! Busy polling before sleep, as long as the operator allows, and only while it pays.
//!
//! A thread that looks for work for a few microseconds before it sleeps saves the driver's kick and its own
//! wake-up. The window adapts, as KVM's halt polling does: it grows when a sleep turned out to be short, and
//! halves when nothing came, so that an idle queue soon sleeps at once and costs nothing. Where waking up
//! takes longer than the window, no sleep is ever short: so after many sleeps it tries once more.

use std::time::{Duration, Instant};

/// After so many sleeps in a row, polling is tried once more.
const TRY_AFTER: u32 = 64;
/// How long that trial lasts at most: next to nothing beside what the sleeps before it cost.
const TRIAL: Duration = Duration::from_micros(16);

/// How long to look before sleeping.
pub struct BusyPoll {
    /// What the operator allows; zero: never poll.
    limit: Duration,
    window: Duration,
    /// Sleeps since polling was given up.
    sleeps: u32,
    /// The next poll is a trial: if it finds nothing, that was all.
    trial: bool,
}

impl BusyPoll {
    /// Polling for at most `limit` at a time.
    pub fn new(limit: Duration) -> Self {
        BusyPoll { limit, window: limit, sleeps: 0, trial: false }
    }

    /// Whether it is worth a look at present.
    pub fn is_on(&self) -> bool {
        !self.window.is_zero()
    }

    /// Calls `look` until it finds something or the window is over, which began at `begun`. Returns whether
    /// it did, and what the clock said a few looks ago.
    pub fn poll(&mut self, begun: Instant, mut look: impl FnMut() -> bool) -> (bool, Instant) {
        let mut now = begun;
        if self.window.is_zero() {
            return (false, now);
        }
        loop {
            // Reading the clock costs as much as a few looks.
            for _ in 0..16 {
                if look() {
                    self.trial = false;
                    return (true, now);
                }
                std::hint::spin_loop();
            }
            now = Instant::now();
            if now - begun >= self.window {
                self.shrink();
                return (false, now);
            }
        }
    }

    /// Sleeps by `sleep` from `begun` on; if that was short, polling would have been better. Returns what the
    /// clock said afterwards, where that was of interest.
    pub fn sleep<T>(&mut self, begun: Instant, sleep: impl FnOnce() -> T) -> (T, Option<Instant>) {
        if self.limit.is_zero() {
            return (sleep(), None);
        }
        let result = sleep();
        let now = Instant::now();
        if now - begun < self.limit {
            self.window = (self.window * 2).clamp(self.limit / 8, self.limit);
            self.trial = false;
        } else if self.window.is_zero() {
            self.sleeps += 1;
            if self.sleeps == TRY_AFTER {
                (self.window, self.trial) = (self.limit.min(TRIAL), true);
            }
        }
        (result, Some(now))
    }

    fn shrink(&mut self) {
        self.window /= 2;
        if self.trial || self.window < self.limit / 8 {
            *self = BusyPoll { window: Duration::ZERO, ..BusyPoll::new(self.limit) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(poll: &mut BusyPoll, look: impl FnMut() -> bool) -> bool {
        poll.poll(Instant::now(), look).0
    }

    fn sleep(poll: &mut BusyPoll) {
        poll.sleep(Instant::now(), || std::thread::sleep(Duration::from_micros(1)));
    }

    #[test]
    fn an_idle_queue_soon_sleeps_at_once_and_a_short_sleep_brings_polling_back() {
        let mut it = BusyPoll::new(Duration::from_micros(8));
        let mut looks = 0;
        while poll(&mut it, || {
            looks += 1;
            false
        }) || !it.window.is_zero()
        {}
        let before = looks;
        assert!(!poll(&mut it, || unreachable!("nothing is looked for any more")));
        assert_eq!(looks, before);
        it.limit = Duration::MAX / 16;
        sleep(&mut it);
        assert!(poll(&mut it, || true));
    }

    #[test]
    fn where_no_sleep_is_short_polling_is_tried_again_once_in_a_while() {
        let mut it = BusyPoll::new(Duration::from_nanos(8));
        while it.is_on() {
            poll(&mut it, || false);
        }
        for _ in 1..TRY_AFTER {
            sleep(&mut it);
            assert!(!it.is_on());
        }
        sleep(&mut it);
        assert!(!poll(&mut it, || false) && !it.is_on(), "it is given up at once");
        for _ in 0..TRY_AFTER {
            sleep(&mut it);
        }
        assert!(poll(&mut it, || true));
        poll(&mut it, || false);
        assert!(it.is_on(), "what has found something is not given up at once");
    }

    #[test]
    fn without_leave_nothing_is_polled() {
        let mut it = BusyPoll::new(Duration::ZERO);
        assert!(!poll(&mut it, || unreachable!("polling is off")));
        sleep(&mut it);
        assert!(!poll(&mut it, || unreachable!("polling is off")));
    }
}
