//! The anchor: `<config>/kms-<store id>.head`, the place in the log's chain up to which
//! changes were answered.
//!
//! The log alone cannot show that its end was cut off or that an older copy was put in its place, and the
//! last record may be the one that disabled a key. The anchor lies beside the root key, out of reach of
//! whoever can write the store's folder only.

use crate::base::root::{files, replace_file};
use crate::kms::KmsError;
use crate::kms::embedded::keys::{LogKeys, same};
use crate::kms::embedded::log::Position;
use crate::kms::embedded::plain::failed;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"SBLKHEAD";

/// Bytes of an anchor: magic, sequence number, chain value, MAC.
pub const ANCHOR_LEN: usize = 80;

/// More than any anchor has: what is longer is none.
const MAX_LEN: u64 = 4096;

/// Where the anchor of `store` lies.
pub fn path(config: &Path, store: Uuid) -> PathBuf {
    config.join(format!("kms-{store}.head"))
}

/// Makes `position` the anchor, durably.
pub fn write(config: &Path, store: Uuid, position: &Position, keys: &LogKeys) -> Result<(), KmsError> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&position.seq.to_be_bytes());
    bytes.extend_from_slice(&position.chain);
    bytes.extend_from_slice(&keys.mac("anchor", &[&bytes]));
    replace_file(&path(config, store), &bytes).map_err(|e| KmsError::Internal(e.to_string()))
}

/// Reads the anchor; `None` if there is none.
pub fn read(config: &Path, store: Uuid, keys: &LogKeys) -> Result<Option<Position>, KmsError> {
    let path = path(config, store);
    let bytes = match files::read(&path, MAX_LEN) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        read => read.map_err(|e| failed("read the KMS store's anchor", &path, &e))?,
    };
    let position = parse(&bytes, keys).ok_or_else(|| {
        KmsError::Corrupt(format!(
            "{} is damaged or of another store; put it back from a backup, or remove it to accept the store \
             as it is",
            path.display()
        ))
    })?;
    Ok(Some(position))
}

/// Parses and authenticates an anchor.
pub fn parse(bytes: &[u8], keys: &LogKeys) -> Option<Position> {
    if bytes.len() != ANCHOR_LEN
        || bytes[..8] != *MAGIC
        || !same(&bytes[48..], &keys.mac("anchor", &[&bytes[..48]]))
    {
        return None;
    }
    let seq = u64::from_be_bytes(bytes[8..16].try_into().ok()?);
    Some(Position { seq, chain: bytes[16..48].try_into().ok()? })
}
