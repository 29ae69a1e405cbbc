//! A queue over layers of which some are still coming: it holds reads back of what is not here.
//!
//! A read that waits has its buffer, and takes no place in the queue below; it counts as in flight. It is
//! handed over when everything that it needs is here, or fails when that cannot be had, or after the patience
//! is over. Whoever drains a queue for good says so, and then waits for no place that is away.

use super::{Coming, FAILED, Waker, is_away, patience};
use crate::backing::{Done, InMemory, Op, Queue};
use crate::reactor::{Buffer, Reactor, Token, Watched};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

/// How long a read is waited for at the end that a place may be about to bring.
const AT_END: Duration = Duration::from_secs(5);

/// The queue.
pub(in crate::backing) struct ComingQueue {
    inner: Box<dyn Queue>,
    /// By layer: 0 is the one right below the top.
    below: Vec<Option<Arc<Coming>>>,
    /// Goes before what it watches.
    watch: Watched,
    waker: Arc<Waker>,
    held: Vec<Held>,
    /// What everything is here for, and which finds no room below.
    ready: VecDeque<(u64, Op)>,
    failed: VecDeque<Done>,
    /// Nothing is waited for while the place is away.
    is_ending: bool,
}

struct Held {
    tag: u64,
    op: Op,
    coming: Arc<Coming>,
    bytes: Range<u64>,
    since: Instant,
}

impl ComingQueue {
    /// `inner`, a queue of the thread whose `reactor` is, in which the layers below the top are so, from the
    /// one right below it.
    pub(in crate::backing) fn over(
        inner: Box<dyn Queue>,
        reactor: &Rc<dyn Reactor>,
        below: Vec<Option<Arc<Coming>>>,
    ) -> io::Result<Self> {
        let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let waker = Arc::new(Waker { fd, waiting: AtomicUsize::new(0) });
        for coming in below.iter().flatten() {
            coming.wakes(&waker);
        }
        let watch = Watched::new(reactor, waker.fd.as_fd().as_raw_fd());
        let (held, ready, failed) = (Vec::new(), VecDeque::new(), VecDeque::new());
        Ok(ComingQueue { inner, below, watch, waker, held, ready, failed, is_ending: false })
    }

    /// The layer, if it is still coming, and not all of these bytes are here.
    fn lacks(&self, layer: usize, bytes: &Range<u64>) -> Option<&Arc<Coming>> {
        let coming = self.below.get(layer.checked_sub(1)?)?.as_ref()?;
        (!coming.has(bytes)).then_some(coming)
    }

    fn hold(&mut self, tag: u64, op: Op, coming: Arc<Coming>, bytes: Range<u64>) {
        // Counted before it is looked once more: what comes after that wakes this queue.
        self.waker.waiting.fetch_add(1, SeqCst);
        match coming.ask_for(&bytes) {
            _ if coming.has(&bytes) => {
                self.waker.waiting.fetch_sub(1, SeqCst);
                self.inner.submit(tag, op);
            }
            Ok(()) => self.held.push(Held { tag, op, coming, bytes, since: Instant::now() }),
            Err(e) => {
                self.waker.waiting.fetch_sub(1, SeqCst);
                self.fail(tag, op, &e.to_string());
            }
        }
    }

    fn fail(&mut self, tag: u64, op: Op, why: &str) {
        FAILED.fetch_add(1, Relaxed);
        let result = Err(io::Error::other(why.to_owned()));
        self.failed.push_back(Done { tag, buffer: buffer_of(op), result });
    }

