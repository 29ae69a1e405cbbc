//! A volume made and attached with the real program, for tests that look at it through its socket.

use super::frontend::ring::readable;
use super::frontend::server::Holdings;
use super::frontend::{Fault, Options, RawSocket, Request, Server, Session, SplitRing, block};
use super::patience::{Deadline, limit};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;
use tempfile::TempDir;

/// Bytes of the volume.
pub const SIZE: u64 = 64 << 20;
/// Its sectors of 512 bytes.
pub const SECTORS: u64 = SIZE / 512;
/// What `--serial` gives it.
pub const SERIAL: &str = "a-serial-of-ours";

/// Places that every test leaves alone, as first sector: where a wrapped, truncated or misjudged address
/// would strike.
const KEPT: [u64; 3] = [0, SECTORS / 2, SECTORS - KEPT_SECTORS];
/// Sectors of each kept place.
pub const KEPT_SECTORS: u64 = 128;
/// The first sector that tests may use as they like, and the first that they may not any more.
pub const FREE: std::ops::Range<u64> = KEPT_SECTORS..SECTORS / 2;

/// An attached volume.
pub struct Disk {
    /// The process that serves it.
    pub server: Server,
    dir: TempDir,
}

impl Disk {
    /// A fresh volume of 512-byte sectors, attached with these arguments.
    pub fn attach(arguments: &[&str]) -> Disk {
        Self::with_sectors(512, arguments)
    }

    /// A fresh volume, attached with these arguments; the kept places hold their pattern.
    pub fn with_sectors(sector_size: u32, arguments: &[&str]) -> Disk {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let size = format!("{}MiB", SIZE >> 20);
        let sector = sector_size.to_string();
        run(
            dir.path(),
            &[
                "volume",
                "create",
                "--size",
                &size,
                "--name",
                "t",
                "--sector-size",
                &sector,
                "--json",
                "--unencrypted",
            ],
        );
        let server = serve(dir.path(), &[]);
        let disk = Disk { server, dir };
        disk.write_kept();
        if arguments.is_empty() {
            return disk;
        }
        let Disk { server, dir } = disk;
        end(server);
        Disk { server: serve(dir.path(), arguments), dir }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        self.server.socket()
    }

    /// Where the store lies.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Connects with the ordinary wishes and starts the device.
    pub fn open(&self) -> Session {
        self.open_with(&Options::default())
    }

    /// Connects and starts the device.
    pub fn open_with(&self, options: &Options) -> Session {
        Session::open(self.socket(), options).expect("the back-end serves an ordinary front-end")
    }

    /// The process lives, serves a new front-end, and what was written before is as it was.
    pub fn assert_whole(&mut self) {
        assert!(self.server.runs(), "the back-end ended:\n{}", self.server.output());
        let mut session = self.open();
        assert_kept(&mut session.rings[0]);
    }

    /// What the process holds when it has served a front-end and come to rest.
    pub fn idle(&mut self) -> Holdings {
        self.assert_whole();
        let last = Cell::new(self.server.holdings().expect("the back-end runs"));
        let quiet = |now: &Holdings| last.replace(*now) == *now;
        self.server.settle(quiet).expect("the back-end runs")
    }

    /// The process holds no more descriptors and threads than before, once it has tidied up, and is whole.
    pub fn assert_nothing_stays(&mut self, before: &Holdings) {
        let tidy = |now: &Holdings| now.fds <= before.fds && now.threads <= before.threads;
        let after = self.server.settle(tidy).expect("the back-end runs");
        assert!(tidy(&after), "{before:?} became {after:?}");
        self.assert_whole();
    }

    /// After something unlawful on the first ring of `session`: the ring goes on, or the device says that it
    /// is broken, or it closed the connection. Anything is allowed but silence and damage.
    pub fn assert_survives(&mut self, mut session: Session) {
        match reads_on(&mut session) {
            Aftermath::Serves => assert_kept_after(&mut session.rings[0]),
            Aftermath::Broken | Aftermath::Closed => {}
        }
        drop(session);
        self.assert_whole();
    }

    /// After the guest's memory was taken away: the process goes on, or it ends by itself and says why. A
    /// signal is not an orderly end: nobody wiped the key.
    pub fn assert_served_or_ended_in_order(&mut self, mut session: Session) {
        let raw = RawSocket::new(session.raw().socket().expect("a second handle"));
        let deadline = Deadline::after(limit());
        let ring = &mut session.rings[0];
        while ring.pop_used().is_none() && !readable(&ring.err_fd, Duration::ZERO).expect("poll") {
            if raw.closes(Duration::from_millis(5)).expect("poll") {
                break;
            }
            deadline.check("completed, broken or closed", || state(ring));
        }
        drop(session);
        // It may be about to end, and serve the next front-end until then.
        let next = Session::open(self.socket(), &Options { now_or_never: true, ..Options::default() });
        if next.and_then(|mut session| check_kept(&mut session.rings[0])).is_ok() && self.server.runs() {
            return;
        }
        let status = self.server.wait().expect("the back-end ends");
        let said = self.server.output();
        assert!(status.code().is_some() && said.contains("memory"), "{status}:\n{said}");
    }

