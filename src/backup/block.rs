//! A block: 512 KiB of one data key's ciphertext of a snapshot, as it lies in the layers, without the
//! sectors that are not there.
//!
//! 128 bytes say which of the 1024 sectors of 512 bytes are there, bit n % 8 of byte n / 8 for sector n;
//! those sectors follow, in their order. A sector that is not there is all zero in the layer, and a block
//! without any is no object.

use super::corrupt;
use crate::base::Result;
use crate::base::zeros::is_zero;

/// What is there or not, as a whole, in bytes.
pub(crate) const SECTOR: usize = 512;

/// Bytes of a snapshot that a block is about.
pub(crate) const BLOCK: usize = 512 << 10;
/// Sectors of a block.
pub(crate) const SECTORS: usize = BLOCK / SECTOR;
const BITS: usize = SECTORS / 8;
/// The longest object of a block, in bytes.
pub(crate) const MAX: usize = BITS + BLOCK;

/// The object of a block; none if all of it is zero. The last block of a snapshot may be shorter than others.
pub(crate) fn encode(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut object = Vec::with_capacity(BITS + bytes.len());
    object.resize(BITS, 0);
    for (n, sector) in bytes.chunks(SECTOR).enumerate() {
        if !is_zero(sector) {
            object[n / 8] |= 1 << (n % 8);
            object.extend_from_slice(sector);
        }
    }
    (object.len() > BITS).then_some(object)
}

/// The bytes of a block of which `object` is the object, into `block`: its length is known.
///
/// # Errors
/// `Corrupt` for an object that is none, or has sectors beyond the end.
pub(crate) fn decode(object: &[u8], block: &mut [u8]) -> Result<()> {
    let Some((bits, mut sectors)) = object.split_at_checked(BITS) else {
        return Err(corrupt(format!("a block has {} bytes", object.len())));
    };
    block.fill(0);
    for (n, into) in block.chunks_mut(SECTOR).enumerate() {
        if bits[n / 8] >> (n % 8) & 1 == 1 {
            let Some((sector, rest)) = sectors.split_at_checked(into.len()) else {
                return Err(corrupt("a block is cut short".into()));
            };
            into.copy_from_slice(sector);
            sectors = rest;
        }
    }
    let beyond = block.len().div_ceil(SECTOR)..SECTORS;
    if !sectors.is_empty() || beyond.into_iter().any(|n| bits[n / 8] >> (n % 8) & 1 == 1) {
        return Err(corrupt("a block has more sectors than it may have".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_the_sectors_that_are_there() {
        assert_eq!(encode(&[0; BLOCK]), None);
        let mut bytes = vec![0; BLOCK];
        bytes[SECTOR] = 1;
        bytes[BLOCK - 1] = 2;
        let object = encode(&bytes).unwrap();
        assert_eq!((object.len(), object[0], object[BITS - 1]), (BITS + 2 * SECTOR, 2, 0x80));
        let mut back = vec![9; BLOCK];
        decode(&object, &mut back).unwrap();
        assert!(back == bytes);
        let whole = encode(&[7; BLOCK]).unwrap();
        assert_eq!(whole.len(), MAX);
        decode(&whole, &mut back).unwrap();
        assert!(back == [7; BLOCK]);
    }

    #[test]
    fn the_last_block_is_as_long_as_it_is() {
        let bytes = vec![3; 5 * SECTOR];
        let object = encode(&bytes).unwrap();
        let mut back = vec![0; 5 * SECTOR];
        decode(&object, &mut back).unwrap();
        assert_eq!(back, bytes);
        assert!(decode(&object, &mut back[..4 * SECTOR]).is_err(), "it has a sector beyond the end");
    }

    #[test]
    fn what_is_no_block_is_refused() {
        let object = encode(&[3; 2 * SECTOR]).unwrap();
        let mut back = vec![0; BLOCK];
        for len in 0..object.len() {
            assert!(decode(&object[..len], &mut back).is_err(), "{len}");
        }
        assert!(decode(&[&object[..], &[0]].concat(), &mut back).is_err());
        let mut more = object.clone();
        more[100] |= 1;
        assert!(decode(&more, &mut back).is_err());
    }
}
