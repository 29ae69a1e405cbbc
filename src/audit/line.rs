//! One record of the audit log as bytes: a line of JSON that names the record before it, and its MAC.
//!
//! Pure. Nothing is canonicalised: chain and MAC are over the bytes as they lie in the file (docs/audit.md).

use crate::crypt::secret_mem::SecretBytes;
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use subtle::ConstantTimeEq;
use uuid::Uuid;

/// The longest line in bytes, its end included; a longer one is no record.
pub const LINE_MAX: usize = 64 << 10;

/// How a MAC is written behind what it covers.
const MAC_FIELD: &str = ",\"mac\":\"";
/// Bytes from there to the end: the field, 64 digits, `"}`.
const MAC_LEN: usize = MAC_FIELD.len() + 64 + 2;

/// A place in the chain: a record's number, and the SHA-256 of its line without the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// 1 for a log's first record; 0 before it.
    pub seq: u64,
    /// All zero before the first record.
    pub chain: [u8; 32],
}

impl Position {
    /// Before the first record.
    pub const START: Position = Position { seq: 0, chain: [0; 32] };
}

/// What the MACs of a store's audit are made with, in secret memory. Whoever has it can
/// read the KMS's root key.
#[derive(Clone)]
pub struct AuditKey {
    store: Uuid,
    key: Arc<SecretBytes<32>>,
}

impl AuditKey {
    /// The audit key of the KMS store of this id, which derives it from its root key.
    pub fn new(store: Uuid, key: SecretBytes<32>) -> Self {
        AuditKey { store, key: Arc::new(key) }
    }

    /// The KMS store whose key it is.
    pub fn store(&self) -> Uuid {
        self.store
    }

    /// HMAC-SHA-256 of `label`, a zero byte and `bytes`.
    pub(super) fn mac(&self, label: &str, bytes: &[u8]) -> [u8; 32] {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(self.key.as_array()).expect("HMAC takes a key of any length");
        mac.update(label.as_bytes());
        mac.update(&[0]);
        mac.update(bytes);
        mac.finalize().into_bytes().into()
    }
}

/// The MAC of a record, not looked at yet.
#[derive(Debug, PartialEq, Eq)]
pub struct RecordMac<'a> {
    /// The KMS store whose audit key is said to have made it.
    pub store: Uuid,
    covered: &'a [u8],
    value: [u8; 32],
}

impl RecordMac<'_> {
    /// Whether `key`, which must be that of [`RecordMac::store`], has made it.
    pub fn is_of(&self, key: &AuditKey) -> bool {
        key.mac("record", self.covered).ct_eq(&self.value).into()
    }
}

/// What a line says of its place.
#[derive(Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// The log that it belongs to.
    pub log: Uuid,
    /// Its place.
    pub position: Position,
    /// The chain value of the record before.
    pub prev: [u8; 32],
    /// Whether a KMS has written it: such a record must have a MAC.
    pub of_kms: bool,
    /// Its MAC, if its writer had the key.
    pub mac: Option<RecordMac<'a>>,
}

#[derive(Serialize)]
struct Written<'a, T> {
    log: Uuid,
    seq: u64,
    prev: String,
    #[serde(flatten)]
    what: &'a T,
    #[serde(rename = "macKey", skip_serializing_if = "Option::is_none")]
    mac_key: Option<Uuid>,
}

#[derive(Deserialize)]
struct Place {
    log: Uuid,
    seq: u64,
    prev: String,
    #[serde(rename = "eventSource")]
    source: String,
    #[serde(rename = "macKey")]
    mac_key: Option<Uuid>,
    mac: Option<String>,
}

/// What a KMS's records say they come from.
pub const KMS_SOURCE: &str = "kms.amazonaws.com";

/// The line, with its end, of the record after `before` that says `what`, a JSON object; and its place.
/// `None` if there is no next number.
pub fn encode(
    log: Uuid,
    before: &Position,
    what: &impl Serialize,
    key: Option<&AuditKey>,
) -> Option<(Vec<u8>, Position)> {
    let seq = before.seq.checked_add(1)?;
    let written =
        Written { log, seq, prev: hex::encode(before.chain), what, mac_key: key.map(AuditKey::store) };
    let mut line = serde_json::to_vec(&written).expect("objects of strings and numbers");
    if let Some(key) = key {
        line.pop();
        let mac = key.mac("record", &line);
        line.extend_from_slice(MAC_FIELD.as_bytes());
        line.extend_from_slice(hex::encode(mac).as_bytes());
        line.extend_from_slice(b"\"}");
    }
    let chain = Sha256::digest(&line).into();
    line.push(b'\n');
    Some((line, Position { seq, chain }))
}

