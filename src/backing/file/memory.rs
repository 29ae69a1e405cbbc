//! The memory of a file that is memory: on tmpfs, a layer can be read where it lies, without a system call
//! and without a copy between.
//!
//! Looking at a page of a hole would make that page, and a volume is mostly holes; where the file system is
//! full, it would end the process (SIGBUS). So a bitmap says which pages are there, and nobody looks at
//! another. Where it says no, the file is read instead, which is always right. At first it says no of all
//! pages: a large file is not gone through before its first byte is read. A page is there that was written,
//! or in which something was found that is not zero.
//!
//! Where the bitmap says yes, it must be so for as long as somebody looks: each queue is a [`User`] with a
//! lock of its own, which it holds while it reads from the memory, and while it reads or writes the file and
//! notes that in the bitmap. Who makes a hole holds the locks of all. So a read finds the bytes of before the
//! hole or none, and no page of zeros that came between.
//!
//! To catch the signal and go on is no way out: the kernel would put the registers, with the keys that the
//! cipher has in them, onto a stack in ordinary memory. What is left is somebody else who makes holes in an
//! attached layer, or cuts it off: whoever may write the store. That ends the process, as
//! docs/threat-model.md says.
#![forbid(unsafe_code)]

use crate::base::sync::Locked;
use crate::base::zeros::is_zero;
use crate::reactor::pool::PAGE;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// The largest file that is mapped: its bitmap takes 8 MiB.
const MAX_SIZE: u64 = 256 << 30;
/// Bytes of a hole that are made at a time, while nobody reads.
const HOLE: u64 = 8 << 20;

/// A file's memory, mapped for reading.
pub(super) struct FileMemory {
    region: MmapRegion,
    /// One bit a page: whether it may be looked at.
    there: Box<[AtomicU64]>,
    /// The locks of all users.
    users: Mutex<Vec<Arc<Mutex<()>>>>,
}

/// One queue's way to the memory of a layer.
pub(super) struct User {
    memory: Arc<FileMemory>,
    busy: Arc<Mutex<()>>,
}

impl User {
    pub(super) fn of(memory: Arc<FileMemory>) -> Self {
        let busy = Arc::<Mutex<()>>::default();
        memory.users.locked().push(busy.clone());
        User { memory, busy }
    }

    /// The bytes at `offset`, if all their pages are there, and what keeps them there. They may
    /// change while they are read.
    pub(super) fn bytes(&self, offset: u64, len: usize) -> Option<(VolatileSlice<'_>, MutexGuard<'_, ()>)> {
        let busy = self.busy.locked();
        self.memory.bytes(offset, len).map(|bytes| (bytes, busy))
    }

    /// The bytes at `offset`, if their pages were there a moment ago: for a hint alone.
    pub(super) fn glance(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        self.memory.bytes(offset, len)
    }

    /// Has `read` read from the range into `bytes`.
    pub(super) fn read(
        &self,
        offset: u64,
        bytes: &mut [u8],
        read: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let _busy = self.busy.locked();
        read(bytes)?;
        self.memory.found(offset, bytes);
        Ok(())
    }

    /// Has `write` write to the range.
    pub(super) fn write(
        &self,
        offset: u64,
        len: u64,
        write: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let _busy = self.busy.locked();
        write()?;
        self.memory.written(offset, len);
        Ok(())
    }

    /// Has `punch` make holes of the range, piece by piece.
    pub(super) fn give_back(
        &self,
        offset: u64,
        len: u64,
        mut punch: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut at = offset;
        while at < offset + len {
            let end = (at - at % HOLE + HOLE).min(offset + len);
            let users = self.memory.users.locked();
            let _all: Vec<_> = users.iter().map(|user| user.locked()).collect();
            self.memory.given_back(at, end - at);
            punch(at, end - at)?;
            at = end;
        }
        Ok(())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.memory.users.locked().retain(|user| !Arc::ptr_eq(user, &self.busy));
    }
}

