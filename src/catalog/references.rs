//! Which layers are named, and by what: a layer belongs to every volume and snapshot whose record names it, and is
//! removed when none does.
//!
//! What makes names and removes layers does so under the [`StoreLock`], but for one thing: the process that has a
//! volume gives it a new top layer, or takes lower ones out of its chain, under the volume's lock alone. The order in
//! which the records are read makes up for it; see [`named_layers`].

use crate::base::root::{create_dir_durable, sync_dir};
use crate::base::{Context, Error, Kind, Result, locks};
use crate::catalog::lock::Held;
use crate::catalog::pending::Pending;
use crate::catalog::{self, Catalog, LayerId, VolumeId};
use nix::fcntl::Flock;
use std::collections::HashSet;
use std::fs::File;

/// The metadata's name until a volume is there.
pub(crate) const CREATING: &str = "creating.json";
/// The metadata's name once a volume is not there any more.
pub(crate) const DELETING: &str = "deleting.json";

/// Keeps making, deleting and clearing away apart for short moments: an flock on `volumes/`.
pub struct StoreLock {
    _folder: Flock<File>,
}

impl StoreLock {
    /// Waits until nobody else has it.
    pub(crate) fn acquire(catalog: &Catalog) -> Result<Self> {
        let path = catalog.root().volumes();
        let attempt = || format!("lock {}", path.display());
        create_dir_durable(&path)?;
        let folder = File::open(&path).context(attempt)?;
        let folder = locks::lock_whole(folder).context(attempt)?;
        Ok(StoreLock { _folder: folder })
    }
}

/// Every layer that a volume, a snapshot, or a command that is at work names.
///
/// Of each volume, `pending.json` is read before `volume.json`, and all volumes before the snapshots: a layer that
/// changes hands meanwhile goes from the one to the other in this direction only (a new top is pending until
/// `volume.json` names it; what leaves a volume's chain was noted in its snapshots' records long before), so that it is
/// found in at least one of them.
///
/// # Errors
/// `Corrupt`, naming the first record that cannot be read: then nobody knows what it names.
pub(crate) fn named_layers(catalog: &Catalog, _store: &StoreLock) -> Result<HashSet<LayerId>> {
    let mut named = HashSet::new();
    for id in catalog.folders()? {
        named.extend(Pending::load(catalog, id)?.and_then(|pending| pending.new_layer()));
        named.extend(layers_of_volume(catalog, id)?);
    }
    named.extend(catalog.layers_of_copies()?.iter().map(|l| l.id));
    for id in catalog.snapshot_ids()? {
        match catalog.load_snapshot(id) {
            Err(e) if e.kind() == Kind::NotFound => {}
            read => named.extend(read?.layers().iter().map(|l| l.id)),
        }
    }
    Ok(named)
}

fn layers_of_volume(catalog: &Catalog, id: VolumeId) -> Result<Vec<LayerId>> {
    for name in [CREATING, catalog::FILE] {
        match catalog.read_record(&catalog.folder(id).join(name), id) {
            Ok(metadata) => return Ok(metadata.layers().iter().map(|l| l.id).collect()),
            Err(e) if e.kind() == Kind::NotFound => {}
            // Never to become a volume: whoever was at it is gone.
            Err(_) if name == CREATING && catalog.held(id)? == Held::Free => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Vec::new())
}

/// Removes the files of those of `layers` that nothing names. Answers how many that were.
///
/// # Errors
/// As [`named_layers`], and then nothing is removed; those of the file system.
pub(crate) fn remove_unnamed(
    catalog: &Catalog,
    layers: impl IntoIterator<Item = LayerId>,
    store: &StoreLock,
) -> Result<usize> {
    let named = named_layers(catalog, store)
        .map_err(|e| e.context("nothing is removed, since it is not known which layers are still in use"))?;
    let mut removed = 0;
    for layer in layers.into_iter().filter(|layer| !named.contains(layer)) {
        let path = catalog.layer_path(layer);
        match std::fs::remove_file(&path) {
            Ok(()) => removed += 1,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::from(e).context(format!("remove {}", path.display()))),
        }
    }
    if removed > 0 {
        sync_dir(&catalog.root().layers())?;
    }
    Ok(removed)
}
