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

    /// Calls `look` until it finds something or the window is over. Returns whether it did.
    pub fn poll(&mut self, mut look: impl FnMut() -> bool) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let begun = Instant::now();
        loop {
            // Reading the clock costs as much as a few looks.
            for _ in 0..16 {
                if look() {
                    self.trial = false;
                    return true;
                }
                std::hint::spin_loop();
            }
            if begun.elapsed() >= self.window {
                self.shrink();
                return false;
            }
        }
    }

    /// Sleeps by `sleep`; if that was short, polling would have been better.
    pub fn sleep<T>(&mut self, sleep: impl FnOnce() -> T) -> T {
        if self.limit.is_zero() {
            return sleep();
        }
        let begun = Instant::now();
        let result = sleep();
        if begun.elapsed() < self.limit {
            self.window = (self.window * 2).clamp(self.limit / 8, self.limit);
            self.trial = false;
        } else if self.window.is_zero() {
            self.sleeps += 1;
            if self.sleeps == TRY_AFTER {
                (self.window, self.trial) = (self.limit.min(TRIAL), true);
            }
        }
        result
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

    #[test]
    fn an_idle_queue_soon_sleeps_at_once_and_a_short_sleep_brings_polling_back() {
        let mut poll = BusyPoll::new(Duration::from_micros(8));
        let mut looks = 0;
        while poll.poll(|| {
            looks += 1;
            false
        }) || !poll.window.is_zero()
        {}
        let before = looks;
        assert!(!poll.poll(|| unreachable!("nothing is looked for any more")));
        assert_eq!(looks, before);
        poll.limit = Duration::MAX / 16;
        poll.sleep(|| ());
        assert!(poll.poll(|| true));
    }

    #[test]
    fn where_no_sleep_is_short_polling_is_tried_again_once_in_a_while() {
        let mut poll = BusyPoll::new(Duration::from_nanos(8));
        let sleep = |poll: &mut BusyPoll| poll.sleep(|| std::thread::sleep(Duration::from_micros(1)));
        while poll.is_on() {
            poll.poll(|| false);
        }
        for _ in 1..TRY_AFTER {
            sleep(&mut poll);
            assert!(!poll.is_on());
        }
        sleep(&mut poll);
        assert!(!poll.poll(|| false) && !poll.is_on(), "it is given up at once");
        for _ in 0..TRY_AFTER {
            sleep(&mut poll);
        }
        assert!(poll.poll(|| true));
        poll.poll(|| false);
        assert!(poll.is_on(), "what has found something is not given up at once");
    }

    #[test]
    fn without_leave_nothing_is_polled() {
        let mut poll = BusyPoll::new(Duration::ZERO);
        assert!(!poll.poll(|| unreachable!("polling is off")));
        poll.sleep(|| ());
        assert!(!poll.poll(|| unreachable!("polling is off")));
    }
}
