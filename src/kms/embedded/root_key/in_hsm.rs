//! A root key wrapped by a key in an HSM: `sealblk-kms-hsm-root-key-1:` and hexadecimal JSON, which says
//! where the token is, which key of it, and what that has encrypted.
//!
//! It is encrypted with AES-GCM by the HSM; the additional data is the store's id, so that no line is
//! of use for another store. Which module is loaded the line says, whose file nobody else can write:
//! it is refused otherwise.

use crate::hsm::message::{Answer, Bytes, IV_LEN, Question};
use crate::hsm::{Pin, Place, Problem, Refusal, Token};
use crate::kms::KmsError;
use crate::kms::embedded::blob::random;
use crate::kms::embedded::keys::RootKey;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use uuid::Uuid;

const PREFIX: &str = "sealblk-kms-hsm-root-key-1:";
/// How long the token is waited for.
const TIME: Duration = Duration::from_secs(15);

/// A line, parsed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InHsm {
    /// Where the token is.
    pub place: Place,
    /// CKA_ID of the key that has encrypted it.
    id: Bytes,
    iv: Bytes,
    text: Bytes,
}

impl InHsm {
    /// Has a new key in the token there encrypt the root key of `store`.
    pub fn seal(key: &RootKey, store: Uuid, place: Place, pin: Pin) -> Result<Self, KmsError> {
        let id = Bytes(Uuid::new_v4().as_bytes().to_vec());
        let token = Token::new(place.clone(), pin);
        let make = Question::Make { id: id.clone(), label: format!("sealblk root key of {store}") };
        ask(&token, &make, &[])?;
        let mut iv = vec![0; IV_LEN];
        random(&mut iv)?;
        let question =
            Question::Encrypt { id: id.clone(), iv: Bytes(iv), aad: aad(store), len: key.bytes().len() };
        match ask(&token, &question, key.bytes())?.answer {
            Answer::Encrypted { iv, text } => Ok(InHsm { place, id, iv, text }),
            _ => Err(KmsError::Internal("a token has answered something else than it was asked".into())),
        }
    }

    /// Has the token decrypt the root key.
    pub fn open(&self, store: Uuid, pin: Pin) -> Result<RootKey, KmsError> {
        let token = Token::new(self.place.clone(), pin);
        let question = Question::Decrypt {
            id: self.id.clone(),
            iv: self.iv.clone(),
            aad: aad(store),
            text: self.text.clone(),
        };
        let opened = ask(&token, &question, &[])?.secret;
        let bytes = opened[..].try_into();
        let bytes: &[u8; 32] =
            bytes.map_err(|_| KmsError::Corrupt("the root key has another length".into()))?;
        RootKey::copy_of(bytes)
    }

    /// Its line.
    pub fn line(&self) -> String {
        let json = serde_json::to_vec(self).unwrap_or_default();
        format!("{PREFIX}{}\n", hex::encode(json))
    }

    /// Parses a line; `None` if it is another sort of line.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let digits = line.trim_ascii_end().strip_prefix(PREFIX.as_bytes())?;
        serde_json::from_slice(&hex::decode(digits).ok()?).ok()
    }
}

fn aad(store: Uuid) -> Bytes {
    Bytes([b"sealblk kms root key\0", &store.as_bytes()[..]].concat())
}

fn ask(token: &Token, question: &Question, secret: &[u8]) -> Result<crate::hsm::Reply, KmsError> {
    token.ask(question, secret, TIME).map_err(|Refusal { problem, words }| {
        let message = format!("the KMS root key is wrapped by an HSM: {words}");
        match problem {
            Problem::WrongPin | Problem::PinLocked => KmsError::AccessDenied(message),
            Problem::NoToken | Problem::Lost => KmsError::Unavailable(message),
            Problem::NoKey | Problem::BadCiphertext => KmsError::Corrupt(message),
            Problem::NoModule => KmsError::Internal(message),
            Problem::Unsuitable | Problem::NotBuilt => KmsError::Unsupported(message),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_it_was_written_and_nothing_else_is_one() {
        let place =
            Place { module: "/m.so".into(), token: "t".into(), paths: vec!["/p".into()], network: false };
        let bytes = |len| Bytes(vec![7; len]);
        let line = InHsm { place, id: bytes(16), iv: bytes(12), text: bytes(48) };
        assert_eq!(InHsm::parse(line.line().as_bytes()), Some(line.clone()));
        for other in ["", PREFIX, "sealblk-kms-hsm-root-key-1:7b7d", &line.line()[..80]] {
            assert_eq!(InHsm::parse(other.as_bytes()), None, "{other}");
        }
        assert_ne!(aad(Uuid::nil()), aad(Uuid::max()));
    }
}
