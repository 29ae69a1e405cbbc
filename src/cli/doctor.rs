//! `sealblk doctor`: what this machine has of what a volume's host process wants. The last look is a trial: a
//! volume is made, attached and detached, in a store of its own.

use crate::backing::Backing;
use crate::backing::file::FileBacking;
use crate::base::root::Root;
use crate::base::root::owners::Owners;
use crate::base::{Context, Error, Kind, Result, printable};
use crate::cli::{Env, output};
use crate::crypt::secret_mem::{SecretFd, SecretKind};
use crate::crypt::xts::Engine;
use crate::reactor::ring::{self, Tried};
use crate::sandbox;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;
use serde_json::Value;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Ok,
    /// sealblk works, but not as well as it could.
    Note,
    /// Volumes cannot be attached.
    Bad,
}

#[derive(Serialize)]
struct Finding {
    what: &'static str,
    verdict: Verdict,
    found: String,
}

/// Looks at the machine, prints what it finds, and fails if something that is needed is not there.
pub fn run(env: &Env) -> Result<()> {
    let findings = [
        engines(),
        secret_memory(),
        locked_memory(),
        io_uring(),
        seccomp(),
        landlock(),
        data_folder(&env.root),
        attach(),
    ];
    if env.json {
        output::print_json(&findings)?;
    } else {
        let row = |f: &Finding| {
            let mark = match f.verdict {
                Verdict::Ok => "ok",
                Verdict::Note => "note",
                Verdict::Bad => "BAD",
            };
            vec![mark.to_string(), f.what.to_string(), f.found.clone()]
        };
        output::print(&output::table(&findings.iter().map(row).collect::<Vec<_>>()))?;
    }
    match findings.iter().find(|f| f.verdict == Verdict::Bad) {
        None => Ok(()),
        Some(bad) => Err(Error::new(Kind::Unsupported, format!("{}: {}", bad.what, bad.found))),
    }
}

fn engines() -> Finding {
    let names: Vec<_> = Engine::available().iter().map(|e| e.name()).collect();
    let fast = Engine::available().first() != Some(&Engine::Portable);
    Finding {
        what: "XTS engines",
        verdict: if fast { Verdict::Ok } else { Verdict::Note },
        found: match fast {
            true => format!("{} (the first is used)", names.join(", ")),
            false => format!(
                "{} (this CPU has no AES instructions that they use, or they are off)",
                names.join(", ")
            ),
        },
    }
}

fn secret_memory() -> Finding {
    let (verdict, found) = match SecretFd::create(64).and_then(|fd| Ok((fd.kind(), fd.map()?))) {
        Ok((SecretKind::MemfdSecret, _)) => {
            (Verdict::Ok, "memfd_secret: not even root sees the pages".into())
        }
        Ok(_) => (
            Verdict::Note,
            "locked pages, left out of dumps; the kernel has no memfd_secret (boot with secretmem.enable=1)"
                .into(),
        ),
        Err(e) => (Verdict::Bad, e.to_string()),
    };
    Finding { what: "memory for keys", verdict, found }
}

fn locked_memory() -> Finding {
    // A page for each key schedule, and the pools of a few queues.
    const ENOUGH: u64 = 64 << 20;
    let (verdict, found) = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        _ if is_root_of_the_host() => (Verdict::Ok, "unlimited for root".into()),
        Ok((soft, _)) if soft >= ENOUGH => (Verdict::Ok, format!("{} KiB", soft >> 10)),
        Ok((soft, _)) => (
            Verdict::Note,
            format!("{} KiB: bounce buffers may go unregistered (LimitMEMLOCK= in systemd)", soft >> 10),
        ),
        Err(e) => (Verdict::Note, e.to_string()),
    };
    Finding { what: "locked memory", verdict, found }
}

