//! Making and deleting volumes, in steps that a power cut may separate.
//!
//! While a volume is being made, what will be its `volume.json` is called `creating.json`; while one is being
//! deleted, it is called `deleting.json`. Both renames are the moment that decides. A folder with one of these
//! names its layers, so that the next create or delete can clear away what an interrupted one left, and
//! nothing else ever removes a layer. `docs/format.md` argues it step by step.

use super::catalog::{self, Catalog};
use super::id::VolumeId;
use super::lock::{self, Holder, Purpose, VolumeLock};
use super::metadata::{Geometry, KeyRecord, Metadata, VolumeName, encryption_context};
use crate::crypt::Dek;
use crate::error::{Context, Error, Kind, Result};
use crate::kms::{KeyProvider, KmsError};
use crate::observe::events::{Event, EventLog};
use crate::root::{create_dir_durable, replace_file, sync_dir};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The metadata's name until a volume is there.
const CREATING: &str = "creating.json";
/// The metadata's name once a volume is not there any more.
const DELETING: &str = "deleting.json";

/// A volume to be made.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its size and sector size.
    pub geometry: Geometry,
    /// Its name, if it shall have one; no other volume may have it.
    pub name: Option<VolumeName>,
    /// Whether the file system sets the whole size aside now.
    pub preallocate: bool,
}

/// Which KMS key wraps the new volume's data key.
pub struct WrappingKey<'a> {
    /// The KMS.
    pub provider: &'a dyn KeyProvider,
    /// The key, as the provider takes it: id, ARN or alias.
    pub key: &'a str,
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
    check_name_is_free(catalog, wanted.name.as_ref())?;
    let id = VolumeId::random();
    let attempt = || "create a volume";
    let failed = |cause: String| events.record(&Event::create_volume(id, Err(cause)));
    // First what can fail for reasons of others, while there is nothing to clear away.
    let key = key.map(|with| {
        generate_key(id, &with).map_err(|e| {
            failed(e.to_string());
            e.with_advice_of(with.provider.name(), with.key)
        })
    });
    let key = key.transpose().context(attempt)?;
    let metadata = Metadata::new(id, wanted.name.clone(), wanted.geometry, key);
    let made = make(catalog, metadata, wanted.preallocate).inspect_err(|e| failed(e.to_string()));
    let metadata = made.context(attempt)?;
    events.record(&Event::create_volume(id, Ok(())));
    Ok(metadata)
}

fn generate_key(id: VolumeId, with: &WrappingKey<'_>) -> Result<KeyRecord, KmsError> {
    let wrapped = with.provider.generate_wrapped(with.key, Dek::LEN, &encryption_context(id))?;
    Ok(KeyRecord { provider: with.provider.name().to_string(), wrapped, check: None })
}

