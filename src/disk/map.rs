//! The layer map: for each 4 KiB of a volume with several layers, which of them can have it at all.
//!
//! It spares a read the layers that hold nothing there, and tells where nothing lies below the top. It
//! is never the truth of what is in a layer: that is the layers' bytes alone. It only has to be an
//! **upper bound**, always:
//!
//! 1. The frozen layers, and the top as it was when the map was made, are looked through once in the
//!    background ([`Backing::next_data`]). Until that is over the map [is not
//!    ready](LayerMap::is_ready) and returns nothing.
//! 2. A write marks its blocks *before* it is submitted ([`LayerMap::mark`]). The map is there before the
//!    first queue is opened, and writes of earlier processes have ended before that, so everything that can
//!    be in the top was either there for the search to find or has been marked.
//! 3. An entry is a set of layers, forgotten except for its topmost member and for whether there may be
//!    others. Marking adds a member. That is associative, commutative and idempotent, and each change of an
//!    entry is one atomic exchange; so it does not matter in which order writers and the search come, and
//!    none undoes another's mark.
//! 4. A member is taken out only if it is frozen and was read and found all zero ([`LayerMap::lower`]), and
//!    no layer above it had anything either. A command that moves data into a frozen layer moves what the
//!    layer right above has, and has that marked before it goes from there: so that stays true. It is one
//!    exchange as well, which fails if the entry has changed meanwhile.
//!
//! Hence the orderings. Entries stand each for itself, so `Relaxed` keeps what 3 and 4 need. Whoever reads
//! after a write has completed must see its mark: between the two lie the ring's indices (published with
//! `Release`, read with `Acquire`, the guest between them), and the mark was made before. Whoever reads
//! while it is in flight may see either. Readiness is set with `Release` after the last entry of the search
//! and read with `Acquire`.
//!
//! Layers are counted from the bottom, from 1, so that a new top renumbers nothing: the
//! map goes on to be right.
//!
//! **Memory.** One byte for each block, in pages of 4096 made when the first entry in them is: 1/4096
//! of the 16 MiB pieces of the volume in which there is anything. A block is 4 KiB up to a volume of 1
//! TiB, and as many times larger as the volume is beyond that, so that a map never has more than 256
//! MiB (and 1 MiB for its table).

use crate::backing::Backing;
use crate::base::sync::Locked;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// The most layers that heights can tell apart.
pub const MAX_HEIGHT: usize = 127;

/// The smallest block: log₂ of its bytes.
const MIN_SHIFT: u32 = 12;
/// Entries at most.
const MAX_BLOCKS: u64 = 1 << 28;
const PAGE: usize = 4096;

/// How far up data may be in a block, and whether there may be some further down as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u8);

impl Entry {
    const MORE: u8 = 0x80;
    /// No layer has anything.
    pub const NOTHING: Entry = Entry(0);

    fn new(height: u8, more: bool) -> Self {
        // With one layer left there is no further one.
        Entry(height | if more && height > 1 { Self::MORE } else { 0 })
    }

    /// The topmost layer that may have data, counted from 1 at the bottom; 0: none.
    pub fn height(self) -> u8 {
        self.0 & !Self::MORE
    }

    /// The topmost layer below `height` that may have data; 0: none.
    pub fn below(self, height: u8) -> u8 {
        if self.height() < height {
            self.height()
        } else if self.0 & Self::MORE != 0 {
            height - 1
        } else {
            0
        }
    }

    fn with(self, height: u8) -> Self {
        let own = self.height();
        Entry::new(own.max(height), self.0 & Self::MORE != 0 || (own != height && own != 0))
    }

    fn without_topmost(self) -> Self {
        Entry::new(self.below(self.height()), self.0 & Self::MORE != 0)
    }
}

type Page = [AtomicU8; PAGE];

struct Cells {
    shift: u32,
    blocks: u64,
    pages: Box<[OnceLock<Box<Page>>]>,
    ready: AtomicBool,
}

impl Cells {
    fn new(size: u64) -> Self {
        let mut shift = MIN_SHIFT;
        while size.div_ceil(1 << shift) > MAX_BLOCKS {
            shift += 1;
        }
        let blocks = size.div_ceil(1 << shift);
        let pages = (0..blocks.div_ceil(PAGE as u64)).map(|_| OnceLock::new()).collect();
        Cells { shift, blocks, pages, ready: AtomicBool::new(false) }
    }

    fn blocks(&self, bytes: Range<u64>) -> Range<u64> {
        bytes.start >> self.shift..bytes.end.div_ceil(1 << self.shift).min(self.blocks)
    }

