//! A root key under a passphrase: `sealblk-kms-wrapped-root-key-1:argon2id:<m>:<t>:<p>:<salt>:<sealed>`.
//!
//! Memory in KiB, passes and lanes are Argon2id's (RFC 9106) and decimal; salt (16 bytes) and what is
//! sealed (IV 12, key 32, tag 16) are hex. It is sealed by AES-256-GCM under the 32 bytes that Argon2id
//! makes of passphrase and salt; the additional data is the store's id and everything before `<sealed>`,
//! so that no parameter can be changed and no key be put under another store's name. Pure: it asks
//! nobody and opens no file.

use crate::kms::KmsError;
use crate::kms::embedded::blob::random;
use crate::kms::embedded::keys::RootKey;
use crate::kms::embedded::root_key::passphrase::Passphrase;
use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use uuid::Uuid;
use zeroize::Zeroizing;

const PREFIX: &str = "sealblk-kms-wrapped-root-key-1:argon2id";
const SALT_LEN: usize = 16;
const SEALED_LEN: usize = 12 + 32 + 16;
/// What RFC 9106 recommends where 2 GiB are too much: 64 MiB, three passes, four lanes.
const MEMORY: u32 = 64 << 10;
const PASSES: u32 = 3;
const LANES: u32 = 4;
/// Nobody's file makes us use more.
const MEMORY_MAX: u32 = 4 << 20;
const PASSES_MAX: u32 = 1000;

/// A line, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrapped {
    memory: u32,
    passes: u32,
    lanes: u32,
    salt: [u8; SALT_LEN],
    sealed: [u8; SEALED_LEN],
}

impl Wrapped {
    /// Seals `key` for `store` under a passphrase.
    pub fn seal(key: &RootKey, store: Uuid, passphrase: &Passphrase) -> Result<Self, KmsError> {
        let mut wrapped = Wrapped {
            memory: MEMORY,
            passes: PASSES,
            lanes: LANES,
            salt: [0; SALT_LEN],
            sealed: [0; SEALED_LEN],
        };
        random(&mut wrapped.salt)?;
        random(&mut wrapped.sealed[..12])?;
        wrapped.sealed[12..44].copy_from_slice(key.bytes());
        let cipher = wrapped.cipher(passphrase)?;
        let aad = wrapped.additional_data(store);
        let (iv, rest) = wrapped.sealed.split_at_mut(12);
        let (text, tag) = rest.split_at_mut(32);
        let made = cipher
            .encrypt_inout_detached(&nonce(iv), &aad, text.into())
            .map_err(|_| KmsError::Internal("AES-GCM refused 32 bytes".into()))?;
        tag.copy_from_slice(&made);
        Ok(wrapped)
    }

    /// The key, if this is the passphrase and nothing was changed.
    pub fn open(&self, store: Uuid, passphrase: &Passphrase) -> Result<Option<RootKey>, KmsError> {
        let (iv, rest) = self.sealed.split_at(12);
        let (text, tag) = rest.split_at(32);
        let tag = Tag::try_from(tag).expect("the slice has 16 bytes");
        let (cipher, aad) = (self.cipher(passphrase)?, self.additional_data(store));
        let mut opened = false;
        let key = RootKey::filled(|key| {
            key.copy_from_slice(text);
            opened = cipher.decrypt_inout_detached(&nonce(iv), &aad, key.as_mut_slice().into(), &tag).is_ok();
            Ok(())
        })?;
        Ok(opened.then_some(key))
    }

    /// Its line.
    pub fn line(&self) -> String {
        format!("{}{}\n", self.before_sealed(), hex::encode(self.sealed))
    }

