//! One thread's io_uring on a layer file: data, flushes, and the wake-ups that the thread waits for, all in one
//! ring, with few system calls a batch.

use crate::backing::file::memory::FileMemory;
use crate::backing::file::pool::{self, Pool};
use crate::backing::file::prefetch::prefetch;
use crate::backing::file::ring::Ring;
use crate::backing::file::write_cache::WriteCache;
use crate::backing::{Buffer, Event, Op, Queue, Wait};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::VolatileSlice;

/// Completion tags: an index into `pending`, or one of these with a watch's serial below it.
const WATCH: u64 = 1 << 32;
const CANCEL: u64 = 1 << 33;
const FILE: types::Fixed = types::Fixed(0);

/// Hole punching keeps the file's size in both cases.
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The kernel gets what waits for it when it is so many operations, or bytes, before another buffer is filled: a device
/// that takes requests one after the other would stand idle meanwhile. A call for each would cost more than it gains.
const EARLY_OPERATIONS: usize = 4;
const EARLY_BYTES: usize = 128 << 10;

/// How often an operation is submitted again that the kernel did not begin with.
const MAX_TRIES: u8 = 100;

/// An operation that the kernel has.
struct Pending {
    tag: u64,
    buffer: Option<Buffer>,
    /// Bytes it must transfer.
    expect: u32,
    /// What to do instead if the file system cannot keep the space: offset and length to punch.
    fallback: Option<(u64, u64)>,
    /// What the kernel was given, for another try, and how many there were.
    entry: squeue::Entry,
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
pub struct Reached {
    /// Its file. The top's is the queue's own; of those below all queues share one, since nothing is written through
    /// it, and so no error is told to one of them only.
    pub file: Arc<File>,
    /// Whether it is read and written by the queue's thread on the spot.
    pub inline: bool,
    /// Where the file is memory.
    pub memory: Option<Arc<FileMemory>>,
}

/// The queue. The ring comes before the pool: it must have forgotten the memory that it knows (drop sees to that), or
/// be gone, before that goes.
pub struct FileQueue {
    ring: Ring,
    pool: Pool,
    /// Whether the pool is registered as fixed buffer 0.
    registered: bool,
    file: Arc<File>,
    inline: bool,
    memory: Option<Arc<FileMemory>>,
    /// The layers below, which are only read, from the one right below the top.
    below: Vec<Reached>,
    /// Of a block device that is written past the page cache: whether it has a cache of its own.
    write_cache: Option<Arc<WriteCache>>,
    depth: usize,
    pending: Vec<Option<Pending>>,
    free_slots: Vec<u32>,
    watches: Vec<Watch>,
    /// Bytes to be moved by what was handed over since the kernel was entered.
    waiting_bytes: usize,
    /// Entries that found the submission queue full.
    backlog: VecDeque<squeue::Entry>,
    events: VecDeque<Event>,
}

impl FileQueue {
    /// A queue for at most `depth` operations at a time, to be used by the calling thread alone.
    pub fn new(top: Reached, below: Vec<Reached>, depth: u16) -> io::Result<Self> {
        let Reached { file, inline, memory } = top;
        let depth = usize::from(depth.max(1));
        let pool = Pool::new()?;
        // Room for watches and their removal beside the data.
        let ring = Ring::take(depth as u32 + 16)?;
        let files: Vec<_> = [&file].into_iter().chain(below.iter().map(|b| &b.file)).collect();
        ring.submitter().register_files(&files.iter().map(|f| f.as_raw_fd()).collect::<Vec<_>>())?;
        let by_ring = !inline || below.iter().any(|b| !b.inline);
        let registered = by_ring && register(&ring, &pool);
        Ok(FileQueue {
            ring,
            pool,
            registered,
            file,
            inline,
            memory,
            below,
            write_cache: None,
            depth,
            pending: (0..depth).map(|_| None).collect(),
            free_slots: (0..depth as u32).rev().collect(),
            watches: Vec::new(),
            waiting_bytes: 0,
            backlog: VecDeque::new(),
            events: VecDeque::with_capacity(2 * depth),
        })
    }

