//! How far a copy has come, on a terminal.
#![forbid(unsafe_code)]

use crate::base::size;
use crate::host::status::Progress;
use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Over how long a rate is measured.
const SPAN: Duration = Duration::from_secs(10);

/// Shows on a terminal what is left, how fast it goes, and how long it will take.
pub(super) struct Meter {
    is_terminal: bool,
    /// What was left when.
    seen: VecDeque<(Instant, u64)>,
}

impl Meter {
    /// On standard error.
    pub(super) fn new() -> Self {
        Meter { is_terminal: std::io::stderr().is_terminal(), seen: VecDeque::new() }
    }

    /// Shows it.
    pub(super) fn show(&mut self, progress: &Progress) {
        if let (true, Some(left)) = (self.is_terminal, progress.left) {
            let problem = progress.problem.as_ref().map_or(String::new(), |p| format!("; {p}"));
            let line = self.line(Instant::now(), left);
            let _ = write!(std::io::stderr(), "\r\x1b[K{line}{problem}");
        }
    }

    fn line(&mut self, now: Instant, left: u64) -> String {
        self.seen.push_back((now, left));
        while self.seen.len() > 2 && now - self.seen[0].0 > SPAN {
            self.seen.pop_front();
        }
        let (since, first) = self.seen[0];
        let seconds = (now - since).as_secs_f64();
        let rate = if seconds > 0.0 { first.saturating_sub(left) as f64 / seconds } else { 0.0 };
        let mut line = format!("{} left", size::about(left));
        if rate >= 1.0 {
            let eta = (left as f64 / rate) as u64;
            line += &format!(
                ", {}/s, {}:{:02}:{:02}",
                size::about(rate as u64),
                eta / 3600,
                eta / 60 % 60,
                eta % 60
            );
        }
        line
    }

    /// Leaves nothing of it on the terminal.
    pub(super) fn clear(&mut self) {
        if self.is_terminal && !self.seen.is_empty() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_tells_what_is_left_how_fast_and_how_long() {
        let (mut meter, start) = (Meter::new(), Instant::now());
        assert_eq!(meter.line(start, 3 << 30), "3.0 GiB left");
        let later = meter.line(start + Duration::from_secs(2), (3 << 30) - (128 << 20));
        assert_eq!(later, "2.9 GiB left, 64.0 MiB/s, 0:00:46");
        // What was long ago does not count.
        for second in 3..40 {
            meter.line(start + Duration::from_secs(second), 2 << 30);
        }
        assert_eq!(meter.line(start + Duration::from_secs(40), 2 << 30), "2.0 GiB left");
    }
}
