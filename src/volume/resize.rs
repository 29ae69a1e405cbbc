//! Making a volume larger, attached or not.
//!
//! The top layer's file is made longer; lower layers stay as they are. `pending.json` says so first, so that a file that is
//! longer than `volume.json` says is given its length back by whoever takes the volume next.

use super::catalog::Catalog;
use super::freeze::{OpenDetached, Unwrap};
use super::id::VolumeId;
use super::lifecycle::Failure;
use super::lock::{Purpose, VolumeLock};
use super::metadata::{Geometry, Metadata};
use super::pending::Pending;
use crate::crypt::SealKey;
use crate::error::{Context, Error, Kind, Result};
use crate::observe::events::{Event, EventLog};
use std::fs::{File, OpenOptions};

/// Makes a volume `size` bytes large by `change`, and reports `modifyVolume` events. Answers what is known of it then.
/// `change` is [`detached`], or what has the process do it that has the volume attached ([`Growth`]).
///
/// # Errors
/// `Usage` for a size that is smaller, or not whole sectors; what `change` says.
pub fn grow(
    catalog: &Catalog,
    events: &EventLog,
    id: VolumeId,
    size: u64,
    change: impl FnOnce() -> Result<(), Failure>,
) -> Result<Metadata> {
    let attempt = || format!("resize {id}");
    let before = catalog.load(id).context(attempt)?;
    check(&before, size).context(attempt)?;
    if before.size() == size {
        return Ok(before);
    }
    let grown = change();
    let result = grown.as_ref().map(drop).map_err(|failure| failure.cause.clone());
    if result.is_ok() {
        events.record(&Event::modify_volume(id, "modifying"));
        events.record(&Event::modify_volume(id, "optimizing"));
    }
    match &result {
        Ok(()) => events.record(&Event::modify_volume(id, "completed")),
        Err(cause) => events.record(&Event::modify_failed(id, cause.as_str())),
    }
    grown.map_err(|failure| failure.error.context(attempt()))?;
    catalog.load(id)
}

/// # Errors
/// `Usage`, as for [`grow`].
fn check(volume: &Metadata, size: u64) -> Result<Geometry> {
    if size < volume.size() {
        let message = format!(
            "it has {} bytes, and a volume cannot be made smaller: its file system may lie there",
            volume.size()
        );
        return Err(Error::new(Kind::Usage, message));
    }
    Geometry::new(size, volume.sector_size())
}

/// Makes a volume larger that nobody has attached.
///
/// # Errors
/// `Busy`, naming the process that has it; `Corrupt` for a volume that an attach would refuse; the KMS's; those of the
/// file system.
pub fn detached(catalog: &Catalog, id: VolumeId, size: u64, unwrap: Unwrap<'_>) -> Result<(), Failure> {
    let OpenDetached { lock, metadata, seal_key, .. } =
        &mut OpenDetached::open(catalog, id, Purpose::Resize, unwrap)?;
    let path = catalog.layer_path(metadata.top().id);
    let top = OpenOptions::new().write(true).open(&path).context(|| format!("open {}", path.display()))?;
    let growth = Growth::begin(catalog, lock, metadata, size, &top)?;
    Ok(growth.commit(catalog, lock, metadata, seal_key.as_ref())?)
}

/// A resize that has begun: the top layer's file, `top`, is as long as it is going to be, and nothing uses that yet.
#[must_use = "the volume has its new size once this is committed"]
pub struct Growth<'a> {
    geometry: Geometry,
    top: &'a File,
}

impl<'a> Growth<'a> {
    /// Makes the file of the top layer longer, durably. The volume may be written to meanwhile.
    ///
    /// # Errors
    /// `Usage`, as for [`grow`]; those of the file system. The volume is as it was.
    pub fn begin(
        catalog: &Catalog,
        lock: &VolumeLock,
        metadata: &Metadata,
        size: u64,
        top: &'a File,
    ) -> Result<Self> {
        // As it is now that nobody else can change it.
        let geometry = check(metadata, size)?;
        Pending::Resize(size).store(catalog, lock, metadata)?;
        let growth = Growth { geometry, top };
        match top.set_len(size).and_then(|()| top.sync_all()) {
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
        let mut next = metadata.clone();
        next.layout.geometry = self.geometry;
        next.layout.layers[0].size = self.geometry.size();
        next.reseal(key);
        if let Err(e) = catalog.store(lock, &mut next) {
            self.cancel(catalog, lock);
            return Err(e);
        }
        *metadata = next;
        if let Err(e) = catalog.forget_pending(lock) {
            log::warn!("{e}; the next command that has {} tries again", lock.volume());
        }
        Ok(())
    }

    /// Gives the file its length back, by what `volume.json` says now: a replacement that failed may have come far
    /// enough to be seen.
    pub fn cancel(self, catalog: &Catalog, lock: &VolumeLock) {
        let undo = || {
            let size = catalog.load(lock.volume())?.size();
            if size < self.geometry.size() {
                self.top.set_len(size)?;
                self.top.sync_all()?;
                catalog.forget_pending(lock)?;
            }
            Ok::<_, Error>(())
        };
        if let Err(e) = undo() {
            log::warn!("{e}; the next command that has {} tries again", lock.volume());
        }
    }
}