    /// The same, over a device whose flushes are needed only while it has a cache.
    pub fn with_write_cache(mut self, write_cache: Option<Arc<WriteCache>>) -> Self {
        self.write_cache = write_cache;
        self
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
        let nothing = opcode::Nop::new().build();
        let mut pending = Pending { tag, buffer: None, expect: 0, fallback: None, entry: nothing, tries: 0 };
        let entry = match op {
            Op::Read { offset, buffer } => {
                let (ptr, len) = (self.pool.ptr(&buffer), buffer.len);
                pending.expect = len;
                pending.buffer = Some(buffer);
                if self.registered {
                    opcode::ReadFixed::new(FILE, ptr, len, 0).offset(offset).build()
                } else {
                    opcode::Read::new(FILE, ptr, len).offset(offset).build()
                }
            }
            Op::ReadBelow { layer, offset, part, buffer } => {
                // The kernel gets its place: it must lie in the buffer.
                assert!(part.start <= part.end && part.end <= buffer.len(), "a part of the buffer is filled");
                let (ptr, len) = (self.pool.ptr(&buffer).wrapping_add(part.start), part.len() as u32);
                pending.expect = len;
                pending.buffer = Some(buffer);
                let file = types::Fixed(layer as u32);
                if self.registered {
                    opcode::ReadFixed::new(file, ptr, len, 0).offset(offset).build()
                } else {
                    opcode::Read::new(file, ptr, len).offset(offset).build()
                }
            }
            Op::Write { offset, buffer, durable } => {
                let (ptr, len) = (self.pool.ptr(&buffer), buffer.len);
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                pending.expect = len;
                pending.buffer = Some(buffer);
                if self.registered {
                    opcode::WriteFixed::new(FILE, ptr, len, 0).offset(offset).rw_flags(flags).build()
                } else {
                    opcode::Write::new(FILE, ptr, len).offset(offset).rw_flags(flags).build()
                }
            }
            Op::Flush => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            Op::Zero { offset, len, keep_space } => {
                pending.fallback = keep_space.then_some((offset, len));
                fallocate(offset, len, if keep_space { ZERO } else { PUNCH })
            }
        };
        pending.entry = entry.user_data(u64::from(slot));
        self.waiting_bytes += pending.expect as usize;
        self.submit_again(slot, pending);
    }

    /// Lets the kernel have what waits, if that is worth a call: the device is at work on it while more is prepared.
    fn begin_early(&mut self) {
        if self.ring.submission().len() >= EARLY_OPERATIONS || self.waiting_bytes >= EARLY_BYTES {
            // What it refuses now is asked for again with the next wait, which says so.
            let _ = self.enter(Wait::Poll);
        }
    }

    /// Does the operation now, by this thread.
    fn run_inline(&mut self, tag: u64, op: Op) {
        let (buffer, result) = match op {
            Op::Read { offset, mut buffer } => {
                let result = self.file.read_exact_at(self.pool.bytes(&mut buffer), offset);
                (Some(buffer), result)
            }
            Op::ReadBelow { layer, offset, part, mut buffer } => {
                let bytes = &mut self.pool.bytes(&mut buffer)[part];
                let result = self.below[layer - 1].file.read_exact_at(bytes, offset);
                (Some(buffer), result)
            }
            Op::Write { offset, mut buffer, durable } => {
                let result = self.file.write_all_at(self.pool.bytes(&mut buffer), offset);
                if let (Ok(()), Some(memory)) = (&result, &self.memory) {
                    memory.written(offset, buffer.len.into());
                }
                let sync = |()| if durable { self.file.sync_data() } else { Ok(()) };
                (Some(buffer), result.and_then(sync))
            }
            Op::Flush => (None, self.file.sync_data()),
            Op::Zero { offset, len, .. } => {
                use nix::fcntl::{FallocateFlags, fallocate};
                let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let result = fallocate(&*self.file, mode, offset as i64, len as i64);
                if let Some(memory) = &self.memory {
                    memory.given_back(offset, len);
                }
                (None, result.map_err(io::Error::from))
            }
        };
        self.events.push_back(Event::Done { tag, buffer, result });
    }

