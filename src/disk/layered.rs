//! Reading and zeroing where a volume has several layers.
//!
//! A sector of the volume is what the topmost layer says that has it, that is, in which its 512 bytes are not
//! all zero; zeros if none has it. A read therefore begins in the topmost layer that can have some of it,
//! which the layer map knows, delivers to the guest what is there, and goes on with the same buffer to the
//! next layer for what is still missing, until nothing is or no layer is left. A read that raced a write gets
//! the sector as it was before or after: what it found missing in the top was so when it looked.
//!
//! All that this needs is a slab made with the queue: for each buffer where its read stands, and one
//! bit for each of its sectors. A buffer that needs no layer at all comes back as an event without
//! having been to the backing.

use crate::backing::{Buffer, Done, Op, Queue};
use crate::base::zeros::is_zero;
use crate::crypt::xts::SectorCipher;
use crate::disk::guest::all_there;
use crate::disk::map::{Entry, LayerMap};
use crate::disk::{Disk, GuestData, SECTOR, Zeroing};
use crate::virtio::SECTOR_SIZE;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::{GuestMemory, VolatileSlice};

/// Sectors for each of a buffer's places.
const PLACE_SECTORS: usize = 8;

/// What a queue of a disk with several layers keeps beside the backing's queue.
pub(super) struct Layered {
    map: Arc<LayerMap>,
    /// By place: the read whose buffer begins there.
    reads: Box<[Read]>,
    /// By place: one bit for each sector that no layer so far has had.
    missing: Box<[u8]>,
    /// By place: one bit for each sector that the layer has which was read last.
    found: Box<[u8]>,
    /// By place: one bit for each sector that came from one of the leaving layers.
    from_leaving: Box<[u8]>,
    /// Reads for which there is nothing in any layer.
    done: VecDeque<(u64, Buffer)>,
}

/// Where a read stands.
#[derive(Clone, Default)]
struct Read {
    /// The height of the layer that is being read; 0: there is none left, and what is missing is zeros.
    height: u8,
    /// Which of the buffer's sectors are being read.
    part: Range<u16>,
    /// Whether none of these sectors was found in a higher layer before.
    fresh: bool,
}

/// What to do with some sectors that shall be zeros or are discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// There is nothing to do.
    Nothing,
    /// Make a hole in the top layer.
    Punch,
    /// Write zeros that mean "not in the top layer".
    Clear,
    /// Write zeros, encrypted.
    Write,
}

/// The first so many sectors, for which the same is to be done.
pub(super) struct Part {
    pub(super) sectors: u64,
    pub(super) action: Action,
}

impl Layered {
    pub(super) fn new(map: Arc<LayerMap>, places: usize) -> Self {
        Layered {
            map,
            reads: vec![Read::default(); places].into(),
            missing: vec![0; places].into(),
            found: vec![0; places].into(),
            from_leaving: vec![0; places].into(),
            done: VecDeque::with_capacity(places),
        }
    }

    pub(super) fn map(&self) -> &LayerMap {
        &self.map
    }

    /// The height of the topmost layer that may have something of `len` bytes from `sector`; 0: none.
    pub(super) fn topmost(&self, disk: &Disk, sector: u64, len: u64) -> u8 {
        let start = sector * SECTOR_SIZE;
        self.map.topmost_below(disk.height() + 1, start..start + len)
    }

    pub(super) fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    pub(super) fn next_done(&mut self) -> Option<Done> {
        let (tag, buffer) = self.done.pop_front()?;
        Some(Done { tag, buffer: Some(buffer), result: Ok(()) })
    }

    /// Begins to read from `sector` into `buffer`.
    pub(super) fn begin(
        &mut self,
        disk: &Disk,
        queue: &mut dyn Queue,
        tag: u64,
        sector: u64,
        buffer: Buffer,
    ) {
        let sectors = buffer.len() / SECTOR;
        let place = buffer.place();
        for (i, bits) in self.missing[place..].iter_mut().take(sectors.div_ceil(PLACE_SECTORS)).enumerate() {
            *bits = bits_below(sectors - i * PLACE_SECTORS);
            self.from_leaving[place + i] = 0;
        }
        self.reads[place] = Read { height: disk.height() + 1, part: 0..0, fresh: true };
        self.go_on(disk, queue, tag, sector, buffer);
    }

