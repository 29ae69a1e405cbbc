//! One thread's io_uring on a layer file: data, flushes, and the wake-ups that the thread waits for, all in
//! one ring, with few system calls a batch.

mod inline;
mod remote;
mod rewrite;
mod work;

use crate::backing::file::memory::{FileMemory, User};
use crate::backing::file::nothing_in_flight;
use crate::backing::file::pool::{self, Pool};
use crate::backing::file::prefetch::prefetch;
use crate::backing::file::ring::{self, Ring};
use crate::backing::file::turns::Turns;
use crate::backing::file::write_cache::WriteCache;
use crate::backing::nbd::Export;
use crate::backing::{Buffer, Event, InMemory, NotBegun, Op, Queue, Wait};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use remote::{ANSWERED, Remote};
use rewrite::{Rewriting, SPARE, TURN};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use work::{Left, Move, PUNCH, TOP, Way, Work, ZERO};

/// Completion tags: an index into `pending`, or one of these with a watch's serial below it.
const WATCH: u64 = 1 << 32;
const CANCEL: u64 = 1 << 33;
/// The kernel gets what waits for it when it is so many operations, or bytes, before another buffer is
/// filled: a device that takes requests one after the other would stand idle meanwhile. A call for each would
/// cost more than it gains.
const EARLY_OPERATIONS: usize = 4;
const EARLY_BYTES: usize = 128 << 10;

/// How often an operation is submitted again that the kernel did not begin with.
const MAX_TRIES: u8 = 100;

/// An operation that the kernel has, or that waits for its turn.
struct Pending {
    tag: u64,
    buffer: Option<Buffer>,
    work: Work,
    /// How often the kernel did nothing.
    tries: u8,
}

/// A descriptor that wakes the thread.
struct Watch {
    token: u32,
    /// Tells this watch from an earlier one of the same token, whose last completion may still come.
    serial: u32,
    fd: RawFd,
}

/// A layer and how it is reached.
pub(super) struct Reached {
    /// Its file. The top's is the queue's own; of those below all queues share one, since nothing is written
    /// through it, and so no error is told to one of them only.
    pub file: Arc<File>,
    /// Where in the file the layer begins.
    pub start: u64,
    /// Whether it is a block device.
    pub is_device: bool,
    /// Whether it is read and written by the queue's thread on the spot.
    pub inline: bool,
    /// Of a layer behind an NBD server: the export, in which it begins at `start`. Nothing of it is in the
    /// file.
    pub export: Option<Arc<Export>>,
    /// Where the file is memory.
    pub memory: Option<Arc<FileMemory>>,
    /// What offsets and lengths of transfers are multiples of: a power of two from 512 to 4096.
    pub unit: u32,
}

/// The queue. The ring comes before the pool: it must have forgotten the memory that it knows (drop sees to
/// that), or be gone, before that goes.
pub(super) struct FileQueue {
    ring: Ring,
    pool: Pool,
    /// Whether the pool is registered as fixed buffer 0.
    registered: bool,
    file: Arc<File>,
    start: u64,
    is_device: bool,
    inline: bool,
    memory: Option<User>,
    unit: u32,
    /// The largest unit of all layers, less one.
    unaligned: u64,
    /// Where the top's unit is larger than the volume's sectors.
    rewriting: Option<Rewriting>,
    /// The layers below, which are only read, from the one right below the top.
    below: Vec<Reached>,
    /// Where layers lie behind NBD servers.
    remote: Option<Remote>,
    /// Of a block device that is written past the page cache: whether it has a cache of its own.
    write_cache: Option<Arc<WriteCache>>,
    depth: usize,
    pending: Vec<Option<Pending>>,
    free_slots: Vec<u32>,
    watches: Vec<Watch>,
    /// Watches that the kernel was asked to end and has not ended yet.
    ending: usize,
    /// Bytes to be moved by what was handed over since the kernel was entered.
    waiting_bytes: usize,
    /// Entries that found the submission queue full.
    backlog: VecDeque<squeue::Entry>,
    events: VecDeque<Event>,
}

