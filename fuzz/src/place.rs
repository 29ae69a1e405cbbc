//! What a place outside sends: a manifest, a page, a block; and what another host says by a connection.

use sealblk::backup::{block_again, manifest_says, page_again};
use sealblk::base::{Kind, Result};
use sealblk::helper::carry::{answers_again, requests_again};

/// A letter that says what it is, and the bytes: `m`, the snapshot's id as text, a line feed and a
/// manifest; `p` and a page; `b`, the block's length in 4 bytes, little-endian, and its object; `q` and
/// requests; `a` and answers.
pub fn run(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else { return };
    match kind {
        b'm' => manifest(bytes),
        b'p' => page(bytes),
        b'b' => block(bytes),
        b'q' => messages(bytes, requests_again),
        b'a' => messages(bytes, answers_again),
        _ => {}
    }
}

fn manifest(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == b'\n');
    let (id, bytes) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let Some(id) = std::str::from_utf8(id).ok().and_then(|id| id.parse().ok()) else { return };
    match manifest_says(bytes, id) {
        Err(e) => assert_eq!(e.kind(), Kind::Corrupt),
        Ok((number, _)) => {
            assert!(number > 0);
            // Cut short, it is none.
            assert!(manifest_says(&bytes[..bytes.len() - 1], id).is_err());
        }
    }
}

fn page(bytes: &[u8]) {
    match page_again(bytes) {
        Err(e) => assert_eq!(e.kind(), Kind::Corrupt),
        // There is one way to write a page: else equal ones had several names.
        Ok(again) => assert_eq!(again.as_deref(), Some(bytes)),
    }
}

fn block(bytes: &[u8]) {
    let Some((len, bytes)) = bytes.split_at_checked(4) else { return };
    let len = len.iter().rev().fold(0usize, |len, &byte| len << 8 | usize::from(byte));
    match block_again(bytes, len) {
        Err(e) => assert_eq!(e.kind(), Kind::Corrupt),
        Ok(None) => {}
        Ok(Some(again)) => {
            // Sectors that are all zero are there in what somebody else wrote, and not in ours.
            assert!(again.len() <= bytes.len());
            assert_eq!(block_again(&again, len).expect("reads what it writes"), Some(again));
        }
    }
}

fn messages(bytes: &[u8], again: fn(&[u8]) -> Result<Vec<u8>>) {
    match again(bytes) {
        Err(e) => assert_eq!(e.kind(), Kind::Other),
        Ok(written) => assert_eq!(again(&written).expect("it reads what it writes"), written),
    }
}
