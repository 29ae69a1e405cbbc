//! A process that serves a volume since an upgrade, and is no child of ours; and one that only asks for it.

use super::patience::limit;
use super::process::{Other, ended};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::Pid;
use sealblk::crypt::secret_mem::SecretFd;
use serde_json::{Value, json};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

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

/// A successor of our own, which stops where it likes.
pub struct Played {
    stream: UnixStream,
    pub passed: Vec<OwnedFd>,
    come: Vec<u8>,
}

impl Played {
    /// Asks for the volume at its control socket.
    pub fn new(control: &Path, protocol: u32) -> Self {
        let stream = UnixStream::connect(control).expect("connect");
        stream.set_read_timeout(Some(limit())).expect("set a limit");
        let secret = SecretFd::create(4096).expect("secret memory");
        let request = format!("{}\n", json!({"op": "upgrade", "protocol": protocol}));
        let fds = [secret.as_fd().as_raw_fd()];
        let data = [IoSlice::new(request.as_bytes())];
        let control = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(stream.as_raw_fd(), &data, &control, MsgFlags::empty(), None).expect("send");
        Played { stream, passed: Vec::new(), come: Vec::new() }
    }

    /// Says that it has come so far.
    pub fn say(&self, step: Value) {
        let line = format!("{step}\n");
        std::io::Write::write_all(&mut &self.stream, line.as_bytes()).expect("send");
    }

    /// The next line; nothing at the end.
    pub fn hear(&mut self) -> Value {
        loop {
            if let Some(end) = self.come.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.come.drain(..=end).collect();
                return serde_json::from_slice(&line).expect("JSON");
            }
            let mut bytes = [0; 4096];
            let mut space = nix::cmsg_space!([RawFd; 32]);
            let mut data = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(self.stream.as_raw_fd(), &mut data, Some(&mut space), flags);
            let message = message.expect("receive");
            for control in message.cmsgs().expect("control messages") {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    // SAFETY: the kernel just made these descriptors for us; nobody else knows them.
                    self.passed.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            let count = message.bytes;
            if count == 0 {
                return Value::Null;
            }
            self.come.extend_from_slice(&bytes[..count]);
        }
    }

    /// Hears until this is said.
    pub fn hear_until(&mut self, what: &str) {
        loop {
            match self.hear() {
                Value::Null => panic!("it ended before it said {what}"),
                Value::String(said) if said == what => return,
                said if said.get(what).is_some() => return,
                _ => {}
            }
        }
    }
}
