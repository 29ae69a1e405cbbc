//! The embedded KMS: keys, aliases and data keys in a folder of the store's, with AWS KMS's rules and words.
//!
//! It knows nothing of volumes but an encryption context, and no network. Any number of processes use one store at
//! once; each operation sees every change that was answered before it began. docs/kms-store.md describes the
//! files byte by byte.

pub mod admin;
pub mod anchor;
pub mod blob;
pub mod clock;
mod deletion;
mod kbkdf;
pub mod keys;
mod lock;
pub mod log;
mod open_log;
mod plain;
pub mod records;
pub mod root_key;
mod state;
mod store;

use super::key_ref::{DEFAULT_KEY_ALIAS, KeyName, Locality};
use super::{EncryptionContext, KeyDescription, KeyProvider, KmsError, WrappedKey};
use crate::root::Root;
use admin::out_of_range;
use blob::{Blob, PLAINTEXT_MAX};
use clock::{Clock, SystemClock};
use open_log::OpenLog;
use records::KeyEntry;
use std::path::PathBuf;
use store::Store;
use zeroize::Zeroizing;

/// Bytes that GenerateDataKey may be asked for.
const DATA_KEY_LEN: std::ops::RangeInclusive<usize> = 1..=1024;

/// A KMS in a folder.
pub struct Embedded {
    store: Store,
    place: Locality,
}

impl Embedded {
    /// The KMS of the store at `root`. The first key makes its folder, and its root key in [`Root::config_dir`].
    ///
    /// Keys whose waiting window is over are deleted now; if that cannot be done, it is logged and left to the next.
    pub fn open(root: &Root) -> Result<Self, KmsError> {
        let config = Root::config_dir().map_err(|e| KmsError::Internal(e.to_string()))?;
        Ok(Self::at(root.kms(), config, Box::new(SystemClock)))
    }

    /// The KMS in the folder `dir`, with its root key in `config`, which must not lie with the data.
    pub fn at(dir: PathBuf, config: PathBuf, clock: Box<dyn Clock>) -> Self {
        let kms = Embedded { store: Store::new(dir, config, clock), place: Locality::default() };
        if let Err(e) = kms.purge() {
            ::log::warn!(
                "keys that may be due for deletion in {} were not looked at: {e}",
                kms.store.dir().display()
            );
        }
        kms
    }

    /// The region and account of its ARNs.
    pub fn locality(&self) -> &Locality {
        &self.place
    }

    /// Encrypt: `plaintext` (1..=4096 bytes) under `key`, bound to `context`.
    pub fn encrypt(
        &self,
        key: &str,
        plaintext: &[u8],
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        if plaintext.is_empty() || plaintext.len() > PLAINTEXT_MAX {
            let (relation, bound) =
                if plaintext.is_empty() { ("greater", 1) } else { ("less", PLAINTEXT_MAX) };
            return Err(KmsError::Validation(format!(
                "1 validation error detected: Value at 'plaintext' failed to satisfy constraint: Member must have \
                 length {relation} than or equal to {bound}"
            )));
        }
        self.make_default_key_for(key)?;
        self.store.read(|log| self.seal(log, key, plaintext, context))
    }

    fn seal(
        &self,
        log: &OpenLog,
        key: &str,
        plaintext: &[u8],
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        let key = log.state().key(key, &self.place)?;
        key.check_usable(&self.place)?;
        let version = key.versions.last().ok_or_else(|| no_material(key))?;
        let material = log.keys().open(key.id, version.id, &version.sealed)?;
        let blob = blob::seal(&material, key.id, version.id, plaintext, context)?;
        Ok(WrappedKey { key_id: self.place.key_arn(key.id), blob })
    }

    /// Answers in AWS's order: the blob's form, the key that was asked for, the key in the blob, its state, and only
    /// then whether the blob is authentic.
    fn unseal(
        &self,
        log: &OpenLog,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let blob = Blob::parse(&wrapped.blob)?;
        let asked = log.state().key(&wrapped.key_id, &self.place)?;
        let key = log.state().key_by_id(blob.key).ok_or_else(unknown_key)?;
        if key.id != asked.id {
            return Err(KmsError::IncorrectKey(
                "The key ID in the request does not identify a CMK that can perform this operation.".into(),
            ));
        }
        key.check_usable(&self.place)?;
        let version =
            key.versions.iter().find(|v| v.id == blob.version).ok_or(KmsError::InvalidCiphertext)?;
        let material = log.keys().open(key.id, version.id, &version.sealed)?;
        blob::open(&material, &blob, context)
    }

    fn make_default_key_for(&self, key: &str) -> Result<(), KmsError> {
        match self.place.parse(key)? {
            KeyName::Alias(name) if name == DEFAULT_KEY_ALIAS => self.ensure_default_key(),
            _ => Ok(()),
        }
    }
}

impl KeyProvider for Embedded {
    fn name(&self) -> &'static str {
        "embedded"
    }

    fn describe(&self, key: &str) -> Result<KeyDescription, KmsError> {
        let key = self.key(key)?;
        Ok(KeyDescription { key_id: key.arn, state: key.state, description: key.description })
    }

    fn generate_wrapped(
        &self,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        if !DATA_KEY_LEN.contains(&len) {
            return Err(out_of_range(len, "numberOfBytes", &DATA_KEY_LEN));
        }
        let mut plaintext = Zeroizing::new(vec![0; len]);
        blob::random(&mut plaintext)?;
        self.encrypt(key, &plaintext, context)
    }

    fn decrypt(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        self.store.read(|log| self.unseal(log, wrapped, context))
    }

    fn rewrap(
        &self,
        wrapped: &WrappedKey,
        from: &EncryptionContext,
        key: &str,
        to: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        self.make_default_key_for(key)?;
        self.store.read(|log| {
            let plaintext = self.unseal(log, wrapped, from)?;
            self.seal(log, key, &plaintext, to)
        })
    }
}

fn unknown_key() -> KmsError {
    KmsError::AccessDenied(
        "The ciphertext refers to a customer master key that does not exist, does not exist in this region, or you \
         are not allowed to access."
            .into(),
    )
}

fn no_material(key: &KeyEntry) -> KmsError {
    KmsError::Corrupt(format!("KMS key {} has no material", key.id))
}
