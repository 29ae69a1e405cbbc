//! Keys whose material comes from outside: origin EXTERNAL.
//!
//! GetParametersForImport makes an RSA key for one import. Nothing is stored for it: the import token *is*
//! the private key, sealed under the store key together with the KMS key's id and the moment it expires at.
//!
//! RSA's private operation is the one secret computation here that a caller can time. The caller
//! has to be allowed to import, the RSA key is of no use except for one KMS key and one day, and
//! the operation is blinded.
//!
//! Into a multi-Region key material is imported in each region by itself. All take the same alone: the
//! first import, which is the primary key's, makes the fingerprint that its relatives hear of.

use crate::kms::embedded::Embedded;
use crate::kms::embedded::audit::Call;
use crate::kms::embedded::blob::Material;
use crate::kms::embedded::keys::{LogKeys, same};
use crate::kms::embedded::records::{Change, External, Fingerprint, KeyEntry, VersionEntry, material_id};
use crate::kms::key_ref::id_text;
use crate::kms::{Exception, KmsError};
use getrandom::SysRng;
use hmac::{Hmac, KeyInit, Mac};
use rsa::pkcs8::{DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey};
use rsa::rand_core::UnwrapErr;
use rsa::traits::PublicKeyParts;
use rsa::{Oaep, PrivateKey, PublicKey};
use sha2::Sha256;
use uuid::Uuid;
use zeroize::{Zeroize, Zeroizing};

const DAY: i64 = 24 * 3_600_000;
const LABEL: &str = "import";
/// The one way to wrap material that is offered.
pub const WRAPPING_ALGORITHM: &str = "RSAES_OAEP_SHA_256";

/// Sizes of the RSA key that wraps material, by their names on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrappingKeySpec {
    /// RSA_2048.
    Rsa2048,
    /// RSA_3072.
    Rsa3072,
    /// RSA_4096.
    Rsa4096,
}

/// What GetParametersForImport answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportParameters {
    /// The key's ARN.
    pub key: String,
    /// To be given back with the material.
    pub token: Vec<u8>,
    /// What to wrap the material with: SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
    /// Until when: milliseconds since 1970.
    pub valid_to: i64,
}

/// A key and one of its versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportedMaterial {
    /// The key's ARN.
    pub key: String,
    /// KeyMaterialId.
    pub material: String,
}

impl WrappingKeySpec {
    /// The size of this name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "RSA_2048" => Some(WrappingKeySpec::Rsa2048),
            "RSA_3072" => Some(WrappingKeySpec::Rsa3072),
            "RSA_4096" => Some(WrappingKeySpec::Rsa4096),
            _ => None,
        }
    }

    fn bits(self) -> usize {
        match self {
            WrappingKeySpec::Rsa2048 => 2048,
            WrappingKeySpec::Rsa3072 => 3072,
            WrappingKeySpec::Rsa4096 => 4096,
        }
    }
}

impl Embedded {
    /// GetParametersForImport. They are good for a day.
    pub fn import_parameters(&self, key: &str, spec: WrappingKeySpec) -> Result<ImportParameters, KmsError> {
        self.importable(key)?;
        // Before the store is locked: this can take seconds.
        let (public_key, secret) = one_time_key(spec)?;
        let valid_to = self.log.now().wall + DAY;
        let parameters = self.log.read(|log| {
            let entry = self.check_importable(log.state().key(key, &self.place)?)?;
            let mut token = Zeroizing::new(Vec::with_capacity(HEAD_LEN + secret.len()));
            token.extend_from_slice(entry.id.as_bytes());
            token.extend_from_slice(&valid_to.to_be_bytes());
            token.extend_from_slice(&secret);
            let token = log.keys().seal_token(LABEL, &token)?;
            Ok(ImportParameters {
                key: self.place.key_arn(entry.id),
                token,
                public_key: public_key.clone(),
                valid_to,
            })
        });
        let call = Call::new("GetParametersForImport").on(key);
        self.record(call.with("wrappingKeySpec", format!("RSA_{}", spec.bits())), parameters)
    }

    /// ImportKeyMaterial: 32 bytes, wrapped as the parameters say; `expires` is when the KMS forgets them.
    ///
    /// Only the material that the key had before can be imported again.
    pub fn import(
        &self,
        key: &str,
        token: &[u8],
        wrapped: &[u8],
        expires: Option<i64>,
    ) -> Result<ImportedMaterial, KmsError> {
        let now = self.log.now().wall;
        check_expiry(expires, now)?;
        let imported = self.import_now(key, token, wrapped, expires, now);
        let call = Call::new("ImportKeyMaterial").on(key).with("validTo", expires);
        self.record(call, imported)
    }

    /// ImportKeyMaterial, of whoever has both the material and this KMS, for so many days if it is not for
    /// good.
    pub fn import_material(
        &self,
        key: &str,
        material: &Material,
        days: Option<u32>,
    ) -> Result<ImportedMaterial, KmsError> {
        let now = self.log.now().wall;
        let expires = days.map(|days| now.saturating_add(i64::from(days) * DAY));
        check_expiry(expires, now)?;
        let imported = self.import_opened(key, material, expires);
        let call = Call::new("ImportKeyMaterial").on(key).with("validTo", expires);
        self.record(call, imported)
    }

