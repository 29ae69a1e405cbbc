//! A sealblk store of the test's own, used through the real program as an operator would.

use super::patience::{Deadline, guest_limit, limit, wait_for_within};
use super::process::{tie_to_test, wait_within};
use std::fs::File;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tempfile::TempDir;

/// A root folder and a configuration folder, gone with the value.
pub struct Store {
    folder: TempDir,
    variables: Mutex<Vec<(String, String)>>,
    /// Where the store lies, if not in a folder.
    pool: Mutex<Option<String>>,
}

/// A folder in `folder` that holds nothing but sockets: in that, a host process may remove its own. It
/// belongs to whoever `folder` does, who may not be the test's own user.
pub fn sockets(folder: &Path) -> PathBuf {
    let run = folder.join("run");
    std::fs::create_dir_all(&run).expect("make a folder for sockets");
    let owner = std::fs::metadata(folder).expect("look at the folder");
    chown(&run, Some(owner.uid()), Some(owner.gid())).expect("give it to whose the folder is");
    run
}

impl Store {
    /// An empty store.
    pub fn new() -> Self {
        // Not in the build folder: a socket's path may be 107 bytes at most.
        Store {
            folder: tempfile::tempdir().expect("make a temporary folder"),
            variables: Mutex::default(),
            pool: Mutex::default(),
        }
    }

    /// Where the store lies.
    pub fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Where the secrets of the embedded KMS lie.
    pub fn config(&self) -> PathBuf {
        self.folder.path().join("config")
    }

    /// The program, pointed at this store.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
        command.env("SEALBLK_CONFIG_DIR", self.config()).arg("--root");
        match &*self.pool.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(pool) => command.arg(pool),
            None => command.arg(self.root()),
        };
        command.stdin(Stdio::null());
        for (name, value) in self.variables().iter() {
            match value.as_str() {
                "" => command.env_remove(name),
                value => command.env(name, value),
            };
        }
        command
    }

    /// Has every command from now on use the store in a pool that has this address.
    pub fn lie_in(&self, pool: String) {
        *self.pool.lock().unwrap_or_else(PoisonError::into_inner) = Some(pool);
    }

    fn variables(&self) -> MutexGuard<'_, Vec<(String, String)>> {
        self.variables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives every command from now on these variables, beside what the test itself was started with; an
    /// empty one is taken away.
    pub fn set_environment(&self, variables: Vec<(String, String)>) {
        *self.variables() = variables;
    }

    /// Lets the store's files be this user's.
    pub fn let_belong_to(&self, user: &str) {
        std::fs::create_dir_all(self.config()).expect("make the configuration folder");
        std::fs::write(self.config().join("store-users"), format!("# of attach --user\n{user}\n"))
            .expect("write a name");
    }

    /// Where the settings are, if there are any.
    pub fn settings(&self) -> PathBuf {
        self.config().join("sealblk.toml")
    }

    /// Writes `sealblk.toml`.
    pub fn configure(&self, settings: &str) {
        std::fs::create_dir_all(self.config()).expect("make the configuration folder");
        std::fs::write(self.settings(), settings).expect("write the settings");
    }

    /// Runs a command to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().expect("start sealblk")
    }

    /// Runs a command that must succeed, and returns what it printed.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "sealblk {}: {}", arguments.join(" "), said(&output));
        String::from_utf8(output.stdout).expect("output in UTF-8")
    }

    /// Accepts every record as it stands there, and says nothing of those that cannot be read: an operator
    /// who does not look. What stands behind the ledger is then on its own.
    pub fn accept(&self) {
        self.run(&["store", "accept", "--all"]);
    }

    /// Runs commands at one time, each to its end. Returns their exit codes, and what they said.
    #[track_caller]
    pub fn together(&self, commands: &[&[&str]]) -> Vec<(i32, String)> {
        let folder = tempfile::tempdir().expect("make a temporary folder");
        let start = |(n, arguments): (usize, &&[&str])| {
            let file = folder.path().join(n.to_string());
            let output = File::create(&file).expect("create a file");
            let mut command = self.command();
            command.args(*arguments).stdout(output.try_clone().expect("dup")).stderr(output);
            tie_to_test(&mut command, vec![]);
            (command.spawn().expect("start sealblk"), file)
        };
        let mut children: Vec<_> = commands.iter().enumerate().map(start).collect();
        let ends = |(child, file): &mut (Child, PathBuf)| {
            let ended = wait_within(child, limit());
            let _ = child.kill();
            let said = std::fs::read_to_string(file).expect("output in UTF-8");
            let status = ended.unwrap_or_else(|e| panic!("a command does not end: {e}: {said}"));
            (status.code().expect("no signal"), said)
        };
        children.iter_mut().map(ends).collect()
    }

    /// The layer file of a store that has one volume.
    pub fn only_layer(&self) -> PathBuf {
        let layers = std::fs::read_dir(self.root().join("layers")).expect("list the layers");
        let layers = layers.map(|entry| entry.expect("list the layers").path()).collect::<Vec<_>>();
        assert_eq!(layers.len(), 1, "a volume has one layer: {layers:?}");
        layers.into_iter().next().expect("counted above")
    }

    /// Attaches a volume and waits until sealblk has told its service manager that it is ready.
    #[track_caller]
    pub fn attach(&self, volume: &str, arguments: &[&str]) -> Attached<'_> {
        self.attach_as(volume, volume, arguments)
    }

    /// Attaches a volume as [`Store::attach`] does, with a socket of its own, called `name`.
    #[track_caller]
    pub fn attach_as(&self, name: &str, volume: &str, arguments: &[&str]) -> Attached<'_> {
        let run = sockets(self.folder.path());
        let socket = run.join(format!("{name}.sock"));
        let log = self.folder.path().join(format!("{name}.log"));
        let notify = self.folder.path().join(format!("{name}.notify"));
        // Left by an earlier attach of the same volume.
        let _ = std::fs::remove_file(&notify);
        let manager = UnixDatagram::bind(&notify).expect("bind the notify socket");
        let output = File::create(&log).expect("create a log file");
        let mut command = self.command();
        command.env("NOTIFY_SOCKET", &notify);
        command.args(["attach", volume, "--socket-path"]).arg(&socket).args(arguments);
        command.stdout(output.try_clone().expect("dup")).stderr(output);
        tie_to_test(&mut command, vec![]);
        let child = command.spawn().expect("start sealblk");
        let mut attached = Attached { store: self, volume: volume.to_owned(), child, socket, log };
        attached.wait_ready(&manager);
        attached
    }
}

