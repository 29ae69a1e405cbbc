//! Deleting volumes, and clearing away what interrupted makings and deletions left.

use crate::base::root::{files, replace_file, sync_dir};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{self, Holder, Purpose, VolumeLock};
use crate::catalog::references::remove_unnamed;
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{self, Catalog, LayerId, Metadata, SnapshotId, VolumeId, leaving, pending, tags};
use crate::catalog::{CREATING, DELETING};
use crate::events::{Event, EventLog};
use crate::ops::shred::{self, Receipt};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Deletes a volume that nobody has attached, with those of its layers that nothing else names, and reports a
/// `deleteVolume` event. Returns its layers; of those that are still there, some of what they hold may be
/// needed no more ([`crate::ops::space`]).
///
/// # Errors
/// `Busy`, naming the process that has it; `NotFound`; `Corrupt` if its metadata cannot be read, since then
/// nobody knows its layers. An error after the volume is gone says so.
pub fn delete(catalog: &Catalog, events: &EventLog, id: VolumeId) -> Result<Vec<LayerId>> {
    delete_by(catalog, events, id, |folder, metadata| {
        rename_durably(folder, catalog::FILE, DELETING)?;
        Ok(metadata.layers().iter().map(|layer| layer.id).collect())
    })
}

/// Deletes a snapshot, with those of its layers that nothing else names. Returns its
/// layers, as [`delete`] does.
///
/// # Errors
/// As [`Catalog::delete_snapshot`].
pub fn delete_snapshot(catalog: &Catalog, id: SnapshotId) -> Result<Vec<LayerId>> {
    let deleted =
        catalog.delete_snapshot(id).map_err(|e| advised(catalog.load_snapshot_claim(id).is_err(), e))?;
    Ok(deleted.layers().iter().map(|layer| layer.id).collect())
}

/// As [`delete`], and overwrites the wrapped copies of the volume's data keys first.
///
/// # Errors
/// Those of [`delete`]. After an error that says that the volume is deleted, the next
/// delete or create finishes it.
pub fn shred(catalog: &Catalog, events: &EventLog, id: VolumeId) -> Result<Receipt> {
    let mut receipt = delete_by(catalog, events, id, |folder, metadata| {
        let mut receipt = Receipt::new(catalog, metadata)?;
        replace_file(&folder.join(DELETING), &shred::without_wrapped_keys(metadata)?)?;
        rename_durably(folder, catalog::FILE, shred::FILE)?;
        receipt.destroyed = shred::destroy_all(folder).context(
            || "it is deleted, but its wrapped keys are not all overwritten; the next delete tries again",
        )?;
        Ok(receipt)
    })?;
    receipt.layers.retain(|layer| !layer.exists());
    Ok(receipt)
}

/// Deletes a volume whose record cannot be read, and reports a `deleteVolume` event. Nobody knows
/// its layers: they are left to [`crate::ops::gc`], which can do its work again where it is the
/// record that was in the way.
///
/// # Errors
/// `Usage` if the record can be read; `Busy`, naming the process that has the volume; `NotFound`.
pub fn delete_unreadable(catalog: &Catalog, events: &EventLog, id: VolumeId) -> Result<()> {
    let delete = || {
        let folder = catalog.folder(id);
        let _lock = VolumeLock::acquire_in_turn(&folder, id, &Holder::this_process(Purpose::Delete, None)?)?;
        let _records = RecordsLock::acquire(catalog)?;
        check_is_unreadable(catalog.load_claim(id).map(drop))?;
        // With this it is not there any more; whatever keeps the rest, the next deletion clears away.
        files::remove(&folder.join(catalog::FILE))?;
        sync_dir(&folder)?;
        events.record(&Event::delete_volume(id));
        remove_folder(catalog, id)
    };
    delete().context(|| format!("delete {id}"))
}

/// As [`delete_unreadable`], for a snapshot.
///
/// # Errors
/// `Usage` if the record can be read; `NotFound`.
pub fn delete_unreadable_snapshot(catalog: &Catalog, id: SnapshotId) -> Result<()> {
    let delete = || {
        let _records = RecordsLock::acquire(catalog)?;
        check_is_unreadable(catalog.load_snapshot_claim(id).map(drop))?;
        files::remove(&catalog.snapshot_path(id))?;
        sync_dir(&catalog.root().snapshots())?;
        catalog.forget_entry(&id)
    };
    delete().context(|| format!("delete {id}"))
}

fn check_is_unreadable(read: Result<()>) -> Result<()> {
    match read {
        Ok(()) => Err(Error::new(Kind::Usage, "its record can be read; leave out --unreadable")),
        Err(e) if e.kind() == Kind::Corrupt => Ok(()),
        Err(e) => Err(e),
    }
}