impl FileQueue {
    /// A queue for at most `depth` operations at a time, to be used by the calling thread alone.
    pub(super) fn new(top: Reached, below: Vec<Reached>, depth: u16) -> io::Result<Self> {
        let Reached { file, start, is_device, inline, export, memory, unit } = top;
        let exports = [export].into_iter().chain(below.iter().map(|b| b.export.clone())).collect();
        let remote = Remote::new(exports)?;
        let unaligned = u64::from(below.iter().map(|b| b.unit).fold(unit, u32::max)) - 1;
        let depth = usize::from(depth.max(1));
        let by_ring = !inline || below.iter().any(|b| !b.inline);
        // What the kernel is to know is there from now on, all of it.
        let pool = Pool::new(by_ring)?;
        // Room for watches and their removal beside the data.
        let ring = Ring::take(depth as u32 + 16)?;
        let files: Vec<_> = [&file].into_iter().chain(below.iter().map(|b| &b.file)).collect();
        let files_of_ring = files.iter().map(|f| f.as_raw_fd()).collect::<Vec<_>>();
        ring.submitter().register_files(&files_of_ring).map_err(ring::explained)?;
        let registered = by_ring && register(&ring, &pool);
        let mut queue = FileQueue {
            ring,
            pool,
            registered,
            file,
            start,
            is_device,
            inline,
            memory: memory.map(User::of),
            unit,
            unaligned,
            rewriting: None,
            below,
            remote,
            write_cache: None,
            depth,
            pending: (0..depth).map(|_| None).collect(),
            free_slots: (0..depth as u32).rev().collect(),
            watches: Vec::new(),
            ending: 0,
            waiting_bytes: 0,
            backlog: VecDeque::new(),
            events: VecDeque::with_capacity(2 * depth),
        };
        if let Some(fd) = queue.remote.as_ref().map(Remote::wake_fd) {
            queue.watch(ANSWERED, fd);
        }
        Ok(queue)
    }

    /// This queue, over a device whose flushes are needed only while the device has a cache.
    pub(super) fn with_write_cache(mut self, write_cache: Option<Arc<WriteCache>>) -> Self {
        self.write_cache = write_cache;
        self
    }

    /// This queue, over a top layer of which blocks are written in part, in turn with the other queues.
    pub(super) fn with_turns(mut self, turns: Option<Arc<Turns>>) -> io::Result<Self> {
        if let Some(turns) = turns {
            let rewriting = Rewriting::new(turns, self.depth)?;
            self.watch(TURN, rewriting.wake_fd());
            self.rewriting = Some(rewriting);
        }
        Ok(self)
    }

    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: an entry refers to files, which are registered and open as long as the ring; to bytes of
        // the pool, whose buffer is kept in `pending` until the completion is seen, and which outlives the
        // ring (drop waits for all completions); or to nothing.
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

    fn start(&mut self, tag: u64, op: Op) {
        let Some(slot) = self.free_slots.pop() else {
            unreachable!("the caller keeps within the depth (see `has_room`)");
        };
        let (work, buffer) = match op {
            Op::Read { offset, buffer } => {
                let part = 0..buffer.len();
                (Work::Move(self.move_of(Way::Read, TOP, offset, &buffer, part)), Some(buffer))
            }
            Op::ReadBelow { layer, offset, part, buffer } => {
                (Work::Move(self.move_of(Way::Read, layer as u32, offset, &buffer, part)), Some(buffer))
            }
            Op::Write { offset, buffer, durable } => {
                let way = Way::Write { flags: if durable { libc::RWF_DSYNC } else { 0 } };
                let part = 0..buffer.len();
                (Work::Move(self.move_of(way, TOP, offset, &buffer, part)), Some(buffer))
            }
            Op::Flush => (Work::Sync, None),
            Op::Zero { offset, len, keep_space } => {
                (Work::Zero { offset, len, mode: if keep_space { ZERO } else { PUNCH } }, None)
            }
        };
        let pending = Pending { tag, buffer, work, tries: 0 };
        if self.rewriting.is_some() {
            return self.start_in_turn(slot, pending);
        }
        self.waiting_bytes += work.bytes() as usize;
        self.submit_again(slot, pending);
    }

