//! Wrapping the data keys of a volume or a snapshot anew: by another KMS key, or by the newest version of the
//! same one.
//!
//! A helper process asks the KMS and proves the new wrapped key before anybody relies on it
//! ([`crate::helper::rewrap`]). Only then is the record replaced, a volume's by whoever has the volume. Until
//! that one replacement the old wrapped key is there, afterwards the new one.

use super::Store;
use super::reach::Reach;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Purpose, VolumeLock};
use crate::catalog::metadata::{KeyOwner, KeyRecord};
use crate::catalog::rewrap::Rewrapped;
use crate::catalog::slots::KeySlot;
use crate::catalog::{Catalog, Metadata, SnapshotId, VolumeId};
use crate::helper::rewrap::by_helper;
use crate::host::control;
use crate::kms::{KeyRef, KmsKey};
use serde::Serialize;

/// A data key that was wrapped anew.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// Which of its keys.
    pub key: usize,
    /// The KMS key that wrapped it, as `provider:arn`.
    pub from: String,
    /// The KMS key that wraps it now in place of that one.
    pub to: String,
}

/// Which data keys are wrapped anew, and by what.
pub struct Wish {
    /// The KMS key that shall wrap them; without one, the one that wraps each now.
    to: Option<KeyRef>,
    /// Only the copies that this KMS key wraps.
    from: Option<KmsKey>,
}

impl Wish {
    /// All wrapped copies of data keys, or only those that the KMS key wraps which `from` names, are wrapped
    /// by the KMS key which `to` names.
    ///
    /// # Errors
    /// `Usage` for what names no key; those of the KMS.
    pub fn new(store: &Store, to: Option<&str>, from: Option<&str>) -> Result<Self> {
        let parse = |text: &str| store.reference(text);
        let canonical = |key: KeyRef| {
            let key = store.key_of(key)?;
            let described = key.describe().map_err(|e| key.advise(e))?;
            Ok::<_, Error>(KmsKey { provider: key.provider_name().into(), key_id: described.key_id })
        };
        let to = to.map(parse).transpose()?;
        let from = from.map(|text| canonical(parse(text)?)).transpose()?;
        Ok(Wish { to, from })
    }

    /// The KMS key that shall wrap this copy of a data key; none if it stays as it is.
    fn target(&self, slot: &KeySlot) -> Option<KeyRef> {
        if !self.from.as_ref().is_none_or(|from| slot.is_by(from)) {
            return None;
        }
        // A provider of another version has no name here; its key is left to that version.
        self.to.clone().or_else(|| KeyRef::of_provider(&slot.provider, &slot.wrapped.key_id))
    }

    /// Whether there is anything to do where these are the keys.
    pub fn concerns(&self, keys: &[KeyRecord]) -> bool {
        keys.iter().flat_map(KeyRecord::slots).any(|slot| self.target(slot).is_some())
    }
}

/// Wraps the data keys of a volume anew that the wish means, and returns what was done.
///
/// # Errors
/// `Usage` if there is nothing to do; `Busy`, naming the command that has the volume; those of the KMS. Keys
/// before the one that failed are done.
pub fn rewrap(store: &Store, id: VolumeId, wish: &Wish) -> Result<Vec<Change>> {
    let attempt = || format!("rewrap {id}");
    check(store.catalog().load(id)?.keys(), wish).context(attempt)?;
    change(store, id, wish).context(attempt)
}

/// Wraps the data keys of a snapshot anew that the wish means, and returns what was done.
///
/// # Errors
/// As for [`rewrap`].
pub fn rewrap_snapshot(store: &Store, id: SnapshotId, wish: &Wish) -> Result<Vec<Change>> {
    let catalog = store.catalog();
    let rewrap = || {
        let snapshot = catalog.load_snapshot(id)?;
        check(snapshot.keys(), wish)?;
        let replace = |note: Rewrapped| catalog.change_wrapping(id, |snapshot| snapshot.rewrap(&note));
        each(store, snapshot.key_owner(), snapshot.keys(), wish, replace)
    };
    rewrap().context(|| format!("rewrap {id}"))
}

fn check(keys: &[KeyRecord], wish: &Wish) -> Result<()> {
    let message = if keys.is_empty() {
        "it is not encrypted, so there is no key to wrap".to_string()
    } else if !wish.concerns(keys) {
        format!("its data keys are wrapped by {}, which is not asked for", names(keys.iter()))
    } else if let Some(several) = keys.iter().find(|key| key.slots().len() > 1)
        && wish.to.is_some()
        && wish.from.is_none()
    {
        format!(
            "a data key of it is wrapped by {}: say with --from which one the new one takes the place of, or \
             add the new one (\"key add\")",
            names(std::iter::once(several))
        )
    } else {
        return Ok(());
    };
    Err(Error::new(Kind::Usage, message))
}

fn names<'a>(keys: impl Iterator<Item = &'a KeyRecord>) -> String {
    let by: Vec<String> = keys.flat_map(KeyRecord::slots).map(|slot| slot.kms_key().to_string()).collect();
    by.join(", ")
}

fn change(store: &Store, id: VolumeId, wish: &Wish) -> Result<Vec<Change>> {
    let catalog = store.catalog();
    let reach = Reach::of(&catalog, id, Purpose::Rewrap)?;
    let metadata = catalog.load(id)?;
    each(store, id.into(), metadata.keys(), wish, |note| match &reach {
        Reach::Mine(lock) => replace(&catalog, lock, &note),
        Reach::Host => control::rewrap(&catalog, id, note),
    })
}

/// Wraps each copy of the owner's keys anew that the wish means, and has it replaced in the record.
fn each(
    store: &Store,
    owner: KeyOwner,
    keys: &[KeyRecord],
    wish: &Wish,
    replace: impl Fn(Rewrapped) -> Result<()>,
) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    for (n, key) in keys.iter().enumerate() {
        // As they are once those before are replaced.
        let mut now = key.clone();
        for (slot, old) in key.slots().iter().enumerate() {
            let Some(to) = wish.target(old) else { continue };
            let new = by_helper(store.root(), store.settings(), owner, &now, Some(slot), &to);
            let new = new.map_err(|failure| failure.error)?;
            if now.slots().iter().enumerate().any(|(other, it)| other != slot && it.is_by(&new.kms_key())) {
                let message = format!(
                    "data key {n} is wrapped by {} already; \"key remove\" takes {} away",
                    new.kms_key(),
                    old.kms_key()
                );
                return Err(Error::new(Kind::Usage, message));
            }
            replace(Rewrapped::new(n, old, &new))?;
            changes.push(Change { key: n, from: old.kms_key().to_string(), to: new.kms_key().to_string() });
            now = now.with_slot(slot, new);
        }
    }
    Ok(changes)
}

fn replace(catalog: &Catalog, lock: &VolumeLock, note: &Rewrapped) -> Result<()> {
    // As the record is on disk now: an earlier key of this volume has been replaced there.
    let mut metadata: Metadata = catalog.load(lock.volume())?;
    metadata.rewrap(note)?;
    catalog.save(lock, &mut metadata)
}
