//! Key management services: who wraps and unwraps a volume's data key.
//!
//! [`KeyProvider`] has one implementation a provider. A provider knows nothing of volumes but the
//! encryption context that binds a wrapped key to one of them.

mod allowed;
#[cfg(feature = "aws")]
pub mod aws;
pub mod context;
pub mod embedded;
pub mod errors;
mod failure;
pub mod grant;
pub mod key_ref;
mod kms_key;
pub mod order;
pub mod patience;
mod recorded;
#[cfg(feature = "kms-server")]
pub mod regions;
#[cfg(feature = "kms-server")]
pub mod server;

pub use context::EncryptionContext;
pub use errors::{Exception, KmsError};
pub use failure::Failure;
pub use grant::{Grant, GrantRequest, ListedGrant};
pub use key_ref::{KeyRef, ProviderName};
pub use kms_key::KmsKey;

use crate::audit::AuditKey;
use crate::base::Timestamp;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::config::Settings;
use patience::Patience;
use zeroize::Zeroizing;

/// A wrapped data key and the canonical id of the KMS key that wrapped it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedKey {
    /// Canonical key id: the ARN, never an alias.
    pub key_id: String,
    /// The provider's opaque ciphertext, 1..=6144 bytes.
    pub blob: Vec<u8>,
}

/// State of a KMS key, as AWS KMS names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// Usable.
    Enabled,
    /// Switched off; can be switched on again.
    Disabled,
    /// Waiting for deletion; can be cancelled.
    PendingDeletion,
    /// EXTERNAL origin, without key material.
    PendingImport,
    /// In a custom key store that is not connected.
    Unavailable,
    /// A multi-Region primary key that is to be deleted once its replicas are; can be cancelled.
    PendingReplicaDeletion,
    /// A multi-Region primary key of which a replica becomes the primary one; usable meanwhile.
    Updating,
}

impl KeyState {
    /// AWS KMS's name for it.
    pub fn name(self) -> &'static str {
        match self {
            KeyState::Enabled => "Enabled",
            KeyState::Disabled => "Disabled",
            KeyState::PendingDeletion => "PendingDeletion",
            KeyState::PendingImport => "PendingImport",
            KeyState::Unavailable => "Unavailable",
            KeyState::PendingReplicaDeletion => "PendingReplicaDeletion",
            KeyState::Updating => "Updating",
        }
    }

    /// Whether the key encrypts and decrypts.
    pub fn is_usable(self) -> bool {
        matches!(self, KeyState::Enabled | KeyState::Updating)
    }

    /// What a Decrypt by the key `arn` is refused with in this state; none if it is not.
    pub fn refusal(self, arn: &str) -> Option<KmsError> {
        match self {
            KeyState::Enabled | KeyState::Updating => None,
            KeyState::Disabled => Some(KmsError::Disabled(format!("{arn} is disabled."))),
            KeyState::PendingDeletion => {
                Some(KmsError::PendingDeletion(format!("{arn} is pending deletion.")))
            }
            KeyState::PendingReplicaDeletion => {
                Some(KmsError::PendingDeletion(format!("{arn} is pending replica deletion.")))
            }
            KeyState::PendingImport => Some(KmsError::PendingImport(format!("{arn} is pending import."))),
            KeyState::Unavailable => Some(KmsError::KeyStoreDisconnected(format!("{arn} is unavailable."))),
        }
    }
}

/// What `describe` tells of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyDescription {
    /// Canonical key id (ARN).
    pub key_id: String,
    /// Its state now.
    pub state: KeyState,
    /// The operator's words.
    pub description: String,
    /// When it is deleted, if it waits for that and the KMS says when.
    pub deletion: Option<Timestamp>,
}

/// One key management service.
///
/// A `key` argument is what the provider accepts as a reference: for KMS-like providers an id, a key ARN,
/// an alias name or an alias ARN.
pub trait KeyProvider: Send + Sync {
    /// Its name in volume metadata: `embedded`, `aws`, …
    fn name(&self) -> &'static str;

    /// The region in which it uses this key. A multi-Region key may be named by the ARN of another one.
    fn region(&self, key: &str) -> Option<String> {
        key_ref::arn_region(key).map(str::to_owned)
    }

    /// The key's canonical id and state.
    fn describe(&self, key: &str) -> Result<KeyDescription, KmsError>;

