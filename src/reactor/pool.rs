//! The bounce buffers of one thread: a fixed run of pages, handed out in contiguous pieces.
//!
//! The size is the bound on what a queue can ever hold; whoever finds it empty waits for completions.
//!
//! The kernel is asked to make a pool out of huge pages. A buffer of many small pages is as many
//! segments to a device, and on a virtual disk that takes one segment a request, as many requests;
//! in a huge page it is one.

use std::cell::RefCell;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes in a page of the pool: the alignment that O_DIRECT needs at most.
pub(crate) const PAGE: usize = 4096;
/// Pages in a pool: 4 MiB a thread, which is 128 KiB at queue depth 32, or 4 KiB at 1024.
pub(crate) const PAGES: u32 = 1024;
/// Bytes of a pool.
const BYTES: usize = PAGES as usize * PAGE;
/// Bytes of a huge page on x86-64, and on arm64 with small pages of 4096 bytes.
const HUGE_PAGE: usize = 2 << 20;
/// Pages of the pool in a huge page.
const HUGE_PAGES: u32 = (HUGE_PAGE / PAGE) as u32;
/// The most bytes in one buffer: larger transfers go in pieces.
pub(crate) const MAX_BUFFER: usize = 256 * 1024;

/// A run of bytes, owned by whoever holds it. It cannot be copied, and only the queue that made it can look
/// inside ([`crate::backing::Queue::bytes`]).
#[derive(Debug)]
pub struct Buffer {
    /// Which pool it is from: it is of no use to another.
    pool: u32,
    /// First page in the pool.
    page: u32,
    /// Pages it occupies.
    pages: u32,
    /// Where in the first page its bytes begin.
    skip: u32,
    /// Bytes in use.
    len: u32,
}

impl Buffer {
    /// Bytes in use.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// A number that no other buffer of the same queue has meanwhile, below
    /// [`crate::backing::Queue::places`]; one more for each 4096 bytes before those of the next.
    pub fn place(&self) -> usize {
        self.page as usize
    }

    /// Whether it holds nothing. A pool never gives such a buffer.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where in its pages its bytes begin.
    pub(crate) fn skip(&self) -> usize {
        self.skip as usize
    }
}

/// Bytes of a pool that the kernel is given: a part of a buffer.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    start: usize,
    pub(crate) len: u32,
}

impl Span {
    /// This span without its first `n` bytes.
    pub(crate) fn from(self, n: u32) -> Self {
        Span { start: self.start + n as usize, len: self.len - n }
    }
}

/// Pages for transfers, not for keys: they hold ciphertext, and plaintext only while a request is served.
pub(crate) struct Pool {
    id: u32,
    base: NonNull<u8>,
    for_ring: bool,
    free: RefCell<Free>,
}

/// Which pages are free.
struct Free {
    /// One bit a page, 1 = free.
    bits: [u64; PAGES as usize / 64],
    /// Where the last search ended.
    hint: usize,
    pages: u32,
}

