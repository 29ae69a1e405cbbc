//! A volume as a run of sectors: between guest memory and ciphertext.
//!
//! [`Disk`] is what all queues of an attached volume share; each queue's thread has a [`DiskQueue`]. A transfer
//! goes through a buffer of the store's queue, so that the kernel never holds a guest pointer, a write reads
//! guest memory exactly once, and the guest never sees ciphertext.
//!
//! An all-zero 512-byte sector of a layer means "not in this layer". Where there is one layer, as mostly, it reads as
//! zeros; what several layers take is in [`layered`].

mod fence;
mod layered;

use super::image_lock::ImageLock;
use super::map::{LayerMap, MAX_LAYERS};
use crate::crypt::xts::SectorCipher;
use crate::store::{Buffer, Event, Op, Queue, Store, Wait};
use crate::virtio::request::ID_BYTES;
use crate::virtio::{Geometry, SECTOR_SIZE, Segment};
use fence::{Fence, OpenLane};
use layered::{Action, Layered, Part};
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::{Bytes, GuestMemory, Permissions, VolatileSlice};

const SECTOR: usize = SECTOR_SIZE as usize;
/// The token of the watch that wakes a queue when a copy has left what it was refused.
const LANE: u32 = u32::MAX;

/// How a layer is encrypted; not at all without one. Layers under the same key share it.
pub type Cipher = Option<Arc<dyn SectorCipher>>;

/// An attached volume, as its queues see it.
pub struct Disk {
    geometry: Geometry,
    serial: [u8; ID_BYTES],
    store: Arc<dyn Store>,
    /// The top layer's.
    cipher: Cipher,
    /// The layers below the top, from the one right below it.
    below: Vec<Below>,
    /// Which layers may have what, where there are several.
    map: Option<Arc<LayerMap>>,
    /// What keeps queues out of the way of a copy, where there may be one.
    fence: Option<Arc<Fence>>,
    /// Keep others off the layers for as long as they are served.
    _image_locks: Vec<Arc<ImageLock>>,
    /// A flush that failed once may have lost data for good: it is never reported as a success again.
    flush_failed: Arc<AtomicBool>,
}

/// The layers of a volume as they were opened, and what goes with each, the top first.
pub struct Layers {
    /// Where they lie.
    pub store: Arc<dyn Store>,
    /// How they are encrypted.
    pub ciphers: Vec<Cipher>,
    /// What keeps others off them.
    pub image_locks: Vec<Arc<ImageLock>>,
}

/// A frozen layer.
struct Below {
    cipher: Cipher,
    /// How many sectors it has; it may be shorter than the volume.
    sectors: u64,
}

impl Disk {
    /// A disk of one layer in `store`; no `cipher` means an unencrypted volume. `serial` is cut to 20 bytes, as
    /// virtio has it.
    pub fn new(
        geometry: Geometry,
        serial: &str,
        store: Box<dyn Store>,
        cipher: Option<Box<dyn SectorCipher>>,
        image_lock: ImageLock,
    ) -> Self {
        Disk {
            geometry,
            serial: padded(serial),
            store: store.into(),
            cipher: cipher.map(Arc::from),
            below: Vec::new(),
            map: None,
            fence: None,
            _image_locks: vec![Arc::new(image_lock)],
            flush_failed: Arc::default(),
        }
    }

    /// A disk of several layers, or of one.
    ///
    /// # Errors
    /// `InvalidInput` if such layers cannot be served: more than [`MAX_LAYERS`], one below the top that is not whole
    /// blocks long, or one without a cipher above another, in which zeros could not be kept.
    pub fn layered(geometry: Geometry, serial: &str, layers: Layers) -> io::Result<Self> {
        Self::over(geometry, padded(serial), layers, None, Arc::default())
    }

