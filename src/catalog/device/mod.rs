//! Layers on block devices and behind NBD servers: where each one lies, and whether what lies there is that
//! layer.
//!
//! In `layers/`, such a layer has a `<uuid>.device` in place of a `<uuid>.img`. That file names the device,
//! and is a claim, like everything that lies with the ciphertext. What proves it is the device's own
//! [header], which names the layer, and has the token that the file has: whoever can write the store alone
//! can make no other device pass for the layer. The export of an NBD server is a device as well; it has no
//! file that could be locked, so who uses it locks the `<uuid>.device`.

pub(crate) mod header;

use crate::backing::device::{self, DATA_START};
use crate::backing::file::Place;
use crate::backing::medium::Medium;
use crate::backing::nbd::{self, Address, Export, Image, Right};
use crate::base::root::records::Pooled;
use crate::base::root::{files, replace_file};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::coming::coming_of_name;
use crate::catalog::metadata::{LayerRecord, Metadata, written};
use crate::catalog::{Catalog, LayerId, read_bounded};
use header::{Found, Header, Token};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Of a file that names a block device.
const FORMAT: u32 = 1;
/// Of one that names an NBD export.
const NBD_FORMAT: u32 = 2;
/// Of one that names an RBD image.
const RBD_FORMAT: u32 = 3;
/// Of one that names an image in the pool that the store itself lies in.
const POOL_FORMAT: u32 = 4;
const ENDING: &str = ".device";

