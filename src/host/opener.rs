//! Opening a volume's data: its metadata proved right, its layers with their keys. It is done at the attach,
//! and again each time that another process has had the volume meanwhile; and by commands that copy.

use super::Options;
use super::keyring::Keyring;
use crate::backing::file::{Earlier, FileBacking};
use crate::backing::nbd::{Address, Export, Right};
use crate::backing::{Backing, check_queue};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::VolumeLock;
use crate::catalog::metadata::Metadata;
use crate::catalog::{Catalog, VolumeId};
use crate::image::lock::Access;
use crate::virtio::SharedShape;
use crate::volume::kept::Kept;
use crate::volume::layers::{Layer, PassedLocks};
use crate::volume::open::{Deks, Opened, Opening, cannot_serve, open, open_again, shape};
use std::sync::Arc;

/// How the volume is opened, each time that this process gets it: once, unless it is handed over. For that it
/// keeps what is made of the data keys.
pub struct Opener {
    pub(super) catalog: Catalog,
    pub(super) volume: VolumeId,
    pub(super) options: Options,
    pub(super) keys: Arc<Keyring>,
    pub(super) shape: Arc<SharedShape>,
    /// The volume as it was proved, if nobody had sealed it then.
    unsealed: Option<Metadata>,
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
        let (opened, kept) =
            open(catalog, lock, Opening::Attach, access(options.read_only), options.engine, keys)?;
        let opener = Opener::new(catalog, &opened.metadata, options, kept, String::new());
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
        catalog.check_layers(&metadata)?;
        let place = catalog.place(metadata.top())?;
        let block_size = metadata.sector_size().bytes();
        let top = FileBacking::open_after(&place, true, block_size, None, Earlier::Done);
        let top = top.context(|| place.path.display().to_string())?;
        check_queue(&top).map_err(cannot_serve)?;
        let deks = keys(&metadata)?;
        // A volume without a seal gets it from whoever has it first.
        let _ = metadata.verify(&deks)?;
        let kept = Kept::of_all(&deks, &metadata, options.engine)?;
        drop(deks);
        let engine = match kept.first() {
            Some(key) => format!("XTS engine {}", key.cipher().engine()),
            None => "not encrypted".into(),
        };
        let how = format!("{}; {engine}", top.caps().access);
        Ok((Opener::new(catalog, &metadata, options, kept, how), None))
    }

    fn new(catalog: &Catalog, metadata: &Metadata, options: &Options, kept: Vec<Kept>, how: String) -> Self {
        let shape = Arc::new(SharedShape::new(shape(metadata.geometry(), options.read_only)));
        let (catalog, volume, options) = (catalog.without_ledger(), metadata.id(), options.clone());
        let unsealed = (metadata.is_encrypted() && !metadata.is_sealed()).then(|| metadata.clone());
        Opener { catalog, volume, options, keys: Keyring::new(kept), shape, unsealed, how }
    }

    /// Opens the volume anew, as it is now, with the locks that another process has `passed`, if one has.
    ///
    /// # Errors
    /// Also if it has changed in a way that a guest, or a process that has these data keys, cannot follow.
    pub(super) fn open(&self, lock: &VolumeLock, passed: &PassedLocks) -> Result<Opened> {
        let now = self.shape.now();
        let Options { read_only, engine, .. } = self.options;
        let _image = self.open_image()?;
        let opened = open_again(&self.catalog, lock, access(read_only), engine, passed, |metadata, top| {
            let shape = shape(metadata.geometry(), read_only);
            if shape.block_size != now.block_size || shape.sectors < now.sectors {
                return Err(self.changed("it has got a smaller size meanwhile"));
            }
            let kept = self.keys.of(metadata)?;
            let is_sealed_now = self.prove(metadata, &kept, top)?;
            let is_first = metadata.mark_attached();
            if is_sealed_now || is_first {
                self.catalog.save(lock, metadata)?;
            }
            Ok(kept)
        })?;
        self.keys.keep(&opened.metadata);
        Ok(opened)
    }

    /// The RBD image that is going to be written, if the top lies in one. Whatever only looks at it finds it
    /// open: this process has it opened for writing, and in no other way.
    fn open_image(&self) -> Result<Option<Arc<Export>>> {
        let exports = self.catalog.exports(&self.catalog.load(self.volume)?, self.options.read_only)?;
        let image =
            exports.iter().find(|(address, right)| address.image().is_some() && *right == Right::Write);
        let open = |(address, right): &(Address, Right)| {
            Export::at(address, *right).context(|| format!("open {address}"))
        };
        image.map(open).transpose()
    }

    /// Proves the volume's record by what was kept of its data keys. Returns whether it was sealed by
    /// this, for the first time.
    fn prove(&self, metadata: &mut Metadata, kept: &[Kept], top: &Layer) -> Result<bool> {
        let seal_key = metadata.top().key.map(|top| kept[top].seal_key());
        let Some(seal_key) = seal_key.filter(|_| !metadata.is_sealed()) else {
            metadata.verify_again(seal_key)?;
            return Ok(false);
        };
        // What its layers are was proved by data keys that are not there any more.
        if self.unsealed.as_ref() != Some(&*metadata) {
            return Err(self.changed("it has no seal, and has changed meanwhile"));
        }
        let checks: Vec<_> = kept.iter().map(Kept::check).collect();
        metadata.seal_later(&checks, seal_key, || top.backing.has_data())?;
        Ok(true)
    }

    fn changed(&self, how: &str) -> Error {
        Error::new(Kind::Busy, format!("{}: {how}; attach it anew", self.volume))
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