    fn entry(&self, block: u64) -> Entry {
        let page = self.pages[block as usize / PAGE].get();
        Entry(page.map_or(0, |page| page[block as usize % PAGE].load(Ordering::Relaxed)))
    }

    fn mark(&self, bytes: Range<u64>, height: u8) {
        for block in self.blocks(bytes) {
            let page = self.pages[block as usize / PAGE]
                .get_or_init(|| Box::new([const { AtomicU8::new(0) }; PAGE]));
            change(&page[block as usize % PAGE], |entry| {
                let marked = entry.with(height);
                (marked != entry).then_some(marked)
            });
        }
    }
}

/// Replaces an entry by what `f` makes of it, if anything.
fn change(cell: &AtomicU8, f: impl Fn(Entry) -> Option<Entry>) {
    // Where there is nothing to change, as mostly, this does not write.
    let _ = cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |byte| f(Entry(byte)).map(|e| e.0));
}

/// The map of a volume with several layers. Dropping it ends the search.
pub struct LayerMap {
    cells: Arc<Cells>,
    search: Arc<Search>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Search {
    stop: AtomicBool,
    over: Mutex<bool>,
    changed: Condvar,
}

impl LayerMap {
    /// A map for the layers of `backing`, which it looks through in the background. Made
    /// before any queue is opened.
    pub fn build(backing: Arc<dyn Backing>) -> io::Result<Self> {
        let cells = Arc::new(Cells::new(backing.caps().size));
        let search = Arc::new(Search::default());
        let (into, shared) = (cells.clone(), search.clone());
        let run = move || {
            match look_through(&*backing, &into, &shared.stop) {
                Ok(true) => into.ready.store(true, Ordering::Release),
                Ok(false) => {}
                Err(e) => log::warn!("no layer map, reads try each layer: {e}"),
            }
            drop(backing);
            *shared.over.locked() = true;
            shared.changed.notify_all();
        };
        let thread = std::thread::Builder::new().name("layer-map".into()).spawn(run)?;
        Ok(LayerMap { cells, search, thread: Some(thread) })
    }

    /// Whether the map can be asked.
    pub fn is_ready(&self) -> bool {
        self.cells.ready.load(Ordering::Acquire)
    }