    fn write_kept(&self) {
        let mut session = self.open();
        for first in KEPT {
            let write = Request::write(first, &kept(first));
            assert_eq!(write.run(&mut session.rings[0]).expect("a write").status, block::OK);
        }
        assert_eq!(Request::flush().run(&mut session.rings[0]).expect("a flush").status, block::OK);
    }
}

/// A name for the failure message, and what is put on the ring.
pub type Case = (&'static str, fn(&mut SplitRing));

/// Each case on a fresh connection, then the device must be whole.
pub fn each(cases: &[Case]) {
    let mut disk = Disk::attach(&[]);
    for (name, post) in cases {
        println!("{name}");
        let mut session = disk.open();
        post(&mut session.rings[0]);
        session.rings[0].kick();
        disk.assert_survives(session);
    }
}

/// How a device takes it when its ring is misused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aftermath {
    /// The next request is served.
    Serves,
    /// The device signalled the ring's error descriptor.
    Broken,
    /// The connection is closed.
    Closed,
}

/// Posts one more read on the first ring and sees how it ends; completions of others are passed over.
pub fn reads_on(session: &mut Session) -> Aftermath {
    let raw = RawSocket::new(session.raw().socket().expect("a second handle"));
    let ring = &mut session.rings[0];
    let pending = Request::read(0, 512).submit(ring).expect("room on the ring");
    ring.kick();
    let deadline = Deadline::after(limit());
    loop {
        while let Some(used) = ring.pop_used() {
            if used.id == u32::from(pending.head) {
                let outcome = pending.finish(ring, used).expect("the read is whole");
                assert_eq!(outcome.status, block::OK);
                return Aftermath::Serves;
            }
        }
        ring.want_call(true);
        if readable(&ring.err_fd, Duration::ZERO).expect("poll") {
            return Aftermath::Broken;
        }
        // Three descriptors may tell: the call one is waited for, the others are looked at in between.
        if raw.closes(Duration::ZERO).expect("poll") {
            return Aftermath::Closed;
        }
        deadline.check("the read is completed, the ring broken or the connection closed", || state(ring));
        ring.wait_call(Duration::from_millis(5)).expect("poll");
    }
}

/// What the kept place at `first` holds.
pub fn kept(first: u64) -> Vec<u8> {
    pattern(first ^ 0x5ea1, KEPT_SECTORS as usize * 512)
}

/// Bytes that differ from sector to sector and from seed to seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // Xorshift (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// How far a ring has come, for the failure message.
fn state(ring: &SplitRing) -> String {
    format!("available index {}, used index {}", ring.avail_idx(), ring.used_idx())
}

/// The kept places are as they were written.
pub fn assert_kept(ring: &mut SplitRing) {
    check_kept(ring).expect("a read");
}

/// What [`assert_kept`] looks at; an error where the device does not answer.
fn check_kept(ring: &mut SplitRing) -> Result<(), Fault> {
    for first in KEPT {
        let read = Request::read(first, KEPT_SECTORS as usize * 512).run(ring)?;
        assert_eq!(read.status, block::OK);
        assert!(read.data == kept(first), "what lay at sector {first} has changed");
    }
    Ok(())
}

/// As [`assert_kept`], on a ring where late completions of unlawful requests may still come in.
fn assert_kept_after(ring: &mut SplitRing) {
    for first in KEPT {
        let pending =
            Request::read(first, KEPT_SECTORS as usize * 512).submit(ring).expect("room on the ring");
        ring.kick();
        let used = loop {
            let used = ring.wait_used().expect("a read");
            if used.id == u32::from(pending.head) {
                break used;
            }
        };
        let read = pending.finish(ring, used).expect("the read is whole");
        assert!(
            read.status == block::OK && read.data == kept(first),
            "what lay at sector {first} has changed"
        );
    }
}

/// Writes and reads back at `sector`.
pub fn assert_carries(ring: &mut SplitRing, sector: u64, len: usize) {
    let data = pattern(sector ^ len as u64, len);
    assert_eq!(Request::write(sector, &data).run(ring).expect("a write").status, block::OK);
    let read = Request::read(sector, len).run(ring).expect("a read");
    assert_eq!((read.status, read.used_len as usize), (block::OK, len + 1));
    assert!(read.data == data, "sector {sector} does not hold what was written");
}

fn program(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
    command.env("SEALBLK_CONFIG_DIR", dir.join("config")).arg("--root").arg(dir.join("root"));
    command
}

fn run(dir: &Path, arguments: &[&str]) -> Output {
    let output = program(dir).args(arguments).output().expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "sealblk {}: {said}", arguments.join(" "));
    output
}

fn serve(dir: &Path, arguments: &[&str]) -> Server {
    let socket = dir.join("t.sock");
    let mut command = program(dir);
    command.args(["attach", "t", "--socket-path"]).arg(&socket);
    command.args(arguments);
    Server::start(command, &socket).expect("the volume attaches")
}

fn end(mut server: Server) {
    server.signal(nix::sys::signal::Signal::SIGTERM).expect("the back-end runs");
    let status = server.wait().expect("the back-end ends");
    assert!(status.success(), "the back-end ended with {status}:\n{}", server.output());
}
