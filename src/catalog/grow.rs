//! A volume's new size, as its record has it.

use crate::backing::device::{self, DATA_START};
use crate::backing::file::FileBacking;
use crate::base::{Error, Kind, Result, size as sizes};
use crate::catalog::lock::VolumeLock;
use crate::catalog::metadata::Geometry;
use crate::catalog::{Catalog, Metadata, Pending};
use crate::crypt::SealKey;
use std::path::Path;

/// The size that a volume is going to have.
///
/// # Errors
/// `Usage` for a size that is smaller, or not whole sectors.
pub fn check(volume: &Metadata, size: u64) -> Result<Geometry> {
    if size < volume.size() {
        let message = format!(
            "it has {} bytes, and a volume cannot be made smaller: its file system may lie there",
            volume.size()
        );
        return Err(Error::new(Kind::Usage, message));
    }
    Geometry::new(size, volume.sector_size())
}

impl Metadata {
    /// What becomes of the volume when it is `size` bytes large; one that cannot be stays as it is.
    pub(crate) fn resized(&self, size: u64) -> Self {
        let Ok(geometry) = check(self, size) else { return self.clone() };
        let mut next = self.clone();
        next.layout.geometry = geometry;
        next.layout.layers[0].size = geometry.size();
        next
    }
}

/// A resize that has begun: the top layer's file, `top`, is as long as it is going to be,
/// and nothing uses that yet.
#[must_use = "the volume has its new size once this is committed"]
pub struct Growth<'a> {
    geometry: Geometry,
    top: &'a FileBacking,
}

impl<'a> Growth<'a> {
    /// Makes the file of the top layer longer, durably; of a device, makes zeros of what comes to the layer.
    /// The volume may be written to meanwhile.
    ///
    /// # Errors
    /// `Usage`, as for [`check`]; those of the file system. The volume is as it was.
    pub fn begin(
        catalog: &Catalog,
        lock: &VolumeLock,
        metadata: &Metadata,
        size: u64,
        top: &'a FileBacking,
    ) -> Result<Self> {
        // As it is now that nobody else can change it.
        let geometry = check(metadata, size)?;
        if top.is_on_device() {
            check_fits(top, &catalog.shown_place(metadata.top().id), size)?;
        }
        Pending::Resize(size).note(catalog, lock, metadata)?;
        let growth = Growth { geometry, top };
        let make_longer = || match top.is_on_device() {
            // Whatever was there behind the layer is to read as nothing.
            true => {
                let new = DATA_START + metadata.size()..DATA_START + size;
                device::wipe(top.medium(), new, &mut |_, _| Ok::<_, std::io::Error>(()))
            }
            false => top.file().set_len(size).and_then(|()| top.file().sync_all()),
        };
        match make_longer() {
            Ok(()) => Ok(growth),
            Err(e) => {
                growth.cancel(catalog, lock);
                Err(Error::from(e).context(format!("make the top layer {size} bytes long")))
            }
        }
    }

    /// Gives the volume its new size, durably. `key` seals it; none for an unencrypted one.
    ///
    /// # Errors
    /// Those of the file system: then it has the size that it had.
    pub fn commit(
        self,
        catalog: &Catalog,
        lock: &VolumeLock,
        metadata: &mut Metadata,
        key: Option<&SealKey>,
    ) -> Result<()> {
        let mut next = metadata.resized(self.geometry.size());
        next.reseal(key);
        if let Err(e) = catalog.save(lock, &mut next) {
            self.cancel(catalog, lock);
            return Err(e);
        }
        *metadata = next;
        if let Err(e) = catalog.forget_pending(lock) {
            log::warn!("{e}; the next command that has {} tries again", lock.volume());
        }
        Ok(())
    }

    /// Gives the file its length back, by what `volume.json` says now: a replacement that failed may have
    /// come far enough to be seen.
    pub fn cancel(self, catalog: &Catalog, lock: &VolumeLock) {
        let undo = || {
            let size = catalog.load(lock.volume())?.size();
            if size < self.geometry.size() {
                if !self.top.is_on_device() {
                    self.top.file().set_len(size)?;
                    self.top.file().sync_all()?;
                }
                catalog.forget_pending(lock)?;
            }
            Ok::<_, Error>(())
        };
        if let Err(e) = undo() {
            log::warn!("{e}; the next command that has {} tries again", lock.volume());
        }
    }
}

/// # Errors
/// `Usage` for a volume that the device has no room for.
fn check_fits(top: &FileBacking, name: &Path, size: u64) -> Result<()> {
    let room = device::room(top.medium())?;
    if size <= room && size.is_multiple_of(device::BLOCK) {
        return Ok(());
    }
    // A server tells its size when a connection begins.
    let again = if top.export().is_some() { ", and detach the volume for this" } else { "" };
    let message = format!(
        "{} has room for a volume of {room} bytes ({}), in multiples of {}; make the device larger \
         first{again}",
        name.display(),
        sizes::about(room),
        device::BLOCK
    );
    Err(Error::new(Kind::Usage, message))
}
