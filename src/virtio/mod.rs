//! The virtio block device as the guest sees it: features, configuration space, requests.
//!
//! Pure: it knows guest memory and numbers, no file, no socket, no cipher. Everything that a guest wrote is
//! checked here, once; what leaves this module cannot be out of range.
//!
//! Source: Virtual I/O Device (VIRTIO) Version 1.3, section 5.2 "Block Device".

pub mod chain;
pub mod config_space;
pub mod features;
pub mod memory;
pub mod request;

pub use request::{Op, Parsed, Segment, Status, parse};

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes in the unit in which virtio-blk counts sectors, whatever the device's logical block size.
pub const SECTOR_SIZE: u64 = 512;

/// The most sectors that one DISCARD or WRITE_ZEROES request may name: 1 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// The shape of the disk, as every check needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Capacity in 512-byte sectors.
    pub sectors: u64,
    /// Logical block size in bytes, 512 or 4096.
    pub block_size: u32,
    /// Whether the guest may write.
    pub read_only: bool,
}

impl Shape {
    /// Sectors in a logical block: 1 or 8.
    pub fn block_sectors(&self) -> u64 {
        u64::from(self.block_size) / SECTOR_SIZE
    }

    /// Whether `count` sectors from `sector` are whole blocks inside the disk.
    pub fn contains(&self, sector: u64, count: u64) -> bool {
        let mask = self.block_sectors() - 1;
        sector & mask == 0
            && count & mask == 0
            && sector.checked_add(count).is_some_and(|end| end <= self.sectors)
    }
}

/// A [`Shape`] whose capacity may grow while the disk is in use.
#[derive(Debug)]
pub struct SharedShape {
    first: Shape,
    sectors: AtomicU64,
}

impl SharedShape {
    /// With that to begin with.
    pub fn new(shape: Shape) -> Self {
        SharedShape { first: shape, sectors: AtomicU64::new(shape.sectors) }
    }

    /// The shape at this moment. A request is judged by one look at it.
    pub fn now(&self) -> Shape {
        Shape { sectors: self.sectors.load(Ordering::Acquire), ..self.first }
    }

    /// Makes the capacity that many sectors, which must be whole blocks. It never shrinks: a smaller number
    /// changes nothing. Returns whether it grew.
    pub fn grow(&self, sectors: u64) -> bool {
        self.sectors.fetch_max(sectors, Ordering::AcqRel) < sectors
    }
}
