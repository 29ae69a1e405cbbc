//! The log, bounded: what a guest, a VMM or a peer can cause as often as it likes must not
//! fill the disk that the log goes to.
//!
//! Lines are told apart by the place in the code that they come from. Each place has so many lines a minute;
//! further ones are counted, and the number is told with the next line of that place, or at the end of the
//! process. What is said for those who look for a fault (debug and trace) is not bounded: it was asked for.
//!
//! The log goes to standard error, as text or as JSON, an object a line; or to systemd's journal, by a socket
//! that is connected before a process is confined. What a line is about beside its words ([`log_fields`]) is
//! told as fields of their own.
#![forbid(unsafe_code)]

use crate::base::sync::Locked;
use crate::base::{Error, log_fields, printable};
use clap::ValueEnum;
use log::{Level, Record};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Lines of one place in a [`WINDOW`].
const LINES: u32 = 20;
/// How long a place has to do with them.
const WINDOW: Duration = Duration::from_secs(60);
/// Characters that are kept of a line, to say what was counted.
const SAMPLE: usize = 200;
/// Where systemd's journal listens (systemd's JOURNAL_NATIVE_PROTOCOL).
const JOURNAL: &str = "/run/systemd/journal/socket";
/// Bytes of a message to the journal: more may not fit into a datagram.
const JOURNAL_MAX: usize = 32 << 10;

static PLACES: Mutex<Places> = Mutex::new(Places(BTreeMap::new()));
static OUTPUT: OnceLock<Output> = OnceLock::new();

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
    /// To systemd's journal; where there is none, lines with a priority before them.
    Journal,
}

impl Format {
    /// The form that `SEALBLK_LOG_FORMAT` asks for; an empty variable asks for none.
    ///
    /// # Errors
    /// What is wrong with the variable.
    pub(super) fn of_environment() -> Result<Self, String> {
        const NAME: &str = "SEALBLK_LOG_FORMAT";
        let Some(said) = std::env::var_os(NAME).filter(|said| !said.is_empty()) else {
            return Ok(Format::default());
        };
        let said = said.to_string_lossy();
        Format::from_str(&said, false).map_err(|_| format!("{NAME} is {said:?}: use text, json or journal"))
    }

    fn name(self) -> &'static str {
        match self {
            Format::Text => "text",
            Format::Json => "json",
            Format::Journal => "journal",
        }
    }
}

/// Where lines go.
struct Output {
    format: Format,
    /// The journal's socket.
    journal: Option<UnixDatagram>,
    /// Asked for now: a confined process may not.
    pid: u32,
}

/// Starts the log, with so many `-v`.
pub(super) fn start(format: Format, verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    log_fields::use_format(format.name());
    let journal = (format == Format::Journal).then(|| connect(Path::new(JOURNAL)).ok()).flatten();
    let output = OUTPUT.get_or_init(|| Output { format, journal, pid: std::process::id() });
    // An empty variable says nothing.
    let said = std::env::var("RUST_LOG").ok().filter(|said| !said.trim().is_empty());
    let mut builder = env_logger::Builder::new();
    builder.parse_filters(said.as_deref().unwrap_or(level));
    // As it would be by itself, but for what would move a terminal's cursor.
    builder.format(move |out, record| {
        let message = || printable::lines(&record.args().to_string()).into_owned();
        let line = |message| Line {
            level: record.level(),
            target: record.target().to_owned(),
            place: (record.file().map(str::to_owned), record.line()),
            message,
        };
        let said = match is_bounded(record) {
            true => PLACES.locked().hear(place(record), Instant::now(), || line(message())),
            false => Some(line(message())),
        };
        let time = || out.timestamp_millis().to_string();
        match (said, output.format) {
            (None, _) => Ok(()),
            // To the second, as always.
            (Some(said), Format::Text) => {
                let time = out.timestamp();
                writeln!(out, "[{time} {}", said.text())
            }
            (Some(said), _) => {
                let time = time();
                output.write(out, &said, &time)
            }
        }
    });
    builder.init();
}

/// Tells what was counted and not told yet: the process ends.
pub(super) fn end() {
    let Some(output) = OUTPUT.get() else { return };
    for told in PLACES.locked().take_untold() {
        // Not eprintln!: it panics where standard error is closed.
        let _ = match output.format {
            Format::Text => writeln!(io::stderr(), "[{}", told.text()),
            _ => output.write(&mut io::stderr(), &told, &crate::base::Timestamp::now().to_string()),
        };
    }
}

