//! The log on standard error, bounded: what a guest, a VMM or a peer can cause as often as it likes must not
//! fill the disk that the log goes to.
//!
//! Lines are told apart by the place in the code that they come from. Each place has so many lines a minute;
//! further ones are counted, and the number is told with the next line of that place, or at the end of the
//! process. What is said for those who look for a fault (debug and trace) is not bounded: it was asked for.
#![forbid(unsafe_code)]

use crate::base::printable;
use crate::base::sync::Locked;
use log::{Level, Record};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines of one place in a [`WINDOW`].
const LINES: u32 = 20;
/// How long a place has to do with them.
const WINDOW: Duration = Duration::from_secs(60);
/// Characters that are kept of a line, to say what was counted.
const SAMPLE: usize = 200;

static PLACES: Mutex<Places> = Mutex::new(Places(BTreeMap::new()));

/// Starts the log, with so many `-v`.
pub(super) fn start(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let mut builder = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level));
    // As it would be by itself, but for what would move a terminal's cursor.
    builder.format(|out, record| {
        let said = match is_bounded(record) {
            true => PLACES.locked().hear(place(record), Instant::now(), || line(record)),
            false => Some(line(record)),
        };
        match said {
            Some(said) => writeln!(out, "[{} {said}", out.timestamp()),
            None => Ok(()),
        }
    });
    builder.init();
}

/// Tells what was counted and not told yet: the process ends.
pub(super) fn end() {
    for told in PLACES.locked().take_untold() {
        // Not eprintln!: it panics where standard error is closed.
        let _ = writeln!(std::io::stderr(), "[{told}");
    }
}

fn line(record: &Record<'_>) -> String {
    let text = record.args().to_string();
    format!("{:<5} {}] {}", record.level(), record.target(), printable::lines(&text))
}

fn is_bounded(record: &Record<'_>) -> bool {
    record.level() <= Level::Info
}

/// Where in the code.
type Place = (String, u32);

fn place(record: &Record<'_>) -> Place {
    (record.file().unwrap_or(record.target()).to_owned(), record.line().unwrap_or(0))
}

/// What each place has said.
struct Places(BTreeMap<Place, Said>);

struct Said {
    since: Instant,
    lines: u32,
    /// How many were only counted.
    untold: u64,
    /// The last line that was written, or as much of it as is kept.
    sample: String,
}

impl Places {
    /// One more from `place`; what is to be written for that, if anything is.
    fn hear(&mut self, place: Place, now: Instant, line: impl FnOnce() -> String) -> Option<String> {
        let new = || Said { since: now, lines: 0, untold: 0, sample: String::new() };
        let said = self.0.entry(place).or_insert_with(new);
        if now.saturating_duration_since(said.since) >= WINDOW {
            (said.since, said.lines) = (now, 0);
        }
        if said.lines == LINES {
            said.untold += 1;
            return None;
        }
        said.lines += 1;
        let line = line();
        said.sample = line.chars().take(SAMPLE).collect();
        let before = match std::mem::take(&mut said.untold) {
            0 => String::new(),
            untold => format!(" ({untold} more like it were not written)"),
        };
        let after = match said.lines {
            LINES => " (more like it in this minute are counted, and not written)",
            _ => "",
        };
        Some(line + &before + after)
    }

    fn take_untold(&mut self) -> Vec<String> {
        let untold = self.0.values_mut().filter(|said| said.untold > 0);
        untold
            .map(|said| {
                format!(
                    "{} ({} more like it were not written)",
                    said.sample,
                    std::mem::take(&mut said.untold)
                )
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_lines_of_a_place_are_written_and_the_others_counted() {
        let (mut places, start) = (Places(BTreeMap::new()), Instant::now());
        let here = |line| ("here.rs".to_owned(), line);
        let mut hear = |line, at: u64| {
            places.hear(here(line), start + Duration::from_secs(at), || "WARN  t] no space left".into())
        };
        for n in 1..LINES {
            assert_eq!(hear(1, u64::from(n)).unwrap(), "WARN  t] no space left");
        }
        assert!(hear(1, 30).unwrap().ends_with("(more like it in this minute are counted, and not written)"));
        for _ in 0..1000 {
            assert_eq!(hear(1, 59), None);
        }
        // Another place has its own.
        assert_eq!(hear(2, 59).unwrap(), "WARN  t] no space left");
        assert_eq!(hear(1, 61).unwrap(), "WARN  t] no space left (1000 more like it were not written)");
        assert_eq!(hear(1, 62).unwrap(), "WARN  t] no space left");
        for _ in 0..LINES {
            hear(1, 63);
        }
        let untold = "WARN  t] no space left (2 more like it were not written)";
        assert_eq!(places.take_untold(), [untold]);
        assert_eq!(places.take_untold(), [""; 0]);
    }
}
