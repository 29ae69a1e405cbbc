//! Event sinks in `sealblk.toml`: to whom events are delivered besides the log.
//!
//! ```toml
//! [[event-sink]]
//! name = "pager"                                # lower-case letters, digits, hyphens
//! command = ["/usr/local/bin/page", "storage"]  # one run an event, which it finds on its standard input
//! timeout = 30                                  # seconds that a delivery may take, 1 to 600
//!
//! [[event-sink]]
//! name = "collector"
//! url = "http://127.0.0.1:8088/events"          # one POST an event
//! ```

use crate::base::{Error, Result};
use crate::config::usage;
use hyper::Uri;
use serde::Deserialize;
use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Seconds that a delivery may be allowed.
const TIMEOUT: RangeInclusive<u64> = 1..=600;
/// And where nothing is said.
const DEFAULT_TIMEOUT: u64 = 30;

/// One sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sink {
    /// Its name, unique in the settings: 1..=64 lower-case letters, digits and hyphens.
    pub name: String,
    /// What takes the events.
    pub target: Target,
    /// How long one delivery may take.
    pub timeout: Duration,
}

/// What takes events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A program, by its absolute path, and its arguments.
    Command(Vec<String>),
    /// An `http` URL with a host.
    Http(Uri),
}

/// A sink as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenSink {
    name: String,
    command: Option<Vec<String>>,
    url: Option<String>,
    timeout: Option<u64>,
}

/// All sinks of the settings.
pub(super) fn parse(written: Vec<WrittenSink>) -> Result<Vec<Sink>> {
    let sinks: Vec<Sink> = written.into_iter().map(Sink::try_from).collect::<Result<_>>()?;
    let mut names = HashSet::new();
    match sinks.iter().find(|sink| !names.insert(&sink.name)) {
        Some(twice) => Err(usage(format!("there are two event sinks {:?}", twice.name))),
        None => Ok(sinks),
    }
}

impl TryFrom<WrittenSink> for Sink {
    type Error = Error;

    fn try_from(w: WrittenSink) -> Result<Self> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if !(1..=64).contains(&w.name.len()) || !w.name.bytes().all(allowed) {
            return Err(usage("an event sink's name is 1 to 64 lower-case letters, digits and hyphens"));
        }
        let problem = |what: &str| usage(format!("event sink {:?}: {what}", w.name));
        let seconds = w.timeout.unwrap_or(DEFAULT_TIMEOUT);
        if !TIMEOUT.contains(&seconds) {
            return Err(problem("timeout is 1 to 600 seconds"));
        }
        let target = match (w.command, w.url) {
            (Some(command), None) => Target::Command(check_command(command).map_err(problem)?),
            (None, Some(url)) => Target::Http(check_url(&url).map_err(problem)?),
            _ => return Err(problem("give either command or url")),
        };
        Ok(Sink { name: w.name, target, timeout: Duration::from_secs(seconds) })
    }
}

fn check_command(command: Vec<String>) -> Result<Vec<String>, &'static str> {
    match command.first() {
        Some(program) if program.starts_with('/') => Ok(command),
        _ => Err("command is a list that begins with the absolute path of a program"),
    }
}

fn check_url(url: &str) -> Result<Uri, &'static str> {
    let url: Uri = url.parse().map_err(|_| "url is not a URL")?;
    let authority = url.authority().ok_or("url is not a URL with a host")?;
    match url.scheme_str() {
        Some("http") if authority.as_str().contains('@') => Err("url must not hold a name or password"),
        Some("http") => Ok(url),
        Some("https") => Err("https is not spoken here: use a command such as curl, or a proxy on this host"),
        _ => Err("url begins with http://"),
    }
}
