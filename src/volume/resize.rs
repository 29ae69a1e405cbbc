//! Making a volume larger, while nobody has it attached.
//!
//! The top layer's file is made longer; lower layers stay as they are. `pending.json` says so first, so that a file that is
//! longer than `volume.json` says is given its length back by whoever takes the volume next.

use super::catalog::Catalog;
use super::freeze::{OpenDetached, Unwrap};
use super::id::VolumeId;
use super::lifecycle::Failure;
use super::lock::Purpose;
use super::metadata::{Geometry, Metadata};
use super::pending::Pending;
use crate::error::{Context, Error, Kind, Result};
use crate::observe::events::{Event, EventLog};
use std::fs::OpenOptions;

/// Makes a volume `size` bytes large, and reports `modifyVolume` events. Answers what is known of it then.
///
/// # Errors
/// `Usage` for a size that is smaller, or not whole sectors; `Busy`, naming the process that has it; `Corrupt` for a
/// volume that an attach would refuse; the KMS's; those of the file system.
pub fn grow(
    catalog: &Catalog,
    events: &EventLog,
    id: VolumeId,
    size: u64,
    unwrap: Unwrap<'_>,
) -> Result<Metadata> {
    let attempt = || format!("resize {id}");
    let before = catalog.load(id).context(attempt)?;
    check(&before, size).context(attempt)?;
    if before.size() == size {
        return Ok(before);
    }
    let grown = grow_detached(catalog, id, size, unwrap);
    let result = grown.as_ref().map(drop).map_err(|failure| failure.cause.clone());
    if result.is_ok() {
        events.record(&Event::modify_volume(id, "modifying"));
        events.record(&Event::modify_volume(id, "optimizing"));
    }
    match &result {
        Ok(()) => events.record(&Event::modify_volume(id, "completed")),
        Err(cause) => events.record(&Event::modify_failed(id, cause.as_str())),
    }
    grown.map_err(|failure| failure.error.context(attempt()))
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

fn grow_detached(
    catalog: &Catalog,
    id: VolumeId,
    size: u64,
    unwrap: Unwrap<'_>,
) -> Result<Metadata, Failure> {
    let OpenDetached { lock, metadata, seal_key, .. } =
        &mut OpenDetached::open(catalog, id, Purpose::Resize, unwrap)?;
    // As it is now that nobody else can change it.
    let geometry = check(metadata, size)?;
    let mut next = metadata.clone();
    next.layout.geometry = geometry;
    next.layout.layers[0].size = size;
    next.reseal(seal_key.as_ref());
    let path = catalog.layer_path(next.top().id);
    Pending::Resize(size).store(catalog, lock)?;
    let lengthen = || -> std::io::Result<()> {
        let file = OpenOptions::new().write(true).open(&path)?;
        file.set_len(size)?;
        file.sync_all()
    };
    let done = lengthen().context(|| format!("make {} {size} bytes long", path.display()));
    if let Err(e) = done.and_then(|()| catalog.store(lock, &mut next)) {
        // By what volume.json says now.
        if let Err(left) = catalog.load(id).and_then(|now| catalog.recover(lock, &now)) {
            log::warn!("{left}; the next command that has {id} tries again");
        }
        return Err(e.into());
    }
    if let Err(e) = catalog.forget_pending(lock) {
        log::warn!("{e}; the next command that has {id} tries again");
    }
    Ok(next)
}
