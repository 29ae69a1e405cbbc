//! The data encryption key of a volume, and what is derived from it besides the cipher.
//!
//! The key stays in [`SecretMem`] from the moment the host process has it until it is dropped. The type has
//! no Debug, no Clone and no Serialize: it can be used, not shown.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::crypt::secret_mem::{SecretMem, on_scrubbed_stack};
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// A volume's 64-byte data encryption key (AES-256-XTS: two AES-256 keys, data key ‖ tweak key).
pub struct Dek(SecretMem);

impl Dek {
    /// Length in bytes.
    pub const LEN: usize = 64;

    /// Length in bytes of a data key that is [passed](PassKey::pass).
    pub const PASSED_LEN: usize = Self::LEN + 32;

    /// Takes the key that `mem` holds.
    ///
    /// # Errors
    /// `Corrupt` unless it is 64 bytes with two different halves: with equal ones XTS falls to chosen
    /// ciphertexts (FIPS 140-3 IG C.I asks for the check, before use).
    pub fn from_secret(mem: SecretMem) -> Result<Self> {
        check_len(mem.len())?;
        let (data, tweak) = mem.as_slice().split_at(Self::LEN / 2);
        if bool::from(data.ct_eq(tweak)) {
            return Err(Error::new(
                Kind::Corrupt,
                "both halves of the data key are the same, which AES-XTS forbids; the key was not made at \
                 random",
            ));
        }
        Ok(Dek(mem))
    }

    /// Copies a key into secret memory; for tests and library users that have it as plain bytes, which stay
    /// theirs to wipe.
    ///
    /// # Errors
    /// As [`Dek::from_secret`] and [`SecretMem::new`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        check_len(bytes.len())?;
        let mut mem = SecretMem::new(Self::LEN)?;
        mem.as_mut_slice().copy_from_slice(bytes);
        Self::from_secret(mem)
    }

    /// The key of a layer that is not encrypted and lies above another: no secret, since it follows from the
    /// layer's id. It keeps zeros that are written from being zeros in the file. HKDF-SHA256, no salt, info
    /// `sealblk layer mask v1`, 64 bytes.
    ///
    /// # Errors
    /// As [`SecretMem::new`].
    pub fn mask_of_layer(id: &[u8; 16]) -> Result<Self> {
        let mut mem = SecretMem::new(Self::LEN)?;
        expand(id, None, b"sealblk layer mask v1", mem.as_mut_slice());
        Self::from_secret(mem)
    }

    /// A value that tells whether an unwrapped key is the one a layer was written with, without helping to
    /// find it: HKDF-SHA256 (RFC 5869), no salt, info `sealblk key check v1`, 16 bytes.
    pub fn check_value(&self) -> [u8; 16] {
        let mut value = [0; 16];
        on_scrubbed_stack(|| expand(self.bytes(), None, b"sealblk key check v1", &mut value));
        value
    }

    /// HMAC-SHA256 of `message` for a volume's metadata, under HKDF-SHA256 of this key with salt `volume_id`
    /// and info `sealblk metadata v1` (32 bytes). Compare it in constant time.
    pub fn metadata_mac(&self, volume_id: &str, message: &[u8]) -> [u8; 32] {
        let mut tag = [0; 32];
        on_scrubbed_stack(|| {
            let mut key = Zeroizing::new([0; SealKey::LEN]);
            expand(self.bytes(), Some(volume_id.as_bytes()), SealKey::INFO, &mut *key);
            tag = hmac(&*key, message);
        });
        tag
    }

    /// What [`Dek::metadata_mac`] derives on its way, for those who have to seal metadata
    /// when the data key is gone.
    ///
    /// # Errors
    /// As [`SecretMem::new`].
    pub fn seal_key(&self, volume_id: &str) -> Result<SealKey> {
        let mut key = SecretMem::new(SealKey::LEN)?;
        on_scrubbed_stack(|| {
            expand(self.bytes(), Some(volume_id.as_bytes()), SealKey::INFO, key.as_mut_slice());
        });
        Ok(SealKey(Arc::new(key)))
    }

    /// The key under which other data keys are passed to whoever has this one.
    ///
    /// # Errors
    /// If no memory can be locked.
    pub fn pass_key(&self) -> Result<PassKey> {
        let mut key = SecretMem::new(PassKey::LEN)?;
        on_scrubbed_stack(|| expand(self.bytes(), None, PassKey::INFO, key.as_mut_slice()));
        Ok(PassKey(Arc::new(key)))
    }

    /// Writes into `out` what [`BackupKeys`] of the volume `volume_id` are made of.
    ///
    /// # Panics
    /// Unless `out` has [`BackupKeys::LEN`] bytes.
    pub fn write_backup_keys(&self, volume_id: &str, out: &mut [u8]) {
        assert_eq!(out.len(), BackupKeys::LEN, "room for three keys");
        on_scrubbed_stack(|| {
            let (names, rest) = out.split_at_mut(BackupKeys::KEY);
            let (manifests, seal) = rest.split_at_mut(BackupKeys::KEY);
            expand(self.bytes(), None, BackupKeys::NAMES, names);
            expand(self.bytes(), None, BackupKeys::MANIFESTS, manifests);
            expand(self.bytes(), Some(volume_id.as_bytes()), SealKey::INFO, seal);
        });
    }

    /// The key itself, data key ‖ tweak key. For tests that decrypt a layer with other software, and for a
    /// user who takes his data elsewhere; the program itself has no use for it.
    pub fn expose(&self) -> &[u8; Self::LEN] {
        self.bytes()
    }

    /// The data key and the tweak key, for the engines.
    pub(in crate::crypt) fn halves(&self) -> (&[u8; 32], &[u8; 32]) {
        let (halves, _) = self.bytes().as_chunks();
        (&halves[0], &halves[1])
    }

    fn bytes(&self) -> &[u8; Self::LEN] {
        self.0.as_slice().try_into().expect("from_secret checked the length")
    }
}

