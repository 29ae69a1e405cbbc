//! Opening a volume that this process has: its record is loaded and recovered, its layers are looked at and
//! opened, its data keys are got and prove the record right. Nothing else in the program opens a volume.

use super::kept::Kept;
use super::layers::{self, Layer, PassedLocks};
use crate::backing::{Backing, check_queue};
use crate::base::{Error, Kind, Result};
use crate::catalog::lock::{Holder, Purpose, VolumeLock};
use crate::catalog::metadata::{Geometry, KeyOwner, KeyRecord, Metadata};
use crate::catalog::slots::Unwrapped;
use crate::catalog::{Catalog, VolumeId};
use crate::crypt::SealKey;
use crate::crypt::xts::Engine;
use crate::disk::Layers;
use crate::image::lock::Access;
use crate::kms::{Failure, KmsKey};
use crate::virtio::{SECTOR_SIZE, Shape};
use std::io;

/// A volume's data keys, in the order of its keys.
pub type Deks = Vec<Unwrapped>;

/// How a data key is unwrapped for the moment; the error's cause is the KMS's own words.
pub type Unwrap<'a> = &'a dyn Fn(KeyOwner, &KeyRecord) -> Result<Unwrapped, Failure>;

/// What a volume is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The volume is being attached.
    Attach,
    /// The volume comes (back) to a process that is confined already.
    Again,
    /// A command changes something of the volume; nobody has it attached.
    Change,
    /// A command reads what the volume holds; nobody has it attached.
    Read,
}

impl Opening {
    /// Whether its queues will be served: what that takes is tried before a KMS is asked for a key.
    fn serves(self) -> bool {
        matches!(self, Opening::Attach | Opening::Again)
    }
}

/// A volume whose record has proved right, with its layers. Nothing of it has a thread yet.
pub struct Opened {
    /// What is known of the volume.
    pub metadata: Metadata,
    /// What seals its record; `None` for an unencrypted volume.
    pub seal_key: Option<SealKey>,
    /// Its layers with their ciphers, the top first. There is at least one.
    pub layers: Vec<Layer>,
    /// The KMS keys that have given its data keys, in the order of its keys.
    pub unwrapped_by: Vec<KmsKey>,
}

/// Opens the volume that `lock` is on; `top` is what is going to be done with its top layer, and those
/// below it are only read. Its data keys come from `keys`; what is kept of them is returned, in their
/// order, and they are wiped.
///
/// # Errors
/// `Corrupt` for a record or layers that are not what whoever has the data keys made of them; `Busy` if
/// somebody else has a layer open; `Unsupported` where this machine cannot serve it; what `keys` says;
/// those of the file system.
pub fn open<E: From<Error>>(
    catalog: &Catalog,
    lock: &VolumeLock,
    opening: Opening,
    top: Access,
    engine: Engine,
    keys: impl FnOnce(&Metadata) -> Result<Deks, E>,
) -> Result<(Opened, Vec<Kept>), E> {
    open_proved(catalog, lock, opening, top, engine, &PassedLocks::default(), |metadata, top| {
        let deks = keys(metadata)?;
        prove(catalog, lock, metadata, &deks, top, opening)?;
        Ok(Kept::of_all(&deks, metadata, engine)?)
    })
}

/// Opens a volume that comes (back) to a process which has proved it before and is confined already, with the
/// locks that were `passed` by the process that served it until now, if any were. `prove` gets its record and
/// top layer, and returns what was kept of its data keys, in their order.
///
/// # Errors
/// As [`open`]; what `prove` says.
pub fn open_again(
    catalog: &Catalog,
    lock: &VolumeLock,
    top: Access,
    engine: Engine,
    passed: &PassedLocks,
    prove: impl FnOnce(&mut Metadata, &Layer) -> Result<Vec<Kept>>,
) -> Result<Opened> {
    open_proved(catalog, lock, Opening::Again, top, engine, passed, prove).map(|(opened, _)| opened)
}

