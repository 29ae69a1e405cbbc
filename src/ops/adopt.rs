//! Taking a volume in that lies on a device: from another host, or from a store that is lost.
//!
//! Everything that a device says is a claim. The volume's record in its header is proved as an attach
//! proves the one in the store: the KMS has to give its data keys, their check values have to be
//! those of the record, and the record's seal has to be over all of it, under the data key. So
//! whoever can write the device alone can offer nothing but an earlier state of this volume, with the
//! size and the layer that it had then.

use super::Store;
use super::device::Candidate;
use super::make;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Holder, Purpose, VolumeLock};
use crate::catalog::metadata::{KeyOwner, VolumeName};
use crate::catalog::seal::Seal;
use crate::catalog::{Catalog, Metadata};
use crate::kms::Failure;
use std::path::Path;

/// A volume on a device that somebody wants taken in.
pub struct Adopt<'a> {
    /// The device.
    pub device: &'a Path,
    /// The volume's name from now on; without one, the name that it has.
    pub name: Option<VolumeName>,
    /// Whether a volume is taken that is not encrypted: nothing proves what it says.
    pub unencrypted: bool,
}

/// Takes the volume on a device in, and reports a `createVolume` event. From then on the store that had it is
/// refused the device.
///
/// # Errors
/// `NotFound` for a device without a volume; `Busy` for one that is in use, for a frozen layer, and for a
/// volume or a name that this store has already; `Corrupt` for a record that the data keys do not prove;
/// `Refused` for what the settings do not allow; those of the KMS, of the device and of the file system.
pub fn adopt(store: &Store, wanted: &Adopt<'_>) -> Result<Metadata> {
    let take = || {
        let device = Candidate::open(wanted.device)?;
        let claimed = claim(&device)?;
        check(store, wanted, &claimed)?;
        device.check_size(claimed.size())?;
        prove(store, &claimed).map_err(|failure| failure.error)?;
        let catalog = store.catalog();
        match catalog.load(claimed.id()) {
            Ok(here) => again(&catalog, &here, &claimed, &device),
            Err(e) if e.kind() == Kind::NotFound => {
                let name = wanted.name.clone().or_else(|| claimed.name().cloned());
                let volume = Metadata { name, origin: None, ..claimed };
                make::adopt(&catalog, &store.events(), volume, &device)
            }
            Err(e) => Err(e),
        }
    };
    take().context(|| format!("adopt {}", wanted.device.display()))
}

/// What the device says of itself.
fn claim(device: &Candidate) -> Result<Metadata> {
    let Some(header) = device.header()? else {
        let message = "it has no header of sealblk's: no volume lies there, or its first MiB was overwritten";
        return Err(Error::new(Kind::NotFound, message));
    };
    let volume = header.volume()?;
    let id = volume.id();
    if header.frozen {
        let message = format!(
            "what lies there is a layer of {id} that snapshots or clones share, and no volume by itself; \
             where they are, \"sealblk snapshot push\" brings a snapshot here"
        );
        return Err(Error::new(Kind::Busy, message));
    }
    match volume.layers() {
        [only] if only.id == header.layer => Ok(volume),
        [top, ..] if top.id == header.layer => {
            let message = format!(
                "{id} has {} layers, and only its top lies there; where it is, \"sealblk volume flatten {id} \
                 --follow\" brings all of it to the device",
                volume.layers().len()
            );
            Err(Error::new(Kind::Busy, message))
        }
        _ => {
            let message = format!("its header is of layer {}, and the record in it of another", header.layer);
            Err(Error::new(Kind::Corrupt, message))
        }
    }
}

/// What can be known without the data keys.
fn check(store: &Store, wanted: &Adopt<'_>, claimed: &Metadata) -> Result<()> {
    let id = claimed.id();
    store.settings().check_encrypted(id, claimed.is_encrypted())?;
    if !claimed.is_encrypted() && !wanted.unencrypted {
        let message = format!(
            "{id} is not encrypted: nothing proves what it is and what it holds; with --unencrypted it is \
             taken as it is"
        );
        return Err(Error::new(Kind::Usage, message));
    }
    Ok(())
}

/// Holds the record against the data keys, which are wiped then.
fn prove(store: &Store, claimed: &Metadata) -> Result<(), Failure> {
    let owner = KeyOwner::Volume(claimed.id());
    let deks = claimed.keys().iter().map(|key| store.unwrap(owner, key)).collect::<Result<Vec<_>, _>>()?;
    match claimed.verify(&deks)? {
        Seal::Sealed | Seal::NotEncrypted => Ok(()),
        Seal::Unsealed => {
            let message =
                format!("the record of {} on the device has no seal, so nothing proves it", claimed.id());
            Err(Error::new(Kind::Corrupt, message).into())
        }
    }
}

/// The store has the volume: it takes the device back, or goes on with what was cut off.
fn again(catalog: &Catalog, here: &Metadata, claimed: &Metadata, device: &Candidate) -> Result<Metadata> {
    let id = here.id();
    if !catalog.is_on_a_device(here.top().id)? || here.layout() != claimed.layout() || here.mac != claimed.mac
    {
        let message = format!(
            "{id} is in this store already, and is not what the device says; delete it here first, which \
             touches no device that was taken over by another store"
        );
        return Err(Error::new(Kind::Busy, message));
    }
    let _lock = VolumeLock::acquire(&catalog.folder(id), id, &Holder::this_process(Purpose::Recover, None)?)?;
    catalog.take_device(here, device.medium())?;
    Ok(here.clone())
}
