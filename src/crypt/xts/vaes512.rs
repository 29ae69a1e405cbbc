//! The engine for x86-64 CPUs with AVX-512 and VAES: four blocks an instruction, eight instructions in flight.
//!
//! Data goes from source to destination in one pass, with the tweak chain of a data unit in registers. Round keys
//! and tweaks are never written to the stack: the keys lie four times over, as wide as a register, in secret
//! memory and are loaded from there round by round; `ci/check-spills` checks the machine code for it.

mod kernel;
mod keys;

use super::{DataUnit, Direction, SectorCipher, TweakInput, check_request};
use crate::crypt::Dek;
use crate::crypt::secret_mem::{Secret, wipe_stack};
use crate::error::Result;
use keys::Keys;
use vm_memory::VolatileSlice;

/// Bytes of stack below which no kernel reaches in a development build.
const DEVELOPMENT_FRAMES: usize = 16 << 10;

/// Whether this CPU and kernel have what the kernels need.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
}

/// The VAES engine. That one exists proves that the CPU can run it.
pub(super) struct Vaes512 {
    keys: Secret<Keys>,
    unit: DataUnit,
}

impl Vaes512 {
    /// The engine under `dek`, or `None` on a CPU that lacks the instructions.
    pub(super) fn new(dek: &Dek, unit: DataUnit) -> Result<Option<Self>> {
        if !available() {
            return Ok(None);
        }
        let (data, tweak) = dek.halves();
        // SAFETY: `available` has just found every feature that key expansion uses.
        let keys = Secret::new(|| unsafe { Keys::expand(data, tweak) })?;
        Ok(Some(Vaes512 { keys, unit }))
    }

    /// `len` bytes from `src` to `dst`, which may be the same.
    ///
    /// # Safety
    /// `src` is readable and `dst` writable for `len` bytes, a multiple of the data unit, and they are equal or do
    /// not overlap. Others may change the memory meanwhile; nobody else holds a Rust reference to what is written.
    unsafe fn run(&self, way: Direction, src: *const u8, dst: *mut u8, len: usize, first: TweakInput) {
        let run = kernel::kernel(way, self.unit);
        // SAFETY: the constructor checked the CPU's features; the memory is as the caller promises.
        unsafe { run(&self.keys, src, dst, len / self.unit.bytes(), first) };
        // A development build does not inline all parts of a kernel (how many depends on the rest of the program), and
        // what is passed between them goes by the stack. `ci/check-spills` sees to it that a release has no need of this.
        if cfg!(debug_assertions) {
            wipe_stack::<DEVELOPMENT_FRAMES>();
        }
    }

    fn in_place(&self, way: Direction, data: &mut [u8], first: TweakInput) {
        let at = data.as_mut_ptr();
        // SAFETY: `data` is exclusively ours; the callers checked that it is whole data units.
        unsafe { self.run(way, at, at, data.len(), first) }
    }
}

impl SectorCipher for Vaes512 {
    fn engine(&self) -> &'static str {
        "vaes512"
    }

    fn data_unit(&self) -> DataUnit {
        self.unit
    }

    fn encrypt(&self, src: VolatileSlice<'_>, dst: &mut [u8], first_sector: u64) {
        check_request(self.unit, src.len(), dst.len(), first_sector);
        let (guest, first) = (src.ptr_guard(), TweakInput::sector(first_sector));
        // SAFETY: the guard keeps `src` mapped for its length, which is that of `dst`; a `&mut [u8]` cannot overlap
        // guest memory.
        unsafe { self.run(Direction::Encrypt, guest.as_ptr(), dst.as_mut_ptr(), dst.len(), first) }
    }

    fn decrypt(&self, src: VolatileSlice<'_>, dst: VolatileSlice<'_>, first_sector: u64) {
        check_request(self.unit, src.len(), dst.len(), first_sector);
        let (from, guest, first) = (src.ptr_guard(), dst.ptr_guard_mut(), TweakInput::sector(first_sector));
        // SAFETY: the guards keep both mapped for their length, which is the same; neither is a buffer of the other's,
        // and what either holds is nobody's Rust reference.
        unsafe { self.run(Direction::Decrypt, from.as_ptr(), guest.as_ptr(), src.len(), first) }
    }

    fn encrypt_in_place(&self, data: &mut [u8], first_sector: u64) {
        check_request(self.unit, data.len(), data.len(), first_sector);
        self.in_place(Direction::Encrypt, data, TweakInput::sector(first_sector));
    }

    fn decrypt_in_place(&self, data: &mut [u8], first_sector: u64) {
        check_request(self.unit, data.len(), data.len(), first_sector);
        self.in_place(Direction::Decrypt, data, TweakInput::sector(first_sector));
    }

    fn crypt_unit(&self, direction: Direction, data: &mut [u8], tweak: [u8; 16]) {
        assert_eq!(data.len(), self.unit.bytes(), "one data unit");
        self.in_place(direction, data, TweakInput::bytes(tweak));
    }
}
