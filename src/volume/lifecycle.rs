//! Making and deleting volumes, in steps that a power cut may separate.
//!
//! While a volume is being made, what will be its `volume.json` is called `creating.json`; while one is being
//! deleted, it is called `deleting.json`. Both renames are the moment that decides. A folder with one of these
//! names its layers, so that the next create or delete can clear away what an interrupted one left; of them, a layer
//! that something else names stays. `docs/format.md` argues it step by step.

use super::catalog::{self, Catalog};
use super::hydrated;
use super::id::VolumeId;
use super::lock::{self, Holder, Purpose, VolumeLock};
use super::metadata::{Geometry, KeyOwner, KeyRecord, Metadata, VolumeName, encryption_context};
use super::pending;
use super::references::{CREATING, DELETING, StoreLock, remove_unnamed};
use super::shred::{self, Receipt};
use super::tags::{self, Tags};
use crate::crypt::Dek;
use crate::error::{Context, Error, Kind, Result};
use crate::kms::{KeyProvider, KmsError};
use crate::observe::events::{Event, EventLog};
use crate::root::{create_dir_durable, replace_file, sync_dir};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// A volume to be made.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its size and sector size.
    pub geometry: Geometry,
    /// Its name, if it shall have one; no other volume may have it.
    pub name: Option<VolumeName>,
    /// Its tags.
    pub tags: Tags,
    /// Whether the file system sets the whole size aside now.
    pub preallocate: bool,
}

/// Which KMS key wraps a new data key.
#[derive(Clone, Copy)]
pub struct WrappingKey<'a> {
    /// The KMS.
    pub provider: &'a dyn KeyProvider,
    /// The key, as the provider takes it: id, ARN or alias.
    pub key: &'a str,
}

impl WrappingKey<'_> {
    /// A new data key for `owner`, which the KMS makes and nobody sees.
    pub(super) fn generate(&self, owner: impl Into<KeyOwner>) -> Result<KeyRecord, Failure> {
        let wrapped = self.provider.generate_wrapped(self.key, Dek::LEN, &encryption_context(owner));
        let wrapped = wrapped.map_err(|e| Failure::kms(e, self.provider.name(), self.key))?;
        Ok(KeyRecord { provider: self.provider.name().to_string(), wrapped, check: None })
    }
}

/// Why something was not made: what the event says and what the reader is told.
#[derive(Debug)]
pub struct Failure {
    /// Of a KMS, its message, word for word.
    pub cause: String,
    /// The same with what was attempted and what can be done.
    pub error: Error,
}

impl Failure {
    /// The refusal of the provider of this name: its own words, and what can be done about `key`.
    pub(super) fn kms(e: KmsError, provider: &str, key: &str) -> Self {
        Failure { cause: e.to_string(), error: e.with_advice_of(provider, key) }
    }
}

impl Failure {
    /// The same, told of the volume whose snapshot was not made.
    pub fn of(self, volume: VolumeId) -> Self {
        Failure { cause: self.cause, error: self.error.context(format!("make a snapshot of {volume}")) }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { cause: error.to_string(), error }
    }
}

/// Makes a volume, encrypted under a data key that the KMS makes and nobody sees; without a `key`, unencrypted.
/// Reports how it went as a `createVolume` event.
///
/// # Errors
/// The KMS's; `Busy` if the name is taken; those of the file system. Nothing of the volume is left then.
pub fn create(
    catalog: &Catalog,
    events: &EventLog,
    wanted: &Wanted,
    key: Option<WrappingKey<'_>>,
) -> Result<Metadata> {
    create_with(catalog, events, wanted, |id| {
        let key = key.map(|with| with.generate(id)).transpose()?;
        Ok(Metadata::new(id, wanted.name.clone(), wanted.geometry, key))
    })
}

/// Makes a volume of what `prepare` answers, given its id.
pub(super) fn create_with(
    catalog: &Catalog,
    events: &EventLog,
    wanted: &Wanted,
    prepare: impl FnOnce(VolumeId) -> Result<Metadata, Failure>,
) -> Result<Metadata> {
    create_filled(catalog, events, wanted, prepare, |_| Ok(()))
}

