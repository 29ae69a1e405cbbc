//! The ciphertext blob of the embedded KMS: what a wrapped data key looks like.
//!
//! Pure: bytes and key material in, bytes out. It does not know which keys exist or what state they are in.
//! docs/kms-store.md describes the format byte by byte.

use crate::crypt::secret_mem::SecretBytes;
use crate::kms::embedded::kbkdf;
use crate::kms::embedded::plain::secret;
use crate::kms::{EncryptionContext, KmsError};
use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use uuid::Uuid;
use zeroize::Zeroizing;

/// The 32 secret bytes of one version of a KMS key, in secret memory; nothing can print them.
pub struct Material(SecretBytes<32>);

impl Material {
    /// Bytes that `fill` writes, where they are.
    pub fn filled(fill: impl FnOnce(&mut [u8; 32]) -> Result<(), KmsError>) -> Result<Self, KmsError> {
        secret(fill).map(Material)
    }

    /// A copy of bytes that stay their owner's to wipe.
    pub fn copy_of(bytes: &[u8; 32]) -> Result<Self, KmsError> {
        Self::filled(|copy| {
            copy.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// New random bytes.
    pub fn random() -> Result<Self, KmsError> {
        Self::filled(|bytes| random(bytes))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        self.0.as_array()
    }
}

/// Bytes before the ciphertext: magic, algorithm, key id, version id, nonce.
pub const HEADER_LEN: usize = 61;
/// Bytes after it.
pub const TAG_LEN: usize = 16;
/// The longest plaintext of Encrypt.
pub const PLAINTEXT_MAX: usize = 4096;

const MAGIC: [u8; 4] = *b"SBLK";
/// AES-256-GCM under a key and IV that KBKDF-HMAC-SHA256 makes from the version's material and the nonce.
const ALGORITHM: u8 = 1;
/// AES-256-GCM in an HSM, under the key itself. The nonce is the IV and zeros.
const ALGORITHM_OF_HSM: u8 = 2;
/// Bytes of the header before the nonce.
const HEAD_LEN: usize = 37;
/// Bytes of an IV.
pub const IV_LEN: usize = 12;
const LABEL: &[u8] = b"sealblk kms blob key";

/// A blob whose form is right; whether it is authentic only [`open`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob<'a> {
    /// The KMS key that it names.
    pub key: Uuid,
    /// The version of that key.
    pub version: Uuid,
    /// Whether it was made in an HSM, by a key that is nowhere else.
    pub is_of_hsm: bool,
    header: &'a [u8; HEADER_LEN],
    ciphertext: &'a [u8],
    tag: &'a [u8; TAG_LEN],
}

impl<'a> Blob<'a> {
    /// Cuts a blob into its parts. Anything that this version did not make is InvalidCiphertext.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, KmsError> {
        Self::split(bytes).ok_or(KmsError::InvalidCiphertext)
    }

    fn split(bytes: &'a [u8]) -> Option<Self> {
        let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>()?;
        let (ciphertext, tag) = rest.split_last_chunk::<TAG_LEN>()?;
        let is_of_hsm = header[4] == ALGORITHM_OF_HSM;
        let is_padded = header[HEAD_LEN + IV_LEN..].iter().all(|byte| *byte == 0);
        let known = header[..4] == MAGIC && (header[4] == ALGORITHM || (is_of_hsm && is_padded));
        if !known || ciphertext.is_empty() || ciphertext.len() > PLAINTEXT_MAX {
            return None;
        }
        let id = |at: usize| Uuid::from_slice(&header[at..at + 16]).ok();
        Some(Blob { key: id(5)?, version: id(21)?, is_of_hsm, header, ciphertext, tag })
    }

    /// The IV that an HSM has used.
    pub fn iv(&self) -> &'a [u8] {
        &self.header[HEAD_LEN..HEAD_LEN + IV_LEN]
    }

    /// Ciphertext and tag, as an HSM takes them.
    pub fn text(&self) -> Vec<u8> {
        [self.ciphertext, self.tag].concat()
    }
}

