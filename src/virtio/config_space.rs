//! The configuration space of the block device (virtio 1.3, 5.2.4).

use crate::virtio::{MAX_DISCARD_SECTORS, SECTOR_SIZE, Shape};

/// Bytes that front-ends may ask for: `struct virtio_blk_config` up to its zoned part. What we do not offer
/// reads as zero.
pub const SIZE: usize = 96;

/// Offset of the one byte that a driver may write: `writeback`.
pub const WRITEBACK_OFFSET: usize = 32;

/// What the configuration space shows.
#[derive(Clone, Copy, Debug)]
pub struct ConfigSpace {
    /// The disk's shape.
    pub shape: Shape,
    /// Request queues that the driver may use, 1..=65535.
    pub queues: u16,
    /// Most data segments in a request.
    pub seg_max: u32,
}

impl ConfigSpace {
    /// The bytes, little-endian, with the present `writeback` state.
    pub fn bytes(&self, writeback: bool) -> [u8; SIZE] {
        let block_sectors = self.shape.block_sectors() as u32;
        // 4 KiB is the unit in which the layer file is allocated and punched.
        let alignment = (4096 / SECTOR_SIZE) as u32;
        let mut out = [0; SIZE];
        let mut put = |offset: usize, bytes: &[u8]| out[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.shape.sectors.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &self.shape.block_size.to_le_bytes());
        // topology: physical_block_exp, alignment_offset, min_io_size, opt_io_size (in logical blocks)
        put(24, &[(alignment / block_sectors).trailing_zeros() as u8, 0]);
        put(26, &((alignment / block_sectors) as u16).to_le_bytes());
        put(28, &0u32.to_le_bytes());
        put(WRITEBACK_OFFSET, &[u8::from(writeback)]);
        put(34, &self.queues.to_le_bytes());
        if !self.shape.read_only {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes()); // max_discard_seg
            put(44, &alignment.to_le_bytes()); // discard_sector_alignment
            put(48, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
            put(56, &[1]); // write_zeroes_may_unmap
        }
        out
    }

    /// `size` bytes from `offset`, or nothing if that reaches beyond the end.
    pub fn read(&self, offset: u32, size: u32, writeback: bool) -> Option<Vec<u8>> {
        let start = offset as usize;
        let end = start.checked_add(size as usize)?;
        self.bytes(writeback).get(start..end).map(<[u8]>::to_vec)
    }
}

/// The new `writeback` state, if `bytes` written at `offset` cover it. All else is read-only, and a write to
/// it has no effect (virtio 1.3, 5.2.5).
pub fn writeback_written(offset: u32, bytes: &[u8]) -> Option<bool> {
    let at = WRITEBACK_OFFSET.checked_sub(offset as usize)?;
    bytes.get(at).map(|&byte| byte != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(block_size: u32) -> ConfigSpace {
        let shape = Shape { sectors: 0x1_0000_0008, block_size, read_only: false };
        ConfigSpace { shape, queues: 3, seg_max: 126 }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let bytes = space(512).bytes(true);
        assert_eq!(bytes[..8], 0x1_0000_0008u64.to_le_bytes());
        assert_eq!(bytes[20..24], 512u32.to_le_bytes());
        assert_eq!(bytes[24], 3);
        assert_eq!((bytes[32], bytes[33]), (1, 0));
        assert_eq!(bytes[34..36], [3, 0]);
        assert_eq!(bytes[56], 1);
        assert_eq!(space(4096).bytes(false)[24], 0);
    }

    #[test]
    fn reads_stay_inside() {
        let space = space(512);
        assert_eq!(space.read(0, 60, true).unwrap().len(), 60);
        assert_eq!(space.read(36, 60, true).unwrap().len(), 60);
        assert!(space.read(37, 60, true).is_none());
        assert!(space.read(u32::MAX, u32::MAX, true).is_none());
    }

    #[test]
    fn only_the_writeback_byte_can_be_written() {
        assert_eq!(writeback_written(32, &[0]), Some(false));
        assert_eq!(writeback_written(31, &[0, 1]), Some(true));
        assert_eq!(writeback_written(33, &[1]), None);
        assert_eq!(writeback_written(0, &[1; 32]), None);
        assert_eq!(writeback_written(0, &[]), None);
    }
}