    fn import_now(
        &self,
        key: &str,
        token: &[u8],
        wrapped: &[u8],
        expires: Option<i64>,
        now: i64,
    ) -> Result<ImportedMaterial, KmsError> {
        let id = self.importable(key)?;
        let token = self.log.read(|log| open_token(log.keys(), token, id, now))?;
        let material = unwrap(&token, wrapped, b"")?;
        self.import_opened(&id_text(id), &material, expires)
    }

    fn import_opened(
        &self,
        key: &str,
        material: &Material,
        expires: Option<i64>,
    ) -> Result<ImportedMaterial, KmsError> {
        self.log.write(|log, now| {
            let entry = self.check_importable(log.state().key(key, &self.place)?)?;
            let after = self.with_material(log.keys(), entry, material, expires, now.time)?;
            let answer = self.imported(&after);
            Ok((vec![Change::Key(after)], answer))
        })
    }

    /// DeleteImportedKeyMaterial: the key waits for import afterwards; returns `None` if it did already.
    pub fn delete_material(&self, key: &str) -> Result<(String, Option<String>), KmsError> {
        let deleted = self.log.write(|log, _| {
            let entry = self.check_importable(log.state().key(key, &self.place)?)?;
            let arn = self.place.key_arn(entry.id);
            if entry.versions.is_empty() {
                return Ok((Vec::new(), (arn, None)));
            }
            let material = self.imported(entry).material;
            Ok((vec![Change::Key(without_material(entry))], (arn, Some(material))))
        });
        self.record(Call::new("DeleteImportedKeyMaterial").on(key), deleted)
    }

    fn with_material(
        &self,
        keys: &LogKeys,
        key: &KeyEntry,
        material: &Material,
        expires: Option<i64>,
        time: i64,
    ) -> Result<KeyEntry, KmsError> {
        let external =
            key.external.clone().ok_or_else(|| KmsError::Internal("a key of another origin".into()))?;
        let is_first = key.multi_region.is_some() && external.fingerprint.is_none();
        let external = match key.multi_region.is_some() {
            true => self.marked(keys, key, external, material)?,
            false => checked(keys, key.id, external, material)?,
        };
        let sealed = keys.seal(key.id, external.version, material)?;
        let version =
            VersionEntry { id: external.version, created: time, rotation: None, waits: false, sealed };
        let after = KeyEntry {
            enabled: key.enabled || key.versions.is_empty(),
            versions: vec![version],
            external: Some(External { expires, ..external }),
            ..key.clone()
        };
        Ok(if is_first { after.shared_anew() } else { after })
    }

    /// A multi-Region key with the fingerprint of this material, which the primary key's first import makes.
    ///
    /// # Errors
    /// IncorrectKeyMaterialException if it is not that of the primary key.
    fn marked(
        &self,
        keys: &LogKeys,
        key: &KeyEntry,
        external: External,
        material: &Material,
    ) -> Result<External, KmsError> {
        let (arn, made) = (self.place.key_arn(key.id), fingerprint(key.id, material)?);
        if let Some(known) = &external.fingerprint {
            if !same(keys.open(key.id, known.id, &known.sealed)?.bytes(), made.bytes()) {
                return Err(incorrect(format!(
                    "The key material is not the material that {arn} and its related keys had before."
                )));
            }
            return Ok(external);
        }
        if key.is_replica_in(&self.place.region) {
            let primary = self.place.in_region(&key.related()?.primary).key_arn(key.id);
            return Err(incorrect(format!(
                "No key material is known of {primary} yet: import it there first. If that is done, {arn} \
                 has not heard of it yet."
            )));
        }
        let id = Uuid::new_v4();
        let sealed = keys.seal(key.id, id, &made)?;
        Ok(External { fingerprint: Some(Box::new(Fingerprint { id, sealed })), ..external })
    }

    fn imported(&self, key: &KeyEntry) -> ImportedMaterial {
        let version = key.external.as_ref().map_or(Uuid::nil(), |external| external.version);
        ImportedMaterial { key: self.place.key_arn(key.id), material: material_id(key.id, version) }
    }

    fn importable(&self, key: &str) -> Result<Uuid, KmsError> {
        self.current(|log| Ok(self.check_importable(log.state().key(key, &self.place)?)?.id))
    }

    fn check_importable<'a>(&self, key: &'a KeyEntry) -> Result<&'a KeyEntry, KmsError> {
        key.check_origin(true, &self.place)?;
        key.check_alive(&self.place)?;
        Ok(key)
    }
}

fn check_expiry(expires: Option<i64>, now: i64) -> Result<(), KmsError> {
    if expires.is_some_and(|at| at <= now || at > now + 365 * DAY) {
        return Err(KmsError::Validation("ValidTo must lie in the future, and within 365 days.".into()));
    }
    Ok(())
}

