//! What is derived from a store's root key, and what it protects: the log's MACs and the material of keys.
//!
//! Pure. Where the root key comes from is `root_key`'s matter.

use crate::audit::AuditKey;
use crate::crypt::secret_mem::{SecretBytes, on_scrubbed_stack};
use crate::kms::KmsError;
use crate::kms::embedded::blob::{Material, random};
use crate::kms::embedded::plain::secret;
use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use hkdf::Hkdf;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use uuid::Uuid;
use zeroize::Zeroizing;

/// A store's root key, in secret memory; copies of this are the same memory.
#[derive(Clone)]
pub struct RootKey(Arc<SecretBytes<32>>);

impl RootKey {
    /// Bytes that `fill` writes, where they are.
    pub fn filled(fill: impl FnOnce(&mut [u8; 32]) -> Result<(), KmsError>) -> Result<Self, KmsError> {
        Ok(RootKey(Arc::new(secret(fill)?)))
    }

    /// A copy of bytes that stay their owner's to wipe.
    pub fn copy_of(bytes: &[u8; 32]) -> Result<Self, KmsError> {
        Self::filled(|copy| {
            copy.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        self.0.as_array()
    }
}

/// Key material as it lies in the log: IV (12 bytes), ciphertext (32), tag (16).
pub const SEALED_LEN: usize = 60;

/// The keys of one KMS's log, in secret memory.
pub struct LogKeys {
    store: Uuid,
    sealing: SecretBytes<32>,
    mac: SecretBytes<32>,
    audit: AuditKey,
}

impl LogKeys {
    /// HKDF-SHA-256 of the root key, with the store's id as salt.
    pub fn derive(root: &RootKey, store: Uuid) -> Result<Self, KmsError> {
        on_scrubbed_stack(|| {
            let hkdf = Hkdf::<Sha256>::new(Some(store.as_bytes()), root.bytes());
            let expand = |label: &[u8]| {
                secret(|key| {
                    hkdf.expand(label, key).expect("32 bytes are one block of HKDF");
                    Ok(())
                })
            };
            Ok(LogKeys {
                store,
                sealing: expand(b"sealblk kms store key")?,
                mac: expand(b"sealblk kms log mac key")?,
                audit: AuditKey::new(store, expand(b"sealblk kms audit key")?),
            })
        })
    }

    /// What the audit log's MACs are made with.
    pub fn audit(&self) -> &AuditKey {
        &self.audit
    }

    /// HMAC-SHA-256 of `label`, a zero byte and the parts. Only the last part may vary in
    /// length for one label.
    pub fn mac(&self, label: &str, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(self.mac.as_array())
            .expect("HMAC takes a key of any length");
        mac.update(label.as_bytes());
        mac.update(&[0]);
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    /// Seals the material of a key's version under the store key.
    pub fn seal(&self, key: Uuid, version: Uuid, material: &Material) -> Result<[u8; SEALED_LEN], KmsError> {
        let mut sealed = [0; SEALED_LEN];
        let (iv, rest) = sealed.split_at_mut(12);
        let (text, tag) = rest.split_at_mut(32);
        random(iv)?;
        text.copy_from_slice(material.bytes());
        let made = self
            .cipher()
            .encrypt_inout_detached(&nonce(iv), &self.aad(key, version), text.into())
            .map_err(|_| KmsError::Internal("AES-GCM refused 32 bytes".into()))?;
        tag.copy_from_slice(&made);
        Ok(sealed)
    }

    /// Opens what `seal` made; Corrupt if it is not what was sealed for this store, key and version.
    pub fn open(&self, key: Uuid, version: Uuid, sealed: &[u8; SEALED_LEN]) -> Result<Material, KmsError> {
        let (iv, rest) = sealed.split_at(12);
        let (text, tag) = rest.split_at(32);
        let tag = Tag::try_from(tag).expect("the slice has 16 bytes");
        Material::filled(|material| {
            material.copy_from_slice(text);
            let aad = self.aad(key, version);
            let opened =
                self.cipher().decrypt_inout_detached(&nonce(iv), &aad, material.as_mut_slice().into(), &tag);
            opened.map_err(|_| {
                KmsError::Corrupt(format!("the material of version {version} of KMS key {key} does not open"))
            })
        })
    }

    /// Seals any bytes under the sealing key; only [`LogKeys::open_token`] with the same label opens them.
    pub fn seal_token(&self, label: &str, bytes: &[u8]) -> Result<Vec<u8>, KmsError> {
        let mut token = vec![0; 12];
        random(&mut token)?;
        // The room is there from the start: growing would leave a copy behind.
        token.reserve_exact(bytes.len() + 16);
        token.extend_from_slice(bytes);
        let (iv, text) = token.split_at_mut(12);
        let tag = self
            .cipher()
            .encrypt_inout_detached(&nonce(iv), &self.token_aad(label), text.into())
            .map_err(|_| KmsError::Internal("AES-GCM refused the length of a token".into()))?;
        token.extend_from_slice(&tag);
        Ok(token)
    }

    /// Opens what `seal_token` made for the same store and label; `None` for anything else.
    pub fn open_token(&self, label: &str, token: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (iv, rest) = token.split_at_checked(12)?;
        let (text, tag) = rest.split_last_chunk::<16>()?;
        let mut bytes = Zeroizing::new(text.to_vec());
        let aad = self.token_aad(label);
        self.cipher()
            .decrypt_inout_detached(&nonce(iv), &aad, bytes.as_mut_slice().into(), &Tag::from(*tag))
            .ok()?;
        Some(bytes)
    }

    fn cipher(&self) -> Aes256Gcm {
        Aes256Gcm::new_from_slice(self.sealing.as_array()).expect("the key has 32 bytes")
    }

    /// Never as long as the additional data of key material.
    fn token_aad(&self, label: &str) -> Vec<u8> {
        let mut aad = vec![0; 48];
        aad[..16].copy_from_slice(self.store.as_bytes());
        aad.push(0);
        aad.extend_from_slice(label.as_bytes());
        aad
    }

    fn aad(&self, key: Uuid, version: Uuid) -> [u8; 48] {
        let mut aad = [0; 48];
        aad[..16].copy_from_slice(self.store.as_bytes());
        aad[16..32].copy_from_slice(key.as_bytes());
        aad[32..].copy_from_slice(version.as_bytes());
        aad
    }
}

fn nonce(iv: &[u8]) -> Nonce<aes_gcm::aead::consts::U12> {
    Nonce::try_from(iv).expect("the slice has 12 bytes")
}

/// Compares MACs in constant time.
pub fn same(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(root: u8, store: u128) -> LogKeys {
        let root = RootKey::copy_of(&[root; 32]).unwrap();
        LogKeys::derive(&root, Uuid::from_u128(store)).unwrap()
    }

    #[test]
    fn material_opens_only_where_it_was_sealed() {
        let (key, version) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let sealed = keys(1, 1).seal(key, version, &Material::copy_of(&[5; 32]).unwrap()).unwrap();
        assert_eq!(keys(1, 1).open(key, version, &sealed).unwrap().bytes(), &[5; 32]);
        let refused = |keys: LogKeys, key, version, sealed: &[u8; SEALED_LEN]| {
            assert!(matches!(keys.open(key, version, sealed), Err(KmsError::Corrupt(_))));
        };
        refused(keys(2, 1), key, version, &sealed);
        refused(keys(1, 2), key, version, &sealed);
        refused(keys(1, 1), version, version, &sealed);
        refused(keys(1, 1), key, key, &sealed);
        for at in 0..SEALED_LEN {
            let mut changed = sealed;
            changed[at] ^= 1;
            refused(keys(1, 1), key, version, &changed);
        }
    }
}