    /// Waits until the search is over, no longer than `limit`; returns whether it is. It may have failed.
    pub fn wait(&self, limit: Duration) -> bool {
        let over = self.search.over.locked();
        let waited = self.search.changed.wait_timeout_while(over, limit, |over| !*over);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// The first byte at or after `from` at which some layer below `height` may have
    /// something, if there is one.
    pub fn next_below(&self, height: u8, from: u64) -> Option<u64> {
        if !self.is_ready() {
            return (from < self.cells.blocks << self.cells.shift).then_some(from);
        }
        let mut block = from >> self.cells.shift;
        while block < self.cells.blocks {
            let page_end = ((block / PAGE as u64 + 1) * PAGE as u64).min(self.cells.blocks);
            let there = self.cells.pages[block as usize / PAGE].get().is_some();
            if there && let Some(found) = (block..page_end).find(|&b| self.cells.entry(b).below(height) > 0) {
                return Some(from.max(found << self.cells.shift));
            }
            block = page_end;
        }
        None
    }

    /// How many of these bytes lie in blocks in which some layer below `height` may have something.
    pub fn bytes_below(&self, height: u8, bytes: Range<u64>) -> u64 {
        if !self.is_ready() {
            return bytes.end - bytes.start;
        }
        let mut blocks = self.cells.blocks(bytes);
        let mut count = 0;
        while blocks.start < blocks.end {
            let page_end = (blocks.start / PAGE as u64 + 1) * PAGE as u64;
            let end = page_end.min(blocks.end);
            if self.cells.pages[blocks.start as usize / PAGE].get().is_some() {
                count +=
                    (blocks.start..end).filter(|&b| self.cells.entry(b).below(height) > 0).count() as u64;
            }
            blocks.start = end;
        }
        count << self.cells.shift
    }

    /// Bytes of a block: a power of two, at least 4096.
    pub fn block_size(&self) -> u64 {
        1 << self.cells.shift
    }

    /// Notes that the layer at `height` may have data in these bytes. To be called before
    /// a write is submitted.
    pub fn mark(&self, bytes: Range<u64>, height: u8) {
        self.cells.mark(bytes, height);
    }

    /// What is known of the block that holds byte `at`; nothing before the map is ready.
    pub fn entry(&self, at: u64) -> Option<Entry> {
        self.is_ready().then(|| self.cells.entry(at >> self.cells.shift))
    }

    /// The topmost layer below `height` that may have data in some of these bytes; 0: none.
    pub fn topmost_below(&self, height: u8, bytes: Range<u64>) -> u8 {
        if !self.is_ready() {
            return height - 1;
        }
        let mut blocks = self.cells.blocks(bytes);
        let first = blocks.next().map_or(0, |block| self.cells.entry(block).below(height));
        blocks.map(|block| self.cells.entry(block).below(height)).fold(first, u8::max)
    }

    /// Notes that the frozen layer at `height` was read and has nothing in all of the 4096
    /// bytes from `at`, a multiple.
    pub fn lower(&self, at: u64, height: u8) {
        if self.cells.shift == MIN_SHIFT
            && let Some(page) = self.cells.pages[(at >> MIN_SHIFT) as usize / PAGE].get()
        {
            let cell = &page[(at >> MIN_SHIFT) as usize % PAGE];
            change(cell, |entry| (entry.height() == height).then(|| entry.without_topmost()));
        }
    }
}

impl Drop for LayerMap {
    fn drop(&mut self) {
        self.search.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the search for data in the layers ended with a panic");
        }
    }
}

/// Marks what the backing says may be data; returns whether it came to the end.
fn look_through(backing: &dyn Backing, into: &Cells, stop: &AtomicBool) -> io::Result<bool> {
    let layers = backing.below().len() + 1;
    for layer in 0..layers {
        let mut from = 0;
        while let Some(data) = backing.next_data(layer, from)? {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            // Not too much at a time: a detach waits for it.
            from = data.end.min(data.start.saturating_add(1 << 30));
            into.mark(data.start..from, (layers - layer) as u8);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_bounds_the_set_of_layers_that_was_put_in_whatever_the_order() {
        for set in 0u32..1 << 6 {
            let members: Vec<u8> = (1..=6).filter(|n| set >> (n - 1) & 1 == 1).collect();
            let there = members.iter().fold(Entry::NOTHING, |entry, &n| entry.with(n));
            let back = members.iter().rev().fold(Entry::NOTHING, |entry, &n| entry.with(n));
            assert_eq!(there, back);
            assert_eq!(members.iter().fold(there, |entry, &n| entry.with(n)), there);
            assert_eq!(there.height(), members.iter().copied().max().unwrap_or(0));
            for height in 1..=7 {
                let truth = members.iter().copied().filter(|&n| n < height).max().unwrap_or(0);
                assert!(there.below(height) >= truth && there.below(height) < height);
                // With one member it is exact.
                assert!(members.len() > 1 || there.below(height) == truth);
            }
        }
    }

    #[test]
    fn taking_out_the_topmost_keeps_the_bound() {
        for set in 1u32..1 << 6 {
            let members: Vec<u8> = (1..=6).filter(|n| set >> (n - 1) & 1 == 1).collect();
            let mut entry = members.iter().fold(Entry::NOTHING, |entry, &n| entry.with(n));
            // What an honest reader would do from the top down.
            for height in (1..=6).rev() {
                if entry.height() == height && !members.contains(&height) {
                    entry = entry.without_topmost();
                }
                if members.contains(&height) {
                    break;
                }
            }
            assert!(entry.height() >= *members.last().unwrap());
            let last = Entry::NOTHING.with(members[0]).without_topmost();
            assert_eq!(last, Entry::NOTHING);
        }
    }

    #[test]
    fn writers_and_the_search_lose_no_mark() {
        let cells = Cells::new(64 << 20);
        std::thread::scope(|scope| {
            for height in 1..=4u8 {
                let cells = &cells;
                scope.spawn(move || {
                    for block in 0..16384u64 {
                        let block = if height % 2 == 0 { block } else { 16383 - block };
                        if block % u64::from(height) == 0 {
                            cells.mark(block * 4096..block * 4096 + 512, height);
                        }
                    }
                });
            }
        });
        for block in 0..16384u64 {
            let members = (1..=4u8).filter(|h| block % u64::from(*h) == 0);
            let expected = members.fold(Entry::NOTHING, Entry::with);
            assert_eq!(cells.entry(block), expected, "block {block}");
        }
    }

    #[test]
    fn a_huge_volume_has_larger_blocks_and_a_bounded_map() {
        for (size, shift) in [(1u64 << 40, 12), ((1 << 40) + 512, 13), (1 << 50, 22), ((1 << 63) - 4096, 35)]
        {
            let cells = Cells::new(size);
            assert_eq!(cells.shift, shift);
            assert!(cells.blocks <= MAX_BLOCKS && cells.blocks << shift >= size);
            cells.mark(size - 512..size, 3);
            assert_eq!(cells.entry(cells.blocks - 1).height(), 3);
            assert_eq!(cells.pages.iter().filter(|page| page.get().is_some()).count(), 1);
        }
    }
}
