//! Dirty-page logging for live migration, which costs nothing while no migration runs.
//!
//! vm-memory asks a bitmap at every access. This one's slices know nothing (`()`), so accesses stay plain;
//! whoever writes guest memory says so by [`mark_dirty`], which looks at one flag a region while nobody
//! migrates.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vhost_user_backend::bitmap::{AtomicBitmapMmap, BitmapMmapRegion, BitmapReplace};
use vm_memory::bitmap::{Bitmap, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

/// Guest memory as the data path uses it.
pub type GuestMemory = GuestMemoryMmap<DirtyLog>;

/// The log of one memory region. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct DirtyLog(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Whether a front-end gave a log.
    active: AtomicBool,
    log: BitmapMmapRegion,
}

impl DirtyLog {
    fn mark(&self, offset: usize, len: usize) {
        if self.0.active.load(Ordering::Acquire) {
            self.0.log.mark_dirty(offset, len);
        }
    }
}

impl WithBitmapSlice<'_> for DirtyLog {
    type S = ();
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.log.dirty_at(offset)
    }

    fn slice_at(&self, _offset: usize) {}
}

impl NewBitmap for DirtyLog {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

impl BitmapReplace for DirtyLog {
    type InnerBitmap = AtomicBitmapMmap;

    fn replace(&self, bitmap: AtomicBitmapMmap) {
        self.0.log.replace(bitmap);
        self.0.active.store(true, Ordering::Release);
    }
}

/// Says that `len` bytes at `addr` were written. The caller has checked that they lie in `mem`.
pub fn mark_dirty(mem: &GuestMemory, addr: GuestAddress, len: u64) {
    let (mut addr, mut left) = (addr, len);
    while left > 0 {
        let Some((region, offset)) = mem.to_region_addr(addr) else { return };
        let here = left.min(region.len() - offset.0);
        // The mapping's own bitmap: the region's trait method would give a slice of it, which knows nothing.
        let mapping: &MmapRegion<DirtyLog> = region;
        mapping.bitmap().mark(offset.0 as usize, here as usize);
        left -= here;
        match addr.checked_add(here) {
            Some(next) => addr = next,
            None => return,
        }
    }
}
