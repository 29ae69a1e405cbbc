//! Making a volume larger, attached or not.
//!
//! The top layer's file is made longer; lower layers stay as they are. `pending.json` says so first, so that a file that is
//! longer than `volume.json` says is given its length back by whoever takes the volume next.

use crate::base::{Context, Result};
use crate::catalog::grow::{Growth, check};
use crate::catalog::lock::Purpose;
use crate::catalog::{Catalog, Metadata, VolumeId};
use crate::events::{Event, EventLog};
use crate::kms::Failure;
use crate::volume::open::{Opened, Taken, Unwrap};

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

/// Makes a volume larger that nobody has attached.
///
/// # Errors
/// `Busy`, naming the process that has it; `Corrupt` for a volume that an attach would refuse; the KMS's; those of the
/// file system.
pub fn detached(catalog: &Catalog, id: VolumeId, size: u64, unwrap: Unwrap<'_>) -> Result<(), Failure> {
    let Taken { lock, opened } = &mut Taken::take(catalog, id, Purpose::Resize, unwrap)?;
    let Opened { metadata, seal_key, layers } = opened;
    let growth = Growth::begin(catalog, lock, metadata, size, layers[0].store.file())?;
    Ok(growth.commit(catalog, lock, metadata, seal_key.as_ref())?)
}
