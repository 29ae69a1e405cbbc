//! One volume and its host process: started in every way that there is, refused, ended,
//! and seen from outside.

use super::frontend::{Options, Request, Session, SplitRing, block};
use super::patience::{Deadline, limit, wait_for};
use super::process::{tie_to_test, wait_within};
use super::store::{Store, sockets};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use sealblk::base::root::Root;
use sealblk::catalog::{Catalog, Metadata};
use sealblk::kms::KeyProvider;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::SystemClock;
use serde_json::Value;
use std::cell::Cell;
use std::fs::{self, File};
use std::io::{ErrorKind, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use zeroize::Zeroizing;

/// A store with a volume called `t`.
pub struct Place {
    /// The store.
    pub store: Store,
    starts: Cell<u32>,
}

/// What a command said, and how it ended.
#[derive(Debug)]
pub struct Said {
    /// Its exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Place {
    /// A volume of 8 MiB, made with these arguments besides.
    pub fn new(arguments: &[&str]) -> Self {
        Self::with_root(|_| Ok(()), arguments)
    }

    /// A volume of 8 MiB in a store with these settings.
    pub fn with_settings(settings: &str, arguments: &[&str]) -> Self {
        let store = Store::new();
        store.configure(settings);
        Self::of(store, arguments)
    }

    /// A volume of 8 MiB in a new store, after `prepare` was called with the root's path.
    pub fn with_root(prepare: impl FnOnce(&Path) -> std::io::Result<()>, arguments: &[&str]) -> Self {
        let store = Store::new();
        prepare(&store.root()).expect("prepare the root folder");
        Self::of(store, arguments)
    }

    /// In a store that has the volume already.
    pub fn there(store: Store) -> Self {
        Place { store, starts: Cell::new(0) }
    }

    /// A volume of 8 MiB in a store that is there.
    pub fn of(store: Store, arguments: &[&str]) -> Self {
        let place = Place::there(store);
        place.store.ok(&[&["volume", "create", "--size", "8MiB", "--name", "t"], arguments].concat());
        place
    }

    /// The test's own folder, which root and configuration lie in.
    pub fn folder(&self) -> PathBuf {
        self.store.root().parent().expect("the root lies in a folder").to_owned()
    }

    /// Where the host process listens unless it is told otherwise.
    pub fn socket(&self) -> PathBuf {
        sockets(&self.folder()).join("t.sock")
    }

    /// The volumes of the store.
    pub fn catalog(&self) -> Catalog {
        Catalog::new(&Root::new(self.store.root()))
    }

    /// What is known of the volume.
    pub fn metadata(&self) -> Metadata {
        let catalog = self.catalog();
        catalog.load(catalog.resolve("t").expect("find the volume")).expect("read its metadata")
    }

    /// The volume's id.
    pub fn id(&self) -> String {
        self.metadata().id().to_string()
    }

    /// The ARN of the KMS key.
    pub fn key(&self) -> String {
        self.metadata().keys()[0].first().wrapped.key_id.clone()
    }

    /// The volume's folder.
    pub fn volume_folder(&self) -> PathBuf {
        self.catalog().folder(self.metadata().id())
    }

    /// The volume's `volume.json`.
    pub fn volume_json(&self) -> PathBuf {
        self.volume_folder().join("volume.json")
    }

    /// The volume's layer.
    pub fn layer(&self) -> PathBuf {
        self.catalog().layer_path(self.metadata().top().id)
    }

    /// The store's KMS, from inside this process.
    pub fn kms(&self) -> Embedded {
        Embedded::at(
            Root::new(self.store.root()).kms(),
            self.store.config(),
            Box::new(SystemClock),
            sealblk::base::hardened::harden().unwrap(),
        )
    }

    /// The data key, as the KMS hands it out to who has the context and the root key.
    pub fn dek(&self) -> Zeroizing<Vec<u8>> {
        let metadata = self.metadata();
        let context = metadata.encryption_context();
        self.kms().decrypt(&metadata.keys()[0].first().wrapped, &context).expect("unwrap the data key")
    }

    /// Every event so far.
    pub fn events(&self) -> Vec<Value> {
        let text = self.store.ok(&["events", "--json"]);
        text.lines().map(|line| serde_json::from_str(line).expect("an event")).collect()
    }

    /// `sealblk attach t` on the usual socket, with these arguments besides.
    pub fn attach_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.store.command();
        command.args(["attach", "t", "--socket-path"]).arg(self.socket()).args(arguments);
        command
    }

    /// Attaches the volume on the usual socket and waits until that is ready.
    #[track_caller]
    pub fn attach(&self, arguments: &[&str]) -> Host {
        self.start(self.attach_command(arguments), vec![])
    }

    /// Attaches the volume for as long as it takes to write this, durably.
    #[track_caller]
    pub fn put(&self, sector: u64, data: &[u8]) {
        let host = self.attach(&[]);
        let mut session = open(&self.socket());
        write(&mut session.rings[0], sector, data);
        flush(&mut session.rings[0]);
        drop(session);
        host.end();
    }

    /// Starts an attach, which inherits `keep`, and waits until it is ready.
    #[track_caller]
    pub fn start(&self, command: Command, keep: Vec<OwnedFd>) -> Host {
        self.starts.set(self.starts.get() + 1);
        let name = |what| self.folder().join(format!("{}.{what}", self.starts.get()));
        let manager = UnixDatagram::bind(name("notify")).expect("bind the notify socket");
        // The host process may be another user's.
        fs::set_permissions(name("notify"), fs::Permissions::from_mode(0o666)).expect("let others write");
        let mut host = Host::spawn(command, &name("notify"), &name("log"), manager, keep);
        host.wait_ready();
        host
    }

    /// Runs an attach that ends by itself.
    #[track_caller]
    pub fn run(&self, mut command: Command, keep: Vec<OwnedFd>) -> Said {
        self.starts.set(self.starts.get() + 1);
        let name = |what| self.folder().join(format!("{}.{what}", self.starts.get()));
        let manager = UnixDatagram::bind(name("notify")).expect("bind the notify socket");
        manager.set_nonblocking(true).expect("make the notify socket non-blocking");
        command.env("NOTIFY_SOCKET", name("notify"));
        command.stdout(File::create(name("out")).expect("create a file"));
        command.stderr(File::create(name("err")).expect("create a file"));
        tie_to_test(&mut command, keep);
        let mut child = command.spawn().expect("start sealblk");
        let ended = wait_within(&mut child, limit());
        let _ = child.kill();
        let text = |what| fs::read_to_string(name(what)).expect("output in UTF-8");
        let status = ended.unwrap_or_else(|e| panic!("{command:?}: {e}: {}{}", text("out"), text("err")));
        let told = manager.recv(&mut [0; 64]).expect_err("an attach that fails was never ready");
        assert_eq!(told.kind(), ErrorKind::WouldBlock);
        Said { code: status.code().expect("no signal"), out: text("out"), err: text("err") }
    }

    /// An attach with these arguments besides, which must be refused with this exit code, print nothing on
    /// standard output, and leave no socket. Returns what it said.
    #[track_caller]
    pub fn refuse(&self, code: i32, arguments: &[&str]) -> String {
        let said = self.run(self.attach_command(arguments), vec![]);
        assert_eq!((said.code, said.out.as_str()), (code, ""), "{}", said.err);
        assert!(!self.socket().exists(), "a refused attach left its socket");
        said.err
    }
}