/// The key as it is without its imported material.
pub fn without_material(key: &KeyEntry) -> KeyEntry {
    let external = key.external.clone().map(|external| External { expires: None, ..external });
    KeyEntry { external, versions: Vec::new(), ..key.clone() }
}

/// A key of one region with what it remembers of this material.
///
/// # Errors
/// IncorrectKeyMaterialException if it had another one before.
fn checked(keys: &LogKeys, key: Uuid, external: External, material: &Material) -> Result<External, KmsError> {
    let check = hex::encode(keys.mac("imported material", &[key.as_bytes(), material.bytes()]));
    if external.check.as_ref().is_some_and(|known| !same(known.as_bytes(), check.as_bytes())) {
        return Err(incorrect("The key material is not the material that this key had before.".into()));
    }
    Ok(External { check: Some(check), ..external })
}

/// What of this material all relatives of `key` know. Nothing of the material follows from it but, for who
/// guesses, that it is the same.
fn fingerprint(key: Uuid, material: &Material) -> Result<Material, KmsError> {
    let mut mac =
        <Hmac<Sha256> as KeyInit>::new_from_slice(material.bytes()).expect("HMAC takes a key of any length");
    mac.update(b"sealblk imported material of a multi-Region key\0");
    mac.update(key.as_bytes());
    let mut bytes = mac.finalize().into_bytes();
    let made = Material::filled(|made| {
        made.copy_from_slice(&bytes);
        Ok(())
    });
    bytes.zeroize();
    made
}

/// IncorrectKeyMaterialException.
fn incorrect(message: String) -> KmsError {
    KmsError::Other(Exception::IncorrectKeyMaterial, message)
}

/// Bytes of a token before the private key: key id, and until when it is good.
const HEAD_LEN: usize = 24;

/// The private key in a token, PKCS#8.
fn open_token(keys: &LogKeys, token: &[u8], key: Uuid, now: i64) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    let invalid = || {
        KmsError::Other(Exception::InvalidImportToken, "The import token is not one of this key's.".into())
    };
    let opened = keys.open_token(LABEL, token).ok_or_else(invalid)?;
    let (id, rest) = opened.split_first_chunk::<16>().ok_or_else(invalid)?;
    let (valid_to, private) = rest.split_first_chunk::<8>().ok_or_else(invalid)?;
    if id != key.as_bytes() {
        return Err(invalid());
    }
    if i64::from_be_bytes(*valid_to) <= now {
        return Err(KmsError::Other(
            Exception::ExpiredImportToken,
            "The import token has expired; get new parameters and wrap the material again.".into(),
        ));
    }
    Ok(Zeroizing::new(private.to_vec()))
}

/// An RSA key for one message: what to wrap with (SubjectPublicKeyInfo, DER), and the private key (PKCS#8,
/// DER). This can take seconds.
pub(super) fn one_time_key(spec: WrappingKeySpec) -> Result<(Vec<u8>, Zeroizing<Vec<u8>>), KmsError> {
    let private = PrivateKey::new(&mut UnwrapErr(SysRng), spec.bits()).map_err(rsa_failed)?;
    let public = private.to_public_key().to_public_key_der().map_err(rsa_failed)?.into_vec();
    Ok((public, private.to_pkcs8_der().map_err(rsa_failed)?.to_bytes()))
}

/// `material`, wrapped with a key of this size that somebody else has given, for what `label` says.
///
/// # Errors
/// Validation for what is no such key.
pub(super) fn wrap(
    public: &[u8],
    material: &Material,
    spec: WrappingKeySpec,
    label: &[u8],
) -> Result<Vec<u8>, KmsError> {
    let other = || KmsError::Validation(format!("What to wrap with is no RSA key of {} bits.", spec.bits()));
    let public = PublicKey::from_public_key_der(public).map_err(|_| other())?;
    if public.size() * 8 != spec.bits() {
        return Err(other());
    }
    let padding = Oaep::<Sha256>::new_with_label(label);
    public.encrypt(&mut UnwrapErr(SysRng), padding, material.bytes()).map_err(rsa_failed)
}

/// What was wrapped with the public key of this private one (PKCS#8), for what `label` says.
///
/// # Errors
/// InvalidCiphertext for what was not; IncorrectKeyMaterialException if it has not 32 bytes.
pub(super) fn unwrap(private: &[u8], wrapped: &[u8], label: &[u8]) -> Result<Material, KmsError> {
    let private = PrivateKey::from_pkcs8_der(private).map_err(rsa_failed)?;
    let padding = Oaep::<Sha256>::new_with_label(label);
    let opened = private.decrypt_blinded(&mut UnwrapErr(SysRng), padding, wrapped);
    let opened = Zeroizing::new(opened.map_err(|_| KmsError::InvalidCiphertext)?);
    let opened: &[u8; 32] = opened[..].try_into().map_err(|_| {
        let message = "The key material of a symmetric key must have 32 bytes.";
        KmsError::Other(Exception::IncorrectKeyMaterial, message.into())
    })?;
    Material::copy_of(opened)
}

fn rsa_failed(e: impl std::fmt::Display) -> KmsError {
    KmsError::Internal(format!("RSA: {e}"))
}
