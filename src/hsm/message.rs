//! What the process that has a PKCS#11 module is asked, and what it answers: a line of JSON each. A
//! plaintext or a PIN is in no line. It lies in secret memory that both processes have, and the
//! line says how long it is.
//!
//! An answer comes from a process in which a vendor's code runs. [`Answer::parse`] makes of it what fits the
//! question, or nothing.

use crate::base::printable;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// Bytes of an initialization vector.
pub const IV_LEN: usize = 12;
/// Bytes by which a ciphertext is longer than its plaintext.
pub const TAG_LEN: usize = 16;
/// Bytes of a key's id in the token (CKA_ID).
pub const ID_LEN: usize = 16;
/// The longest plaintext, and the most random bytes, that one question is about.
pub const TEXT_MAX: usize = 4096;
/// The longest line, in bytes: with the additional data of any encryption context.
pub(super) const MAX_LINE: usize = 256 << 10;
/// The longest words of the other process that are repeated, in characters.
const WORDS_MAX: usize = 400;

/// Where a token is: the module that knows it, and its label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The vendor's PKCS#11 module, an absolute path.
    pub module: PathBuf,
    /// The token's label.
    pub token: String,
    /// Files, folders and devices that the module reads and writes, beside those that are known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<PathBuf>,
    /// Whether the module reaches its token by the network or by a socket of this machine.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub network: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the token \"{}\"", self.token)
    }
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Question {
    /// To load the module and log in to the token with the PIN of so many bytes. The secret memory comes with
    /// it. It is asked first, and once.
    Begin {
        /// Which token.
        place: Place,
        /// How long the PIN is.
        pin: usize,
    },
    /// To make an AES-256 key of this id, which never leaves the token.
    Make {
        /// CKA_ID.
        id: Bytes,
        /// CKA_LABEL.
        label: String,
    },
    /// Whether there is a key of this id that never leaves the token.
    Find {
        /// CKA_ID.
        id: Bytes,
    },
    /// To destroy the keys of this id.
    Destroy {
        /// CKA_ID.
        id: Bytes,
    },
    /// To encrypt with AES-GCM the plaintext of so many bytes.
    Encrypt {
        /// CKA_ID.
        id: Bytes,
        /// A random initialization vector. The token may choose another one.
        iv: Bytes,
        /// Additional data.
        aad: Bytes,
        /// How long the plaintext is.
        len: usize,
    },
    /// To decrypt with AES-GCM.
    Decrypt {
        /// CKA_ID.
        id: Bytes,
        /// The initialization vector that the ciphertext was made with.
        iv: Bytes,
        /// Additional data.
        aad: Bytes,
        /// Ciphertext and tag.
        text: Bytes,
    },
    /// So many random bytes of the token's.
    Random {
        /// How many.
        len: usize,
    },
}

impl Question {
    /// How many secret bytes go with it, in the memory.
    pub(super) fn secret_len(&self) -> usize {
        match self {
            Question::Begin { pin, .. } => *pin,
            Question::Encrypt { len, .. } => *len,
            _ => 0,
        }
    }
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Answer {
    /// It was done.
    Done,
    /// Whether there is such a key.
    Found(bool),
    /// What was encrypted.
    Encrypted {
        /// The initialization vector that the token has used.
        iv: Bytes,
        /// Ciphertext and tag.
        text: Bytes,
    },
    /// So many bytes lie in the memory.
    Filled(usize),
    /// It was not done.
    Refused(Refusal),
}

/// Why a token did not do it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// What is the matter.
    pub problem: Problem,
    /// In words.
    pub words: String,
}