    /// Turns what the kernel completed into events.
    fn reap(&mut self) {
        loop {
            // One entry at a time leaves `self` free for what it causes; the ring's head moves with each.
            let Some(entry) = self.ring.completion().next() else { return };
            match entry.user_data() {
                slot if slot < WATCH => self.complete(slot as u32, entry.result()),
                token if token & CANCEL != 0 => {}
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
        if let (libc::EOPNOTSUPP, Some((offset, len))) = (-result, pending.fallback.take()) {
            pending.entry = fallocate(offset, len, PUNCH).user_data(u64::from(slot));
            return self.submit_again(slot, pending);
        }
        self.free_slots.push(slot);
        let result = match u32::try_from(result) {
            Ok(n) if n == pending.expect => Ok(()),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        };
        self.events.push_back(Event::Done { tag: pending.tag, buffer: pending.buffer, result });
    }

    fn submit_again(&mut self, slot: u32, pending: Pending) {
        self.push(pending.entry.clone());
        self.pending[slot as usize] = Some(pending);
    }

    fn woken(&mut self, serial: u32, entry: &cqueue::Entry) {
        let Some(index) = self.watches.iter().position(|w| w.serial == serial) else { return };
        let Watch { token, fd, .. } = self.watches[index];
        if entry.result() >= 0 {
            self.events.push_back(Event::Ready { token });
        }
        if cqueue::more(entry.flags()) {
            return;
        }
        // A multishot poll ends when the completion queue overflows (then it is set up again) or with an error.
        if entry.result() >= 0 {
            self.push(poll(serial, fd));
        } else {
            self.watches.swap_remove(index);
            self.events.push_back(Event::Unwatched { token });
        }
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
    fn alloc(&mut self, len: usize) -> Option<Buffer> {
        self.begin_early();
        self.pool.alloc(len)
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

    fn in_memory(&self, layer: usize, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let memory = if layer == 0 { &self.memory } else { &self.below[layer - 1].memory };
        memory.as_ref()?.bytes(offset, len)
    }

    fn expect(&self, layer: usize, offset: u64, len: usize) {
        if let Some(bytes) = self.in_memory(layer, offset, len) {
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
        // The poll holds the file by itself, and completions of a watch that is not in the list are dropped,
        // so there is nothing to wait for.
        let cancel = opcode::PollRemove::new(WATCH | u64::from(watch.serial)).build();
        self.push(cancel.user_data(CANCEL));
        self.events.retain(
            |e| !matches!(e, Event::Ready { token: t } | Event::Unwatched { token: t } if *t == token),
        );
    }

    fn wait(&mut self, wait: Wait) -> io::Result<()> {
        let wait = if self.events.is_empty() { wait } else { Wait::Poll };
        self.enter(wait)?;
        self.reap();
        // The kernel brings in about twenty completions at a time. What has completed together goes on together: a driver
        // that is shown a part answers with a part, and from then on the device gets parts.
        for _ in 0..self.depth / 16 {
            if !self.ring.submission().taskrun() {
                break;
            }
            self.enter(Wait::Poll)?;
            self.reap();
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
        // The kernel may still write into the pool: nothing may be freed before it has let go of all of it.
        while self.in_flight() > 0 {
            if let Err(e) = self.enter(Wait::Event) {
                log::error!("waiting for requests in flight: {e}");
                std::process::abort();
            }
            self.reap();
        }
        // The ring may serve another queue of this thread.
        while let Some(watch) = self.watches.first() {
            self.unwatch(watch.token);
        }
        if let Err(e) = self.enter(Wait::Poll) {
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
            log::info!("bounce buffers are not registered with io_uring: {e}");
            false
        }
    }
}

fn poll(serial: u32, fd: RawFd) -> squeue::Entry {
    let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
    entry.user_data(WATCH | u64::from(serial))
}

fn fallocate(offset: u64, len: u64, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(FILE, len).offset(offset).mode(mode).build()
}

#[cfg(test)]
mod tests;
