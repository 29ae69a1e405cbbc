//! The back-end under test, as a process of its own: started, watched from outside through /proc, ended by
//! its own process id.

use super::super::patience::{Deadline, limit};
use super::{Fault, Result};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A running back-end. Killed when dropped; it also dies with the thread that started it.
pub struct Server {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

/// What a process holds, as /proc tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
    /// Memory mappings.
    pub maps: usize,
    /// Resident memory without what is shared with the guest, KiB.
    pub rss_kib: u64,
}

impl Server {
    /// Starts `command` and waits until something listens on `socket`. Its output goes to a file beside it.
    pub fn start(mut command: Command, socket: &Path) -> Result<Server> {
        let log = socket.with_extension("log");
        let out = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe.
        unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
        let child = command.spawn()?;
        let mut server = Server { child, socket: socket.to_owned(), log };
        server.wait_listening()?;
        Ok(server)
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether the process still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid()), signal).map_err(std::io::Error::from)?)
    }

    /// Waits until the process ends by itself.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Deadline::after(limit());
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if deadline.left().is_zero() {
                let said = self.output();
                return Err(Fault::TimedOut(format!("the end of the back-end, which said:\n{said}")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What the process holds now.
    pub fn holdings(&self) -> Result<Holdings> {
        holdings(self.pid())
    }

    /// Looks at the holdings until `good` says yes or the limit is over; the last look. A back-end tidies up
    /// after a connection in its own time, and nothing tells a stranger when it is done.
    pub fn settle(&self, good: impl Fn(&Holdings) -> bool) -> Result<Holdings> {
        let deadline = Deadline::after(limit());
        loop {
            let now = self.holdings()?;
            if good(&now) || deadline.left().is_zero() {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait_listening(&mut self) -> Result<()> {
        let deadline = Deadline::after(limit());
        while !listening(&self.socket)? {
            if !self.runs() {
                return Err(Fault::Protocol(format!("the back-end ended at once:\n{}", self.output())));
            }
            if deadline.left().is_zero() {
                let said = self.output();
                return Err(Fault::TimedOut(format!("a back-end that listens; it said:\n{said}")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the back-end said:\n{}", self.output());
        }
    }
}

/// Whether a socket listens at `path`, without connecting to it: a connection would already be a client's.
fn listening(path: &Path) -> Result<bool> {
    const ACCEPTS: u32 = 1 << 16;
    let table = fs::read_to_string("/proc/net/unix")?;
    let listens = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let flags = fields.get(3).and_then(|f| u32::from_str_radix(f, 16).ok()).unwrap_or(0);
        flags & ACCEPTS != 0 && fields.get(7).is_some_and(|p| Path::new(p) == path)
    };
    Ok(table.lines().any(listens))
}

/// What process `pid` holds now.
pub fn holdings(pid: i32) -> Result<Holdings> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let status = fs::read_to_string(dir.join("status"))?;
    let number = |key: &str| -> u64 {
        let line = status.lines().find_map(|l| l.strip_prefix(key));
        line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    Ok(Holdings {
        fds: fs::read_dir(dir.join("fd"))?.count(),
        threads: fs::read_dir(dir.join("task"))?.filter(is_its_own).count(),
        maps: fs::read_to_string(dir.join("maps"))?.lines().count(),
        rss_kib: number("RssAnon:") + number("RssFile:"),
    })
}

/// Whether the process has started a thread itself. The kernel's helpers for an io_uring
/// come and go as it likes.
fn is_its_own(thread: &std::io::Result<fs::DirEntry>) -> bool {
    let name =
        thread.as_ref().map(|thread| fs::read_to_string(thread.path().join("comm")).unwrap_or_default());
    name.is_ok_and(|name| !name.starts_with("iou-"))
}
