//! One thread's way to a disk: data between guest memory and the layers, zeros, flushes,
//! and what wakes the thread.

use crate::backing::{Done, NotBegun, Op, Queue};
use crate::base::space::is_for_space;
use crate::disk::Disk;
use crate::disk::cipher_time::{CipherTime, Measured};
use crate::disk::durability::Durability;
use crate::disk::fence::{Fence, OpenLane};
use crate::disk::guest::{GuestData, may_have_holes};
use crate::disk::layered::{Action, Layered, Part};
use crate::reactor::{Buffer, Reactor, Wait, Watched, Woken};
use crate::virtio::SECTOR_SIZE;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::{GuestMemory, Permissions};

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// An operation on the disk ended.
    Done {
        /// The tag it was submitted with.
        tag: u64,
        /// Its buffer, if it had one.
        buffer: Option<Buffer>,
        /// Whether it was done in full.
        result: io::Result<()>,
    },
    /// A watch of the thread's has told something.
    Woken(Woken),
}

/// One thread's way to the disk. Sectors and lengths were checked against the shape by whoever calls.
pub struct DiskQueue {
    disk: Arc<Disk>,
    queue: Box<dyn Queue>,
    /// The backing's unit.
    unit: u64,
    /// Where there are several layers.
    layered: Option<Layered>,
    /// Where somebody may copy what is below into the top. It goes after the queue.
    lane: Option<Lane>,
    reactor: Rc<dyn Reactor>,
    /// What watches have told that are not this queue's.
    woken: VecDeque<Woken>,
    cipher_time: CipherTime,
    /// Bytes that were delivered since the last wait.
    delivered: usize,
}

/// A lane, and the watch that wakes the thread when a copy has left what it was refused.
struct Lane {
    open: OpenLane,
    woken: Watched,
}

