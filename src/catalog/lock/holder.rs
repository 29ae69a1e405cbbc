//! The process that has a volume, as the lock file says it.

use crate::base::{Context, Error, Kind, Result, Timestamp};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
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
    /// A new data key is being given to the volume, or what is to be copied up is being noted.
    Mark,
    /// What lower layers hold is being copied up.
    Hydrate,
    /// The volume is given another name.
    Rename,
}

/// Where a process runs, as far as that can be told: in which PID namespace of which kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The host's name, for people. A container may have its own.
    pub name: String,
    /// The kernel's boot id: another machine has another one.
    pub boot: String,
    /// The inode of the PID namespace: a process id means something else in another one.
    pub pid_namespace: u64,
}

/// The process that holds a volume, as it says itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// What the process does with the volume.
    pub purpose: Purpose,
    /// Its process id, in the PID namespace that it ran in.
    pub pid: u32,
    /// When the process began, in clock ticks since boot: tells it from a later one with the same id.
    pub start_time: u64,
    /// Where it runs; earlier versions do not say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    /// Since when it has the volume.
    pub since: Timestamp,
    /// The vhost-user socket's path, where it has one, as text for people.
    pub socket: Option<String>,
    /// Its guest has chosen that writes be durable when they complete. Unlike the rest this counts also when
    /// the holder is gone: the guest does not say it again to whoever serves it next.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write_through: bool,
}

impl Host {
    /// Where this process runs. None where /proc does not tell, as to a process that is confined.
    fn of_this_process() -> Option<Self> {
        let kernel = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?;
            Some(text.trim_end().to_owned())
        };
        let pid_namespace = std::fs::metadata("/proc/self/ns/pid").ok()?.ino();
        Some(Host { name: kernel("hostname")?, boot: kernel("random/boot_id")?, pid_namespace })
    }
}

impl Holder {
    /// This process, from now on.
    pub fn this_process(purpose: Purpose, socket: Option<&Path>) -> Result<Self> {
        // Not by its id: /proc may be of another PID namespace.
        let stat = read_stat("self").context(|| "look at this process")?;
        let start_time = start_time(&stat)
            .ok_or_else(|| Error::new(Kind::Other, "/proc/self/stat does not read as expected"))?;
        let socket = socket.map(|path| path.display().to_string());
        let (pid, host) = (std::process::id(), Host::of_this_process());
        Ok(Holder { purpose, pid, start_time, host, since: Timestamp::now(), socket, write_through: false })
    }

    /// Whether that very process still runs, as far as can be seen from here: not in another PID namespace,
    /// nor, for most users, where /proc hides the processes of others (hidepid). A confined process may not
    /// look: to it, whoever the file names does.
    pub(crate) fn is_seen_alive(&self) -> bool {
        match read_stat(&self.pid.to_string()) {
            Ok(stat) => start_time(&stat) == Some(self.start_time) && !self.is_left_over(&stat),
            Err(e) => e.kind() == io::ErrorKind::PermissionDenied,
        }
    }

    /// Whether it has ended, with all of its threads, and its parent has not asked for that yet. Where nobody
    /// takes in orphans, as in some containers, the parent never does.
    fn is_left_over(&self, stat: &str) -> bool {
        let threads = || std::fs::read_dir(format!("/proc/{}/task", self.pid)).map_or(0, Iterator::count);
        after_name(stat).and_then(|mut fields| fields.next()) == Some("Z") && threads() <= 1
    }

    /// Whether its process id means, as far as it says, what it means here.
    pub(crate) fn has_an_id_of_here(&self) -> bool {
        let here = Host::of_this_process();
        self.host.as_ref().zip(here.as_ref()).is_some_and(|(there, here)| {
            (&there.boot, there.pid_namespace) == (&here.boot, here.pid_namespace)
        })
    }

    /// Whether the process runs on this host, as far as it says.
    pub fn is_on_this_host(&self) -> bool {
        match (&self.host, Host::of_this_process()) {
            (Some(there), Some(here)) => there.boot == here.boot,
            _ => true,
        }
    }

