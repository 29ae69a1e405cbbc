//! How far a long command has come, on a terminal, and that it ends when it is interrupted.
#![forbid(unsafe_code)]

use crate::base::{Context, Result, size};
use crate::ops::import;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often the line is written anew.
const STEP: Duration = Duration::from_millis(200);
/// Characters of the bar.
const WIDTH: usize = 24;

/// A line on standard error, if that is a terminal, and an eye on signals.
pub struct Progress {
    begun: Instant,
    drawn: Option<Instant>,
    is_terminal: bool,
    interrupted: Arc<AtomicBool>,
}

impl Progress {
    /// From now on SIGINT, SIGTERM and SIGHUP make [`Progress::at`] an error instead of ending the process at
    /// once; those that whoever started it has told it to ignore, as `nohup` does, it goes on ignoring.
    pub fn new() -> Result<Self> {
        let interrupted = Arc::<AtomicBool>::default();
        let ignored = ignored_signals();
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0)
        {
            signal_hook::flag::register(signal, interrupted.clone()).context(|| "wait for signals")?;
        }
        let is_terminal = std::io::stderr().is_terminal();
        Ok(Progress { begun: Instant::now(), drawn: None, is_terminal, interrupted })
    }

    /// Shows that `done` bytes of `total` are done.
    ///
    /// # Errors
    /// If a signal came.
    pub fn at(&mut self, done: u64, total: u64) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(import::interrupted());
        }
        let is_due = self.drawn.is_none_or(|drawn| drawn.elapsed() >= STEP) || done >= total;
        if self.is_terminal && is_due {
            self.drawn = Some(Instant::now());
            self.draw(&line(done, total, self.begun.elapsed()));
        }
        Ok(())
    }

    fn draw(&self, text: &str) {
        // Who has closed standard error does not want to know.
        let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            self.draw("");
        }
    }
}

/// The signals that this process ignores: bit n − 1 for signal n, as the kernel tells (proc_pid_status(5)).
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn line(done: u64, total: u64, elapsed: Duration) -> String {
    let part = if total == 0 { 1.0 } else { done as f64 / total as f64 };
    let full = ((part * WIDTH as f64) as usize).min(WIDTH);
    let bar = "#".repeat(full) + &"-".repeat(WIDTH - full);
    let rest = match elapsed.as_secs_f64() * (1.0 - part) / part {
        seconds if seconds.is_finite() && elapsed > STEP => format!(", {seconds:.0} s left"),
        _ => String::new(),
    };
    format!("[{bar}] {:3.0} % of {}{rest}", part * 100.0, size::human(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_it_is_and_how_long_it_may_take() {
        let second = Duration::from_secs(1);
        assert_eq!(line(0, 4 << 30, Duration::ZERO), format!("[{}]   0 % of 4 GiB", "-".repeat(24)));
        assert_eq!(
            line(1 << 30, 4 << 30, 10 * second),
            "[######------------------]  25 % of 4 GiB, 30 s left"
        );
        assert_eq!(line(4 << 30, 4 << 30, second), format!("[{}] 100 % of 4 GiB, 0 s left", "#".repeat(24)));
    }
}
