//! Freezing a volume's top layer: from then on it is read only, a new one takes the writes, and a snapshot names it.
//!
//! In order: what is going to be made is noted ([`super::pending`]); the new layer is made; whoever has the volume sees
//! to it that nothing is being written and syncs the old top; `volume.json` is replaced, **which is the moment**; the
//! snapshot's record is written. `docs/format.md` argues each step.

use super::catalog::Catalog;
use super::id::{SnapshotId, VolumeId};
use super::image_lock::{Access, ImageLock};
use super::layout::MAX_LAYERS;
use super::lifecycle::{Failure, make_layer};
use super::lock::{Holder, Purpose, VolumeLock};
use super::metadata::{KeyOwner, KeyRecord, LayerRecord, Metadata};
use super::pending::Pending;
use super::references::StoreLock;
use super::rekey::NewKey;
use super::snapshot::{Label, Snapshot};
use crate::crypt::{Dek, SealKey};
use crate::error::{Context, Error, Kind, Result};
use crate::store::file::FileStore;

/// How a data key is unwrapped for the moment; the error's cause is the KMS's own words.
pub type Unwrap<'a> = &'a dyn Fn(KeyOwner, &KeyRecord) -> Result<Dek, Failure>;

/// A freeze that has begun: what the new top layer will be is noted, and nothing uses it yet.
#[must_use = "the freeze counts once it is committed"]
pub struct Freeze {
    new_top: LayerRecord,
    maker: Maker,
}

/// Who makes the new layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// A command, which reaches all of the store.
    Command,
    /// The process that has the volume attached, in the volume's folder ([`Catalog::own_layer_path`]).
    Host,
}

impl Freeze {
    /// Notes which layer is going to be made; [`make_layer`] makes it, without data. The volume may be written to
    /// meanwhile.
    ///
    /// # Errors
    /// `Unsupported` if the volume has as many layers as it can have; those of the file system. The volume is as it
    /// was.
    pub fn begin(catalog: &Catalog, lock: &VolumeLock, metadata: &Metadata, maker: Maker) -> Result<Self> {
        if metadata.layers().len() >= MAX_LAYERS {
            let id = metadata.id();
            let message = format!(
                "{id} has {MAX_LAYERS} layers, the most that a volume can have; \"sealblk volume flatten {id}\" makes \
                 them one"
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
        let new_top = LayerRecord::new_top(metadata.top().key, metadata.size());
        Pending::NewTop(new_top.id).store(catalog, lock, metadata)?;
        Ok(Freeze { new_top, maker })
    }

    /// The layer that is going to take the writes.
    pub fn new_top(&self) -> &LayerRecord {
        &self.new_top
    }

    /// Gives the volume its new top layer, durably, and answers the snapshot. **The new layer is there, durable and
    /// empty. The old top was synced (fdatasync), nothing has been written to it since**, and nothing ever is again. The
    /// snapshot is there once it is [noted](note).
    ///
    /// `key` seals the volume; none for an unencrypted one.
    ///
    /// # Errors
    /// Those of the file system: then the volume goes on with the top that it had.
    pub fn commit(
        self,
        catalog: &Catalog,
        lock: &VolumeLock,
        metadata: &mut Metadata,
        label: Label,
        key: Option<&SealKey>,
    ) -> Result<Snapshot> {
        let snapshot = Snapshot::of(metadata, SnapshotId::random(), label, key);
        let mut next = metadata.clone();
        next.layout = metadata.layout().with_new_top(self.new_top);
        next.reseal(key);
        self.store(catalog, lock, metadata, next)?;
        Ok(snapshot)
    }

    /// Gives the volume its new top layer under the data key `dek`, which `key` wraps, and marks all below to be copied
    /// up; otherwise as [`Freeze::commit`], but that no snapshot is made. `seal_key` is that of `dek`.
    ///
    /// # Errors
    /// As for [`Freeze::commit`].
    pub fn commit_rekeyed(
        self,
        catalog: &Catalog,
        lock: &VolumeLock,
        metadata: &mut Metadata,
        key: NewKey,
        seal_key: &SealKey,
    ) -> Result<()> {
        let mut next = metadata.clone();
        next.layout = metadata.layout().rekeyed(self.new_top, key.0);
        next.reseal(Some(seal_key));
        self.store(catalog, lock, metadata, next)
    }

    fn store(
        self,
        catalog: &Catalog,
        lock: &VolumeLock,
        metadata: &mut Metadata,
        mut next: Metadata,
    ) -> Result<()> {
        catalog.store(lock, &mut next).inspect_err(|_| self.undo(catalog, lock))?;
        *metadata = next;
        if let Err(e) = catalog.forget_pending(lock) {
            log::warn!("{e}; the next command that has {} tries again", lock.volume());
        }
        Ok(())
    }

    /// Takes it back: the new layer is removed.
    pub fn cancel(self, catalog: &Catalog, lock: &VolumeLock) {
        self.undo(catalog, lock);
    }

    /// Goes by what `volume.json` says now: a replacement that failed may have come far enough to be seen.
    fn undo(&self, catalog: &Catalog, lock: &VolumeLock) {
        let undone = match self.maker {
            Maker::Command => {
                catalog.load(lock.volume()).and_then(|metadata| catalog.recover(lock, &metadata))
            }
            Maker::Host => self.forget_own(catalog, lock),
        };
        if let Err(e) = undone {
            log::warn!("{e}; the next command that has {} tries again", lock.volume());
        }
    }

    /// What the confined process can do: the layer's other name is the client's to remove, or, while the note is there,
    /// that of whoever takes the volume next.
    fn forget_own(&self, catalog: &Catalog, lock: &VolumeLock) -> Result<()> {
        let named = catalog.load(lock.volume())?.layers().iter().any(|l| l.id == self.new_top.id);
        if named || catalog.layer_path(self.new_top.id).exists() {
            return Ok(());
        }
        let path = catalog.own_layer_path(lock.volume(), self.new_top.id);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::from(e).context(format!("remove {}", path.display())))
            }
            _ => catalog.forget_pending(lock),
        }
    }
}