/// The key of the MAC over a volume's metadata. It opens no data. Copies of this are the same memory.
#[derive(Clone)]
pub struct SealKey(Arc<SecretMem>);

impl SealKey {
    const LEN: usize = 32;
    const INFO: &[u8] = b"sealblk metadata v1";

    /// What [`Dek::metadata_mac`] returns for the data key that this key is from.
    pub fn mac(&self, message: &[u8]) -> [u8; 32] {
        let mut tag = [0; 32];
        on_scrubbed_stack(|| tag = hmac(self.0.as_slice(), message));
        tag
    }
}

/// What is derived from a data key for those who carry ciphertext to another place and back: the key of the
/// names of objects, that of the MAC over manifests, and that of the volume's seal. They open no data, and
/// nothing of the data key follows from them.
pub struct BackupKeys(SecretMem);

impl BackupKeys {
    const KEY: usize = 32;
    /// Length in bytes.
    pub const LEN: usize = 3 * Self::KEY;
    const NAMES: &[u8] = b"sealblk backup names v1";
    const MANIFESTS: &[u8] = b"sealblk backup manifests v1";

    /// Takes the keys that `mem` holds, as [`Dek::write_backup_keys`] wrote them.
    ///
    /// # Errors
    /// `Corrupt` for another length.
    pub fn from_secret(mem: SecretMem) -> Result<Self> {
        match mem.len() == Self::LEN {
            true => Ok(BackupKeys(mem)),
            false => Err(Error::new(Kind::Corrupt, "the keys of names and manifests did not come whole")),
        }
    }

    /// The name of an object with these bytes: HMAC-SHA256 under HKDF-SHA256 of the data key (no salt, info
    /// `sealblk backup names v1`).
    pub fn name(&self, bytes: &[u8]) -> [u8; 32] {
        hmac(self.key(0), bytes)
    }

    /// The MAC of a manifest: HMAC-SHA256 under HKDF-SHA256 of the data key (no salt, info
    /// `sealblk backup manifests v1`). Compare it in constant time.
    pub fn manifest_mac(&self, message: &[u8]) -> [u8; 32] {
        hmac(self.key(1), message)
    }

    /// What [`Dek::metadata_mac`] returns for the data key and volume that these keys are from.
    pub fn seal(&self, message: &[u8]) -> [u8; 32] {
        hmac(self.key(2), message)
    }

