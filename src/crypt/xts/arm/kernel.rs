//! The kernels: data units from source to destination through XTS, eight blocks at a time.
//!
//! A sector is four groups of eight blocks. The tweaks of a group are in eight of the 32 registers, made from
//! the initial tweak or from the group before, each times α⁸. The initial tweaks of four data units are
//! encrypted together, and are in four more.
//!
//! AESE and AESD begin with the xor of the round key, where x86 ends with it; so the key of the last round
//! comes by itself, and the tweak goes in with it.

use crate::base::prefetch::prefetch;
use crate::crypt::SectorSize;
use crate::crypt::secret_mem::registers::{clear_general, clear_vectors};
use crate::crypt::xts::TweakInput;
use crate::crypt::xts::arm::Kernel;
use crate::crypt::xts::arm::keys::{Keys, Schedule};
use crate::crypt::xts::kernels::{AHEAD, Task, begins_with_zeros};
use crate::crypt::xts::schedule::LAST_ROUND;
use std::arch::aarch64::*;

/// Blocks in a group.
const WIDTH: usize = 8;
/// Bytes of a block, of a group, and of a sector.
const BLOCK: usize = 16;
const GROUP: usize = WIDTH * BLOCK;
const SECTOR: usize = SectorSize::B512.bytes() as usize;
/// Bytes that the CPU fetches at a time.
const LINE: usize = 64;
/// Data units whose initial tweaks are encrypted together.
const UNITS_AHEAD: usize = 4;
/// Where the blocks of a group begin. A table, since a release checks arithmetic for overflow, and a check in
/// a kernel's loop keeps it from being unrolled.
const PLACES: [usize; WIDTH] = {
    let mut places = [0; WIDTH];
    let mut i = 0;
    while i < WIDTH {
        places[i] = i * BLOCK;
        i += 1;
    }
    places
};
/// What is shifted out of the high half of a block, times x⁷ + x² + x + 1, comes back in below (IEEE 1619
/// section 5.2); what is shifted out of the low half, times one, goes into the high half.
const FOLD: u64 = 0x87 | 1 << 32;

/// Eight blocks, or their tweaks.
type Group = [uint8x16_t; WIDTH];

kernels!("aes", clear_vectors);

#[inline]
#[target_feature(enable = "aes")]
unsafe fn run<const DECRYPT: bool, const WRITTEN: bool, const SECTORS: usize>(
    keys: &Keys,
    mut src: *const u8,
    mut dst: *mut u8,
    units: usize,
    first: TweakInput,
) -> usize {
    let data_keys = if DECRYPT { &keys.decrypt } else { &keys.encrypt };
    // Later, what is ahead is asked for in time; what a request begins with, only here. It comes while
    // the first tweaks are made.
    for at in (0..(units * SECTORS * SECTOR).min(AHEAD)).step_by(LINE) {
        prefetch(src.wrapping_add(at));
    }
    let mut input = first;
    let mut initial = encrypt_inputs::<SECTORS>(&keys.tweak, input);
    for unit in 0..units {
        let [now, b, c, d] = initial;
        let mut tweaks = first_tweaks(now);
        for _ in 0..SECTORS {
            // SAFETY: both pointers stand where a sector begins that the data unit has left.
            unsafe {
                if WRITTEN && begins_with_zeros(src) {
                    return unit;
                }
                for _ in 0..SECTOR / GROUP {
                    crypt::<DECRYPT, WRITTEN>(data_keys, src, dst, &tweaks);
                    tweaks = next_tweaks(&tweaks);
                    src = src.add(GROUP);
                    dst = dst.add(GROUP);
                }
            }
        }
        initial = [b, c, d, now];
        if unit % UNITS_AHEAD == UNITS_AHEAD - 1 {
            input = input.plus((UNITS_AHEAD * SECTORS) as u64);
            initial = encrypt_inputs::<SECTORS>(&keys.tweak, input);
        }
    }
    units
}

/// Crypts a group. WRITTEN only makes it a function of its own for each kernel: what is called from one place
/// gets inlined, and a call would pass the groups on the stack.
#[inline]
#[target_feature(enable = "aes")]
unsafe fn crypt<const DECRYPT: bool, const WRITTEN: bool>(
    keys: &Schedule,
    src: *const u8,
    dst: *mut u8,
    tweaks: &Group,
) {
    for at in PLACES.iter().filter(|at| at.is_multiple_of(LINE)) {
        prefetch(src.wrapping_add(*at).wrapping_add(AHEAD));
    }
    let mut blocks = *tweaks;
    for (block, at) in blocks.iter_mut().zip(&PLACES) {
        // SAFETY: the caller vouches for GROUP readable bytes at `src`, of which this is one block.
        *block = veorq_u8(unsafe { read(src.add(*at)) }, *block);
    }
    for round in 0..LAST_ROUND - 1 {
        let key = keys.round_key(round);
        for block in &mut blocks {
            *block = if DECRYPT {
                vaesimcq_u8(vaesdq_u8(*block, key))
            } else {
                vaesmcq_u8(vaeseq_u8(*block, key))
            };
        }
    }
    let (key, last) = (keys.round_key(LAST_ROUND - 1), keys.round_key(LAST_ROUND));
    for ((block, tweak), at) in blocks.iter().zip(tweaks).zip(&PLACES) {
        let done = if DECRYPT { vaesdq_u8(*block, key) } else { vaeseq_u8(*block, key) };
        let done = veorq_u8(done, veorq_u8(last, *tweak));
        // SAFETY: the caller vouches for GROUP writable bytes at `dst`, of which this is one block; the store
        // takes any alignment.
        unsafe { vst1q_u8(dst.add(*at), done) };
    }
}

