//! One thread's io_uring: operations, and the wake-ups that the thread waits for, in one ring, with
//! few system calls a batch.
#![allow(unsafe_code)]

mod files;

pub(crate) use files::Files;

use super::pool::Pool;
use super::ring::{Ring, explained};
use super::{Reactor, Token, Wait, Woken};
use io_uring::{cqueue, opcode, squeue, types};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;

/// Completions are told apart by these: a watch, or the end of one, has its serial below; anything else is an
/// operation, of the file whose number stands in the upper half.
const WATCH: u64 = 1 << 62;
const CANCEL: u64 = 1 << 63;
/// The kernel gets what waits for it when it is so many operations, or bytes, before another buffer is
/// filled: a device that takes requests one after the other would stand idle meanwhile. A call for each would
/// cost more than it gains.
const EARLY_OPERATIONS: usize = 4;
const EARLY_BYTES: usize = 128 << 10;
/// How often the kernel is asked whether all watches have ended.
const MAX_TRIES: u8 = 100;
/// Room in the ring for watches and their ends, beside operations.
const ROOM_FOR_WATCHES: u32 = 16;

/// An io_uring in use by the thread that made this.
pub struct Uring(RefCell<Inner>);

/// The ring comes before the pool: it must have forgotten the memory that it knows (drop sees to that), or be
/// gone, before that goes.
struct Inner {
    ring: Ring,
    /// The bounce buffers, once a queue has asked for them.
    pool: Option<Rc<Pool>>,
    /// Whether that pool is registered as fixed buffer 0.
    registered: bool,
    /// Which places among the registered files are taken.
    taken: Vec<bool>,
    /// How many operations there are at most at a time.
    depth: usize,
    watches: Vec<Watch>,
    /// Watches that the kernel was asked to end and has not ended yet.
    ending: usize,
    /// Bytes to be moved by what was handed over since the kernel was entered.
    waiting_bytes: usize,
    /// Entries that found the submission queue full.
    backlog: VecDeque<squeue::Entry>,
    completed: VecDeque<Completed>,
    woken: VecDeque<Woken>,
}

/// A descriptor that wakes the thread.
struct Watch {
    token: Token,
    fd: RawFd,
}

/// An operation that the kernel is done with.
struct Completed {
    /// The first of its queue's files.
    first: u32,
    slot: u32,
    result: i32,
}

impl Uring {
    /// For at most `depth` operations at a time.
    ///
    /// # Errors
    /// Those of io_uring_setup(2), with what is behind them; `Other` where every io_uring that was prepared
    /// is in use.
    pub fn new(depth: u16) -> io::Result<Self> {
        let depth = depth.max(1);
        let ring = Ring::take(u32::from(depth) + ROOM_FOR_WATCHES)?;
        Ok(Uring(RefCell::new(Inner {
            taken: vec![false; ring.places()],
            ring,
            pool: None,
            registered: false,
            depth: depth.into(),
            watches: Vec::new(),
            ending: 0,
            waiting_bytes: 0,
            backlog: VecDeque::new(),
            completed: VecDeque::with_capacity(2 * usize::from(depth)),
            woken: VecDeque::new(),
        })))
    }

