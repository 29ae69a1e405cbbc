//! A volume as a run of sectors: between guest memory and ciphertext.
//!
//! [`Disk`] is what all queues of an attached volume share; each queue's thread has a [`DiskQueue`]. A transfer
//! goes through a buffer of the store's queue, so that the kernel never holds a guest pointer, a write reads
//! guest memory exactly once, and the guest never sees ciphertext.
//!
//! An all-zero 512-byte sector of an encrypted layer means "never written" and reads as zeros.

use super::image_lock::ImageLock;
use crate::crypt::xts::SectorCipher;
use crate::store::{Buffer, Event, Op, Queue, Store, Wait};
use crate::virtio::request::ID_BYTES;
use crate::virtio::{Geometry, SECTOR_SIZE, Segment};
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::{Bytes, GuestMemory, Permissions, VolatileSlice};

const SECTOR: usize = SECTOR_SIZE as usize;

/// An attached volume, as its queues see it.
pub struct Disk {
    geometry: Geometry,
    serial: [u8; ID_BYTES],
    store: Box<dyn Store>,
    cipher: Option<Box<dyn SectorCipher>>,
    /// Keeps others off the layer for as long as it is served.
    _image_lock: ImageLock,
    /// A flush that failed once may have lost data for good: it is never reported as a success again.
    flush_failed: AtomicBool,
}

impl Disk {
    /// A disk over `store`; no `cipher` means an unencrypted volume. `serial` is cut to 20 bytes, as virtio has it.
    pub fn new(
        geometry: Geometry,
        serial: &str,
        store: Box<dyn Store>,
        cipher: Option<Box<dyn SectorCipher>>,
        image_lock: ImageLock,
    ) -> Self {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Disk {
            geometry,
            serial: id,
            store,
            cipher,
            _image_lock: image_lock,
            flush_failed: AtomicBool::new(false),
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
        format!("{}; {engine}", self.store.caps().access)
    }

    /// This thread's way to the disk, for at most `depth` operations at a time.
    pub fn open_queue(self: &Arc<Self>, depth: u16) -> io::Result<DiskQueue> {
        Ok(DiskQueue { disk: self.clone(), queue: self.store.open_queue(depth)? })
    }

    /// Makes everything written durable, by the calling thread.
    pub fn flush(self: &Arc<Self>) -> io::Result<()> {
        let mut queue = self.open_queue(1)?;
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

    /// A buffer of `len` bytes, if there is one and another operation may be submitted.
    pub fn alloc(&mut self, len: usize) -> Option<Buffer> {
        if self.queue.has_room() { self.queue.alloc(len) } else { None }
    }

    /// Gives a buffer back.
    pub fn free(&mut self, buffer: Buffer) {
        self.queue.free(buffer);
    }

    /// Whether another operation may be submitted.
    pub fn has_room(&self) -> bool {
        self.queue.has_room()
    }

    /// Reads ciphertext from `sector` into `buffer`; at its completion, [`DiskQueue::deliver`] it.
    pub fn read(&mut self, tag: u64, sector: u64, buffer: Buffer) {
        self.queue.submit(tag, Op::Read { offset: sector * SECTOR_SIZE, buffer });
    }

    /// Reads `len` bytes from `sector` into guest memory at once, where the store is memory and all of them were written;
    /// answers whether that was so. Otherwise nothing has happened, and [`DiskQueue::read`] does it.
    pub fn read_now<M>(&self, sector: u64, len: u64, guest: GuestData<'_, M>) -> io::Result<bool>
    where
        M: GuestMemory,
        M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
    {
        let Some(bytes) = self.queue.in_memory(sector * SECTOR_SIZE, len as usize) else { return Ok(false) };
        match &self.disk.cipher {
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
            self.queue.free(buffer);
            return Err(e);
        }
        self.queue.submit(tag, Op::Write { offset: sector * SECTOR_SIZE, buffer, durable });
        Ok(())
    }

    /// Decrypts a buffer that [`DiskQueue::read`] filled into guest memory.
    pub fn deliver<M>(&mut self, sector: u64, buffer: &mut Buffer, guest: GuestData<'_, M>) -> io::Result<()>
    where
        M: GuestMemory,
        M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
    {
        let bytes = self.queue.bytes(buffer);
        match &self.disk.cipher {
            Some(cipher) => guest.decrypt_from(cipher.as_ref(), bytes, sector, self.disk.geometry.block_size),
            None => guest.copy_from(bytes),
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

    /// Makes `count` sectors read as zeros. There is one layer, so a hole in it is all that this takes.
    pub fn zero(&mut self, tag: u64, sector: u64, count: u64, keep_space: bool) {
        let (offset, len) = (sector * SECTOR_SIZE, count * SECTOR_SIZE);
        self.queue.submit(tag, Op::Zero { offset, len, keep_space });
    }

    /// See [`Queue::watch`].
    pub fn watch(&mut self, token: u32, fd: RawFd) {
        self.queue.watch(token, fd);
    }

    /// See [`Queue::unwatch`].
    pub fn unwatch(&mut self, token: u32) {
        self.queue.unwatch(token);
    }

    /// See [`Queue::wait`].
    pub fn wait(&mut self, wait: Wait) -> io::Result<()> {
        self.queue.wait(wait)
    }

    /// See [`Queue::is_ready`].
    pub fn is_ready(&mut self) -> bool {
        self.queue.is_ready()
    }

    /// See [`Queue::next_event`].
    pub fn next_event(&mut self) -> Option<Event> {
        self.queue.next_event()
    }
}

/// A request's data in guest memory, from byte `skip` on.
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