/// Encrypts `plaintext` (1..=4096 bytes) under one version of a key, bound to `context`.
pub fn seal(
    material: &Material,
    key: Uuid,
    version: Uuid,
    plaintext: &[u8],
    context: &EncryptionContext,
) -> Result<Vec<u8>, KmsError> {
    let mut header = [0; HEADER_LEN];
    header[..HEAD_LEN].copy_from_slice(&head(ALGORITHM, key, version));
    random(&mut header[HEAD_LEN..])?;

    // The room is there from the start: growing would leave a copy of the plaintext behind.
    let mut blob = Vec::with_capacity(HEADER_LEN + plaintext.len() + TAG_LEN);
    blob.extend_from_slice(&header);
    blob.extend_from_slice(plaintext);
    let (cipher, iv) = blob_cipher(material, &header);
    let tag = cipher
        .encrypt_inout_detached(&iv, &aad(&header, context), (&mut blob[HEADER_LEN..]).into())
        .map_err(|_| KmsError::Internal("AES-GCM refused the length of a plaintext".into()))?;
    blob.extend_from_slice(&tag);
    Ok(blob)
}

/// A blob of what an HSM has encrypted by a key, with this IV and the additional data of
/// [`hsm_aad`]: ciphertext and tag.
pub fn of_hsm(key: Uuid, version: Uuid, iv: &[u8; IV_LEN], text: &[u8]) -> Vec<u8> {
    let head = head(ALGORITHM_OF_HSM, key, version);
    [&head[..], iv, &[0; HEADER_LEN - HEAD_LEN - IV_LEN], text].concat()
}

/// The additional data that an HSM is given, for a key and a context. The IV is not in it: an HSM may choose
/// that only then.
pub fn hsm_aad(key: Uuid, version: Uuid, context: &EncryptionContext) -> Vec<u8> {
    aad(&head(ALGORITHM_OF_HSM, key, version), context)
}

fn head(algorithm: u8, key: Uuid, version: Uuid) -> [u8; HEAD_LEN] {
    let mut head = [0; HEAD_LEN];
    head[..4].copy_from_slice(&MAGIC);
    head[4] = algorithm;
    head[5..21].copy_from_slice(key.as_bytes());
    head[21..].copy_from_slice(version.as_bytes());
    head
}

/// Decrypts a blob. A wrong context, a changed byte and a wrong key are one answer: InvalidCiphertext.
pub fn open(
    material: &Material,
    blob: &Blob<'_>,
    context: &EncryptionContext,
) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    if blob.is_of_hsm {
        return Err(KmsError::InvalidCiphertext);
    }
    let mut plaintext = Zeroizing::new(blob.ciphertext.to_vec());
    let (cipher, iv) = blob_cipher(material, blob.header);
    cipher
        .decrypt_inout_detached(
            &iv,
            &aad(blob.header, context),
            plaintext.as_mut_slice().into(),
            &Tag::from(*blob.tag),
        )
        .map_err(|_| KmsError::InvalidCiphertext)?;
    Ok(plaintext)
}

/// Random bytes of the kernel's.
pub fn random(out: &mut [u8]) -> Result<(), KmsError> {
    getrandom::fill(out).map_err(|e| KmsError::Internal(format!("the kernel gave no random bytes: {e}")))
}

fn blob_cipher(
    material: &Material,
    header: &[u8; HEADER_LEN],
) -> (Aes256Gcm, Nonce<aes_gcm::aead::consts::U12>) {
    let mut derived = Zeroizing::new([0; 44]);
    kbkdf::derive(material.bytes(), LABEL, &header[HEAD_LEN..], &mut derived[..]);
    let (key, iv) = derived.split_at(32);
    let cipher = Aes256Gcm::new_from_slice(key).expect("the slice has 32 bytes");
    (cipher, Nonce::try_from(iv).expect("the slice has 12 bytes"))
}