    /// Reads what is missing from the next layer that may have it.
    pub(super) fn go_on(
        &mut self,
        disk: &Disk,
        queue: &mut dyn Queue,
        tag: u64,
        sector: u64,
        buffer: Buffer,
    ) {
        let place = buffer.place();
        let (height, part) = self.next(disk, sector, &buffer);
        let read = &mut self.reads[place];
        (read.height, read.part) = (height, part.start as u16..part.end as u16);
        let offset = (sector + part.start as u64) * SECTOR_SIZE;
        let part = part.start * SECTOR..part.end * SECTOR;
        match usize::from(disk.height() - height) {
            _ if height == 0 => self.done.push_back((tag, buffer)),
            0 => queue.submit(tag, Op::Read { offset, buffer }),
            layer => queue.submit(tag, Op::ReadBelow { layer, offset, part, buffer }),
        }
    }

    /// The height of the next layer to be read and which of the buffer's sectors to read from it.
    fn next(&self, disk: &Disk, sector: u64, buffer: &Buffer) -> (u8, Range<usize>) {
        let (place, sectors) = (buffer.place(), buffer.len() / SECTOR);
        let mut height = self.reads[place].height;
        loop {
            height = self.next_height(height, place, sector, sectors);
            if height == disk.height() {
                return (height, 0..sectors);
            }
            if height == 0 {
                return (0, 0..0);
            }
            let layer = disk.height() - height;
            let there = disk.below[usize::from(layer) - 1].sectors.saturating_sub(sector);
            let part = self.hull(place, sectors, disk.shape.block_sectors() as usize);
            let part = part.start..part.end.min(there.min(sectors as u64) as usize);
            if !part.is_empty() {
                return (height, part);
            }
        }
    }

    /// The height of the topmost layer below `height` that may have something that is missing; 0: none.
    fn next_height(&self, height: u8, place: usize, sector: u64, sectors: usize) -> u8 {
        let mut next = 0;
        for (i, &bits) in self.missing[place..].iter().take(sectors.div_ceil(PLACE_SECTORS)).enumerate() {
            if bits != 0 {
                let first = sector + (i * PLACE_SECTORS) as u64;
                let last = first + 7 - u64::from(bits.leading_zeros());
                let first = first + u64::from(bits.trailing_zeros());
                let bytes = first * SECTOR_SIZE..(last + 1) * SECTOR_SIZE;
                next = next.max(self.map.topmost_below(height, bytes));
            }
        }
        next
    }

    /// The run from the first to the last missing sector, in whole blocks. Something is missing.
    fn hull(&self, place: usize, sectors: usize, block: usize) -> Range<usize> {
        let bits = &self.missing[place..place + sectors.div_ceil(PLACE_SECTORS)];
        let first = bits.iter().position(|&b| b != 0).unwrap_or(0);
        let last = bits.iter().rposition(|&b| b != 0).unwrap_or(0);
        let start = first * PLACE_SECTORS + bits[first].trailing_zeros() as usize;
        let end = last * PLACE_SECTORS + 8 - bits[last].leading_zeros() as usize;
        start / block * block..end.next_multiple_of(block)
    }

    /// Delivers what the layer that was read has and none above it had. Returns whether
    /// nothing is missing any more.
    pub(super) fn deliver<M>(
        &mut self,
        disk: &Disk,
        bytes: &mut [u8],
        place: usize,
        sector: u64,
        guest: GuestData<'_, M>,
    ) -> io::Result<bool>
    where
        M: GuestMemory,
        M::Bitmap: for<'a> WithBitmapSlice<'a, S = ()>,
    {
        let sectors = bytes.len() / SECTOR;
        let places = place..place + sectors.div_ceil(PLACE_SECTORS);
        let Read { height, part, fresh } = self.reads[place].clone();
        let (missing, found) = (&mut self.missing[places.clone()], &mut self.found[places.clone()]);
        if height == 0 {
            let zeros = |run: Range<usize>| guest.from(run.start * SECTOR).fill_zero(run.len() * SECTOR);
            return each_run(0..sectors, |i| is_set(missing, i), zeros).map(|()| true);
        }
        let part = usize::from(part.start)..usize::from(part.end);
        let (cipher, block) = (disk.cipher_at(height), disk.shape.block_size);
        let is_whole = part == (0..sectors) && fresh;
        // All of it at once, as mostly. Where that ends at a hole, the same is delivered again below.
        let is_all = is_whole
            && match cipher {
                Some(cipher) => {
                    let ciphertext = VolatileSlice::from(&mut *bytes);
                    guest.decrypt_written(cipher.as_ref(), ciphertext, sector, block)? == bytes.len()
                }
                None if all_there(bytes) => guest.copy_from(bytes).map(|()| true)?,
                None => false,
            };
        if is_all {
            if height <= disk.leaving() {
                self.from_leaving[places].fill(u8::MAX);
            }
            return Ok(true);
        }
        for (i, (found, missing)) in found.iter_mut().zip(&*missing).enumerate() {
            *found = missing & there(bytes, i, &part);
        }
        if height <= disk.leaving() {
            for (from_leaving, found) in self.from_leaving[places].iter_mut().zip(&*found) {
                *from_leaving |= found;
            }
        }
        if let Some(cipher) = cipher {
            decrypt_found(cipher.as_ref(), bytes, found, sector, block as usize);
        }
        let give = |run: Range<usize>| {
            guest.from(run.start * SECTOR).copy_from(&bytes[run.start * SECTOR..run.end * SECTOR])
        };
        each_run(0..sectors, |i| is_set(found, i), give)?;
        for (missing, found) in missing.iter_mut().zip(&*found) {
            *missing &= !*found;
        }
        self.reads[place].fresh &= found.iter().all(|&bits| bits == 0);
        let all = missing.iter().all(|&bits| bits == 0);
        if height < disk.height() && sector.is_multiple_of(PLACE_SECTORS as u64) {
            self.learn(height, place, sector, part);
        }
        Ok(all)
    }

