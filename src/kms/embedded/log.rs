//! The log's bytes: the header and the chain of records.
//!
//! Pure: it sees byte slices and the store's keys, no file. docs/kms-store.md describes
//! the format byte by byte.

use crate::kms::KmsError;
use crate::kms::embedded::keys::{LogKeys, same};
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"SBLK-KMS";
const FORMAT: u16 = 1;
/// The root key is 32 random bytes that lie elsewhere; other kinds will have parameters.
const ROOT_PLAIN: u8 = 1;
const FIXED: usize = 68;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// Bytes of a header of this version.
pub const HEADER_LEN: usize = FIXED + 32;
/// Bytes before a record's body.
pub const HEAD_LEN: usize = 28;
/// Bytes after it.
pub const MAC_LEN: usize = 32;
/// The longest body.
pub const BODY_MAX: usize = 16 << 20;

/// A place in the chain: the number of the last record and its MAC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// 0 before the first record of a store.
    pub seq: u64,
    /// All zero there.
    pub chain: [u8; 32],
}

/// The header of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The store's id.
    pub store: Uuid,
    /// What came before the first record of this file.
    pub base: Position,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self, keys: &LogKeys) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&FORMAT.to_be_bytes());
        bytes.extend_from_slice(&[ROOT_PLAIN, 0]);
        bytes.extend_from_slice(self.store.as_bytes());
        bytes.extend_from_slice(&self.base.seq.to_be_bytes());
        bytes.extend_from_slice(&self.base.chain);
        bytes.extend_from_slice(&keys.mac("header", &[&bytes]));
        bytes
    }

    /// Reads a header before anything is known to be authentic: its store id says which root key to fetch.
    pub fn parse(bytes: &[u8]) -> Result<Self, KmsError> {
        let damaged = || KmsError::Corrupt("the header of the KMS store is damaged".into());
        if bytes.get(..8) != Some(MAGIC) {
            return Err(damaged());
        }
        let known = |at: usize, value: &[u8]| bytes.get(at..at + value.len()) == Some(value);
        if !known(8, &FORMAT.to_be_bytes()) || !known(10, &[ROOT_PLAIN, 0]) {
            return Err(KmsError::Corrupt(
                "the header of the KMS store is damaged, or was made by a newer version of sealblk".into(),
            ));
        }
        let bytes = bytes.get(..HEADER_LEN).ok_or_else(damaged)?;
        let store = Uuid::from_slice(&bytes[12..28]).map_err(|_| damaged())?;
        let seq = u64::from_be_bytes(bytes[28..36].try_into().map_err(|_| damaged())?);
        let chain = bytes[36..68].try_into().map_err(|_| damaged())?;
        Ok(Header { store, base: Position { seq, chain } })
    }

    /// Whether the header that was parsed from `bytes` was made with `keys`.
    pub fn is_authentic(bytes: &[u8], keys: &LogKeys) -> bool {
        bytes.get(FIXED..HEADER_LEN).is_some_and(|mac| same(mac, &keys.mac("header", &[&bytes[..FIXED]])))
    }
}

/// What stands at a place of the log.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// An authentic record.
    Record {
        /// Its body.
        body: &'a [u8],
        /// The place behind it in the chain.
        after: Position,
        /// Its length in the file.
        len: usize,
    },
    /// Nothing: the log ends here.
    End,
    /// The beginning of a record whose end was never written.
    Torn,
}

/// The bytes of the record after `before`, and the place behind it. `body` has 1..=[`BODY_MAX`] bytes.
pub fn encode_record(before: &Position, body: &[u8], keys: &LogKeys) -> (Vec<u8>, Position) {
    assert!((1..=BODY_MAX).contains(&body.len()), "a record's body has 1 byte to 16 MiB");
    let seq = before.seq + 1;
    let mut bytes = Vec::with_capacity(HEAD_LEN + body.len() + MAC_LEN);
    bytes.extend_from_slice(&(body.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&seq.to_be_bytes());
    let head_mac = keys.mac("head", &[&before.chain, &bytes]);
    bytes.extend_from_slice(&head_mac[..16]);
    bytes.extend_from_slice(body);
    let chain = keys.mac("record", &[&before.chain, &bytes]);
    bytes.extend_from_slice(&chain);
    (bytes, Position { seq, chain })
}

/// Reads the record after `before` at the beginning of `bytes`, which stand at `offset` of the file and reach
/// its end. Corrupt if it is neither whole, nor absent, nor torn.
///
/// Torn is only what a write that was never finished leaves: bytes that stop short, or of which a sector of
/// 512 bytes is zero, whichever that is, since a disk keeps no order. A head has a MAC of its own, so that a
/// changed length is not mistaken for a record that stops short.
pub fn next_record<'a>(
    before: &Position,
    bytes: &'a [u8],
    offset: u64,
    keys: &LogKeys,
) -> Result<Next<'a>, KmsError> {
    if bytes.is_empty() {
        return Ok(Next::End);
    }
    if bytes.len() < HEAD_LEN || bytes.iter().all(|&b| b == 0) {
        return Ok(Next::Torn);
    }
    let damaged = |what: &str| {
        let seq = before.seq + 1;
        Err(KmsError::Corrupt(format!(
            "record {seq} of the KMS store is damaged ({what} does not match); restore the store from a \
             backup"
        )))
    };
    let (head, rest) = bytes.split_at(HEAD_LEN);
    if !same(&head[12..], &keys.mac("head", &[&before.chain, &head[..12]])[..16]) {
        let torn = has_unwritten_sector(bytes, offset);
        return if torn { Ok(Next::Torn) } else { damaged("the MAC of its head") };
    }
    let len = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let seq = u64::from_be_bytes(head[4..12].try_into().expect("the slice has 8 bytes"));
    if !(1..=BODY_MAX).contains(&len) || seq != before.seq + 1 {
        return damaged("its number or length");
    }
    if rest.len() < len + MAC_LEN {
        return Ok(Next::Torn);
    }
    let (record, mac) = bytes[..HEAD_LEN + len + MAC_LEN].split_at(HEAD_LEN + len);
    let chain = keys.mac("record", &[&before.chain, record]);
    if !same(mac, &chain) {
        // A record with others behind it was finished before they were begun.
        let is_last = rest.len() == len + MAC_LEN;
        let torn = is_last && has_unwritten_sector(bytes, offset);
        return if torn { Ok(Next::Torn) } else { damaged("its MAC") };
    }
    let after = Position { seq, chain };
    Ok(Next::Record { body: &record[HEAD_LEN..], after, len: HEAD_LEN + len + MAC_LEN })
}

