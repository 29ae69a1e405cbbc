//! The kernels: data units from source to destination through XTS, 512 bytes at a time in eight registers.
//!
//! A data unit is walked in groups of 32 blocks. The tweaks of a group are eight registers of four consecutive
//! tweaks each, made from the initial tweak (a 512-byte unit is one group) or from the group before. The initial
//! tweaks of four data units are encrypted together, ahead of the data that waits for them.

use super::super::{DataUnit, Direction, TweakInput};
use super::keys::{Keys, ROUND_KEYS, Schedule};
use std::arch::x86_64::*;

/// Registers of four blocks in a group.
const WIDTH: usize = 8;
/// Bytes of one register, and of one group.
const REGISTER: usize = 64;
const GROUP: usize = WIDTH * REGISTER;

/// The last of AES-256's rounds.
const LAST_ROUND: usize = ROUND_KEYS - 1;
/// The truth table of a xor b xor c.
const XOR3: i32 = 0x96;

/// Eight registers: 32 blocks, or their tweaks.
type Group = [__m512i; WIDTH];

/// A kernel: from, to, number of data units, tweak input of the first.
///
/// Safe to call where the CPU has AVX-512 F and BW, VAES and VPCLMULQDQ, the source is readable and the destination
/// writable for all data units, and the two are the same or do not overlap. Each byte of the source is read once.
pub(super) type Kernel = unsafe fn(&Keys, *const u8, *mut u8, usize, TweakInput);

/// The kernel for a direction and a data unit.
pub(super) fn kernel(direction: Direction, unit: DataUnit) -> Kernel {
    match (direction, unit) {
        (Direction::Encrypt, DataUnit::B512) => encrypt_512,
        (Direction::Encrypt, DataUnit::B4096) => encrypt_4096,
        (Direction::Decrypt, DataUnit::B512) => decrypt_512,
        (Direction::Decrypt, DataUnit::B4096) => decrypt_4096,
    }
}

macro_rules! kernels {
    ($($name:ident: $decrypt:literal, $unit:expr;)*) => { $(
        // Never inlined, so that nothing but this loop competes for its registers and `ci/check-spills` finds it
        // by its name.
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,vaes,vpclmulqdq")]
        unsafe fn $name(keys: &Keys, src: *const u8, dst: *mut u8, units: usize, first: TweakInput) {
            // SAFETY: the caller's promise (see `Kernel`) is what `run` asks for.
            unsafe { run::<$decrypt, { $unit.bytes() / GROUP }>(keys, src, dst, units, first) };
            clear_registers();
        }
    )* };
}

kernels! {
    encrypt_512: false, DataUnit::B512;
    decrypt_512: true, DataUnit::B512;
    encrypt_4096: false, DataUnit::B4096;
    decrypt_4096: true, DataUnit::B4096;
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,vaes,vpclmulqdq")]
unsafe fn run<const DECRYPT: bool, const GROUPS: usize>(
    keys: &Keys,
    mut src: *const u8,
    mut dst: *mut u8,
    mut units: usize,
    first: TweakInput,
) {
    let data_keys = if DECRYPT { &keys.decrypt } else { &keys.encrypt };
    let step = GROUPS as i64;
    let (low, high) = (first.low as i64, first.high as i64);
    let counts = _mm512_set_epi64(0, 3 * step, 0, 2 * step, 0, step, 0, 0);
    let mut inputs = _mm512_add_epi64(_mm512_set_epi64(high, low, high, low, high, low, high, low), counts);
    while units > 0 {
        let mut initial = encrypt_four(&keys.tweak, inputs);
        inputs =
            _mm512_add_epi64(inputs, _mm512_set_epi64(0, 4 * step, 0, 4 * step, 0, 4 * step, 0, 4 * step));
        let together = units.min(4);
        for _ in 0..together {
            let mut tweaks = first_tweaks(initial);
            initial = _mm512_shuffle_i64x2::<0b00_11_10_01>(initial, initial);
            for group in 0..GROUPS {
                // SAFETY: `units` more data units follow at both pointers, of which this is a group.
                unsafe {
                    crypt_group::<DECRYPT>(data_keys, src, dst, &tweaks);
                    src = src.add(GROUP);
                    dst = dst.add(GROUP);
                }
                if group + 1 < GROUPS {
                    advance(&mut tweaks);
                }
            }
        }
        units -= together;
    }
}

/// One group from `src` to `dst`: xor the tweaks, 14 rounds, xor them again.
#[inline]
#[target_feature(enable = "avx512f,vaes")]
unsafe fn crypt_group<const DECRYPT: bool>(keys: &Schedule, src: *const u8, dst: *mut u8, tweaks: &Group) {
    let mut blocks = *tweaks;
    let key = keys.round_key(0);
    for (i, block) in blocks.iter_mut().enumerate() {
        // SAFETY: the caller vouches for GROUP readable bytes at `src`, of which this is register i.
        let data = unsafe { read(src.add(i * REGISTER)) };
        *block = _mm512_ternarylogic_epi64::<XOR3>(data, *block, key);
    }
    for round in 1..LAST_ROUND {
        let key = keys.round_key(round);
        for block in &mut blocks {
            *block =
                if DECRYPT { _mm512_aesdec_epi128(*block, key) } else { _mm512_aesenc_epi128(*block, key) };
        }
    }
    let key = keys.round_key(LAST_ROUND);
    for (i, (block, tweak)) in blocks.iter().zip(tweaks).enumerate() {
        // The last round ends in an xor with its key, so the tweak can go in with it.
        let key = _mm512_xor_si512(key, *tweak);
        let done = if DECRYPT {
            _mm512_aesdeclast_epi128(*block, key)
        } else {
            _mm512_aesenclast_epi128(*block, key)
        };
        // SAFETY: the caller vouches for GROUP writable bytes at `dst`, of which this is register i.
        unsafe { write(dst.add(i * REGISTER), done) };
    }
}

/// The initial tweaks of four data units.
#[inline]
#[target_feature(enable = "avx512f,vaes")]
fn encrypt_four(keys: &Schedule, inputs: __m512i) -> __m512i {
    let mut tweaks = _mm512_xor_si512(inputs, keys.round_key(0));
    for round in 1..LAST_ROUND {
        tweaks = _mm512_aesenc_epi128(tweaks, keys.round_key(round));
    }
    _mm512_aesenclast_epi128(tweaks, keys.round_key(LAST_ROUND))
}

/// The tweaks of the first group of the data unit whose initial tweak is the lowest block of `initial`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn first_tweaks(initial: __m512i) -> Group {
    let same = _mm512_shuffle_i64x2::<0>(initial, initial);
    let t0 = times_alpha_bits(
        same,
        _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0),
        _mm512_set_epi64(61, 61, 62, 62, 63, 63, 64, 64),
    );
    let t1 = times_alpha_bits(t0, _mm512_set1_epi64(4), _mm512_set1_epi64(60));
    [
        t0,
        t1,
        times_alpha_bytes::<1, 15>(t0),
        times_alpha_bytes::<1, 15>(t1),
        times_alpha_bytes::<2, 14>(t0),
        times_alpha_bytes::<2, 14>(t1),
        times_alpha_bytes::<3, 13>(t0),
        times_alpha_bytes::<3, 13>(t1),
    ]
}

