//! A folder with a store in it, and the real program pointed at it.

use crate::common::frontend::{Options, Session};
use crate::common::patience::{Deadline, limit};
use crate::common::process::{tie_to_test, wait_within};
use sealblk::base::root::Root;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// A store, and a folder beside it, which goes with the value.
pub struct Site {
    folder: TempDir,
    top: PathBuf,
}

impl Site {
    /// An empty store on tmpfs.
    pub fn new() -> Self {
        let folder = folder();
        let top = folder.path().join("t");
        std::fs::create_dir(&top).expect("make a folder");
        Site { folder, top }
    }

    /// The store in `top`, wherever that is.
    pub fn at(top: PathBuf) -> Self {
        Site { folder: folder(), top }
    }

    /// The folder that a power cut hits: with the root and the configuration folder.
    pub fn top(&self) -> &Path {
        &self.top
    }

    /// The store's root.
    pub fn root(&self) -> PathBuf {
        self.top().join("root")
    }

    /// The state of a store is looked at by another path than where it was recorded: what the configuration
    /// folder has for it by its path goes along.
    pub fn move_in(&self) -> std::io::Result<()> {
        let stores = self.top().join("config/stores");
        let digest = Sha256::digest(Root::new(self.root()).path().as_os_str().as_bytes());
        let ours = stores.join(&hex::encode(digest)[..16]);
        if !stores.exists() || ours.exists() {
            return Ok(());
        }
        // Of a store that was cut off before it had a key, there may be none.
        match std::fs::read_dir(stores)?.next() {
            Some(recorded) => std::fs::rename(recorded?.path(), ours),
            None => Ok(()),
        }
    }

    /// A disk image that a power cut hits, too.
    pub fn image(&self) -> PathBuf {
        self.top().join("image")
    }

    /// Something beside it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program, pointed at this store.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
        command.env("SEALBLK_CONFIG_DIR", self.top().join("config")).env_remove("RUST_LOG");
        command.arg("--root").arg(self.root()).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command, which must succeed.
    pub fn ok(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = self.command(arguments);
        // None outlives the test, as none is waited for without end by it.
        tie_to_test(&mut command, vec![]);
        let output: Output = command.output().expect("start sealblk");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(format!(
                "\"sealblk {}\" failed ({}): {}{}",
                arguments.join(" "),
                output.status,
                text(&output.stdout),
                text(&output.stderr)
            )),
        }
    }

    /// The command that attaches a volume, and the socket that tells when it is ready. Nothing of an
    /// earlier attach is in the way.
    pub fn attach_command(&self, volume: &str) -> (Command, Ready) {
        let socket = self.beside("s");
        let notify = self.beside("n");
        let _ = std::fs::remove_file(&notify);
        let manager = UnixDatagram::bind(&notify).expect("bind the notify socket");
        let log = self.beside("log");
        let output = File::create(&log).expect("create a log file");
        let mut command = self.command(&["attach", volume, "--socket-path"]);
        command.arg(&socket).env("NOTIFY_SOCKET", &notify);
        command.stdout(output.try_clone().expect("dup")).stderr(output);
        (command, Ready { manager, socket, log })
    }

    /// Attaches a volume and calls `f` with a front-end on it; the host process is killed afterwards.
    pub fn with_attached<T>(
        &self,
        volume: &str,
        f: impl FnOnce(&mut Session) -> Result<T, String>,
    ) -> Result<T, String> {
        let (mut command, ready) = self.attach_command(volume);
        tie_to_test(&mut command, vec![]);
        let mut child = Killed(command.spawn().expect("start sealblk"));
        ready.wait(|| child.0.try_wait().expect("ask for the child").is_some())?;
        let mut session = ready.connect()?;
        f(&mut session)
    }
}

/// A folder on tmpfs, with a short path, as sockets need it.
pub fn folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("sealblk-cut").tempdir_in("/dev/shm");
    folder.expect("make a folder in /dev/shm, which must be a tmpfs")
}

/// Dies with the value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = wait_within(&mut self.0, limit());
    }
}

/// How one learns that an attach is ready.
pub struct Ready {
    manager: UnixDatagram,
    socket: PathBuf,
    log: PathBuf,
}

impl Ready {
    /// Waits for it; an error with what it said if it `has_ended`.
    pub fn wait(&self, mut has_ended: impl FnMut() -> bool) -> Result<(), String> {
        let deadline = Deadline::after(limit());
        // Short, since a process that dies sends nothing.
        self.manager.set_read_timeout(Some(Duration::from_millis(20))).expect("set a time limit");
        let mut message = [0; 4096];
        loop {
            if let Ok(len) = self.manager.recv(&mut message)
                && message[..len].split(|&b| b == b'\n').any(|line| line == b"READY=1")
            {
                return Ok(());
            }
            if has_ended() {
                return Err(format!("attach ended: {}", said(&self.log)));
            }
            if deadline.left().is_zero() {
                return Err(format!("attach is not ready after {:?}: {}", limit(), said(&self.log)));
            }
        }
    }

    /// A front-end on the volume.
    pub fn connect(&self) -> Result<Session, String> {
        let open = Session::open(&self.socket, &Options::default());
        open.map_err(|e| format!("connect to the volume: {e}; it said: {}", said(&self.log)))
    }
}

fn said(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_default()
}
