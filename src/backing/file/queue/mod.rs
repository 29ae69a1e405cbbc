//! One thread's way to the layers of a volume: operations, by the thread's io_uring for those on a disk, on
//! the spot for files that are memory, and by exports for what lies behind NBD servers.

mod inline;
mod remote;
mod rewrite;
mod work;

use crate::backing::file::memory::{FileMemory, User};
use crate::backing::file::nothing_in_flight;
use crate::backing::file::prefetch::prefetch;
use crate::backing::file::turns::Turns;
use crate::backing::file::write_cache::WriteCache;
use crate::backing::nbd::Export;
use crate::backing::{Buffer, Done, InMemory, NotBegun, Op, Queue};
use crate::reactor::pool::{self, Pool};
use crate::reactor::{Files, Token, Uring};
use remote::Remote;
use rewrite::{Rewriting, SPARE};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use work::{Left, Move, PUNCH, TOP, Way, Work, ZERO};

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

#[cfg(test)]
impl Reached {
    /// All of a file, by io_uring.
    pub(super) fn whole(file: Arc<File>, unit: u32) -> Self {
        Reached { file, start: 0, is_device: false, inline: false, export: None, memory: None, unit }
    }
}

/// The queue.
pub(super) struct FileQueue {
    /// The layers' files as the kernel knows them, the top's first.
    files: Files,
    pool: Rc<Pool>,
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
    done: VecDeque<Done>,
}

impl FileQueue {
    /// A queue for at most `depth` operations at a time, by the io_uring of the calling thread.
    pub(super) fn new(uring: &Rc<Uring>, top: Reached, below: Vec<Reached>, depth: u16) -> io::Result<Self> {
        let Reached { file, start, is_device, inline, export, memory, unit } = top;
        let exports = [export].into_iter().chain(below.iter().map(|b| b.export.clone())).collect();
        let remote = Remote::new(uring, exports)?;
        let unaligned = u64::from(below.iter().map(|b| b.unit).fold(unit, u32::max)) - 1;
        let depth = usize::from(depth.max(1));
        let by_ring = !inline || below.iter().any(|b| !b.inline);
        let (pool, registered) = uring.pool(by_ring)?;
        let files = [&file].into_iter().chain(below.iter().map(|b| &b.file));
        let files = Files::new(uring.clone(), &files.map(|file| file.as_raw_fd()).collect::<Vec<_>>())?;
        Ok(FileQueue {
            files,
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
            done: VecDeque::with_capacity(2 * depth),
        })
    }

    /// This queue, over a device whose flushes are needed only while the device has a cache.
    pub(super) fn with_write_cache(mut self, write_cache: Option<Arc<WriteCache>>) -> Self {
        self.write_cache = write_cache;
        self
    }

    /// This queue, over a top layer of which blocks are written in part, in turn with the other queues.
    pub(super) fn with_turns(mut self, uring: &Rc<Uring>, turns: Option<Arc<Turns>>) -> io::Result<Self> {
        self.rewriting = turns.map(|turns| Rewriting::new(uring, turns, self.depth)).transpose()?;
        Ok(self)
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
        self.submit_again(slot, pending);
    }

    /// What is to be moved for a part of a buffer: whole units of the layer.
    fn move_of(&self, way: Way, file: u32, offset: u64, buffer: &Buffer, part: Range<usize>) -> Move {
        // The kernel gets its place: it must lie in the buffer.
        assert!(part.start <= part.end && part.end <= buffer.len(), "a part of the buffer is moved");
        let unit = if file == TOP { self.unit } else { self.below[file as usize - 1].unit };
        let before = (offset % u64::from(unit)) as usize;
        let start = (buffer.skip() + part.start).checked_sub(before);
        let start = start.expect("the buffer was made for this offset");
        let len = (before + part.len()).next_multiple_of(unit as usize);
        let (offset, span) = (offset - before as u64, self.pool.span(buffer, start, len));
        let need = match way {
            Way::Read => before + part.len(),
            Way::Write { .. } => len,
        };
        Move { way, file, offset, span, need: need as u32, unit }
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
        let Some(rewriting) = &mut self.rewriting else { return self.finish(slot, pending, result) };
        let result = match rewriting.is_reading(slot) {
            true => result.map_err(|e| io::Error::new(e.kind(), NotBegun(e))),
            false => result,
        };
        if let Some(next) = rewriting.after(slot, result.is_ok()) {
            pending.tries = 0;
            self.pending[slot as usize] = Some(pending);
            return self.go_on(slot, Some(next));
        }
        self.finish(slot, pending, result);
    }

    fn finish(&mut self, slot: u32, pending: Pending, result: io::Result<()>) {
        self.free_slots.push(slot);
        self.done.push_back(Done { tag: pending.tag, buffer: pending.buffer, result });
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
        let entry = pending.work.entry(&self.files, &self.pool, self.registered, start);
        // SAFETY: it refers to bytes of the pool, whose buffer is kept in `pending` until the completion is
        // seen, and which outlives that (drop waits for all completions); or to no memory.
        unsafe { self.files.push(slot, entry, pending.work.bytes()) };
        self.pending[slot as usize] = Some(pending);
    }

    /// Waits until nothing is in flight.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            self.take_answers();
            self.collect()?;
            if self.in_flight() == 0 {
                return Ok(());
            }
            self.files.uring().wait_for_completion()?;
        }
    }
}

impl Queue for FileQueue {
    fn alloc(&mut self, offset: u64, len: usize) -> Option<Buffer> {
        self.files.uring().begin_early();
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

    fn bytes<'a>(&'a mut self, buffer: &'a mut Buffer) -> &'a mut [u8] {
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
        let owed = if self.below.is_empty() { 0 } else { self.done.len() };
        self.free_slots.len() > owed
    }

    fn in_flight(&self) -> usize {
        self.depth - self.free_slots.len()
    }

    fn submit(&mut self, tag: u64, op: Op) {
        if matches!(op, Op::Flush) && self.write_cache.as_ref().is_some_and(|cache| cache.is_off()) {
            return self.done.push_back(Done { tag, buffer: None, result: Ok(()) });
        }
        let inline = match &op {
            Op::ReadBelow { layer, .. } => self.below[layer - 1].inline,
            _ => self.inline,
        };
        if inline { self.run_inline(tag, op) } else { self.start(tag, op) }
    }

    fn collect(&mut self) -> io::Result<()> {
        while let Some((slot, result)) = self.files.next_completed() {
            self.complete(slot, result);
        }
        // What has been read is to be written back, before anybody looks for other work.
        if self.rewriting.is_some() { self.files.uring().submit() } else { Ok(()) }
    }

    fn woken(&mut self, token: Token) -> bool {
        if self.rewriting.as_ref().is_some_and(|rewriting| rewriting.is_woken_by(token)) {
            self.take_turns();
        } else if self.remote.as_ref().is_some_and(|remote| remote.is_woken_by(token)) {
            self.take_answers();
        } else {
            return false;
        }
        true
    }

    fn has_done(&self) -> bool {
        !self.done.is_empty() || self.files.has_completed()
    }

    fn next_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }
}

impl Drop for FileQueue {
    fn drop(&mut self) {
        for slot in self.rewriting.iter_mut().flat_map(Rewriting::close) {
            self.pending[slot as usize] = None;
            self.free_slots.push(slot);
        }
        // The kernel may still write into the pool: nothing may be freed before it has let go of all of it.
        if let Err(e) = self.drain() {
            log::error!("waiting for requests in flight: {e}");
            std::process::abort();
        }
        nothing_in_flight(&self.file);
    }
}

#[cfg(test)]
mod tests;
