//! A snapshot's layers as they lie at home, block by block: for each data key, what of a block is
//! visible and under that key.
//!
//! A sector of a snapshot is what the topmost layer has that has it. So each sector is visible in one layer
//! alone, and under one data key; and under one key a sector is the same bytes in whatever layer it lies.
//! What the blocks of all keys have together is the snapshot.
//!
//! The layers are locked while they are read: commands that move data between layers keep off them. Commands
//! that give back what layers above cover, in every chain, do not ask; as long as the snapshot's record is
//! there, nothing of what it shows is given back. So whoever has read a snapshot looks in the end whether
//! its record is still there.

use crate::backing::device::DATA_START;
use crate::backing::file::{Place, next_data_of};
use crate::backing::medium::Medium;
use crate::backing::nbd::{Export, Right};
use crate::backup::block::{BLOCK, SECTOR, encode};
use crate::backup::manifest::Planes;
use crate::base::root::files;
use crate::base::zeros::is_zero;
use crate::base::{Context, Result};
use crate::catalog::layout::LayerRecord;
use crate::catalog::{Catalog, LayerId};
use crate::image::lock::{Access, ImageLock};
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

/// A layer's file, locked and open for reading.
struct LayerFile {
    path: PathBuf,
    /// The file or device; of a layer behind an NBD server, what says where it is.
    file: File,
    export: Option<Arc<Export>>,
    /// Where in the file the layer begins.
    start: u64,
    size: u64,
    _lock: ImageLock,
    /// The run of data that was found last; none after the last one.
    found: Option<Range<u64>>,
}

impl LayerFile {
    fn open(catalog: &Catalog, layer: &LayerRecord) -> Result<Self> {
        let Place { path, on_device, behind } = catalog.place(layer)?;
        let lock = ImageLock::acquire(&path, Access::Read)?;
        let file =
            files::open_layer(&path, OFlag::O_RDONLY).context(|| format!("open {}", path.display()))?;
        let export = behind.as_ref().map(|address| Export::at(address, Right::Read)).transpose()?;
        let medium: &dyn Medium = if let Some(export) = &export { &**export } else { &file };
        catalog.check_is_layers(layer.id, medium, export.as_deref())?;
        // A device does not tell where it has data.
        let (start, found) = if on_device.is_some() { (DATA_START, 0..layer.size) } else { (0, 0..0) };
        Ok(LayerFile { path, file, export, start, size: layer.size, _lock: lock, found: Some(found) })
    }

    /// What is left at or after `at`, which never goes back, of the next run that ends after it.
    fn data_after(&mut self, at: u64) -> Result<Option<Range<u64>>> {
        if self.found.as_ref().is_some_and(|run| run.end <= at) {
            let is_file = self.start == 0;
            let found = if is_file { next_data_of(&self.file, at) } else { Ok(None) };
            self.found = found.context(|| format!("look for data in {}", self.path.display()))?;
        }
        Ok(self.found.as_ref().map(|run| run.start.max(at)..run.end))
    }

    /// Reads the bytes at `at`, with zeros beyond the layer's end. Returns whether there may be something.
    fn read(&mut self, at: u64, room: &mut [u8]) -> Result<bool> {
        let end = at + room.len() as u64;
        if self.data_after(at)?.is_none_or(|data| data.start >= end) {
            return Ok(false);
        }
        let there = self.size.saturating_sub(at).min(room.len() as u64) as usize;
        let (there, beyond) = room.split_at_mut(there);
        let read = match &self.export {
            Some(export) => export.fetch(there, self.start + at),
            None => self.file.read_exact_at(there, self.start + at),
        };
        read.context(|| format!("read {} at {at}", self.path.display()))?;
        beyond.fill(0);
        // Guests may need the memory more than whoever reads this next.
        let (at, len) = ((self.start + at) as libc::off_t, there.len() as libc::off_t);
        let _ = posix_fadvise(&self.file, at, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        Ok(true)
    }
}

/// The layers of a snapshot, the top one first.
pub(super) struct Source {
    layers: Vec<LayerFile>,
    of_layers: Vec<usize>,
    size: u64,
    room: Vec<u8>,
    /// For each plane, what of the block is under its key.
    planes: Vec<Vec<u8>>,
}

impl Source {
    /// Opens the layers, of a snapshot of `size` bytes.
    ///
    /// # Errors
    /// `Busy` if a command moves data between them at this moment.
    pub(super) fn open(
        catalog: &Catalog,
        layers: &[LayerRecord],
        planes: &Planes,
        size: u64,
    ) -> Result<Self> {
        let layers = layers.iter().map(|layer| LayerFile::open(catalog, layer)).collect::<Result<_>>()?;
        let rooms = vec![vec![0; BLOCK]; planes.keys.len()];
        Ok(Source { layers, of_layers: planes.of_layers.clone(), size, room: vec![0; BLOCK], planes: rooms })
    }

