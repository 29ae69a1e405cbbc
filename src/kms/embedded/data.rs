//! Encrypting and decrypting under the embedded KMS's keys, and the [`KeyProvider`] made of it.

use crate::audit::AuditKey;
use crate::base::Timestamp;
use crate::kms::embedded::audit::Call;
use crate::kms::embedded::blob::{self, Blob, PLAINTEXT_MAX};
use crate::kms::embedded::grant_records::{Constraint, GrantOperation};
use crate::kms::embedded::grants::{GrantRef, NewGrant};
use crate::kms::embedded::hsm_keys::KeyInHsm;
use crate::kms::embedded::open_log::OpenLog;
use crate::kms::embedded::page::{LIMIT, Piece};
use crate::kms::embedded::records::{KeyEntry, material_id};
use crate::kms::embedded::{Embedded, due};
use crate::kms::errors::out_of_range;
use crate::kms::key_ref::{DEFAULT_KEY_ALIAS, KeyName, anywhere, id_text};
use crate::kms::{
    Capabilities, EncryptionContext, Grant, GrantRequest, KeyDescription, KeyProvider, KmsError, ListedGrant,
    WrappedKey,
};
use std::ops::RangeInclusive;
use zeroize::Zeroizing;

/// Bytes that GenerateDataKey and GenerateRandom may be asked for.
pub const RANDOM_LEN: RangeInclusive<usize> = 1..=1024;

/// The parameter that holds the context in an audit record.
const CONTEXT: &str = "encryptionContext";

/// What was encrypted, and with what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The key's ARN.
    pub key: String,
    /// Names the version of the key: KeyMaterialId, 64 hex digits.
    pub material: String,
    /// The ciphertext.
    pub blob: Vec<u8>,
}

/// What was decrypted, and with what. Has no Debug, so that no plaintext is ever printed.
pub struct Opened {
    /// The key's ARN.
    pub key: String,
    /// KeyMaterialId of the version that had encrypted it.
    pub material: String,
    /// The plaintext.
    pub plaintext: Zeroizing<Vec<u8>>,
}

/// What ReEncrypt answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReEncrypted {
    /// ARN of the key that the ciphertext was under.
    pub source_key: String,
    /// KeyMaterialId of the version that it was under.
    pub source_material: String,
    /// What it is now.
    pub sealed: Sealed,
}

/// What was done, or has to be done in an HSM.
enum Done<T> {
    Here(T),
    InHsm(Box<KeyInHsm>),
}

impl Embedded {
    /// Encrypt: `plaintext` (1..=4096 bytes) under `key`, bound to `context`.
    pub fn encrypt(
        &self,
        key: &str,
        plaintext: &[u8],
        context: &EncryptionContext,
    ) -> Result<Sealed, KmsError> {
        if plaintext.is_empty() || plaintext.len() > PLAINTEXT_MAX {
            let (relation, bound) =
                if plaintext.is_empty() { ("greater", 1) } else { ("less", PLAINTEXT_MAX) };
            return Err(KmsError::Validation(format!(
                "1 validation error detected: Value at 'plaintext' failed to satisfy constraint: Member must \
                 have length {relation} than or equal to {bound}"
            )));
        }
        self.make_default_key_for(key)?;
        let sealed = self.seal(key, plaintext, context);
        self.record(Call::new("Encrypt").on(key).under(CONTEXT, context), sealed)
    }

