//! A step of a backup or a restore, in a process of its own.
//!
//! Whoever has a snapshot's keys has no network any more ([`super::push`], [`super::pull`]), and the next
//! snapshot's KMS may take one. So a command that is about many volumes has each done by this program once
//! more, and has no key itself. One that fails stops no other.

use super::pull::Ahead;
use super::push::Pushed;
use super::{Target, pull};
use crate::backup::saved::RESTORED;
use crate::base::child;
use crate::base::root::Root;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::{SnapshotId, VolumeId};
use crate::disk::transfer::Watch;
use crate::ops::need::Budget;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use uuid::Uuid;

/// The hidden subcommand.
pub(crate) const COMMAND: &str = "backup-step";
/// The longest request or answer, in bytes.
pub(super) const MAX_LINE: usize = 64 << 10;
/// How often whoever waits looks whether it is to go on waiting.
pub(super) const LOOK: Duration = Duration::from_millis(200);

/// What one process does.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Step {
    /// Pushes a snapshot.
    Push(SnapshotId, Target),
    /// Makes a snapshot of what a place has.
    Pull(SnapshotId, Target, pull::Wanted),
    /// Makes the volume again that a snapshot is of, which was pulled for that, and deletes the snapshot.
    Make(SnapshotId),
    /// Opens a volume as an attach does, and deletes it.
    Try(VolumeId),
    /// Says in a place that the volume has come of which the first snapshot was pulled as
    /// the second one there, unless that was called off.
    Accept(SnapshotId, SnapshotId, Target),
    /// Looks whether another host says so, of the last snapshot of a volume that was sent.
    Received(SnapshotId, Target),
    /// Puts the KMS of this id back out of a place, and its root key out of a copy, if there is one.
    Kms(Uuid, Target, Option<Vec<u8>>),
}

/// What came of it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Came {
    Pushed(Pushed),
    Pulled(SnapshotId),
    Made(Made),
    IsReceived(bool),
    /// The place said so before it had this host's word.
    CalledOff,
    Done,
}

/// A volume that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Made {
    /// Its id.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size: u64,
    /// Whether an earlier restore has made it.
    pub was_there: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Said {
    /// How far it has come, and of how much.
    Progress(u64, u64),
    Came(Box<Came>),
    /// The name of the error's kind, and its words.
    Failed(String, String),
}

/// Where steps are done: a store, with a configuration folder of its own, if one is named.
pub(super) struct Site {
    pub(super) root: Root,
    pub(super) config: Option<PathBuf>,
}

impl Site {
    /// Pushes a snapshot.
    ///
    /// # Errors
    /// As [`Site::run`].
    pub(super) fn push(&self, snapshot: SnapshotId, target: &Target, watch: Watch<'_>) -> Result<Pushed> {
        match self.run(&Step::Push(snapshot, target.clone()), watch)? {
            Came::Pushed(pushed) => Ok(pushed),
            _ => Err(other()),
        }
    }

    /// Pulls the snapshot of a volume that is to be made again, with a note of which one it was in the place.
    ///
    /// # Errors
    /// As [`Site::run`].
    pub(super) fn pull_to_restore(
        &self,
        snapshot: SnapshotId,
        target: &Target,
        key: Option<String>,
        budget: Budget,
        ahead: Ahead,
        watch: Watch<'_>,
    ) -> Result<SnapshotId> {
        let tags = vec![(RESTORED.into(), snapshot.to_string())];
        let wanted = pull::Wanted { key, name: None, tags, budget, ahead, lazy: false };
        match self.run(&Step::Pull(snapshot, target.clone(), wanted), watch)? {
            Came::Pulled(id) => Ok(id),
            _ => Err(other()),
        }
    }

    /// Makes the volume again that a snapshot is of, which was pulled for that.
    ///
    /// # Errors
    /// As [`Site::run`].
    pub(super) fn make(&self, pulled: SnapshotId, watch: Watch<'_>) -> Result<Made> {
        match self.run(&Step::Make(pulled), watch)? {
            Came::Made(made) => Ok(made),
            _ => Err(other()),
        }
    }

    /// Does a step, and waits for it. `watch` is told how far it has come; an error of it ends the step.
    ///
    /// # Errors
    /// Those of the step, and of `watch`.
    pub(super) fn run(&self, step: &Step, watch: Watch<'_>) -> Result<Came> {
        let (socket, mut child) = child::spawn_with(&self.root, self.config.as_deref(), COMMAND, |_| {})?;
        let ended = hear(&socket, step, watch);
        if !matches!(ended, Ok(Some(_))) {
            // It did not keep to the protocol, or is not wanted any more.
            let _ = child.kill();
        }
        let status = child.wait().context(|| "wait for a step")?;
        match ended? {
            Some(Ok(came)) => Ok(came),
            Some(Err(e)) => Err(e),
            None => {
                // A signal to all of them has ended it first, perhaps.
                watch(0, 0)?;
                Err(Error::new(Kind::Other, format!("the process that was to do it is gone ({status})")))
            }
        }
    }
}

/// What came of a step; none if its process is gone.
fn hear(socket: &UnixStream, step: &Step, watch: Watch<'_>) -> Result<Option<Result<Came>>> {
    socket.set_read_timeout(Some(LOOK))?;
    wire::say(socket, step).context(|| "tell a process what to do")?;
    let (mut lines, mut at) = (Lines::of_at_most(MAX_LINE), (0, 0));
    loop {
        let line = match lines.next(socket) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(None),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                watch(at.0, at.1)?;
                continue;
            }
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let said: Said = serde_json::from_slice(&line)
            .map_err(|e| Error::of(Kind::Other, e).context("a step's process says what nobody reads"))?;
        match said {
            Said::Progress(done, total) => {
                at = (done, total);
                watch(done, total)?;
            }
            Said::Came(came) => return Ok(Some(Ok(*came))),
            Said::Failed(kind, words) => return Ok(Some(Err(Error::new(Kind::from_name(&kind), words)))),
        }
    }
}

/// What came is not what a step of that kind brings.
pub(super) fn other() -> Error {
    Error::new(Kind::Other, "a step's process answers another question")
}
