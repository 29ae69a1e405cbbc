//! The files that operations of a thread's io_uring are about.
#![allow(unsafe_code)]

use super::Uring;
use crate::reactor::ring::explained;
use io_uring::{squeue, types};
use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;

/// The files of one queue of a backing: the kernel knows them by number, and what is asked of them comes back
/// to that queue.
pub(crate) struct Files {
    uring: Rc<Uring>,
    first: u32,
    count: u32,
}

impl Files {
    /// Registers them.
    ///
    /// # Errors
    /// Those of io_uring_register(2), with what is behind them.
    pub(crate) fn new(uring: Rc<Uring>, fds: &[RawFd]) -> io::Result<Self> {
        let inner = &mut *uring.0.borrow_mut();
        let first = inner.free_run(fds.len());
        let first = first.ok_or_else(|| io::Error::other("an io_uring has no room for so many layers"))?;
        inner.ring.submitter().register_files_update(first as u32, fds).map_err(explained)?;
        inner.taken[first..first + fds.len()].fill(true);
        Ok(Files { uring: uring.clone(), first: first as u32, count: fds.len() as u32 })
    }

    /// How the kernel knows the `n`-th.
    pub(crate) fn number(&self, n: u32) -> types::Fixed {
        debug_assert!(n < self.count);
        types::Fixed(self.first + n)
    }

    /// Whose they are.
    pub(crate) fn uring(&self) -> &Uring {
        &self.uring
    }

    /// Hands an operation over that moves so many `bytes`, for [`Files::next_completed`] to bring back.
    ///
    /// # Safety
    /// What memory it refers to stays, and is touched by nobody else, until it was brought back.
    pub(crate) unsafe fn push(&self, slot: u32, entry: squeue::Entry, bytes: u32) {
        let inner = &mut *self.uring.0.borrow_mut();
        inner.waiting_bytes += bytes as usize;
        inner.push(entry.user_data(u64::from(self.first) << 32 | u64::from(slot)));
    }

    /// An operation that the kernel is done with: its slot, and what the kernel says.
    pub(crate) fn next_completed(&self) -> Option<(u32, i32)> {
        let completed = &mut self.uring.0.borrow_mut().completed;
        // Nearly always the first: two queues of a thread are seldom there, and never both at work.
        let place = completed.iter().position(|it| it.first == self.first)?;
        completed.remove(place).map(|it| (it.slot, it.result))
    }

    /// Whether [`Files::next_completed`] has something.
    pub(crate) fn has_completed(&self) -> bool {
        self.uring.0.borrow().completed.iter().any(|it| it.first == self.first)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let inner = &mut *self.uring.0.borrow_mut();
        let gone = vec![-1; self.count as usize];
        if let Err(e) = inner.ring.submitter().register_files_update(self.first, &gone) {
            // Their places stay taken: what is there is not what the next would take it for.
            return log::error!("giving up files of an io_uring: {e}");
        }
        inner.taken[self.first as usize..][..self.count as usize].fill(false);
        // The kernel lets go of a file that a request used only when the ring is entered
        // after its completion.
        let _ = inner.ring.take_in();
    }
}