    /// GenerateDataKey: `len` random bytes ([`RANDOM_LEN`]), in the clear and under `key`.
    pub fn generate_data_key(
        &self,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<(Sealed, Zeroizing<Vec<u8>>), KmsError> {
        self.generate("GenerateDataKey", key, len, context)
    }

    fn generate(
        &self,
        operation: &str,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<(Sealed, Zeroizing<Vec<u8>>), KmsError> {
        let plaintext = self.generate_random(len)?;
        self.make_default_key_for(key)?;
        let sealed = self.seal(key, &plaintext, context);
        let call = Call::new(operation).on(key).under(CONTEXT, context).with("numberOfBytes", len);
        Ok((self.record(call, sealed)?, plaintext))
    }

    /// GenerateRandom: `len` random bytes ([`RANDOM_LEN`]).
    pub fn generate_random(&self, len: usize) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        if !RANDOM_LEN.contains(&len) {
            return Err(out_of_range(len, "numberOfBytes", &RANDOM_LEN));
        }
        let mut bytes = Zeroizing::new(vec![0; len]);
        blob::random(&mut bytes)?;
        Ok(bytes)
    }

    /// Decrypt: `blob`, which must have been made by `key` if one is given, under `context`.
    pub fn open_blob(
        &self,
        key: Option<&str>,
        blob: &[u8],
        context: &EncryptionContext,
    ) -> Result<Opened, KmsError> {
        let opened = self.unseal(key, blob, context);
        let call = Call::new("Decrypt").under(CONTEXT, context);
        let call = match key {
            Some(key) => call.on(key),
            None => call.about(&key_in(blob)),
        };
        self.record(call, opened)
    }

    /// ReEncrypt: what `blob` holds, under `key` and `to`, without showing it.
    pub fn re_encrypt(
        &self,
        blob: &[u8],
        source: Option<&str>,
        from: &EncryptionContext,
        key: &str,
        to: &EncryptionContext,
    ) -> Result<ReEncrypted, KmsError> {
        self.make_default_key_for(key)?;
        let done = self.unseal(source, blob, from).and_then(|opened| {
            let sealed = self.seal(key, &opened.plaintext, to)?;
            Ok(ReEncrypted { source_key: opened.key, source_material: opened.material, sealed })
        });
        let call = Call::new("ReEncrypt").about(&key_in(blob)).about(key);
        let call = call.with("destinationKeyId", key).under("sourceEncryptionContext", from);
        self.record(call.under("destinationEncryptionContext", to), done)
    }

    fn seal(&self, key: &str, plaintext: &[u8], context: &EncryptionContext) -> Result<Sealed, KmsError> {
        match self.current(|log| self.seal_here(log, key, plaintext, context))? {
            Done::Here(sealed) => Ok(sealed),
            Done::InHsm(key) => self.seal_in_hsm(&key, plaintext, context),
        }
    }

    fn seal_here(
        &self,
        log: &OpenLog,
        key: &str,
        plaintext: &[u8],
        context: &EncryptionContext,
    ) -> Result<Done<Sealed>, KmsError> {
        let key = log.state().key(key, &self.place)?;
        self.check_usable(log, key)?;
        if let Some(key) = self.in_hsm(log, key)? {
            return Ok(Done::InHsm(key));
        }
        let version = key.current().ok_or_else(|| no_material(key))?;
        let material = log.keys().open(key.id, version.id, &version.sealed)?;
        let blob = blob::seal(&material, key.id, version.id, plaintext, context)?;
        Ok(Done::Here(Sealed {
            key: self.place.key_arn(key.id),
            material: material_id(key.id, version.id),
            blob,
        }))
    }

    /// Answers in AWS's order: the blob's form, the key that was asked for, the key in the blob, its state,
    /// and only then whether the blob is authentic.
    fn unseal(
        &self,
        asked: Option<&str>,
        blob: &[u8],
        context: &EncryptionContext,
    ) -> Result<Opened, KmsError> {
        let blob = Blob::parse(blob)?;
        match self.current(|log| self.unseal_here(log, asked, &blob, context))? {
            Done::Here(opened) => Ok(opened),
            Done::InHsm(key) => self.unseal_in_hsm(&key, &blob, context),
        }
    }

    fn unseal_here(
        &self,
        log: &OpenLog,
        asked: Option<&str>,
        blob: &Blob<'_>,
        context: &EncryptionContext,
    ) -> Result<Done<Opened>, KmsError> {
        let asked = asked.map(|key| log.state().key(key, &self.place)).transpose()?;
        let key = log.state().key_by_id(blob.key).ok_or_else(unknown_key)?;
        if asked.is_some_and(|asked| asked.id != key.id) {
            return Err(KmsError::IncorrectKey(
                "The key ID in the request does not identify a CMK that can perform this operation.".into(),
            ));
        }
        self.check_usable(log, key)?;
        if let Some(key) = self.in_hsm(log, key)? {
            return Ok(Done::InHsm(key));
        }
        let version =
            key.versions.iter().find(|v| v.id == blob.version).ok_or(KmsError::InvalidCiphertext)?;
        let material = log.keys().open(key.id, version.id, &version.sealed)?;
        let plaintext = blob::open(&material, blob, context)?;
        Ok(Done::Here(Opened {
            key: self.place.key_arn(key.id),
            material: material_id(key.id, version.id),
            plaintext,
        }))
    }

    /// Material that has expired is not used even where it could not be removed.
    fn check_usable(&self, log: &OpenLog, key: &KeyEntry) -> Result<(), KmsError> {
        if let Some(refusal) = log.state().state_of(key).refusal(&self.place.key_arn(key.id)) {
            // Another process may have disconnected the key store: this one's session ends as well.
            if let (KmsError::KeyStoreDisconnected(_), Some(of)) = (&refusal, &key.key_store) {
                self.forget_token(&of.id);
            }
            return Err(refusal);
        }
        let expired = key.external.is_some() && due::material_is_due(key, &self.log.now());
        if expired { Err(key.pending_import(&self.place)) } else { Ok(()) }
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

    fn region(&self, _: &str) -> Option<String> {
        Some(self.place.region.clone())
    }

    fn describe(&self, key: &str) -> Result<KeyDescription, KmsError> {
        let key = self.key(anywhere(key))?;
        let deletion = key.deletion.and_then(|at| Timestamp::of_unix(at.div_euclid(1000)));
        Ok(KeyDescription { key_id: key.arn, state: key.state, description: key.description, deletion })
    }

    fn generate_wrapped(
        &self,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        let key = anywhere(key);
        Ok(self.generate("GenerateDataKeyWithoutPlaintext", key, len, context)?.0.into())
    }

    fn decrypt(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        Ok(self.open_blob(Some(anywhere(&wrapped.key_id)), &wrapped.blob, context)?.plaintext)
    }

    fn rewrap(
        &self,
        wrapped: &WrappedKey,
        from: &EncryptionContext,
        key: &str,
        to: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        Ok(self
            .re_encrypt(&wrapped.blob, Some(anywhere(&wrapped.key_id)), from, anywhere(key), to)?
            .sealed
            .into())
    }

    fn audit_key(&self) -> Result<Option<AuditKey>, KmsError> {
        Embedded::audit_key(self)
    }

    fn wrap(&self, key: &str, data_key: &[u8], context: &EncryptionContext) -> Result<WrappedKey, KmsError> {
        Ok(self.encrypt(anywhere(key), data_key, context)?.into())
    }

    /// Whoever opens the store is its owner, who needs no grants: there is a grantee only where the settings
    /// name one who is a principal here.
    fn capabilities(&self) -> Capabilities {
        Capabilities { grantee: self.grantee.clone().filter(|arn| self.knows(arn)) }
    }

    fn decrypt_granted(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
        token: &str,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        self.check_tokens(&[token.to_owned()])?;
        self.decrypt(wrapped, context)
    }

    fn create_grant(&self, request: &GrantRequest<'_>) -> Result<Grant, KmsError> {
        let new = NewGrant {
            grantee: request.grantee,
            retiring: Some(request.grantee),
            operations: &[GrantOperation::Decrypt],
            constraint: Constraint { subset: Some(request.context.pairs().clone()), equals: None },
            name: Some(request.name),
        };
        let granted = Embedded::create_grant(self, &self.owner(), anywhere(request.key), &new, false)?;
        Ok(Grant { key_id: request.key.to_owned(), id: granted.id, token: Some(granted.token) })
    }

    fn retire_grant(&self, grant: &Grant) -> Result<(), KmsError> {
        let named = GrantRef::Id { key: anywhere(&grant.key_id), grant: &grant.id };
        Embedded::retire_grant(self, &self.owner(), named, false)
    }

    fn grants_for(&self, key: &str, grantee: &str) -> Result<Vec<ListedGrant>, KmsError> {
        let piece = Piece { limit: Some(*LIMIT.end()), marker: None };
        let mut found = Vec::new();
        let mut next = Some(piece);
        while let Some(piece) = next {
            let page = self.grants(anywhere(key), None, Some(grantee), &piece)?;
            let retirable = page.items.into_iter().filter(|grant| grant.retiring.as_deref() == Some(grantee));
            found.extend(retirable.map(|grant| ListedGrant { id: grant.id, name: grant.name }));
            next = page.next.map(|marker| Piece { marker: Some(marker), ..piece });
        }
        Ok(found)
    }
}

impl From<Sealed> for WrappedKey {
    fn from(sealed: Sealed) -> Self {
        WrappedKey { key_id: sealed.key, blob: sealed.blob }
    }
}

/// What is answered about a key that a ciphertext names and that is not there.
pub(in crate::kms) fn unknown_key() -> KmsError {
    KmsError::AccessDenied(
        "The ciphertext refers to a customer master key that does not exist, does not exist in this region, \
         or you are not allowed to access."
            .into(),
    )
}

/// The id of the key that a ciphertext names; nothing for what is no ciphertext.
pub(in crate::kms) fn key_in(blob: &[u8]) -> String {
    Blob::parse(blob).map(|blob| id_text(blob.key)).unwrap_or_default()
}

fn no_material(key: &KeyEntry) -> KmsError {
    KmsError::Corrupt(format!("KMS key {} has no material", id_text(key.id)))
}
