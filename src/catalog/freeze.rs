//! Freezing a volume's top layer: from then on it is read only, a new one takes the writes,
//! and a snapshot names it.
//!
//! In order: what is going to be made is noted ([`crate::catalog::pending`]); the new layer is made; whoever
//! has the volume sees to it that nothing is being written and syncs the old top; `volume.json` is replaced,
//! **which is the moment**; the snapshot's record is written. `docs/format.md` argues each step.

use crate::base::root::files;
use crate::base::{Error, Kind, Result};
use crate::catalog::layout::MAX_LAYERS;
use crate::catalog::lock::VolumeLock;
use crate::catalog::metadata::{LayerRecord, Metadata};
use crate::catalog::pending::Pending;
use crate::catalog::rekey::NewKey;
use crate::catalog::snapshot::{Label, Snapshot};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, LayerId, SnapshotId};
use crate::crypt::SealKey;

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
    /// The process that has the volume attached, in the volume's folder ([`Catalog::own_layer_path`]), with
    /// the id that a command has chosen.
    Host(LayerId),
}

impl Freeze {
    /// Notes which layer is going to be made; [`make_layer`] makes it, without data. The volume may
    /// be written to meanwhile.
    ///
    /// # Errors
    /// `Unsupported` if the volume has as many layers as it can have; those of the file system.
    /// The volume is as it was.
    pub fn begin(catalog: &Catalog, lock: &VolumeLock, metadata: &Metadata, maker: Maker) -> Result<Self> {
        if metadata.layers().len() >= MAX_LAYERS {
            let id = metadata.id();
            let message = format!(
                "{id} has {MAX_LAYERS} layers, the most that a volume can have; delete snapshots of it that \
                 are needed no more, or make its layers one: \"sealblk volume flatten {id}\""
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
        let mut new_top = LayerRecord::new_top(metadata.top().key, metadata.size());
        if let Maker::Host(chosen) = maker {
            if metadata.layers().iter().any(|layer| layer.id == chosen) {
                return Err(Error::new(Kind::Usage, format!("{chosen} is a layer of the volume already")));
            }
            new_top.id = chosen;
        }
        Pending::NewTop(new_top.id).note(catalog, lock, metadata)?;
        Ok(Freeze { new_top, maker })
    }

    /// The layer that is going to take the writes.
    pub fn new_top(&self) -> &LayerRecord {
        &self.new_top
    }

    /// Gives the volume its new top layer, durably, and returns the snapshot. **The new layer is there,
    /// durable and empty. The old top was synced (fdatasync), nothing has been written to it since**, and
    /// nothing ever is again. The snapshot is there once it is [noted](note).
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
        id: SnapshotId,
        label: Label,
        key: Option<&SealKey>,
    ) -> Result<Snapshot> {
        let snapshot = Snapshot::of(metadata, id, label, key);
        let mut next = metadata.frozen(self.new_top.id);
        next.reseal(key);
        self.save(catalog, lock, metadata, next)?;
        Ok(snapshot)
    }

    /// Gives the volume its new top layer under the data key `dek`, which `key` wraps, and marks all
    /// below to be copied up; otherwise as [`Freeze::commit`], but that no snapshot is made.
    /// `seal_key` is that of `dek`.
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
        let mut next = metadata.rekeyed(self.new_top.id, &key);
        next.reseal(Some(seal_key));
        self.save(catalog, lock, metadata, next)
    }

    /// Gives the volume its new top layer, which lies elsewhere, and marks all below to be copied up;
    /// otherwise as [`Freeze::commit`], but that no snapshot is made.
    ///
    /// # Errors
    /// As for [`Freeze::commit`].
    pub fn commit_moved(
        self,
        catalog: &Catalog,
        lock: &VolumeLock,
        metadata: &mut Metadata,
        key: Option<&SealKey>,
    ) -> Result<()> {
        let mut next = metadata.frozen(self.new_top.id);
        next.layout = next.layout.with_all_leaving().expect("there is a layer below the new one");
        next.reseal(key);
        self.save(catalog, lock, metadata, next)
    }

    fn save(
        self,
        catalog: &Catalog,
        lock: &VolumeLock,
        metadata: &mut Metadata,
        mut next: Metadata,
    ) -> Result<()> {
        catalog.save(lock, &mut next).inspect_err(|_| self.undo(catalog, lock))?;
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
            Maker::Host(_) => self.forget_own(catalog, lock),
        };
        if let Err(e) = undone {
            log::warn!("{e}; the next command that has {} tries again", lock.volume());
        }
    }

    /// What the confined process can do: the layer's other name is the client's to remove, or, while the note
    /// is there, that of whoever takes the volume next.
    fn forget_own(&self, catalog: &Catalog, lock: &VolumeLock) -> Result<()> {
        let named = catalog.load(lock.volume())?.layers().iter().any(|l| l.id == self.new_top.id);
        if named || files::exists(&catalog.layer_path(self.new_top.id)) {
            return Ok(());
        }
        let path = catalog.own_layer_path(lock.volume(), self.new_top.id);
        match files::remove(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::from(e).context(format!("remove {}", path.display())))
            }
            _ => catalog.forget_pending(lock),
        }
    }
}

impl Metadata {
    /// What becomes of the volume when its top is frozen under a new one, `layer`.
    pub(crate) fn frozen(&self, layer: LayerId) -> Self {
        let top = LayerRecord { id: layer, ..LayerRecord::new_top(self.top().key, self.size()) };
        Metadata { layout: self.layout.with_new_top(top), ..self.clone() }
    }

    /// What becomes of the volume when it gets a new top, `layer`, under another data key.
    pub(crate) fn rekeyed(&self, layer: LayerId, key: &NewKey) -> Self {
        let top = LayerRecord { id: layer, ..LayerRecord::new_top(self.top().key, self.size()) };
        Metadata { layout: self.layout.rekeyed(top, key.0.clone()), ..self.clone() }
    }
}

/// Writes the records of snapshots that were committed: with this they are there.
///
/// # Errors
/// `NotFound` if a volume of theirs has gone meanwhile; `Busy` if it has changed: then there is none of them,
/// and each volume has a layer more. Those of the file system: then some may be there.
pub fn note(catalog: &Catalog, snapshots: &[&Snapshot]) -> Result<()> {
    let _records = RecordsLock::acquire(catalog)?;
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
        catalog.save_new_snapshot(snapshot)?;
    }
    Ok(())
}