    /// The same volume when its top is frozen and `layers` has a new, empty one above it. The volume's queues must be
    /// held meanwhile, so that nothing is written through this disk any more.
    ///
    /// # Errors
    /// As for [`Disk::layered`], and if a hydration is still running.
    pub fn with_new_top(&self, layers: Layers) -> io::Result<Self> {
        self.check_not_hydrated()?;
        assert_eq!(layers.ciphers.len(), self.below.len() + 2, "one layer is new");
        Self::over(self.geometry, self.serial, layers, self.map.clone(), self.flush_failed.clone())
    }

    /// The same volume with other layers, or another size. The volume's queues must be held meanwhile.
    ///
    /// # Errors
    /// As for [`Disk::layered`], and if a hydration is still running.
    pub fn with_layers(&self, geometry: Geometry, layers: Layers) -> io::Result<Self> {
        self.check_not_hydrated()?;
        Self::over(geometry, self.serial, layers, None, self.flush_failed.clone())
    }

    fn over(
        geometry: Geometry,
        serial: [u8; ID_BYTES],
        layers: Layers,
        map: Option<Arc<LayerMap>>,
        flush_failed: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let Layers { store, mut ciphers, image_locks } = layers;
        assert_eq!(ciphers.len(), store.below().len() + 1, "every layer has its cipher, or none");
        check_layers(&geometry, &ciphers, store.below())?;
        let below = store.below().iter().map(|len| len / SECTOR_SIZE).zip(ciphers.drain(1..));
        let below: Vec<_> = below.map(|(sectors, cipher)| Below { cipher, sectors }).collect();
        let map = match map {
            None if !below.is_empty() => Some(Arc::new(LayerMap::build(store.clone())?)),
            map => map,
        };
        let cipher = ciphers.remove(0);
        let fence = None;
        Ok(Disk {
            geometry,
            serial,
            store,
            cipher,
            below,
            map,
            fence,
            _image_locks: image_locks,
            flush_failed,
        })
    }

    /// The same, made to be [hydrated](super::hydrate). To be said before any queue is opened.
    pub fn hydrating(mut self) -> Self {
        self.fence = (!self.below.is_empty()).then(Arc::default);
        self
    }

    /// What a copy keeps queues out of its way with.
    pub(super) fn fence(&self) -> Option<&Arc<Fence>> {
        self.fence.as_ref()
    }

    /// Nothing may be written into a layer that is being frozen, nor read from one that is being dropped.
    fn check_not_hydrated(&self) -> io::Result<()> {
        match &self.fence {
            Some(fence) if fence.is_taken() => Err(io::Error::other("its hydration was not stopped first")),
            _ => Ok(()),
        }
    }

    /// Its shape.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The serial, padded with zero bytes.
    pub fn serial(&self) -> &[u8; ID_BYTES] {
        &self.serial
    }

    /// How it is reached and by which cipher engine, for the log.
    pub fn describe(&self) -> String {
        let engine =
            self.cipher.as_ref().map_or("not encrypted".into(), |c| format!("XTS engine {}", c.engine()));
        let layers = match self.below.len() {
            0 => String::new(),
            n => format!("; {} layers", n + 1),
        };
        format!("{}; {engine}{layers}", self.store.caps().access)
    }

    /// How many layers there are, which is the top's height: the lowest has 1.
    pub(super) fn height(&self) -> u8 {
        // At most MAX_LAYERS.
        (self.below.len() + 1) as u8
    }

    fn cipher_at(&self, height: u8) -> &Cipher {
        match self.height() - height {
            0 => &self.cipher,
            n => &self.below[usize::from(n) - 1].cipher,
        }
    }

    /// Which layers may have what; none for a disk of one layer.
    pub fn map(&self) -> Option<&Arc<LayerMap>> {
        self.map.as_ref()
    }

    /// This thread's way to the disk, for at most `depth` operations at a time.
    pub fn open_queue(self: &Arc<Self>, depth: u16) -> io::Result<DiskQueue> {
        let mut queue = self.open_free_queue(depth)?;
        if let Some(fence) = &self.fence {
            let lane = fence.open(queue.queue.places())?;
            queue.queue.watch(LANE, lane.wake_fd());
            queue.lane = Some(lane);
        }
        Ok(queue)
    }