fn open_proved<E: From<Error>>(
    catalog: &Catalog,
    lock: &VolumeLock,
    opening: Opening,
    top: Access,
    engine: Engine,
    passed: &PassedLocks,
    prove: impl FnOnce(&mut Metadata, &Layer) -> Result<Vec<Kept>, E>,
) -> Result<(Opened, Vec<Kept>), E> {
    let mut metadata = catalog.load(lock.volume())?;
    match opening {
        Opening::Again => catalog.recover_confined(lock, &metadata)?,
        _ => catalog.recover(lock, &metadata)?,
    }
    catalog.check_layers(&metadata)?;
    let mut layers = layers::open_without_ciphers(catalog, metadata.id(), metadata.layout(), top, passed)?;
    if opening.serves() {
        // Before anybody is asked for a key; the queues' threads would find it out when a
        // guest waits for them already.
        let Layers { backing, .. } = layers::chain(&layers);
        check_queue(&*backing).map_err(cannot_serve)?;
    }
    let kept = prove(&mut metadata, &layers[0])?;
    if matches!(opening, Opening::Attach | Opening::Change) {
        // What its host process has done since the last command holds from now on.
        catalog.settle(&metadata);
    }
    if matches!(opening, Opening::Attach | Opening::Change) && top == Access::ReadWrite {
        // Whoever wrote the record last may have been cut off in between.
        catalog.copy_to_devices(&metadata);
    }
    let of_keys: Vec<_> = kept.iter().map(|key| key.cipher().clone()).collect();
    let ciphers = layers::ciphers_of_layers(&of_keys, metadata.layout(), engine)?;
    for (layer, cipher) in layers.iter_mut().zip(ciphers) {
        layer.cipher = cipher;
    }
    let seal_key = metadata.top().key.map(|top| kept[top].seal_key().clone());
    let unwrapped_by = kept.iter().map(|key| key.by().clone()).collect();
    Ok((Opened { metadata, seal_key, layers, unwrapped_by }, kept))
}

/// Checks the record's seal, or sets it if nobody had the keys before, and notes the first attach.
fn prove(
    catalog: &Catalog,
    lock: &VolumeLock,
    metadata: &mut Metadata,
    deks: &[Unwrapped],
    top: &Layer,
    opening: Opening,
) -> Result<()> {
    let was_sealed = metadata.is_sealed();
    metadata.prove(deks, || top.backing.has_data())?;
    if opening == Opening::Read {
        return Ok(());
    }
    let is_first = opening.serves() && metadata.mark_attached();
    if is_first || metadata.is_sealed() != was_sealed {
        catalog.save(lock, metadata)?;
    }
    Ok(())
}

/// A volume that a command has for a moment, and that nobody has attached.
pub struct Taken {
    /// The volume's lock.
    pub lock: VolumeLock,
    /// The volume.
    pub opened: Opened,
}

impl Taken {
    /// Takes a volume for `purpose`, opened as an attach would open it.
    ///
    /// # Errors
    /// `Busy`, naming the process that has it; otherwise as [`open`].
    pub fn take(
        catalog: &Catalog,
        id: VolumeId,
        purpose: Purpose,
        unwrap: Unwrap<'_>,
    ) -> Result<Self, Failure> {
        let holder = Holder::this_process(purpose, None)?;
        let lock = VolumeLock::acquire(&catalog.folder(id), id, &holder)?;
        Self::open(catalog, lock, Opening::Change, Access::ReadWrite, unwrap)
    }

    /// Opens a volume that was taken already.
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(
        catalog: &Catalog,
        lock: VolumeLock,
        opening: Opening,
        top: Access,
        unwrap: Unwrap<'_>,
    ) -> Result<Self, Failure> {
        let owner = KeyOwner::Volume(lock.volume());
        let unwrap = |key: &KeyRecord| unwrap(owner, key);
        let keys =
            |metadata: &Metadata| metadata.keys().iter().map(unwrap).collect::<Result<Deks, Failure>>();
        let (opened, _) = open(catalog, &lock, opening, top, Engine::Auto, keys)?;
        Ok(Taken { lock, opened })
    }
}

/// The shape of a disk of this size and sector size.
pub fn shape(geometry: Geometry, read_only: bool) -> Shape {
    let block_size = geometry.sector_size().bytes();
    Shape { sectors: geometry.size() / SECTOR_SIZE, block_size, read_only }
}

/// The error of a machine that has not what a queue needs; the error says what that is.
pub fn cannot_serve(e: io::Error) -> Error {
    Error::of(Kind::Unsupported, e)
}