/// Whether what a sector holds of `bytes`, which stand at `offset` and reach the file's end, is all zero: the
/// file was made longer by a write, and its data did not reach the disk there.
fn has_unwritten_sector(bytes: &[u8], offset: u64) -> bool {
    let first = (SECTOR - offset as usize % SECTOR).min(bytes.len());
    let zero = |part: &[u8]| !part.is_empty() && part.iter().all(|&b| b == 0);
    zero(&bytes[..first]) || bytes[first..].chunks(SECTOR).any(zero)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::embedded::keys::RootKey;

    const START: Position = Position { seq: 0, chain: [0; 32] };

    fn keys() -> LogKeys {
        let root = RootKey::copy_of(&[1; 32]).unwrap();
        LogKeys::derive(&root, Uuid::from_u128(1)).unwrap()
    }

    #[test]
    fn a_record_is_read_back_and_chained() {
        let keys = keys();
        let (first, place) = encode_record(&START, b"one", &keys);
        let (second, end) = encode_record(&place, b"two", &keys);
        let bytes = [first.clone(), second.clone()].concat();
        let expected = Next::Record { body: b"one", after: place, len: first.len() };
        assert_eq!(next_record(&START, &bytes, 0, &keys), Ok(expected));
        let expected = Next::Record { body: b"two", after: end, len: second.len() };
        assert_eq!(next_record(&place, &second, 0, &keys), Ok(expected));
        assert_eq!(next_record(&end, b"", 0, &keys), Ok(Next::End));
        assert!(next_record(&START, &second, 0, &keys).is_err(), "a record cannot be moved");
    }

    #[test]
    fn only_what_stops_short_is_torn() {
        let keys = keys();
        let (record, _) = encode_record(&START, b"a body", &keys);
        for len in 1..record.len() {
            assert_eq!(next_record(&START, &record[..len], 0, &keys), Ok(Next::Torn), "length {len}");
        }
        for at in 0..record.len() {
            let mut changed = record.clone();
            changed[at] ^= 0xff;
            let error = next_record(&START, &changed, 0, &keys).unwrap_err().to_string();
            assert!(error.starts_with("record 1 "), "byte {at}: {error}");
        }
    }

    #[test]
    fn a_record_is_torn_whichever_of_its_sectors_never_reached_the_disk() {
        let keys = keys();
        let (record, after) = encode_record(&START, &[b'x'; 2000], &keys);
        for offset in (0..512).step_by(3) {
            let ends = (512 - offset..record.len()).step_by(512).chain([record.len()]);
            let starts = std::iter::once(0).chain((512 - offset..record.len()).step_by(512));
            let sectors: Vec<_> = starts.zip(ends).collect();
            for lost in 1..1 << sectors.len() {
                let mut torn = record.clone();
                let is_lost = |n: &usize| lost >> n & 1 == 1;
                (0..sectors.len()).filter(is_lost).for_each(|n| torn[sectors[n].0..sectors[n].1].fill(0));
                let got = next_record(&START, &torn, offset as u64, &keys);
                match torn == record {
                    // It began with zeros anyway.
                    true => assert!(matches!(got, Ok(Next::Record { .. }))),
                    false => assert_eq!(got, Ok(Next::Torn), "{lost:b} of {sectors:?} at {offset}"),
                }
            }
        }
        // With another record behind it, it was finished.
        let mut damaged = record.clone();
        damaged[512..1024].fill(0);
        damaged.extend(encode_record(&after, b"more", &keys).0);
        assert!(next_record(&START, &damaged, 0, &keys).is_err());
    }

    #[test]
    fn headers_of_other_versions_and_changed_ones_are_refused() {
        let keys = keys();
        let header = Header { store: Uuid::from_u128(1), base: Position { seq: 3, chain: [4; 32] } };
        let bytes = header.encode(&keys);
        assert_eq!(bytes.len(), HEADER_LEN);
        assert_eq!(Header::parse(&bytes), Ok(header));
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(Header::parse(&changed).is_err() || !Header::is_authentic(&changed, &keys), "byte {at}");
            assert!(Header::parse(&bytes[..at]).is_err());
        }
    }
}
