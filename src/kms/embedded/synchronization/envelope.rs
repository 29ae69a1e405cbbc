//! How key material goes from one region to another: wrapped for the KMS there, and for one message.
//!
//! The receiver makes an RSA key for one message. Nothing is stored for it: as for an import, the token *is*
//! the private key, sealed under the receiver's store key together with what it is good for. The sender wraps
//! a fresh key with it (RSAES-OAEP-SHA-256), and under that all material (AES-256-GCM), with the rest of the
//! message as additional data.
#![forbid(unsafe_code)]

use crate::kms::KmsError;
use crate::kms::embedded::blob::Material;
use crate::kms::embedded::import::{WrappingKeySpec, one_time_key, unwrap, wrap};
use crate::kms::embedded::keys::LogKeys;
use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use uuid::Uuid;
use zeroize::Zeroizing;

/// How long a one-time key is good, milliseconds: for one answer and one request.
const GOOD_FOR: i64 = 5 * 60_000;
/// Its size: 128 bits of security.
const SPEC: WrappingKeySpec = WrappingKeySpec::Rsa3072;
/// What a wrapped key and a token are for; no import takes them.
const LABEL: &str = "synchronize";
/// Bytes of material of one version.
const MATERIAL_LEN: usize = 32;
const TAG_LEN: usize = 16;
/// Bytes of a token before the private key: key id, and until when it is good.
const HEAD_LEN: usize = 24;

/// What the receiver gives for one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrapping {
    /// What to wrap with: SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
    /// To be given back with the message.
    pub token: Vec<u8>,
}

/// A message, as it goes over the wire. Has no Debug.
pub struct Message {
    /// What it says, JSON.
    pub shared: String,
    /// The key that the material is under, wrapped.
    pub wrapped_key: Vec<u8>,
    /// The material of all versions, encrypted.
    pub material: Vec<u8>,
}

/// A key for one message, and until when it is good.
pub(super) struct OneTime {
    public_key: Vec<u8>,
    private: Zeroizing<Vec<u8>>,
    valid_to: i64,
}

impl OneTime {
    /// A new one. This can take seconds.
    pub(super) fn new(now: i64) -> Result<Self, KmsError> {
        let (public_key, private) = one_time_key(SPEC)?;
        Ok(OneTime { public_key, private, valid_to: now + GOOD_FOR })
    }

    /// What the region `from` is given, for one message about `key`.
    pub(super) fn wrapping(&self, keys: &LogKeys, from: &str, key: Uuid) -> Result<Wrapping, KmsError> {
        let mut token = Zeroizing::new(Vec::with_capacity(HEAD_LEN + self.private.len()));
        token.extend_from_slice(key.as_bytes());
        token.extend_from_slice(&self.valid_to.to_be_bytes());
        token.extend_from_slice(&self.private);
        Ok(Wrapping {
            token: keys.seal_token(&token_label(from), &token)?,
            public_key: self.public_key.clone(),
        })
    }
}

/// A message that says `shared`, with this material, for whoever has given `wrapping`.
///
/// # Errors
/// `Validation` for what is no key to wrap with; those of the material.
pub fn seal(
    wrapping: &Wrapping,
    shared: String,
    material: impl ExactSizeIterator<Item = Result<Material, KmsError>>,
) -> Result<Message, KmsError> {
    // The room is there from the start: growing would leave a copy behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(material.len() * MATERIAL_LEN + TAG_LEN));
    for material in material {
        bytes.extend_from_slice(material?.bytes());
    }
    let once = Material::random()?;
    let tag = cipher(&once)
        .encrypt_inout_detached(&nonce(), shared.as_bytes(), bytes.as_mut_slice().into())
        .map_err(|_| KmsError::Internal("AES-GCM refused the length of a message".into()))?;
    let wrapped_key = wrap(&wrapping.public_key, &once, SPEC, LABEL.as_bytes())?;
    let material = [&bytes[..], &tag].concat();
    Ok(Message { shared, wrapped_key, material })
}

fn token_label(from: &str) -> String {
    format!("{LABEL} from {from}")
}

/// The private key in a token, PKCS#8.
pub(super) fn open_token(
    keys: &LogKeys,
    from: &str,
    token: &[u8],
    key: Uuid,
    now: i64,
) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    let invalid = || KmsError::Validation("The token is not one of this KMS's for this message.".into());
    let opened = keys.open_token(&token_label(from), token).ok_or_else(invalid)?;
    let (id, rest) = opened.split_first_chunk::<16>().ok_or_else(invalid)?;
    let (valid_to, private) = rest.split_first_chunk::<8>().ok_or_else(invalid)?;
    if id != key.as_bytes() || i64::from_be_bytes(*valid_to) <= now {
        return Err(invalid());
    }
    Ok(Zeroizing::new(private.to_vec()))
}

/// The material of a message that is to have this many pieces of it, in their order.
pub(super) fn open(private: &[u8], pieces: usize, message: &Message) -> Result<Vec<Material>, KmsError> {
    let once = unwrap(private, &message.wrapped_key, LABEL.as_bytes())?;
    let (text, tag) = message.material.split_last_chunk::<TAG_LEN>().ok_or(KmsError::InvalidCiphertext)?;
    if text.len() != pieces * MATERIAL_LEN {
        return Err(KmsError::InvalidCiphertext);
    }
    let mut bytes = Zeroizing::new(text.to_vec());
    cipher(&once)
        .decrypt_inout_detached(
            &nonce(),
            message.shared.as_bytes(),
            bytes.as_mut_slice().into(),
            &Tag::from(*tag),
        )
        .map_err(|_| KmsError::InvalidCiphertext)?;
    let (each, _) = bytes.as_chunks::<MATERIAL_LEN>();
    each.iter().map(Material::copy_of).collect()
}

fn cipher(once: &Material) -> Aes256Gcm {
    Aes256Gcm::new_from_slice(once.bytes()).expect("the key has 32 bytes")
}

/// Each key is random and encrypts one message.
fn nonce() -> Nonce<aes_gcm::aead::consts::U12> {
    Nonce::default()
}
