//! What is asked of an export, and who is told what became of it.
#![forbid(unsafe_code)]

use super::replies::Given;
use crate::base::sync::Locked;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, mpsc};

/// What is asked for. Offsets count the export's bytes.
#[derive(Debug)]
pub(crate) enum Ask {
    /// Bytes.
    Read { offset: u64, len: u32 },
    /// That they are stored; durably, if that is said.
    Write { offset: u64, bytes: Vec<u8>, durable: bool },
    /// That these bytes read as zeros.
    Zero { offset: u64, len: u64, keep_space: bool },
    /// That everything is durable that was written before.
    Flush,
    /// Where zeros are.
    Map { offset: u64, len: u32 },
}

/// What became of it. An error has a number of the system's.
pub(super) type Outcome = io::Result<Given>;

/// Who is told.
pub(super) enum To {
    /// A queue, with its own number for it.
    Queue(Arc<Inbox>, u32),
    /// Whoever waits.
    Caller(mpsc::Sender<Outcome>),
    /// Nobody: the thread asks for itself.
    Nobody,
}

/// Something for the thread.
pub(super) enum Task {
    /// It is asked for.
    Do(Ask, To),
    /// The image is lent to another process, and whoever waits is told how that went.
    Lend(mpsc::Sender<io::Result<()>>),
    /// The image is this process's again.
    TakeBack,
}

/// Where a queue finds what became of its requests.
pub(crate) struct Inbox {
    come: Mutex<Vec<(u32, Outcome)>>,
    wake: EventFd,
}

impl Inbox {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Inbox { come: Mutex::default(), wake: event()? })
    }

    /// What becomes readable when something has come.
    pub(crate) fn wake_fd(&self) -> RawFd {
        self.wake.as_fd().as_raw_fd()
    }

    /// Takes what has come: numbers, and what became of those requests.
    pub(crate) fn take(&self) -> Vec<(u32, Outcome)> {
        // What comes from here on wakes again.
        let _ = self.wake.read();
        std::mem::take(&mut *self.come.locked())
    }

    pub(super) fn put(&self, number: u32, outcome: Outcome) {
        let mut come = self.come.locked();
        come.push((number, outcome));
        if come.len() == 1 {
            // It cannot be full: the queue takes everything at once.
            let _ = self.wake.write(1);
        }
    }
}

/// Something that wakes whoever waits for it.
pub(super) fn event() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}
