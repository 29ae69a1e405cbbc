//! The kernels for 128-bit registers, a block each: AES-NI with AVX.

use crate::crypt::SectorSize;
use crate::crypt::secret_mem::registers::{clear_general, clear_ymm};
use crate::crypt::xts::TweakInput;
use crate::crypt::xts::kernels::Task;
use crate::crypt::xts::x86::Kernel;
use crate::crypt::xts::x86::keys::{Keys, Schedule};
use crate::crypt::xts::x86::narrow::{self, Register, Scratch, WIDTH};
use std::arch::asm;
use std::arch::x86_64::*;

kernels!("avx,aes", clear_ymm, scratch: *mut Scratch);

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
    unsafe { narrow::run::<__m128i, DECRYPT, WRITTEN, SECTORS>(keys, scratch, src, dst, units, first) }
}

/// 16 bytes at any address.
#[repr(C, packed)]
struct Unaligned(__m128i);

// Each function says what it is by its name. None has the features that its instructions need: it is inlined
// into a kernel, which has them.
impl Register for __m128i {
    const BLOCKS: usize = 1;

    #[inline(always)]
    unsafe fn inputs(first: TweakInput, _: u64) -> Self {
        // SAFETY: the CPU has the instruction, says the caller.
        unsafe { _mm_set_epi64x(first.high as i64, first.low as i64) }
    }

    #[inline(always)]
    unsafe fn read(at: *const u8) -> Self {
        // SAFETY: the caller vouches for 16 readable bytes; Unaligned has alignment 1.
        unsafe { at.cast::<Unaligned>().read_volatile().0 }
    }

    #[inline(always)]
    unsafe fn write(self, at: *mut u8) {
        // SAFETY: the caller vouches for 16 writable bytes; the store takes any alignment.
        unsafe { _mm_storeu_si128(at.cast(), self) }
    }

    #[inline(always)]
    unsafe fn round_key(keys: &Schedule, round: usize) -> Self {
        // SAFETY: the CPU has the instruction, says the caller.
        unsafe { keys.round_key_128(round) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm_xor_si128(self, other) }
    }

    #[inline(always)]
    unsafe fn encrypt(self, key: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm_aesenc_si128(self, key) }
    }

    #[inline(always)]
    unsafe fn encrypt_last(self, key: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm_aesenclast_si128(self, key) }
    }

    #[inline(always)]
    unsafe fn decrypt(self, key: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm_aesdec_si128(self, key) }
    }

    #[inline(always)]
    unsafe fn decrypt_last(self, key: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm_aesdeclast_si128(self, key) }
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
fn together(blocks: &mut [__m128i; WIDTH]) {
    let [a, b, c, d, e, f, g, h] = blocks;
    // SAFETY: no instruction at all.
    unsafe {
        asm!(
            "/* {} {} {} {} {} {} {} {} */",
            inout(xmm_reg) * a,
            inout(xmm_reg) * b,
            inout(xmm_reg) * c,
            inout(xmm_reg) * d,
            inout(xmm_reg) * e,
            inout(xmm_reg) * f,
            inout(xmm_reg) * g,
            inout(xmm_reg) * h,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}
