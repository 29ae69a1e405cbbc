//! A page: which blocks one data key has in a run of 8192 blocks (4 GiB of a snapshot), and their names.
//!
//! Bytes: `sealblk page 1` and a line feed; the number of its blocks, 4 bytes; then for each, in rising
//! order, its number in the run, 2 bytes, and its name, 32 bytes. Numbers are little-endian. A page
//! without blocks is no object.

use super::{ContentName, corrupt};
use crate::base::Result;
use std::collections::BTreeMap;

/// Blocks that a page is about.
pub(crate) const RUN: u64 = 8192;
/// The longest object of a page, in bytes.
pub(crate) const MAX: usize = HEAD.len() + 4 + RUN as usize * ENTRY;

const HEAD: &[u8] = b"sealblk page 1\n";
const ENTRY: usize = 2 + 32;

/// The names of blocks by their numbers in the run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Page(pub(crate) BTreeMap<u16, ContentName>);

impl Page {
    /// The page's bytes; none if it has no block.
    pub(crate) fn encode(&self) -> Option<Vec<u8>> {
        if self.0.is_empty() {
            return None;
        }
        let mut bytes = Vec::with_capacity(HEAD.len() + 4 + self.0.len() * ENTRY);
        bytes.extend_from_slice(HEAD);
        bytes.extend_from_slice(&(self.0.len() as u32).to_le_bytes());
        for (number, name) in &self.0 {
            bytes.extend_from_slice(&number.to_le_bytes());
            bytes.extend_from_slice(name.bytes());
        }
        Some(bytes)
    }

    /// The page that these bytes are, whoever wrote them.
    ///
    /// # Errors
    /// `Corrupt` for what is none.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let body = bytes.strip_prefix(HEAD).and_then(|rest| rest.split_at_checked(4));
        let (count, entries) = body.ok_or_else(|| corrupt("a page does not begin like one".into()))?;
        let count = count.iter().rev().fold(0usize, |count, &byte| count << 8 | usize::from(byte));
        if count == 0 || count > RUN as usize || entries.len() != count * ENTRY {
            return Err(corrupt(format!("a page of {count} blocks has {} bytes", bytes.len())));
        }
        let mut page = Page::default();
        let mut last: Option<u16> = None;
        for entry in entries.chunks_exact(ENTRY) {
            let (number, name) = entry.split_at(2);
            let number = u16::from(number[0]) | u16::from(number[1]) << 8;
            if u64::from(number) >= RUN || last.is_some_and(|last| last >= number) {
                return Err(corrupt("a page has its blocks in another order".into()));
            }
            last = Some(number);
            let name = name.try_into().map_err(|_| corrupt("a page is cut short".into()))?;
            page.0.insert(number, ContentName::of(name));
        }
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        Page([(0, 1), (7, 2), (8191, 3)].map(|(n, byte)| (n, ContentName::of([byte; 32]))).into())
    }

    #[test]
    fn a_page_is_read_as_it_was_written() {
        assert_eq!(Page::default().encode(), None);
        let bytes = page().encode().unwrap();
        assert_eq!(bytes.len(), HEAD.len() + 4 + 3 * ENTRY);
        assert_eq!(Page::decode(&bytes).unwrap(), page());
        let all = (0..RUN as u16).map(|n| (n, ContentName::of([9; 32]))).collect();
        assert_eq!(Page(all).encode().unwrap().len(), MAX);
    }

    #[test]
    fn what_is_no_page_is_refused() {
        let bytes = page().encode().unwrap();
        for len in 0..bytes.len() {
            assert!(Page::decode(&bytes[..len]).is_err(), "{len}");
        }
        let edit = |at: usize, value: u8| {
            let mut edited = bytes.clone();
            edited[at] = value;
            Page::decode(&edited)
        };
        let numbers = HEAD.len() + 4;
        assert!(edit(0, b'S').is_err() && edit(13, b'2').is_err());
        assert!(edit(HEAD.len(), 2).is_err() && edit(HEAD.len() + 3, 1).is_err(), "another count");
        assert!(edit(numbers, 9).is_err(), "not in their order");
        assert!(edit(numbers + 2 * ENTRY + 1, 0x20).is_err(), "beyond the run");
        assert!(Page::decode(&[HEAD, &[0; 4]].concat()).is_err(), "empty");
    }
}