impl Pool {
    /// Maps the pages: out of huge ones, where the kernel has some and the pool is `for_ring`, to be
    /// registered with it. A huge page is there as a whole as soon as one byte of it is touched; so that is
    /// for a pool all of which will be there anyway.
    pub(crate) fn new(for_ring: bool) -> io::Result<Self> {
        use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
        // Room enough to begin where a huge page can.
        let room = NonZeroUsize::MIN.saturating_add(BYTES + HUGE_PAGE - 1);
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice
        // touches no other memory.
        let mapped = unsafe {
            mmap_anonymous(None, room, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }?;
        let before = mapped.cast::<u8>().align_offset(HUGE_PAGE);
        // SAFETY: less than a huge page's length into the mapping, which is so much longer than the pool.
        let base = unsafe { mapped.byte_add(before) };
        static POOLS: AtomicU32 = AtomicU32::new(0);
        let id = POOLS.fetch_add(1, Ordering::Relaxed);
        let free = Free { bits: [u64::MAX; _], hint: 0, pages: PAGES };
        let pool = Pool { id, base: base.cast(), for_ring, free: RefCell::new(free) };
        // SAFETY: these are the parts of the mapping before and behind the pool, whole pages, that nobody
        // has touched.
        unsafe {
            if before > 0 {
                munmap(mapped, before)?;
            }
            munmap(base.byte_add(BYTES), HUGE_PAGE - before)?;
        }
        // What passes through is the guest's plaintext: it has no place in a core file.
        // SAFETY: the range is the pool's; DONTDUMP does not change its contents.
        unsafe { madvise(base, BYTES, MmapAdvise::MADV_DONTDUMP) }?;
        if for_ring {
            // A kernel without huge pages says that it knows no such advice, and the pool has small ones.
            // SAFETY: as above.
            let _ = unsafe { madvise(base, BYTES, MmapAdvise::MADV_HUGEPAGE) };
        }
        Ok(pool)
    }

    /// Whether it was made for the kernel to know.
    pub(crate) fn is_for_ring(&self) -> bool {
        self.for_ring
    }

    /// The whole pool as an iovec, for registration with io_uring.
    pub(crate) fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.base.as_ptr().cast(), iov_len: BYTES }
    }

    /// Whether all of the pool that is there lies in huge pages, as /proc/self/smaps says (proc(5)).
    pub(crate) fn is_huge(&self) -> bool {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        in_huge_pages(&maps, self.base.as_ptr() as usize).is_some_and(|bytes| bytes >= BYTES)
    }

    /// A buffer of `len` bytes, 1..=[`MAX_BUFFER`], page-aligned.
    pub(crate) fn alloc(&self, len: usize) -> Option<Buffer> {
        self.alloc_within(0, len, 0)
    }

    /// A buffer of `len` bytes that begin `skip` bytes into its first page, with so many `spare` pages after
    /// those that the bytes lie in.
    pub(crate) fn alloc_within(&self, skip: usize, len: usize, spare: usize) -> Option<Buffer> {
        debug_assert!((1..=MAX_BUFFER).contains(&len) && skip < PAGE);
        let pages = ((skip + len).div_ceil(PAGE) + spare) as u32;
        let page = self.free.borrow_mut().take(pages)?;
        Some(Buffer { pool: self.id, page, pages, skip: skip as u32, len: len as u32 })
    }

    /// Takes a buffer back.
    pub(crate) fn free(&self, buffer: Buffer) {
        assert_eq!(buffer.pool, self.id, "a buffer goes back to the pool that made it");
        self.free.borrow_mut().give_back(buffer.page, buffer.pages);
    }

    /// Where `len` bytes of the buffer's pages lie in the pool, from the `start`-th on.
    pub(crate) fn span(&self, buffer: &Buffer, start: usize, len: usize) -> Span {
        assert_eq!(buffer.pool, self.id, "a buffer is used with the pool that made it");
        assert!(start + len <= buffer.pages as usize * PAGE, "what is used of a buffer lies in its pages");
        Span { start: buffer.page as usize * PAGE + start, len: len as u32 }
    }

    /// Where the bytes of `span` are.
    pub(crate) fn ptr(&self, span: Span) -> *mut u8 {
        debug_assert!(span.start + span.len as usize <= BYTES);
        // SAFETY: it lies inside the mapping, as the pages of this pool's buffers do;
        // `Pool::span` saw to that.
        unsafe { self.base.as_ptr().add(span.start) }
    }

    /// The buffer's bytes.
    pub(crate) fn bytes<'a>(&'a self, buffer: &'a mut Buffer) -> &'a mut [u8] {
        let span = self.span(buffer, buffer.skip as usize, buffer.len as usize);
        // SAFETY: `alloc_within` gave these pages to this buffer alone, buffers cannot be copied, and for as
        // long as the slice lives nobody else has the buffer, and the pool stays. The kernel uses the pages
        // only while the queue owns the buffer. `span` lies in its pages.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(span), span.len as usize) }
    }

    /// All bytes of the buffer's pages.
    pub(crate) fn whole<'a>(&'a self, buffer: &'a mut Buffer) -> &'a mut [u8] {
        let span = self.span(buffer, 0, buffer.pages as usize * PAGE);
        // SAFETY: as for `bytes`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(span), span.len as usize) }
    }

    /// Bytes of the buffer's pages, which [`Pool::span`] has found in them.
    pub(crate) fn part<'a>(&'a self, buffer: &'a mut Buffer, span: Span) -> &'a mut [u8] {
        let start = span.start.checked_sub(buffer.page as usize * PAGE);
        let start = start.expect("a part of a buffer does not begin before it");
        &mut self.whole(buffer)[start..][..span.len as usize]
    }
}

impl Free {
    /// So many pages side by side, if there are some.
    fn take(&mut self, pages: u32) -> Option<u32> {
        if pages > self.pages {
            return None;
        }
        let page = if pages == 1 { self.find_page()? } else { self.find_run(pages)? };
        self.mark(page, pages, false);
        Some(page)
    }

    fn give_back(&mut self, page: u32, pages: u32) {
        self.mark(page, pages, true);
        self.hint = page as usize / 64;
    }

    fn find_page(&mut self) -> Option<u32> {
        let words = self.bits.len();
        (0..words).map(|i| (self.hint + i) % words).find(|&word| self.bits[word] != 0).map(|word| {
            self.hint = word;
            (word * 64) as u32 + self.bits[word].trailing_zeros()
        })
    }

