//! What of a layer nobody sees any more, because layers above have it in every chain, is given back.
//!
//! Nothing is moved, nobody is asked, and no record changes, so it may be done at any moment:
//!
//! - What a frozen layer has, it keeps, or a merge has brought it to where the same chains find it.
//! - What a volume's top has while something lies below in its chain, it keeps: a guest's discard makes a
//!   hole only where nothing lies below, and its host process knows of what lay there when it looked.
//! - What is above is durable before anything is given back: a cut of the power brings nothing to light.

use super::layer::{LayerFile, WINDOW, WINDOW_SECTORS};
use crate::base::Result;
use crate::virtio::SECTOR_SIZE;
use std::ops::Range;
use std::rc::Rc;

/// How much is given back together, in bytes: for so much, what is above is synced once.
const BATCH: u64 = 256 << 20;

/// What covers a layer: in each list, the layers above it in some chain. In each there must be one that has
/// a sector, for the sector to be needed by nobody.
pub(super) type Covers = Vec<Vec<Rc<LayerFile>>>;

/// Goes through what is covered of `layer`, a window at a time. `tell` is told how far it has come, in
/// bytes of the layer, and ends it with an error. Gives it back if the layer is to be `punched`.
/// Returns how many bytes that is.
pub(super) fn give_back(
    layer: &LayerFile,
    covers: &Covers,
    punched: bool,
    tell: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<u64> {
    let (mut all, mut batch, mut from) = (0, Batch::default(), 0);
    let mut room = vec![0; WINDOW as usize];
    while let Some(at) = next_in_all(layer, covers, from)? {
        let at = at - at % WINDOW;
        tell(at)?;
        for bytes in covered(layer, covers, at, &mut room)? {
            all += bytes.end - bytes.start;
            batch.add(bytes);
        }
        if punched && batch.bytes >= BATCH {
            batch.punch(layer, covers)?;
        }
        from = at + WINDOW;
    }
    if punched {
        batch.punch(layer, covers)?;
    }
    Ok(all)
}

/// The first byte at or after `from` where the layer, and in each list some layer, may have something.
fn next_in_all(layer: &LayerFile, covers: &Covers, from: u64) -> Result<Option<u64>> {
    let mut at = from;
    loop {
        let Some(own) = layer.next_data(at)? else { return Ok(None) };
        let mut next = own.start;
        for list in covers {
            let mut first: Option<u64> = None;
            for cover in list {
                let found = cover.next_data(next)?.map(|data| data.start);
                first = first.into_iter().chain(found).min();
            }
            match first {
                Some(first) => next = next.max(first),
                None => return Ok(None),
            }
        }
        if next == at || next == own.start {
            return Ok(Some(next));
        }
        at = next;
    }
}

/// The blocks of the window at `at` in which the layer has something, and all that it can have is covered.
fn covered(layer: &LayerFile, covers: &Covers, at: u64, room: &mut [u8]) -> Result<Vec<Range<u64>>> {
    let mut all = vec![true; WINDOW_SECTORS];
    for list in covers {
        let mut has = vec![false; WINDOW_SECTORS];
        for cover in list {
            cover.add_sectors(at, room, &mut has)?;
        }
        all.iter_mut().zip(has).for_each(|(all, has)| *all &= has);
    }
    let end = layer.size.min(at + WINDOW);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for start in (at..end).step_by(layer.block as usize) {
        let block = start..end.min(start + layer.block);
        let sectors = (block.start - at) / SECTOR_SIZE..(block.end - at).div_ceil(SECTOR_SIZE);
        let is_covered = all[sectors.start as usize..sectors.end as usize].iter().all(|&has| has);
        if !is_covered || layer.next_data(block.start)?.is_none_or(|data| data.start >= block.end) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == block.start => run.end = block.end,
            _ => runs.push(block),
        }
    }
    Ok(runs)
}

/// What is about to be given back.
#[derive(Default)]
struct Batch {
    runs: Vec<Range<u64>>,
    bytes: u64,
}

impl Batch {
    fn add(&mut self, bytes: Range<u64>) {
        self.bytes += bytes.end - bytes.start;
        match self.runs.last_mut() {
            Some(run) if run.end == bytes.start => run.end = bytes.end,
            _ => self.runs.push(bytes),
        }
    }

    fn punch(&mut self, layer: &LayerFile, covers: &Covers) -> Result<()> {
        if self.runs.is_empty() {
            return Ok(());
        }
        for cover in covers.iter().flatten() {
            cover.sync()?;
        }
        self.bytes = 0;
        self.runs.drain(..).try_for_each(|run| layer.punch(run))
    }
}
