//! Names of volumes, snapshots and layers.
//!
//! A parsed id is safe to use as a file name: it has one spelling, and no separators or dots.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// An id in EC2's style: a prefix and 17 lower-case hexadecimal digits (68 bits).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Hex17(u128);

impl Hex17 {
    const DIGITS: usize = 17;

    fn random() -> Self {
        Hex17(Uuid::new_v4().as_u128() & ((1 << (4 * Self::DIGITS)) - 1))
    }

    fn parse(text: &str, prefix: &str) -> Result<Self, String> {
        let digits = text.strip_prefix(prefix).unwrap_or_default();
        if digits.len() == Self::DIGITS && is_lower_hex(digits) {
            return Ok(Hex17(u128::from_str_radix(digits, 16).expect("17 hexadecimal digits")));
        }
        Err(format!("{text:?} is not an id: {prefix} and {} lower-case hexadecimal digits", Self::DIGITS))
    }
}

/// Whether `text` has nothing but digits and the letters a to f.
pub(crate) fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A volume: `vol-` and 17 lower-case hexadecimal digits, as EBS has them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(Hex17);

impl VolumeId {
    /// What each volume's id begins with.
    pub const PREFIX: &str = "vol-";

    /// A new id, which no other volume has but with a probability of 2⁻⁶⁸.
    pub fn random() -> Self {
        VolumeId(Hex17::random())
    }
}

impl FromStr for VolumeId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Hex17::parse(text, Self::PREFIX).map(VolumeId)
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:017x}", Self::PREFIX, self.0.0)
    }
}

/// A snapshot: `snap-` and 17 lower-case hexadecimal digits, as EBS has them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(Hex17);

impl SnapshotId {
    /// What each snapshot's id begins with.
    pub const PREFIX: &str = "snap-";

    /// A new id, which no other snapshot has but with a probability of 2⁻⁶⁸.
    pub fn random() -> Self {
        SnapshotId(Hex17::random())
    }
}

impl FromStr for SnapshotId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Hex17::parse(text, Self::PREFIX).map(SnapshotId)
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:017x}", Self::PREFIX, self.0.0)
    }
}

/// A layer, a UUID: the name of its file is `<uuid>.img`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LayerId(Uuid);

impl LayerId {
    /// A new id.
    pub fn random() -> Self {
        LayerId(Uuid::new_v4())
    }

    /// Its 16 bytes, most significant first.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl FromStr for LayerId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Uuid::try_parse(text)
            .ok()
            .map(LayerId)
            // A UUID can be spelt in several ways; one of them is the file's name.
            .filter(|id| id.to_string() == text)
            .ok_or_else(|| format!("{text:?} is not a layer's id: a lower-case UUID with hyphens"))
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// What every id shares: Debug reads as Display, serde goes through the text.
macro_rules! as_text {
    ($($id:ty),*) => {$(
        impl fmt::Debug for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl From<$id> for String {
            fn from(id: $id) -> String {
                id.to_string()
            }
        }

        impl TryFrom<String> for $id {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }
    )*};
}

as_text!(VolumeId, SnapshotId, LayerId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_id_reads_as_it_is_written() {
        let id: VolumeId = "vol-0123456789abcdef0".parse().unwrap();
        assert_eq!(id.to_string(), "vol-0123456789abcdef0");
        for _ in 0..100 {
            let id = VolumeId::random();
            assert_eq!(id.to_string().parse(), Ok(id));
            assert_eq!(id.to_string().len(), 21);
        }
    }

    #[test]
    fn other_spellings_are_refused() {
        for bad in [
            "",
            "vol-",
            "0123456789abcdef0",
            "vol-0123456789abcdef",
            "vol-0123456789abcdef01",
            "vol-0123456789ABCDEF0",
            "vol-+123456789abcdef0",
            "snap-0123456789abcdef0",
            "vol-0123456789abcde/0",
        ] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad}");
        }
        for bad in ["snap-", "vol-0123456789abcdef0", "snap-0123456789ABCDEF0", "snap-0123456789abcdef01"] {
            assert!(bad.parse::<SnapshotId>().is_err(), "{bad}");
        }
        let id = "snap-0123456789abcdef0";
        assert_eq!(id.parse::<SnapshotId>().unwrap().to_string(), id);
        for bad in [
            "67e55044-10b1-426f-9247-BB680E5FE0C8",
            "67e5504410b1426f9247bb680e5fe0c8",
            "{67e55044-10b1-426f-9247-bb680e5fe0c8}",
            "../../etc/passwd",
        ] {
            assert!(bad.parse::<LayerId>().is_err(), "{bad}");
        }
        assert!("67e55044-10b1-426f-9247-bb680e5fe0c8".parse::<LayerId>().is_ok());
    }
}