    /// The same for whoever copies, and so must not wait for himself.
    pub(super) fn open_free_queue(self: &Arc<Self>, depth: u16) -> io::Result<DiskQueue> {
        let queue = self.store.open_queue(depth)?;
        let layered = self.map.clone().map(|map| Layered::new(map, queue.places()));
        Ok(DiskQueue { disk: self.clone(), queue, layered, lane: None })
    }

    /// Makes everything written durable, by the calling thread.
    pub fn flush(self: &Arc<Self>) -> io::Result<()> {
        let mut queue = self.open_free_queue(1)?;
        queue.flush(0)?;
        loop {
            if let Some(Event::Done { result, .. }) = queue.next_event() {
                return queue.flushed(result);
            }
            queue.wait(Wait::Event)?;
        }
    }
}

/// One thread's way to the disk. Sectors and lengths were checked against the geometry by whoever calls.
pub struct DiskQueue {
    disk: Arc<Disk>,
    queue: Box<dyn Queue>,
    /// Where there are several layers.
    layered: Option<Layered>,
    /// Where somebody may copy what is below into the top. It goes after the queue.
    lane: Option<OpenLane>,
}

impl DiskQueue {
    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The most bytes in one buffer; a multiple of the block size.
    pub fn max_buffer(&self) -> usize {
        self.queue.max_buffer()
    }

    /// A buffer of `len` bytes for what is at `sector`, if there is one and another operation may be submitted there.
    /// Where there is none, there may be one after the next [`DiskQueue::wait`].
    pub fn alloc(&mut self, sector: u64, len: usize) -> Option<Buffer> {
        if !self.queue.has_room() {
            return None;
        }
        let buffer = self.queue.alloc(len)?;
        if let Some(lane) = &self.lane
            && !lane.enter(buffer.place(), sector..sector + len as u64 / SECTOR_SIZE)
        {
            self.queue.free(buffer);
            return None;
        }
        Some(buffer)
    }

