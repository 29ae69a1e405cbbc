//! Making a volume larger, attached or not.
//!
//! The top layer's file is made longer; lower layers stay as they are. `pending.json` says so first, so that
//! a file that is longer than `volume.json` says is given its length back by whoever takes the volume next.

use super::Store;
use super::reach::{Reach, check_can_have_new_image};
use crate::base::{Context, Result};
use crate::catalog::grow::{Growth, check};
use crate::catalog::lock::{Purpose, VolumeLock};
use crate::catalog::{Metadata, VolumeId};
use crate::events::Event;
use crate::host::control;
use crate::kms::Failure;
use crate::vhost::gate::Told;
use crate::volume::open::Opened;

/// A volume that was made larger, or has that size already.
pub struct Resized {
    /// What is known of it now.
    pub volume: Metadata,
    /// Of a volume that is attached and was smaller: whether the guest's VMM knows.
    pub told: Option<Told>,
}

/// Makes a volume `size` bytes large, and reports `modifyVolume` events.
///
/// # Errors
/// `Usage` for a size that is smaller, or not whole sectors; `Busy`, naming the command that has the volume;
/// `Corrupt` for a volume that an attach would refuse; those of the KMS and of the file system. The volume
/// has the size that it had then.
pub fn resize(store: &Store, id: VolumeId, size: u64) -> Result<Resized> {
    let (catalog, events) = (store.catalog(), store.events());
    let attempt = || format!("resize {id}");
    let before = catalog.load(id).context(attempt)?;
    check(&before, size).context(attempt)?;
    if before.size() == size {
        return Ok(Resized { volume: before, told: None });
    }
    let grown = grow(store, id, size);
    match &grown {
        Ok(_) => {
            for step in ["modifying", "optimizing", "completed"] {
                events.record(&Event::modify_volume(id, step));
            }
        }
        Err(failure) => events.record(&Event::modify_failed(id, failure.cause.as_str())),
    }
    let told = grown.map_err(|failure| failure.error.context(attempt()))?;
    Ok(Resized { volume: catalog.load(id)?, told })
}

fn grow(store: &Store, id: VolumeId, size: u64) -> Result<Option<Told>, Failure> {
    let catalog = store.catalog();
    match Reach::of(&catalog, id, Purpose::Resize)? {
        Reach::Host => {
            check_can_have_new_image(&catalog, id)?;
            Ok(Some(control::resize(&catalog, id, size)?))
        }
        Reach::Mine(lock) => detached(store, lock, size).map(|()| None),
    }
}

/// Makes a volume larger that nobody has attached.
fn detached(store: &Store, lock: VolumeLock, size: u64) -> Result<(), Failure> {
    let catalog = store.catalog();
    // Longer than the record says, it does no harm.
    catalog.make_image_longer(catalog.load(lock.volume())?.top().id, size)?;
    let mut taken = store.open_taken(lock)?;
    let Opened { metadata, seal_key, layers, .. } = &mut taken.opened;
    let growth = Growth::begin(&catalog, &taken.lock, metadata, size, &layers[0].backing)?;
    Ok(growth.commit(&catalog, &taken.lock, metadata, seal_key.as_ref())?)
}