/// A volume's host process. Killed at drop.
pub struct Host {
    child: Child,
    log: PathBuf,
    manager: UnixDatagram,
}

impl Host {
    fn spawn(
        mut command: Command,
        notify: &Path,
        log: &Path,
        manager: UnixDatagram,
        keep: Vec<OwnedFd>,
    ) -> Self {
        let output = File::create(log).expect("create a log file");
        command.env("NOTIFY_SOCKET", notify).stdin(Stdio::null());
        command.stdout(output.try_clone().expect("dup")).stderr(output);
        tie_to_test(&mut command, keep);
        let child = command.spawn().expect("start sealblk");
        Host { child, log: log.to_owned(), manager }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has printed this.
    #[track_caller]
    pub fn says(&self, words: &str) {
        wait_for(&format!("the host process says \"{words}\""), || match self.output() {
            said if said.contains(words) => Ok(()),
            said => Err(said),
        });
    }

    /// A file of its folder in /proc.
    pub fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid()))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("the host process runs");
    }

    /// Calls `f` while every thread of it is stopped.
    pub fn frozen<T>(&self, f: impl FnOnce() -> T) -> T {
        self.signal(Signal::SIGSTOP);
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(self.pid()), flags).expect("it is a child");
        assert!(matches!(status, WaitStatus::Stopped(..)), "attach did not stop: {status:?}");
        let result = f();
        self.signal(Signal::SIGCONT);
        result
    }

    /// Waits until it has ended.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let ended = wait_within(&mut self.child, limit());
        ended.unwrap_or_else(|e| panic!("attach does not end: {e}; it said: {}", self.output()))
    }

    /// Waits until it has ended, which must be without an error.
    #[track_caller]
    pub fn ends_well(mut self) {
        let status = self.wait();
        assert!(status.success(), "attach ended with {status}: {}", self.output());
        assert_eq!(self.told(), "STOPPING=1");
    }

    /// Ends it with SIGTERM.
    #[track_caller]
    pub fn end(self) {
        self.signal(Signal::SIGTERM);
        self.ends_well();
    }

    /// Kills it, as a crash would.
    pub fn crash(mut self) {
        self.signal(Signal::SIGKILL);
        self.wait();
    }

    /// The next thing that it tells its service manager, beside what that is to keep for it.
    pub fn told(&self) -> String {
        loop {
            let mut message = [0; 4096];
            let len = self.manager.recv(&mut message).expect("a message to the service manager");
            let said = String::from_utf8_lossy(&message[..len]).trim_end().to_owned();
            if !said.starts_with("FDSTORE") {
                return said;
            }
        }
    }

    /// The socket that it gives its service manager to keep, and what it is called.
    pub fn gives_to_keep(&self) -> (UnixListener, String) {
        let mut text = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut data = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.manager.as_raw_fd(), &mut data, Some(&mut space), flags);
        let message = message.expect("a message to the service manager");
        let passed = message.cmsgs().expect("control messages").find_map(|control| match control {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(passed.expect("a descriptor")) };
        let len = message.bytes;
        let said = String::from_utf8_lossy(&text[..len]).into_owned();
        let name = said.strip_prefix("FDSTORE=1\nFDNAME=").expect("something to keep").trim_end();
        (UnixListener::from(fd), name.to_owned())
    }

    #[track_caller]
    fn wait_ready(&mut self) {
        let deadline = Deadline::after(limit());
        // Short, since a process that dies sends nothing.
        self.manager.set_read_timeout(Some(Duration::from_millis(50))).expect("set a time limit");
        let mut message = [0; 4096];
        loop {
            if let Ok(len) = self.manager.recv(&mut message) {
                assert_eq!(String::from_utf8_lossy(&message[..len]).trim_end(), "READY=1");
                break;
            }
            if let Some(status) = self.child.try_wait().expect("ask for the child") {
                panic!("attach ended with {status}: {}", self.output());
            }
            deadline.check("attach is ready", || format!("a process that said: {}", self.output()));
        }
        self.manager.set_read_timeout(Some(limit())).expect("set a time limit");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- sealblk attach\n{}", self.output());
        }
    }
}

