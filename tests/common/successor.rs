//! A process that serves a volume since an upgrade, and is no child of ours.

use super::process::{Other, ended};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Such a process. Killed at drop.
pub struct Successor {
    pid: Pid,
    process: Other,
}

impl Successor {
    /// The one that `sealblk upgrade --json` names.
    pub fn of(said: &Value) -> Self {
        let pid = Pid::from_raw(said["pid"].as_i64().expect("a process id") as i32);
        Successor { pid, process: ended(pid) }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits until it has ended.
    #[track_caller]
    pub fn ends(self) {
        self.process.waits();
    }

    /// Kills it, as a crash would.
    #[track_caller]
    pub fn crash(self) {
        kill(self.pid, Signal::SIGKILL).expect("it runs");
        self.process.waits();
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = kill(self.pid, Signal::SIGKILL);
    }
}