/// A device that holds a layer of the store, as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnDevice {
    /// The name by which the device is known: a path, or an export's address.
    pub name: PathBuf,
    /// The export or image, if that is what it is.
    pub address: Option<Address>,
    token: Token,
    layer: LayerId,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    device: PathBuf,
    token: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NbdWritten {
    format: u32,
    nbd: Address,
    token: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RbdWritten {
    format: u32,
    rbd: Address,
    token: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PoolWritten {
    format: u32,
    image: String,
    token: String,
}

/// The name of the image of a layer of a store in a pool.
pub(crate) fn image_of(layer: LayerId) -> String {
    format!("sealblk-{layer}")
}

/// The name of the image in the store's own pool that this is the address of.
fn image_in_pool(pooled: &Pooled, address: &Address) -> Option<String> {
    let name = address.image()?.name();
    (pooled.image_address(name).parse::<Address>().ok().as_ref() == Some(address)).then(|| name.to_owned())
}

impl OnDevice {
    /// The path of a block device, without links.
    ///
    /// # Errors
    /// `Corrupt` if it is not there, or is no block device.
    fn path(&self) -> Result<PathBuf> {
        let name = self.name.display();
        let path = self.name.canonicalize().map_err(|e| match e.kind() {
            ErrorKind::NotFound => {
                let message = format!(
                    "the device {name}, on which layer {} lies, is not there; connect it, or start what \
                     provides it",
                    self.layer
                );
                Error::new(Kind::Corrupt, message)
            }
            _ => Error::from(e).context(format!("look at {name}")),
        })?;
        match path.symlink_metadata()?.file_type().is_block_device() {
            true => Ok(path),
            false => Err(Error::new(Kind::Corrupt, format!("{name} is no block device any more"))),
        }
    }

    /// Opens the device, past the page cache: what another host has written may be there.
    fn open(&self, flags: OFlag) -> Result<Opened> {
        if let Some(address) = &self.address {
            let right = if flags.contains(OFlag::O_RDWR) { Right::Write } else { Right::Read };
            return Ok(Opened::Export(Export::at(address, right)?));
        }
        let path = self.path()?;
        let file = files::open_layer(&path, flags | OFlag::O_DIRECT);
        file.map(Opened::Device).context(|| format!("open {}", path.display()))
    }

    /// What the device's header says, if it is that of this layer in this store.
    ///
    /// # Errors
    /// `Corrupt` for a device with another header, or with none; those of the device.
    fn found(&self, device: &dyn Medium) -> Result<Found> {
        let name = self.name.display();
        let problem = match Found::read(device).context(|| format!("look at {name}"))? {
            None => format!(
                "{name} has no header of sealblk's: it is another device by now, or was overwritten; give \
                 the right device that name, or restore it from a backup"
            ),
            Some(Found { header, .. }) if header.layer != self.layer => format!(
                "{name} holds layer {}{}, and not {}: it is another device by now; give the right device \
                 that name",
                header.layer,
                header.volume_id().map_or(String::new(), |id| format!(" of {id}")),
                self.layer
            ),
            Some(Found { header, .. }) if header.token != self.token => format!(
                "{name} was taken over by another store (\"sealblk volume adopt\"), or its header was put \
                 back from before this store took it over; only one store may have it"
            ),
            Some(found) => return Ok(found),
        };
        Err(Error::new(Kind::Corrupt, problem))
    }
}

/// A device that was opened.
enum Opened {
    Device(File),
    Export(Arc<Export>),
}

impl Opened {
    fn medium(&self) -> &dyn Medium {
        match self {
            Opened::Device(file) => file,
            Opened::Export(export) => &**export,
        }
    }

    /// Whether both are the same.
    fn is(&self, other: &Opened) -> Result<bool> {
        match (self, other) {
            (Opened::Device(one), Opened::Device(other)) => {
                Ok(files::is_same(&one.metadata()?, &other.metadata()?))
            }
            (Opened::Export(one), Opened::Export(other)) => Ok(one.address() == other.address()),
            _ => Ok(false),
        }
    }
}

impl Catalog {
    /// What says on which device a layer lies, if it lies on one.
    pub fn device_file(&self, layer: LayerId) -> PathBuf {
        self.root().layers().join(format!("{layer}{ENDING}"))
    }

    /// The device that a layer lies on; none if it is a file of the store.
    ///
    /// # Errors
    /// `Corrupt` for a `<uuid>.device` that sealblk has not written.
    pub fn on_device(&self, layer: LayerId) -> Result<Option<OnDevice>> {
        let path = self.device_file(layer);
        if !files::exists(&path) {
            return Ok(None);
        }
        let attempt = || format!("read {}", path.display());
        let bytes = match read_bounded(&path) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            bytes => bytes.context(attempt)?,
        };
        let behind = |address: Address, token: &str, is_right: fn(&Address) -> bool| {
            if !is_right(&address) {
                return Err(Error::new(Kind::Corrupt, format!("{address} is not what its version has")));
            }
            let name = address.to_string().into();
            Ok(OnDevice { name, address: Some(address), token: Token::parse(token)?, layer })
        };
        let read = || match written::version(&bytes)? {
            1 => {
                let Written { device, token, .. } = written::read(&bytes)?;
                Ok(OnDevice { name: device, address: None, token: Token::parse(&token)?, layer })
            }
            2 => {
                let NbdWritten { nbd, token, .. } = written::read(&bytes)?;
                behind(nbd, &token, |address| address.server().is_some())
            }
            3 => {
                let RbdWritten { rbd, token, .. } = written::read(&bytes)?;
                behind(rbd, &token, |address| address.image().is_some())
            }
            4 => {
                let PoolWritten { image, token, .. } = written::read(&bytes)?;
                let pooled = self.root().pool().ok_or_else(|| {
                    Error::new(
                        Kind::Corrupt,
                        "it names an image in the store's pool, and the store is in none",
                    )
                })?;
                // How the pool is reached is this host's affair, and no record's.
                let address: Address = pooled.image_address(&image).parse()?;
                match image_in_pool(pooled, &address).is_some_and(|name| name == image) {
                    true => {
                        let name = format!("rbd:{}", address.image().map(Image::shown).unwrap_or_default());
                        let on = behind(address, &token, |address| address.image().is_some())?;
                        Ok(OnDevice { name: name.into(), ..on })
                    }
                    false => Err(Error::new(Kind::Corrupt, format!("{image:?} is no image's name"))),
                }
            }
            other => Err(written::unknown_version(other, "versions 1 to 4")),
        };
        let is_elsewhere = |on: &OnDevice| {
            let Some(pooled) = self.root().pool() else { return false };
            on.address.as_ref().and_then(|address| image_in_pool(pooled, address)).is_none()
        };
        if let Some(pooled) = self.root().pool()
            && let Ok(on) = read()
            && is_elsewhere(&on)
        {
            let message = format!("{} does not lie in {}", on.name.display(), pooled.shown);
            return Err(Error::new(Kind::Corrupt, message).context(attempt()));
        }
        read().context(attempt).map(Some)
    }

    /// Where a layer's bytes lie.
    ///
    /// # Errors
    /// As [`Catalog::on_device`]; `Corrupt` if the device is not there; `Busy` for a layer that is still
    /// [coming](super::coming).
    pub fn place(&self, layer: &LayerRecord) -> Result<Place> {
        match self.on_device(layer.id)? {
            None if self.is_coming(layer.id) => Err(self.has_not_come(layer.id)),
            None => Ok(Place::whole(self.layer_path(layer.id))),
            Some(OnDevice { address: Some(address), .. }) => {
                if self.root().pool().is_some() {
                    files::stand_in(&self.device_file(layer.id))?;
                }
                Ok(Place::behind(address, self.device_file(layer.id), layer.size))
            }
            Some(on) => Ok(Place { on_device: Some(layer.size), ..Place::whole(on.path()?) }),
        }
    }

    /// The NBD exports and RBD images that layers of a volume lie on, and what an attach wants of each.
    ///
    /// # Errors
    /// As [`Catalog::on_device`].
    pub fn exports(&self, volume: &Metadata, read_only: bool) -> Result<Vec<(Address, Right)>> {
        let mut exports = Vec::new();
        for (n, layer) in volume.layers().iter().enumerate() {
            let right = if n == 0 && !read_only { Right::Write } else { Right::Read };
            exports.extend(self.on_device(layer.id)?.and_then(|on| on.address).map(|it| (it, right)));
        }
        Ok(exports)
    }

    /// The name by which people know where a layer lies.
    pub fn shown_place(&self, layer: LayerId) -> PathBuf {
        match self.on_device(layer) {
            Ok(Some(on)) => on.name,
            Ok(None) | Err(_) => self.file_of(layer),
        }
    }

    /// Looks whether what was opened where the layer lies is the layer's device. A file of the store is taken
    /// as it is. Of an `export`, this is looked at again whenever the server comes back.
    ///
    /// # Errors
    /// `Corrupt` for another device.
    pub fn check_is_layers(
        &self,
        layer: LayerId,
        opened: &dyn Medium,
        export: Option<&Export>,
    ) -> Result<()> {
        let Some(on) = self.on_device(layer)? else { return Ok(()) };
        on.found(opened)?;
        if let Some(export) = export {
            export.recognise_by(move |medium| on.found(medium).map(drop).map_err(std::io::Error::other));
        }
        Ok(())
    }

    /// Why a layer on a device cannot be used; none if it can, or is a file.
    pub(super) fn check_device(&self, layer: &LayerRecord) -> Result<()> {
        let Some(on) = self.on_device(layer.id)? else { return Ok(()) };
        let device = on.open(OFlag::O_RDONLY)?;
        on.found(device.medium())?;
        let len = device.medium().length()?;
        if len.saturating_sub(DATA_START) < layer.size {
            let message = format!(
                "{} has {len} bytes, and layer {} needs {}: it has shrunk; make it as long as it was",
                on.name.display(),
                layer.id,
                layer.size.saturating_add(DATA_START)
            );
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(())
    }

    /// Makes the top layer of a volume that is being made on a device, of which the data are zeros. The
    /// record that names the layer is there. `name` is how the device is known.
    ///
    /// # Errors
    /// Those of the device and of the file system.
    pub(crate) fn make_device_layer(
        &self,
        volume: &Metadata,
        name: &Path,
        device: &dyn Medium,
    ) -> Result<()> {
        // Nobody can be kept from an export meanwhile, as from a block device.
        if Found::read(device)?.is_some() {
            let message = format!("{} has become a layer of another volume just now", name.display());
            return Err(Error::new(Kind::Busy, message));
        }
        let token = Token::random();
        let header = Header::of_top(volume, token)?;
        // First what leads to the device, so that whoever clears up finds the header.
        self.note_device(volume.top().id, name, token)?;
        header.write(device, None).context(|| format!("write the header of {}", name.display()))
    }

    /// Notes that a layer lies on a device, which does not know of that yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn note_device_of(&self, layer: LayerId, name: &Path) -> Result<()> {
        self.note_device(layer, name, Token::random())
    }

    /// Takes the note away again.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn forget_device_of(&self, layer: LayerId) -> Result<()> {
        let path = self.device_file(layer);
        files::remove_if_there(&path).context(|| format!("remove {}", path.display()))
    }

    /// Whether a layer lies on a device.
    ///
    /// # Errors
    /// As [`Catalog::on_device`].
    pub(crate) fn is_on_a_device(&self, layer: LayerId) -> Result<bool> {
        Ok(self.on_device(layer)?.is_some())
    }

    /// Makes `device`, which holds the top layer of `volume`, this store's: from now on no
    /// other store takes it.
    ///
    /// # Errors
    /// `Corrupt` for a device that holds another layer; those of the device.
    pub(crate) fn take_device(&self, volume: &Metadata, device: &dyn Medium) -> Result<()> {
        let layer = volume.top().id;
        let on = self.on_device(layer)?.ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("{} is missing", self.device_file(layer).display()))
        })?;
        let found = Found::read(device)?.filter(|found| found.header.layer == layer);
        let found =
            found.ok_or_else(|| Error::new(Kind::Corrupt, "the device holds another layer by now"))?;
        Header::of_top(volume, on.token)?.write(device, Some(&found))
    }

    fn note_device(&self, layer: LayerId, name: &Path, token: Token) -> Result<()> {
        let token = token.to_string();
        let address = name.to_str().filter(|name| Address::is_meant(name)).map(str::parse).transpose()?;
        if let Some(pooled) = self.root().pool() {
            let image = address.as_ref().and_then(|address| image_in_pool(pooled, address));
            let image = image.ok_or_else(|| {
                let message = format!("{} does not lie in {}", name.display(), pooled.shown);
                Error::new(Kind::Unsupported, message)
            })?;
            let json = written::to_json(&PoolWritten { format: POOL_FORMAT, image, token });
            return replace_file(&self.device_file(layer), &json);
        }
        let json = match address {
            Some(nbd @ Address::Server(_)) => {
                written::to_json(&NbdWritten { format: NBD_FORMAT, nbd, token })
            }
            Some(rbd @ Address::Rbd(_)) => written::to_json(&RbdWritten { format: RBD_FORMAT, rbd, token }),
            None => written::to_json(&Written { format: FORMAT, device: name.to_owned(), token }),
        };
        replace_file(&self.device_file(layer), &json)
    }

    /// Copies the record of a volume to the header of the device that its top lies on, and notes on those of
    /// its other layers that they are frozen. Nothing in this store depends on that: what fails is made up
    /// for by the next who writes the record, or attaches the volume.
    pub fn copy_to_devices(&self, volume: &Metadata) {
        for (n, layer) in volume.layers().iter().enumerate() {
            if let Err(e) = self.copy_to_device(volume, layer.id, n == 0) {
                log::warn!("{}: the copy of its record on its device is behind: {e}", volume.id());
            }
        }
    }

    fn copy_to_device(&self, volume: &Metadata, layer: LayerId, is_top: bool) -> Result<()> {
        let Some(on) = self.on_device(layer)? else { return Ok(()) };
        let found = on.found(on.open(OFlag::O_RDONLY)?.medium())?;
        let next = match is_top {
            true => Header::of_top(volume, on.token)?,
            false => Header { frozen: true, ..found.header.clone() },
        };
        if next == found.header {
            return Ok(());
        }
        let device = on.open(OFlag::O_RDWR)?;
        next.write(device.medium(), Some(&found))
            .context(|| format!("write the header of {}", on.name.display()))
    }

    /// Removes a layer that nothing names: its file; or of one on a device, the device's header, and with it
    /// the copies of its wrapped keys. What else is on the device stays. Returns whether there was anything.
    ///
    /// # Errors
    /// Those of the device and of the file system.
    pub(crate) fn remove_layer(&self, layer: LayerId) -> Result<bool> {
        let on = match self.on_device(layer) {
            // It leads nowhere.
            Err(e) if e.kind() == Kind::Corrupt => Some(Err(e)),
            on => on?.map(Ok),
        };
        if let (Some(Ok(on)), Some(pooled)) = (&on, self.root().pool()) {
            return self.remove_image(pooled, on).map(|()| true);
        }
        if let Some(on) = on {
            match on.and_then(|on| on.erase_header()) {
                Ok(()) => {}
                Err(e) if e.kind() == Kind::Corrupt => {
                    log::warn!("{e}; the header of layer {layer} is not erased, wherever its device is");
                }
                Err(e) => return Err(e),
            }
            let path = self.device_file(layer);
            files::remove_if_there(&path).context(|| format!("remove {}", path.display()))?;
            return Ok(true);
        }
        let mut was_any = false;
        // What says what is to come goes last: without it, a layer that is still coming is of no use.
        for path in [self.layer_path(layer), self.coming_path(layer), self.wanted_path(layer)] {
            match files::remove(&path) {
                Ok(()) => was_any = true,
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(Error::from(e).context(format!("remove {}", path.display()))),
            }
        }
        Ok(was_any)
    }
}