    /// Parses a line; `None` if it is another sort of line, or asks for more than is reasonable.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?.trim_ascii_end();
        let fields: Vec<&str> = line.strip_prefix(PREFIX)?.strip_prefix(':')?.split(':').collect();
        let [memory, passes, lanes, salt, sealed] = fields[..] else { return None };
        let number = |text: &str| text.parse::<u32>().ok().filter(|n| n.to_string() == text);
        let mut wrapped = Wrapped {
            memory: number(memory).filter(|n| *n <= MEMORY_MAX)?,
            passes: number(passes).filter(|n| *n <= PASSES_MAX)?,
            lanes: number(lanes)?,
            salt: [0; SALT_LEN],
            sealed: [0; SEALED_LEN],
        };
        hex::decode_to_slice(salt, &mut wrapped.salt).ok()?;
        hex::decode_to_slice(sealed, &mut wrapped.sealed).ok()?;
        wrapped.parameters()?;
        Some(wrapped)
    }

    fn before_sealed(&self) -> String {
        let Wrapped { memory, passes, lanes, salt, .. } = self;
        format!("{PREFIX}:{memory}:{passes}:{lanes}:{}:", hex::encode(salt))
    }

    fn additional_data(&self, store: Uuid) -> Vec<u8> {
        [store.as_bytes(), self.before_sealed().as_bytes()].concat()
    }

    fn parameters(&self) -> Option<Params> {
        Params::new(self.memory, self.passes, self.lanes, Some(32)).ok()
    }

    fn cipher(&self, passphrase: &Passphrase) -> Result<Aes256Gcm, KmsError> {
        let failed = |why: &dyn std::fmt::Display| KmsError::Internal(format!("Argon2id: {why}"));
        let parameters = self.parameters().ok_or_else(|| failed(&"parameters out of range"))?;
        let mut memory = Vec::new();
        memory.try_reserve_exact(parameters.block_count()).map_err(|e| failed(&e))?;
        memory.resize(parameters.block_count(), Block::default());
        let mut memory = Zeroizing::new(memory);
        let mut key = Zeroizing::new([0; 32]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, parameters)
            .hash_password_into_with_memory(passphrase.bytes(), &self.salt, &mut key[..], &mut memory[..])
            .map_err(|e| failed(&e))?;
        Ok(Aes256Gcm::new_from_slice(&key[..]).expect("the key has 32 bytes"))
    }
}

fn nonce(iv: &[u8]) -> Nonce<aes_gcm::aead::consts::U12> {
    Nonce::try_from(iv).expect("the slice has 12 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passphrase(text: &str) -> Passphrase {
        Passphrase::new(text.as_bytes()).unwrap()
    }

    /// Cheap enough to be opened many times.
    fn cheap(key: &RootKey, store: Uuid, given: &Passphrase) -> Wrapped {
        let line = Wrapped::seal(key, store, given).unwrap();
        let mut cheap = Wrapped { memory: 64, passes: 1, lanes: 1, ..line };
        cheap.sealed[12..44].copy_from_slice(key.bytes());
        let cipher = cheap.cipher(given).unwrap();
        let aad = cheap.additional_data(store);
        let (iv, rest) = cheap.sealed.split_at_mut(12);
        let (text, tag) = rest.split_at_mut(32);
        tag.copy_from_slice(&cipher.encrypt_inout_detached(&nonce(iv), &aad, text.into()).unwrap());
        cheap
    }

    #[test]
    fn a_key_opens_with_its_passphrase_for_its_store_alone() {
        let (key, store) = (RootKey::copy_of(&[7; 32]).unwrap(), Uuid::from_u128(1));
        let wrapped = Wrapped::seal(&key, store, &passphrase("correct horse")).unwrap();
        let read = Wrapped::parse(wrapped.line().as_bytes()).unwrap();
        assert_eq!(read, wrapped);
        let opens =
            |store, given: &str| read.open(store, &passphrase(given)).unwrap().map(|key| *key.bytes());
        assert_eq!(opens(store, "correct horse"), Some([7; 32]));
        assert_eq!(opens(store, "correct horses"), None);
        assert_eq!(opens(Uuid::from_u128(2), "correct horse"), None);
    }

    #[test]
    fn no_character_of_a_line_can_be_changed() {
        let (key, store) = (RootKey::copy_of(&[7; 32]).unwrap(), Uuid::from_u128(1));
        let given = passphrase("x");
        let line = cheap(&key, store, &given).line();
        for at in 0..line.len() - 1 {
            let mut changed = line.clone().into_bytes();
            // Another digit; of a number, one that stays small.
            changed[at] = if changed[at] == b'1' { b'2' } else { b'1' };
            if let Some(wrapped) = Wrapped::parse(&changed) {
                assert!(wrapped.open(store, &given).unwrap().is_none(), "character {at}");
            }
        }
    }

    #[test]
    fn lines_that_ask_for_too_much_or_are_none_are_refused() {
        let (salt, sealed) = ("00".repeat(SALT_LEN), "00".repeat(SEALED_LEN));
        let line = |parameters: &str| format!("{PREFIX}:{parameters}:{salt}:{sealed}");
        assert!(Wrapped::parse(line("65536:3:4").as_bytes()).is_some());
        for parameters in
            ["4194305:3:4", "65536:1001:4", "8:1:4", "65536:0:4", "65536:3:0", "+8:1:1", "08:1:1", "8:1"]
        {
            assert!(Wrapped::parse(line(parameters).as_bytes()).is_none(), "{parameters}");
        }
        assert!(Wrapped::parse(&line("65536:3:4").as_bytes()[..200]).is_none());
        assert!(Wrapped::parse(b"").is_none() && Wrapped::parse(&[0xff; 40]).is_none());
    }
}
