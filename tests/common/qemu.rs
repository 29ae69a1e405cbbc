//! A QEMU process that never outlives its test: two wires into it (QEMU's monitor and the guest's agent),
//! and its words kept in files for when something fails.
//!
//! Knows nothing of what runs in the guest. `ci/guest/qemu` decides which QEMU, processor and memory.

use super::patience::{Deadline, guest_limit};
use super::process::{repository, tie_to_test, wait_within};
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// A running QEMU.
pub struct Qemu {
    child: Child,
    folder: PathBuf,
    monitor: Wire,
    events: Vec<Value>,
}

impl Qemu {
    /// Starts QEMU with `args` added to those of `ci/guest/qemu`; its logs go into `folder`. Returns the
    /// wire to the guest's agent, too.
    pub fn start(args: &[String], folder: &Path, environment: &[(String, String)]) -> (Qemu, Wire) {
        let (monitor, their_monitor) = UnixStream::pair().expect("socketpair");
        let (agent, their_agent) = UnixStream::pair().expect("socketpair");
        let errors = std::fs::File::create(folder.join("qemu.err")).expect("create qemu.err");
        let mut command = Command::new(repository().join("ci/guest/qemu"));
        command.envs(environment.iter().map(|(k, v)| (k, v)));
        command.arg("-serial").arg(format!("file:{}", folder.join("console.log").display()));
        command.arg("-chardev").arg(format!("socket,id=monitor,fd={}", their_monitor.as_raw_fd()));
        command.args(["-mon", "chardev=monitor,mode=control", "-device", "virtio-serial-pci"]);
        command.arg("-chardev").arg(format!("socket,id=agent,fd={}", their_agent.as_raw_fd()));
        command.args(["-device", "virtserialport,chardev=agent,name=sealblk.agent"]);
        command.args(args);
        command.stdin(Stdio::null()).stdout(errors.try_clone().expect("dup")).stderr(errors);
        tie_to_test(&mut command, vec![their_monitor.into(), their_agent.into()]);
        let child = command.spawn().expect("start ci/guest/qemu");
        // Its ends are closed here, so that its death is seen as the end of the stream.
        drop(command);
        let monitor = Wire::new(monitor);
        let mut qemu = Qemu { child, folder: folder.to_owned(), monitor, events: Vec::new() };
        qemu.greet();
        (qemu, Wire::new(agent))
    }

    fn greet(&mut self) {
        // The first line is QEMU's greeting; without it QEMU has refused its arguments, or there is none.
        let deadline = Deadline::after(guest_limit());
        if let Err(e) = self.monitor.line(deadline) {
            let words = std::fs::read_to_string(self.folder.join("qemu.err")).unwrap_or_default();
            panic!("QEMU did not start ({e}): {words}");
        }
        self.execute("qmp_capabilities", json!({}));
    }

    /// Runs a monitor command and returns its result; panics when QEMU refuses it.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments).unwrap_or_else(|e| panic!("QEMU refused {command}: {e}"))
    }

    /// Runs a monitor command; QEMU's words when it refuses.
    pub fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.monitor.send(format!("{request}\n").as_bytes());
        let deadline = Deadline::after(guest_limit());
        loop {
            let mut message = self.message(deadline).unwrap_or_else(|e| panic!("{command}: QEMU: {e}"));
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(error) = message.get("error") {
                return Err(error["desc"].as_str().unwrap_or("no reason given").to_owned());
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Waits for the next event called `name` and returns it whole.
    pub fn event(&mut self, name: &str) -> Value {
        let deadline = Deadline::after(guest_limit());
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return self.events.remove(at);
            }
            match self.message(deadline) {
                Ok(message) => self.events.push(message),
                Err(e) => panic!("waiting for QEMU's event {name}: {e}; there were {:?}", self.events),
            }
        }
    }

    fn message(&mut self, deadline: Deadline) -> io::Result<Value> {
        let line = self.monitor.line(deadline)?;
        serde_json::from_str(&line).map_err(|e| io::Error::other(format!("{e} in {line}")))
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until QEMU has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        wait_within(&mut self.child, guest_limit()).expect("QEMU ends")
    }

    /// Ends QEMU at once, as a crash would.
    pub fn kill(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            for name in ["qemu.err", "console.log"] {
                let words = std::fs::read(self.folder.join(name)).unwrap_or_default();
                let tail = &words[words.len().saturating_sub(4096)..];
                eprintln!("---- {name}\n{}", String::from_utf8_lossy(tail));
            }
        }
    }
}

/// A stream of lines and counted bytes, read with a deadline.
pub struct Wire {
    stream: UnixStream,
    waiting: Vec<u8>,
}

impl Wire {
    fn new(stream: UnixStream) -> Self {
        Wire { stream, waiting: Vec::new() }
    }

    /// Sends all of `bytes`; that the other side is gone shows at the next read.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// The next line, without its end.
    pub fn line(&mut self, deadline: Deadline) -> io::Result<String> {
        loop {
            if let Some(end) = self.waiting.iter().position(|&b| b == b'\n') {
                let line = self.waiting.drain(..=end).collect::<Vec<u8>>();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            self.receive(deadline)?;
        }
    }

    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize, deadline: Deadline) -> io::Result<Vec<u8>> {
        while self.waiting.len() < count {
            self.receive(deadline)?;
        }
        Ok(self.waiting.drain(..count).collect())
    }

    fn receive(&mut self, deadline: Deadline) -> io::Result<()> {
        let left = deadline.left();
        if left.is_zero() {
            let found = String::from_utf8_lossy(&self.waiting);
            let what = format!("nothing came within {:?} but {found:?}", guest_limit());
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut chunk = [0; 65536];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended")),
            Ok(n) => {
                self.waiting.extend_from_slice(&chunk[..n]);
                Ok(())
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(e) => Err(e),
        }
    }
}
