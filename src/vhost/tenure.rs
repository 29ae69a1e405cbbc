//! Who may serve the volume: what rings need in order to run, and the say of whoever hands it over to another process.
//!
//! At any time at most one process of all that have a socket for a volume may read and write it. A ring begins with a
//! [`Tenure::claim`]; when none runs any more, [`Tenure::rest`] lets another process have the volume if one waits for it.

use super::worker::Worker;
use crate::volume::io::Disk;
use std::io;
use std::sync::Arc;

/// The volume, open, and the threads that serve it. While there is one, no other process writes the volume.
pub struct Serving {
    /// One thread a queue.
    pub workers: Vec<Worker>,
    /// The volume.
    pub disk: Arc<Disk>,
}

/// The right to serve a volume. Calls come from one session at a time.
pub trait Tenure: Send + Sync {
    /// Gets, or has already, the volume. Whoever got it drops it before [`Tenure::rest`].
    ///
    /// # Errors
    /// Another process has it and does not let go of it within a bounded time; it has changed in a way that this
    /// process cannot follow; it cannot be opened.
    fn claim(&self) -> io::Result<Arc<Serving>>;

    /// No ring runs, and nothing is in flight: a process that waits may have the volume.
    fn rest(&self);

    /// The VMM has left. Answers whether to wait for the next one; not if another process has the volume now.
    fn vmm_left(&self) -> bool;
}