/// Root of a user namespace has the limits of any user.
fn is_root_of_the_host() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    nix::unistd::geteuid().is_root() && map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn io_uring() -> Finding {
    let (verdict, found) = match ring::try_one() {
        Ok(Tried { no_buffers: Some(e), .. }) => {
            (Verdict::Note, format!("the kernel looks up the pages of bounce buffers for each request: {e}"))
        }
        Ok(Tried { huge_pages: false, .. }) => {
            let found = "bounce buffers lie in pages of 4 KiB: large requests to a disk cost more (\"echo \
                         madvise > /sys/kernel/mm/transparent_hugepage/enabled\", or memory is fragmented)";
            (Verdict::Note, found.into())
        }
        Ok(Tried { deferred: true, .. }) => {
            (Verdict::Ok, "with DEFER_TASKRUN; bounce buffers in huge pages".into())
        }
        Ok(_) => (Verdict::Note, "without DEFER_TASKRUN (it came with Linux 6.1)".into()),
        Err(e) => (Verdict::Bad, e.to_string()),
    };
    Finding { what: "io_uring", verdict, found }
}

fn seccomp() -> Finding {
    let (verdict, found) = match sandbox::check_seccomp() {
        Ok(()) => (Verdict::Ok, "the host process makes the system calls that it needs, and no other".into()),
        Err(e) => (Verdict::Bad, e.to_string()),
    };
    Finding { what: "seccomp", verdict, found }
}

fn landlock() -> Finding {
    let (verdict, found) = match sandbox::landlock_version() {
        Some(version) => {
            (Verdict::Ok, format!("version {version}: the host process opens its volume's files alone"))
        }
        None => {
            let found = "not in this kernel, or off (boot with lsm=landlock,…): the host process can open \
                         every file of its user; let it have one of its own (--user)";
            (Verdict::Note, found.into())
        }
    };
    Finding { what: "Landlock", verdict, found }
}

fn data_folder(store: &Root) -> Finding {
    let (what, root) = ("data folder", store.path());
    let finding =
        |verdict, found: String| Finding { what, verdict, found: format!("{}: {found}", root.display()) };
    let metadata = match std::fs::metadata(root) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return finding(Verdict::Ok, "not there yet; the first volume makes it".into());
        }
        Err(e) => return finding(Verdict::Bad, e.to_string()),
    };
    if !metadata.is_dir() {
        return finding(Verdict::Bad, "it is not a folder".into());
    }
    // What every other command begins with.
    if let Err(e) = Owners::configured().and_then(|owners| owners.check_root(store)) {
        return Finding { what, verdict: Verdict::Bad, found: e.to_string() };
    }
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return finding(Verdict::Note, format!("mode {mode:03o} lets others look at names; 700 would not"));
    }
    match access_of(&root.join(format!(".doctor-{}", std::process::id()))) {
        Ok(access) => finding(Verdict::Ok, access),
        Err(e) => finding(Verdict::Bad, e.to_string()),
    }
}

/// Bytes of the longest folder in which a socket can have a name.
const FOLDER_MAX: usize = 90;
/// How long each command of the trial may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes a volume in a store of its own, attaches and detaches it, as this user and within these limits.
fn attach() -> Finding {
    let (verdict, found) = match Trial::new().map(|trial| trial.run()) {
        Ok(Ok(how)) => (Verdict::Ok, format!("a volume was made, attached and detached ({how})")),
        Ok(Err(e)) => (Verdict::Bad, e.to_string()),
        // That is no fault of the place where volumes are.
        Err(e) => (Verdict::Note, format!("none was made: {e}")),
    };
    Finding { what: "trial", verdict, found }
}

/// A store, and its configuration folder, that are gone with the value.
struct Trial(PathBuf);

impl Trial {
    fn new() -> Result<Self> {
        let name = format!("sealblk-doctor-{}", uuid::Uuid::new_v4().simple());
        let mut folder = std::path::absolute(std::env::temp_dir().join(&name))?;
        if folder.as_os_str().len() > FOLDER_MAX {
            folder = Path::new("/tmp").join(&name);
        }
        let attempt = || format!("make {}", folder.display());
        std::fs::DirBuilder::new().mode(0o700).create(&folder).context(attempt)?;
        Ok(Trial(folder))
    }

