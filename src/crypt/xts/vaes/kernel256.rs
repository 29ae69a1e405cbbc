//! The kernels for 256-bit registers: data units from source to destination through XTS, 128 bytes at
//! a time in four registers.
//!
//! There are sixteen registers only, so a group is eight blocks: four registers of data and four
//! of their tweaks. The CPU keeps its AES units busy by working on two or three groups at once,
//! whose order in the code matters less therefore than with
//! [`crate::crypt::xts::vaes::kernel512`].
//!
//! Where registers are this wide, a carry-less multiplication keeps the AES units busy as well (two cycles of
//! both on Zen 3, as long as four rounds). So tweaks are made by doubling, which takes none, one step at a
//! time for two blocks at once that are half a sector apart: a group is four blocks of either half.

use crate::crypt::SectorSize;
use crate::crypt::secret_mem::registers::clear_ymm;
use crate::crypt::xts::TweakInput;
use crate::crypt::xts::vaes::keys::{Keys, LAST_ROUND, Schedule};
use crate::crypt::xts::vaes::{AHEAD, Kernel, Task, begins_with_zeros};
use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;

/// Registers of two blocks in a group.
const WIDTH: usize = 4;
/// Bytes of one register, and of one group.
const REGISTER: usize = 32;
const GROUP: usize = WIDTH * REGISTER;
const GROUPS_OF_SECTOR: usize = SectorSize::B512.bytes() as usize / GROUP;
/// Bytes of half a sector.
const HALF: usize = SectorSize::B512.bytes() as usize / 2;
/// Where the registers of a group begin. A table, since a release checks arithmetic for overflow, and a check
/// in a kernel's loop keeps it from being unrolled.
const PLACES: [usize; WIDTH] = {
    let mut places = [0; WIDTH];
    let mut i = 0;
    while i < WIDTH {
        places[i] = i / 2 * HALF + i % 2 * REGISTER;
        i += 1;
    }
    places
};

/// Four registers: eight blocks, or their tweaks.
type Group = [__m256i; WIDTH];

/// A register's worth of 64-bit words.
#[repr(align(32))]
struct Constant([u64; 4]);

/// x⁷ + x² + x + 1: what x¹²⁸ is worth in XTS's field.
static POLYNOMIAL: Constant = Constant([0x87; 4]);
/// What the carry out of the high half of a block, and that out of its low half, are worth.
static CARRIES: Constant = Constant([0x87, 1, 0x87, 1]);
/// What the tweak inputs of two data units, of 512 and of 4096 bytes, have over the first.
static NEXT_512: Constant = Constant([0, 0, 1, 0]);
static NEXT_4096: Constant = Constant([0, 0, 8, 0]);

kernels!("avx2,vaes,vpclmulqdq", clear_ymm);

#[inline]
#[target_feature(enable = "avx2,vaes,vpclmulqdq")]
unsafe fn run<const DECRYPT: bool, const WRITTEN: bool, const GROUPS: usize>(
    keys: &Keys,
    mut src: *const u8,
    mut dst: *mut u8,
    units: usize,
    first: TweakInput,
) -> usize {
    let data_keys = if DECRYPT { &keys.decrypt } else { &keys.encrypt };
    let mut input = first;
    let mut initial = encrypt_two::<GROUPS>(&keys.tweak, input);
    for unit in 0..units {
        let mut tweaks = of_both_halves(initial);
        // The next unit's, now, so that they are there when they are needed.
        input = input.plus((GROUPS * GROUP / 512) as u64);
        initial = if unit % 2 == 1 {
            encrypt_two::<GROUPS>(&keys.tweak, input)
        } else {
            _mm256_permute4x64_epi64::<0b11_10_11_10>(initial)
        };
        for group in 0..GROUPS {
            let of_sector = group % GROUPS_OF_SECTOR;
            // SAFETY: both pointers stand where a group of a sector begins that the data unit has left.
            unsafe {
                if of_sector == 0 {
                    if WRITTEN && begins_with_zeros(src) {
                        return unit;
                    }
                    if group > 0 {
                        // From the beginnings of this sector's second half and of the next sector.
                        tweaks = times_alpha_16(tweaks);
                    }
                }
                let group_tweaks;
                (group_tweaks, tweaks) = four_doubled(tweaks);
                crypt::<DECRYPT>(data_keys, src, dst, &group_tweaks);
                // From half to half, or to the next sector.
                let step = if of_sector == GROUPS_OF_SECTOR - 1 { GROUP / 2 + HALF } else { GROUP / 2 };
                src = src.add(step);
                dst = dst.add(step);
            }
        }
    }
    units
}

