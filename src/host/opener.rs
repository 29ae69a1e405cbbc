//! Opening a volume's data: its metadata proved right, its layers with their keys. It is done at the attach, and again each
//! time that another process has had the volume meanwhile; and by commands that copy.

use super::Options;
use super::keyring::Keyring;
use crate::backing::Store;
use crate::backing::file::FileStore;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::VolumeLock;
use crate::catalog::metadata::Metadata;
use crate::catalog::{Catalog, VolumeId};
use crate::image::lock::Access;
use crate::virtio::SharedGeometry;
use crate::volume::layers;
use crate::volume::open::{Deks, Opened, Opening, cannot_serve, open, shape};
use std::sync::Arc;

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
        let (opened, deks) =
            open(catalog, lock, Opening::Attach, access(options.read_only), options.engine, keys)?;
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
        catalog.check_top_is_own(&metadata)?;
        catalog.check_top_is_own(&metadata)?;
        catalog.check_layers(&metadata)?;
        let path = catalog.layer_path(metadata.top().id);
        let top = FileStore::open(&path, true, metadata.sector_size().bytes(), None);
        let top = top.context(|| path.display().to_string())?;
        top.open_queue(1).map_err(cannot_serve)?;
        let deks = keys(&metadata)?;
        // A volume without a seal gets it from whoever has it first.
        let _ = metadata.verify(&deks)?;
        let engine = match &layers::ciphers(&deks, metadata.layout(), options.engine)?[0] {
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
        let (opened, _) = open(&self.catalog, lock, Opening::Again, access(read_only), engine, keys)?;
        self.keys.keep(&opened.metadata);
        Ok(opened)
    }

    pub(super) fn serial(&self) -> String {
        self.options.serial.clone().unwrap_or_else(|| default_serial(self.volume))
    }
}

/// What is going to be done with the top layer.
fn access(read_only: bool) -> Access {
    if read_only { Access::Read } else { Access::ReadWrite }
}

/// EBS shows `vol0123456789abcdef0`: exactly the 20 bytes that there are.
fn default_serial(volume: VolumeId) -> String {
    volume.to_string().replace('-', "")
}
