//! The system's allocator, which zeroes what is freed in a process that asked for it.
//!
//! Other people's code keeps what passes through it in buffers of its own: the KMS's answer in the HTTP
//! client, its JSON, its base64. A process that sees a data key in that way and is not made for speed (the
//! unwrap helper) switches wiping on first of all, and drops all of that before it ends. For every other
//! process it costs one relaxed load a free.
//!
//! What it cannot reach: the stack, registers, memory that is never freed, and pages mapped without it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, Ordering};
use zeroize::Zeroize;

static WIPE: AtomicBool = AtomicBool::new(false);

/// Zeroes whatever this process frees from now on.
pub fn wipe_from_now_on() {
    WIPE.store(true, Ordering::Relaxed);
}

/// The allocator, for the binary.
pub struct WipingAllocator;

// SAFETY: memory comes from `System` and goes back to it with the layout that it was asked for with; what is
// done besides writes inside blocks that the caller gives up, before they are given back.
unsafe impl GlobalAlloc for WipingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if WIPE.load(Ordering::Relaxed) {
            // SAFETY: the block is `layout.size()` bytes long and its owner has just given it up.
            unsafe { wipe(block, layout.size()) };
        }
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !WIPE.load(Ordering::Relaxed) {
            // SAFETY: as above.
            return unsafe { System.realloc(block, layout, new_size) };
        }
        // `System` would leave the old block behind as it is when it moves it, and the end of one
        // that it shortens. SAFETY: the caller promises that the new size, with the old alignment, is
        // a layout's, and not zero.
        let new = unsafe { System.alloc(Layout::from_size_align_unchecked(new_size, layout.align())) };
        if !new.is_null() {
            // SAFETY: both blocks are at least so long, and they are two; the old one is given back but once.
            unsafe {
                std::ptr::copy_nonoverlapping(block, new, layout.size().min(new_size));
                wipe(block, layout.size());
                System.dealloc(block, layout);
            }
        }
        new
    }
}

/// # Safety
/// `block` must be `len` bytes that nobody else uses.
unsafe fn wipe(block: *mut u8, len: usize) {
    // Bytes that nobody has written yet are no values: `MaybeUninit` may be any, and zeroing makes them some.
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts_mut(block.cast::<std::mem::MaybeUninit<u8>>(), len) };
    bytes.zeroize();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(len: usize) -> (Layout, *mut u8) {
        let layout = Layout::from_size_align(len, 16).unwrap();
        // SAFETY: the size is not zero.
        let block = unsafe { WipingAllocator.alloc(layout) };
        assert!(!block.is_null());
        // SAFETY: the block is that long.
        unsafe { block.write_bytes(0x5a, len) };
        (layout, block)
    }

    #[test]
    fn a_block_that_grows_and_shrinks_keeps_its_contents_and_leaves_none_behind() {
        wipe_from_now_on();
        for (from, to) in [(4096, 8192), (8192, 100)] {
            let (layout, old) = block(from);
            // SAFETY: the layout is the block's, and the size is not zero.
            let new = unsafe { WipingAllocator.realloc(old, layout, to) };
            // SAFETY: so much was written before, and copied.
            let kept = unsafe { std::slice::from_raw_parts(new, from.min(to)) };
            assert!(kept.iter().all(|b| *b == 0x5a));
            // SAFETY: the block is this one, of this size.
            unsafe { WipingAllocator.dealloc(new, Layout::from_size_align(to, 16).unwrap()) };
        }
    }

    #[test]
    fn wiping_zeroes_all_of_a_block() {
        let (layout, block) = block(1000);
        // SAFETY: the block is that long and ours.
        unsafe { wipe(block, 1000) };
        // SAFETY: as above.
        assert!(unsafe { std::slice::from_raw_parts(block, 1000) }.iter().all(|b| *b == 0));
        // SAFETY: as above; it is given back once.
        unsafe { WipingAllocator.dealloc(block, layout) };
    }
}