/// Writes the records of snapshots that were committed: with this they are there.
///
/// # Errors
/// `NotFound` if a volume of theirs has gone meanwhile; `Busy` if it has changed: then there is none of them, and each
/// volume has a layer more. Those of the file system: then some may be there.
pub fn note(catalog: &Catalog, snapshots: &[&Snapshot]) -> Result<()> {
    let _store = StoreLock::acquire(catalog)?;
    for snapshot in snapshots {
        // What names the layers until now: if it does not any more, they may be gone.
        let volume = catalog.load(snapshot.volume())?;
        let is_named = |layer: &LayerRecord| volume.layers().iter().any(|l| l.id == layer.id);
        if !snapshot.layers().iter().all(is_named) {
            let message = format!("{} was changed meanwhile; try again", volume.id());
            return Err(Error::new(Kind::Busy, message));
        }
    }
    for snapshot in snapshots {
        catalog.mark_frozen(snapshot.layers());
        catalog.store_snapshot(snapshot)?;
    }
    Ok(())
}

/// A snapshot that is being made of a volume that nobody has attached. Dropped before the commit, it is none.
pub struct Detached<'a> {
    catalog: &'a Catalog,
    open: OpenDetached,
    freeze: Option<Freeze>,
}

impl<'a> Detached<'a> {
    /// Takes the volume, makes the new layer and syncs the old one.
    ///
    /// # Errors
    /// `Busy`, naming the process that has it; `NotFound`; `Corrupt` for a volume that an attach would refuse; the
    /// KMS's; those of the file system.
    pub fn begin(catalog: &'a Catalog, id: VolumeId, unwrap: Unwrap<'_>) -> Result<Self, Failure> {
        let open = OpenDetached::open(catalog, id, Purpose::Snapshot, unwrap)?;
        let freeze = Freeze::begin(catalog, &open.lock, &open.metadata, Maker::Command)?;
        let (path, size) = (catalog.layer_path(freeze.new_top.id), freeze.new_top.size);
        let begun = Detached { catalog, open, freeze: Some(freeze) };
        make_layer(&path, size, false)?;
        begun.open.top.file().sync_data().context(|| "sync the top layer")?;
        Ok(begun)
    }

    /// Freezes the old layer. The snapshot is there once it is [noted](note).
    pub fn commit(mut self, label: Label) -> Result<Snapshot> {
        let freeze = self.freeze.take().expect("it is taken here alone, and by drop");
        let OpenDetached { lock, metadata, seal_key, .. } = &mut self.open;
        freeze.commit(self.catalog, lock, metadata, label, seal_key.as_ref())
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        if let Some(freeze) = self.freeze.take() {
            freeze.cancel(self.catalog, &self.open.lock);
        }
    }
}

/// A volume that this process has for a moment, to change its layers: proved right as an attach would, and sealed.
pub(super) struct OpenDetached {
    pub(super) lock: VolumeLock,
    pub(super) metadata: Metadata,
    pub(super) top: FileStore,
    /// What seals it; none for an unencrypted volume.
    pub(super) seal_key: Option<SealKey>,
    _image_lock: ImageLock,
}

impl OpenDetached {
    pub(super) fn open(
        catalog: &Catalog,
        id: VolumeId,
        purpose: Purpose,
        unwrap: Unwrap<'_>,
    ) -> Result<Self, Failure> {
        let holder = Holder::this_process(purpose, None)?;
        let lock = VolumeLock::acquire(&catalog.folder(id), id, &holder)?;
        let mut metadata = catalog.load(id)?;
        catalog.recover(&lock, &metadata)?;
        catalog.check_layers(&metadata)?;
        let path = catalog.layer_path(metadata.top().id);
        let image_lock = ImageLock::acquire(&path, Access::ReadWrite)?;
        // Waits until no write of an earlier host process can come any more.
        let top = FileStore::open(&path, false, metadata.sector_size().bytes());
        let top = top.context(|| path.display().to_string())?;
        let owner = KeyOwner::Volume(id);
        let deks = metadata.keys().iter().map(|key| unwrap(owner, key)).collect::<Result<Vec<_>, _>>()?;
        metadata.prove(&deks, &top)?;
        let seal_key = metadata.seal_key(&deks)?;
        Ok(OpenDetached { lock, metadata, top, seal_key, _image_lock: image_lock })
    }
}
