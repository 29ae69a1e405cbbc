//! Which pages of the guest's memory we have written, for live migration. It costs a look at one flag
//! while no migration runs.
//!
//! Source: the vhost-user protocol, "Migration". The VMM shares a bitmap with a bit for each 4 KiB
//! page of guest addresses, from 0 on. Whoever writes guest memory marks it, afterwards: a page that
//! the VMM copies between the two has the new bytes already. vm-memory's own tracking is not used: it
//! would ask at every access.

use crate::base::sync::ReadWriteLocked;
use crate::vhost::shared;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard};
use vm_memory::{GuestMemoryMmap, MmapRegion, VolatileMemory};

/// Guest memory as the data path uses it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Bytes of guest memory for which there is one bit.
pub const PAGE: u64 = 4096;
/// Bytes of guest memory for which there is one byte in the bitmap.
const PAGES_8: u64 = 8 * PAGE;
/// No guest address: the used ring is not logged.
const OFF: u64 = u64::MAX;

/// The bitmap as the VMM gave it.
pub struct Bitmap {
    map: MmapRegion<()>,
}

impl Bitmap {
    /// Maps `size` bytes of `fd` from `offset`.
    ///
    /// # Errors
    /// A file that is shorter, or that could become so: touching what is gone would end the process.
    pub fn map(fd: OwnedFd, offset: u64, size: u64) -> io::Result<Self> {
        const WHAT: &str = "dirty log";
        if size == 0 || !offset.is_multiple_of(4096) {
            return Err(shared::invalid(WHAT, "it is empty, or its offset is not page-aligned"));
        }
        Ok(Bitmap { map: shared::map(WHAT, fd, offset, size)? })
    }

    /// The file once more, where the bitmap begins in it, and how many bytes it has.
    fn shared(&self) -> io::Result<(OwnedFd, u64, u64)> {
        let (fd, offset) = shared::file_of(&self.map)?;
        Ok((fd, offset, self.map.size() as u64))
    }

    /// Whether it has a bit for every page below guest address `end`.
    pub fn covers(&self, end: u64) -> bool {
        end.div_ceil(PAGES_8) <= self.map.size() as u64
    }

    /// Marks the pages of `len` bytes at `addr`.
    fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|more| addr.checked_add(more)) else { return };
        let bytes = self.map.as_volatile_slice();
        for page in addr / PAGE..=last / PAGE {
            // The gate sees to it that the bitmap covers all memory; a page beyond it is not the guest's.
            let Ok(byte) = bytes.get_atomic_ref::<AtomicU8>((page / 8) as usize) else { return };
            byte.fetch_or(1 << (page % 8), Ordering::AcqRel);
        }
    }
}

/// The log of a session. It is in force while there is a bitmap and the VMM has acknowledged VHOST_F_LOG_ALL.
#[derive(Default)]
pub struct DirtyLog {
    active: AtomicBool,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    wanted: bool,
    bitmap: Option<Bitmap>,
}

impl DirtyLog {
    /// Takes a bitmap instead of the one before, in which nothing is marked from here on.
    pub fn set_bitmap(&self, bitmap: Bitmap) {
        self.change(|state| state.bitmap = Some(bitmap));
    }

    /// Switches logging on or off.
    pub fn set_wanted(&self, wanted: bool) {
        self.change(|state| state.wanted = wanted);
    }

    /// Whether guest memory up to `end` can be logged: there is no bitmap, or one that covers it.
    pub fn covers(&self, end: u64) -> bool {
        self.read().bitmap.as_ref().is_none_or(|bitmap| bitmap.covers(end))
    }

    /// The bitmap's file once more, where the bitmap begins in it, and its bytes; `None` without a bitmap.
    pub fn shared(&self) -> io::Result<Option<(OwnedFd, u64, u64)>> {
        self.read().bitmap.as_ref().map(Bitmap::shared).transpose()
    }

    /// Whether it is in force.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Marks `len` bytes at `addr`, which were written just now.
    pub fn mark(&self, addr: u64, len: u64) {
        if self.is_active()
            && let Some(bitmap) = &self.read().bitmap
        {
            bitmap.mark(addr, len);
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.write_locked();
        change(&mut state);
        self.active.store(state.wanted && state.bitmap.is_some(), Ordering::Release);
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read_locked()
    }
}

/// The log as one ring sees it. What it writes into its used ring is logged only where the VMM says, and at
/// the address that the VMM says.
#[derive(Clone)]
pub struct RingLog {
    log: Arc<DirtyLog>,
    used: Arc<AtomicU64>,
}

impl RingLog {
    /// Nothing is logged of the used ring yet.
    pub fn new(log: Arc<DirtyLog>) -> Self {
        RingLog { log, used: Arc::new(AtomicU64::new(OFF)) }
    }

    /// Where the used ring is logged from now on; `None` for nowhere.
    pub fn set_used(&self, addr: Option<u64>) {
        self.used.store(addr.unwrap_or(OFF), Ordering::Release);
    }