/// Crypts a group: four blocks at `src`, and four half a sector further on.
#[inline]
#[target_feature(enable = "avx2,vaes")]
unsafe fn crypt<const DECRYPT: bool>(keys: &Schedule, src: *const u8, dst: *mut u8, tweaks: &Group) {
    let mut blocks = *tweaks;
    let key = keys.round_key_256(0);
    for (block, at) in blocks.iter_mut().zip(&PLACES) {
        // SAFETY: the caller vouches for the group's readable bytes, of which this is one register. The
        // other is a hint, which never faults, also behind their end.
        let data = unsafe {
            _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(*at).wrapping_add(AHEAD).cast());
            read(src.add(*at))
        };
        *block = _mm256_xor_si256(_mm256_xor_si256(*block, key), data);
    }
    for round in 1..LAST_ROUND {
        let key = keys.round_key_256(round);
        for block in blocks.iter_mut() {
            *block =
                if DECRYPT { _mm256_aesdec_epi128(*block, key) } else { _mm256_aesenc_epi128(*block, key) };
        }
    }
    let key = keys.round_key_256(LAST_ROUND);
    for ((block, tweak), at) in blocks.iter().zip(tweaks).zip(&PLACES) {
        // The last round ends in an xor with its key, so the tweak goes in with it.
        let key = _mm256_xor_si256(key, *tweak);
        let done = if DECRYPT {
            _mm256_aesdeclast_epi128(*block, key)
        } else {
            _mm256_aesenclast_epi128(*block, key)
        };
        // SAFETY: the caller vouches for the group's writable bytes, of which this is one register.
        unsafe { _mm256_storeu_si256(dst.add(*at).cast(), done) };
    }
}

/// The initial tweaks of two data units of GROUPS groups each, the first of which has the
/// tweak input `first`.
#[inline]
#[target_feature(enable = "avx2,vaes")]
fn encrypt_two<const GROUPS: usize>(keys: &Schedule, first: TweakInput) -> __m256i {
    // black_box: it is always zero except for test vectors, and must not hold a register through the loop.
    let high = black_box(first.high as i64);
    let first = _mm256_set_epi64x(high, first.low as i64, high, first.low as i64);
    let next = if GROUPS * GROUP == SectorSize::B512.bytes() as usize { &NEXT_512 } else { &NEXT_4096 };
    let mut tweaks = _mm256_xor_si256(_mm256_add_epi64(first, constant(next)), keys.round_key_256(0));
    for round in 1..LAST_ROUND {
        tweaks = _mm256_aesenc_epi128(tweaks, keys.round_key_256(round));
    }
    here_and_now(_mm256_aesenclast_epi128(tweaks, keys.round_key_256(LAST_ROUND)))
}

/// Has `value` computed before anything is read that comes after it: else the compiler reads round keys on
/// the way for later, for which it has no registers but the stack.
#[inline]
#[target_feature(enable = "avx2")]
fn here_and_now(mut value: __m256i) -> __m256i {
    // SAFETY: no instruction at all. Without `nomem` no access to memory is moved across it.
    unsafe { asm!("/* {0} */", inout(ymm_reg) value, options(nostack, preserves_flags)) };
    value
}

/// The tweaks of the first block of either half of a data unit's first sector; its initial tweak is the lower
/// block of `initial`.
#[inline]
#[target_feature(enable = "avx2,vpclmulqdq")]
fn of_both_halves(initial: __m256i) -> __m256i {
    let same = _mm256_permute4x64_epi64::<0b01_00_01_00>(initial);
    _mm256_blend_epi32::<0b1111_0000>(same, times_alpha_16(same))
}

/// The tweaks of a group, in the order of [`PLACES`], the first of either half being `tweaks`; and those of
/// the blocks that come after.
#[inline]
#[target_feature(enable = "avx2")]
fn four_doubled(tweaks: __m256i) -> (Group, __m256i) {
    let one = times_alpha(tweaks);
    let two = times_alpha(one);
    let three = times_alpha(two);
    let group = [
        _mm256_permute2x128_si256::<0x20>(tweaks, one),
        _mm256_permute2x128_si256::<0x20>(two, three),
        _mm256_permute2x128_si256::<0x31>(tweaks, one),
        _mm256_permute2x128_si256::<0x31>(two, three),
    ];
    (group, times_alpha(three))
}

/// Each block times α: shifted up by a bit, and the carries of both halves put where they belong (IEEE 1619
/// section 5.2).
#[inline]
#[target_feature(enable = "avx2")]
fn times_alpha(tweak: __m256i) -> __m256i {
    // All ones where a half's uppermost bit was set, beside the half that the carry goes to.
    let carries = _mm256_shuffle_epi32::<0b00_01_00_11>(_mm256_srai_epi32::<31>(tweak));
    let folded = _mm256_and_si256(carries, constant(&CARRIES));
    _mm256_xor_si256(_mm256_add_epi64(tweak, tweak), folded)
}

/// Each block times α¹⁶: two bytes up, and what falls out at the top, times the polynomial, back in below
/// (sixteen doublings at once).
#[inline]
#[target_feature(enable = "avx2,vpclmulqdq")]
fn times_alpha_16(tweak: __m256i) -> __m256i {
    let carry = _mm256_bsrli_epi128::<14>(tweak);
    let folded = _mm256_clmulepi64_epi128::<0x00>(carry, constant(&POLYNOMIAL));
    _mm256_xor_si256(_mm256_bslli_epi128::<2>(tweak), folded)
}

/// Reads a constant anew.
#[inline]
#[target_feature(enable = "avx2")]
fn constant(constant: &'static Constant) -> __m256i {
    // SAFETY: 32 initialised bytes, aligned to 32.
    unsafe { constant.0.as_ptr().cast::<__m256i>().read_volatile() }
}

/// 32 bytes at any address.
#[repr(C, packed)]
struct Unaligned(__m256i);

/// Reads a register's worth exactly once: the memory may be a guest's, which may change it at any time.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn read(at: *const u8) -> __m256i {
    // SAFETY: the caller vouches for 32 readable bytes; Unaligned has alignment 1.
    unsafe { at.cast::<Unaligned>().read_volatile().0 }
}
