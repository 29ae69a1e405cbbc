//! The process that has a volume, as the lock file says it.

use crate::base::{Context, Error, Kind, Result, Timestamp};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::{fmt, io};

/// What a volume is held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// The volume is attached.
    Attach,
    /// The volume is being made.
    Create,
    /// The volume is being deleted.
    Delete,
    /// A snapshot of the volume is being made.
    Snapshot,
    /// The volume is being made larger.
    Resize,
    /// What an interrupted command left of the volume is being cleared up.
    Recover,
    /// The volume's data keys are being wrapped anew.
    Rewrap,
    /// The volume's data is being copied out of the store.
    Export,
    /// The volume gets a new data key, or what lower layers hold is copied up.
    Hydrate,
}

/// The process that holds a volume, as it says itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// What the process does with the volume.
    pub purpose: Purpose,
    /// Its process id, in the pid namespace that it ran in.
    pub pid: u32,
    /// When the process began, in clock ticks since boot: tells it from a later one with the same id.
    pub start_time: u64,
    /// Since when it has the volume.
    pub since: Timestamp,
    /// The vhost-user socket's path, where it has one, as text for people.
    pub socket: Option<String>,
    /// Its guest has chosen that writes be durable when they complete. Unlike the rest this counts also when
    /// the holder is gone: the guest does not say it again to whoever serves it next.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write_through: bool,
}

impl Holder {
    /// This process, from now on.
    pub fn this_process(purpose: Purpose, socket: Option<&Path>) -> Result<Self> {
        let pid = std::process::id();
        let stat = read_stat(pid).context(|| "look at this process")?;
        let start_time = start_time(&stat)
            .ok_or_else(|| Error::new(Kind::Other, format!("/proc/{pid}/stat does not read as expected")))?;
        let socket = socket.map(|path| path.display().to_string());
        Ok(Holder { purpose, pid, start_time, since: Timestamp::now(), socket, write_through: false })
    }

    /// Whether that very process still runs. A confined process may not look: to it,
    /// whoever the file names does.
    pub fn is_alive(&self) -> bool {
        match read_stat(self.pid) {
            Ok(stat) => start_time(&stat) == Some(self.start_time),
            Err(e) => e.kind() == io::ErrorKind::PermissionDenied,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let doing = match self.purpose {
            Purpose::Attach => "is attached",
            Purpose::Create => "is being made",
            Purpose::Delete => "is being deleted",
            Purpose::Snapshot => "is being made a snapshot of",
            Purpose::Resize => "is being made larger",
            Purpose::Recover => "is being tidied up",
            Purpose::Rewrap => "is being rewrapped",
            Purpose::Export => "is being exported",
            Purpose::Hydrate => "is being re-keyed or flattened",
        };
        write!(f, "{doing} by process {} (since {}", self.pid, self.since)?;
        if let Some(socket) = &self.socket {
            write!(f, ", socket {socket}")?;
        }
        f.write_str(")")
    }
}

/// Field 22 of `/proc/<pid>/stat` (proc_pid_stat(5)): when the process began.
fn start_time(stat: &str) -> Option<u64> {
    // The name, field 2, is in parentheses and may hold anything, parentheses too.
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(19)?.parse().ok()
}

fn read_stat(pid: u32) -> io::Result<String> {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
}