/// The initial tweaks of four data units of SECTORS sectors each, the first of which has the tweak
/// input `first`.
#[inline]
#[target_feature(enable = "aes")]
fn encrypt_inputs<const SECTORS: usize>(keys: &Schedule, first: TweakInput) -> [uint8x16_t; UNITS_AHEAD] {
    let mut input = first;
    let mut tweaks = [vdupq_n_u8(0); UNITS_AHEAD];
    for tweak in &mut tweaks {
        *tweak = vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(input.low), vcreate_u64(input.high)));
        input = input.plus(SECTORS as u64);
    }
    for round in 0..LAST_ROUND - 1 {
        let key = keys.round_key(round);
        for tweak in &mut tweaks {
            *tweak = vaesmcq_u8(vaeseq_u8(*tweak, key));
        }
    }
    let (key, last) = (keys.round_key(LAST_ROUND - 1), keys.round_key(LAST_ROUND));
    tweaks.map(|tweak| veorq_u8(vaeseq_u8(tweak, key), last))
}

/// The tweaks of the first group of a data unit. By leaps of one, two and four, so that no tweak waits for
/// more than three others.
#[inline]
#[target_feature(enable = "neon")]
fn first_tweaks(t0: uint8x16_t) -> Group {
    let t1 = times_alpha::<1, 63>(t0);
    let [t2, t3] = [t0, t1].map(|tweak| times_alpha::<2, 62>(tweak));
    let [t4, t5, t6, t7] = [t0, t1, t2, t3].map(|tweak| times_alpha::<4, 60>(tweak));
    [t0, t1, t2, t3, t4, t5, t6, t7]
}

/// The tweaks of the group behind this one.
#[inline]
#[target_feature(enable = "neon")]
fn next_tweaks(tweaks: &Group) -> Group {
    tweaks.map(|tweak| times_alpha::<8, 56>(tweak))
}

/// A block times αᴷ: K bits up (M = 64 − K is where what falls out of a half begins), and both carries where
/// they belong. K is 8 at most, so that a carry is a byte.
#[inline]
#[target_feature(enable = "neon")]
fn times_alpha<const K: i32, const M: i32>(tweak: uint8x16_t) -> uint8x16_t {
    const { assert!(K + M == 64 && K >= 1 && K <= 8) };
    let halves = vreinterpretq_u64_u8(tweak);
    // The low half's carry is byte 0, the high half's byte 4; then the other way round.
    let carries = vrev64_u32(vmovn_u64(vshrq_n_u64::<M>(halves)));
    // Polynomials, byte by byte, each product as wide as two.
    let folded = vmull_p8(vreinterpret_p8_u32(carries), vcreate_p8(FOLD));
    veorq_u8(vreinterpretq_u8_u64(vshlq_n_u64::<K>(halves)), vreinterpretq_u8_p16(folded))
}

/// 16 bytes at any address.
#[repr(C, packed)]
struct Unaligned(uint8x16_t);

/// Reads a block exactly once: the memory may be a guest's, which may change it at any time.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn read(at: *const u8) -> uint8x16_t {
    // SAFETY: the caller vouches for 16 readable bytes; Unaligned has alignment 1.
    unsafe { at.cast::<Unaligned>().read_volatile().0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IEEE 1619 section 5.2, K times.
    fn doubled(tweak: u128, times: usize) -> u128 {
        (0..times).fold(tweak, |tweak, _| (tweak << 1) ^ (tweak >> 127) * 0x87)
    }

    /// What the leaps make of a tweak: of 1, 2, 4 and 8 doublings.
    #[target_feature(enable = "neon")]
    fn leaps(tweak: u128) -> [(usize, u128); 4] {
        let start = tweak.to_le_bytes();
        // SAFETY: 16 bytes.
        let block = unsafe { vld1q_u8(start.as_ptr()) };
        let leaps = [
            (1, times_alpha::<1, 63>(block)),
            (2, times_alpha::<2, 62>(block)),
            (4, times_alpha::<4, 60>(block)),
            (8, times_alpha::<8, 56>(block)),
        ];
        leaps.map(|(times, block)| {
            let mut found = [0; BLOCK];
            // SAFETY: as above.
            unsafe { vst1q_u8(found.as_mut_ptr(), block) };
            (times, u128::from_le_bytes(found))
        })
    }

    #[test]
    fn leaps_are_as_many_doublings() {
        for start in [1, 1 << 63, 1 << 127, u128::MAX, 0xfedc_ba98_7654_3210_f0e1_d2c3_b4a5_9687] {
            // SAFETY: every CPU that this is compiled for has the instructions.
            for (times, found) in unsafe { leaps(start) } {
                assert_eq!(found, doubled(start, times), "{times}");
            }
        }
    }
}