impl Catalog {
    /// Makes the image of a layer long enough for `size` bytes, if it lies in the store's own pool.
    ///
    /// # Errors
    /// Those of the pool.
    pub(crate) fn make_image_longer(&self, layer: LayerId, size: u64) -> Result<()> {
        let Some(pooled) = self.root().pool() else { return Ok(()) };
        let on = self.on_device(layer)?;
        let name = on.and_then(|on| image_in_pool(pooled, on.address.as_ref()?));
        match name.zip(size.checked_add(DATA_START)) {
            None => Ok(()),
            Some((name, len)) => pooled
                .records
                .make_image_longer(&name, len)
                .context(|| format!("make the image {name} longer")),
        }
    }

    /// Looks whether nobody has the image open for writing in which a layer lies, if it lies in the store's
    /// own pool: by taking it.
    ///
    /// # Errors
    /// `Busy`, naming who has it.
    pub(crate) fn check_nobody_has_image(&self, layer: LayerId) -> Result<()> {
        if self.root().pool().is_none() {
            return Ok(());
        }
        match self.on_device(layer).and_then(|on| on.map(|on| on.open(OFlag::O_RDWR)).transpose()) {
            Err(e) if e.kind() == Kind::Busy => Err(e),
            // One that is gone, or cannot be had, is no reason to keep the rest.
            _ => Ok(()),
        }
    }

