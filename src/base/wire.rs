//! What two processes of sealblk say to each other: lines of JSON over a stream socket, no longer than
//! whoever reads them allows. A descriptor can go with a line.
//!
//! Used between a host process and its clients, and between a process and its helpers. What the words are,
//! and in which order they are said, is theirs to know; how long one waits is the socket's read timeout.

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Sends `what` as one line.
pub(crate) fn say(mut socket: &UnixStream, what: &impl Serialize) -> io::Result<()> {
    socket.write_all(&line(what)?)
}

/// Sends `what` as one line, and `descriptor` with the first of its bytes.
pub(crate) fn say_with(
    socket: &UnixStream,
    what: &impl Serialize,
    descriptor: BorrowedFd<'_>,
) -> io::Result<()> {
    say_with_all(socket, what, &[descriptor])
}

/// Sends `what` as one line, and `descriptors`, at most [`MAX_DESCRIPTORS`], with the first of its bytes.
pub(crate) fn say_with_all(
    mut socket: &UnixStream,
    what: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    assert!(descriptors.len() <= MAX_DESCRIPTORS, "as many as a reader makes room for");
    let line = line(what)?;
    let fds: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &control };
    let data = [IoSlice::new(&line)];
    let sent = loop {
        match sendmsg::<()>(socket.as_raw_fd(), &data, control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(nix::Error::EINTR) => {}
            sent => break sent?,
        }
    };
    socket.write_all(&line[sent..])
}

/// Waits for one line, as [`Lines::next`] returns it. What comes after that line is lost: for
/// those who speak in turns.
pub(crate) fn hear(socket: &UnixStream, limit: usize) -> io::Result<Option<Vec<u8>>> {
    Lines::of_at_most(limit).next(socket)
}

fn line(what: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    Ok(line)
}

/// The most descriptors that go with one line.
pub(crate) const MAX_DESCRIPTORS: usize = 32;

/// What one reads from a socket, line by line.
pub(crate) struct Lines {
    /// The longest line in bytes.
    limit: usize,
    /// What has come and was not returned yet.
    come: Vec<u8>,
    /// The descriptors that came and were not taken yet, at most so many as are wanted; others are closed.
    descriptors: VecDeque<OwnedFd>,
    wanted: usize,
}

impl Lines {
    /// Lines of at most `limit` bytes. What is longer is cut there, and is then no JSON.
    pub(crate) fn of_at_most(limit: usize) -> Self {
        Lines { limit, come: Vec::new(), descriptors: VecDeque::new(), wanted: 1 }
    }

    /// As many descriptors are wanted as go with one line, not one alone: they are to be taken after
    /// each line that has some.
    pub(crate) fn with_descriptors(self) -> Self {
        // Those of the next line may have come with the end of this one.
        Lines { wanted: 2 * MAX_DESCRIPTORS, ..self }
    }

