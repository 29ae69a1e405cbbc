//! `pending.json` in a volume's folder: what the process that has the volume is changing about its layers'
//! files, so that the next one can undo what a crash left of it.
//!
//! It is durable before the change begins and removed when `volume.json` tells of it. So whoever takes the
//! volume finds either no such file, or one that says what may be left over.

use crate::base::root::{files, replace_file, sync_dir};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::VolumeLock;
use crate::catalog::metadata::{LayerRecord, Metadata, written};
use crate::catalog::references::{check_top_is_own, remove_pending};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, LayerId, VolumeId, read_bounded};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// The file's name in the volume's folder.
pub(crate) const FILE: &str = "pending.json";

const FORMAT: u32 = 1;

/// A change of a volume's layers that `volume.json` may not tell of yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Pending {
    /// This layer is being made, to be the volume's top.
    NewTop(LayerId),
    /// The top layer's file is being made as long as this, in bytes.
    Resize(u64),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    change: Pending,
}

impl Pending {
    /// What is pending of a volume, if anything.
    ///
    /// # Errors
    /// `Corrupt` for a file that is none of ours.
    pub(crate) fn load(catalog: &Catalog, id: VolumeId) -> Result<Option<Self>> {
        let path = catalog.folder(id).join(FILE);
        let attempt = || format!("read {}", path.display());
        let bytes = match read_bounded(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            Err(e) => return Err(e.context(attempt())),
        };
        match written::version(&bytes).context(attempt)? {
            1 => Ok(Some(written::read::<Written>(&bytes).context(attempt)?.change)),
            other => Err(written::unknown_version(other, "version 1").context(attempt())),
        }
    }

    /// The layer that is being made.
    pub(crate) fn new_layer(self) -> Option<LayerId> {
        match self {
            Pending::NewTop(id) => Some(id),
            Pending::Resize(_) => None,
        }
    }

    /// Writes the note. Call it before making any part of the change: the volume, whose record is `metadata`,
    /// must still be untouched.
    ///
    /// # Errors
    /// `Busy` if an earlier resize was neither finished nor undone: nobody else would do that any more.
    pub(crate) fn note(self, catalog: &Catalog, lock: &VolumeLock, metadata: &Metadata) -> Result<()> {
        if let Some(Pending::Resize(size)) = Pending::load(catalog, lock.volume())?
            && size != metadata.size()
        {
            let message = "an earlier resize of it failed half-way; detach it first";
            return Err(Error::new(Kind::Busy, message));
        }
        let written = Written { format: FORMAT, change: self };
        replace_file(&catalog.folder(lock.volume()).join(FILE), &written::to_json(&written))
    }

    /// The second names were removed before. Where the file of a new layer cannot be removed, or must not, it
    /// stays: that is no reason to keep the volume from anybody, and "sealblk gc" looks at it again.
    fn undo(self, catalog: &Catalog, metadata: &Metadata, records: Option<&RecordsLock>) -> Result<()> {
        match self {
            Pending::NewTop(id) if metadata.layers().iter().any(|l| l.id == id) => Ok(()),
            Pending::NewTop(id) => {
                let removed = match records {
                    Some(records) => remove_pending(catalog, metadata.id(), id, records),
                    None => RecordsLock::acquire(catalog)
                        .and_then(|records| remove_pending(catalog, metadata.id(), id, &records)),
                };
                removed.unwrap_or_else(|e| log::warn!("{e}"));
                Ok(())
            }
            // A device is as long as it is.
            Pending::Resize(_) if catalog.on_device(metadata.top().id)?.is_some() => Ok(()),
            Pending::Resize(_) => {
                let (layer, own) =
                    (metadata.top().id, catalog.own_layer_path(metadata.id(), metadata.top().id));
                // By the name that a confined process may open, where there is one.
                let path = if files::exists(&own) { own } else { catalog.layer_path(layer) };
                let shorten = || -> std::io::Result<()> {
                    let file = files::open_layer(&path, OFlag::O_WRONLY)?;
                    file.set_len(metadata.size())?;
                    file.sync_all()
                };
                shorten().context(|| format!("give {} its length back", path.display()))
            }
        }
    }
}

/// A layer that a host process has made and this process has given its name.
#[derive(Debug)]
pub struct OwnLayer {
    file: File,
    path: PathBuf,
}

impl OwnLayer {
    /// Takes the name away again. Where that fails, "sealblk gc" looks.
    pub fn remove(&self) {
        let _ = files::remove_name_of(&self.file, &self.path);
    }
}

/// Whether a file of this name is a layer's.
pub(crate) fn is_layer_name(name: &str) -> bool {
    name.strip_suffix(".img").is_some_and(|id| id.parse::<LayerId>().is_ok())
}

impl Catalog {
    /// Brings a volume's layers into the state that its metadata tells of, after a crash that came in
    /// between. For whoever has the volume's lock, before the layers are looked at.
    ///
    /// # Errors
    /// Those of the file system; `Corrupt` for a `pending.json` that is none of ours, and for a volume whose
    /// top layer is not its own.
    pub fn recover(&self, lock: &VolumeLock, metadata: &Metadata) -> Result<()> {
        self.check_top_is_own(metadata)?;
        self.undo_pending(lock, metadata, None)?;
        if self.has_left_layers(lock.volume()) {
            // A confined process cannot, and a record that cannot be read is no reason to keep
            // the volume from anybody.
            let settled = RecordsLock::acquire(self).and_then(|records| self.settle_left(lock, &records));
            if let Err(e) = settled {
                log::warn!(
                    "{e}; the next command that has {}, or \"sealblk gc\", tries again",
                    metadata.id()
                );
            }
        }
        Ok(())
    }