fn make(catalog: &Catalog, metadata: Metadata, preallocate: bool) -> Result<Metadata> {
    create_dir_durable(&catalog.root().layers())?;
    create_dir_durable(&catalog.root().volumes())?;
    let metadata = metadata.next_generation()?;
    let _lock = begin(catalog, &metadata)?;
    let made = make_layer(catalog, &metadata, preallocate).and_then(|()| commit(catalog, &metadata));
    if let Err(e) = made {
        if let Err(left) = clear(catalog, &metadata) {
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

/// Makes the top layer's file: as long as the volume, and without data.
fn make_layer(catalog: &Catalog, metadata: &Metadata, preallocate: bool) -> Result<()> {
    let path = catalog.layer_path(metadata.top().id);
    let attempt = || format!("make {} of {} bytes", path.display(), metadata.size());
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).context(attempt)?;
    if preallocate {
        let len = libc::off_t::try_from(metadata.size()).expect("Geometry: below 2^63");
        fallocate(&file, FallocateFlags::empty(), 0, len).map_err(|e| match e {
            Errno::EOPNOTSUPP => {
                let message = "this file system cannot set space aside; leave out --preallocate";
                Error::new(Kind::Unsupported, message).context(attempt())
            }
            e => Error::from(e).context(attempt()),
        })?;
    } else {
        file.set_len(metadata.size()).context(attempt)?;
    }
    file.sync_all().context(attempt)?;
    sync_dir(&catalog.root().layers())
}

/// The rename after which the volume is there.
fn commit(catalog: &Catalog, metadata: &Metadata) -> Result<()> {
    // Held over the look at the names and the rename: of two volumes of one name, one comes second.
    let _store = StoreLock::acquire(catalog)?;
    check_name_is_free(catalog, metadata.name())?;
    rename_durably(&catalog.folder(metadata.id()), CREATING, catalog::FILE)
}

/// Deletes a volume that nobody has attached, its layers with it, and reports a `deleteVolume` event.
///
/// # Errors
/// `Busy`, naming the process that has it; `NotFound`; `Corrupt` if its metadata cannot be read, since then
/// nobody knows its layers. An error after the volume is gone says so.
pub fn delete(catalog: &Catalog, events: &EventLog, id: VolumeId) -> Result<()> {
    let folder = catalog.folder(id);
    let holder = Holder::this_process(Purpose::Delete, None)?;
    let attempt = || format!("delete {id}");
    let _lock = VolumeLock::acquire(&folder, id, &holder).context(attempt)?;
    let metadata = catalog.load(id).context(attempt)?;
    rename_durably(&folder, catalog::FILE, DELETING).context(attempt)?;
    events.record(&Event::delete_volume(id));
    let store = StoreLock::acquire(catalog)?;
    clear(catalog, &metadata).context(|| {
        format!(
            "{id} is deleted, but not its layer; the next \"sealblk volume create\" or \"delete\" tries again"
        )
    })?;
    clear_remains(catalog, &store);
    Ok(())
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

/// Keeps making, deleting and clearing away of volumes apart for short moments: an flock on `volumes/`.
struct StoreLock {
    _folder: Flock<File>,
}

impl StoreLock {
    fn acquire(catalog: &Catalog) -> Result<Self> {
        let path = catalog.root().volumes();
        let attempt = || format!("lock {}", path.display());
        let folder = File::open(&path).context(attempt)?;
        let folder = Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, e)| e).context(attempt)?;
        Ok(StoreLock { _folder: folder })
    }
}

/// Removes a volume that is not there (yet, or any more): its layers first, what names them last.
fn clear(catalog: &Catalog, metadata: &Metadata) -> Result<()> {
    for layer in metadata.layers() {
        let path = catalog.layer_path(layer.id);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::from(e).context(format!("remove {}", path.display())));
            }
            _ => {}
        }
    }
    sync_dir(&catalog.root().layers())?;
    remove_folder(catalog, metadata.id())
}

fn remove_folder(catalog: &Catalog, id: VolumeId) -> Result<()> {
    let folder = catalog.folder(id);
    std::fs::remove_dir_all(&folder).context(|| format!("remove {}", folder.display()))?;
    sync_dir(&catalog.root().volumes())
}

/// Clears away what interrupted creates and deletes left. What cannot be understood stays, with a warning.
fn clear_remains(catalog: &Catalog, _store: &StoreLock) {
    let folders = catalog.folders().unwrap_or_else(|e| {
        log::warn!("{e}");
        Vec::new()
    });
    for id in folders {
        if let Err(e) = clear_remains_of(catalog, id) {
            log::warn!("{}: left as it is: {e}", catalog.folder(id).display());
        }
    }
}

fn clear_remains_of(catalog: &Catalog, id: VolumeId) -> Result<()> {
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
    for record in [CREATING, DELETING].map(|name| folder.join(name)) {
        if record.exists() {
            log::info!("clearing away {id}, of which an interrupted command left a part");
            return clear(catalog, &catalog.read_record(&record, id)?);
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
        let name = entry?.file_name();
        let name = name.to_str().unwrap_or_default();
        if name != lock::FILE && !name.ends_with(".tmp") {
            return Ok(false);
        }
    }
    Ok(true)
}
