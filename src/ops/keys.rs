//! The KMS key that an operator names, and the ways to data keys that the use cases need.

use crate::base::Error;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::catalog::lock::Held;
use crate::catalog::metadata::{KeyOwner, KeyRecord, encryption_context};
use crate::catalog::{Catalog, SnapshotId, VolumeId};
use crate::crypt::Dek;
use crate::kms::embedded::Embedded;
use crate::kms::key_ref::{ProviderName, is_same_key};
use crate::kms::{Failure, KeyDescription, KeyProvider, KmsError};

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
    let needs = needing(root, |_| true).map_err(|e| KmsError::Internal(e.to_string()))?;
    let volumes = needs.volumes.iter().map(|(id, _)| id.to_string());
    let orphans: Vec<String> = volumes.chain(needs.snapshots.iter().map(ToString::to_string)).collect();
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
    /// Volumes, and whether somebody has them attached now.
    pub volumes: Vec<(VolumeId, bool)>,
    /// Snapshots.
    pub snapshots: Vec<SnapshotId>,
}

/// Which volumes and snapshots of the store at `root` need this key of the embedded KMS. Those whose records
/// cannot be read are not among them.
///
/// # Errors
/// Those of the file system.
pub fn who_needs(root: &Root, key: &str) -> Result<Needs, Error> {
    needing(root, |id| is_same_key(ProviderName::Embedded.as_str(), id, key))
}

/// What has data keys that keys of the embedded KMS wrap which `is` says yes to.
fn needing(root: &Root, is: impl Fn(&str) -> bool) -> Result<Needs, Error> {
    let catalog = Catalog::new(root);
    let is = |it: &KeyRecord| it.provider == ProviderName::Embedded.as_str() && is(&it.wrapped.key_id);
    let mut needs = Needs::default();
    for metadata in catalog.list()?.into_iter().filter_map(|entry| entry.metadata.ok()) {
        if metadata.keys().iter().any(&is) {
            needs.volumes.push((metadata.id(), catalog.held(metadata.id())? != Held::Free));
        }
    }
    let snapshots = catalog.snapshots()?.into_iter().filter_map(|entry| entry.snapshot.ok());
    needs.snapshots.extend(snapshots.filter(|it| it.keys().iter().any(&is)).map(|it| it.id()));
    Ok(needs)
}

/// A KMS key and the KMS that has it.
pub struct NamedKey {
    provider: Box<dyn KeyProvider>,
    key: String,
}

impl NamedKey {
    /// The key that `provider` knows as `key`: by its id, its ARN or an alias.
    pub fn new(provider: Box<dyn KeyProvider>, key: String) -> Self {
        NamedKey { provider, key }
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
        WrappingKey { provider: &*self.provider, key: &self.key }
    }
}

/// Which KMS key wraps a new data key.
#[derive(Clone, Copy)]
pub struct WrappingKey<'a> {
    /// The KMS.
    pub provider: &'a dyn KeyProvider,
    /// The key, as the provider takes it: id, ARN or alias.
    pub key: &'a str,
}

impl WrappingKey<'_> {
    /// A new data key for `owner`, which the KMS makes and nobody sees.
    ///
    /// # Errors
    /// Those of the KMS.
    pub fn generate(&self, owner: impl Into<KeyOwner>) -> Result<KeyRecord, Failure> {
        let wrapped = self.provider.generate_wrapped(self.key, Dek::LEN, &encryption_context(owner));
        let wrapped = wrapped.map_err(|e| Failure::kms(e, self.provider.name(), self.key))?;
        Ok(KeyRecord { provider: self.provider.name().to_string(), wrapped, check: None })
    }
}
