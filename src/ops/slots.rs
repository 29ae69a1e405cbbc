//! The KMS keys that wrap a data key: one more of them, or one less, of a volume, attached or not, or of a
//! snapshot.
//!
//! A new wrapped copy is made and proved by a helper process ([`crate::helper::rewrap`]), out of whichever
//! copy can be used. One is removed only after a helper has seen that the data key comes by another.

use super::Store;
use super::reach::Reach;
use crate::base::plural::counted;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Purpose, VolumeLock};
use crate::catalog::metadata::{KeyOwner, KeyRecord};
use crate::catalog::rewrap::SlotChange;
use crate::catalog::{Catalog, SnapshotId, VolumeId};
use crate::helper::rewrap::{by_helper, prove_by_helper};
use crate::host::control;
use crate::kms::{KeyRef, KmsKey};
use serde::Serialize;

/// Whose slots are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// A volume's.
    Volume(VolumeId),
    /// A snapshot's.
    Snapshot(SnapshotId),
}

/// A KMS key that wraps a data key from now on, or no longer.
#[derive(Clone, Debug, Serialize)]
pub struct Changed {
    /// Which of its data keys.
    pub key: usize,
    /// The KMS key.
    #[serde(flatten)]
    pub by: KmsKey,
}

/// Has each of the KMS keys that `names` name wrap all data keys of it besides, which it does not wrap yet.
/// Returns what was done.
///
/// # Errors
/// `Usage` for what names no key, and where there is nothing to do; `Busy`, naming the command that has the
/// volume; those of the KMSs. Data keys before the one that failed are done.
pub fn add(store: &Store, whose: Whose, names: &[String]) -> Result<Vec<Changed>> {
    let attempt = || format!("add a KMS key to {whose}");
    let named = parse(store, names).context(attempt)?;
    let add = |owner: KeyOwner, keys: &[KeyRecord], change: &dyn Fn(SlotChange) -> Result<()>| {
        let mut added = Vec::new();
        for (n, key) in keys.iter().enumerate() {
            let mut now = key.clone();
            for (to, by) in &named {
                if now.slot_by(by).is_some() {
                    continue;
                }
                let slot = by_helper(store.root(), store.settings(), owner, &now, None, to);
                let slot = slot.map_err(|failure| failure.error)?;
                change(SlotChange::add(n, &slot))?;
                added.push(Changed { key: n, by: slot.kms_key() });
                now = now.and(slot);
            }
        }
        Ok(added)
    };
    let all_there = |key: &KeyRecord| named.iter().all(|(_, by)| key.slot_by(by).is_some());
    let check = |keys: &[KeyRecord]| match keys.iter().all(all_there) {
        true => Err(Error::new(Kind::Usage, "that wraps all of its data keys already")),
        false => Ok(()),
    };
    change(store, whose, &check, &add).context(attempt)
}

/// Has none of the KMS keys that `names` name wrap a data key of it any longer. Returns what was done.
///
/// # Errors
/// As for [`add`]; where a data key would not come by any KMS key that is left, the answer of each. All data
/// keys are looked at before anything is changed.
pub fn remove(store: &Store, whose: Whose, names: &[String]) -> Result<Vec<Changed>> {
    let attempt = || format!("remove a KMS key from {whose}");
    let wanted = wanted(store, whose, names).context(attempt)?;
    let without = |key: &KeyRecord| {
        let left = wanted.iter().try_fold(key.clone(), |left, by| left.without(by));
        left.ok_or_else(|| {
            let message =
                format!("no KMS key would be left for a data key that {} wraps", key.first().kms_key());
            Error::new(Kind::Usage, message)
        })
    };
    let check = |keys: &[KeyRecord]| {
        let is_any =
            keys.iter().flat_map(KeyRecord::slots).any(|slot| wanted.iter().any(|by| slot.is_by(by)));
        if !is_any {
            let all: Vec<String> =
                keys.iter().flat_map(KeyRecord::slots).map(|slot| slot.kms_key().to_string()).collect();
            let message = format!("its data keys are wrapped by {}, and not by that", all.join(", "));
            return Err(Error::new(Kind::Usage, message));
        }
        keys.iter().try_for_each(|key| without(key).map(drop))
    };
    let remove = |owner: KeyOwner, keys: &[KeyRecord], change: &dyn Fn(SlotChange) -> Result<()>| {
        for (n, key) in keys.iter().enumerate() {
            let left = without(key)?;
            if left.slots().len() < key.slots().len() {
                let proved = prove_by_helper(store.root(), store.settings(), owner, &left);
                proved.map_err(|failure| {
                    let left = counted(left.slots().len(), "one that is left", "ones that are left");
                    failure.error.context(format!("data key {n} would not come by the {left}"))
                })?;
            }
        }
        let mut removed = Vec::new();
        for (n, key) in keys.iter().enumerate() {
            for slot in key.slots().iter().filter(|slot| wanted.iter().any(|by| slot.is_by(by))) {
                change(SlotChange::remove(n, slot))?;
                removed.push(Changed { key: n, by: slot.kms_key() });
            }
        }
        Ok(removed)
    };
    change(store, whose, &check, &remove).context(attempt)
}

