//! Waiting for a descriptor: for a moment, so that whoever waits can look at other things in between,
//! signals, say; or for the first of several.
#![forbid(unsafe_code)]

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// Milliseconds.
const MOMENT: u16 = 200;

/// Waits a moment for something to read, or for the end. Returns whether reading will not wait now.
pub(crate) fn readable(file: &impl AsFd) -> io::Result<bool> {
    ready(file, PollFlags::POLLIN)
}

/// Waits a moment for room to write into, or for the reader's end. Returns whether there is something to do
/// now.
pub(crate) fn writable(file: &impl AsFd) -> io::Result<bool> {
    ready(file, PollFlags::POLLOUT)
}

fn ready(file: &impl AsFd, what: PollFlags) -> io::Result<bool> {
    match poll(&mut [PollFd::new(file.as_fd(), what)], MOMENT) {
        Ok(found) => Ok(found > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Waits until one of these can be read, or has ended, or a signal comes; returns which can or have.
pub(crate) fn until_readable<const N: usize>(fds: [BorrowedFd<'_>; N]) -> io::Result<[bool; N]> {
    let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(fds.map(|fd| has_event(&fd))),
        Err(e) => Err(e.into()),
    }
}

/// Whether something was found of a descriptor that was waited for.
pub(crate) fn has_event(fd: &PollFd<'_>) -> bool {
    // Nothing is what it answers for a flag that it has no name for.
    fd.revents() != Some(PollFlags::empty())
}
