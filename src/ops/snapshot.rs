//! Making snapshots.

use crate::base::{Context, Result};
use crate::catalog::freeze::{Freeze, Maker};
use crate::catalog::layer_file::make_layer;
use crate::catalog::lock::Purpose;
use crate::catalog::snapshot::Label;
use crate::catalog::{Catalog, Snapshot, SnapshotId, VolumeId};
use crate::kms::Failure;
use crate::volume::open::{Taken, Unwrap};

/// A snapshot that is being made of a volume that nobody has attached. Dropped before the commit, it is none.
pub struct Detached<'a> {
    catalog: &'a Catalog,
    taken: Taken,
    freeze: Option<Freeze>,
}

impl<'a> Detached<'a> {
    /// Takes the volume, makes the new layer and syncs the old one.
    ///
    /// # Errors
    /// `Busy`, naming the process that has it; `NotFound`; `Corrupt` for a volume that an attach would refuse; the
    /// KMS's; those of the file system.
    pub fn begin(catalog: &'a Catalog, id: VolumeId, unwrap: Unwrap<'_>) -> Result<Self, Failure> {
        let taken = Taken::take(catalog, id, Purpose::Snapshot, unwrap)?;
        let freeze = Freeze::begin(catalog, &taken.lock, &taken.opened.metadata, Maker::Command)?;
        let (path, size) = (catalog.layer_path(freeze.new_top().id), freeze.new_top().size);
        let begun = Detached { catalog, taken, freeze: Some(freeze) };
        make_layer(&path, size, false)?;
        let top = begun.taken.opened.layers[0].store.file();
        top.sync_data().context(|| "sync the top layer")?;
        Ok(begun)
    }

    /// Freezes the old layer. The snapshot is there once it is [noted](note).
    pub fn commit(mut self, label: Label) -> Result<Snapshot> {
        let freeze = self.freeze.take().expect("it is taken here alone, and by drop");
        let Taken { lock, opened } = &mut self.taken;
        let key = opened.seal_key.as_ref();
        freeze.commit(self.catalog, lock, &mut opened.metadata, SnapshotId::random(), label, key)
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        if let Some(freeze) = self.freeze.take() {
            freeze.cancel(self.catalog, &self.taken.lock);
        }
    }
}
