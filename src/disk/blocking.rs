//! Queues for whoever has nothing to do but wait for them: copies, transfers, the flush at the end.

use crate::backing::Buffer;
use crate::disk::guest::GuestData;
use crate::disk::queue::{DiskQueue, Event};
use crate::reactor::Wait;
use crate::virtio::Segment;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// An operation has ended, with its buffer if it had one.
struct Done(Option<Buffer>);

impl DiskQueue {
    /// Waits for the next operation to end, and returns its buffer, if it had one.
    fn next_done(&mut self) -> io::Result<Option<Buffer>> {
        loop {
            match self.done()? {
                Some(Done(buffer)) => return Ok(buffer),
                None => self.wait(Wait::Event)?,
            }
        }
    }

    /// What has ended by now, if something has.
    fn done(&mut self) -> io::Result<Option<Done>> {
        while let Some(event) = self.next_event() {
            let Event::Done { buffer, result, .. } = event else { continue };
            return match result {
                Ok(()) => Ok(Some(Done(buffer))),
                Err(e) => {
                    buffer.into_iter().for_each(|buffer| self.free(buffer));
                    Err(e)
                }
            };
        }
        Ok(None)
    }

    /// Reads from `sector` by way of `buffer` into `guest`, and waits for it. Nothing else is in flight.
    /// Returns whether it was done: not if the read waits for what may take long, and `stop` is said.
    fn read_and_wait<M>(
        &mut self,
        sector: u64,
        buffer: Buffer,
        guest: GuestData<'_, M>,
        stop: &AtomicBool,
    ) -> io::Result<bool>
    where
        M: GuestMemory,
        M::Bitmap: for<'b> WithBitmapSlice<'b, S = ()>,
    {
        self.read(0, sector, buffer);
        loop {
            match self.done()? {
                Some(Done(Some(buffer))) => {
                    if self.deliver(0, sector, buffer, GuestData { ..guest })? {
                        return Ok(true);
                    }
                }
                Some(Done(None)) => {}
                None if stop.load(Ordering::Relaxed) && !self.take_back().is_empty() => return Ok(false),
                // Whoever waits for what may take long is woken now and then.
                None => self.wait(Wait::Event)?,
            }
        }
    }

    /// Makes everything durable whose writing has ended, and waits for it. Nothing is in flight.
    pub(crate) fn flush_and_wait(&mut self) -> io::Result<()> {
        self.flush(0)?;
        let result = self.next_done().map(drop);
        self.flushed(result)
    }
}

/// A queue, and the memory in which plaintext lies on its way to the disk or from it.
pub(crate) struct WaitingQueue {
    queue: DiskQueue,
    memory: Scratch,
    /// Writes that have begun and whose end nobody has waited for.
    in_flight: usize,
}

impl WaitingQueue {
    /// One whose memory has room for `len` bytes: no more than one buffer of the queue.
    pub(crate) fn new(queue: DiskQueue, len: usize) -> io::Result<Self> {
        Ok(WaitingQueue { queue, memory: Scratch::new(len)?, in_flight: 0 })
    }

    /// The memory, from address 0 on.
    pub(crate) fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory.memory
    }

    /// Waits until `len` bytes from `sector` can be read without waiting for what is still to come from
    /// elsewhere. Returns whether they can: not if `stop` is said.
    pub(crate) fn has_come(&mut self, sector: u64, len: usize, stop: &AtomicBool) -> io::Result<bool> {
        Ok(!self.queue.is_coming() || self.read_unless(sector, len, stop)?.is_some())
    }

    /// Reads `len` bytes from `sector` into the beginning of the memory. Returns the [place](Buffer::place)
    /// of the buffer that they came by; none if the read waits for what may take long, and `stop` is said. No
    /// write is in flight.
    pub(crate) fn read_unless(
        &mut self,
        sector: u64,
        len: usize,
        stop: &AtomicBool,
    ) -> io::Result<Option<usize>> {
        let buffer = self.queue.alloc(sector, len).ok_or_else(no_room)?;
        let place = buffer.place();
        let segments = [segment(0, len)];
        let guest = GuestData { mem: &self.memory.memory, segments: &segments, skip: 0 };
        let done = self.queue.read_and_wait(sector, buffer, guest, stop)?;
        Ok(done.then_some(place))
    }

    /// As [`WaitingQueue::read_unless`], to the end.
    pub(crate) fn read(&mut self, sector: u64, len: usize) -> io::Result<()> {
        self.read_unless(sector, len, &AtomicBool::new(false)).map(drop)
    }

    /// Whether the `i`-th sector of the last read, whose buffer was at `place`, came from
    /// a layer that is leaving.
    pub(crate) fn came_from_leaving(&self, place: usize, i: usize) -> bool {
        self.queue.came_from_leaving(place, i)
    }

    /// Begins to write `len` bytes of the memory, from its byte `start` on, at `sector`. Waits for
    /// room, and not for the end.
    pub(crate) fn write(&mut self, sector: u64, start: usize, len: usize) -> io::Result<()> {
        let buffer = loop {
            match self.queue.alloc(sector, len) {
                Some(buffer) => break buffer,
                None if self.in_flight == 0 => return Err(no_room()),
                None => self.finish_one()?,
            }
        };
        let segments = [segment(start, len)];
        let guest = GuestData { mem: &self.memory.memory, segments: &segments, skip: 0 };
        self.queue.write(0, sector, buffer, false, guest)?;
        self.in_flight += 1;
        Ok(())
    }

    /// Waits until all writes have ended.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        while self.in_flight > 0 {
            self.finish_one()?;
        }
        Ok(())
    }

    /// Waits until all writes have ended, and makes them durable.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.finish()?;
        self.queue.flush_and_wait()
    }

    fn finish_one(&mut self) -> io::Result<()> {
        self.in_flight -= 1;
        if let Some(buffer) = self.queue.next_done()? {
            self.queue.free(buffer);
        }
        Ok(())
    }
}

fn segment(start: usize, len: usize) -> Segment {
    Segment { addr: GuestAddress(start as u64), len: len as u32 }
}

fn no_room() -> io::Error {
    io::Error::other("a queue that nobody else uses has no room")
}

/// Memory for plaintext, to a [`DiskQueue`] a guest's. Wiped at the end.
struct Scratch {
    memory: GuestMemoryMmap<()>,
    len: usize,
}

impl Scratch {
    fn new(len: usize) -> io::Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]);
        Ok(Scratch { memory: memory.map_err(io::Error::other)?, len })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = self.memory.write_slice(&vec![0; self.len], GuestAddress(0)) {
            log::error!("wiping what was copied last: {e}");
        }
    }
}