    /// What is to be moved for a part of a buffer: whole units of the layer.
    fn move_of(&self, way: Way, file: u32, offset: u64, buffer: &Buffer, part: Range<usize>) -> Move {
        // The kernel gets its place: it must lie in the buffer.
        assert!(part.start <= part.end && part.end <= buffer.len(), "a part of the buffer is moved");
        let unit = if file == TOP { self.unit } else { self.below[file as usize - 1].unit };
        let before = (offset % u64::from(unit)) as usize;
        let start = (buffer.skip as usize + part.start).checked_sub(before);
        let start = start.expect("the buffer was made for this offset");
        let len = (before + part.len()).next_multiple_of(unit as usize);
        let (offset, span) = (offset - before as u64, self.pool.span(buffer, start, len));
        let need = match way {
            Way::Read => before + part.len(),
            Way::Write { .. } => len,
        };
        Move { way, file, offset, span, need: need as u32, unit }
    }

    /// Lets the kernel have what waits, if that is worth a call: the device is at work on
    /// it while more is prepared.
    fn begin_early(&mut self) {
        if self.ring.submission().len() >= EARLY_OPERATIONS || self.waiting_bytes >= EARLY_BYTES {
            // What it refuses now is asked for again with the next wait, which says so.
            let _ = self.enter(Wait::Poll);
        }
    }

    /// Turns what the kernel completed into events.
    fn reap(&mut self) {
        loop {
            // One entry at a time leaves `self` free for what it causes; the ring's head moves with each.
            let Some(entry) = self.ring.completion().next() else { return };
            match entry.user_data() {
                slot if slot < WATCH => self.complete(slot as u32, entry.result()),
                token if token & CANCEL != 0 => self.ended(token as u32, entry.result()),
                watch => self.woken(watch as u32, &entry),
            }
        }
    }

    fn complete(&mut self, slot: u32, result: i32) {
        let Some(mut pending) = self.pending.get_mut(slot as usize).and_then(Option::take) else {
            log::error!("io_uring completed slot {slot}, in which nothing was pending");
            return;
        };
        if matches!(-result, libc::EAGAIN | libc::EINTR) && pending.tries < MAX_TRIES {
            // Nothing was done, for a reason that passes.
            pending.tries += 1;
            return self.submit_again(slot, pending);
        }
        if let (libc::EOPNOTSUPP, Work::Zero { mode, .. }) = (-result, &mut pending.work) {
            // A file system may not be able to keep the space; a device, to give it back.
            let (first, then) = if self.is_device { (PUNCH, ZERO) } else { (ZERO, PUNCH) };
            if *mode == first {
                *mode = then;
                return self.submit_again(slot, pending);
            }
        }
        let result = match u32::try_from(result) {
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
            Ok(moved) => match pending.work.after(moved) {
                Left::Nothing => Ok(()),
                Left::Rest(work) => {
                    (pending.work, pending.tries) = (work, 0);
                    return self.submit_again(slot, pending);
                }
                Left::All if moved > 0 && pending.tries < MAX_TRIES => {
                    pending.tries += 1;
                    return self.submit_again(slot, pending);
                }
                Left::All => Err(pending.work.stuck()),
            },
        };
        let Some(rewriting) = &mut self.rewriting else { return self.done(slot, pending, result) };
        let result = match rewriting.is_reading(slot) {
            true => result.map_err(|e| io::Error::new(e.kind(), NotBegun(e))),
            false => result,
        };
        if let Some(next) = rewriting.after(slot, result.is_ok()) {
            pending.tries = 0;
            self.pending[slot as usize] = Some(pending);
            return self.go_on(slot, Some(next));
        }
        self.done(slot, pending, result);
    }