/// The same, and `fill` gives it its data before it is there. What `fill` has written is durable when it returns; it
/// makes no other layers than the metadata names.
pub(super) fn create_filled(
    catalog: &Catalog,
    events: &EventLog,
    wanted: &Wanted,
    prepare: impl FnOnce(VolumeId) -> Result<Metadata, Failure>,
    fill: impl FnOnce(&Metadata) -> Result<()>,
) -> Result<Metadata> {
    check_name_is_free(catalog, wanted.name.as_ref())?;
    let id = VolumeId::random();
    // First what can fail for reasons of others, while there is nothing to clear away.
    let made = prepare(id).and_then(|metadata| Ok(make(catalog, metadata, wanted, fill)?));
    let result = made.as_ref().map(drop).map_err(|failure| failure.cause.clone());
    events.record(&Event::create_volume(id, result));
    made.map_err(|failure| failure.error.context("create a volume"))
}

fn make(
    catalog: &Catalog,
    metadata: Metadata,
    wanted: &Wanted,
    fill: impl FnOnce(&Metadata) -> Result<()>,
) -> Result<Metadata> {
    create_dir_durable(&catalog.root().layers())?;
    let metadata = metadata.next_generation()?;
    let _lock = begin(catalog, &metadata)?;
    let made = furnish(catalog, &metadata, wanted)
        .and_then(|()| fill(&metadata))
        .and_then(|()| commit(catalog, &metadata));
    if let Err(e) = made {
        let cleared = StoreLock::acquire(catalog).and_then(|store| abandon(catalog, &metadata, &store));
        if let Err(left) = cleared {
            log::warn!("{left}; the next \"sealblk volume create\" or \"delete\" tries again");
        }
        return Err(e);
    }
    Ok(metadata)
}

/// Makes the volume's folder, takes the volume, and writes down what is going to be made.
fn begin(catalog: &Catalog, metadata: &Metadata) -> Result<VolumeLock> {
    let store = StoreLock::acquire(catalog)?;
    clear_remains(catalog, &store);
    if let Some(origin) = metadata.origin() {
        // From here on the new volume names its layers, and before, the snapshot did.
        catalog.load_snapshot(origin.snapshot)?;
    }
    let folder = catalog.folder(metadata.id());
    create_dir_durable(&folder)?;
    let holder = Holder::this_process(Purpose::Create, None)?;
    let begun = VolumeLock::acquire(&folder, metadata.id(), &holder).and_then(|lock| {
        replace_file(&folder.join(CREATING), &metadata.to_json())?;
        Ok(lock)
    });
    if begun.is_err() {
        // Without a record it is harmless; the error that matters is the first one.
        let _ = std::fs::remove_dir_all(&folder);
    }
    begun
}

/// Makes everything that the volume needs before it is there, but for its data.
fn furnish(catalog: &Catalog, metadata: &Metadata, wanted: &Wanted) -> Result<()> {
    if !wanted.tags.is_empty() {
        tags::write(&catalog.folder(metadata.id()), &wanted.tags)?;
    }
    make_layer(&catalog.layer_path(metadata.top().id), metadata.size(), wanted.preallocate)
}

/// Makes a layer's file at `path`, where there must be none, without data; it is durable then. Something names it
/// already.
///
/// # Errors
/// Those of the file system; `Unsupported` if it cannot set space aside.
pub fn make_layer(path: &Path, size: u64, preallocate: bool) -> Result<()> {
    let attempt = || format!("make {} of {size} bytes", path.display());
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).context(attempt)?;
    if preallocate {
        let len = libc::off_t::try_from(size).expect("Geometry: below 2^63");
        fallocate(&file, FallocateFlags::empty(), 0, len).map_err(|e| match e {
            Errno::EOPNOTSUPP => {
                let message = "this file system cannot set space aside; leave out --preallocate";
                Error::new(Kind::Unsupported, message).context(attempt())
            }
            e => Error::from(e).context(attempt()),
        })?;
    } else {
        file.set_len(size).context(attempt)?;
    }
    file.sync_all().context(attempt)?;
    sync_dir(path.parent().expect("a layer lies in a folder"))
}

/// The rename after which the volume is there.
fn commit(catalog: &Catalog, metadata: &Metadata) -> Result<()> {
    // Held over the look at the names and the rename: of two volumes of one name, one comes second.
    let _store = StoreLock::acquire(catalog)?;
    check_name_is_free(catalog, metadata.name())?;
    rename_durably(&catalog.folder(metadata.id()), CREATING, catalog::FILE)
}

/// Deletes a volume that nobody has attached, with those of its layers that nothing else names, and reports a `deleteVolume` event.
///
/// # Errors
/// `Busy`, naming the process that has it; `NotFound`; `Corrupt` if its metadata cannot be read, since then
/// nobody knows its layers. An error after the volume is gone says so.
pub fn delete(catalog: &Catalog, events: &EventLog, id: VolumeId) -> Result<()> {
    delete_by(catalog, events, id, |folder, _| rename_durably(folder, catalog::FILE, DELETING))
}

