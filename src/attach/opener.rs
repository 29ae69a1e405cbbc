//! Opening a volume's data: its metadata proved right, its layers with their keys. It is done at the attach, and again each
//! time that another process has had the volume meanwhile; and by commands that copy.

use super::Options;
use super::keyring::{Deks, Keyring};
use crate::crypt::xts::{DataUnit, Engine, SectorCipher, new_cipher};
use crate::crypt::{Dek, SealKey};
use crate::error::{Context, Error, Kind, Result};
use crate::store::Store;
use crate::store::file::FileStore;
use crate::virtio::{Geometry, SECTOR_SIZE, SharedGeometry};
use crate::volume::image_lock;
use crate::volume::io::{Cipher, Layers};
use crate::volume::layers::{self, Layer};
use crate::volume::layout::Layout;
use crate::volume::lock::VolumeLock;
use crate::volume::metadata::{LayerRecord, Metadata};
use crate::volume::{Catalog, VolumeId};
use std::sync::Arc;

/// What a volume is opened for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Opening {
    /// It is being attached.
    Attach,
    /// It comes (back) to a process that is confined already.
    Again,
    /// A command does something with it that nobody has attached.
    Command,
}

/// A volume whose metadata has proved right, and its data. Nothing of it has a thread yet.
pub struct Opened {
    pub(super) metadata: Metadata,
    pub(super) seal_key: Option<SealKey>,
    /// With their keys.
    pub(super) layers: Vec<Layer>,
}

/// How the volume is opened, each time that this process gets it: once, unless it is handed over. It keeps the data
/// keys.
pub struct Opener {
    pub(super) catalog: Catalog,
    pub(super) volume: VolumeId,
    pub(super) options: Options,
    pub(super) keys: Arc<Keyring>,
    pub(super) geometry: Arc<SharedGeometry>,
    /// How the volume is reached, as far as that was found out without having it.
    pub(super) how: String,
}

impl Opener {
    /// Opens the volume, which this process has; the data keys come from `keys`.
    pub(super) fn with_layers(
        catalog: &Catalog,
        lock: &VolumeLock,
        options: &Options,
        keys: impl FnOnce(&Metadata) -> Result<Deks>,
    ) -> Result<(Self, Option<Opened>)> {
        let (opened, deks) = open(catalog, lock, options.read_only, options.engine, Opening::Attach, keys)?;
        let opener = Opener::new(catalog, &opened.metadata, options, deks, String::new());
        Ok((opener, Some(opened)))
    }

    /// Finds out whether the volume could be opened, which another process has.
    pub(super) fn without(
        catalog: &Catalog,
        volume: VolumeId,
        options: &Options,
        keys: impl FnOnce(&Metadata) -> Result<Deks>,
    ) -> Result<(Self, Option<Opened>)> {
        let metadata = catalog.load(volume)?;
        catalog.check_layers(&metadata)?;
        let path = catalog.layer_path(metadata.top().id);
        let top = FileStore::open(&path, true, metadata.sector_size().bytes());
        let top = top.context(|| path.display().to_string())?;
        top.open_queue(1).map_err(cannot_serve)?;
        let deks = keys(&metadata)?;
        // A volume without a seal gets it from whoever has it first.
        let _ = metadata.verify(&deks)?;
        let engine = match ciphers(&deks, metadata.layout(), options.engine)?.first() {
            Some(cipher) => format!("XTS engine {}", cipher.engine()),
            None => "not encrypted".into(),
        };
        let how = format!("{}; {engine}", top.caps().access);
        Ok((Opener::new(catalog, &metadata, options, deks, how), None))
    }

    fn new(catalog: &Catalog, metadata: &Metadata, options: &Options, deks: Deks, how: String) -> Self {
        let geometry = Arc::new(SharedGeometry::new(shape(metadata, options.read_only)));
        let (catalog, volume, options) = (catalog.clone(), metadata.id(), options.clone());
        Opener { catalog, volume, options, keys: Keyring::new(deks), geometry, how }
    }

    /// Opens the volume anew, as it is now.
    ///
    /// # Errors
    /// Also if it has changed in a way that a guest, or a process that has these data keys, cannot follow.
    pub(super) fn open(&self, lock: &VolumeLock) -> Result<Opened> {
        let now = self.geometry.now();
        let keys = |metadata: &Metadata| {
            let shape = shape(metadata, self.options.read_only);
            if shape.block_size == now.block_size && shape.sectors >= now.sectors {
                return self.keys.of(metadata);
            }
            let message = "it has got a smaller size meanwhile; attach it anew";
            Err(Error::new(Kind::Busy, format!("{}: {message}", self.volume)))
        };
        let Options { read_only, engine, .. } = self.options;
        let (opened, _) = open(&self.catalog, lock, read_only, engine, Opening::Again, keys)?;
        self.keys.keep(&opened.metadata);
        Ok(opened)
    }

