//! What becomes of a volume whose lower layers were copied up, or hold nothing any more: they leave its
//! chain, and nobody needs their keys.
//!
//! `leaving.json` in the volume's folder names the layers that are about to leave, or have left, until their
//! files are removed where nothing else names them. It is durable before `volume.json` is replaced, **which
//! is the moment**. It names layers for those who clear up, and keeps none: a layer is removed when no record
//! names it ([`crate::catalog::references`]). `docs/format.md` argues the steps.

use crate::base::root::{files, replace_file, sync_dir};
use crate::base::{Context, Kind, Result};
use crate::catalog::layout::Layout;
use crate::catalog::lock::VolumeLock;
use crate::catalog::metadata::{Metadata, written};
use crate::catalog::references::remove_unnamed;
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, LayerId, VolumeId, read_bounded};
use crate::crypt::SealKey;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The file's name in the volume's folder.
pub(crate) const FILE: &str = "leaving.json";

const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    layers: Vec<LayerId>,
}

/// Takes the layers that were copied up out of the volume's chain, durably. **What they held is in the layers
/// above, durably**, and whoever serves the volume writes to no other layer than its top. Their files are
/// there until somebody [clears them away](Catalog::clear_left).
///
/// `key` seals the volume; none for an unencrypted one.
///
/// # Errors
/// Those of the file system: then the volume goes on with the layers that it had.
pub fn commit(
    catalog: &Catalog,
    lock: &VolumeLock,
    metadata: &mut Metadata,
    key: Option<&SealKey>,
) -> Result<()> {
    let left: Vec<LayerId> = metadata.layout().leaving_layers().iter().map(|l| l.id).collect();
    commit_without(catalog, lock, metadata, &left, metadata.layout().hydrated(), key)
}

/// Takes layers that hold nothing out of the volume's chain, durably; otherwise as [`commit`]. **Nobody ever
/// writes to a frozen layer that holds nothing**, so they are needed no more.
///
/// # Errors
/// As for [`commit`].
pub fn commit_empty(
    catalog: &Catalog,
    lock: &VolumeLock,
    metadata: &mut Metadata,
    empty: &[LayerId],
    key: Option<&SealKey>,
) -> Result<()> {
    commit_without(catalog, lock, metadata, empty, metadata.layout().without(empty), key)
}

fn commit_without(
    catalog: &Catalog,
    lock: &VolumeLock,
    metadata: &mut Metadata,
    left: &[LayerId],
    layout: Layout,
    key: Option<&SealKey>,
) -> Result<()> {
    let mut layers = catalog.left_layers(lock.volume())?;
    layers.extend(left);
    layers.sort_unstable();
    layers.dedup();
    let path = catalog.leaving_path(lock.volume());
    replace_file(&path, &written::to_json(&Written { format: FORMAT, layers }))?;
    let mut next = metadata.clone();
    next.layout = layout;
    next.reseal(key);
    catalog.save(lock, &mut next)?;
    *metadata = next;
    Ok(())
}

impl Metadata {
    /// What becomes of the volume when these layers, which hold nothing, leave its chain.
    pub(crate) fn without(&self, empty: &[LayerId]) -> Self {
        Metadata { layout: self.layout().without(empty), ..self.clone() }
    }
}

impl Catalog {
    fn leaving_path(&self, volume: VolumeId) -> PathBuf {
        self.folder(volume).join(FILE)
    }

    /// The layers that are leaving a volume's chain, or have left it, as far as they were not cleared away.
    pub(crate) fn left_layers(&self, volume: VolumeId) -> Result<Vec<LayerId>> {
        let path = self.leaving_path(volume);
        let attempt = || format!("read {}", path.display());
        let bytes = match read_bounded(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == Kind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e.context(attempt())),
        };
        match written::version(&bytes).context(attempt)? {
            1 => Ok(written::read::<Written>(&bytes).context(attempt)?.layers),
            other => Err(written::unknown_version(other, "version 1").context(attempt())),
        }
    }

    /// Whether some layers may have left its chain that were not cleared away.
    pub(crate) fn has_left_layers(&self, volume: VolumeId) -> bool {
        files::exists(&self.leaving_path(volume))
    }

    /// Removes the files of layers that have left a volume's chain and that nothing names. Its host process
    /// may be at work meanwhile. Returns how many that were.
    ///
    /// # Errors
    /// `Corrupt` if a record cannot be read, since then nobody knows what it names; those of the file system.
    pub fn clear_left(&self, volume: VolumeId) -> Result<usize> {
        if !self.has_left_layers(volume) {
            return Ok(0);
        }
        self.clear_left_under(volume, &RecordsLock::acquire(self)?)
    }

    fn clear_left_under(&self, volume: VolumeId, records: &RecordsLock) -> Result<usize> {
        let removed = remove_unnamed(self, self.left_layers(volume)?, records)
            .map_err(|e| e.context(format!("remove the layers that have left the chain of {volume}")))?;
        if removed > 0 {
            log::info!("{volume}: removed {removed} layers that have left its chain");
        }
        Ok(removed)
    }

    /// As [`Catalog::clear_left`], for whoever has the volume's lock: `leaving.json` is removed as well, so
    /// that nobody need look again.
    ///
    /// # Errors
    /// As for [`Catalog::clear_left`].
    pub(crate) fn settle_left(&self, lock: &VolumeLock, records: &RecordsLock) -> Result<()> {
        self.clear_left_under(lock.volume(), records)?;
        let path = self.leaving_path(lock.volume());
        files::remove(&path).context(|| format!("remove {}", path.display()))?;
        sync_dir(&self.folder(lock.volume()))
    }
}