    /// The bounce buffers, and whether the kernel knows them as fixed buffer 0. `by_ring`: the kernel is
    /// going to move bytes of them.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub(crate) fn pool(&self, by_ring: bool) -> io::Result<(Rc<Pool>, bool)> {
        let inner = &mut *self.0.borrow_mut();
        let pool = match &inner.pool {
            Some(pool) if pool.is_for_ring() || !by_ring => pool.clone(),
            // What the kernel is to know is there from now on, all of it. The kernel knows nothing of one
            // that was not made for it, which ends with the queue that has it.
            _ => inner.pool.insert(Rc::new(Pool::new(by_ring)?)).clone(),
        };
        if by_ring && !inner.registered {
            inner.registered = register(&inner.ring, &pool);
        }
        Ok((pool, inner.registered))
    }

    /// Lets the kernel have what waits, if that is worth a call: the device is at work on it while more is
    /// prepared.
    pub(crate) fn begin_early(&self) {
        let inner = &mut *self.0.borrow_mut();
        if inner.waiting_bytes >= EARLY_BYTES || inner.ring.submission().len() >= EARLY_OPERATIONS {
            // What it refuses now is asked for again with the next wait, which says so.
            let _ = inner.enter(Wait::Poll);
        }
    }

    /// Waits until the kernel has completed something, whatever watches have told.
    pub(crate) fn wait_for_completion(&self) -> io::Result<()> {
        let inner = &mut *self.0.borrow_mut();
        inner.enter(Wait::Event)?;
        inner.reap();
        Ok(())
    }

    /// Lets the kernel have what waits.
    pub(crate) fn submit(&self) -> io::Result<()> {
        self.0.borrow_mut().enter(Wait::Poll)
    }
}

impl Reactor for Uring {
    fn watch(&self, fd: RawFd) -> Token {
        let inner = &mut *self.0.borrow_mut();
        let token = Token(inner.ring.next_serial());
        inner.watches.push(Watch { token, fd });
        inner.push(poll(token, fd));
        token
    }

    fn unwatch(&self, token: Token) {
        let inner = &mut *self.0.borrow_mut();
        let Some(index) = inner.watches.iter().position(|watch| watch.token == token) else { return };
        inner.watches.swap_remove(index);
        inner.end(token);
        inner.woken.retain(|woken| woken.token() != token);
    }

    fn wait(&self, wait: Wait) -> io::Result<()> {
        self.0.borrow_mut().wait(wait)
    }

    fn is_ready(&self) -> bool {
        let inner = &mut *self.0.borrow_mut();
        inner.has_news() || !inner.ring.completion().is_empty() || inner.ring.submission().taskrun()
    }

    fn next_woken(&self) -> Option<Woken> {
        self.0.borrow_mut().woken.pop_front()
    }

    fn uring(self: Rc<Self>) -> Option<Rc<Uring>> {
        Some(self)
    }
}

