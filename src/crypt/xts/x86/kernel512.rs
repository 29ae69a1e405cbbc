//! The kernels for 512-bit registers: data units from source to destination through XTS, 512 bytes at a
//! time in eight registers.
//!
//! A data unit is walked in groups of 32 blocks. The tweaks of a group are eight registers of four
//! consecutive tweaks each, made from the initial tweak (a 512-byte unit is one group) or from the group
//! before. The initial tweaks of four data units are encrypted together.
//!
//! The AES units are what everything else must not keep waiting. CPUs look ahead less than the length of a
//! group, so the tweaks of the next group are computed between the rounds of this one; the order of the lines
//! below is that schedule, and what the 32 registers can hold. The constants are read from memory where they
//! are used, for the same reason.

use crate::base::prefetch::prefetch;
use crate::crypt::SectorSize;
use crate::crypt::secret_mem::registers::{clear_general, clear_zmm};
use crate::crypt::xts::TweakInput;
use crate::crypt::xts::kernels::{AHEAD, Task, begins_with_zeros};
use crate::crypt::xts::schedule::LAST_ROUND;
use crate::crypt::xts::x86::Kernel;
use crate::crypt::xts::x86::keys::{Keys, Schedule};
use crate::crypt::xts::x86::narrow::Scratch;
use std::arch::x86_64::*;
use std::hint::black_box;

/// Registers of four blocks in a group.
const WIDTH: usize = 8;
/// Bytes of one register, and of one group, which is a sector.
const REGISTER: usize = 64;
const GROUP: usize = WIDTH * REGISTER;
/// Where the registers of a group begin. A table, since a release checks arithmetic for overflow, and a check
/// in a kernel's loop keeps it from being unrolled.
const PLACES: [usize; WIDTH] = {
    let mut places = [0; WIDTH];
    let mut i = 0;
    while i < WIDTH {
        places[i] = i * REGISTER;
        i += 1;
    }
    places
};
/// The truth table of a xor b xor c.
const XOR3: i32 = 0x96;

/// Eight registers: 32 blocks, or their tweaks.
type Group = [__m512i; WIDTH];

/// A register's worth of 64-bit words.
#[repr(align(64))]
struct Constant([u64; 8]);

/// x⁷ + x² + x + 1: what x¹²⁸ is worth in XTS's field.
static POLYNOMIAL: Constant = Constant([0x87; 8]);
/// By how many bits to shift the halves of four blocks up, and their carries down, for α⁰, α¹, α², α³.
static UP: Constant = Constant([0, 0, 1, 1, 2, 2, 3, 3]);
static DOWN: Constant = Constant([64, 64, 63, 63, 62, 62, 61, 61]);
/// What the tweak inputs of four data units, of 512 and of 4096 bytes, have over the first.
static NEXT_512: Constant = Constant([0, 0, 1, 0, 2, 0, 3, 0]);
static NEXT_4096: Constant = Constant([0, 0, 8, 0, 16, 0, 24, 0]);

kernels!("avx512f,avx512bw,vaes,vpclmulqdq", clear_zmm, scratch: *mut Scratch);

#[inline]
#[target_feature(enable = "avx512f,avx512bw,vaes,vpclmulqdq")]
unsafe fn run<const DECRYPT: bool, const WRITTEN: bool, const GROUPS: usize>(
    keys: &Keys,
    _: *mut Scratch,
    mut src: *const u8,
    mut dst: *mut u8,
    units: usize,
    first: TweakInput,
) -> usize {
    let data_keys = if DECRYPT { &keys.decrypt } else { &keys.encrypt };
    let mut input = first;
    let mut initial = encrypt_four::<GROUPS>(&keys.tweak, input);
    let mut tweaks = first_tweaks(initial);
    for unit in 0..units {
        for _ in 1..GROUPS {
            // SAFETY: both pointers have a data unit ahead of them that begins GROUPS groups before its end.
            unsafe {
                if WRITTEN && begins_with_zeros(src) {
                    return unit;
                }
                tweaks = crypt_then_advance::<DECRYPT, WRITTEN>(data_keys, src, dst, tweaks);
                src = src.add(GROUP);
                dst = dst.add(GROUP);
            }
        }
        // SAFETY: as above.
        if WRITTEN && unsafe { begins_with_zeros(src) } {
            return unit;
        }
        input = input.plus(GROUPS as u64);
        initial = if unit % 4 == 3 {
            encrypt_four::<GROUPS>(&keys.tweak, input)
        } else {
            _mm512_shuffle_i64x2::<0b00_11_10_01>(initial, initial)
        };
        // SAFETY: as above; this is the unit's last group.
        unsafe {
            tweaks = crypt_then_begin::<DECRYPT, WRITTEN, GROUPS>(data_keys, src, dst, tweaks, initial);
            src = src.add(GROUP);
            dst = dst.add(GROUP);
        }
    }
    units
}