/// Tells why the command failed, where the log is not text. Returns whether it has.
pub(super) fn tell_error(e: &Error) -> bool {
    let Some(output) = OUTPUT.get().filter(|output| output.format != Format::Text) else { return false };
    let message = printable::lines(&e.to_string()).into_owned();
    let line = Line { level: Level::Error, target: "sealblk".into(), place: (None, None), message };
    output.write(&mut io::stderr(), &line, &crate::base::Timestamp::now().to_string()).is_ok()
}

fn connect(journal: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(journal)?;
    Ok(socket)
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    level: Level,
    target: String,
    place: (Option<String>, Option<u32>),
    message: String,
}

impl Line {
    fn text(&self) -> String {
        format!("{:<5} {}] {}", self.level, self.target, self.message)
    }

    /// syslog(3)'s number for the level.
    fn priority(&self) -> u8 {
        match self.level {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        }
    }

    /// What it is about beside its words.
    fn fields() -> Vec<(&'static str, Value)> {
        let mut fields = Vec::new();
        fields.extend(log_fields::volume().map(|id| ("volume", json!(id))));
        fields.extend(log_fields::queue().map(|queue| ("queue", json!(queue))));
        fields.extend(log_fields::connection().map(|number| ("connection", json!(number))));
        fields
    }
}

impl Output {
    fn write(&self, out: &mut dyn Write, line: &Line, time: &str) -> io::Result<()> {
        match (self.format, &self.journal) {
            (Format::Text, _) => writeln!(out, "[{time} {}", line.text()),
            (Format::Json, _) => {
                let mut object = Map::new();
                let level = line.level.as_str().to_ascii_lowercase();
                object.extend([("time", json!(time)), ("level", json!(level))].map(owned));
                object.extend([("target", json!(line.target)), ("message", json!(line.message))].map(owned));
                object.extend([("pid", json!(self.pid))].map(owned));
                object.extend(Line::fields().into_iter().map(owned));
                writeln!(out, "{}", Value::Object(object))
            }
            (Format::Journal, Some(journal)) => match journal.send(&entry(line, Line::fields())) {
                Ok(_) => Ok(()),
                // It was restarted, or has no room: whoever reads standard error has it at least.
                Err(_) => prefixed(out, line),
            },
            (Format::Journal, None) => prefixed(out, line),
        }
    }
}

