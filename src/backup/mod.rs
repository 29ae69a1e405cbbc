//! A snapshot as it lies in a place outside: what the objects there are called, and what is in them.
//!
//! | object | |
//! |---|---|
//! | `place.json` | the place's id ([`PlaceId`]) |
//! | `snapshots/<snapshot>.json` | a manifest ([`manifest`]): a snapshot is there if and only if it is |
//! | `pages/<xx>/<name>` | which blocks there are, of a run of 8192 ([`page`]) |
//! | `blocks/<xx>/<name>` | 512 KiB of ciphertext ([`block`]) |
//! | `leases/<kind>-<id>` | that somebody is at work ([`lease`]) |
//! | `moves/<snapshot>` | whether the volume has come whose last snapshot that is ([`moved`]) |
//! | `kms/<id>.log` | the log of the embedded KMS of a store that is backed up there, as it lies at home |
//!
//! Pages and blocks are named by a keyed hash of their bytes, under a key that follows from a data key:
//! who has no data key learns nothing from a name, and who has the key proves each object by its name.
//! What is proved by a name that a page has is proved by the page's; that by the manifest's MAC.
//! docs/format.md has the bytes.
//!
//! Pure, except for what this host notes of places in its configuration folder ([`marks`]).
#![forbid(unsafe_code)]

pub(crate) mod block;
pub(crate) mod lease;
pub(crate) mod manifest;
pub(crate) mod marks;
pub(crate) mod moved;
pub(crate) mod page;
pub(crate) mod saved;
pub(crate) mod to_come;

use crate::base::{Error, Kind, Result};
use crate::catalog::SnapshotId;
use crate::crypt::BackupKeys;
use crate::place::ObjectName;
use serde::{Deserialize, Serialize};
use std::fmt;
use subtle::ConstantTimeEq;
use uuid::Uuid;

/// The name of a page or block: a keyed hash of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ContentName([u8; 32]);

impl ContentName {
    /// This name.
    pub(crate) fn of(hash: [u8; 32]) -> Self {
        ContentName(hash)
    }

    /// What it is made of.
    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether bytes with this hash have this name, in constant time.
    pub(crate) fn is(&self, hash: &[u8; 32]) -> bool {
        self.0.ct_eq(hash).into()
    }

    /// The object of that name in a folder.
    pub(crate) fn object(&self, folder: &str) -> ObjectName {
        let digits = self.to_string();
        object(&format!("{folder}/{}/{digits}", &digits[..2]))
    }

    /// The name in an object's, as [`ContentName::object`] made that.
    pub(crate) fn in_object(object: &ObjectName) -> Option<Self> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(object.last(), &mut bytes).ok()?;
        Some(ContentName(bytes))
    }
}

impl fmt::Display for ContentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Reads the bytes of a manifest, whoever wrote them, as that of `snapshot`; returns its number and how many
/// blocks it says it has. Like [`page_again`] and [`block_again`], for whoever tries what a place could send.
///
/// # Errors
/// `Corrupt` for what is none.
pub fn manifest_says(bytes: &[u8], snapshot: SnapshotId) -> Result<(u64, u64)> {
    let claim = manifest::Claim::parse(bytes, snapshot)?;
    Ok((claim.claimed().number, claim.claimed().blocks()))
}

/// Reads the bytes of a page, whoever wrote them, and writes them again.
///
/// # Errors
/// `Corrupt` for what is none.
pub fn page_again(bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    page::Page::decode(bytes).map(|page| page.encode())
}

/// Reads the bytes of a block of `len` bytes, 512 KiB at most, whoever wrote them, and writes them again.
///
/// # Errors
/// `Corrupt` for what is none.
pub fn block_again(bytes: &[u8], len: usize) -> Result<Option<Vec<u8>>> {
    let mut room = vec![0; len.min(block::BLOCK)];
    block::decode(bytes, &mut room)?;
    Ok(block::encode(&room))
}

/// Proves the bytes of what is to come of a layer, as they lie in the store, and writes them again, with
/// whether they say where from.
///
/// # Errors
/// `Corrupt` for what is none, or is not of whoever has these keys.
pub fn wanted_again(bytes: &[u8], keys: &BackupKeys) -> Result<(Vec<u8>, bool)> {
    let to_come = to_come::ToCome::prove(bytes, keys)?;
    Ok((to_come.to_bytes(keys), to_come.target().is_ok()))
}