    /// Looks whether the volume may write to its top layer.
    ///
    /// # Errors
    /// `Corrupt` if another record names that layer as well.
    pub fn check_top_is_own(&self, metadata: &Metadata) -> Result<()> {
        check_top_is_own(self, metadata)
    }

    /// As [`Catalog::recover`], for a process that is confined, and reaches no layers but those that it knew
    /// before, and those in its volume's folder: what the volume has keeps the name that it has there. Where
    /// a layer's making was interrupted, its file is left to "sealblk gc".
    ///
    /// # Errors
    /// As for [`Catalog::recover`].
    pub fn recover_confined(&self, lock: &VolumeLock, metadata: &Metadata) -> Result<()> {
        let has = |id: LayerId| metadata.layers().iter().any(|l| l.id == id);
        for path in self.own_layers(lock.volume())? {
            let id = path.file_stem().and_then(|stem| stem.to_str()?.parse::<LayerId>().ok());
            if id.is_some_and(|id| !has(id)) {
                files::remove(&path).context(|| format!("remove {}", path.display()))?;
            }
        }
        match Pending::load(self, metadata.id())? {
            None => Ok(()),
            Some(Pending::NewTop(id)) if !has(id) => Ok(()),
            Some(pending) => pending.undo(self, metadata, None).and_then(|()| self.forget_pending(lock)),
        }
    }

    /// As [`Catalog::recover`], except for layers that have left the chain. Whoever has the `records`
    /// locked gives that lock along.
    ///
    /// # Errors
    /// As for that.
    pub(crate) fn undo_pending(
        &self,
        lock: &VolumeLock,
        metadata: &Metadata,
        records: Option<&RecordsLock>,
    ) -> Result<()> {
        assert_eq!(lock.volume(), metadata.id(), "the lock is another volume's");
        self.forget_own_layers(lock)?;
        if let Some(pending) = Pending::load(self, metadata.id())? {
            log::info!("{}: an interrupted command left {pending:?}", metadata.id());
            pending.undo(self, metadata, records)?;
            self.mark_frozen(&metadata.layers()[1..]);
            self.forget_pending(lock)?;
        }
        Ok(())
    }

    /// A layer as the process that has the volume attached has made it: in the volume's folder, since it
    /// reaches no other. It is a second name of [`Catalog::layer_path`], until the volume is given up.
    pub fn own_layer_path(&self, volume: VolumeId, layer: LayerId) -> PathBuf {
        self.folder(volume).join(format!("{layer}.img"))
    }

    /// Gives a layer of `size` bytes that was made in a volume's folder the name by which it will be known,
    /// durably. Something names it already. Who made it is confined there, and may be anybody's by now: it
    /// must be a file of its own, with no other name.
    ///
    /// # Errors
    /// `Corrupt` for anything else; those of the file system. Nothing has the new name
    /// then that had not before.
    pub fn link_own_layer(&self, volume: VolumeId, layer: LayerId, size: u64) -> Result<OwnLayer> {
        let (from, to) = (self.own_layer_path(volume, layer), self.layer_path(layer));
        let attempt = || format!("link {} to {}", from.display(), to.display());
        let file = files::open_with(&from, OFlag::O_RDONLY).context(attempt)?;
        let found = file.metadata().context(attempt)?;
        if found.nlink() != 1 || found.len() != size {
            let message = "the host process has not made a layer of its own there, as long as the volume";
            return Err(Error::new(Kind::Corrupt, message).context(attempt()));
        }
        files::link(&file, &from, &to).context(attempt)?;
        let linked = OwnLayer { file, path: to };
        sync_dir(&self.root().layers()).inspect_err(|_| linked.remove())?;
        Ok(linked)
    }

    /// Removes the names that layers have in the folder of their volume. Whoever serves them has them open.
    pub fn forget_own_layers(&self, lock: &VolumeLock) -> Result<()> {
        self.own_layers(lock.volume())?
            .iter()
            .try_for_each(|path| files::remove(path).context(|| format!("remove {}", path.display())))
    }

    pub(crate) fn own_layers(&self, volume: VolumeId) -> Result<Vec<PathBuf>> {
        let folder = self.folder(volume);
        let attempt = || format!("list {}", folder.display());
        let mut found = Vec::new();
        for name in files::names(&folder).context(attempt)? {
            found.extend(name.to_str().is_some_and(is_layer_name).then(|| folder.join(&name)));
        }
        Ok(found)
    }

    /// Removes the note of what was pending, once `volume.json` tells of it, or it was undone.
    pub fn forget_pending(&self, lock: &VolumeLock) -> Result<()> {
        let folder = self.folder(lock.volume());
        let path = folder.join(FILE);
        files::remove_if_there(&path).context(|| format!("remove {}", path.display()))?;
        sync_dir(&folder)
    }

    /// Makes the files of these layers read-only, which shows people and tools that nobody writes them any
    /// more. Nothing depends on it.
    pub(crate) fn mark_frozen(&self, layers: &[LayerRecord]) {
        for layer in layers {
            let path = self.layer_path(layer.id);
            if matches!(self.on_device(layer.id), Ok(Some(_))) {
                // The permissions of a device are not ours, and are those of whatever is there next.
                continue;
            }
            if self.is_coming(layer.id) {
                // It is frozen, and not filled yet; whoever ends that says so.
                continue;
            }
            if let Err(e) = files::set_mode(&path, 0o444) {
                log::warn!("chmod 0444 {}: {e}", path.display());
            }
        }
    }
}
