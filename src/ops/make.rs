//! Making and deleting volumes, in steps that a power cut may separate.
//!
//! While a volume is being made, what will be its `volume.json` is called `creating.json`; while one is being
//! deleted, it is called `deleting.json`. Both renames are the moment that decides. A folder with one of
//! these names its layers, so that the next create or delete can clear away what an interrupted one left; of
//! them, a layer that something else names stays. `docs/format.md` argues it step by step.

use crate::base::root::records::Pooled;
use crate::base::root::{create_dir_durable, files, replace_file};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::CREATING;
use crate::catalog::device::image_of;
use crate::catalog::layer_file::make_layer;
use crate::catalog::lock::{Holder, Purpose, VolumeLock};
use crate::catalog::metadata::{Geometry, Metadata, VolumeName};
use crate::catalog::store_locks::{NamesLock, RecordsLock};
use crate::catalog::tags::{self, Tags};
use crate::catalog::{self, Catalog, VolumeId};
use crate::events::{Event, EventLog};
use crate::kms::Failure;
use crate::ops::delete::{abandon, clear_remains, rename_durably};
use crate::ops::device::Candidate;
use crate::ops::keys::WrappingKey;
use std::path::PathBuf;
use std::sync::Arc;

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
    /// The block device that its top layer lies on, every byte of which is zero; without, that is a file.
    pub device: Option<Arc<Candidate>>,
}

/// Makes a volume, encrypted under a data key that the KMS makes and nobody sees; without a `key`,
/// unencrypted. Reports how it went as a `createVolume` event.
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

/// Makes a volume of what `prepare` returns, given its id.
pub(crate) fn create_with(
    catalog: &Catalog,
    events: &EventLog,
    wanted: &Wanted,
    prepare: impl FnOnce(VolumeId) -> Result<Metadata, Failure>,
) -> Result<Metadata> {
    create_filled(catalog, events, wanted, prepare, |_| Ok(()))
}

/// As [`create_with`], and `fill` gives the volume its data before the volume is there. What `fill` has
/// written is durable when it returns; it makes no other layers than the metadata names.
pub(crate) fn create_filled(
    catalog: &Catalog,
    events: &EventLog,
    wanted: &Wanted,
    prepare: impl FnOnce(VolumeId) -> Result<Metadata, Failure>,
    fill: impl FnOnce(&Metadata) -> Result<()>,
) -> Result<Metadata> {
    check_name_is_free(catalog, wanted.name.as_ref(), None)?;
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
        let cleared = RecordsLock::acquire(catalog).and_then(|records| abandon(catalog, &metadata, &records));
        if let Err(left) = cleared {
            log::warn!("{left}; the next \"sealblk volume create\" or \"delete\" tries again");
        }
        return Err(e);
    }
    Ok(metadata)
}

/// Takes a volume in that lies on a device and was proved: its record comes into the store, and then the
/// device is the store's. Reports a `createVolume` event.
///
/// # Errors
/// `Busy` if the name is taken; those of the file system: then nothing of the volume is left, and the device
/// is as it was. Those of the device: then the volume is there, and the error says how to go on.
pub(crate) fn adopt(
    catalog: &Catalog,
    events: &EventLog,
    metadata: Metadata,
    device: &Candidate,
) -> Result<Metadata> {
    check_name_is_free(catalog, metadata.name(), None)?;
    create_dir_durable(&catalog.root().layers())?;
    let metadata = metadata.next_generation()?;
    let _lock = begin(catalog, &metadata)?;
    // The device still has the token of another store, so whatever clears this away leaves its header alone.
    let noted = catalog.note_device_of(metadata.top().id, device.name().path());
    if let Err(e) = noted.and_then(|()| commit(catalog, &metadata)) {
        let cleared = catalog
            .forget_device_of(metadata.top().id)
            .and_then(|()| RecordsLock::acquire(catalog))
            .and_then(|records| abandon(catalog, &metadata, &records));
        if let Err(left) = cleared {
            log::warn!("{left}; the next \"sealblk volume create\" or \"delete\" tries again");
        }
        return Err(e);
    }
    events.record(&Event::create_volume(metadata.id(), Ok(())));
    catalog.take_device(&metadata, device.medium()).context(|| {
        format!("{} is in the store, and the device not yet; the same command again goes on", metadata.id())
    })?;
    Ok(metadata)
}

/// Makes the volume's folder, takes the volume, and writes down what is going to be made.
fn begin(catalog: &Catalog, metadata: &Metadata) -> Result<VolumeLock> {
    let records = RecordsLock::acquire(catalog)?;
    clear_remains(catalog, &records);
    if let Some(origin) = metadata.origin() {
        // From here on the new volume names its layers, and before, the snapshot did.
        catalog.load_snapshot(origin.snapshot)?;
    }
    let folder = catalog.folder(metadata.id());
    create_dir_durable(&folder)?;
    let holder = Holder::this_process(Purpose::Create, None)?;
    let begun = VolumeLock::acquire(&folder, metadata.id(), &holder).and_then(|lock| {
        catalog.enter(metadata)?;
        replace_file(&folder.join(CREATING), &metadata.to_json())?;
        Ok(lock)
    });
    if begun.is_err() {
        // Without a record it is harmless; the error that matters is the first one.
        let _ = files::remove_folder(&folder);
        let _ = catalog.forget_entry(&metadata.id());
    }
    begun
}

/// Makes everything that the volume needs before it is there, except for its data.
fn furnish(catalog: &Catalog, metadata: &Metadata, wanted: &Wanted) -> Result<()> {
    if !wanted.tags.is_empty() {
        tags::write(&catalog.folder(metadata.id()), &wanted.tags)?;
    }
    if let Some(device) = &wanted.device {
        return catalog.make_device_layer(metadata, device.name().path(), device.medium());
    }
    if let Some(pooled) = catalog.root().pool() {
        return make_image(catalog, pooled, metadata);
    }
    let folder = catalog.folder(metadata.id());
    make_layer(&catalog.layer_path(metadata.top().id), &folder, metadata.size(), wanted.preallocate)
}

/// Makes the image of the top layer of a volume, in the store's own pool. Something names the layer already.
pub(super) fn make_image(catalog: &Catalog, pooled: &Pooled, volume: &Metadata) -> Result<()> {
    let layer = volume.top();
    let address = PathBuf::from(pooled.image_address(&image_of(layer.id)));
    // First what leads to it, so that whoever clears up finds the image.
    catalog.note_device_of(layer.id, &address)?;
    let device = Candidate::open_or_make(&address, Some(layer.size))?;
    catalog.make_device_layer(volume, device.name().path(), device.medium())
}

/// The rename after which the volume is there.
fn commit(catalog: &Catalog, metadata: &Metadata) -> Result<()> {
    // Held over the look at the names and the rename: of two volumes of one name, one comes second.
    let _names = metadata.name().map(|_| NamesLock::acquire(catalog)).transpose()?;
    let _records = RecordsLock::acquire(catalog)?;
    check_name_is_free(catalog, metadata.name(), None)?;
    rename_durably(&catalog.folder(metadata.id()), CREATING, catalog::FILE)
}

/// # Errors
/// `Busy` if a volume has that name, other than `except`.
pub(super) fn check_name_is_free(
    catalog: &Catalog,
    name: Option<&VolumeName>,
    except: Option<VolumeId>,
) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    match catalog.claimant(name, except)? {
        None => Ok(()),
        Some(id) => {
            let message = format!("{id} has the name \"{name}\" already; choose another");
            Err(Error::new(Kind::Busy, message))
        }
    }
}