    /// Whether the `i`-th sector of the read whose buffer was at `place` came from a layer that is leaving.
    pub(super) fn came_from_leaving(&self, place: usize, i: usize) -> bool {
        is_set(&self.from_leaving[place..], i)
    }

    /// Tells the map where a frozen layer that was read has nothing.
    fn learn(&self, height: u8, place: usize, sector: u64, part: Range<usize>) {
        for i in part.start.div_ceil(PLACE_SECTORS)..part.end / PLACE_SECTORS {
            if self.missing[place + i] == u8::MAX {
                self.map.lower((sector + (i * PLACE_SECTORS) as u64) * SECTOR_SIZE, height);
            }
        }
    }

    /// What to do with the first of `count` sectors that shall be zeros or are discarded, and with how many
    /// of them; no more than `most` if they are to be written.
    ///
    /// A hole in the top is right only where nothing lies below, else that would show through. While it is
    /// not known what lies below, something may.
    pub(super) fn first_part(&self, disk: &Disk, sector: u64, count: u64, most: u64, how: Zeroing) -> Part {
        let action = |at: u64| match self.map.entry(at * SECTOR_SIZE) {
            Some(entry) if entry == Entry::NOTHING && how != Zeroing::KeepSpace => Action::Nothing,
            Some(entry) if entry.below(disk.height()) == 0 => Action::Punch,
            _ if how == Zeroing::Discard => Action::Nothing,
            _ => Action::Write,
        };
        let (step, first) = (self.map.block_size() / SECTOR_SIZE, action(sector));
        let limit = if first == Action::Write { count.min(most) } else { count };
        let mut end = (sector / step + 1) * step;
        while end - sector < limit && action(end) == first {
            end += step;
        }
        Part { sectors: (end - sector).min(limit), action: first }
    }
}

/// Decrypts in place the blocks that have sectors which were found. A block may have others, which come out
/// as noise: XTS treats each 16 bytes by themselves.
fn decrypt_found(cipher: &dyn SectorCipher, bytes: &mut [u8], found: &[u8], sector: u64, block: usize) {
    let (blocks, block_sectors) = (bytes.len() / block, block / SECTOR);
    let has_some = |n: usize| (n * block_sectors..(n + 1) * block_sectors).any(|i| is_set(found, i));
    let decrypt = |run: Range<usize>| {
        let at = sector + (run.start * block_sectors) as u64;
        cipher.decrypt_in_place(&mut bytes[run.start * block..run.end * block], at);
        Ok(())
    };
    // It never fails.
    let _ = each_run(0..blocks, has_some, decrypt);
}

/// One bit for each of the sectors of the `i`-th place that was read and is not all zero.
fn there(bytes: &[u8], i: usize, part: &Range<usize>) -> u8 {
    let first = i * PLACE_SECTORS;
    let read = first.max(part.start)..(first + PLACE_SECTORS).min(part.end);
    read.filter(|&i| !is_zero(&bytes[i * SECTOR..(i + 1) * SECTOR]))
        .fold(0, |bits, i| bits | 1 << (i - first))
}

fn is_set(bits: &[u8], i: usize) -> bool {
    bits[i / PLACE_SECTORS] >> (i % PLACE_SECTORS) & 1 == 1
}

/// The lowest `n` bits, all if there are no more.
fn bits_below(n: usize) -> u8 {
    if n >= PLACE_SECTORS { u8::MAX } else { (1 << n) - 1 }
}

/// Calls `f` with each run of numbers in `range` that `is_in`.
fn each_run(
    range: Range<usize>,
    is_in: impl Fn(usize) -> bool,
    mut f: impl FnMut(Range<usize>) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = range.start;
    while let Some(start) = (at..range.end).find(|&i| is_in(i)) {
        at = (start..range.end).find(|&i| !is_in(i)).unwrap_or(range.end);
        f(start..at)?;
    }
    Ok(())
}