/// Connects to the volume's socket as a VMM with the usual wishes.
#[track_caller]
pub fn open(socket: &Path) -> Session {
    Session::open(socket, &Options::default()).expect("the back-end serves a front-end")
}

/// Whether somebody listens at `socket`, at this moment.
pub fn listens(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

/// Waits until nobody listens. A program that another test starts has all that this process has, until it is
/// that program: also what the service manager of a host process was given to keep.
#[track_caller]
pub fn is_left(socket: &Path) {
    wait_for("nobody listens any more", || if listens(socket) { Err("somebody does") } else { Ok(()) });
}

/// Writes, successfully.
#[track_caller]
pub fn write(ring: &mut SplitRing, sector: u64, data: &[u8]) {
    let outcome = Request::write(sector, data).run(ring).expect("a write completes");
    assert_eq!(outcome.status, block::OK, "a write at sector {sector}");
}

/// Reads, successfully.
#[track_caller]
pub fn read(ring: &mut SplitRing, sector: u64, len: usize) -> Vec<u8> {
    let outcome = Request::read(sector, len).run(ring).expect("a read completes");
    assert_eq!(outcome.status, block::OK, "a read at sector {sector}");
    outcome.data
}

/// Flushes, successfully.
#[track_caller]
pub fn flush(ring: &mut SplitRing) {
    assert_eq!(Request::flush().run(ring).expect("a flush completes").status, block::OK);
}
