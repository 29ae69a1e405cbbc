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
use crate::catalog::{Catalog, Metadata, SnapshotId, VolumeId};
use crate::helper::rewrap::by_helper;
use crate::host::control;
use crate::kms::KeyRef;
use crate::kms::key_ref::is_same_key;
use serde::Serialize;

/// A data key that was wrapped anew.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// Which of its keys.
    #[serde(rename = "key")]
    pub slot: usize,
    /// The KMS key that it was wrapped by, as `provider:arn`.
    pub from: String,
    /// The KMS key that it is wrapped by now.
    pub to: String,
}

/// Which data keys are wrapped anew, and by what.
pub struct Wish {
    /// The KMS key that shall wrap them; without one, the one that wraps each now.
    to: Option<KeyRef>,
    /// Only those that this KMS key wraps: provider and canonical id.
    from: Option<(String, String)>,
}

impl Wish {
    /// All data keys, or only those that the KMS key wraps which `from` names, are wrapped by the
    /// KMS key which `to` names.
    ///
    /// # Errors
    /// `Usage` for what names no key; those of the KMS.
    pub fn new(store: &Store, to: Option<&str>, from: Option<&str>) -> Result<Self> {
        let locality = &store.settings().locality;
        let parse = |text: &str| KeyRef::of_operator(text, locality);
        let canonical = |key: KeyRef| {
            let key = store.key_of(key)?;
            let described = key.describe().map_err(|e| key.advise(e))?;
            Ok::<_, Error>((key.provider_name().into(), described.key_id))
        };
        let to = to.map(parse).transpose()?;
        let from = from.map(|text| canonical(parse(text)?)).transpose()?;
        Ok(Wish { to, from })
    }

    /// The KMS key that shall wrap the data key of this record; none if it stays as it is.
    fn target(&self, key: &KeyRecord) -> Option<KeyRef> {
        let from = self.from.as_ref();
        let is = |(provider, arn): &(String, String)| {
            *provider == key.provider && is_same_key(provider, arn, &key.wrapped.key_id)
        };
        if !from.is_none_or(is) {
            return None;
        }
        // A provider of another version has no name here; its key is left to that version.
        self.to.clone().or_else(|| KeyRef::of_provider(&key.provider, &key.wrapped.key_id))
    }

    /// Whether there is anything to do where these are the keys.
    pub fn concerns(&self, keys: &[KeyRecord]) -> bool {
        keys.iter().any(|key| self.target(key).is_some())
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
        let replace = |note: Rewrapped| catalog.rewrap_snapshot(id, &note);
        each(&catalog, snapshot.key_owner(), snapshot.keys(), wish, replace)
    };
    rewrap().context(|| format!("rewrap {id}"))
}

fn check(keys: &[KeyRecord], wish: &Wish) -> Result<()> {
    let message = if keys.is_empty() {
        "it is not encrypted, so there is no key to wrap".to_string()
    } else if !wish.concerns(keys) {
        let by: Vec<_> = keys.iter().map(|k| format!("{}:{}", k.provider, k.wrapped.key_id)).collect();
        format!("its data keys are wrapped by {}, which is not asked for", by.join(", "))
    } else {
        return Ok(());
    };
    Err(Error::new(Kind::Usage, message))
}

fn change(store: &Store, id: VolumeId, wish: &Wish) -> Result<Vec<Change>> {
    let catalog = store.catalog();
    let reach = Reach::of(&catalog, id, Purpose::Rewrap)?;
    let metadata = catalog.load(id)?;
    each(&catalog, id.into(), metadata.keys(), wish, |note| match &reach {
        Reach::Mine(lock) => replace(&catalog, lock, &note),
        Reach::Host => control::rewrap(&catalog, id, note),
    })
}

/// Wraps each of the owner's keys that the wish means, and has it replaced in the record.
fn each(
    catalog: &Catalog,
    owner: KeyOwner,
    keys: &[KeyRecord],
    wish: &Wish,
    replace: impl Fn(Rewrapped) -> Result<()>,
) -> Result<Vec<Change>> {
    let name = |provider: &str, key: &str| format!("{provider}:{key}");
    let mut changes = Vec::new();
    for (slot, old) in keys.iter().enumerate() {
        let Some(to) = wish.target(old) else { continue };
        let new = by_helper(catalog.root(), owner, old, &to)?;
        replace(Rewrapped::new(slot, old, to.provider.as_str(), &new))?;
        changes.push(Change {
            slot,
            from: name(&old.provider, &old.wrapped.key_id),
            to: name(to.provider.as_str(), &new.key_id),
        });
    }
    Ok(changes)
}

fn replace(catalog: &Catalog, lock: &VolumeLock, note: &Rewrapped) -> Result<()> {
    // As the record is on disk now: an earlier key of this volume has been replaced there.
    let mut metadata: Metadata = catalog.load(lock.volume())?;
    metadata.rewrap(note)?;
    catalog.save(lock, &mut metadata)
}
