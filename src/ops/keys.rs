//! The ways to KMS keys and to data keys that operations need.

use crate::catalog::metadata::{KeyOwner, KeyRecord, encryption_context};
use crate::crypt::Dek;
use crate::kms::{Failure, KeyProvider};

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
    pub(crate) fn generate(&self, owner: impl Into<KeyOwner>) -> Result<KeyRecord, Failure> {
        let wrapped = self.provider.generate_wrapped(self.key, Dek::LEN, &encryption_context(owner));
        let wrapped = wrapped.map_err(|e| Failure::kms(e, self.provider.name(), self.key))?;
        Ok(KeyRecord { provider: self.provider.name().to_string(), wrapped, check: None })
    }
}
