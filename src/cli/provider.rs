//! The KMS key that an operator names, and the ways to the data keys of volumes and snapshots.
#![forbid(unsafe_code)]

use crate::base::Result;
use crate::catalog::metadata::{KeyOwner, KeyRecord};
use crate::cli::Env;
use crate::config::Settings;
use crate::crypt::Dek;
use crate::helper::unwrap;
use crate::kms::{self, Failure, KeyDescription, KeyProvider, KeyRef, KmsError};
use crate::ops::keys::WrappingKey;

/// A KMS key and the KMS that has it.
pub struct NamedKey {
    provider: Box<dyn KeyProvider>,
    key: String,
}

impl NamedKey {
    /// The key that `reference` means, or the settings' default.
    pub fn open(env: &Env, settings: &Settings, reference: Option<&str>) -> Result<Self> {
        let text = reference.unwrap_or(&settings.default_key);
        let reference = KeyRef::parse(text, &settings.locality).map_err(|e| e.with_advice(text))?;
        Self::of(env, reference)
    }

    /// This key.
    pub fn of(env: &Env, reference: KeyRef) -> Result<Self> {
        let provider = kms::open_provider(env.hardened, &env.root, reference.provider.as_str())?;
        Ok(NamedKey { provider, key: reference.key })
    }

    /// What its KMS says of it.
    pub fn describe(&self) -> Result<KeyDescription, KmsError> {
        self.provider.describe(&self.key)
    }

    /// The name of its KMS, as volumes keep it.
    pub fn provider_name(&self) -> &str {
        self.provider.name()
    }

    /// For those who make data keys.
    pub fn wrapping(&self) -> WrappingKey<'_> {
        WrappingKey { provider: &*self.provider, key: &self.key }
    }
}

/// The provider of this name.
pub fn open(env: &Env) -> impl Fn(&str) -> Result<Box<dyn KeyProvider>, KmsError> {
    |name| kms::open_provider(env.hardened, &env.root, name)
}

/// Unwraps by the helper process, as an attach does.
pub fn unwrap(env: &Env) -> impl Fn(KeyOwner, &KeyRecord) -> Result<Dek, Failure> {
    |owner, key| {
        let unwrapped = unwrap::unwrap(env.hardened, &env.root, owner, key);
        unwrapped.map_err(|refusal| Failure { error: refusal.error(), cause: refusal.cause })
    }
}