    /// Gives a buffer back.
    pub fn free(&mut self, buffer: Buffer) {
        if let Some(lane) = &self.lane {
            lane.leave(buffer.place());
        }
        self.queue.free(buffer);
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

    /// Reads `len` bytes from `sector` into guest memory at once, where one layer has all of them and is memory; answers whether that was so. Otherwise nothing has happened, and [`DiskQueue::read`] does it.
    pub fn read_now<M>(&self, sector: u64, len: u64, guest: GuestData<'_, M>) -> io::Result<bool>
    where
        M: GuestMemory,
        M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
    {
        let Some(lane) = &self.lane else { return self.read_from_memory(sector, len, guest) };
        let no_buffer = usize::MAX;
        if !lane.enter(no_buffer, sector..sector + len / SECTOR_SIZE) {
            return Ok(false);
        }
        let done = self.read_from_memory(sector, len, guest);
        lane.leave(no_buffer);
        done
    }

    fn read_from_memory<M>(&self, sector: u64, len: u64, guest: GuestData<'_, M>) -> io::Result<bool>
    where
        M: GuestMemory,
        M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
    {
        let height = match &self.layered {
            None => self.disk.height(),
            Some(layered) => layered.topmost(&self.disk, sector, len),
        };
        if height == 0 {
            return Ok(false);
        }
        let layer = usize::from(self.disk.height() - height);
        let Some(bytes) = self.queue.in_memory(layer, sector * SECTOR_SIZE, len as usize) else {
            return Ok(false);
        };
        match self.disk.cipher_at(height) {
            // What looks like zeros may be in a layer below.
            None if self.layered.is_some() && may_have_holes(&bytes) => Ok(false),
            Some(cipher) => {
                let block = self.disk.geometry.block_size as usize;
                let direct = !may_have_holes(&bytes)
                    && guest.in_whole_blocks(bytes.len(), block, Permissions::Write)?;
                if direct {
                    guest.decrypt_directly(cipher.as_ref(), bytes, sector)?;
                }
                Ok(direct)
            }
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
            Some(cipher) => guest.encrypt_into(cipher.as_ref(), bytes, sector, self.disk.geometry.block_size),
            None => guest.copy_into(bytes),
        };
        if let Err(e) = taken {
            self.free(buffer);
            return Err(e);
        }
        self.submit_write(tag, sector, buffer, durable);
        Ok(())
    }

    /// Whether the `i`-th sector of the last read, whose buffer was at `place`, came from below the top.
    pub(super) fn came_from_below(&self, place: usize, i: usize) -> bool {
        self.layered.as_ref().is_some_and(|layered| layered.came_from_below(place, i))
    }

    /// Decrypts what was read for [`DiskQueue::read`] into guest memory, and gives the buffer back. Answers whether that
    /// was all: if not, the buffer has gone on to another layer, and there will be another event with the same tag.
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
        let bytes = self.queue.bytes(&mut buffer);
        let done = match (&mut self.layered, &self.disk.cipher) {
            (Some(layered), _) => layered.deliver(&self.disk, bytes, buffer.place(), sector, guest),
            (None, Some(cipher)) => {
                let block = self.disk.geometry.block_size;
                guest.decrypt_from(cipher.as_ref(), bytes, sector, block).map(|()| true)
            }
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
        if self.disk.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed"));
        }
        self.queue.submit(tag, Op::Flush);
        Ok(())
    }

    /// What a finished flush means: once failed, always failed.
    pub fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        if let Err(e) = &result {
            log::error!("flush failed: {e}; no later flush will be reported as a success");
            self.disk.flush_failed.store(true, Ordering::Release);
        }
        if self.disk.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::other("a flush failed"));
        }
        result
    }

    /// What a finished write means. A durable one syncs, and the kernel reports a write-back that failed once only,
    /// to whoever syncs next: the error may be that of writes which had completed before.
    pub fn written(&self, durable: bool, result: io::Result<()>) -> io::Result<()> {
        use io::ErrorKind::{QuotaExceeded, StorageFull, UnexpectedEof};
        match &result {
            // For want of room nothing else is lost.
            Err(e) if durable && !matches!(e.kind(), QuotaExceeded | StorageFull | UnexpectedEof) => {
                self.flushed(result)
            }
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

    /// Begins to make `count` sectors read as zeros, or to discard them. One call may do with a part of them: the
    /// answer says how many are seen to, and whether an operation was submitted for them. `None`: there is no room yet.
    pub fn zero(&mut self, tag: u64, sector: u64, count: u64, how: Zeroing) -> Option<Zeroed> {
        let most = self.max_buffer() as u64 / SECTOR_SIZE;
        let part = match &self.layered {
            None => Part { sectors: count, action: Action::Punch },
            Some(layered) => layered.first_part(&self.disk, sector, count, most, how),
        };
        let (offset, len) = (sector * SECTOR_SIZE, part.sectors * SECTOR_SIZE);
        match part.action {
            Action::Nothing => return Some(Zeroed { sectors: part.sectors, submitted: false }),
            Action::Punch if !self.queue.has_room() => return None,
            Action::Punch => {
                let keep_space = how == Zeroing::KeepSpace;
                self.queue.submit(tag, Op::Zero { offset, len, keep_space });
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

    /// See [`Queue::watch`]. The token `u32::MAX` is taken.
    pub fn watch(&mut self, token: u32, fd: RawFd) {
        self.queue.watch(token, fd);
    }

    /// See [`Queue::unwatch`].
    pub fn unwatch(&mut self, token: u32) {
        self.queue.unwatch(token);
    }

    /// See [`Queue::wait`].
    pub fn wait(&mut self, wait: Wait) -> io::Result<()> {
        let due = self.layered.as_ref().is_some_and(Layered::has_event);
        self.queue.wait(if due { Wait::Poll } else { wait })
    }

    /// See [`Queue::is_ready`].
    pub fn is_ready(&mut self) -> bool {
        self.layered.as_ref().is_some_and(Layered::has_event) || self.queue.is_ready()
    }

    /// See [`Queue::next_event`].
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            let event = self.layered.as_mut().and_then(Layered::next_event);
            match (event.or_else(|| self.queue.next_event())?, &self.lane) {
                (Event::Ready { token: LANE }, Some(lane)) => lane.woken(),
                (event, _) => return Some(event),
            }
        }
    }
}

/// What the guest asks for when it names sectors and sends no data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// It has no use for them: they may read as anything that they held or as zeros.
    Discard,
    /// They shall read as zeros; their space may go.
    Unmap,
    /// They shall read as zeros; their space shall stay theirs, where the store can do that.
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

fn padded(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    for (to, from) in id.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    id
}

/// Whether such layers can be served.
fn check_layers(geometry: &Geometry, ciphers: &[Cipher], below: &[u64]) -> io::Result<()> {
    let refuse = |message: String| Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    if ciphers.len() > MAX_LAYERS {
        return refuse(format!("{} layers; at most {MAX_LAYERS} can be served: flatten it", ciphers.len()));
    }
    let block = u64::from(geometry.block_size);
    if let Some(len) = below.iter().find(|&len| len % block != 0) {
        return refuse(format!("a layer of {len} bytes, which are not whole blocks of {block} bytes"));
    }
    // Zeros mean "not in this layer": what is above another must have a way to write zeros that are none.
    if ciphers[..ciphers.len() - 1].iter().any(Option::is_none) {
        return refuse("a layer without a key lies above another; only the lowest can be without".into());
    }
    Ok(())
}

/// A request's data in guest memory, from byte `skip` on.
#[derive(Clone, Copy)]
pub struct GuestData<'a, M> {
    /// The guest's memory.
    pub mem: &'a M,
    /// The data runs, in order, all checked to lie in it.
    pub segments: &'a [Segment],
    /// Bytes of them to leave out at the beginning.
    pub skip: u64,
}

impl<M> GuestData<'_, M>
where
    M: GuestMemory,
    M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
{
    /// The same from byte `skip` of this on.
    fn from(&self, skip: usize) -> Self {
        GuestData { mem: self.mem, segments: self.segments, skip: self.skip + skip as u64 }
    }

    /// Fills the first `len` bytes with zeros.
    fn fill_zero(&self, len: usize) -> io::Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        self.each(len, Permissions::Write, |slice, _| {
            let mut at = 0;
            while at < slice.len() {
                // The offset is within the slice.
                at += slice.write(&ZEROS, at).unwrap_or(slice.len());
            }
        })
    }

    /// Calls `f` with each run of the first `len` bytes and its position among them.
    fn each(
        &self,
        len: usize,
        access: Permissions,
        mut f: impl FnMut(VolatileSlice<'_>, usize),
    ) -> io::Result<()> {
        let mut skip = self.skip;
        let mut at = 0;
        for segment in self.segments {
            let run = u64::from(segment.len);
            if skip >= run {
                skip -= run;
                continue;
            }
            let take = ((run - skip) as usize).min(len - at);
            let start = segment.addr.0 + skip;
            skip = 0;
            let slices = self.mem.get_slices(vm_memory::GuestAddress(start), take, access);
            for slice in slices.map_err(io::Error::other)? {
                let slice = slice.map_err(io::Error::other)?;
                let n = slice.len();
                f(slice, at);
                at += n;
            }
            if at == len {
                return Ok(());
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    /// Whether every run of the first `len` bytes is whole blocks, so that the cipher can work on it directly.
    fn in_whole_blocks(&self, len: usize, block: usize, access: Permissions) -> io::Result<bool> {
        let mut whole = true;
        self.each(len, access, |slice, _| whole &= slice.len() % block == 0)?;
        Ok(whole)
    }

    fn copy_into(&self, dst: &mut [u8]) -> io::Result<()> {
        self.each(dst.len(), Permissions::Read, |slice, at| {
            slice.copy_to(&mut dst[at..at + slice.len()]);
        })
    }

    fn copy_from(&self, src: &[u8]) -> io::Result<()> {
        self.each(src.len(), Permissions::Write, |slice, at| slice.copy_from(&src[at..at + slice.len()]))
    }

    fn encrypt_into(
        &self,
        cipher: &dyn SectorCipher,
        dst: &mut [u8],
        sector: u64,
        block: u32,
    ) -> io::Result<()> {
        if self.in_whole_blocks(dst.len(), block as usize, Permissions::Read)? {
            self.each(dst.len(), Permissions::Read, |slice, at| {
                let n = slice.len();
                cipher.encrypt(slice, &mut dst[at..at + n], sector + (at / SECTOR) as u64);
            })
        } else {
            self.copy_into(dst)?;
            cipher.encrypt_in_place(dst, sector);
            Ok(())
        }
    }

    fn decrypt_from(
        &self,
        cipher: &dyn SectorCipher,
        src: &mut [u8],
        sector: u64,
        block: u32,
    ) -> io::Result<()> {
        let unwritten = src.chunks_exact(SECTOR).any(is_zero);
        if !unwritten && self.in_whole_blocks(src.len(), block as usize, Permissions::Write)? {
            return self.decrypt_directly(cipher, VolatileSlice::from(src), sector);
        }
        decrypt_with_holes(cipher, src, sector, block as usize);
        self.copy_from(src)
    }

    /// All of `src` was written, and the runs are whole blocks.
    fn decrypt_directly(
        &self,
        cipher: &dyn SectorCipher,
        src: VolatileSlice<'_>,
        sector: u64,
    ) -> io::Result<()> {
        self.each(src.len(), Permissions::Write, |slice, at| {
            let from = src.subslice(at, slice.len()).expect("each stays within the length");
            cipher.decrypt(from, slice, sector + (at / SECTOR) as u64);
        })
    }
}

/// Decrypts in place what was written and leaves zeros where nothing was. With 4096-byte blocks a block may be
/// both: after a power cut, a part of its first write may be there. XTS treats each 16 bytes by themselves, so
/// the parts that are there decrypt as they would in a whole block.
fn decrypt_with_holes(cipher: &dyn SectorCipher, data: &mut [u8], sector: u64, block: usize) {
    let mut at = 0;
    while at < data.len() {
        let first = &data[at..at + block];
        if is_zero(first) {
            at += block;
            continue;
        }
        if first.chunks_exact(SECTOR).any(is_zero) {
            let holes: Vec<bool> = first.chunks_exact(SECTOR).map(is_zero).collect();
            let part = &mut data[at..at + block];
            cipher.decrypt_in_place(part, sector + (at / SECTOR) as u64);
            for (bytes, hole) in part.chunks_exact_mut(SECTOR).zip(holes) {
                if hole {
                    bytes.fill(0);
                }
            }
            at += block;
            continue;
        }
        let whole = |b: &[u8]| !b.chunks_exact(SECTOR).any(is_zero);
        let blocks = data[at..].chunks_exact(block).take_while(|b| whole(b)).count();
        let end = at + blocks * block;
        cipher.decrypt_in_place(&mut data[at..end], sector + (at / SECTOR) as u64);
        at = end;
    }
}

/// Whether a sector begins with zero bytes, as hardly any ciphertext does and every unwritten sector.
fn may_have_holes(bytes: &VolatileSlice<'_>) -> bool {
    let begins_with_zeros = |at| bytes.load::<u64>(at, Ordering::Relaxed).is_ok_and(|word| word == 0);
    (0..bytes.len()).step_by(SECTOR).any(begins_with_zeros)
}

/// Whether all bytes of a sector are zero; quick to say no, since ciphertext hardly ever begins with eight zero
/// bytes, and quick to say yes, a word at a time.
fn is_zero(sector: &[u8]) -> bool {
    let (words, _) = sector.as_chunks::<8>();
    let word = |bytes: &[u8; 8]| u64::from_ne_bytes(*bytes);
    words.first().is_none_or(|first| word(first) == 0) && words.iter().fold(0, |all, w| all | word(w)) == 0
}

#[cfg(test)]
mod tests;