impl FileMemory {
    /// Maps `file`, which is `size` bytes long and of which nothing is known yet; `None` if it is too
    /// large or cannot be mapped.
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
            let there = (0..words).map(|_| AtomicU64::new(0)).collect();
            Ok(FileMemory { region, there, users: Mutex::default() })
        };
        mapped().inspect_err(|e| log::info!("the layer is read by system calls: {e}")).ok()
    }

    /// The bytes at `offset`, if all their pages are there.
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

    /// Notes that these bytes were read at `offset`. Zeros may be those of a hole.
    pub(super) fn found(&self, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (page, behind) = rest.split_at((PAGE - at as usize % PAGE).min(rest.len()));
            if !is_zero(page) {
                self.written(at, page.len() as u64);
            }
            at += page.len() as u64;
            rest = behind;
        }
    }

    /// Notes that the range is given back.
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
    use std::cell::Cell;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_hole_is_made_in_pieces_of_which_each_lies_within_one_mapped_stretch() {
        let file = tempfile::tempfile().unwrap();
        let size = 3 * HOLE;
        file.set_len(size).unwrap();
        let user = User::of(Arc::new(FileMemory::map(&file, size).unwrap()));
        let mut pieces = Vec::new();
        let punch = |at, len| {
            pieces.push((at, len));
            Ok(())
        };
        user.give_back(HOLE - 4096, HOLE + 8192, punch).unwrap();
        assert_eq!(pieces, [(HOLE - 4096, 4096), (HOLE, HOLE), (2 * HOLE, 4096)]);
    }

    #[test]
    fn what_was_written_is_there_and_holes_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[7; 8192], 65536).unwrap();
        let memory = FileMemory::map(&file, 1 << 20).unwrap();
        assert!(memory.bytes(65536, 8192).is_none(), "it is not known yet");
        let user = User::of(Arc::new(memory));
        let mut around = [0; 16384];
        user.read(65536 - 4096 - 512, &mut around, |bytes| file.read_exact_at(bytes, 65536 - 4096 - 512))
            .unwrap();
        let memory = &user.memory;
        assert!(memory.bytes(65536 - 4096, 512).is_none());
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
    fn no_hole_is_made_under_who_reads_or_writes() {
        let file = tempfile::tempfile().unwrap();
        let size = 4 * PAGE as u64;
        file.set_len(size).unwrap();
        file.write_all_at(&[7; 4 * PAGE], 0).unwrap();
        let memory = Arc::new(FileMemory::map(&file, size).unwrap());
        memory.written(0, size);
        let (reader, writer, puncher) =
            (User::of(memory.clone()), User::of(memory.clone()), User::of(memory.clone()));
        let busy = AtomicBool::new(true);
        // Another makes a hole, or waits for all to leave.
        let punched = |leave: &dyn Fn()| {
            std::thread::scope(|scope| {
                let punches = scope.spawn(|| {
                    let punch = |_, _| {
                        assert!(!busy.load(Ordering::SeqCst), "somebody is there");
                        Ok(())
                    };
                    puncher.give_back(0, size, punch).unwrap();
                });
                while memory.users.try_lock().is_ok() && !punches.is_finished() {
                    std::thread::yield_now();
                }
                leave();
            });
        };
        let read = Cell::new(Some(reader.bytes(0, 4 * PAGE).expect("it is there")));
        punched(&|| {
            let (bytes, there) = read.take().unwrap();
            let mut found = [0_u8; 4 * PAGE];
            bytes.copy_to(&mut found[..]);
            assert_eq!(found, [7; 4 * PAGE]);
            busy.store(false, Ordering::SeqCst);
            drop(there);
        });
        drop(read);
        assert!(reader.bytes(0, PAGE).is_none(), "nobody looks at it any more");
        busy.store(true, Ordering::SeqCst);
        std::thread::scope(|scope| {
            let (begun, begins) = std::sync::mpsc::channel();
            let (go_on, goes_on) = std::sync::mpsc::channel();
            scope.spawn(move || {
                let write = || {
                    begun.send(()).unwrap();
                    goes_on.recv().unwrap();
                    Ok(())
                };
                writer.write(0, size, write).unwrap();
            });
            begins.recv().unwrap();
            punched(&|| {
                busy.store(false, Ordering::SeqCst);
                go_on.send(()).unwrap();
            });
        });
        assert!(reader.bytes(0, PAGE).is_none(), "what was written before is noted before, and given back");
        drop((reader, puncher));
        assert!(memory.users.locked().is_empty());
    }

    #[test]
    fn what_cannot_be_mapped_is_not() {
        let file = tempfile::tempfile().unwrap();
        assert!(FileMemory::map(&file, 0).is_none());
        assert!(FileMemory::map(&file, MAX_SIZE + 4096).is_none());
    }
}