    fn key(&self, n: usize) -> &[u8] {
        &self.0.as_slice()[n * Self::KEY..][..Self::KEY]
    }
}

/// The key that passes data keys to whoever has the data key that it is from. It opens no data. Copies of
/// this are the same memory.
#[derive(Clone)]
pub struct PassKey(Arc<SecretMem>);

impl PassKey {
    const LEN: usize = 32;
    const INFO: &[u8] = b"sealblk passed key v1";

    /// Writes the data key `other` into `out` so that only whoever has this key reads it: masked, and with a
    /// MAC. `context`, which must be another one each time, is what the data key is for: without it, or with
    /// another one, nobody reads it.
    ///
    /// HKDF-SHA256 of this key, salt `context`, info `sealblk passed key v1`, 96 bytes: 64 to mask the other
    /// one, by XOR, and 32 for an HMAC-SHA256 over what comes of that.
    ///
    /// # Panics
    /// Unless `other` has [`Dek::LEN`] bytes and `out` [`Dek::PASSED_LEN`].
    pub fn pass(&self, other: &[u8], context: &[u8], out: &mut [u8]) {
        assert_eq!(
            (other.len(), out.len()),
            (Dek::LEN, Dek::PASSED_LEN),
            "a data key, and room for one that is passed"
        );
        on_scrubbed_stack(|| {
            let keys = self.keys(context);
            let (mask, mac) = keys.split_at(Dek::LEN);
            let (masked, tag) = out.split_at_mut(Dek::LEN);
            masked.iter_mut().zip(other).zip(mask).for_each(|((to, from), mask)| *to = from ^ mask);
            tag.copy_from_slice(&hmac(mac, masked));
        });
    }

    /// Reads what [`PassKey::pass`] wrote under this key.
    ///
    /// # Errors
    /// `Corrupt` for what was written under another key, or for another `context`; as [`Dek::from_secret`].
    pub fn take(&self, passed: &[u8], context: &[u8]) -> Result<Dek> {
        if passed.len() != Dek::PASSED_LEN {
            return Err(Error::new(Kind::Corrupt, "the new data key did not come as it should"));
        }
        let mut mem = SecretMem::new(Dek::LEN)?;
        let is_it = on_scrubbed_stack(|| {
            let keys = self.keys(context);
            let (mask, mac) = keys.split_at(Dek::LEN);
            let (masked, tag) = passed.split_at(Dek::LEN);
            let to = mem.as_mut_slice().iter_mut();
            to.zip(masked).zip(mask).for_each(|((to, from), mask)| *to = from ^ mask);
            bool::from(hmac(mac, masked)[..].ct_eq(tag))
        });
        match is_it {
            true => Dek::from_secret(mem),
            false => Err(Error::new(
                Kind::Corrupt,
                "the new data key was not passed under the data key that the volume has",
            )),
        }
    }

    fn keys(&self, context: &[u8]) -> Zeroizing<[u8; Dek::PASSED_LEN]> {
        let mut keys = Zeroizing::new([0; Dek::PASSED_LEN]);
        expand(self.0.as_slice(), Some(context), Self::INFO, &mut *keys);
        keys
    }
}

fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(message);
    mac.finalize().into_bytes().into()
}

fn check_len(len: usize) -> Result<()> {
    if len == Dek::LEN {
        return Ok(());
    }
    let message =
        format!("a data key is {} bytes, this one has {len}; it was not made for a volume", Dek::LEN);
    Err(Error::new(Kind::Corrupt, message))
}