fn owned((name, value): (&'static str, Value)) -> (String, Value) {
    (name.to_owned(), value)
}

/// As sd-daemon(3) has it: journald takes the level from standard error, and has a clock of its own.
fn prefixed(out: &mut dyn Write, line: &Line) -> io::Result<()> {
    let mut text = String::new();
    for part in line.message.lines() {
        text.push_str(&format!("<{}>{}: {part}\n", line.priority(), line.target));
    }
    out.write_all(text.as_bytes())
}

/// An entry of the journal: a field a line.
fn entry(line: &Line, fields: Vec<(&'static str, Value)>) -> Vec<u8> {
    let mut entry = Vec::new();
    // A value of several lines has its length before it; with that, every value can be written so.
    let mut field = |name: &str, value: &dyn Display| {
        let value = value.to_string();
        let end = value.floor_char_boundary(JOURNAL_MAX);
        let value = &value[..end];
        entry.extend(name.bytes().chain([b'\n']));
        entry.extend((value.len() as u64).to_le_bytes());
        entry.extend(value.bytes().chain([b'\n']));
    };
    field("MESSAGE", &line.message);
    field("PRIORITY", &line.priority());
    field("SYSLOG_IDENTIFIER", &"sealblk");
    field("TARGET", &line.target);
    if let (Some(file), Some(number)) = &line.place {
        field("CODE_FILE", file);
        field("CODE_LINE", number);
    }
    for (name, value) in fields {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        field(&format!("SEALBLK_{}", name.to_uppercase()), &value);
    }
    entry
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
    sample: Option<Line>,
}

impl Places {
    /// One more from `place`; what is to be written for that, if anything is.
    fn hear(&mut self, place: Place, now: Instant, line: impl FnOnce() -> Line) -> Option<Line> {
        let new = || Said { since: now, lines: 0, untold: 0, sample: None };
        let said = self.0.entry(place).or_insert_with(new);
        if now.saturating_duration_since(said.since) >= WINDOW {
            (said.since, said.lines) = (now, 0);
        }
        if said.lines == LINES {
            said.untold += 1;
            return None;
        }
        said.lines += 1;
        let mut line = line();
        let sample = line.message.chars().take(SAMPLE).collect();
        said.sample = Some(Line { message: sample, ..line.clone() });
        match std::mem::take(&mut said.untold) {
            0 => {}
            untold => line.message.push_str(&format!(" ({untold} more like it were not written)")),
        }
        if said.lines == LINES {
            line.message.push_str(" (more like it in this minute are counted, and not written)");
        }
        Some(line)
    }

    fn take_untold(&mut self) -> Vec<Line> {
        let untold = self.0.values_mut().filter(|said| said.untold > 0);
        let told = untold.filter_map(|said| {
            let untold = std::mem::take(&mut said.untold);
            let mut line = said.sample.clone()?;
            line.message.push_str(&format!(" ({untold} more like it were not written)"));
            Some(line)
        });
        told.collect()
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
            let line_said = || warning("no space left");
            places.hear(here(line), start + Duration::from_secs(at), line_said).map(|line| line.message)
        };
        for n in 1..LINES {
            assert_eq!(hear(1, u64::from(n)).unwrap(), "no space left");
        }
        assert!(hear(1, 30).unwrap().ends_with("(more like it in this minute are counted, and not written)"));
        for _ in 0..1000 {
            assert_eq!(hear(1, 59), None);
        }
        // Another place has its own.
        assert_eq!(hear(2, 59).unwrap(), "no space left");
        assert_eq!(hear(1, 61).unwrap(), "no space left (1000 more like it were not written)");
        assert_eq!(hear(1, 62).unwrap(), "no space left");
        for _ in 0..LINES {
            hear(1, 63);
        }
        let untold = "no space left (2 more like it were not written)";
        assert_eq!(places.take_untold(), [warning(untold)]);
        assert_eq!(places.take_untold(), []);
    }

    #[test]
    fn each_form_has_what_a_line_is_about() {
        let output = |format| Output { format, journal: None, pid: 7 };
        let written = move |format, line: &Line| {
            let mut out = Vec::new();
            output(format).write(&mut out, line, "2026-01-31T23:59:59.000Z").unwrap();
            String::from_utf8(out).unwrap()
        };
        let line = warning("no \"space\" left\nat all");
        let text = "[2026-01-31T23:59:59.000Z WARN  t] no \"space\" left\nat all\n";
        assert_eq!(written(Format::Text, &line), text);
        let thread = std::thread::Builder::new().name("queue-3".into());
        let json = thread.spawn({
            let line = line.clone();
            move || written(Format::Json, &line)
        });
        let json: Value = serde_json::from_str(&json.unwrap().join().unwrap()).unwrap();
        let expected = json!({
            "time": "2026-01-31T23:59:59.000Z", "level": "warn", "target": "t", "pid": 7, "queue": 3,
            "message": "no \"space\" left\nat all",
        });
        assert_eq!(json, expected);
        assert_eq!(written(Format::Journal, &line), "<4>t: no \"space\" left\n<4>t: at all\n");
    }

    #[test]
    fn the_journal_gets_fields_and_whoever_reads_standard_error_gets_the_line_where_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let journal = UnixDatagram::bind(&path).unwrap();
        let output = Output { format: Format::Journal, journal: connect(&path).ok(), pid: 7 };
        let line = Line { place: (Some("a.rs".into()), Some(5)), ..warning("two\nlines") };
        let mut out = Vec::new();
        output.write(&mut out, &line, "").unwrap();
        assert!(out.is_empty());
        let mut bytes = [0; 1024];
        let len = journal.recv(&mut bytes).unwrap();
        let field = |name: &str, value: &str| {
            let len = (value.len() as u64).to_le_bytes();
            [name.as_bytes(), b"\n", &len, value.as_bytes(), b"\n"].concat()
        };
        let expected = [
            field("MESSAGE", "two\nlines"),
            field("PRIORITY", "4"),
            field("SYSLOG_IDENTIFIER", "sealblk"),
            field("TARGET", "t"),
            field("CODE_FILE", "a.rs"),
            field("CODE_LINE", "5"),
        ];
        assert_eq!(bytes[..len], expected.concat());
        let of_queue = entry(&line, vec![("queue", json!(3)), ("volume", json!("vol-1"))]);
        let rest = [field("SEALBLK_QUEUE", "3"), field("SEALBLK_VOLUME", "vol-1")].concat();
        assert_eq!(of_queue, [expected.concat(), rest].concat());
        drop(journal);
        output.write(&mut out, &line, "").unwrap();
        assert_eq!(out, b"<4>t: two\n<4>t: lines\n");
    }

    fn warning(message: &str) -> Line {
        Line { level: Level::Warn, target: "t".into(), place: (None, None), message: message.into() }
    }
}
