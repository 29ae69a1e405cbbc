//! The kernels for 256-bit registers, two blocks each: VAES with AVX2.

use crate::crypt::SectorSize;
use crate::crypt::secret_mem::registers::{clear_general, clear_ymm};
use crate::crypt::xts::TweakInput;
use crate::crypt::xts::kernels::Task;
use crate::crypt::xts::x86::Kernel;
use crate::crypt::xts::x86::keys::{Keys, Schedule};
use crate::crypt::xts::x86::narrow::{self, Register, Scratch, WIDTH};
use std::arch::asm;
use std::arch::x86_64::*;

kernels!("avx2,vaes", clear_ymm, scratch: *mut Scratch);

#[inline(always)]
unsafe fn run<const DECRYPT: bool, const WRITTEN: bool, const SECTORS: usize>(
    keys: &Keys,
    scratch: *mut Scratch,
    src: *const u8,
    dst: *mut u8,
    units: usize,
    first: TweakInput,
) -> usize {
    // SAFETY: the caller's promise is the same; the kernels have the features.
    unsafe { narrow::run::<__m256i, DECRYPT, WRITTEN, SECTORS>(keys, scratch, src, dst, units, first) }
}

/// 32 bytes at any address.
#[repr(C, packed)]
struct Unaligned(__m256i);

// Each function says what it is by its name. None has the features that its instructions need: it is inlined
// into a kernel, which has them.
impl Register for __m256i {
    const BLOCKS: usize = 2;

    #[inline(always)]
    unsafe fn inputs(first: TweakInput, step: u64) -> Self {
        let next = first.plus(step);
        // SAFETY: the CPU has the instruction, says the caller.
        unsafe { _mm256_set_epi64x(next.high as i64, next.low as i64, first.high as i64, first.low as i64) }
    }

    #[inline(always)]
    unsafe fn read(at: *const u8) -> Self {
        // SAFETY: the caller vouches for 32 readable bytes; Unaligned has alignment 1.
        unsafe { at.cast::<Unaligned>().read_volatile().0 }
    }

    #[inline(always)]
    unsafe fn write(self, at: *mut u8) {
        // SAFETY: the caller vouches for 32 writable bytes; the store takes any alignment.
        unsafe { _mm256_storeu_si256(at.cast(), self) }
    }

    #[inline(always)]
    unsafe fn round_key(keys: &Schedule, round: usize) -> Self {
        // SAFETY: the CPU has the instruction, says the caller.
        unsafe { keys.round_key_256(round) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_xor_si256(self, other) }
    }

    #[inline(always)]
    unsafe fn encrypt(self, key: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_aesenc_epi128(self, key) }
    }

    #[inline(always)]
    unsafe fn encrypt_last(self, key: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_aesenclast_epi128(self, key) }
    }

    #[inline(always)]
    unsafe fn decrypt(self, key: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_aesdec_epi128(self, key) }
    }

    #[inline(always)]
    unsafe fn decrypt_last(self, key: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_aesdeclast_epi128(self, key) }
    }

    #[inline(always)]
    unsafe fn together(blocks: &mut [Self; WIDTH]) {
        // SAFETY: the CPU has such registers, says the caller.
        unsafe { together(blocks) }
    }
}

/// See [`Register::together`].
#[inline]
#[target_feature(enable = "avx")]
fn together(blocks: &mut [__m256i; WIDTH]) {
    let [a, b, c, d, e, f, g, h] = blocks;
    // SAFETY: no instruction at all.
    unsafe {
        asm!(
            "/* {} {} {} {} {} {} {} {} */",
            inout(ymm_reg) * a,
            inout(ymm_reg) * b,
            inout(ymm_reg) * c,
            inout(ymm_reg) * d,
            inout(ymm_reg) * e,
            inout(ymm_reg) * f,
            inout(ymm_reg) * g,
            inout(ymm_reg) * h,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}