/// Crypts a group, and gives the tweaks of the next group of the same data unit: each times α³². WRITTEN only
/// makes it a function of its own for each kernel: what is called from one place gets inlined, and a call
/// would pass the groups on the stack.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vaes,vpclmulqdq")]
unsafe fn crypt_then_advance<const DECRYPT: bool, const WRITTEN: bool>(
    keys: &Schedule,
    src: *const u8,
    dst: *mut u8,
    tweaks: Group,
) -> Group {
    let [t0, t1, t2, t3, t4, t5, t6, t7] = tweaks;
    // SAFETY: the caller vouches for a group at `src` and at `dst`.
    let mut blocks = unsafe { start(keys, src, &tweaks) };
    rounds::<DECRYPT, 1, 3>(keys, &mut blocks);
    let (n0, n1) = (times_alpha_bytes::<4, 12>(t0), times_alpha_bytes::<4, 12>(t1));
    rounds::<DECRYPT, 3, 5>(keys, &mut blocks);
    let (n2, n3) = (times_alpha_bytes::<4, 12>(t2), times_alpha_bytes::<4, 12>(t3));
    rounds::<DECRYPT, 5, 8>(keys, &mut blocks);
    let (n4, n5) = (times_alpha_bytes::<4, 12>(t4), times_alpha_bytes::<4, 12>(t5));
    rounds::<DECRYPT, 8, LAST_ROUND>(keys, &mut blocks);
    // SAFETY: as above.
    unsafe { finish::<DECRYPT>(keys, &blocks, dst, &tweaks) };
    let (n6, n7) = (times_alpha_bytes::<4, 12>(t6), times_alpha_bytes::<4, 12>(t7));
    [n0, n1, n2, n3, n4, n5, n6, n7]
}

/// Crypts the last group of a data unit, and gives the first tweaks of the next, whose initial tweak is the
/// lowest block of `initial`. WRITTEN and GROUPS are there as above.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vaes,vpclmulqdq")]
unsafe fn crypt_then_begin<const DECRYPT: bool, const WRITTEN: bool, const GROUPS: usize>(
    keys: &Schedule,
    src: *const u8,
    dst: *mut u8,
    tweaks: Group,
    initial: __m512i,
) -> Group {
    // SAFETY: the caller vouches for a group at `src` and at `dst`.
    let mut blocks = unsafe { start(keys, src, &tweaks) };
    rounds::<DECRYPT, 1, 3>(keys, &mut blocks);
    let n0 = first_four(initial);
    rounds::<DECRYPT, 3, 5>(keys, &mut blocks);
    let n1 = times_alpha_4(n0);
    let n2 = times_alpha_bytes::<1, 15>(n0);
    rounds::<DECRYPT, 5, 8>(keys, &mut blocks);
    let n3 = times_alpha_bytes::<1, 15>(n1);
    rounds::<DECRYPT, 8, 11>(keys, &mut blocks);
    let n4 = times_alpha_bytes::<2, 14>(n0);
    rounds::<DECRYPT, 11, LAST_ROUND>(keys, &mut blocks);
    // SAFETY: as above.
    unsafe { finish::<DECRYPT>(keys, &blocks, dst, &tweaks) };
    let n5 = times_alpha_bytes::<2, 14>(n1);
    let (n6, n7) = (times_alpha_bytes::<3, 13>(n0), times_alpha_bytes::<3, 13>(n1));
    [n0, n1, n2, n3, n4, n5, n6, n7]
}

/// The tweaks of the first group of a data unit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn first_tweaks(initial: __m512i) -> Group {
    let n0 = first_four(initial);
    let n1 = times_alpha_4(n0);
    let (n2, n3) = (times_alpha_bytes::<1, 15>(n0), times_alpha_bytes::<1, 15>(n1));
    let (n4, n5) = (times_alpha_bytes::<2, 14>(n0), times_alpha_bytes::<2, 14>(n1));
    let (n6, n7) = (times_alpha_bytes::<3, 13>(n0), times_alpha_bytes::<3, 13>(n1));
    [n0, n1, n2, n3, n4, n5, n6, n7]
}

/// Reads a group, xors the tweaks and the first round key.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn start(keys: &Schedule, src: *const u8, tweaks: &Group) -> Group {
    let mut blocks = *tweaks;
    let key = keys.round_key(0);
    for (block, at) in blocks.iter_mut().zip(&PLACES) {
        prefetch(src.wrapping_add(*at).wrapping_add(AHEAD));
        // SAFETY: the caller vouches for GROUP readable bytes at `src`, of which this is one register.
        let data = unsafe { read(src.add(*at)) };
        *block = _mm512_ternarylogic_epi64::<XOR3>(data, *block, key);
    }
    blocks
}

