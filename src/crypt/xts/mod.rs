//! AES-256-XTS (IEEE 1619) with dm-crypt's `plain64` tweak: LE64(sector number in 512-byte units) ‖ 0⁶⁴.
//!
//! One trait, several engines. A data unit is 512 or 4096 bytes; with 4096-byte units the tweak still
//! counts in 512-byte sectors (0, 8, 16, …), as dm-crypt does without `iv_large_sectors`.

#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
#[macro_use]
mod kernels;
#[cfg(target_arch = "aarch64")]
mod arm;
mod engine;
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
mod hardware;
mod portable;
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
mod schedule;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use engine::{Engine, new_cipher};

use crate::crypt::SectorSize;
use vm_memory::VolatileSlice;

/// Encrypts and decrypts whole requests of one volume. All lengths are multiples of the data unit and
/// `first_sector` (512-byte units) is a multiple of the data unit's sectors; an engine panics otherwise.
pub trait SectorCipher: Send + Sync {
    /// Which engine this is, for the log: the name of an [`Engine`].
    fn engine(&self) -> &'static str;

    /// The size of a data unit: the sector size of the volume that it was made for.
    fn sector_size(&self) -> SectorSize;

    /// Writes the data key into `out`, data key ‖ tweak key, 64 bytes; as secret as that. The first round
    /// keys of AES-256 are the key, which is kept in no other form.
    fn write_key(&self, out: &mut [u8]);

    /// Guest memory → buffer in one pass. `src` is read exactly once: the guest may change it meanwhile.
    /// Both have the same length.
    fn encrypt(&self, src: VolatileSlice<'_>, dst: &mut [u8], first_sector: u64);

    /// Buffer, or a file's memory, → guest memory, as far as `src` was written: up to a sector of 512
    /// bytes that begins with eight zero bytes, as hardly any ciphertext does and every unwritten
    /// sector. Returns how many bytes are done from the first on, whole data units; behind them there
    /// may be anything in `dst`, but for what a decryption makes of an unwritten sector. What is
    /// delivered of `src` is read exactly once, and nothing is ever read back from `dst`. The two have
    /// the same length and do not overlap.
    fn decrypt_written(&self, src: VolatileSlice<'_>, dst: VolatileSlice<'_>, first_sector: u64) -> usize;

    /// Whole data units in place, for the methods below, which have checked that they are;
    /// `first` is the first one's.
    fn in_place(&self, direction: Direction, data: &mut [u8], first: TweakInput);

    /// In place.
    fn encrypt_in_place(&self, data: &mut [u8], first_sector: u64) {
        check_request(self.sector_size(), data.len(), data.len(), first_sector);
        self.in_place(Direction::Encrypt, data, TweakInput::sector(first_sector));
    }

    /// In place.
    fn decrypt_in_place(&self, data: &mut [u8], first_sector: u64) {
        check_request(self.sector_size(), data.len(), data.len(), first_sector);
        self.in_place(Direction::Decrypt, data, TweakInput::sector(first_sector));
    }

    /// One data unit in place under any 128-bit tweak. Volumes have sector numbers; published test vectors
    /// have tweaks like this.
    fn crypt_unit(&self, direction: Direction, data: &mut [u8], tweak: [u8; 16]) {
        assert_eq!(data.len(), self.sector_size().bytes() as usize, "one data unit");
        self.in_place(direction, data, TweakInput::bytes(tweak));
    }
}

/// Which way data goes through the cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Plaintext to ciphertext.
    Encrypt,
    /// Ciphertext to plaintext.
    Decrypt,
}

/// What is encrypted under the second key to become the tweak of a data unit, as two little-endian halves.
/// From unit to unit only `low` counts on. Nobody else makes one.
#[derive(Clone, Copy)]
pub struct TweakInput {
    low: u64,
    high: u64,
}

impl TweakInput {
    fn sector(sector: u64) -> Self {
        TweakInput { low: sector, high: 0 }
    }

    fn bytes(tweak: [u8; 16]) -> Self {
        let tweak = u128::from_le_bytes(tweak);
        TweakInput { low: tweak as u64, high: (tweak >> 64) as u64 }
    }

    /// The tweak input of the data unit that begins `sectors` sectors further on.
    fn plus(self, sectors: u64) -> Self {
        TweakInput { low: self.low.wrapping_add(sectors), ..self }
    }

    fn to_bytes(self) -> [u8; 16] {
        (u128::from(self.low) | u128::from(self.high) << 64).to_le_bytes()
    }
}

/// The contract of [`SectorCipher`], checked by every engine before it touches anything.
fn check_request(size: SectorSize, src_len: usize, dst_len: usize, first_sector: u64) {
    assert_eq!(src_len, dst_len, "source and destination of a cipher request differ in length");
    assert!(
        src_len.is_multiple_of(size.bytes() as usize) && first_sector.is_multiple_of(size.tweak_step()),
        "a cipher request of {src_len} bytes at sector {first_sector} is not whole {}-byte data units",
        size.bytes()
    );
}
