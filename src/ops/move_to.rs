//! Moving a volume onto a device, off one, or from one to another: an empty top layer is put there, and
//! what lies below is copied up into it, by the host process while the volume is attached or by
//! [`super::flatten::follow`]. Whatever interrupts that, it goes on at the next attach, and until it is
//! done both places are needed.

use super::Store;
use super::device::Candidate;
use super::flatten;
use super::need::Budget;
use super::new_top::NewTop;
use super::reach::Reach;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Purpose, VolumeLock};
use crate::catalog::{Metadata, VolumeId};
use crate::kms::Failure;

/// Where a volume is to lie.
#[derive(Debug)]
pub enum Target {
    /// In a file of the store.
    File,
    /// On this device, every byte of which is zero.
    Device(Candidate),
}

impl Target {
    pub(super) fn device(&self) -> Option<&Candidate> {
        match self {
            Target::File => None,
            Target::Device(device) => Some(device),
        }
    }
}

/// Looks whether the volume can be moved there, as far as that can be known before.
///
/// # Errors
/// `Busy` for a volume that is attached; `Usage` for a device that is too small for it, and where all of it
/// lies in files already; `NoSpace` if the file system has too little.
pub fn check(store: &Store, id: VolumeId, target: &Target, budget: Budget) -> Result<()> {
    let catalog = store.catalog();
    let look = || {
        let metadata = catalog.load(id)?;
        drop(taken(store, id)?);
        catalog.check_has_come(metadata.layers())?;
        match target {
            Target::Device(device) => device.check_size(metadata.size()),
            Target::File => {
                let mut on_device = false;
                for layer in metadata.layers() {
                    on_device = on_device || catalog.is_on_a_device(layer.id)?;
                }
                if !on_device {
                    return Err(Error::new(Kind::Usage, "all of it lies in files of the store already"));
                }
                budget.check_layers(&catalog, id, metadata.layers(), None)
            }
        }
    };
    look().context(|| format!("move {id}"))
}

/// Puts the volume's top there, empty, and marks everything below to be copied up. Reports a `hydrateVolume`
/// event.
///
/// # Errors
/// As [`check`]; `Corrupt` for a volume that an attach would refuse; those of the KMS, of the device and of
/// the file system. The volume lies where it was then.
pub fn start(store: &Store, id: VolumeId, target: &Target) -> Result<()> {
    let catalog = store.catalog();
    let begin = || -> Result<Metadata, Failure> {
        let taken = store.open_taken(taken(store, id)?)?;
        let moved = NewTop::begin(&catalog, taken, target.device())?.commit(|freeze, lock, opened| {
            freeze.commit_moved(&catalog, lock, &mut opened.metadata, opened.seal_key.as_ref())?;
            catalog.mark_frozen(&opened.metadata.layers()[1..]);
            Ok(opened.metadata.clone())
        })?;
        Ok(moved)
    };
    let moved = begin().map_err(|failure| failure.error.context(format!("move {id}")))?;
    flatten::report(&store.events(), &moved, "hydrating");
    Ok(())
}

/// The volume's lock, which nobody has who has it attached.
fn taken(store: &Store, id: VolumeId) -> Result<VolumeLock> {
    match Reach::of(&store.catalog(), id, Purpose::Mark)? {
        Reach::Mine(lock) => Ok(lock),
        Reach::Host => Err(attached()),
    }
}

/// The error for a volume that is attached and is to have a top on a device.
pub(super) fn attached() -> Error {
    Error::new(
        Kind::Busy,
        "it is attached, and its host process, which is confined, can open no other device; detach it for \
         this command, and attach it again: what it holds is copied while it is attached",
    )
}
