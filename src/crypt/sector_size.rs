//! The size of a volume's sectors.

use serde::{Deserialize, Serialize};

/// How large a volume's sectors are: the guest's disk has logical blocks of this size, and one sector is
/// one data unit of XTS, which has one tweak. (A sector of virtio, and the number in a tweak, count 512
/// bytes whatever this is.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum SectorSize {
    /// 512 bytes.
    #[default]
    B512,
    /// 4096 bytes.
    B4096,
}

impl SectorSize {
    /// In bytes: 512 or 4096.
    pub const fn bytes(self) -> u32 {
        match self {
            SectorSize::B512 => 512,
            SectorSize::B4096 => 4096,
        }
    }

    /// By how much the number in the tweak grows from one data unit to the next: it counts 512 bytes.
    pub const fn tweak_step(self) -> u64 {
        self.bytes() as u64 / 512
    }
}

impl From<SectorSize> for u32 {
    fn from(size: SectorSize) -> u32 {
        size.bytes()
    }
}

impl TryFrom<u32> for SectorSize {
    type Error = String;

    fn try_from(bytes: u32) -> Result<Self, String> {
        match bytes {
            512 => Ok(SectorSize::B512),
            4096 => Ok(SectorSize::B4096),
            other => Err(format!("a sector size of {other} bytes; it is 512 or 4096")),
        }
    }
}