/// The rounds FROM..TO.
#[inline]
#[target_feature(enable = "avx512f,vaes")]
fn rounds<const DECRYPT: bool, const FROM: usize, const TO: usize>(keys: &Schedule, blocks: &mut Group) {
    for round in FROM..TO {
        let key = keys.round_key(round);
        for block in blocks.iter_mut() {
            *block =
                if DECRYPT { _mm512_aesdec_epi128(*block, key) } else { _mm512_aesenc_epi128(*block, key) };
        }
    }
}

/// The last round, the xor of the tweaks, and the way to `dst`.
#[inline]
#[target_feature(enable = "avx512f,vaes")]
unsafe fn finish<const DECRYPT: bool>(keys: &Schedule, blocks: &Group, dst: *mut u8, tweaks: &Group) {
    let key = keys.round_key(LAST_ROUND);
    for ((block, tweak), at) in blocks.iter().zip(tweaks).zip(&PLACES) {
        // The last round ends in an xor with its key, so the tweak goes in with it.
        let key = _mm512_xor_si512(key, *tweak);
        let done = if DECRYPT {
            _mm512_aesdeclast_epi128(*block, key)
        } else {
            _mm512_aesenclast_epi128(*block, key)
        };
        // SAFETY: the caller vouches for GROUP writable bytes at `dst`, of which this is one register.
        unsafe { _mm512_storeu_si512(dst.add(*at).cast(), done) };
    }
}

/// The initial tweaks of four data units of GROUPS groups each, the first of which has the
/// tweak input `first`.
#[inline]
#[target_feature(enable = "avx512f,vaes")]
fn encrypt_four<const GROUPS: usize>(keys: &Schedule, first: TweakInput) -> __m512i {
    // black_box: it is always zero except for test vectors, and must not hold a register through the loop.
    let high = black_box(first.high as i64);
    // One block in all four places, which takes no constant that would want a register.
    let first = _mm512_broadcast_i32x4(_mm_set_epi64x(high, first.low as i64));
    let next = if GROUPS == 1 { &NEXT_512 } else { &NEXT_4096 };
    let mut tweaks = _mm512_xor_si512(_mm512_add_epi64(first, constant(next)), keys.round_key(0));
    for round in 1..LAST_ROUND {
        tweaks = _mm512_aesenc_epi128(tweaks, keys.round_key(round));
    }
    _mm512_aesenclast_epi128(tweaks, keys.round_key(LAST_ROUND))
}

/// The lowest block of `initial` times α⁰, α¹, α², α³.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn first_four(initial: __m512i) -> __m512i {
    let same = _mm512_shuffle_i64x2::<0>(initial, initial);
    let carries = _mm512_srlv_epi64(same, constant(&DOWN));
    fold_bits(_mm512_sllv_epi64(same, constant(&UP)), carries)
}

/// Each block times α⁴.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn times_alpha_4(tweak: __m512i) -> __m512i {
    fold_bits(_mm512_slli_epi64::<4>(tweak), _mm512_srli_epi64::<60>(tweak))
}

/// Puts the carries of both halves of a shifted block where they belong: the low half's into the high half,
/// the high half's, times the polynomial, back in below.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn fold_bits(shifted: __m512i, carries: __m512i) -> __m512i {
    let into_high = _mm512_bslli_epi128::<8>(carries);
    let folded = _mm512_clmulepi64_epi128::<0x01>(carries, constant(&POLYNOMIAL));
    _mm512_ternarylogic_epi64::<XOR3>(shifted, into_high, folded)
}

/// Each block times α⁸ᴺ: N bytes up, and what falls out at the top (M = 16 − N is where it begins), times the
/// polynomial, back in below (IEEE 1619 section 5.2, eight N doublings at once).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn times_alpha_bytes<const N: i32, const M: i32>(tweak: __m512i) -> __m512i {
    const { assert!(N + M == 16 && N <= 8) };
    let carry = _mm512_bsrli_epi128::<M>(tweak);
    let folded = _mm512_clmulepi64_epi128::<0x00>(carry, constant(&POLYNOMIAL));
    _mm512_xor_si512(_mm512_bslli_epi128::<N>(tweak), folded)
}

/// Reads a constant anew.
#[inline]
#[target_feature(enable = "avx512f")]
fn constant(constant: &'static Constant) -> __m512i {
    // SAFETY: 64 initialised bytes, aligned to 64.
    unsafe { constant.0.as_ptr().cast::<__m512i>().read_volatile() }
}

/// 64 bytes at any address.
#[repr(C, packed)]
struct Unaligned(__m512i);

/// Reads a register's worth exactly once: the memory may be a guest's, which may change it at any time.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn read(at: *const u8) -> __m512i {
    // SAFETY: the caller vouches for 64 readable bytes; Unaligned has alignment 1.
    unsafe { at.cast::<Unaligned>().read_volatile().0 }
}