    /// Waits for the next line and returns it without its end. A line may also end with the socket's end;
    /// `None` if there is nothing before that.
    ///
    /// # Errors
    /// Those of the socket. `WouldBlock` if it does not wait, or waits no longer, and there is no whole line
    /// yet: what has come is kept, and one may ask again.
    pub(crate) fn next(&mut self, socket: &UnixStream) -> io::Result<Option<Vec<u8>>> {
        let mut part = [0; 4096];
        // No line ends before this place.
        let mut looked_at = 0;
        loop {
            if let Some(end) = self.come[looked_at..].iter().position(|&byte| byte == b'\n') {
                let mut line = self.come.split_off(looked_at + end + 1);
                std::mem::swap(&mut line, &mut self.come);
                line.pop();
                return Ok(Some(line));
            }
            looked_at = self.come.len();
            if looked_at >= self.limit {
                return Ok(Some(std::mem::take(&mut self.come)));
            }
            let room = part.len().min(self.limit - looked_at);
            match self.receive(socket, &mut part[..room]) {
                Ok(0) if self.come.is_empty() => return Ok(None),
                Ok(0) => return Ok(Some(std::mem::take(&mut self.come))),
                Ok(count) => self.come.extend_from_slice(&part[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The first descriptor that came with what was read until now, and was not taken yet.
    pub(crate) fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    /// Receives what there is, at most as much as fits into `bytes`, and the descriptors that came with it.
    fn receive(&mut self, socket: &UnixStream, bytes: &mut [u8]) -> io::Result<usize> {
        let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let mut data = [IoSliceMut::new(bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                for fd in fds {
                    // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
                    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                    if self.descriptors.len() < self.wanted {
                        self.descriptors.push_back(fd);
                    }
                }
            }
        }
        Ok(message.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn lines_come_one_by_one_however_they_were_sent() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut lines = Lines::of_at_most(100);
        (&ours).write_all(b"1\n[2,\n").unwrap();
        assert_eq!(lines.next(&theirs).unwrap().unwrap(), b"1");
        assert_eq!(lines.next(&theirs).unwrap().unwrap(), b"[2,");
        theirs.set_nonblocking(true).unwrap();
        (&ours).write_all(b"ha").unwrap();
        assert_eq!(lines.next(&theirs).unwrap_err().kind(), ErrorKind::WouldBlock);
        say(&ours, &"lf").unwrap();
        assert_eq!(lines.next(&theirs).unwrap().unwrap(), b"ha\"lf\"");
        (&ours).write_all(b"the end").unwrap();
        drop(ours);
        assert_eq!(lines.next(&theirs).unwrap().unwrap(), b"the end");
        assert_eq!(lines.next(&theirs).unwrap(), None);
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        say(&ours, &"x".repeat(5000)).unwrap();
        let line = hear(&theirs, 4500).unwrap().unwrap();
        assert_eq!(line.len(), 4500);
        assert!(serde_json::from_slice::<String>(&line).is_err());
    }

    #[test]
    fn a_descriptor_goes_with_a_line() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        // Longer than what is received at once.
        let text = "x".repeat(9000);
        say_with(&ours, &text, one.as_fd()).unwrap();
        drop(one);
        let mut lines = Lines::of_at_most(10_000);
        let line = lines.next(&theirs).unwrap().unwrap();
        assert_eq!(serde_json::from_slice::<String>(&line).unwrap(), text);
        let passed = UnixStream::from(lines.take_descriptor().expect("a descriptor"));
        assert!(lines.take_descriptor().is_none());
        say(&passed, &7).unwrap();
        assert_eq!(hear(&other, 10).unwrap().unwrap(), b"7");
    }

    #[test]
    fn descriptors_are_told_apart_by_their_lines() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let pairs: Vec<_> = (0..MAX_DESCRIPTORS + 1).map(|_| UnixStream::pair().unwrap()).collect();
        let fds: Vec<_> = pairs.iter().map(|(one, _)| one.as_fd()).collect();
        say(&ours, &0).unwrap();
        say_with_all(&ours, &1, &fds[..MAX_DESCRIPTORS]).unwrap();
        say_with_all(&ours, &2, &fds[MAX_DESCRIPTORS..]).unwrap();
        say_with_all(&ours, &3, &[]).unwrap();
        let mut lines = Lines::of_at_most(100).with_descriptors();
        let mut taken = Vec::new();
        for (line, count) in [("0", 0), ("1", MAX_DESCRIPTORS), ("2", 1), ("3", 0)] {
            assert_eq!(lines.next(&theirs).unwrap().unwrap(), line.as_bytes());
            taken
                .extend((0..count).map(|_| UnixStream::from(lines.take_descriptor().expect("a descriptor"))));
        }
        assert!(lines.take_descriptor().is_none());
        for (passed, (_, other)) in taken.iter().zip(&pairs) {
            say(passed, &7).unwrap();
            assert_eq!(hear(other, 10).unwrap().unwrap(), b"7");
        }
    }
}
