//! The virtio-blk configuration space (virtio 1.3, section 5.2.4) read into its fields.

/// Bytes of the configuration space that block devices have.
pub const CONFIG_LEN: u32 = 60;
/// Where the writeback field lies.
pub const WCE_OFFSET: u32 = 32;

/// The fields, in the units of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlkConfig {
    /// Sectors of 512 bytes.
    pub capacity: u64,
    /// Most bytes of a data segment.
    pub size_max: u32,
    /// Most data segments of a request.
    pub seg_max: u32,
    /// Bytes of a logical block.
    pub blk_size: u32,
    /// Logical blocks of a physical one, as a power of two.
    pub physical_block_exp: u8,
    /// 1 while the device has a volatile write cache that FLUSH empties.
    pub writeback: u8,
    /// Request queues.
    pub num_queues: u16,
    /// Most sectors of a discard.
    pub max_discard_sectors: u32,
    /// Most segments of a discard.
    pub max_discard_seg: u32,
    /// Most sectors of a write-zeroes.
    pub max_write_zeroes_sectors: u32,
    /// Most segments of a write-zeroes.
    pub max_write_zeroes_seg: u32,
}

impl BlkConfig {
    /// Reads the fields out of the first 60 bytes.
    pub fn parse(bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        BlkConfig {
            capacity: u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")),
            size_max: word(8),
            seg_max: word(12),
            blk_size: word(20),
            physical_block_exp: bytes[24],
            writeback: bytes[WCE_OFFSET as usize],
            num_queues: u16::from_le_bytes([bytes[34], bytes[35]]),
            max_discard_sectors: word(36),
            max_discard_seg: word(40),
            max_write_zeroes_sectors: word(48),
            max_write_zeroes_seg: word(52),
        }
    }
}