fn expand(key: &[u8], salt: Option<&[u8]>, info: &[u8], out: &mut [u8]) {
    Hkdf::<Sha256>::new(salt, key).expand(info, out).expect("at most 255 hashes long");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Vec<u8> {
        (0..64).collect()
    }

    fn refusal(bytes: &[u8]) -> Error {
        Dek::from_bytes(bytes).err().expect("refused")
    }

    #[test]
    fn other_lengths_are_refused_in_plain_words() {
        for len in [0, 1, 32, 63, 65, 128] {
            let e = refusal(&vec![7; len]);
            assert_eq!(e.kind(), Kind::Corrupt);
            assert!(e.to_string().contains(&format!("this one has {}", len)), "{e}");
        }
    }

    #[test]
    fn equal_halves_are_refused() {
        let mut bytes = [0x5a; 64];
        assert_eq!(refusal(&bytes).kind(), Kind::Corrupt);
        bytes[63] ^= 1;
        assert!(Dek::from_bytes(&bytes).is_ok());
    }

    #[test]
    fn halves_are_data_key_then_tweak_key() {
        let dek = Dek::from_bytes(&key()).unwrap();
        let (data, tweak) = dek.halves();
        assert_eq!((data[0], data[31], tweak[0], tweak[31]), (0, 31, 32, 63));
        assert_eq!(&dek.expose()[..], &key()[..]);
    }

    #[test]
    fn a_passed_key_is_read_by_who_has_the_other_one_and_knows_what_it_is_for() {
        let pass_key = |bytes: &[u8]| Dek::from_bytes(bytes).unwrap().pass_key().unwrap();
        let (dek, new): (_, Vec<u8>) = (pass_key(&key()), (100..164).collect());
        let mut passed = [0; Dek::PASSED_LEN];
        dek.pass(&new, b"context", &mut passed);
        assert_eq!(&dek.take(&passed, b"context").unwrap().expose()[..], &new[..]);
        let other = pass_key(&new);
        assert!(other.take(&passed, b"context").is_err() && dek.take(&passed, b"contexu").is_err());
        assert!(dek.take(&passed[..95], b"context").is_err());
        for at in 0..passed.len() {
            let mut changed = passed;
            changed[at] ^= 1;
            assert!(dek.take(&changed, b"context").is_err(), "byte {at}");
        }
        let mut again = [0; Dek::PASSED_LEN];
        dek.pass(&new, b"another", &mut again);
        assert_ne!(passed[..64], again[..64], "each context has a mask of its own");
    }

    // Expected values computed with Python's hmac and hashlib by the formulas of RFC 5869 and RFC 2104.
    #[test]
    fn check_value_is_the_documented_hkdf() {
        let value = Dek::from_bytes(&key()).unwrap().check_value();
        assert_eq!(hex::encode(value), "40fe90b3f93910fb746f795a37987033");
    }

    #[test]
    fn metadata_mac_is_the_documented_hmac_and_bound_to_the_volume() {
        let dek = Dek::from_bytes(&key()).unwrap();
        let mac = dek.metadata_mac("vol-0123456789abcdef0", b"metadata");
        assert_eq!(hex::encode(mac), "e66f7dbe47dbf1c7f985602740b1137539a796fb51d8e78979251c8d15eafbd6");
        assert_ne!(mac, dek.metadata_mac("vol-0123456789abcdef1", b"metadata"));
        assert_ne!(mac, dek.metadata_mac("vol-0123456789abcdef0", b"metadatb"));
        assert_eq!(mac, dek.seal_key("vol-0123456789abcdef0").unwrap().mac(b"metadata"));
    }

    // Expected values computed with Python's hmac and hashlib.
    #[test]
    fn backup_keys_are_the_documented_ones() {
        let dek = Dek::from_bytes(&key()).unwrap();
        let mut mem = SecretMem::new(BackupKeys::LEN).unwrap();
        dek.write_backup_keys("vol-0123456789abcdef0", mem.as_mut_slice());
        let keys = BackupKeys::from_secret(mem).unwrap();
        assert_eq!(
            hex::encode(keys.name(b"block")),
            "5b2e5902436013b6ab1a6eef70c4cee9aa4b7003cea09cded67b7e028121cede"
        );
        assert_eq!(
            hex::encode(keys.manifest_mac(b"line")),
            "db874d029d37813dfded25801a21091b457b52769a3a833db35c1587c16c5fa7"
        );
        assert_eq!(keys.seal(b"metadata"), dek.metadata_mac("vol-0123456789abcdef0", b"metadata"));
        assert!(BackupKeys::from_secret(SecretMem::new(64).unwrap()).is_err());
    }
}