    /// What the process does with the volume.
    fn doing(&self) -> &'static str {
        match self.purpose {
            Purpose::Attach => "is attached",
            Purpose::Create => "is being made",
            Purpose::Delete => "is being deleted",
            Purpose::Snapshot => "is being made a snapshot of",
            Purpose::Resize => "is being made larger",
            Purpose::Recover => "is being tidied up",
            Purpose::Rewrap => "is being rewrapped",
            Purpose::Export => "is being exported",
            Purpose::Mark => "is being marked to be re-keyed or flattened",
            Purpose::Hydrate => "is being re-keyed or flattened",
            Purpose::Rename => "is being renamed",
        }
    }

    /// The process in words, and the name of its host in any case.
    pub fn anywhere(&self) -> String {
        let host = self.host.as_ref().map_or("an unknown host", |host| host.name.as_str());
        format!("process {} on the host {host}", self.pid)
    }

    /// What the process does with the volume, in words, and where.
    pub(super) fn doing_anywhere(&self) -> String {
        format!("{} by {} (since {})", self.doing(), self.anywhere(), self.since)
    }

    /// The process in words, and where it runs, unless that is here.
    pub fn process(&self) -> String {
        let here = Host::of_this_process();
        let Holder { pid, .. } = self;
        match (&self.host, &here) {
            (Some(there), Some(here)) if there.boot != here.boot => {
                format!("process {pid} on the host {}", there.name)
            }
            (Some(there), Some(here)) if there.pid_namespace != here.pid_namespace => {
                format!("process {pid} of another PID namespace, on the host {}", there.name)
            }
            _ => format!("process {pid}"),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let doing = self.doing();
        write!(f, "{doing} by {} (since {}", self.process(), self.since)?;
        if let Some(socket) = &self.socket {
            write!(f, ", socket {socket}")?;
        }
        f.write_str(")")
    }
}

/// Field 22 of `/proc/<pid>/stat` (proc_pid_stat(5)): when the process began.
fn start_time(stat: &str) -> Option<u64> {
    after_name(stat)?.nth(19)?.parse().ok()
}

/// The fields from the third on. The name, field 2, is in parentheses and may hold anything, parentheses too.
fn after_name(stat: &str) -> Option<impl Iterator<Item = &str>> {
    stat.rsplit_once(')').map(|(_, after)| after.split_whitespace())
}

fn read_stat(pid: &str) -> io::Result<String> {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_ended_is_not_alive_though_nobody_has_asked_for_it() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let mut holder = Holder::this_process(Purpose::Attach, None).unwrap();
        holder.pid = child.id();
        holder.start_time = start_time(&read_stat(&holder.pid.to_string()).unwrap()).unwrap();
        assert!(holder.is_seen_alive());
        child.kill().unwrap();
        // It is a zombie soon, until it is waited for.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while holder.is_seen_alive() && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(read_stat(&holder.pid.to_string()).unwrap().contains(") Z "));
        assert!(!holder.is_seen_alive());
        child.wait().unwrap();
    }

    #[test]
    fn a_holder_elsewhere_is_said_to_be_there() {
        let mut holder = Holder::this_process(Purpose::Attach, None).unwrap();
        let pid = holder.pid;
        assert_eq!(holder.process(), format!("process {pid}"));
        let here = holder.host.clone().expect("/proc tells");
        let name = here.name.clone();
        holder.host = Some(Host { pid_namespace: here.pid_namespace + 1, ..here.clone() });
        assert_eq!(holder.process(), format!("process {pid} of another PID namespace, on the host {name}"));
        holder.host = Some(Host { boot: "another".into(), name: "b".into(), ..here });
        assert_eq!(holder.process(), format!("process {pid} on the host b"));
        assert!(
            holder.to_string().starts_with(&format!("is attached by process {pid} on the host b (since "))
        );
        // An earlier version does not say it.
        holder.host = None;
        assert_eq!(holder.process(), format!("process {pid}"));
    }

    #[test]
    fn what_earlier_versions_have_written_is_read() {
        let text =
            r#"{"purpose":"attach","pid":7,"start_time":1,"since":"2026-01-31T23:59:59Z","socket":null}"#;
        let holder: Holder = serde_json::from_str(text).unwrap();
        assert_eq!((holder.pid, holder.host), (7, None));
    }
}
