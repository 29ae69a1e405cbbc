//! A new top layer for a volume that nobody has attached: a snapshot and a new data key both take one. Of an
//! attached volume its host process makes it (`host::changes`).

use crate::base::{Context, Result};
use crate::catalog::Catalog;
use crate::catalog::freeze::{Freeze, Maker};
use crate::catalog::layer_file::make_layer;
use crate::catalog::lock::VolumeLock;
use crate::ops::device::Candidate;
use crate::ops::make::make_image;
use crate::volume::open::{Opened, Taken};

/// A new top that is being made. Dropped before the commit, it is none.
pub(super) struct NewTop<'a> {
    catalog: &'a Catalog,
    taken: Taken,
    freeze: Option<Freeze>,
}

impl<'a> NewTop<'a> {
    /// Makes the new layer, on `device` or in a file, and syncs the old one.
    pub(super) fn begin(catalog: &'a Catalog, taken: Taken, device: Option<&Candidate>) -> Result<Self> {
        let freeze = Freeze::begin(catalog, &taken.lock, &taken.opened.metadata, Maker::Command)?;
        let (id, size) = (freeze.new_top().id, freeze.new_top().size);
        let path = catalog.layer_path(id);
        let begun = NewTop { catalog, taken, freeze: Some(freeze) };
        let next = || begun.taken.opened.metadata.frozen(id);
        match (device, catalog.root().pool()) {
            (None, Some(pooled)) => make_image(catalog, pooled, &next())?,
            (None, None) => make_layer(&path, &catalog.folder(begun.taken.lock.volume()), size, false)?,
            (Some(device), _) => {
                device.check_size(size)?;
                catalog.make_device_layer(&next(), device.name().path(), device.medium())?;
            }
        }
        let top = &begun.taken.opened.layers[0].backing;
        top.sync_data().context(|| "sync the top layer")?;
        Ok(begun)
    }

    /// Has `commit` replace the record. The volume is this process's as long as this lives.
    pub(super) fn commit<T>(
        &mut self,
        commit: impl FnOnce(Freeze, &VolumeLock, &mut Opened) -> Result<T>,
    ) -> Result<T> {
        let freeze = self.freeze.take().expect("it is taken here alone, and by drop");
        commit(freeze, &self.taken.lock, &mut self.taken.opened)
    }
}

impl Drop for NewTop<'_> {
    fn drop(&mut self) {
        if let Some(freeze) = self.freeze.take() {
            freeze.cancel(self.catalog, &self.taken.lock);
        }
    }
}