/// The tweaks of the next group: each times α³².
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn advance(tweaks: &mut Group) {
    for tweak in tweaks {
        *tweak = times_alpha_bytes::<4, 12>(*tweak);
    }
}

/// Each block times α⁸ᴺ: N bytes up, and what falls out at the top (M = 16 − N is where it begins), times
/// x⁷ + x² + x + 1, back in below (IEEE 1619 section 5.2, eight N doublings at once).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn times_alpha_bytes<const N: i32, const M: i32>(tweak: __m512i) -> __m512i {
    const { assert!(N + M == 16 && N <= 8) };
    let carry = _mm512_bsrli_epi128::<M>(tweak);
    let folded = _mm512_clmulepi64_epi128::<0x00>(carry, polynomial());
    _mm512_xor_si512(_mm512_bslli_epi128::<N>(tweak), folded)
}

/// Each block times α to the power in `up`, 0..64, given for both halves of the block; `down` is 64 − `up`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn times_alpha_bits(tweak: __m512i, up: __m512i, down: __m512i) -> __m512i {
    let carries = _mm512_srlv_epi64(tweak, down);
    // The low half's carry goes into the high half, the high half's is folded back in below.
    let into_high = _mm512_bslli_epi128::<8>(carries);
    let folded = _mm512_clmulepi64_epi128::<0x01>(carries, polynomial());
    _mm512_ternarylogic_epi64::<XOR3>(_mm512_sllv_epi64(tweak, up), into_high, folded)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn polynomial() -> __m512i {
    _mm512_set1_epi64(0x87)
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

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn write(at: *mut u8, value: __m512i) {
    // SAFETY: the caller vouches for 64 writable bytes; Unaligned has alignment 1.
    unsafe { at.cast::<Unaligned>().write_volatile(Unaligned(value)) }
}

/// Zeroes the vector registers, in which round keys and tweaks would otherwise wait for the next signal frame
/// to carry them into memory.
#[inline]
#[target_feature(enable = "avx512f")]
fn clear_registers() {
    // SAFETY: writes registers that are declared as clobbered; no memory.
    unsafe {
        std::arch::asm!(
            "vzeroall",
            "vpxord zmm16, zmm16, zmm16",
            "vpxord zmm17, zmm17, zmm17",
            "vpxord zmm18, zmm18, zmm18",
            "vpxord zmm19, zmm19, zmm19",
            "vpxord zmm20, zmm20, zmm20",
            "vpxord zmm21, zmm21, zmm21",
            "vpxord zmm22, zmm22, zmm22",
            "vpxord zmm23, zmm23, zmm23",
            "vpxord zmm24, zmm24, zmm24",
            "vpxord zmm25, zmm25, zmm25",
            "vpxord zmm26, zmm26, zmm26",
            "vpxord zmm27, zmm27, zmm27",
            "vpxord zmm28, zmm28, zmm28",
            "vpxord zmm29, zmm29, zmm29",
            "vpxord zmm30, zmm30, zmm30",
            "vpxord zmm31, zmm31, zmm31",
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
            out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
            out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
            out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(nomem, nostack, preserves_flags),
        );
    }
}