impl DiskQueue {
    /// A queue that keeps out of the way of whoever copies behind `fence`.
    pub(super) fn open(
        disk: &Arc<Disk>,
        reactor: &Rc<dyn Reactor>,
        depth: u16,
        fence: Option<&Arc<Fence>>,
    ) -> io::Result<Self> {
        let queue = disk.backing.open_queue(reactor, depth)?;
        let layered = disk.map.clone().map(|map| Layered::new(map, queue.places()));
        let lane = fence.map(|fence| fence.open(queue.places())).transpose()?;
        let lane = lane.map(|open| Lane { woken: Watched::new(reactor, open.wake_fd()), open });
        let unit = disk.backing.caps().unit;
        let (disk, reactor, cipher_time) = (disk.clone(), reactor.clone(), CipherTime::default());
        let woken = VecDeque::new();
        Ok(DiskQueue { disk, queue, unit, layered, lane, reactor, woken, cipher_time, delivered: 0 })
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// How many of `len` bytes at `sector` to transfer at a time: as many as a buffer can have, and where
    /// that is not all, no part of one of the backing's units, which would have to be brought together again.
    pub fn piece(&self, sector: u64, len: u64) -> usize {
        let most = self.queue.max_buffer() as u64;
        if len <= most {
            return len as usize;
        }
        let end = sector * SECTOR_SIZE + most;
        (most - end % self.unit) as usize
    }

    /// A buffer of `len` bytes for what is at `sector`, if there is one and another operation may be
    /// submitted there. Where there is none, there may be one after the next [`DiskQueue::wait`].
    pub fn alloc(&mut self, sector: u64, len: usize) -> Option<Buffer> {
        if !self.queue.has_room() {
            return None;
        }
        let buffer = self.queue.alloc(sector * SECTOR_SIZE, len)?;
        if let Some(lane) = &self.lane
            && !lane.open.enter(buffer.place(), sector..sector + len as u64 / SECTOR_SIZE)
        {
            self.queue.free(buffer);
            return None;
        }
        Some(buffer)
    }

    /// Gives a buffer back.
    pub fn free(&mut self, buffer: Buffer) {
        if let Some(lane) = &self.lane {
            lane.open.leave(buffer.place());
        }
        self.queue.free(buffer);
    }

    /// Takes reads back that wait for what may take long, with their tags and lengths: each is to be begun
    /// anew with [`DiskQueue::read`].
    pub(crate) fn take_back(&mut self) -> Vec<(u64, usize)> {
        let taken = self.queue.take_back().into_iter();
        let taken: Vec<_> = taken.map(|(tag, buffer)| (tag, buffer.len(), buffer)).collect();
        let free = |(tag, len, buffer)| {
            self.free(buffer);
            (tag, len)
        };
        taken.into_iter().map(free).collect()
    }

    /// Whether reads may have to wait for what is still to come from elsewhere.
    pub(crate) fn is_coming(&self) -> bool {
        self.queue.is_coming()
    }

    /// Whether a read waits for what does not come at the moment.
    pub(crate) fn waits_in_vain(&self) -> bool {
        self.queue.waits_in_vain()
    }

    /// Reads that wait for what does not come at the moment fail from now on.
    pub(crate) fn stop_waiting(&mut self) {
        self.queue.stop_waiting();
    }

    /// Whether another operation may be submitted.
    pub fn has_room(&self) -> bool {
        self.queue.has_room()
    }

    /// Operations that were submitted and have caused no event yet.
    pub fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    /// Reads ciphertext from `sector` into `buffer`; at its completion, [`DiskQueue::deliver`] it.
    pub fn read(&mut self, tag: u64, sector: u64, buffer: Buffer) {
        match &mut self.layered {
            None => self.queue.submit(tag, Op::Read { offset: sector * SECTOR_SIZE, buffer }),
            Some(layered) => layered.begin(&self.disk, &mut *self.queue, tag, sector, buffer),
        }
    }

    /// A read of `len` bytes from `sector` will come soon: what it needs can be on its way meanwhile.
    pub fn expect(&self, sector: u64, len: u64) {
        if let Some(height) = self.only_height(sector, len) {
            self.queue.expect(self.layer_at(height), sector * SECTOR_SIZE, len as usize);
        }
    }

    /// The height of the one layer that has all of it, if that is known.
    fn only_height(&self, sector: u64, len: u64) -> Option<u8> {
        match &self.layered {
            None => Some(self.disk.height()),
            Some(layered) => Some(layered.topmost(&self.disk, sector, len)).filter(|&height| height > 0),
        }
    }

    /// A layer as the backing counts: 0 is the top.
    fn layer_at(&self, height: u8) -> usize {
        usize::from(self.disk.height() - height)
    }

    /// Reads `len` bytes from `sector` into guest memory at once, where one layer has all of them and is
    /// memory; returns whether that was so. Otherwise [`DiskQueue::read`] has to do it.
    pub fn read_now<M>(&self, sector: u64, len: u64, guest: GuestData<'_, M>) -> io::Result<bool>
    where
        M: GuestMemory,
        M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
    {
        let Some(lane) = &self.lane else { return self.read_from_memory(sector, len, guest) };
        let no_buffer = usize::MAX;
        if !lane.open.enter(no_buffer, sector..sector + len / SECTOR_SIZE) {
            return Ok(false);
        }
        let done = self.read_from_memory(sector, len, guest);
        lane.open.leave(no_buffer);
        done
    }

    fn read_from_memory<M>(&self, sector: u64, len: u64, guest: GuestData<'_, M>) -> io::Result<bool>
    where
        M: GuestMemory,
        M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
    {
        let Some(height) = self.only_height(sector, len) else { return Ok(false) };
        let layer = self.layer_at(height);
        let Some(found) = self.queue.in_memory(layer, sector * SECTOR_SIZE, len as usize) else {
            return Ok(false);
        };
        let bytes = found.bytes;
        match self.disk.cipher_at(height) {
            // What looks like zeros may be in a layer below.
            None if self.layered.is_some() && may_have_holes(&bytes) => Ok(false),
            Some(cipher) => self.cipher_time.of(len as usize, || {
                let block = self.disk.shape.block_size;
                let done = guest.decrypt_written(cipher.as_ref(), bytes, sector, block)?;
                Ok(done == len as usize)
            }),
            None => {
                guest.each(bytes.len(), Permissions::Write, |slice, at| {
                    if let Ok(from) = bytes.subslice(at, slice.len()) {
                        from.copy_to_volatile_slice(slice);
                    }
                })?;
                Ok(true)
            }
        }
    }

    /// Encrypts `buffer.len()` bytes of guest data, the first `skip` bytes of it left out, and writes them at
    /// `sector`.
    pub fn write<M>(
        &mut self,
        tag: u64,
        sector: u64,
        mut buffer: Buffer,
        durable: bool,
        guest: GuestData<'_, M>,
    ) -> io::Result<()>
    where
        M: GuestMemory,
        M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
    {
        let bytes = self.queue.bytes(&mut buffer);
        let taken = match &self.disk.cipher {
            Some(cipher) => self.cipher_time.of(bytes.len(), || {
                guest.encrypt_into(cipher.as_ref(), bytes, sector, self.disk.shape.block_size)
            }),
            None => guest.copy_into(bytes),
        };
        if let Err(e) = taken {
            self.free(buffer);
            return Err(e);
        }
        self.submit_write(tag, sector, buffer, durable);
        Ok(())
    }

    /// Whether the `i`-th sector of the last read, whose buffer was at `place`, came from a layer that is
    /// leaving.
    pub(crate) fn came_from_leaving(&self, place: usize, i: usize) -> bool {
        self.layered.as_ref().is_some_and(|layered| layered.came_from_leaving(place, i))
    }

    /// Decrypts what was read for [`DiskQueue::read`] into guest memory, and gives the buffer back. Returns
    /// whether that was all: if not, the buffer has gone on to another layer, and there will be another
    /// event with the same tag.
    pub fn deliver<M>(
        &mut self,
        tag: u64,
        sector: u64,
        mut buffer: Buffer,
        guest: GuestData<'_, M>,
    ) -> io::Result<bool>
    where
        M: GuestMemory,
        M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
    {
        let place = buffer.place();
        let bytes = self.queue.bytes(&mut buffer);
        self.delivered += bytes.len();
        let done = match (&mut self.layered, &self.disk.cipher) {
            (Some(layered), _) => {
                self.cipher_time.of(bytes.len(), || layered.deliver(&self.disk, bytes, place, sector, guest))
            }
            (None, Some(cipher)) => self.cipher_time.of(bytes.len(), || {
                let block = self.disk.shape.block_size;
                guest.decrypt_from(cipher.as_ref(), bytes, sector, block).map(|()| true)
            }),
            (None, None) => guest.copy_from(bytes).map(|()| true),
        };
        match (done, &mut self.layered) {
            (Ok(false), Some(layered)) => {
                layered.go_on(&self.disk, &mut *self.queue, tag, sector, buffer);
                Ok(false)
            }
            (done, _) => {
                self.free(buffer);
                done
            }
        }
    }

    /// Starts a flush; its result goes through [`DiskQueue::flushed`]. Refused at once after one has failed.
    pub fn flush(&mut self, tag: u64) -> io::Result<()> {
        if self.disk.durability.has_failed() {
            return Err(Durability::refusal());
        }
        self.queue.submit(tag, Op::Flush);
        Ok(())
    }

    /// What a finished flush means: once failed, always failed.
    pub fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        if let Err(e) = &result {
            self.disk.durability.fail(e);
        }
        if self.disk.durability.has_failed() {
            return Err(Durability::refusal());
        }
        result
    }

    /// What a finished write means. A durable one syncs, and the kernel reports a write-back that failed once
    /// only, to whoever syncs next: the error may be that of writes which had completed before.
    pub fn written(&self, durable: bool, result: io::Result<()>) -> io::Result<()> {
        match &result {
            // For want of room nothing else is lost.
            Err(e) if is_for_space(e) || e.kind() == io::ErrorKind::WriteZero => result,
            Err(e) if e.get_ref().is_some_and(|e| e.is::<NotBegun>()) => result,
            Err(_) if durable => self.flushed(result),
            _ => result,
        }
    }

    fn submit_write(&mut self, tag: u64, sector: u64, buffer: Buffer, durable: bool) {
        let offset = sector * SECTOR_SIZE;
        if let Some(layered) = &self.layered {
            layered.map().mark(offset..offset + buffer.len() as u64, self.disk.height());
        }
        self.queue.submit(tag, Op::Write { offset, buffer, durable });
    }

    /// Begins to make `count` sectors read as zeros, or to discard them. One call may do with a part of
    /// them: the answer says how many are seen to, and whether an operation was submitted for them.
    /// `None`: there is no room yet.
    pub fn zero(&mut self, tag: u64, sector: u64, count: u64, how: Zeroing) -> Option<Zeroed> {
        let most = self.queue.max_buffer() as u64 / SECTOR_SIZE;
        let part = match &self.layered {
            None => Part { sectors: count, action: Action::Punch },
            Some(layered) => layered.first_part(&self.disk, sector, count, most, how),
        };
        let mut part = self.whole_units(sector, part, how);
        if how == Zeroing::Discard && part.action == Action::Punch && !self.disk.backing.caps().gives_back {
            part.action = Action::Nothing;
        }
        let (offset, len) = (sector * SECTOR_SIZE, part.sectors * SECTOR_SIZE);
        match part.action {
            Action::Nothing => return Some(Zeroed { sectors: part.sectors, submitted: false }),
            Action::Punch if !self.queue.has_room() => return None,
            Action::Punch => {
                let keep_space = how == Zeroing::KeepSpace;
                self.queue.submit(tag, Op::Zero { offset, len, keep_space });
            }
            Action::Clear => {
                let mut buffer = self.alloc(sector, len as usize)?;
                self.queue.bytes(&mut buffer).fill(0);
                // The layer gets nothing by it: there is nothing to mark.
                self.queue.submit(tag, Op::Write { offset, buffer, durable: false });
            }
            Action::Write => {
                let mut buffer = self.alloc(sector, len as usize)?;
                let bytes = self.queue.bytes(&mut buffer);
                bytes.fill(0);
                if let Some(cipher) = &self.disk.cipher {
                    cipher.encrypt_in_place(bytes, sector);
                }
                self.submit_write(tag, sector, buffer, false);
            }
        }
        Some(Zeroed { sectors: part.sectors, submitted: true })
    }

    /// The backing makes holes of whole units. Where `part` begins or ends within one, the first of it is
    /// cleared, or left as it is if nothing is asked of it.
    fn whole_units(&self, sector: u64, part: Part, how: Zeroing) -> Part {
        let (unit, n) = (self.unit / SECTOR_SIZE, part.sectors);
        if part.action != Action::Punch || (sector | n).is_multiple_of(unit) {
            return part;
        }
        let (sectors, is_whole) = match sector % unit {
            0 if n >= unit => (n - n % unit, true),
            0 => (n, false),
            into => (n.min(unit - into), false),
        };
        let action = match how {
            _ if is_whole => Action::Punch,
            Zeroing::Discard => Action::Nothing,
            Zeroing::Unmap | Zeroing::KeepSpace => Action::Clear,
        };
        Part { sectors, action }
    }

    /// How long the cipher took, of what was measured since the last call, if anything was.
    #[inline]
    pub fn take_cipher_time(&self) -> Option<Measured> {
        self.cipher_time.take()
    }

    /// Bytes that went through [`DiskQueue::deliver`] since the last [`DiskQueue::wait`].
    pub fn delivered(&self) -> usize {
        self.delivered
    }

    /// Submits what was handed over and waits as `wait` says; see [`Reactor::wait`].
    pub fn wait(&mut self, wait: Wait) -> io::Result<()> {
        self.delivered = 0;
        self.reactor.wait(if self.has_event() { Wait::Poll } else { wait })?;
        while let Some(woken) = self.reactor.next_woken() {
            self.take_in(woken);
        }
        self.queue.collect()
    }

    /// Takes a wake-up in, or keeps it for the thread whose it is.
    fn take_in(&mut self, woken: Woken) {
        match &self.lane {
            Some(lane) if *lane.woken == woken.token() => lane.open.woken(),
            _ if self.queue.woken(woken.token()) => {}
            _ => self.woken.push_back(woken),
        }
    }

    fn has_event(&self) -> bool {
        self.layered.as_ref().is_some_and(Layered::has_done)
            || self.queue.has_done()
            || !self.woken.is_empty()
    }

    /// Whether something has happened that [`DiskQueue::wait`] would not wait for. Cheap enough to poll.
    pub fn is_ready(&self) -> bool {
        self.has_event() || self.reactor.is_ready()
    }

    /// The next event, if there is one.
    pub fn next_event(&mut self) -> Option<Event> {
        if let Some(woken) = self.woken.pop_front() {
            return Some(Event::Woken(woken));
        }
        let done = self.layered.as_mut().and_then(Layered::next_done);
        let Done { tag, buffer, result } = done.or_else(|| self.queue.next_done())?;
        Some(Event::Done { tag, buffer, result })
    }
}

/// What the guest asks for when it names sectors and sends no data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// The guest has no use for the sectors: they may read as anything that they held, or as zeros.
    Discard,
    /// The sectors shall read as zeros; their space may go.
    Unmap,
    /// The sectors shall read as zeros; their space shall stay theirs, where the backing can do that.
    KeepSpace,
}

/// What one step of [`DiskQueue::zero`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeroed {
    /// Sectors that are seen to, from the first.
    pub sectors: u64,
    /// Whether there will be an event for them.
    pub submitted: bool,
}