/// Header, number of pairs, and the pairs sorted by key with each string's length before it: two different
/// contexts never give the same bytes.
fn aad(header: &[u8], context: &EncryptionContext) -> Vec<u8> {
    let mut aad = header.to_vec();
    aad.extend_from_slice(&(context.pairs().len() as u32).to_be_bytes());
    for text in context.pairs().iter().flat_map(|(key, value)| [key, value]) {
        aad.extend_from_slice(&(text.len() as u32).to_be_bytes());
        aad.extend_from_slice(text.as_bytes());
    }
    aad
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(plaintext: &[u8], context: &EncryptionContext) -> (Material, Vec<u8>) {
        let material = Material::copy_of(&[7; 32]).unwrap();
        let blob = seal(&material, Uuid::from_u128(1), Uuid::from_u128(2), plaintext, context).unwrap();
        (material, blob)
    }

    #[test]
    fn a_wrapped_data_key_has_141_bytes_and_comes_back() {
        let context = EncryptionContext::pair("aws:ebs:id", "vol-1");
        let (material, blob) = sealed(&[9; 64], &context);
        assert_eq!(blob.len(), 141);
        let parsed = Blob::parse(&blob).unwrap();
        assert_eq!((parsed.key, parsed.version), (Uuid::from_u128(1), Uuid::from_u128(2)));
        assert_eq!(*open(&material, &parsed, &context).unwrap(), vec![9; 64]);
    }

    #[test]
    fn pairs_cannot_be_shifted_between_key_and_value_or_dropped() {
        let (material, blob) = sealed(b"x", &EncryptionContext::pair("ab", "c"));
        let parsed = Blob::parse(&blob).unwrap();
        for other in [
            EncryptionContext::pair("a", "bc"),
            EncryptionContext::pair("abc", ""),
            EncryptionContext::pair("AB", "c"),
            EncryptionContext::default(),
        ] {
            assert_eq!(open(&material, &parsed, &other), Err(KmsError::InvalidCiphertext));
        }
        assert!(open(&material, &parsed, &EncryptionContext::pair("ab", "c")).is_ok());
    }

    #[test]
    fn a_changed_byte_anywhere_never_opens() {
        let context = EncryptionContext::default();
        let (material, blob) = sealed(&[9; 64], &context);
        for at in 0..blob.len() {
            let mut changed = blob.clone();
            changed[at] ^= 1;
            let opened = Blob::parse(&changed).and_then(|b| open(&material, &b, &context));
            assert_eq!(opened, Err(KmsError::InvalidCiphertext), "byte {at}");
        }
    }

    #[test]
    fn a_blob_of_an_hsm_is_not_opened_here_and_its_additional_data_is_its_own() {
        let (key, version) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let bytes = of_hsm(key, version, &[3; IV_LEN], &[4; 80]);
        let blob = Blob::parse(&bytes).unwrap();
        assert_eq!((bytes.len(), blob.iv(), blob.text()), (141, &[3; IV_LEN][..], vec![4; 80]));
        let context = EncryptionContext::default();
        let material = Material::copy_of(&[7; 32]).unwrap();
        assert_eq!(open(&material, &blob, &context), Err(KmsError::InvalidCiphertext));
        for at in HEAD_LEN + IV_LEN..HEADER_LEN {
            let mut changed = bytes.clone();
            changed[at] = 1;
            assert_eq!(Blob::parse(&changed), Err(KmsError::InvalidCiphertext), "byte {at}");
        }
        let of = |key, context: &EncryptionContext| hsm_aad(key, version, context);
        assert_ne!(of(key, &context), of(Uuid::from_u128(3), &context));
        assert_ne!(
            of(key, &EncryptionContext::pair("ab", "c")),
            of(key, &EncryptionContext::pair("a", "bc"))
        );
    }

    #[test]
    fn blobs_of_impossible_lengths_are_refused() {
        let (_, blob) = sealed(b"x", &EncryptionContext::default());
        for len in 0..blob.len() {
            assert_eq!(Blob::parse(&blob[..len]).unwrap_err(), KmsError::InvalidCiphertext);
        }
        let mut long = blob.clone();
        long.resize(HEADER_LEN + PLAINTEXT_MAX + TAG_LEN + 1, 0);
        assert_eq!(Blob::parse(&long).unwrap_err(), KmsError::InvalidCiphertext);
    }
}
