//! The KMS key that an operator names, and the ways to data keys that the use cases need.

use super::Store;
use crate::base::Error;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::catalog::lock::Held;
use crate::catalog::metadata::{KeyOwner, KeyRecord, encryption_context};
use crate::catalog::slots::KeySlot;
use crate::catalog::{Catalog, SnapshotId, VolumeId};
use crate::crypt::Dek;
use crate::kms::embedded::Embedded;
use crate::kms::key_ref::{ProviderName, is_same_key};
use crate::kms::patience::Patience;
use crate::kms::{Failure, KeyDescription, KeyProvider, KmsError, KmsKey};
use crate::ops::also_keys::Also;
use std::time::Duration;

/// The embedded KMS of the store at `root`; the first key makes it.
///
/// # Errors
/// `Corrupt` if it is gone: records name its keys, of which a new one could open none.
pub fn embedded(root: &Root, hardened: Hardened) -> Result<Embedded, KmsError> {
    check_kms_is_there(root)?;
    Embedded::open(root, hardened)
}

/// Fails if records name keys of the embedded KMS of the store at `root`, and that is gone.
pub(super) fn check_kms_is_there(root: &Root) -> Result<(), KmsError> {
    if Embedded::is_at(root) {
        return Ok(());
    }
    let needs = needing(root, |_| true, &mut |_| false).map_err(|e| KmsError::Internal(e.to_string()))?;
    let volumes = needs.volumes.iter().map(|volume| volume.id.to_string());
    let orphans: Vec<String> = volumes.chain(needs.snapshots.iter().map(|(id, _)| id.to_string())).collect();
    let Some(first) = orphans.first() else { return Ok(()) };
    let others = match orphans.len() - 1 {
        0 => "is".to_owned(),
        n => format!("and {n} more are"),
    };
    Err(KmsError::Corrupt(format!(
        "the store's own KMS is gone: {first} {others} under its keys, and there is no {}. Put that folder \
         back from a backup; a new KMS could open none of them. If it is lost for good, so is what they \
         hold: delete them, and the next key makes a new KMS",
        root.kms().display()
    )))
}

/// What has data keys that a KMS key wraps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Volumes.
    pub volumes: Vec<NeedyVolume>,
    /// Snapshots, and whether another KMS key that can be used wraps each of those data keys.
    pub snapshots: Vec<(SnapshotId, bool)>,
}

impl Needs {
    /// The ids of those that have a data key which no other KMS key gives.
    pub fn without_another(&self) -> Vec<String> {
        let volumes = self.volumes.iter().filter(|it| !it.has_another).map(|it| it.id.to_string());
        let snapshots = self.snapshots.iter().filter(|(_, has)| !has).map(|(id, _)| id.to_string());
        volumes.chain(snapshots).collect()
    }
}

/// Whether this KMS key gives data keys now; its KMS is asked, once.
pub fn is_usable_now(store: &Store, key: &KmsKey) -> bool {
    let provider = store.provider_within(&key.provider, Some(Patience(Duration::ZERO)));
    provider.and_then(|kms| kms.describe(&key.key_id)).is_ok_and(|it| it.state.is_usable())
}

/// A volume that has data keys which a KMS key wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedyVolume {
    /// Which one.
    pub id: VolumeId,
    /// Whether somebody has it attached now.
    pub is_attached: bool,
    /// Whether another KMS key that can be used wraps each of those data keys.
    pub has_another: bool,
}

/// Which volumes and snapshots of the store at `root` need this key of the embedded KMS; `is_usable` tells of
/// another KMS key whether it can be used now. Those whose records cannot be read are not among them.
///
/// # Errors
/// Those of the file system.
pub fn who_needs(root: &Root, key: &str, is_usable: &mut dyn FnMut(&KmsKey) -> bool) -> Result<Needs, Error> {
    needing(root, |id| is_same_key(ProviderName::Embedded.as_str(), id, key), is_usable)
}