/// As [`delete`], and overwrites the wrapped copies of the volume's data keys first.
///
/// # Errors
/// Those of [`delete`]. After an error that says that the volume is deleted, the next delete or create finishes it.
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
    let lock = VolumeLock::acquire(&folder, id, &holder).context(attempt)?;
    let metadata = catalog.load(id).context(attempt)?;
    catalog.recover(&lock, &metadata).context(attempt)?;
    let done = let_go(&folder, &metadata);
    if done.is_ok() || !folder.join(catalog::FILE).exists() {
        shred::record_destroyed(catalog, &metadata, &done);
        events.record(&Event::delete_volume(id));
    }
    let done = done.context(attempt)?;
    let store = StoreLock::acquire(catalog)?;
    clear(catalog, &metadata, &store).context(|| {
        format!(
            "{id} is deleted, but not its layers; the next \"sealblk volume create\" or \"delete\" tries again"
        )
    })?;
    clear_remains(catalog, &store);
    Ok(done)
}

/// # Errors
/// `Busy` if a volume has that name.
fn check_name_is_free(catalog: &Catalog, name: Option<&VolumeName>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    match catalog.list()?.iter().find(|e| e.name() == Some(name.as_str())) {
        None => Ok(()),
        Some(e) => {
            let message = format!("{} has the name \"{name}\" already; choose another", e.id);
            Err(Error::new(Kind::Busy, message))
        }
    }
}

fn rename_durably(folder: &Path, from: &str, to: &str) -> Result<()> {
    let (from, to) = (folder.join(from), folder.join(to));
    std::fs::rename(&from, &to).context(|| format!("rename {} to {}", from.display(), to.display()))?;
    sync_dir(folder)
}

/// Removes a volume that is not there yet.
fn abandon(catalog: &Catalog, metadata: &Metadata, store: &StoreLock) -> Result<()> {
    // What is being made names its layers; what is being deleted does not any more.
    rename_durably(&catalog.folder(metadata.id()), CREATING, DELETING)?;
    clear(catalog, metadata, store)
}

/// Removes a volume that is not there any more: those of its layers that nothing else names, and last what names them.
fn clear(catalog: &Catalog, metadata: &Metadata, store: &StoreLock) -> Result<()> {
    let left = catalog.left_layers(metadata.id())?;
    remove_unnamed(catalog, metadata.layers().iter().map(|l| l.id).chain(left), store)?;
    remove_folder(catalog, metadata.id())
}

fn remove_folder(catalog: &Catalog, id: VolumeId) -> Result<()> {
    let folder = catalog.folder(id);
    shred::finish(&folder)?;
    std::fs::remove_dir_all(&folder).context(|| format!("remove {}", folder.display()))?;
    sync_dir(&catalog.root().volumes())
}

/// Clears away what interrupted creates and deletes left. What cannot be understood stays, with a warning.
pub(super) fn clear_remains(catalog: &Catalog, store: &StoreLock) {
    if let Err(e) = catalog.clear_deleted_snapshots(store) {
        log::warn!("{e}");
    }
    let folders = catalog.folders().unwrap_or_else(|e| {
        log::warn!("{e}");
        Vec::new()
    });
    for id in folders {
        if let Err(e) = clear_remains_of(catalog, id, store) {
            log::warn!("{}: left as it is: {e}", catalog.folder(id).display());
        }
    }
}

fn clear_remains_of(catalog: &Catalog, id: VolumeId, store: &StoreLock) -> Result<()> {
    let folder = catalog.folder(id);
    if folder.join(catalog::FILE).exists() {
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
        if record.exists() {
            log::info!("clearing away {id}, of which an interrupted command left a part");
            let metadata = catalog.read_record(&record, id)?;
            let clear = if name == CREATING { abandon } else { clear };
            return clear(catalog, &metadata, store);
        }
    }
    // Cut off before there was a record, or after it was removed: but a file of somebody else's stays.
    if holds_nothing_of_value(&folder)? && !folder.join(catalog::FILE).exists() {
        remove_folder(catalog, id)?;
    }
    Ok(())
}

fn holds_nothing_of_value(folder: &Path) -> Result<bool> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        if entry.file_type()?.is_socket() {
            // Of a host process that was killed.
            continue;
        }
        let is_ours =
            [lock::FILE, tags::FILE, hydrated::FILE].contains(&name) || pending::is_layer_name(name);
        if !is_ours && !name.ends_with(".tmp") {
            return Ok(false);
        }
    }
    Ok(true)
}
