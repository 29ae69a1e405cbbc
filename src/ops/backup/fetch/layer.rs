//! A layer that is still coming, as a fetcher has it: what is to come, proved, and its file.

use crate::backup::ContentName;
use crate::backup::manifest::blocks_of;
use crate::backup::to_come::ToCome;
use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::Catalog;
use crate::catalog::layout::LayerRecord;
use crate::crypt::BackupKeys;
use crate::image::lock::{Access, ImageLock};
use crate::ops::backup::Target;
use crate::ops::backup::into::Into;
use nix::fcntl::OFlag;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A layer that is still coming.
pub(in crate::ops::backup) struct Layer {
    pub(super) record: LayerRecord,
    pub(super) to_come: ToCome,
    pub(super) target: Target,
    pub(super) keys: BackupKeys,
    pub(super) file: File,
    /// Whoever moves data between layers waits: this process may write to it.
    _lock: ImageLock,
    /// By the number among the blocks that are to come.
    here: Vec<AtomicBool>,
    /// How many are not here.
    left: AtomicU64,
}

impl Layer {
    /// Opens what is to come of a layer, and proves it; none if it has come meanwhile. Where nothing is to
    /// come, nothing is in the file afterwards.
    pub(in crate::ops::backup) fn open(
        catalog: &Catalog,
        record: &LayerRecord,
        keys: BackupKeys,
    ) -> Result<Option<Self>> {
        match Self::open_coming(catalog, record, keys) {
            Err(e) if e.kind() == Kind::NotFound && files::exists(&catalog.layer_path(record.id)) => Ok(None),
            layer => layer.map(Some),
        }
    }

    fn open_coming(catalog: &Catalog, record: &LayerRecord, keys: BackupKeys) -> Result<Self> {
        let (path, wanted) = (catalog.coming_path(record.id), catalog.wanted_path(record.id));
        let attempt = || format!("read {}", wanted.display());
        let bytes = files::read(&wanted, ToCome::longest(blocks_of(record.size))).context(attempt)?;
        let to_come = ToCome::prove(&bytes, &keys).context(attempt)?;
        if (to_come.head.layer, to_come.head.size) != (record.id, record.size) {
            return Err(Error::new(Kind::Corrupt, "it is about another layer").context(attempt()));
        }
        let (url, access) = to_come.target().context(attempt)?;
        let target = Target { url, access, rate: to_come.head.rate };
        let lock = ImageLock::acquire(&path, Access::Read)?;
        let file = files::open_layer(&path, OFlag::O_RDWR).context(|| format!("open {}", path.display()))?;
        let found = file.metadata().context(|| format!("look at {}", path.display()))?;
        if !found.is_file() || found.len() != record.size {
            let message = format!("{} has {} bytes instead of {}", path.display(), found.len(), record.size);
            return Err(Error::new(Kind::Corrupt, message));
        }
        let here = to_come.blocks.iter().map(|_| AtomicBool::new(false)).collect();
        let left = AtomicU64::new(to_come.blocks.len() as u64);
        let layer = Layer { record: *record, to_come, target, keys, file, _lock: lock, here, left };
        let into = layer.writer()?;
        for blocks in layer.holes() {
            into.clear(blocks).context(|| format!("write {}", path.display()))?;
        }
        Ok(layer)
    }

    pub(super) fn writer(&self) -> Result<Into> {
        Ok(Into::new(self.file.try_clone()?, self.record.size))
    }

    /// This layer, of which what nobody waits for comes at so many bytes a second; 0: no limit.
    pub(in crate::ops::backup) fn at_rate(mut self, rate: u64) -> Self {
        self.target.rate = rate;
        self
    }

    /// The runs of blocks of which nothing is to come.
    pub(super) fn holes(&self) -> Vec<Range<u64>> {
        let mut at = 0;
        let mut holes = Vec::new();
        let end = (blocks_of(self.record.size), ContentName::of([0; 32]));
        for (number, _) in self.to_come.blocks.iter().chain([&end]) {
            if at < *number {
                holes.push(at..*number);
            }
            at = number + 1;
        }
        holes
    }

    pub(super) fn number(&self, n: usize) -> u64 {
        self.to_come.blocks[n].0
    }

    pub(super) fn is_here(&self, n: usize) -> bool {
        self.here[n].load(Ordering::SeqCst)
    }

    pub(super) fn is_all_here(&self) -> bool {
        self.left.load(Ordering::SeqCst) == 0
    }

    /// How many blocks are to come in all.
    pub(super) fn count(&self) -> usize {
        self.here.len()
    }

    /// A block is here. Returns whether it was not before.
    pub(super) fn note_here(&self, n: usize) -> bool {
        let is_new = !self.here[n].swap(true, Ordering::SeqCst);
        if is_new {
            self.left.fetch_sub(1, Ordering::SeqCst);
        }
        is_new
    }
}
