//! What is to come of a layer that was pulled lazily, as it is kept beside the layer: where from, and the
//! names of all of its blocks.
//!
//! Bytes of `<uuid>.wanted`: `sealblk wanted 1` and a line feed; a line of JSON ([`Head`]); for each block
//! that is to come, in rising order, its number, 8 bytes, least significant first, and its name, 32 bytes;
//! and the HMAC-SHA256 of all this, 32 bytes, under the key of manifests of the layer's data key. It was
//! written by a process that had proved the manifest and the pages: whoever proves it again needs neither.

use super::page::Page;
use super::{ContentName, corrupt};
use crate::base::Result;
use crate::catalog::coming::{FIRST_LINE, Head, MAX_HEAD};
use crate::crypt::BackupKeys;
use crate::place::{Access, PlaceUrl};
use subtle::ConstantTimeEq;

const ENTRY: usize = 8 + 32;
const MAC: usize = 32;

/// What is to come of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ToCome {
    /// Which layer, and where from.
    pub(crate) head: Head,
    /// The blocks' numbers and names, in rising order.
    pub(crate) blocks: Vec<(u64, ContentName)>,
}

impl ToCome {
    /// Adds the blocks of a page, of which `first` is the number of the first one that it can have.
    pub(crate) fn add(&mut self, first: u64, page: &Page) {
        self.blocks.extend(page.0.iter().map(|(&at, &name)| (first + u64::from(at), name)));
        self.head.blocks = self.blocks.len() as u64;
    }

    /// The bytes; `keys` are those of the layer's data key.
    pub(crate) fn to_bytes(&self, keys: &BackupKeys) -> Vec<u8> {
        let mut bytes = FIRST_LINE.as_bytes().to_vec();
        bytes.extend(serde_json::to_vec(&self.head).expect("texts and numbers"));
        bytes.push(b'\n');
        bytes.reserve(self.blocks.len() * ENTRY + MAC);
        for (number, name) in &self.blocks {
            bytes.extend_from_slice(&number.to_le_bytes());
            bytes.extend_from_slice(name.bytes());
        }
        let mac = keys.manifest_mac(&bytes);
        bytes.extend_from_slice(&mac);
        bytes
    }

    /// The longest file for a layer of so many blocks, in bytes.
    pub(crate) fn longest(blocks: u64) -> u64 {
        (FIRST_LINE.len() + MAX_HEAD + MAC) as u64 + blocks.saturating_mul(ENTRY as u64)
    }

    /// Reads these bytes, if whoever wrote them had the data key; `keys` are those of the layer's.
    ///
    /// # Errors
    /// `Corrupt` for anything else.
    pub(crate) fn prove(bytes: &[u8], keys: &BackupKeys) -> Result<Self> {
        let (said, mac) = bytes.split_last_chunk::<MAC>().ok_or_else(|| corrupt("it is cut short".into()))?;
        if !bool::from(mac.ct_eq(&keys.manifest_mac(said))) {
            return Err(corrupt(
                "its MAC does not fit: it was edited, or written by somebody who had not the data key".into(),
            ));
        }
        let odd = || corrupt("it is not what this sealblk writes".into());
        let rest = said.strip_prefix(FIRST_LINE.as_bytes()).ok_or_else(odd)?;
        let end = rest.iter().take(MAX_HEAD).position(|&byte| byte == b'\n').ok_or_else(odd)?;
        let head: Head = serde_json::from_slice(&rest[..end]).map_err(|_| odd())?;
        let (entries, left) = rest[end + 1..].as_chunks::<ENTRY>();
        let read = |entry: &[u8; ENTRY]| {
            let (number, name) = entry.split_at(8);
            let number = number.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte));
            (number, ContentName::of(name.try_into().expect("32 bytes are left")))
        };
        let blocks: Vec<(u64, ContentName)> = entries.iter().map(read).collect();
        let is_rising = blocks.is_sorted_by(|(one, _), (next, _)| one < next);
        let is_inside = blocks.last().is_none_or(|(last, _)| *last < super::manifest::blocks_of(head.size));
        match left.is_empty() && is_rising && is_inside && head.blocks == blocks.len() as u64 {
            true => Ok(ToCome { head, blocks }),
            false => Err(odd()),
        }
    }

    /// Where it comes from.
    ///
    /// # Errors
    /// `Usage` for what is no place.
    pub(crate) fn target(&self) -> Result<(PlaceUrl, Access)> {
        let Head { url, endpoint, region, .. } = &self.head;
        Ok((url.parse()?, Access { endpoint: endpoint.clone(), region: region.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{LayerId, SnapshotId, VolumeId};
    use crate::crypt::secret_mem::SecretMem;

    fn keys(first: u8) -> BackupKeys {
        let mut mem = SecretMem::new(BackupKeys::LEN).unwrap();
        mem.as_mut_slice().fill(first);
        BackupKeys::from_secret(mem).unwrap()
    }

    fn to_come() -> ToCome {
        let head = Head {
            layer: LayerId::random(),
            size: 10 << 20,
            blocks: 0,
            snapshot: SnapshotId::random(),
            volume: VolumeId::random(),
            place: uuid::Uuid::new_v4(),
            url: "file:///mnt/x".into(),
            endpoint: None,
            region: None,
            rate: 7,
        };
        let mut it = ToCome { head, blocks: Vec::new() };
        it.add(0, &Page([(0, 1), (3, 2), (19, 3)].map(|(n, byte)| (n, ContentName::of([byte; 32]))).into()));
        it
    }

    #[test]
    fn what_is_to_come_is_read_as_it_was_written() {
        let it = to_come();
        let bytes = it.to_bytes(&keys(1));
        assert!(bytes.len() as u64 <= ToCome::longest(20));
        assert_eq!(ToCome::prove(&bytes, &keys(1)).unwrap(), it);
        assert_eq!(it.target().unwrap().0.to_string(), "file:///mnt/x");
    }

    #[test]
    fn what_was_edited_or_is_of_another_key_is_refused() {
        let bytes = to_come().to_bytes(&keys(1));
        assert!(ToCome::prove(&bytes, &keys(2)).is_err());
        for at in 0..bytes.len() {
            let mut edited = bytes.clone();
            edited[at] ^= 1;
            assert!(ToCome::prove(&edited, &keys(1)).is_err(), "{at}");
            assert!(ToCome::prove(&bytes[..at], &keys(1)).is_err(), "{at}");
        }
    }

    #[test]
    fn blocks_out_of_order_or_beyond_the_end_are_refused_whoever_wrote_them() {
        for numbers in [[0, 3, 20], [3, 0, 4], [0, 0, 1]] {
            let mut it = to_come();
            it.blocks.iter_mut().zip(numbers).for_each(|(block, number)| block.0 = number);
            assert!(ToCome::prove(&it.to_bytes(&keys(1)), &keys(1)).is_err(), "{numbers:?}");
        }
        let mut it = to_come();
        it.head.blocks = 2;
        assert!(ToCome::prove(&it.to_bytes(&keys(1)), &keys(1)).is_err());
    }
}