/// These bytes, and the MAC that makes them what whoever has the keys has written.
pub fn with_wanted_mac(said: &[u8], keys: &BackupKeys) -> Vec<u8> {
    [said, &keys.manifest_mac(said)].concat()
}

/// The folder of the blocks.
pub(crate) const BLOCKS: &str = "blocks";
/// The folder of the pages.
pub(crate) const PAGES: &str = "pages";

/// The folder of the manifests.
pub(crate) fn manifests() -> ObjectName {
    object("snapshots")
}

/// The manifest of a snapshot.
pub(crate) fn manifest_of(snapshot: SnapshotId) -> ObjectName {
    object(&format!("snapshots/{snapshot}.json"))
}

/// The snapshot whose manifest has this name.
pub(crate) fn snapshot_of(manifest: &ObjectName) -> Option<SnapshotId> {
    manifest.last().strip_suffix(".json")?.parse().ok()
}

/// What tells one place from another.
pub(crate) fn place_file() -> ObjectName {
    object("place.json")
}

/// The log of an embedded KMS.
pub(crate) fn kms_log_of(kms: Uuid) -> ObjectName {
    object(&format!("kms/{kms}.log"))
}

/// A name that is made here, of words and digits.
fn object(text: &str) -> ObjectName {
    ObjectName::new(text).expect("words, digits and ids are a name")
}

/// The id of a place, made with its first snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlaceId(pub(crate) Uuid);

/// The longest `place.json`, in bytes.
pub(crate) const PLACE_MAX: usize = 1 << 10;
/// The version of the place that is written, and read.
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPlace {
    format: u32,
    id: Uuid,
}

impl PlaceId {
    /// A new one.
    pub(crate) fn random() -> Self {
        PlaceId(Uuid::new_v4())
    }

    /// The bytes of `place.json`.
    pub(crate) fn to_json(self) -> Vec<u8> {
        let written = WrittenPlace { format: FORMAT, id: self.0 };
        let mut bytes = serde_json::to_vec(&written).expect("a number and a text");
        bytes.push(b'\n');
        bytes
    }

    /// Reads `place.json`.
    ///
    /// # Errors
    /// `Corrupt` for anything else, and for another version.
    pub(crate) fn from_json(bytes: &[u8]) -> Result<Self> {
        check_version(bytes, "place.json")?;
        let written: WrittenPlace =
            serde_json::from_slice(bytes).map_err(|e| corrupt(format!("place.json is none: {e}")))?;
        Ok(PlaceId(written.id))
    }
}

impl fmt::Display for PlaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Looks at the version of an object, alone.
fn check_version(bytes: &[u8], what: &str) -> Result<()> {
    #[derive(Deserialize)]
    struct Version {
        format: u64,
    }
    let found: Version = serde_json::from_slice(bytes)
        .map_err(|e| corrupt(format!("{what} is not what sealblk writes: {e}")))?;
    match found.format {
        1 => Ok(()),
        other => Err(corrupt(format!(
            "{what} has format version {other}, and this sealblk knows only version 1; use the sealblk that \
             wrote it, or a newer one"
        ))),
    }
}

fn corrupt(problem: String) -> Error {
    Error::new(Kind::Corrupt, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_called_by_what_they_are() {
        let name = ContentName::of([0xab; 32]);
        let object = name.object(BLOCKS);
        assert_eq!(object.as_str(), format!("blocks/ab/{}", "ab".repeat(32)));
        assert_eq!(ContentName::in_object(&object), Some(name));
        let id = SnapshotId::random();
        assert_eq!(snapshot_of(&manifest_of(id)), Some(id));
        assert_eq!(snapshot_of(&place_file()), None);
        assert!(name.is(&[0xab; 32]) && !name.is(&[0xaa; 32]));
    }

    #[test]
    fn a_place_is_known_by_its_id_and_other_versions_are_named() {
        let id = PlaceId::random();
        assert_eq!(PlaceId::from_json(&id.to_json()).unwrap(), id);
        for bad in ["", "{}", "{\"format\":1}", "[]", "{\"format\":1,\"id\":\"x\"}"] {
            assert_eq!(PlaceId::from_json(bad.as_bytes()).unwrap_err().kind(), Kind::Corrupt, "{bad}");
        }
        let newer = String::from_utf8(id.to_json()).unwrap().replace(":1,", ":2,");
        assert!(PlaceId::from_json(newer.as_bytes()).unwrap_err().to_string().contains("format version 2"));
    }
}