/// What has data keys that keys of the embedded KMS wrap which `is` says yes to.
fn needing(
    root: &Root,
    is: impl Fn(&str) -> bool,
    is_usable: &mut dyn FnMut(&KmsKey) -> bool,
) -> Result<Needs, Error> {
    let catalog = Catalog::new(root);
    let is = |it: &KeySlot| it.provider == ProviderName::Embedded.as_str() && is(&it.wrapped.key_id);
    // Of data keys that it wraps: whether each comes by another; none if it wraps none.
    let mut has_another = |keys: &[KeyRecord]| {
        let wrapped: Vec<&KeyRecord> = keys.iter().filter(|key| key.slots().iter().any(&is)).collect();
        let mut another = |key: &&KeyRecord| {
            key.slots().iter().filter(|slot| !is(slot)).any(|slot| is_usable(&slot.kms_key()))
        };
        (!wrapped.is_empty()).then(|| wrapped.iter().all(&mut another))
    };
    let mut needs = Needs::default();
    for metadata in catalog.list()?.into_iter().filter_map(|entry| entry.metadata.ok()) {
        if let Some(has_another) = has_another(metadata.keys()) {
            let (id, is_attached) = (metadata.id(), catalog.held(metadata.id())? != Held::Free);
            needs.volumes.push(NeedyVolume { id, is_attached, has_another });
        }
    }
    for snapshot in catalog.snapshots()?.into_iter().filter_map(|entry| entry.snapshot.ok()) {
        if let Some(has_another) = has_another(snapshot.keys()) {
            needs.snapshots.push((snapshot.id(), has_another));
        }
    }
    Ok(needs)
}

/// A KMS key and the KMS that has it.
pub struct NamedKey {
    provider: Box<dyn KeyProvider>,
    key: String,
    also: Option<Also>,
}

impl NamedKey {
    /// The key that `provider` knows as `key`: by its id, its ARN or an alias.
    pub fn new(provider: Box<dyn KeyProvider>, key: String) -> Self {
        NamedKey { provider, key, also: None }
    }

    /// This key, and besides it these wrap what it makes.
    pub(super) fn and(self, also: Also) -> Self {
        NamedKey { also: Some(also), ..self }
    }

    /// What its KMS says of it.
    ///
    /// # Errors
    /// Those of the KMS.
    pub fn describe(&self) -> Result<KeyDescription, KmsError> {
        self.provider.describe(&self.key)
    }

    /// The name of its KMS, as records keep it.
    pub fn provider_name(&self) -> &str {
        self.provider.name()
    }

    /// The error for the reader, with what to do about this key in its KMS's own commands.
    pub fn advise(&self, e: KmsError) -> Error {
        e.with_advice_of(self.provider.name(), &self.key)
    }

    /// Fails unless data keys can be made with this key now. With `at_first_use` the key is made at its first
    /// use, and need not be there yet.
    ///
    /// # Errors
    /// Those of its KMS, with what to do about them.
    pub fn check_usable(&self, at_first_use: bool) -> Result<(), Error> {
        match self.describe() {
            Ok(key) => key.state.refusal(&key.key_id).map_or(Ok(()), |refusal| Err(self.advise(refusal))),
            Err(KmsError::NotFound(_)) if at_first_use => Ok(()),
            Err(e) => Err(self.advise(e)),
        }
    }

    /// For those who make data keys.
    pub fn wrapping(&self) -> WrappingKey<'_> {
        WrappingKey { provider: &*self.provider, key: &self.key, also: self.also.as_ref() }
    }
}

/// Which KMS keys wrap a new data key.
#[derive(Clone, Copy)]
pub struct WrappingKey<'a> {
    /// The KMS.
    pub provider: &'a dyn KeyProvider,
    /// The key, as the provider takes it: id, ARN or alias. It makes the data key.
    pub key: &'a str,
    /// Those that wrap it besides.
    pub also: Option<&'a Also>,
}

impl WrappingKey<'_> {
    /// A new data key for `owner`, which the KMS makes and nobody sees outside of it, and of the helper that
    /// has it wrapped by another KMS.
    ///
    /// # Errors
    /// Those of the KMSs.
    pub fn generate(&self, owner: impl Into<KeyOwner>) -> Result<KeyRecord, Failure> {
        let owner = owner.into();
        let wrapped = self.provider.generate_wrapped(self.key, Dek::LEN, &encryption_context(owner));
        let wrapped = wrapped.map_err(|e| Failure::kms(e, self.provider.name(), self.key))?;
        let record = KeyRecord::new(KeySlot::new(self.provider.name(), wrapped));
        match self.also {
            Some(also) => also.wrap_new(owner, record),
            None => Ok(record),
        }
    }
}
