//! All queues of a volume standing still at one point in time, and going on with other
//! layers if there are any.
//!
//! While they are paused, no operation is in flight: what was acknowledged is in the disk, and what was not
//! either is or is not. Requests that were taken and not finished, new ones, and what the VMM asks of a ring
//! wait until the end: to the guest and its VMM a pause is nothing but slowness. It is therefore to be short,
//! and whoever pauses must not wait for a VMM or a session meanwhile. A pause ends however its holder ends:
//! by default as if it had not been.

use crate::base::sync::Locked;
use crate::disk::Disk;
use crate::vhost::queue::Awaited;
use crate::vhost::tenure::Serving;
use std::io;
use std::sync::{Arc, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

impl Serving {
    /// The volume as its queues serve it. Waits while they are paused.
    pub fn disk(&self) -> Arc<Disk> {
        self.lock().clone()
    }

    /// As [`Serving::disk`], without waiting: `None` while the queues are being paused, or stand still.
    pub fn disk_at_once(&self) -> Option<Arc<Disk>> {
        match self.disk.try_lock() {
            Ok(disk) => Some(disk.clone()),
            // It is always a whole disk.
            Err(TryLockError::Poisoned(disk)) => Some(disk.into_inner().clone()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Disk>> {
        // It is always a whole disk.
        self.disk.locked()
    }

    /// Pauses all queues, waiting for what they have in flight, together no longer than `patience`.
    /// Another pause is waited for.
    ///
    /// # Errors
    /// `TimedOut` if operations do not end in that time, and whatever ended a queue's
    /// thread. All queues go on then.
    pub fn pause(&self, patience: Duration) -> io::Result<Paused<'_>> {
        let disk = self.lock();
        let begun = Instant::now();
        let paused = Paused { serving: self, disk, begun, prepared: None, over: false };
        // All are asked before any is waited for.
        let asked: Vec<_> = self.workers.iter().map(|worker| worker.pause()).collect::<io::Result<_>>()?;
        let mut asked = asked.into_iter().zip(self.workers.iter());
        asked.try_for_each(|(answer, worker)| worker.wait_until(answer, begun + patience))?;
        Ok(paused)
    }
}

/// A volume whose queues stand still. Dropping it lets them go on as they were.
pub struct Paused<'a> {
    serving: &'a Serving,
    disk: MutexGuard<'a, Arc<Disk>>,
    begun: Instant,
    prepared: Option<Arc<Disk>>,
    over: bool,
}

impl Paused<'_> {
    /// What the queues serve.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Lets every queue open `disk`, with which they shall go on: after this nothing but
    /// [`Paused::resume`] is needed.
    ///
    /// # Errors
    /// What kept a queue from opening it. The queues stay paused.
    pub fn prepare(&mut self, disk: Arc<Disk>) -> io::Result<()> {
        self.prepared = None;
        let workers = self.serving.workers.iter();
        let asked: Vec<_> = workers.map(|worker| worker.prepare(disk.clone())).collect::<io::Result<_>>()?;
        asked.into_iter().try_for_each(Awaited::wait)?;
        self.prepared = Some(disk);
        Ok(())
    }

    /// Lets the queues go on, with what was prepared. Returns how long the guest may have noticed.
    pub fn resume(mut self) -> Duration {
        let next = self.prepared.take();
        let answers = self.go_on(next.is_some());
        self.over = true;
        if let Some(next) = next {
            *self.disk = next;
        }
        for answer in answers {
            // A thread that is gone has said why, and the volume is being detached.
            let _ = answer.wait();
        }
        self.begun.elapsed()
    }

    fn go_on(&self, switch: bool) -> Vec<Awaited> {
        self.serving.workers.iter().filter_map(|worker| worker.resume(switch).ok()).collect()
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if !self.over {
            drop(self.go_on(false));
        }
    }
}