    fn done(&mut self, slot: u32, pending: Pending, result: io::Result<()>) {
        self.free_slots.push(slot);
        self.events.push_back(Event::Done { tag: pending.tag, buffer: pending.buffer, result });
    }

    fn submit_again(&mut self, slot: u32, mut pending: Pending) {
        let start = match pending.work.file() {
            TOP => self.start,
            below => self.below[below as usize - 1].start,
        };
        if self.asks_export(slot, &mut pending, start) {
            self.pending[slot as usize] = Some(pending);
            return;
        }
        let entry = pending.work.entry(&self.pool, self.registered, start);
        self.push(entry.user_data(u64::from(slot)));
        self.pending[slot as usize] = Some(pending);
    }

    fn woken(&mut self, serial: u32, entry: &cqueue::Entry) {
        let Some(index) = self.watches.iter().position(|w| w.serial == serial) else { return };
        let Watch { token, fd, .. } = self.watches[index];
        if token == TURN {
            self.rewriting.iter().for_each(Rewriting::woken);
            self.take_turns();
        } else if token == ANSWERED {
            self.take_answers();
        } else if entry.result() >= 0 {
            self.events.push_back(Event::Ready { token });
        }
        if cqueue::more(entry.flags()) {
            return;
        }
        // A multishot poll ends when the completion queue overflows (then it is set up
        // again) or with an error.
        if entry.result() >= 0 {
            self.push(poll(serial, fd));
        } else {
            self.watches.swap_remove(index);
            self.events.push_back(Event::Unwatched { token });
        }
    }

    /// Has the kernel end a watch. Completions of one that is not in the list are dropped, so that
    /// nobody need wait for it.
    fn end(&mut self, serial: u32) {
        let cancel = opcode::PollRemove::new(WATCH | u64::from(serial)).build();
        self.push(cancel.user_data(CANCEL | u64::from(serial)));
        self.ending += 1;
    }

    /// What became of [`FileQueue::end`].
    fn ended(&mut self, serial: u32, result: i32) {
        self.ending -= 1;
        // The descriptor has just become readable: the kernel does not end a watch before it has told so.
        if -result == libc::EALREADY {
            self.end(serial);
        }
    }