    /// Hands over what can be read by now, and lets go of what is not to be waited for.
    fn release(&mut self) {
        let mut n = 0;
        let now = (!self.held.is_empty()).then(Instant::now);
        let patience = match self.is_ending {
            true if self.held.is_empty() || is_away() => Duration::ZERO,
            true => AT_END.min(patience()),
            false => patience(),
        };
        while let (Some(held), Some(now)) = (self.held.get(n), now) {
            let is_here = held.coming.has(&held.bytes);
            let problem = if is_here { None } else { held.coming.problem(&held.bytes) };
            let problem = problem.or_else(|| {
                let is_late = !is_here && held.since + patience <= now;
                is_late.then(|| "what it needs did not come in time".to_owned())
            });
            if !is_here && problem.is_none() {
                n += 1;
                continue;
            }
            let Held { tag, op, .. } = self.held.remove(n);
            self.waker.waiting.fetch_sub(1, SeqCst);
            match problem {
                None => self.ready.push_back((tag, op)),
                Some(why) => self.fail(tag, op, &why),
            }
        }
        // Below, room is kept for whatever follows from an operation whose end was not taken yet.
        while self.inner.has_room() {
            let Some((tag, op)) = self.ready.pop_front() else { break };
            self.inner.submit(tag, op);
        }
    }
}

fn buffer_of(op: Op) -> Option<Buffer> {
    match op {
        Op::Read { buffer, .. } | Op::ReadBelow { buffer, .. } | Op::Write { buffer, .. } => Some(buffer),
        Op::Flush | Op::Zero { .. } => None,
    }
}

impl Queue for ComingQueue {
    fn alloc(&mut self, offset: u64, len: usize) -> Option<Buffer> {
        self.inner.alloc(offset, len)
    }

    fn free(&mut self, buffer: Buffer) {
        self.inner.free(buffer);
    }

    fn places(&self) -> usize {
        self.inner.places()
    }

    fn max_buffer(&self) -> usize {
        self.inner.max_buffer()
    }

    fn bytes<'a>(&'a mut self, buffer: &'a mut Buffer) -> &'a mut [u8] {
        self.inner.bytes(buffer)
    }

    fn in_memory(&self, layer: usize, offset: u64, len: usize) -> Option<InMemory<'_>> {
        match self.lacks(layer, &(offset..offset + len as u64)) {
            Some(_) => None,
            None => self.inner.in_memory(layer, offset, len),
        }
    }

    fn expect(&self, layer: usize, offset: u64, len: usize) {
        if self.lacks(layer, &(offset..offset + len as u64)).is_none() {
            self.inner.expect(layer, offset, len);
        }
    }

    fn has_room(&self) -> bool {
        self.ready.is_empty() && self.inner.has_room()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len() + self.ready.len()
    }

    fn submit(&mut self, tag: u64, op: Op) {
        if let Op::ReadBelow { layer, offset, part, .. } = &op {
            let bytes = *offset..*offset + part.len() as u64;
            if let Some(coming) = self.lacks(*layer, &bytes) {
                let coming = coming.clone();
                return self.hold(tag, op, coming, bytes);
            }
        }
        self.inner.submit(tag, op);
    }

    fn take_back(&mut self) -> Vec<(u64, Buffer)> {
        self.waker.waiting.fetch_sub(self.held.len(), SeqCst);
        let held = self.held.drain(..);
        held.filter_map(|Held { tag, op, .. }| Some((tag, buffer_of(op)?))).collect()
    }

    fn is_coming(&self) -> bool {
        self.below.iter().flatten().any(|coming| !coming.is_all_here())
    }

    fn waits_in_vain(&self) -> bool {
        !self.held.is_empty() && is_away()
    }

    fn stop_waiting(&mut self) {
        if !std::mem::replace(&mut self.is_ending, true) {
            self.release();
        }
    }

    fn collect(&mut self) -> io::Result<()> {
        self.inner.collect()?;
        self.release();
        Ok(())
    }

    fn woken(&mut self, token: Token) -> bool {
        if *self.watch != token {
            return self.inner.woken(token);
        }
        // What there is to do is done when everything is collected.
        let _ = self.waker.fd.read();
        true
    }

    fn has_done(&self) -> bool {
        !self.failed.is_empty() || self.inner.has_done()
    }

    fn next_done(&mut self) -> Option<Done> {
        self.failed.pop_front().or_else(|| self.inner.next_done())
    }
}
