//! Reports that come again and again: how often, and the wait for the next one.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Seconds, a tenth at least.
pub(super) fn interval(text: &str) -> Result<Duration, String> {
    let wrong = || "a number of seconds from 0.1 to 86400".to_string();
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    match (0.1..=86_400.0).contains(&seconds) {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err(wrong()),
    }
}

/// When reports are due that come at an interval. What a report takes is part of it.
pub(super) struct Reports {
    due: Instant,
    interval: Duration,
}

impl Reports {
    /// The first is now.
    pub(super) fn every(interval: Duration) -> Self {
        Reports { due: Instant::now(), interval }
    }

    /// Waits until the next one is due. One that is late already is due at once, and those after it come at
    /// the interval from then on.
    pub(super) fn wait(&mut self) {
        let now = Instant::now();
        self.due = (self.due + self.interval).max(now);
        std::thread::sleep(self.due - now);
    }
}
