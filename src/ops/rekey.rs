//! Giving a volume another data key, attached or not. What the old key encrypted is copied up afterwards: by
//! the host process while the volume is attached, or by [`super::flatten::follow`].

use super::also_keys::AlsoKeys;
use super::device::Candidate;
use super::keys::NamedKey;
use super::need::Budget;
use super::new_top::NewTop;
use super::reach::{Reach, check_can_have_new_image};
use super::{Store, flatten, move_to};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Purpose, VolumeLock};
use crate::catalog::metadata::KeyOwner;
use crate::catalog::rekey::{NewKey, check_encrypted};
use crate::catalog::{LayerId, Metadata, VolumeId};
use crate::crypt::Dek;
use crate::crypt::secret_mem::SecretFd;
use crate::events::Event;
use crate::helper::unwrap;
use crate::host::control::conversation;
use crate::kms::Failure;
use std::time::Duration;

/// What came of giving a volume another data key.
pub struct Rekeyed {
    /// The new data key, as it is wrapped.
    pub new: NewKey,
    /// Of an attached volume: how long its queues stood still.
    pub pause: Option<Duration>,
}

/// Gives a volume a new data key, wrapped by the KMS key that `key` names and by those that `also`
/// means, or by all of those that wrap the old one. Its new top lies on the device `onto`, or in a
/// file. Reports `hydrateVolume` events. What was written before is still under the old data key: it
/// is marked to be copied up.
///
/// # Errors
/// `Usage` for a volume without encryption; `NoSpace` if the file system has too little; `Busy`, naming the
/// command that has it; `Corrupt` for one that an attach would refuse; those of the KMS and of the file
/// system. The volume has the data key that it had then.
pub fn rekey(
    store: &Store,
    id: VolumeId,
    key: Option<&str>,
    also: &AlsoKeys,
    budget: Budget,
    onto: Option<&Candidate>,
) -> Result<Rekeyed> {
    let (catalog, events) = (store.catalog(), store.events());
    let attempt = || format!("re-key {id}");
    let metadata = catalog.load(id)?;
    check_encrypted(&metadata).context(attempt)?;
    match onto {
        Some(device) => device.check_size(metadata.size()),
        // An image has the room that its pool has.
        None if catalog.root().pool().is_some() => Ok(()),
        None => budget.check_layers(&catalog, id, metadata.layers(), None),
    }
    .context(attempt)?;
    let key = named_key(store, key, also, &metadata).context(attempt)?;
    let done = key.wrapping().generate(id).map(NewKey::new).and_then(|new| {
        let pause = give(store, id, new.clone(), onto)?;
        Ok(Rekeyed { new, pause })
    });
    let done = done.map_err(|Failure { cause, error, .. }| {
        events.record(&Event::hydrate_failed(id, None, cause));
        error.context(attempt())
    })?;
    if done.pause.is_none() {
        // Of an attached volume, its host process reports this.
        flatten::report(&events, &catalog.load(id)?, "hydrating");
    }
    Ok(done)
}

fn named_key(store: &Store, key: Option<&str>, also: &AlsoKeys, metadata: &Metadata) -> Result<NamedKey> {
    let top = metadata.top().key.map(|n| &metadata.keys()[n]);
    match (key, top) {
        (None, Some(top)) => store.keys_as_of(top, also),
        _ => store.keys(key, also),
    }
}

/// Gives the volume a data key that the KMS has made. Returns how long its queues stood
/// still, if it is attached.
fn give(
    store: &Store,
    id: VolumeId,
    new: NewKey,
    onto: Option<&Candidate>,
) -> Result<Option<Duration>, Failure> {
    let catalog = store.catalog();
    match Reach::of(&catalog, id, Purpose::Mark)? {
        Reach::Mine(lock) => detached(store, lock, new, onto).map(|()| None),
        Reach::Host if onto.is_some() => Err(move_to::attached().into()),
        Reach::Host => {
            check_can_have_new_image(&catalog, id)?;
            let volume = catalog.load(id)?;
            let present = volume.top().key.map(|n| &volume.keys()[n]);
            let present = present.ok_or_else(|| Error::new(Kind::Usage, "it is not encrypted"))?;
            // The helper fills this, for nobody but who has the present data key: nobody here can read it.
            let secret = SecretFd::create(Dek::PASSED_LEN)?;
            let layer = LayerId::random();
            let new_top = (new.record(), layer);
            unwrap::unwrap_for_holder(store.hardened(), store.root(), id, new_top, present, &secret)?;
            Ok(Some(conversation::rekey(&catalog, id, (&new, layer), secret)?))
        }
    }
}

/// Gives a volume that nobody has attached a new top layer under the new data key, and marks
/// all below to be copied up.
fn detached(store: &Store, lock: VolumeLock, key: NewKey, onto: Option<&Candidate>) -> Result<(), Failure> {
    let catalog = store.catalog();
    catalog.check_has_come(catalog.load(lock.volume())?.layers())?;
    let taken = store.open_taken(lock)?;
    check_encrypted(&taken.opened.metadata)?;
    let volume = taken.lock.volume();
    let dek = store.unwrap(KeyOwner::Volume(volume), key.record())?.dek;
    let seal_key = dek.seal_key(&volume.to_string())?;
    NewTop::begin(&catalog, taken, onto)?.commit(|freeze, lock, opened| {
        freeze.commit_rekeyed(&catalog, lock, &mut opened.metadata, key.checked(&dek), &seal_key)?;
        catalog.mark_frozen(&opened.metadata.layers()[1..]);
        Ok(())
    })?;
    Ok(())
}
