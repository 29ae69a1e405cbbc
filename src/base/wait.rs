//! Waiting for a descriptor for a moment, so that whoever waits can look at other things in between: signals,
//! say.
#![forbid(unsafe_code)]

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::AsFd;

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
