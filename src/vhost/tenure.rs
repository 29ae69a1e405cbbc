//! Who may serve the volume: what rings need in order to run, and the say of whoever hands it
//! over to another process.
//!
//! At any time at most one process of all that have a socket for a volume may read and write it. A ring
//! begins with a [`Tenure::claim`]; when none runs any more, [`Tenure::rest`] lets another process have the
//! volume if one waits for it.

use crate::disk::Disk;
use crate::vhost::queue::Worker;
use std::io;
use std::sync::{Arc, Mutex};

/// The volume, open, and the threads that serve it. While there is one, no other process writes the volume.
pub struct Serving {
    /// One thread a queue.
    pub(super) workers: Arc<[Worker]>,
    /// What they serve. Locked while they are paused.
    pub(super) disk: Mutex<Arc<Disk>>,
}

impl Serving {
    /// `disk`, and threads that were started for it, or [hold](Worker::hold) it since.
    pub fn new(disk: Arc<Disk>, workers: impl Into<Arc<[Worker]>>) -> Arc<Self> {
        Arc::new(Serving { workers: workers.into(), disk: Mutex::new(disk) })
    }
}

/// The right to serve a volume. Calls come from one session at a time.
pub trait Tenure: Send + Sync {
    /// Gets, or has already, the volume. Whoever got it drops it before [`Tenure::rest`].
    ///
    /// # Errors
    /// Another process has it and does not let go of it within a bounded time; it has changed in a way that
    /// this process cannot follow; it cannot be opened.
    fn claim(&self) -> io::Result<Arc<Serving>>;

    /// The volume, if this process has it. Whoever looks at it drops it soon: as long as he has
    /// it, no other process can.
    fn serving(&self) -> Option<Arc<Serving>>;

    /// No ring runs, and nothing is in flight: a process that waits may have the volume.
    fn rest(&self);

    /// The guest has chosen that writes be durable when they complete, or that they need not be. Whoever
    /// serves it after this process must know: it will not say it again.
    fn guest_chose(&self, write_through: bool);

    /// A VMM has connected: it may start a ring at any time.
    fn vmm_came(&self);

    /// The VMM has left. Returns whether to wait for the next one; not if another process has the volume now.
    fn vmm_left(&self) -> bool;
}

/// A volume that is never handed over.
pub struct Sole(pub Arc<Serving>);

impl Tenure for Sole {
    fn claim(&self) -> io::Result<Arc<Serving>> {
        Ok(self.0.clone())
    }

    fn serving(&self) -> Option<Arc<Serving>> {
        Some(self.0.clone())
    }

    fn rest(&self) {}

    fn guest_chose(&self, _write_through: bool) {}

    fn vmm_came(&self) {}

    fn vmm_left(&self) -> bool {
        true
    }
}