    /// GenerateDataKeyWithoutPlaintext: `len` random bytes (1..=1024) that nobody sees, wrapped under `key`
    /// and bound to `context`.
    fn generate_wrapped(
        &self,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError>;

    /// Decrypt: unwraps `wrapped.blob`, which must have been made by `wrapped.key_id` under `context`.
    fn decrypt(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError>;

    /// ReEncrypt: the same data key under `key` and `to`, without showing it to the caller.
    fn rewrap(
        &self,
        wrapped: &WrappedKey,
        from: &EncryptionContext,
        key: &str,
        to: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError>;

    /// Encrypt: wraps a data key that came from another provider, where this one takes such keys.
    fn wrap(
        &self,
        _key: &str,
        _data_key: &[u8],
        _context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        let message = format!("the {} provider wraps no data keys that were made elsewhere", self.name());
        Err(KmsError::Unsupported(message))
    }

    /// What it can do besides, and as whom. Here and below, unless a provider says
    /// otherwise: it has no grants.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    /// Decrypt on the strength of a grant, by its token: as [`KeyProvider::decrypt`], also for whoever may
    /// not decrypt otherwise, and also in the moments before the whole KMS knows the grant.
    fn decrypt_granted(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
        _token: &str,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        self.decrypt(wrapped, context)
    }

    /// CreateGrant: lets the grantee decrypt, and retire the grant. The same request again
    /// answers the same grant.
    fn create_grant(&self, _request: &GrantRequest<'_>) -> Result<Grant, KmsError> {
        Err(KmsError::Unsupported(format!("the {} provider has no grants", self.name())))
    }

    /// RetireGrant. NotFound if there is no such grant (any more).
    fn retire_grant(&self, _grant: &Grant) -> Result<(), KmsError> {
        Err(KmsError::Unsupported(format!("the {} provider has no grants", self.name())))
    }

    /// ListRetirableGrants: the grants on the key of this ARN that were made for
    /// `grantee`, and that it may retire.
    fn grants_for(&self, _key: &str, _grantee: &str) -> Result<Vec<ListedGrant>, KmsError> {
        Err(KmsError::Unsupported(format!("the {} provider has no grants", self.name())))
    }

    /// What audit records can be authenticated with; a KMS elsewhere has nothing for that.
    fn audit_key(&self) -> Result<Option<AuditKey>, KmsError> {
        Ok(None)
    }
}

/// What a provider can do besides wrapping and unwrapping.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Whose grants it makes: the principal as which this host decrypts. `None`: it has no grants, or nobody
    /// has said who the host is, and none are made.
    pub grantee: Option<String>,
}

/// Opens the provider of this name for the store at `root`: `embedded` or `aws`, with the patience of the
/// settings, for the keys that the settings allow. What it is used for goes into the store's audit log.
///
/// `name` stands in volume metadata and in [`KeyRef::provider`]. Unsupported if this
/// version does not have it.
pub fn open_provider(hardened: Hardened, root: &Root, name: &str) -> Result<Box<dyn KeyProvider>, KmsError> {
    open_patient_provider(hardened, root, name, None)
}

/// As [`open_provider`], with another patience than that of the settings, if one is given.
pub fn open_patient_provider(
    hardened: Hardened,
    root: &Root,
    name: &str,
    patience: Option<Patience>,
) -> Result<Box<dyn KeyProvider>, KmsError> {
    let settings = Settings::load(root).map_err(|e| KmsError::Validation(e.to_string()))?;
    let rules = allowed::Rules::new(&settings)?;
    let provider: Box<dyn KeyProvider> = match name {
        "embedded" => Box::new(embedded::Embedded::open(root, hardened)?.patient(patience)),
        #[cfg(feature = "aws")]
        "aws" => {
            let patience = patience.unwrap_or(Patience(settings.kms_patience));
            Box::new(aws::Aws::open(patience, settings.grantee_principal, hardened)?)
        }
        #[cfg(not(feature = "aws"))]
        "aws" => {
            return Err(KmsError::Unsupported(
                "keys of AWS KMS are used by the feature aws, without which this sealblk was built".into(),
            ));
        }
        name => return Err(KmsError::Unsupported(format!("the {name} provider is not in this version"))),
    };
    // A key that is not allowed is on record as well.
    Ok(Box::new(recorded::Recorded::new(root, rules.guard(provider))?))
}