    /// This program once more, with nothing that would have it meet others.
    fn command(&self) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg("--root").arg(self.0.join("store")).arg("--config-dir").arg(self.0.join("config"));
        for name in ["RUST_LOG", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "SEALBLK_PASSPHRASE_FD"] {
            command.env_remove(name);
        }
        command.arg("--json").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Returns how the volume was reached.
    fn run(&self) -> Result<String> {
        let mut create = self.command();
        create.args(["volume", "create", "--size", "1MiB", "--name", "trial"]);
        Running::start(create, "make a volume")?.end()?;
        let mut attach = self.command();
        attach.args(["attach", "trial", "--socket-path"]).arg(self.0.join("s"));
        let mut attached = Running::start(attach, "attach a volume")?;
        let said = attached.first_value()?;
        let mut detach = self.command();
        detach.args(["detach", "trial"]);
        Running::start(detach, "detach a volume")?.end()?;
        attached.end()?;
        Ok(said["access"].as_str().unwrap_or_default().to_owned())
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            log::warn!("{} is left: {e}", self.0.display());
        }
    }
}

/// A command of the trial. What runs too long, or is dropped, is killed.
struct Running {
    child: Child,
    what: &'static str,
    until: Instant,
}

impl Running {
    fn start(mut command: Command, what: &'static str) -> Result<Self> {
        let child = command.spawn().context(|| what)?;
        Ok(Running { child, what, until: Instant::now() + PATIENCE })
    }

    /// The JSON value that it prints while it runs.
    fn first_value(&mut self) -> Result<Value> {
        let mut text = Vec::new();
        loop {
            if let Ok(value) = serde_json::from_slice(&text) {
                return Ok(value);
            }
            let Some(out) = &self.child.stdout else { unreachable!("it is piped") };
            self.wait_for(out)?;
            let mut bytes = [0; 4096];
            match self.child.stdout.as_mut().map_or(Ok(0), |out| out.read(&mut bytes))? {
                0 => return Err(self.failed()),
                got => text.extend_from_slice(&bytes[..got]),
            }
        }
    }

    /// Waits until there is something to read.
    fn wait_for(&self, from: &impl AsFd) -> Result<()> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => return Err(self.took_too_long()),
                Err(nix::Error::EINTR) => {}
                found => return Ok(found.map(drop)?),
            }
        }
    }

    /// Waits until it has ended well. It prints less than a pipe holds.
    fn end(mut self) -> Result<()> {
        loop {
            match self.child.try_wait().context(|| self.what)? {
                Some(status) if status.success() => return Ok(()),
                Some(_) => return Err(self.failed()),
                None if Instant::now() >= self.until => return Err(self.took_too_long()),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Why it failed, in its own words.
    fn failed(&mut self) -> Error {
        let mut said = Vec::new();
        while let Some(err) = self.child.stderr.take() {
            // A helper that outlives it for a moment has the other end as well.
            if self.wait_for(&err).is_err() {
                break;
            }
            let mut bytes = [0; 4096];
            match self.child.stderr.insert(err).read(&mut bytes).unwrap_or_default() {
                0 => break,
                got => said.extend_from_slice(&bytes[..got]),
            }
        }
        let said = String::from_utf8_lossy(&said);
        let last = said.lines().last().unwrap_or_default();
        let words = serde_json::from_str::<Value>(last).ok();
        let words = words.as_ref().and_then(|it| it["error"]["message"].as_str()).unwrap_or(last);
        let words = if words.is_empty() { "it ended without a word" } else { words };
        Error::new(Kind::Unsupported, format!("{}: {}", self.what, printable::line(words)))
    }

    fn took_too_long(&self) -> Error {
        let message = format!("{}: it was not done within {} s", self.what, PATIENCE.as_secs());
        Error::new(Kind::Unsupported, message)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// How a layer there would be reached, by a trial.
fn access_of(trial: &Path) -> Result<String> {
    let attempt = || -> Result<String> {
        // With data, which proves what is found; where there is room for it.
        let file = std::fs::File::create_new(trial)?;
        file.set_len(1 << 16)?;
        let _ = file.write_all_at(&[1; 1 << 13], 0);
        Ok(FileBacking::open(trial, false, 512, None)?.caps().access.clone())
    };
    let access = attempt();
    let _ = std::fs::remove_file(trial);
    access
}