    /// Removes the image of a layer in the store's own pool, and then what leads to it.
    fn remove_image(&self, pooled: &Pooled, on: &OnDevice) -> Result<()> {
        let attempt = || format!("remove {}", on.name.display());
        if let Some(name) = on.address.as_ref().and_then(|address| image_in_pool(pooled, address)) {
            // This process may have it open still, by one of its own that serves it.
            nbd::rest();
            pooled.records.remove_image(&name).context(attempt)?;
        }
        let path = self.device_file(on.layer);
        files::remove_if_there(&path).context(|| format!("remove {}", path.display()))?;
        files::forget_stand_in(&path);
        Ok(())
    }
}

impl OnDevice {
    /// Makes the header zeros, durably; a device without a header is as good. One with another header is not
    /// even opened for writing.
    fn erase_header(&self) -> Result<()> {
        let looked_at = self.open(OFlag::O_RDONLY)?;
        if Found::read(looked_at.medium())?.is_none() {
            return Ok(());
        }
        self.found(looked_at.medium())?;
        let device = self.open(OFlag::O_RDWR)?;
        if !looked_at.is(&device)? {
            let message = format!("{} has come to mean another device just now", self.name.display());
            return Err(Error::new(Kind::Corrupt, message));
        }
        let erase = || {
            device::write_pages(device.medium(), 0, &vec![0; DATA_START as usize])?;
            device.medium().sync()
        };
        erase().context(|| format!("erase the header of {}", self.name.display()))
    }
}

/// The layer whose file has this name in `layers/`; whether it is on a device, or still coming, does not
/// matter.
pub(crate) fn layer_of_name(name: &str) -> Option<LayerId> {
    let of_file = name.strip_suffix(".img").or_else(|| name.strip_suffix(ENDING));
    of_file.or_else(|| coming_of_name(name))?.parse().ok()
}