    /// Where the used ring is logged; `None` for nowhere.
    pub fn used(&self) -> Option<u64> {
        Some(self.used.load(Ordering::Acquire)).filter(|&addr| addr != OFF)
    }

    /// Marks `len` bytes of guest memory at `addr`.
    pub fn mark(&self, addr: u64, len: u64) {
        self.log.mark(addr, len);
    }

    /// Marks `len` bytes of the used ring, from its byte `offset` on.
    pub fn mark_used(&self, offset: u64, len: u64) {
        if self.log.is_active()
            && let Some(addr) = self.used.load(Ordering::Acquire).checked_add(offset)
        {
            self.log.mark(addr, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn file(len: u64, flags: MFdFlags) -> File {
        let file = File::from(memfd_create("log", flags).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn log_file(len: u64) -> File {
        file(len, MFdFlags::MFD_ALLOW_SEALING)
    }

    /// The pages that are marked in `file`, from byte `offset`.
    fn marked(file: &File, offset: u64) -> Vec<u64> {
        let mut bytes = vec![0; (file.metadata().unwrap().len() - offset) as usize];
        file.read_exact_at(&mut bytes, offset).unwrap();
        (0..8 * bytes.len() as u64).filter(|page| bytes[(page / 8) as usize] & 1 << (page % 8) != 0).collect()
    }

    #[test]
    fn pages_that_were_touched_are_marked_and_no_others() {
        let file = log_file(8192);
        let log = DirtyLog::default();
        log.mark(0, 1);
        log.set_bitmap(Bitmap::map(file.try_clone().unwrap().into(), 4096, 16).unwrap());
        log.mark(0, 1);
        assert_eq!(marked(&file, 4096), [0; 0], "not switched on");
        log.set_wanted(true);
        for (addr, len) in
            [(PAGE - 1, 1), (3 * PAGE - 1, 2), (6 * PAGE, PAGE), (9 * PAGE, 0), (126 * PAGE, 9 * PAGE)]
        {
            log.mark(addr, len);
        }
        log.mark(u64::MAX, 1);
        log.mark(u64::MAX, 2);
        assert_eq!(marked(&file, 4096)[..6], [0, 2, 3, 6, 126, 127]);
        assert_eq!(marked(&file, 0).len(), 6, "nothing outside of it");
        log.set_wanted(false);
        log.mark(20 * PAGE, 1);
        assert_eq!(marked(&file, 4096).len(), 6, "switched off");
    }

    #[test]
    fn another_bitmap_takes_over() {
        let files = [log_file(4096), log_file(4096)];
        let log = DirtyLog::default();
        log.set_wanted(true);
        for (page, file) in files.iter().enumerate() {
            log.set_bitmap(Bitmap::map(file.try_clone().unwrap().into(), 0, 4096).unwrap());
            log.mark(page as u64 * PAGE, 1);
        }
        assert_eq!([marked(&files[0], 0), marked(&files[1], 0)], [[0], [1]]);
    }

    #[test]
    fn a_used_ring_is_logged_where_the_vmm_says() {
        let file = log_file(4096);
        let log = Arc::new(DirtyLog::default());
        log.set_bitmap(Bitmap::map(file.try_clone().unwrap().into(), 0, 4096).unwrap());
        log.set_wanted(true);
        let ring = RingLog::new(log);
        ring.mark_used(4, 8);
        ring.set_used(Some(5 * PAGE - 8));
        ring.mark_used(4, 8);
        ring.set_used(None);
        ring.mark_used(u64::MAX, 8);
        ring.set_used(Some(u64::MAX - 1));
        ring.mark_used(4, 8);
        assert_eq!(marked(&file, 0), [4, 5]);
    }

    #[test]
    fn a_bitmap_covers_so_many_pages() {
        let bitmap = Bitmap::map(log_file(4096).into(), 0, 3).unwrap();
        assert!(bitmap.covers(0) && bitmap.covers(3 * PAGES_8) && !bitmap.covers(3 * PAGES_8 + 1));
        assert!(!bitmap.covers(u64::MAX));
    }

    #[test]
    fn a_bitmap_that_is_no_whole_file_is_refused() {
        for (offset, size) in [(0, 0), (0, 4097), (4096, 1), (1, 16), (u64::MAX - 4095, 4096), (0, u64::MAX)]
        {
            assert!(Bitmap::map(log_file(4096).into(), offset, size).is_err(), "{size} at {offset}");
        }
        assert!(Bitmap::map(file(4096, MFdFlags::empty()).into(), 0, 4096).is_err(), "it may shrink");
        assert!(Bitmap::map(File::open("/dev/null").unwrap().into(), 0, 1).is_err());
        let kept = log_file(4096);
        let _bitmap = Bitmap::map(kept.try_clone().unwrap().into(), 0, 4096).unwrap();
        assert!(kept.set_len(1).is_err(), "it can shrink");
    }
}
