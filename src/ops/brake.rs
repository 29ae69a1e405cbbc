//! What keeps a command's reading and writing to a rate.

use std::time::{Duration, Instant};

/// Not more than so many bytes a second, from when it was made.
pub(super) struct Brake {
    /// 0: no limit.
    rate: u64,
    begun: Instant,
    bytes: u64,
}

impl Brake {
    pub(super) fn new(rate: u64) -> Self {
        Brake { rate, begun: Instant::now(), bytes: 0 }
    }

    /// Waits until so many more bytes are allowed.
    pub(super) fn wait(&mut self, bytes: u64) {
        self.wait_unless(bytes, Duration::MAX, || false);
    }

    /// As [`Brake::wait`], and looks now and then whether there is no need to wait any more.
    pub(super) fn wait_unless(&mut self, bytes: u64, look: Duration, is_over: impl Fn() -> bool) {
        self.bytes += bytes;
        let nanos = (u128::from(self.bytes) * 1_000_000_000).checked_div(u128::from(self.rate));
        let due = Duration::from_nanos(nanos.unwrap_or(0).min(u128::from(u64::MAX)) as u64);
        loop {
            let left = due.saturating_sub(self.begun.elapsed());
            if left.is_zero() || is_over() {
                return;
            }
            std::thread::sleep(left.min(look));
        }
    }
}
