//! The back-end's own channel to the VMM: a socket on which we speak first.
//!
//! Source: the vhost-user protocol, "Back-end message types". The one message that a disk has to send says
//! that its configuration changed; a VMM then reads it again. The VMM has the other end and may do with it
//! what it likes: nothing here waits for it without a limit.

use crate::base::sync::Locked;
use crate::vhost::gate::Result;
use crate::vhost::gate::message::{HEADER, NEED_REPLY, REPLY, VERSION, invalid, word_at};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, recv, send,
    sockopt,
};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::BackendReq;

/// How long the VMM may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether the VMM knows that the configuration changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// The VMM says that it has taken note.
    Confirmed,
    /// The VMM was told, and has not confirmed it: it does not confirm such messages, or not in time.
    Sent,
    /// The VMM was told, and says that it could not act on it.
    Refused,
    /// Nobody was told: no VMM is connected, or it takes no such message. The next to connect will see it.
    Nobody,
}

/// Where the channel of the connected VMM is found, if it has given one.
#[derive(Default)]
pub struct Channel {
    line: Mutex<Option<Arc<Mutex<Line>>>>,
}

struct Line {
    socket: OwnedFd,
    /// Whether acknowledgements were agreed, and the VMM has given all so far: after one that did not come,
    /// an answer could be to an earlier question.
    acks: bool,
}

impl Channel {
    /// Takes the VMM's socket, instead of an earlier one.
    pub(super) fn open(&self, socket: OwnedFd, acks: bool) -> Result<()> {
        let odd = |_| invalid("not a socket".into());
        let stream = getsockopt(&socket, sockopt::SockType).map_err(odd)? == SockType::Stream;
        let address = getsockname::<SockaddrStorage>(socket.as_raw_fd()).map_err(odd)?;
        if !stream || address.family() != Some(AddressFamily::Unix) {
            return Err(invalid("not a Unix stream socket".into()));
        }
        self.set(Some(Line { socket, acks }));
        Ok(())
    }

    /// The VMM's socket once more, if it has given one.
    pub(super) fn copy(&self) -> Result<Option<OwnedFd>> {
        let line = self.lock().clone();
        line.map(|line| line.locked().socket.try_clone()).transpose()
    }

    /// Forgets it: its VMM has left.
    pub fn close(&self) {
        self.set(None);
    }

    /// Tells the VMM that the configuration has changed, which must be visible to it already.
    pub fn config_changed(&self) -> Told {
        // The session that ends meanwhile must not wait for this.
        let Some(line) = self.lock().clone() else { return Told::Nobody };
        let mut line = line.locked();
        line.tell(BackendReq::CONFIG_CHANGE_MSG as u32).unwrap_or_else(|e| {
            log::warn!("telling the VMM that the configuration changed: {e}");
            Told::Nobody
        })
    }

    /// Tells the VMM that the configuration has changed, without waiting for an answer.
    pub fn announce_config_change(&self) {
        let Some(line) = self.lock().clone() else { return };
        let line = line.locked();
        if let Err(e) = line.send(BackendReq::CONFIG_CHANGE_MSG as u32, VERSION, Instant::now()) {
            log::warn!("telling the VMM that the configuration changed: {e}");
        }
    }

    fn set(&self, line: Option<Line>) {
        *self.lock() = line.map(|line| Arc::new(Mutex::new(line)));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Mutex<Line>>>> {
        self.line.locked()
    }
}

impl Line {
    /// Sends a message without a body, and waits for its acknowledgement where those were agreed.
    fn tell(&mut self, request: u32) -> io::Result<Told> {
        let limit = Instant::now() + PATIENCE;
        let flags = if self.acks { VERSION | NEED_REPLY } else { VERSION };
        self.send(request, flags, limit)?;
        if !self.acks {
            return Ok(Told::Sent);
        }
        match self.read_ack(request, limit) {
            Ok(0) => Ok(Told::Confirmed),
            Ok(_) => Ok(Told::Refused),
            Err(e) => {
                log::warn!("the VMM did not acknowledge that the configuration changed: {e}");
                self.acks = false;
                Ok(Told::Sent)
            }
        }
    }