/// What is changed of data keys: of whom, the keys as they are, and how one change is made so that it counts.
type Work<'a> = &'a dyn Fn(KeyOwner, &[KeyRecord], &dyn Fn(SlotChange) -> Result<()>) -> Result<Vec<Changed>>;

/// Looks whether there is anything to do, takes it, and does it.
fn change(
    store: &Store,
    whose: Whose,
    check: &dyn Fn(&[KeyRecord]) -> Result<()>,
    work: Work<'_>,
) -> Result<Vec<Changed>> {
    let catalog = store.catalog();
    let check = |keys: &[KeyRecord]| match keys.is_empty() {
        true => Err(Error::new(Kind::Usage, "it is not encrypted, so there is no key to wrap")),
        false => check(keys),
    };
    match whose {
        Whose::Volume(id) => {
            check(catalog.load(id)?.keys())?;
            let reach = Reach::of(&catalog, id, Purpose::Rewrap)?;
            let metadata = catalog.load(id)?;
            work(id.into(), metadata.keys(), &|change| match &reach {
                Reach::Mine(lock) => note(&catalog, lock, &change),
                Reach::Host => control::change_slot(&catalog, id, change),
            })
        }
        Whose::Snapshot(id) => {
            let snapshot = catalog.load_snapshot(id)?;
            check(snapshot.keys())?;
            work(snapshot.key_owner(), snapshot.keys(), &|change| {
                catalog.change_wrapping(id, |snapshot| snapshot.change_slot(&change))
            })
        }
    }
}

fn note(catalog: &Catalog, lock: &VolumeLock, change: &SlotChange) -> Result<()> {
    // As the record is on disk now: an earlier key of this volume has been changed there.
    let mut metadata = catalog.load(lock.volume())?;
    metadata.change_slot(change)?;
    catalog.save(lock, &mut metadata)
}

/// The KMS keys of these names, each as its KMS takes it, and as records have it.
fn parse(store: &Store, names: &[String]) -> Result<Vec<(KeyRef, KmsKey)>> {
    let parse = |name: &String| {
        let reference = store.reference(name)?;
        let key = store.key_of(reference.clone())?;
        let described = key.describe().map_err(|e| key.advise(e))?;
        Ok((reference, KmsKey { provider: key.provider_name().into(), key_id: described.key_id }))
    };
    names.iter().map(parse).collect()
}

/// The KMS keys of these names, as records have them. One that a record names by its ARN, or its id, is known
/// without its KMS, which may be lost for good.
fn wanted(store: &Store, whose: Whose, names: &[String]) -> Result<Vec<KmsKey>> {
    let catalog = store.catalog();
    let keys = match whose {
        Whose::Volume(id) => catalog.load(id)?.keys().to_vec(),
        Whose::Snapshot(id) => catalog.load_snapshot(id)?.keys().to_vec(),
    };
    let wanted = |name: &String| {
        let reference = store.reference(name)?;
        let named = KmsKey { provider: reference.provider.as_str().into(), key_id: reference.key };
        let slots = || keys.iter().flat_map(KeyRecord::slots);
        match slots().find(|slot| slot.is_by(&named)) {
            Some(slot) => Ok(slot.kms_key()),
            None => Ok(parse(store, std::slice::from_ref(name))?.remove(0).1),
        }
    };
    names.iter().map(wanted).collect()
}

impl std::fmt::Display for Whose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Whose::Volume(id) => id.fmt(f),
            Whose::Snapshot(id) => id.fmt(f),
        }
    }
}
