//! vhost-user messages byte by byte, for what no sane front-end sends.

use super::super::patience::{Deadline, limit};
use super::ring::readable;
use super::{Fault, Result};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The protocol's version, in the header's flags.
pub const VERSION: u32 = 1;
/// The header's flag of an answer.
pub const REPLY: u32 = 4;
/// The header's flag that asks for an acknowledgement.
pub const NEED_REPLY: u32 = 8;

/// A message from the back-end.
#[derive(Debug)]
pub struct Reply {
    /// Which request it answers.
    pub request: u32,
    /// The header's flags.
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// The descriptor that came along.
    pub file: Option<File>,
}

impl Reply {
    /// The body as a 64-bit number.
    pub fn value(&self) -> Result<u64> {
        let bytes = self.body.as_slice().try_into();
        Ok(u64::from_le_bytes(bytes.map_err(|_| Fault::Protocol(format!("not a number: {self:?}")))?))
    }
}

/// A connection on which anything can be sent.
pub struct RawSocket {
    socket: UnixStream,
}

impl RawSocket {
    /// Connects; a socket that is not there yet or does not accept yet is tried again within the limit.
    pub fn connect(path: &Path) -> Result<Self> {
        Ok(Self::new(connect(path)?))
    }

    /// Over an open connection.
    pub fn new(socket: UnixStream) -> Self {
        RawSocket { socket }
    }

    /// A second handle on the connection.
    pub fn socket(&self) -> Result<UnixStream> {
        Ok(self.socket.try_clone()?)
    }

    /// Sends bytes, the descriptors with the first of them.
    pub fn send(&self, bytes: &[u8], fds: &[RawFd]) -> Result<()> {
        self.socket.set_write_timeout(Some(limit()))?;
        let mut sent = 0;
        while sent < bytes.len() {
            let fds = if sent == 0 { fds } else { &[] };
            match self.socket.send_with_fds(&[&bytes[sent..]], fds) {
                Ok(n) => sent += n,
                Err(e) if e.errno() == nix::libc::EINTR => {}
                Err(e) => return Err(std::io::Error::from(e).into()),
            }
        }
        Ok(())
    }

    /// Sends a whole message; `flags` as they go into the header.
    pub fn message(&self, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> Result<()> {
        self.send(&message(request, flags, body), fds)
    }

    /// Sends a message and waits for what comes back.
    pub fn ask(&self, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> Result<Reply> {
        self.message(request, flags, body, fds)?;
        self.reply().map_err(|fault| match fault {
            Fault::TimedOut(what) => Fault::TimedOut(format!("{what}, in answer to request {request}")),
            other => other,
        })
    }

    /// Sends a message that wants an acknowledgement; its value (0 for success).
    pub fn ack(&self, request: u32, body: &[u8], fds: &[RawFd]) -> Result<u64> {
        self.ask(request, VERSION | NEED_REPLY, body, fds)?.value()
    }

    /// Waits for the next message.
    pub fn reply(&self) -> Result<Reply> {
        let deadline = Deadline::after(limit());
        let (header, file) = self.receive(12, deadline)?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let size = word(8) as usize;
        if size > 1 << 16 {
            return Err(Fault::Protocol(format!("the back-end announces a body of {size} bytes")));
        }
        let (body, _) = self.receive(size, deadline)?;
        Ok(Reply { request: word(0), flags: word(4), body, file })
    }

    /// Whether the back-end closes the connection within the limit. What it still sends is thrown away.
    pub fn closes(&self, limit: Duration) -> Result<bool> {
        let deadline = Deadline::after(limit);
        let mut rest = [0; 4096];
        loop {
            if !readable(&self.socket, deadline.left())? {
                return Ok(false);
            }
            match self.socket.recv_with_fd(&mut rest) {
                Ok((0, _)) => return Ok(true),
                Ok(_) => {}
                Err(e) => match std::io::Error::from(e).kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => return Ok(true),
                    _ => return Err(std::io::Error::from(e).into()),
                },
            }
        }
    }

    fn receive(&self, len: usize, deadline: Deadline) -> Result<(Vec<u8>, Option<File>)> {
        let mut bytes = vec![0; len];
        let (mut got, mut file) = (0, None);
        while got < len {
            if !readable(&self.socket, deadline.left())? {
                let what = format!("a message from the back-end, of which {got} of {len} bytes have come");
                return Err(Fault::TimedOut(what));
            }
            match self.socket.recv_with_fd(&mut bytes[got..]) {
                Ok((0, _)) => return Err(Fault::Closed("waiting for a message".into())),
                Ok((n, with)) => {
                    got += n;
                    file = file.or(with);
                }
                Err(e) if e.errno() == nix::libc::EINTR => {}
                Err(e) => return Err(std::io::Error::from(e).into()),
            }
        }
        Ok((bytes, file))
    }
}

/// A message's bytes: header and body.
pub fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = body.len() as u32;
    let header = [request, flags, size].map(u32::to_le_bytes);
    [header.as_flattened(), body].concat()
}

/// Connects to `path`, trying again within the limit while nobody listens there yet.
pub fn connect(path: &Path) -> Result<UnixStream> {
    let deadline = Deadline::after(limit());
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(e) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Err(Fault::Io(e));
            }
            Err(e) if deadline.left().is_zero() => {
                let what = format!("somebody who listens at {}: {e}", path.display());
                return Err(Fault::TimedOut(what));
            }
            // Nothing announces a listener to a stranger: look again.
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}