    /// The first free run of so many pages in one huge page.
    fn find_run(&self, pages: u32) -> Option<u32> {
        let mut start = 0;
        while start + pages <= PAGES {
            let last = start + pages - 1;
            match (start..=last).rev().find(|&page| !self.is_free(page)) {
                Some(taken) => start = taken + 1,
                // Within one huge page, or else it would be two segments.
                None if start / HUGE_PAGES == last / HUGE_PAGES => return Some(start),
                None => start = last / HUGE_PAGES * HUGE_PAGES,
            }
        }
        None
    }

    fn is_free(&self, page: u32) -> bool {
        self.bits[page as usize / 64] >> (page % 64) & 1 == 1
    }

    fn mark(&mut self, page: u32, pages: u32, free: bool) {
        for page in page..page + pages {
            let bit = 1u64 << (page % 64);
            let word = &mut self.bits[page as usize / 64];
            debug_assert_eq!(*word & bit == 0, free, "a page is taken and given back once");
            *word ^= bit;
        }
        if free { self.pages += pages } else { self.pages -= pages }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length; no buffer can be looked
        // into without the pool.
        let unmapped = unsafe { nix::sys::mman::munmap(self.base.cast(), BYTES) };
        debug_assert!(unmapped.is_ok());
    }
}

/// How many bytes of the mapping at `address` lie in huge pages, given what /proc/PID/smaps says.
fn in_huge_pages(maps: &str, address: usize) -> Option<usize> {
    let is_there = |line: &str| {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        let number = |hex| usize::from_str_radix(hex, 16).ok();
        Some((number(from)?..number(to)?).contains(&address))
    };
    let of_mapping = maps.lines().skip_while(|line| is_there(line) != Some(true));
    let huge = of_mapping.into_iter().find_map(|line| line.strip_prefix("AnonHugePages:"))?;
    huge.trim().strip_suffix(" kB")?.parse::<usize>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_huge_pages_is_found_by_the_mapping() {
        let maps = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \nSize: 4096 kB\nAnonHugePages:   2048 \
                    kB\n\
                    7f0000400000-7f0000c00000 rw-p 00000000 00:00 0 \nSize: 8192 kB\nAnonHugePages:   4096 \
                    kB\n";
        assert_eq!(in_huge_pages(maps, 0x7f00_0000_0000), Some(2 << 20));
        assert_eq!(in_huge_pages(maps, 0x7f00_0080_0000), Some(4 << 20));
        assert_eq!(in_huge_pages(maps, 0x7f00_00c0_0000), None);
        assert_eq!(in_huge_pages("", 0x7f00_0000_0000), None);
    }

    #[test]
    fn no_buffer_lies_in_two_huge_pages() {
        let pool = Pool::new(true).unwrap();
        assert!((pool.base.as_ptr() as usize).is_multiple_of(HUGE_PAGE));
        let first = pool.alloc(10 * PAGE).unwrap();
        let mut held = Vec::new();
        while let Some(buffer) = pool.alloc(MAX_BUFFER - PAGE) {
            assert_eq!(buffer.page / HUGE_PAGES, (buffer.page + buffer.pages - 1) / HUGE_PAGES);
            held.push(buffer);
        }
        assert_eq!(held.len(), 7 + 8, "as many as each huge page has room for, beside the first buffer");
        held.into_iter().for_each(|b| pool.free(b));
        pool.free(first);
    }

    #[test]
    fn buffers_never_overlap_and_all_come_back() {
        let pool = Pool::new(false).unwrap();
        let mut held: Vec<Buffer> = Vec::new();
        let mut seed = 1u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let roll = (seed >> 33) as usize;
            if roll.is_multiple_of(3) && !held.is_empty() {
                let mut buffer = held.swap_remove(roll / 3 % held.len());
                let tag = pool.bytes(&mut buffer)[0];
                assert!(pool.whole(&mut buffer).iter().all(|&b| b == tag), "somebody else wrote into it");
                pool.free(buffer);
            } else if let Some(mut buffer) =
                pool.alloc_within(roll % 8 * 512, 1 + roll % MAX_BUFFER, roll % 3)
            {
                assert_eq!(pool.bytes(&mut buffer).len(), 1 + roll % MAX_BUFFER);
                pool.whole(&mut buffer).fill(roll as u8);
                held.push(buffer);
            }
        }
        for buffer in held {
            pool.free(buffer);
        }
        assert_eq!(pool.free.borrow().pages, PAGES);
        let all: Vec<_> = std::iter::from_fn(|| pool.alloc(PAGE)).collect();
        assert_eq!(all.len(), PAGES as usize);
        assert!(pool.alloc(1).is_none());
        all.into_iter().for_each(|b| pool.free(b));
    }
}