impl Refusal {
    /// A refusal in these words.
    pub fn new(problem: Problem, words: impl Into<String>) -> Self {
        Refusal { problem, words: words.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

/// What is the matter with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Problem {
    /// The module cannot be loaded.
    NoModule,
    /// There is no token of this label, or there are several.
    NoToken,
    /// The PIN is another one.
    WrongPin,
    /// The PIN is locked, or was never set.
    PinLocked,
    /// There is no key of this id, or none that can be trusted.
    NoKey,
    /// The ciphertext was not made by this key with this additional data.
    BadCiphertext,
    /// The token lacks what is needed.
    Unsuitable,
    /// The token, its session or the process that has it is gone, or does not answer in time. A new session
    /// may do better.
    Lost,
    /// This program was built without PKCS#11.
    NotBuilt,
}

impl Answer {
    /// What was answered to `question`. Anything that does not fit it is `Lost`: the process does not keep to
    /// what was agreed.
    pub fn parse(question: &Question, line: &[u8]) -> Self {
        let strange = |what: &str| Answer::Refused(Refusal::new(Problem::Lost, what));
        let Ok(answer) = serde_json::from_slice::<Answer>(line) else {
            return strange("the answer of the process that has the PKCS#11 module is not readable");
        };
        let fits = match (question, &answer) {
            (_, Answer::Refused(_)) => true,
            (Question::Begin { .. } | Question::Make { .. } | Question::Destroy { .. }, Answer::Done) => true,
            (Question::Find { .. }, Answer::Found(_)) => true,
            (Question::Encrypt { len, .. }, Answer::Encrypted { iv, text }) => {
                iv.0.len() == IV_LEN && text.0.len() == len + TAG_LEN
            }
            (Question::Decrypt { text, .. }, Answer::Filled(len)) => {
                text.0.len().checked_sub(TAG_LEN) == Some(*len) && *len <= TEXT_MAX
            }
            (Question::Random { len: asked }, Answer::Filled(len)) => len == asked && *len <= TEXT_MAX,
            _ => false,
        };
        match answer {
            Answer::Refused(Refusal { problem, words }) => {
                let words: String = words.chars().take(WORDS_MAX).collect();
                Answer::Refused(Refusal::new(problem, printable::line(&words)))
            }
            answer if fits => answer,
            _ => strange("the process that has the PKCS#11 module answers something else than it was asked"),
        }
    }
}

/// Bytes that are no secret; hexadecimal in a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        hex::decode(text).map(Bytes).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(len: usize) -> Bytes {
        Bytes(vec![7; len])
    }

    fn encrypt() -> Question {
        Question::Encrypt { id: bytes(ID_LEN), iv: bytes(IV_LEN), aad: bytes(3), len: 64 }
    }

    fn problem(question: &Question, answer: &Answer) -> Option<Problem> {
        match Answer::parse(question, &serde_json::to_vec(answer).unwrap()) {
            Answer::Refused(refusal) => Some(refusal.problem),
            parsed => {
                assert_eq!(&parsed, answer);
                None
            }
        }
    }

    #[test]
    fn an_answer_must_fit_what_was_asked() {
        let encrypted = |iv, text| Answer::Encrypted { iv: bytes(iv), text: bytes(text) };
        assert_eq!(problem(&encrypt(), &encrypted(12, 80)), None);
        for other in [
            encrypted(16, 80),
            encrypted(0, 80),
            encrypted(12, 79),
            encrypted(12, 81),
            Answer::Done,
            Answer::Filled(64),
            Answer::Found(true),
        ] {
            assert_eq!(problem(&encrypt(), &other), Some(Problem::Lost), "{other:?}");
        }
        let decrypt = |text| Question::Decrypt {
            id: bytes(ID_LEN),
            iv: bytes(IV_LEN),
            aad: bytes(0),
            text: bytes(text),
        };
        assert_eq!(problem(&decrypt(80), &Answer::Filled(64)), None);
        for (text, len) in [(80, 65), (80, 63), (80, usize::MAX), (15, 0)] {
            assert_eq!(problem(&decrypt(text), &Answer::Filled(len)), Some(Problem::Lost), "{text} {len}");
        }
        assert_eq!(problem(&Question::Random { len: 4 }, &Answer::Filled(5)), Some(Problem::Lost));
        let refused = Answer::Refused(Refusal::new(Problem::WrongPin, "no"));
        assert_eq!(problem(&encrypt(), &refused), Some(Problem::WrongPin));
    }

    #[test]
    fn words_of_the_other_process_are_short_and_steer_no_terminal() {
        let words = format!("\u{1b}[2J{}", "x".repeat(10_000));
        let line = serde_json::to_vec(&Answer::Refused(Refusal::new(Problem::Lost, words))).unwrap();
        let Answer::Refused(refusal) = Answer::parse(&encrypt(), &line) else { panic!("a refusal") };
        assert!(refusal.words.len() < 500 && !refusal.words.contains('\u{1b}'), "{refusal}");
        for garbage in [&b""[..], b"{", b"\"done\" x", b"{\"filled\":-1}", b"\xff"] {
            assert!(matches!(Answer::parse(&encrypt(), garbage), Answer::Refused(_)));
        }
    }
}
