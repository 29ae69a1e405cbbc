//! What starts fetchers for a host process, which is confined and cannot do it itself. It has neither key nor
//! data, and hears of nothing but that another fetcher is wanted. It ends with the host process, and fetchers
//! with it.

use super::COMMAND;
use crate::base::child;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, printable};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::Duration;

/// The hidden subcommand.
pub(crate) const STARTER: &str = "start-fetchers";
/// The longest line in bytes.
const MAX_LINE: usize = 4096;
/// How long a start may take.
const TIME: Duration = Duration::from_secs(60);

/// What is asked.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Ask {
    /// For another fetcher.
    Next,
}

/// What is answered.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Outcome {
    /// Its socket comes with this.
    Started,
    /// Why there is none.
    Failed(String),
}

/// The host process's way to it.
pub(super) struct Starter {
    socket: UnixStream,
    /// It ends with this process.
    _child: Child,
}

/// Why there is no fetcher.
pub(super) enum Problem {
    /// There can be one later.
    Failed(Error),
    /// There will be none.
    Gone(Error),
}

impl Starter {
    /// Starts it. What it and the fetchers have to say for people goes to `log`, if that is not this
    /// process's standard error.
    ///
    /// # Errors
    /// What keeps it from being started.
    pub(super) fn start(root: &Root, log: Option<BorrowedFd<'_>>) -> Result<Self> {
        let log = log.map(|log| log.try_clone_to_owned()).transpose()?;
        let (socket, _child) = child::spawn_lasting(root, STARTER, |program| {
            if let Some(log) = log {
                program.stderr(log);
            }
        })?;
        socket.set_read_timeout(Some(TIME))?;
        Ok(Starter { socket, _child })
    }

    /// The socket of another fetcher.
    pub(super) fn next(&self) -> Result<UnixStream, Problem> {
        let attempt = || format!("start the {COMMAND} helper");
        let broken = |e: Error| Problem::Gone(e.context(attempt()));
        wire::say(&self.socket, &Ask::Next).map_err(|e| broken(e.into()))?;
        let mut lines = Lines::of_at_most(MAX_LINE);
        let line = lines.next(&self.socket).map_err(|e| broken(e.into()))?;
        let gone = || broken(Error::new(Kind::Other, format!("the {STARTER} helper has ended")));
        match serde_json::from_slice(&line.ok_or_else(gone)?) {
            Ok(Outcome::Started) => lines.take_descriptor().map(UnixStream::from).ok_or_else(gone),
            Ok(Outcome::Failed(why)) => {
                let why = printable::line(&why).into_owned();
                Err(Problem::Failed(Error::new(Kind::Other, why).context(attempt())))
            }
            Err(e) => Err(broken(Error::of(Kind::Other, e))),
        }
    }
}

/// The starter's side: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub(crate) fn help(_: Hardened, root: &Root) -> Result<()> {
    let socket = child::begin()?;
    let mut lines = Lines::of_at_most(MAX_LINE);
    let mut started: Vec<Child> = Vec::new();
    while let Some(line) = lines.next(&socket)? {
        let attempt = || "take a request: this command is started by \"sealblk attach\" alone";
        let Ask::Next =
            serde_json::from_slice(&line).map_err(|e| Error::of(Kind::Usage, e)).context(attempt)?;
        // Those that have ended.
        started.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        match child::spawn(root, COMMAND) {
            Ok((fetcher, child)) => {
                started.push(child);
                wire::say_with(&socket, &Outcome::Started, fetcher.as_fd())?;
            }
            Err(e) => {
                let why = e.to_string().chars().take(1000).collect();
                wire::say(&socket, &Outcome::Failed(why))?;
            }
        }
    }
    Ok(())
}