    /// Ends all watches, and waits until they are. A watch holds its file, and would wake
    /// whoever has the ring next.
    fn end_watches(&mut self) -> io::Result<()> {
        while let Some(watch) = self.watches.first() {
            self.unwatch(watch.token);
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
}

impl Queue for FileQueue {
    fn alloc(&mut self, offset: u64, len: usize) -> Option<Buffer> {
        self.begin_early();
        if (offset | len as u64) & self.unaligned == 0 {
            return self.pool.alloc(len);
        }
        // As far from a page's beginning as from a unit's, so that whole units are whole there, too.
        let spare = if self.rewriting.is_some() { SPARE } else { 0 };
        self.pool.alloc_within((offset & self.unaligned) as usize, len, spare)
    }

    fn free(&mut self, buffer: Buffer) {
        self.pool.free(buffer);
    }

    fn places(&self) -> usize {
        pool::PAGES as usize
    }

    fn max_buffer(&self) -> usize {
        pool::MAX_BUFFER
    }

    fn bytes(&mut self, buffer: &mut Buffer) -> &mut [u8] {
        self.pool.bytes(buffer)
    }

    fn in_memory(&self, layer: usize, offset: u64, len: usize) -> Option<InMemory<'_>> {
        if layer == 0 {
            let (bytes, there) = self.memory.as_ref()?.bytes(offset, len)?;
            return Some(InMemory { bytes, _there: Some(there) });
        }
        // Who makes holes in what is frozen makes them where nobody looks: a layer above has it all, or
        // the queues stood still for a moment and know that it has gone.
        let bytes = self.below[layer - 1].memory.as_ref()?.bytes(offset, len)?;
        Some(InMemory { bytes, _there: None })
    }

    fn expect(&self, layer: usize, offset: u64, len: usize) {
        let bytes = match layer {
            0 => self.memory.as_ref().and_then(|memory| memory.glance(offset, len)),
            _ => self.below[layer - 1].memory.as_ref().and_then(|memory| memory.bytes(offset, len)),
        };
        // A prefetch does not fault.
        if let Some(bytes) = bytes {
            prefetch(&bytes);
        }
    }

    fn has_room(&self) -> bool {
        // What was read inline from one layer may have to be read through the ring from the next.
        let owed = if self.below.is_empty() { 0 } else { self.events.len() };
        self.free_slots.len() > owed
    }

    fn in_flight(&self) -> usize {
        self.depth - self.free_slots.len()
    }

    fn submit(&mut self, tag: u64, op: Op) {
        if matches!(op, Op::Flush) && self.write_cache.as_ref().is_some_and(|cache| cache.is_off()) {
            return self.events.push_back(Event::Done { tag, buffer: None, result: Ok(()) });
        }
        let inline = match &op {
            Op::ReadBelow { layer, .. } => self.below[layer - 1].inline,
            _ => self.inline,
        };
        if inline { self.run_inline(tag, op) } else { self.start(tag, op) }
    }

    fn watch(&mut self, token: u32, fd: RawFd) {
        let serial = self.ring.next_serial();
        self.watches.push(Watch { token, serial, fd });
        self.push(poll(serial, fd));
    }

    fn unwatch(&mut self, token: u32) {
        let Some(index) = self.watches.iter().position(|w| w.token == token) else { return };
        let watch = self.watches.swap_remove(index);
        self.end(watch.serial);
        self.events.retain(
            |e| !matches!(e, Event::Ready { token: t } | Event::Unwatched { token: t } if *t == token),
        );
    }

    fn wait(&mut self, wait: Wait) -> io::Result<()> {
        let wait = if self.events.is_empty() { wait } else { Wait::Poll };
        self.enter(wait)?;
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
        // What has been read is to be written back, before anybody looks for other work.
        if self.rewriting.is_some() && !self.ring.submission().is_empty() {
            self.enter(Wait::Poll)?;
        }
        Ok(())
    }

    fn is_ready(&mut self) -> bool {
        !self.events.is_empty() || !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }
}

impl Drop for FileQueue {
    fn drop(&mut self) {
        for slot in self.rewriting.iter_mut().flat_map(Rewriting::close) {
            self.pending[slot as usize] = None;
            self.free_slots.push(slot);
        }
        // The kernel may still write into the pool: nothing may be freed before it has let go of all of it.
        while self.in_flight() > 0 {
            if let Err(e) = self.enter(Wait::Event) {
                log::error!("waiting for requests in flight: {e}");
                std::process::abort();
            }
            self.reap();
        }
        nothing_in_flight(&self.file);
        // The ring may serve another queue of this thread.
        if let Err(e) = self.end_watches() {
            log::error!("giving up watches: {e}");
        }
        self.ring.forget(self.registered);
    }
}

/// Registers the pool, so that the kernel need not look its pages up for each request. It may be refused by
/// RLIMIT_MEMLOCK; then it goes without.
fn register(ring: &IoUring, pool: &Pool) -> bool {
    // SAFETY: the pool outlives the ring (field order and drop of FileQueue).
    match unsafe { ring.submitter().register_buffers(&[pool.iovec()]) } {
        Ok(()) => true,
        Err(e) => {
            log::info!("bounce buffers are not registered: {}", ring::explained(e));
            false
        }
    }
}

fn poll(serial: u32, fd: RawFd) -> squeue::Entry {
    let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
    entry.user_data(WATCH | u64::from(serial))
}

#[cfg(test)]
mod tests;