/// What a command said on both streams.
pub fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A volume's host process. Killed at drop.
pub struct Attached<'a> {
    store: &'a Store,
    volume: String,
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Attached<'_> {
    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How much of the guest's data it has written, in bytes.
    pub fn written(&self) -> u64 {
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.pid()));
        let io = io.expect("the host process runs");
        let written = io.lines().find_map(|l| l.strip_prefix("write_bytes: ")).expect("the kernel counts");
        written.parse().expect("a number")
    }

    /// Waits until the guest's load has written so many bytes in all.
    #[track_caller]
    pub fn wait_for_load(&self, bytes: u64) {
        let what = format!("the guest's load has written {bytes} bytes to the disk");
        wait_for_within(guest_limit(), &what, || match self.written() {
            enough if enough >= bytes => Ok(()),
            so_far => Err(format!("{so_far} bytes; the host process said: {}", self.output())),
        });
    }

    /// Waits until the guest's load has written four mebibytes more.
    #[track_caller]
    pub fn more_load(&self) {
        self.wait_for_load(self.written() + (4 << 20));
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends it with `sealblk detach`, which must work and leave no process and no socket.
    #[track_caller]
    pub fn detach(mut self) {
        self.store.ok(&["detach", &self.volume]);
        let status = self.wait();
        assert!(status.success(), "attach ended with {status} after a detach: {}", self.output());
        assert!(!self.socket.exists(), "the socket is still there after a detach");
    }

    /// Waits until it has ended by itself, without an error.
    #[track_caller]
    pub fn ends(mut self) {
        let status = self.wait();
        assert!(status.success(), "attach ended with {status}: {}", self.output());
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) {
        self.child.kill().expect("kill the host process");
        self.wait();
    }

    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        let ended = wait_within(&mut self.child, limit());
        ended.unwrap_or_else(|e| panic!("attach does not end: {e}; it said: {}", self.output()))
    }

    #[track_caller]
    fn wait_ready(&mut self, manager: &UnixDatagram) {
        let deadline = Deadline::after(limit());
        // Short, since a process that dies sends nothing.
        manager.set_read_timeout(Some(Duration::from_millis(50))).expect("set a time limit");
        let mut message = [0; 4096];
        loop {
            if let Ok(length) = manager.recv(&mut message) {
                if message[..length].split(|&b| b == b'\n').any(|line| line == b"READY=1") {
                    return;
                }
            } else if let Some(status) = self.child.try_wait().expect("ask for the child") {
                panic!("attach ended with {status}: {}", self.output());
            }
            deadline.check("attach is ready", || format!("a process that said: {}", self.output()));
        }
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- sealblk attach {}\n{}", self.volume, self.output());
        }
    }
}