/// Reads a line, without its end; `None` if it is no record.
pub fn parse(bytes: &[u8]) -> Option<Line<'_>> {
    if bytes.len() >= LINE_MAX {
        return None;
    }
    let place: Place = serde_json::from_slice(bytes).ok()?;
    let prev = digits(&place.prev)?;
    let mac = match (place.mac, place.mac_key) {
        (None, None) => None,
        (Some(mac), Some(store)) => Some(RecordMac { store, covered: covered(bytes)?, value: digits(&mac)? }),
        _ => return None,
    };
    let position = Position { seq: place.seq, chain: Sha256::digest(bytes).into() };
    Some(Line { log: place.log, position, prev, of_kms: place.source == KMS_SOURCE, mac })
}

/// What the MAC at the end of a line covers. A MAC anywhere else would cover nothing.
fn covered(line: &[u8]) -> Option<&[u8]> {
    let (covered, mac) = line.split_at_checked(line.len().checked_sub(MAC_LEN)?)?;
    mac.starts_with(MAC_FIELD.as_bytes()).then_some(covered)
}

/// 32 bytes in 64 lower-case hexadecimal digits.
pub(super) fn digits(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    text.bytes().all(|b| !b.is_ascii_uppercase()).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const LOG: Uuid = Uuid::from_u128(7);

    fn key(first: u8) -> AuditKey {
        AuditKey::new(Uuid::from_u128(1), SecretBytes::copy_of(&[first; 32]).unwrap())
    }

    fn what() -> Value {
        json!({"eventSource": KMS_SOURCE, "eventName": "Decrypt", "note": ",\"mac\":\""})
    }

    #[test]
    fn a_line_is_read_back_with_and_without_a_mac() {
        for key in [None, Some(key(1))] {
            let before = Position { seq: 4, chain: [9; 32] };
            let (line, after) = encode(LOG, &before, &what(), key.as_ref()).unwrap();
            let line = line.strip_suffix(b"\n").unwrap();
            let read = parse(line).unwrap();
            assert_eq!((read.log, read.position, read.prev, read.of_kms), (LOG, after, [9; 32], true));
            assert_eq!(after.seq, 5);
            assert_eq!(read.mac.as_ref().map(|mac| mac.store), key.as_ref().map(AuditKey::store));
            if let (Some(mac), Some(key)) = (read.mac, key) {
                assert!(mac.is_of(&key) && !mac.is_of(&self::key(2)));
            }
        }
    }

    #[test]
    fn a_changed_byte_is_no_record_or_has_a_wrong_mac_and_another_place() {
        let (line, after) = encode(LOG, &Position::START, &what(), Some(&key(1))).unwrap();
        let line = line.strip_suffix(b"\n").unwrap();
        for at in 0..line.len() {
            let mut changed = line.to_vec();
            changed[at] ^= 1;
            if let Some(read) = parse(&changed) {
                assert_ne!(read.position.chain, after.chain, "byte {at}");
                assert!(!read.mac.is_some_and(|mac| mac.is_of(&key(1))), "byte {at}");
            }
        }
    }

    #[test]
    fn a_mac_stands_at_the_end_or_nowhere() {
        let (line, _) = encode(LOG, &Position::START, &what(), Some(&key(1))).unwrap();
        let mut value: Value = serde_json::from_slice(&line).unwrap();
        // serde_json sorts the fields, so that the MAC is somewhere in the middle.
        assert_eq!(parse(value.to_string().as_bytes()), None);
        value.as_object_mut().unwrap().remove("mac");
        assert_eq!(parse(value.to_string().as_bytes()), None, "a key without a MAC");
        value.as_object_mut().unwrap().remove("macKey");
        assert!(parse(value.to_string().as_bytes()).unwrap().mac.is_none());
    }
}
