//! AES-256-XTS (IEEE 1619) with dm-crypt's `plain64` tweak: LE64(sector number in 512-byte units) ‖ 0⁶⁴.
//!
//! One trait, several engines. A data unit is 512 or 4096 bytes; with 4096-byte units the tweak still
//! counts in 512-byte sectors (0, 8, 16, …), as dm-crypt does without `iv_large_sectors`.

use vm_memory::VolatileSlice;

/// Encrypts and decrypts whole requests of one volume. All lengths are multiples of the data unit and
/// `first_sector` (512-byte units) is a multiple of the data unit's sectors; an engine may panic otherwise.
pub trait SectorCipher: Send + Sync {
    /// Which engine this is, for the log and `doctor`: `portable`, `vaes512`.
    fn engine(&self) -> &'static str;

    /// Guest memory → buffer in one pass. `src` is read exactly once: the guest may change it meanwhile.
    /// Both have the same length.
    fn encrypt(&self, src: VolatileSlice<'_>, dst: &mut [u8], first_sector: u64);

    /// Buffer → guest memory. Nothing is ever read back from `dst`.
    fn decrypt(&self, src: &[u8], dst: VolatileSlice<'_>, first_sector: u64);

    /// In place.
    fn encrypt_in_place(&self, data: &mut [u8], first_sector: u64);

    /// In place.
    fn decrypt_in_place(&self, data: &mut [u8], first_sector: u64);
}
