//! Where another thread can have something done with a VMM's session: between two messages, by the
//! thread that serves VMMs. So nothing is done while a message is half handled, and no lock is
//! needed around the session.

use crate::base::sync::Locked;
use crate::vhost::gate::Gate;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

/// What is to be done with the session of the connected VMM, if there is one. Returns who serves VMMs from
/// then on. The thread that serves VMMs runs this.
pub type Job = Box<dyn FnOnce(Option<&mut Gate>) -> Next + Send>;

/// Who serves VMMs after a [`Job`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// This process, as before.
    ThisProcess,
    /// Another process: it has the listening socket, and the VMM's connection where there was one. This
    /// process must neither read from them nor shut them down.
    Successor,
}

/// The place where jobs wait for the next boundary.
pub struct Boundary {
    event: EventFd,
    job: Mutex<Option<Job>>,
}

impl Boundary {
    /// Without a job.
    pub fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Arc::new(Boundary { event, job: Mutex::default() }))
    }

    /// Leaves a job for the next boundary, in place of one that was not begun.
    pub fn leave(&self, job: Job) -> io::Result<()> {
        *self.job.locked() = Some(job);
        self.event.write(1)?;
        Ok(())
    }

    /// Takes the job back. Returns whether it was still there: then it is not run any more.
    pub fn take_back(&self) -> bool {
        self.job.locked().take().is_some()
    }

    /// Readable when there may be a job.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Does what was left here, if anything was.
    pub(super) fn reach(&self, session: Option<&mut Gate>) -> Next {
        // An empty counter is no error.
        let _ = self.event.read();
        let job = self.job.locked().take();
        job.map_or(Next::ThisProcess, |job| job(session))
    }
}