    fn send(&self, request: u32, flags: u32, limit: Instant) -> io::Result<()> {
        let message = [request, flags, 0].map(u32::to_ne_bytes);
        let bytes = message.as_flattened();
        let mut sent = 0;
        while sent < bytes.len() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.as_raw_fd(), &bytes[sent..], flags) {
                Ok(n) => sent += n,
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, limit)?,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// The number in an acknowledgement of `request`.
    fn read_ack(&self, request: u32, limit: Instant) -> io::Result<u64> {
        let mut answer = [0; HEADER + 8];
        let mut filled = 0;
        while filled < answer.len() {
            // Without room for descriptors: the kernel closes what comes along.
            match recv(self.socket.as_raw_fd(), &mut answer[filled..], MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => filled += n,
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN, limit)?,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let [code, flags, size] = [0, 4, 8].map(|at| word_at(&answer, at));
        if (code, flags & !NEED_REPLY, size) != (request, VERSION | REPLY, 8) {
            return Err(invalid(format!("message {code} with flags {flags:#x} instead")));
        }
        let [.., a, b, c, d, e, f, g, h] = answer;
        Ok(u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
    }

    fn wait(&self, events: PollFlags, limit: Instant) -> io::Result<()> {
        let left = limit.saturating_duration_since(Instant::now());
        // Rounded up, so that the last fraction of a millisecond does not spin.
        let timeout = PollTimeout::try_from(left.as_millis() as u64 + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.socket.as_fd(), events)], timeout) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::EINTR) if left.is_zero() => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    /// The VMM's end, and ours in a channel.
    fn channel(acks: bool) -> (UnixStream, Channel) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let channel = Channel::default();
        channel.open(ours.into(), acks).unwrap();
        (theirs, channel)
    }

    fn ack(value: u64) -> Vec<u8> {
        [[2, VERSION | REPLY, 8].map(u32::to_ne_bytes).as_flattened(), &value.to_ne_bytes()].concat()
    }

    #[test]
    fn the_vmm_is_told_and_its_answer_counts_where_it_was_agreed() {
        for (acks, answer, told) in [
            (false, vec![], Told::Sent),
            (true, ack(0), Told::Confirmed),
            (true, ack(1), Told::Refused),
            (true, vec![9; 20], Told::Sent),
        ] {
            let (mut theirs, channel) = channel(acks);
            theirs.write_all(&answer).unwrap();
            assert_eq!(channel.config_changed(), told);
            let mut message = [0; 12];
            theirs.read_exact(&mut message).unwrap();
            let flags = if acks { VERSION | NEED_REPLY } else { VERSION };
            assert_eq!(message, *[2, flags, 0].map(u32::to_ne_bytes).as_flattened());
        }
    }

    #[test]
    fn a_vmm_that_is_silent_full_or_gone_holds_nobody_up() {
        assert_eq!(Channel::default().config_changed(), Told::Nobody);
        let (theirs, silent) = channel(true);
        assert_eq!(silent.config_changed(), Told::Sent);
        // After that, nothing is waited for.
        assert_eq!(silent.config_changed(), Told::Sent);
        drop(theirs);
        assert_eq!(silent.config_changed(), Told::Nobody);
        let (theirs, gone) = channel(true);
        drop(theirs);
        assert_eq!(gone.config_changed(), Told::Nobody);
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        while (&ours).write(&[0; 4096]).is_ok() {}
        let full = Channel::default();
        full.open(ours.into(), false).unwrap();
        assert_eq!(full.config_changed(), Told::Nobody);
        drop(theirs);
        let (_theirs, left) = channel(false);
        left.close();
        assert_eq!(left.config_changed(), Told::Nobody);
    }

    #[test]
    fn what_is_no_stream_is_no_channel() {
        let (datagram, _other) = UnixDatagram::pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        for odd in [datagram.into(), null.into()] as [OwnedFd; 2] {
            assert!(Channel::default().open(odd, false).is_err());
        }
    }
}