impl Inner {
    fn has_news(&self) -> bool {
        !self.woken.is_empty() || !self.completed.is_empty()
    }

    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: an entry refers to a descriptor that is watched, which its owner keeps open as `watch`
        // asks; to nothing; or to what the caller of `Files::push` promises to keep.
        if self.backlog.is_empty() && unsafe { self.ring.submission().push(&entry) }.is_ok() {
            return;
        }
        self.backlog.push_back(entry);
    }

    /// Moves what waited into the submission queue.
    fn push_backlog(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { self.ring.submission().push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    fn wait(&mut self, wait: Wait) -> io::Result<()> {
        self.enter(if self.has_news() { Wait::Poll } else { wait })?;
        self.reap();
        // The kernel brings in about twenty completions at a time. What has completed together
        // goes on together: a driver that is shown a part answers with a part, and from then
        // on the device gets parts.
        for _ in 0..self.depth / 16 {
            if !self.ring.submission().taskrun() {
                break;
            }
            self.enter(Wait::Poll)?;
            self.reap();
        }
        Ok(())
    }

    /// Whether entering the kernel without waiting would change nothing.
    fn nothing_to_enter_for(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.is_empty() && !queue.taskrun() && !queue.cq_overflow()
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.waiting_bytes = 0;
        self.push_backlog();
        let result = match wait {
            Wait::Poll if self.nothing_to_enter_for() => return Ok(()),
            Wait::Poll => self.ring.submit(),
            Wait::Event => self.ring.submit_and_wait(1),
            Wait::Until(limit) => {
                let limit = types::Timespec::from(limit);
                self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&limit))
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(e) => match e.raw_os_error() {
                // Nothing came in time; a signal; or completions must be taken first. The caller comes back.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(e),
            },
        }
    }

    /// Takes what the kernel has completed.
    fn reap(&mut self) {
        loop {
            // One entry at a time leaves `self` free for what it causes; the ring's head moves with each.
            let Some(entry) = self.ring.completion().next() else { return };
            match entry.user_data() {
                token if token & CANCEL != 0 => self.ended(Token(token as u32), entry.result()),
                token if token & WATCH != 0 => self.woken(Token(token as u32), &entry),
                operation => self.completed.push_back(Completed {
                    first: (operation >> 32) as u32,
                    slot: operation as u32,
                    result: entry.result(),
                }),
            }
        }
    }

    fn woken(&mut self, token: Token, entry: &cqueue::Entry) {
        let Some(index) = self.watches.iter().position(|watch| watch.token == token) else { return };
        if entry.result() >= 0 {
            self.woken.push_back(Woken::Ready(token));
        }
        if cqueue::more(entry.flags()) {
            return;
        }
        // A multishot poll ends when the completion queue overflows (then it is set up
        // again) or with an error.
        if entry.result() >= 0 {
            self.push(poll(token, self.watches[index].fd));
        } else {
            self.watches.swap_remove(index);
            self.woken.push_back(Woken::Unwatched(token));
        }
    }

    /// Has the kernel end a watch. Completions of one that is not in the list are dropped, so that
    /// nobody need wait for it.
    fn end(&mut self, token: Token) {
        let cancel = opcode::PollRemove::new(WATCH | u64::from(token.0)).build();
        self.push(cancel.user_data(CANCEL | u64::from(token.0)));
        self.ending += 1;
    }

    /// What became of [`Inner::end`].
    fn ended(&mut self, token: Token, result: i32) {
        self.ending -= 1;
        // The descriptor has just become readable: the kernel does not end a watch before it has told so.
        if -result == libc::EALREADY {
            self.end(token);
        }
    }

    /// Ends all watches, and waits until they are. A watch holds its file, and would wake
    /// whoever has the ring next.
    fn end_watches(&mut self) -> io::Result<()> {
        for watch in std::mem::take(&mut self.watches) {
            self.end(watch.token);
        }
        for _ in 0..MAX_TRIES {
            self.enter(Wait::Poll)?;
            self.reap();
            if self.ending == 0 {
                return Ok(());
            }
            self.ring.take_in()?;
        }
        Err(io::Error::other("the kernel does not end watches"))
    }

    /// So many places among the registered files, side by side.
    fn free_run(&self, count: usize) -> Option<usize> {
        (0..=self.taken.len().checked_sub(count)?)
            .find(|&first| !self.taken[first..first + count].contains(&true))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The ring may serve another disk of this thread.
        if let Err(e) = self.end_watches() {
            log::error!("giving up watches: {e}");
        }
        self.ring.forget(self.registered);
    }
}

/// Registers the pool, so that the kernel need not look its pages up for each request. It may be refused by
/// RLIMIT_MEMLOCK; then it goes without.
fn register(ring: &Ring, pool: &Pool) -> bool {
    // SAFETY: the pool outlives the ring's use of it: `Inner` keeps a pool that the kernel knows until the
    // ring has forgotten it.
    match unsafe { ring.submitter().register_buffers(&[pool.iovec()]) } {
        Ok(()) => true,
        Err(e) => {
            log::info!("bounce buffers are not registered: {}", explained(e));
            false
        }
    }
}

fn poll(token: Token, fd: RawFd) -> squeue::Entry {
    let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
    entry.user_data(WATCH | u64::from(token.0))
}

#[cfg(test)]
impl Uring {
    /// Has the kernel do what was submitted, and returns the slot of an operation that it is done with, of
    /// which nobody else hears.
    pub(crate) fn steal_completion(&self) -> u32 {
        let inner = &mut *self.0.borrow_mut();
        inner.enter(Wait::Event).unwrap();
        inner.ring.completion().next().expect("it was waited for").user_data() as u32
    }
}

#[cfg(test)]
mod tests;