    pub(super) fn serial(&self) -> String {
        self.options.serial.clone().unwrap_or_else(|| default_serial(self.volume))
    }
}

pub(super) fn shape(metadata: &Metadata, read_only: bool) -> Geometry {
    let block_size = metadata.sector_size().bytes();
    Geometry { sectors: metadata.size() / SECTOR_SIZE, block_size, read_only }
}

/// Opens the volume's data, its metadata proved right; the data keys come from `keys`.
pub(super) fn open(
    catalog: &Catalog,
    lock: &VolumeLock,
    read_only: bool,
    engine: Engine,
    opening: Opening,
    keys: impl FnOnce(&Metadata) -> Result<Deks>,
) -> Result<(Opened, Deks)> {
    let mut metadata = catalog.load(lock.volume())?;
    match opening {
        Opening::Again => catalog.recover_confined(lock, &metadata)?,
        Opening::Attach | Opening::Command => catalog.recover(lock, &metadata)?,
    }
    catalog.check_layers(&metadata)?;
    let mut layers = open_layers(catalog, &metadata, read_only)?;
    let Layers { store, .. } = layers::chain(&layers);
    // Before anybody is asked for a key; the queues' threads would find it out when a guest waits for them already.
    store.open_queue(1).map_err(cannot_serve)?;
    let deks = keys(&metadata)?;
    seal(catalog, lock, &mut metadata, &deks, &*layers[0].store, opening)?;
    for (layer, cipher) in layers.iter_mut().zip(layer_ciphers(&deks, metadata.layout(), engine)?) {
        layer.cipher = cipher;
    }
    let seal_key = metadata.seal_key(&deks)?;
    Ok((Opened { metadata, seal_key, layers }, deks))
}

/// How each of the layers is encrypted; `deks` are in the order of the keys.
pub(super) fn layer_ciphers(deks: &[Arc<Dek>], layout: &Layout, engine: Engine) -> Result<Vec<Cipher>> {
    let ciphers = ciphers(deks, layout, engine)?;
    let of = |layer: &LayerRecord| match layer.key {
        Some(key) => Ok(Some(ciphers[key].clone())),
        None if layer.masked => {
            let mask = Dek::mask_of_layer(layer.id.as_bytes())?;
            Ok(Some(Arc::from(new_cipher(engine, &mask, data_unit(layout))?)))
        }
        None => Ok(None),
    };
    layout.layers().iter().map(of).collect()
}

/// The ciphers, in the order of the data keys. Layers under the same key share its round keys.
fn ciphers(deks: &[Arc<Dek>], layout: &Layout, engine: Engine) -> Result<Vec<Arc<dyn SectorCipher>>> {
    let unit = data_unit(layout);
    deks.iter().map(|dek| Ok(Arc::from(new_cipher(engine, dek, unit)?))).collect()
}

fn data_unit(layout: &Layout) -> DataUnit {
    let unit = DataUnit::from_bytes(layout.geometry().sector_size().bytes() as usize);
    unit.unwrap_or_else(|| unreachable!("sector sizes are data units"))
}

/// Opens the layers of a volume, the top first. Only that is ever written.
fn open_layers(catalog: &Catalog, metadata: &Metadata, read_only: bool) -> Result<Vec<Layer>> {
    let open = |(number, layer): (usize, &LayerRecord)| {
        let frozen = read_only || number > 0;
        let access = if frozen { image_lock::Access::Read } else { image_lock::Access::ReadWrite };
        // Made by a process that has not detached since: that name a confined process may open.
        let own = catalog.own_layer_path(metadata.id(), layer.id);
        let path = if own.exists() { own } else { catalog.layer_path(layer.id) };
        Layer::open(&path, access, metadata.sector_size().bytes(), None)
    };
    metadata.layers().iter().enumerate().map(open).collect()
}

/// Checks the metadata's seal, or sets it if nobody had the keys before, and notes the first attach.
fn seal(
    catalog: &Catalog,
    lock: &VolumeLock,
    metadata: &mut Metadata,
    deks: &[Arc<Dek>],
    store: &dyn Store,
    opening: Opening,
) -> Result<()> {
    let was_sealed = metadata.is_sealed();
    metadata.prove(deks, store)?;
    let is_first = opening != Opening::Command && metadata.mark_attached();
    if is_first || metadata.is_sealed() != was_sealed {
        catalog.store(lock, metadata)?;
    }
    Ok(())
}

pub(super) fn cannot_serve(e: std::io::Error) -> Error {
    let hint = "look at the sysctl kernel.io_uring_disabled and, in a container, at its seccomp profile";
    Error::new(Kind::Unsupported, format!("{e}; {hint}"))
}

/// EBS shows `vol0123456789abcdef0`: exactly the 20 bytes that there are.
fn default_serial(volume: VolumeId) -> String {
    volume.to_string().replace('-', "")
}