    /// The objects of a block, one for each plane; none where nothing of it is under that key. Blocks are
    /// asked for in rising order.
    pub(super) fn block(&mut self, number: u64) -> Result<Vec<Option<Vec<u8>>>> {
        let at = number * BLOCK as u64;
        let len = self.size.saturating_sub(at).min(BLOCK as u64) as usize;
        let sectors = len.div_ceil(SECTOR);
        let mut seen = vec![false; sectors];
        let mut has = vec![false; self.planes.len()];
        for (layer, &plane) in self.layers.iter_mut().zip(&self.of_layers) {
            if !layer.read(at, &mut self.room[..len])? {
                continue;
            }
            let into = &mut self.planes[plane];
            if !std::mem::replace(&mut has[plane], true) {
                into.fill(0);
            }
            for (n, sector) in self.room[..len].chunks(SECTOR).enumerate() {
                if !seen[n] && !is_zero(sector) {
                    seen[n] = true;
                    into[n * SECTOR..][..sector.len()].copy_from_slice(sector);
                }
            }
            if seen.iter().all(|&seen| seen) {
                break;
            }
        }
        let object = |(bytes, has): (&Vec<u8>, bool)| has.then(|| encode(&bytes[..len])).flatten();
        Ok(self.planes.iter().zip(has).map(object).collect())
    }
}

/// The blocks in which any of these layers may have something, as runs in rising order, which do not touch.
/// They stay locked as long as what is returned with them lives.
pub(super) fn blocks_with_data(
    catalog: &Catalog,
    layers: &[LayerRecord],
) -> Result<(Vec<Range<u64>>, impl Sized)> {
    let mut opened =
        layers.iter().map(|layer| LayerFile::open(catalog, layer)).collect::<Result<Vec<_>>>()?;
    let mut runs: Vec<Range<u64>> = Vec::new();
    for layer in &mut opened {
        let mut at = 0;
        while let Some(data) = layer.data_after(at)?.filter(|data| data.start < layer.size) {
            let end = data.end.div_ceil(BLOCK as u64);
            runs.push(data.start / BLOCK as u64..end);
            at = end * BLOCK as u64;
        }
    }
    Ok((joined(runs), opened))
}

pub(super) fn joined(mut runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
    runs.sort_unstable_by_key(|run| run.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => joined.push(run),
        }
    }
    joined
}

/// The layers that are in one of two chains and not in the other; none if those that both have come in
/// another order: then nothing can be said.
pub(super) fn difference(ours: &[LayerId], theirs: &[LayerId]) -> Option<Vec<LayerId>> {
    let common: Vec<_> = ours.iter().filter(|id| theirs.contains(id)).collect();
    if !theirs.iter().filter(|id| ours.contains(id)).eq(common.iter().copied()) {
        return None;
    }
    let only = |these: &[LayerId], those: &[LayerId]| {
        these.iter().copied().filter(|id| !those.contains(id)).collect::<Vec<_>>()
    };
    Some([only(ours, theirs), only(theirs, ours)].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_where_they_touch() {
        assert_eq!(joined(vec![5..6, 0..1, 1..3, 2..3, 8..9, 6..7]), [0..3, 5..7, 8..9]);
        assert_eq!(joined(vec![]), []);
        assert_eq!(joined(vec![0..10, 2..3]), vec![0..10]);
    }

    #[test]
    fn chains_differ_by_layers_and_never_by_their_order() {
        let [a, b, c, d] = [(); 4].map(|()| LayerId::random());
        assert_eq!(difference(&[a, b], &[a, b]), Some(vec![]));
        assert_eq!(difference(&[d, a, b], &[a, b, c]), Some(vec![d, c]));
        assert_eq!(difference(&[a], &[b]), Some(vec![a, b]));
        assert_eq!(difference(&[a, b], &[b, a]), None);
    }
}
