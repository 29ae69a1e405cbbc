//! A request's data in guest memory, and how it passes through the cipher: in one pass where it can.

use crate::base::zeros::is_zero;
use crate::crypt::xts::SectorCipher;
use crate::disk::SECTOR;
use crate::virtio::Segment;
use std::io;
use std::sync::atomic::Ordering;
use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::{Address, Bytes, GuestMemory, Permissions, VolatileSlice};

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
    /// This data without its first `skip` bytes.
    pub(super) fn from(&self, skip: usize) -> Self {
        GuestData { mem: self.mem, segments: self.segments, skip: self.skip + skip as u64 }
    }

    /// Fills the first `len` bytes with zeros.
    pub(super) fn fill_zero(&self, len: usize) -> io::Result<()> {
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
    pub(super) fn each(
        &self,
        len: usize,
        access: Permissions,
        mut f: impl FnMut(VolatileSlice<'_>, usize),
    ) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        if let Some(run) = self.one_run(len, access) {
            f(run, 0);
            return Ok(());
        }
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

    /// The first `len` bytes, if they are one run, as they mostly are.
    fn one_run(&self, len: usize, access: Permissions) -> Option<VolatileSlice<'_>> {
        let first = self.segments.first()?;
        if self.skip.checked_add(len as u64)? > u64::from(first.len) {
            return None;
        }
        let start = first.addr.checked_add(self.skip)?;
        let run = self.mem.get_slices(start, len, access).ok()?.next()?.ok()?;
        (run.len() == len).then_some(run)
    }

    /// Calls `f` for every run of the first `len` bytes, if every run is whole blocks, so that the cipher can
    /// work on it directly. Returns whether that is so. `len` is whole blocks.
    fn each_of_whole_blocks(
        &self,
        len: usize,
        block: usize,
        access: Permissions,
        mut f: impl FnMut(VolatileSlice<'_>, usize),
    ) -> io::Result<bool> {
        if let Some(run) = self.one_run(len, access) {
            f(run, 0);
            return Ok(true);
        }
        let mut whole = true;
        self.each(len, access, |slice, _| whole &= slice.len() % block == 0)?;
        if whole {
            self.each(len, access, f)?;
        }
        Ok(whole)
    }

    pub(super) fn copy_into(&self, dst: &mut [u8]) -> io::Result<()> {
        self.each(dst.len(), Permissions::Read, |slice, at| {
            slice.copy_to(&mut dst[at..at + slice.len()]);
        })
    }

    pub(super) fn copy_from(&self, src: &[u8]) -> io::Result<()> {
        self.each(src.len(), Permissions::Write, |slice, at| slice.copy_from(&src[at..at + slice.len()]))
    }

    pub(super) fn encrypt_into(
        &self,
        cipher: &dyn SectorCipher,
        dst: &mut [u8],
        sector: u64,
        block: u32,
    ) -> io::Result<()> {
        let directly =
            self.each_of_whole_blocks(dst.len(), block as usize, Permissions::Read, |slice, at| {
                let n = slice.len();
                cipher.encrypt(slice, &mut dst[at..at + n], sector + (at / SECTOR) as u64);
            })?;
        if !directly {
            self.copy_into(dst)?;
            cipher.encrypt_in_place(dst, sector);
        }
        Ok(())
    }

    pub(super) fn decrypt_from(
        &self,
        cipher: &dyn SectorCipher,
        src: &mut [u8],
        sector: u64,
        block: u32,
    ) -> io::Result<()> {
        let done = self.decrypt_written(cipher, VolatileSlice::from(&mut *src), sector, block)?;
        let rest = &mut src[done..];
        if rest.is_empty() {
            return Ok(());
        }
        decrypt_with_holes(cipher, rest, sector + (done / SECTOR) as u64, block as usize);
        self.from(done).copy_from(rest)
    }

    /// Decrypts `src` as far as it was written for sure (see [`SectorCipher::decrypt_written`]), if the runs
    /// are whole blocks. Returns how many bytes are done, from the first on.
    pub(super) fn decrypt_written(
        &self,
        cipher: &dyn SectorCipher,
        src: VolatileSlice<'_>,
        sector: u64,
        block: u32,
    ) -> io::Result<usize> {
        let mut done = 0;
        self.each_of_whole_blocks(src.len(), block as usize, Permissions::Write, |slice, at| {
            // What comes behind a hole is left out, too.
            if done == at {
                let from = src.subslice(at, slice.len()).expect("each stays within the length");
                done += cipher.decrypt_written(from, slice, sector + (at / SECTOR) as u64);
            }
        })?;
        Ok(done)
    }
}

/// Decrypts in place what was written and leaves zeros where nothing was. With 4096-byte blocks a block may
/// be both: after a power cut, a part of its first write may be there. XTS treats each 16 bytes by
/// themselves, so the parts that are there decrypt as they would in a whole block.
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
pub(super) fn may_have_holes(bytes: &VolatileSlice<'_>) -> bool {
    let begins_with_zeros = |at| bytes.load::<u64>(at, Ordering::Relaxed).is_ok_and(|word| word == 0);
    (0..bytes.len()).step_by(SECTOR).any(begins_with_zeros)
}

/// Whether none of its sectors is all zero.
pub(super) fn all_there(bytes: &[u8]) -> bool {
    !bytes.chunks_exact(SECTOR).any(is_zero)
}

#[cfg(test)]
mod tests;