/// Deletes a volume; `let_go` renames its metadata, after which it is not there any more.
fn delete_by<T>(
    catalog: &Catalog,
    events: &EventLog,
    id: VolumeId,
    let_go: impl FnOnce(&Path, &Metadata) -> Result<T>,
) -> Result<T> {
    let folder = catalog.folder(id);
    let holder = Holder::this_process(Purpose::Delete, None)?;
    let attempt = || format!("delete {id}");
    let lock = VolumeLock::acquire_in_turn(&folder, id, &holder).context(attempt)?;
    let metadata =
        catalog.load(id).map_err(|e| advised(catalog.load_claim(id).is_err(), e)).context(attempt)?;
    match catalog.check_top_is_own(&metadata) {
        Ok(()) => catalog.recover(&lock, &metadata).context(attempt)?,
        // What others name stays; nothing is undone in layers that may be theirs.
        Err(e) => log::warn!("{e}"),
    }
    // Its lock may have been lost by a process that still serves it.
    catalog.check_nobody_has_image(metadata.top().id).context(attempt)?;
    let done = let_go(&folder, &metadata);
    if done.is_ok() || !files::exists(&folder.join(catalog::FILE)) {
        shred::record_destroyed(catalog, &metadata, &done);
        events.record(&Event::delete_volume(id));
    }
    let done = done.context(attempt)?;
    let records = RecordsLock::acquire(catalog)?;
    clear(catalog, &metadata, &records).context(|| {
        format!(
            "{id} is deleted, but not its layers; the next \"sealblk volume create\" or \"delete\" tries \
             again"
        )
    })?;
    clear_remains(catalog, &records);
    Ok(done)
}

/// What else can be done about a record that cannot be read.
fn advised(is_unreadable: bool, e: Error) -> Error {
    if !is_unreadable || e.kind() != Kind::Corrupt {
        return e;
    }
    let message = format!("{e}, or give it up: \"delete --unreadable\" with its whole id");
    e.reworded(message)
}

pub(super) fn rename_durably(folder: &Path, from: &str, to: &str) -> Result<()> {
    let (from, to) = (folder.join(from), folder.join(to));
    files::rename(&from, &to).context(|| format!("rename {} to {}", from.display(), to.display()))?;
    sync_dir(folder)
}

/// Removes a volume that is not there yet.
pub(super) fn abandon(catalog: &Catalog, metadata: &Metadata, records: &RecordsLock) -> Result<()> {
    // What is being made names its layers; what is being deleted does not any more.
    rename_durably(&catalog.folder(metadata.id()), CREATING, DELETING)?;
    clear(catalog, metadata, records)
}

/// Removes a volume that is not there any more: those of its layers that nothing else names,
/// and last what names them.
fn clear(catalog: &Catalog, metadata: &Metadata, records: &RecordsLock) -> Result<()> {
    let left = catalog.left_layers(metadata.id())?;
    remove_unnamed(catalog, metadata.layers().iter().map(|l| l.id).chain(left), records)?;
    remove_folder(catalog, metadata.id())
}

fn remove_folder(catalog: &Catalog, id: VolumeId) -> Result<()> {
    let folder = catalog.folder(id);
    shred::finish(&folder)?;
    files::remove_folder(&folder).context(|| format!("remove {}", folder.display()))?;
    sync_dir(&catalog.root().volumes())?;
    catalog.forget_volume(id)
}

/// Clears away what interrupted creates and deletes left. What cannot be understood stays, with a warning.
pub(crate) fn clear_remains(catalog: &Catalog, records: &RecordsLock) {
    if let Err(e) = catalog.clear_deleted_snapshots(records) {
        log::warn!("{e}");
    }
    let folders = catalog.folders().unwrap_or_else(|e| {
        log::warn!("{e}");
        Vec::new()
    });
    for id in folders {
        if let Err(e) = clear_remains_of(catalog, id, records) {
            log::warn!("{}: left as it is: {e}", catalog.folder(id).display());
        }
    }
}

fn clear_remains_of(catalog: &Catalog, id: VolumeId, records: &RecordsLock) -> Result<()> {
    let folder = catalog.folder(id);
    if files::exists(&folder.join(catalog::FILE)) {
        return Ok(());
    }
    let holder = Holder::this_process(Purpose::Delete, None)?;
    let _lock = match VolumeLock::acquire(&folder, id, &holder) {
        Ok(lock) => lock,
        // It is just being made or deleted.
        Err(e) if matches!(e.kind(), Kind::Busy | Kind::NotFound) => return Ok(()),
        Err(e) => return Err(e),
    };
    for name in [CREATING, DELETING] {
        let record = folder.join(name);
        if files::exists(&record) {
            log::info!("clearing away {id}, of which an interrupted command left a part");
            let metadata = catalog.read_record(&record, id)?;
            let clear = if name == CREATING { abandon } else { clear };
            return clear(catalog, &metadata, records);
        }
    }
    // Cut off before there was a record, or after it was removed: but a file of somebody else's stays.
    if holds_nothing_of_value(&folder)? && !files::exists(&folder.join(catalog::FILE)) {
        remove_folder(catalog, id)?;
    }
    Ok(())
}

fn holds_nothing_of_value(folder: &Path) -> Result<bool> {
    for name in files::names(folder)? {
        let path = folder.join(&name);
        let name = name.to_str().unwrap_or_default();
        if !files::is_record(&path) && path.symlink_metadata()?.file_type().is_socket() {
            // Of a host process that was killed.
            continue;
        }
        let is_ours = [lock::FILE, tags::FILE, leaving::FILE].contains(&name) || pending::is_layer_name(name);
        if !is_ours && !name.ends_with(".tmp") {
            return Ok(false);
        }
    }
    Ok(true)
}
