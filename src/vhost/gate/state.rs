//! The transfer of the device's own state in a migration. A disk has none: everything is in the volume and in
//! the guest's memory. So what is saved is empty, and nothing but that can be loaded.
//!
//! Source: the vhost-user protocol, "Migrating back-end state".

use crate::vhost::gate::Result;
use crate::vhost::gate::message::Message;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::stat::{SFlag, fstat};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// In an answer: no descriptor comes back.
const NO_FD: u64 = 1 << 8;
/// The front-end reads the state, or writes it.
const SAVE: u32 = 0;
const LOAD: u32 = 1;
/// The only phase that there is: the device is stopped.
const STOPPED: u32 = 0;
/// How long the end of what is loaded may take, in milliseconds, after the VMM says that it has sent all.
const PATIENCE: u16 = 2000;

/// What the last transfer was about.
#[derive(Default)]
pub(super) enum Transfer {
    /// There was no transfer.
    #[default]
    None,
    /// We had to write.
    Saved,
    /// We have to read what comes here.
    Loading(OwnedFd),
}

impl Transfer {
    /// SET_DEVICE_STATE_FD: the body of the answer.
    pub(super) fn begin(&mut self, message: &mut Message, running: bool) -> u64 {
        *self = Transfer::None;
        let (direction, phase) = (message.u32_at(0), message.u32_at(4));
        let Some(fd) = message.fds.pop() else { return NO_FD | 1 };
        if running || phase != Some(STOPPED) {
            return NO_FD | 1;
        }
        *self = match direction {
            // Closing it, which comes with the message's end, says that this was all.
            Some(SAVE) => Transfer::Saved,
            Some(LOAD) if is_stream(&fd).unwrap_or(false) => Transfer::Loading(fd),
            _ => return NO_FD | 1,
        };
        NO_FD
    }

    /// Whether one was begun, and nobody has asked yet how it went.
    pub(super) fn is_begun(&self) -> bool {
        !matches!(self, Transfer::None)
    }

    /// CHECK_DEVICE_STATE: the body of the answer, 0 if all is well.
    pub(super) fn check(&mut self) -> u64 {
        match std::mem::take(self) {
            Transfer::None => 1,
            Transfer::Saved => 0,
            Transfer::Loading(fd) => u64::from(!ends_empty(&fd).unwrap_or(false)),
        }
    }
}

/// Whether it is a pipe or a socket: what can tell its end without being read.
fn is_stream(fd: &OwnedFd) -> Result<bool> {
    let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
    Ok(kind == SFlag::S_IFIFO || kind == SFlag::S_IFSOCK)
}

/// Whether the other end closes without having written anything. It looks and never reads: the VMM may have
/// the same open file, and a read could then wait for ever.
fn ends_empty(fd: &OwnedFd) -> Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, PollTimeout::from(PATIENCE))? == 0 {
        return Ok(false);
    }
    let events = fds[0].revents().unwrap_or(PollFlags::empty());
    if !events.contains(PollFlags::POLLIN) {
        return Ok(events.contains(PollFlags::POLLHUP));
    }
    // In a pipe this means bytes; a socket says so at its end, too.
    match recv(fd.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(count) => Ok(count == 0),
        Err(Errno::ENOTSOCK) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn message(direction: u32, phase: u32, fd: Option<OwnedFd>) -> Message {
        let body = [direction.to_ne_bytes(), phase.to_ne_bytes()].concat();
        Message { fds: fd.into_iter().collect(), ..Message::request(42, body) }
    }

    #[test]
    fn what_is_saved_is_empty() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut transfer = Transfer::default();
        assert_eq!(transfer.check(), 1, "there was no transfer");
        assert_eq!(transfer.begin(&mut message(SAVE, STOPPED, Some(writer.into())), false), NO_FD);
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut all).unwrap();
        assert_eq!((all.len(), transfer.check()), (0, 0));
    }

    #[test]
    fn only_an_empty_state_can_be_loaded() {
        for bytes in [&b""[..], b"x"] {
            let (reader, mut writer) = std::io::pipe().unwrap();
            let mut transfer = Transfer::default();
            assert_eq!(transfer.begin(&mut message(LOAD, STOPPED, Some(reader.into())), false), NO_FD);
            writer.write_all(bytes).unwrap();
            drop(writer);
            assert_eq!(transfer.check(), bytes.len() as u64);
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            assert_eq!(transfer.begin(&mut message(LOAD, STOPPED, Some(ours.into())), false), NO_FD);
            theirs.write_all(bytes).unwrap();
            drop(theirs);
            assert_eq!(transfer.check(), bytes.len() as u64);
        }
    }

    #[test]
    fn a_state_without_an_end_is_given_up() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let mut transfer = Transfer::default();
        assert_eq!(transfer.begin(&mut message(LOAD, STOPPED, Some(reader.into())), false), NO_FD);
        assert_eq!((transfer.check(), transfer.check()), (1, 1));
    }

    #[test]
    fn transfers_that_cannot_be_are_refused() {
        let pipe = || Some(std::io::pipe().unwrap().0.into());
        let file = Some(std::fs::File::open("/dev/zero").unwrap().into());
        for (mut message, running) in [
            (message(SAVE, STOPPED, None), false),
            (message(LOAD, STOPPED, pipe()), true),
            (message(LOAD, 1, pipe()), false),
            (message(2, STOPPED, pipe()), false),
            (message(LOAD, STOPPED, file), false),
        ] {
            let mut transfer = Transfer::default();
            assert_eq!((transfer.begin(&mut message, running), transfer.check()), (NO_FD | 1, 1));
        }
    }
}
