//! The memory of a file that is memory: on tmpfs, a layer can be read where it lies, without a system call and
//! without a copy between.
//!
//! Looking at a page of a hole would make that page, and a volume is mostly holes. So a bitmap says which pages hold
//! something. It is a hint: where it says no, the file is read instead, which is always right; where it says yes for a
//! page that has gone meanwhile, a page of zeros is made, which means the same.
#![forbid(unsafe_code)]

use crate::backing::file::pool::PAGE;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// The largest file that is mapped: its bitmap takes 8 MiB.
const MAX_SIZE: u64 = 256 << 30;

/// A file's memory, mapped for reading.
pub(super) struct FileMemory {
    region: MmapRegion,
    /// One bit a page: whether it may be looked at.
    there: Box<[AtomicU64]>,
}

impl FileMemory {
    /// Maps `file`, which is `size` bytes long; `None` if it is too large or cannot be mapped.
    pub(super) fn map(file: &File, size: u64) -> Option<Self> {
        if size == 0 || size > MAX_SIZE {
            return None;
        }
        let mapped = || -> io::Result<Self> {
            let whole = FileOffset::new(File::from(file.as_fd().try_clone_to_owned()?), 0);
            let region = MmapRegionBuilder::new(size as usize)
                .with_file_offset(whole)
                .with_mmap_prot(libc::PROT_READ)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()
                .map_err(io::Error::other)?;
            let words = size.div_ceil(64 * PAGE as u64);
            let memory = FileMemory { region, there: (0..words).map(|_| AtomicU64::new(0)).collect() };
            memory.look_around(file, size)?;
            Ok(memory)
        };
        mapped().inspect_err(|e| log::info!("the layer is read by system calls: {e}")).ok()
    }

    /// Notes what the file holds.
    fn look_around(&self, file: &File, size: u64) -> io::Result<()> {
        let mut from = 0;
        while from < size as i64 {
            let start = match lseek64(file, from, Whence::SeekData) {
                Ok(start) => start,
                Err(Errno::ENXIO) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            from = lseek64(file, start, Whence::SeekHole)?;
            self.written(start as u64, (from - start) as u64);
        }
        Ok(())
    }

    /// The bytes at `offset`, if all their pages are there. They may change while they are read.
    pub(super) fn bytes(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let slice = self.region.get_slice(usize::try_from(offset).ok()?, len).ok()?;
        let there =
            |page: u64| self.there[page as usize / 64].load(Ordering::Relaxed) >> (page % 64) & 1 == 1;
        pages_touched(offset, len as u64).all(there).then_some(slice)
    }

    /// Notes that the range was written. Beyond the file's end nothing is noted.
    pub(super) fn written(&self, offset: u64, len: u64) {
        for page in pages_touched(offset, len) {
            let Some(word) = self.there.get(page as usize / 64) else { return };
            let bit = 1 << (page % 64);
            // What is there most often needs no write to a cache line that others read.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Notes that the range was given back.
    pub(super) fn given_back(&self, offset: u64, len: u64) {
        for page in offset.div_ceil(PAGE as u64)..(offset + len) / PAGE as u64 {
            let Some(word) = self.there.get(page as usize / 64) else { return };
            word.fetch_and(!(1 << (page % 64)), Ordering::Relaxed);
        }
    }
}

fn pages_touched(offset: u64, len: u64) -> std::ops::Range<u64> {
    offset / PAGE as u64..(offset + len).div_ceil(PAGE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_was_written_is_there_and_holes_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[7; 8192], 65536).unwrap();
        let memory = FileMemory::map(&file, 1 << 20).unwrap();
        assert!(memory.bytes(0, 512).is_none());
        assert!(memory.bytes(65536 - 512, 1024).is_none(), "half of it is a hole");
        let mut found = [0u8; 8192];
        memory.bytes(65536, 8192).unwrap().copy_to(&mut found[..]);
        assert_eq!(found, [7; 8192]);

        file.write_all_at(&[9; 512], 512).unwrap();
        memory.written(512, 512);
        memory.bytes(512, 512).unwrap().copy_to(&mut found[..512]);
        assert_eq!(found[..512], [9; 512]);

        memory.given_back(65536 + 512, 7680);
        assert!(memory.bytes(65536, 4096).is_some(), "only a part of this page was given back");
        assert!(memory.bytes(65536 + 4096, 4096).is_none());
        assert!(memory.bytes((1 << 20) - 512, 1024).is_none(), "beyond the end");
    }

    #[test]
    fn what_cannot_be_mapped_is_not() {
        let file = tempfile::tempfile().unwrap();
        assert!(FileMemory::map(&file, 0).is_none());
        assert!(FileMemory::map(&file, MAX_SIZE + 4096).is_none());
    }
}
