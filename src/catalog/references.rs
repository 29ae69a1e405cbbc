//! Which layers are named, and by what: a layer belongs to every volume and snapshot whose record names it,
//! and is removed when none does.
//!
//! What makes names and removes layers does so under the [`RecordsLock`], except for one thing: the process
//! that has a volume gives it a new top layer, or takes lower ones out of its chain, under the volume's lock
//! alone. The order in which the records are read makes up for it; see [`named_layers`].

use crate::base::root::sync_dir;
use crate::base::{Error, Kind, Result};
use crate::catalog::chains::chains;
use crate::catalog::metadata::Metadata;
use crate::catalog::pending::Pending;
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{self, CREATING, Catalog, LayerId, VolumeId, read_bounded};
use crate::image::lock::{Access, ImageLock};
use std::collections::HashSet;
use std::fmt::Display;
use std::path::Path;

/// Every layer that a volume, a snapshot, or a command that is at work names.
///
/// Each volume's `pending.json` is read before its `volume.json`, and [all volumes](chains) before the
/// snapshots: a layer that changes hands meanwhile goes from the one to the other in this direction only (a
/// new top is pending until `volume.json` names it; what leaves a volume's chain was noted in its snapshots'
/// records long before), so that it is found in at least one of them.
///
/// # Errors
/// As [`chains`].
pub(crate) fn named_layers(catalog: &Catalog, records: &RecordsLock) -> Result<HashSet<LayerId>> {
    named_beside_pending_of(catalog, None, records)
}

/// As [`named_layers`], except for what is pending of the volume `undone`: that is no reason to keep a layer.
fn named_beside_pending_of(
    catalog: &Catalog,
    undone: Option<VolumeId>,
    records: &RecordsLock,
) -> Result<HashSet<LayerId>> {
    let mut named = HashSet::new();
    for id in catalog.folders()?.into_iter().filter(|id| undone != Some(*id)) {
        named.extend(Pending::load(catalog, id)?.and_then(|pending| pending.new_layer()));
    }
    let chains = chains(catalog, records)?;
    named.extend(chains.iter().flat_map(|chain| &chain.links).map(|link| link.id));
    Ok(named)
}

/// Looks whether the volume may write to its top layer: no other record names that, and no layer of the
/// volume's is another volume's top. The process that had the volume last writes `volume.json`, and could
/// have put a golden snapshot's layer, or another tenant's, at its top: whatever is written there
/// afterwards, all others would read.
///
/// Takes no lock: a record that is being made or removed meanwhile does not name the top of a
/// volume that somebody has.
///
/// # Errors
/// `Corrupt`, naming the layer and the other record.
pub(crate) fn check_top_is_own(catalog: &Catalog, volume: &Metadata) -> Result<()> {
    let top = volume.top().id;
    let shared = |layer: LayerId, by: &dyn Display| {
        let path = catalog.folder(volume.id()).join(catalog::FILE);
        let message = format!(
            "{}: layer {layer} is named by {by} as well, so that it is not this volume's alone to be written \
             to; one of the two records was changed. Restore {} from a backup",
            volume.id(),
            path.display()
        );
        Err(Error::new(Kind::Corrupt, message))
    };
    let is_ours = |layer: LayerId| volume.layers().iter().any(|l| l.id == layer);
    for id in catalog.folders()?.into_iter().filter(|id| *id != volume.id()) {
        for path in [CREATING, catalog::FILE].map(|name| catalog.folder(id).join(name)) {
            match catalog.read_record(&path, id) {
                Ok(other) if other.layers().iter().any(|l| l.id == top) => return shared(top, &id),
                Ok(other) if is_ours(other.top().id) => return shared(other.top().id, &id),
                Err(e) if e.kind() != Kind::NotFound && says(&path, top) => {
                    return shared(top, &path.display());
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
    for id in catalog.snapshot_ids()? {
        match catalog.load_snapshot_claim(id) {
            Ok(other) if other.layers().iter().any(|l| l.id == top) => return shared(top, &id),
            Err(_) if says(&catalog.snapshot_path(id), top) => return shared(top, &id),
            Ok(_) | Err(_) => {}
        }
    }
    match catalog.copies_in_the_making()?.into_iter().find(|(_, path)| says(path, top)) {
        Some((id, _)) => shared(top, &id),
        None => Ok(()),
    }
}

/// Whether a record that may be damaged has the id of `layer` in it.
fn says(path: &Path, layer: LayerId) -> bool {
    let text = layer.to_string();
    let has = |bytes: Vec<u8>| bytes.windows(text.len()).any(|part| part == text.as_bytes());
    read_bounded(path).is_ok_and(has)
}

/// Removes the file of a layer that was pending of `volume`, and that no record names: what is pending is
/// written by the process that had the volume, and could name any layer there is.
///
/// # Errors
/// As [`named_layers`], and then nothing is removed; `Busy` if somebody has the file open;
/// those of the file system.
pub(crate) fn remove_pending(
    catalog: &Catalog,
    volume: VolumeId,
    layer: LayerId,
    records: &RecordsLock,
) -> Result<()> {
    if named_beside_pending_of(catalog, Some(volume), records)?.contains(&layer) {
        let message = format!(
            "{volume}: layer {layer}, which was said to be in the making, is one that a record names: it \
             stays"
        );
        return Err(Error::new(Kind::Corrupt, message));
    }
    let path = catalog.layer_path(layer);
    let in_use = match ImageLock::acquire(&path, Access::ReadWrite) {
        // It lies on a device, or is gone.
        Err(e) if e.kind() == Kind::NotFound => None,
        lock => Some(lock?),
    };
    if !catalog.remove_layer(layer)? {
        return Ok(());
    }
    drop(in_use);
    sync_dir(&catalog.root().layers())
}

/// Removes the files of those of `layers` that nothing names. Returns how many that were.
///
/// # Errors
/// As [`named_layers`], and then nothing is removed; those of the file system.
pub(crate) fn remove_unnamed(
    catalog: &Catalog,
    layers: impl IntoIterator<Item = LayerId>,
    records: &RecordsLock,
) -> Result<usize> {
    let named = named_layers(catalog, records)
        .map_err(|e| e.context("nothing is removed, since it is not known which layers are still in use"))?;
    let mut removed = 0;
    for layer in layers.into_iter().filter(|layer| !named.contains(layer)) {
        removed += usize::from(catalog.remove_layer(layer)?);
    }
    if removed > 0 {
        sync_dir(&catalog.root().layers())?;
    }
    Ok(removed)
}
