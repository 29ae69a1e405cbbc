//! Round keys as these kernels load them, and key expansion by ARMv8's AES instructions (FIPS 197
//! section 5.2).

use crate::crypt::xts::schedule::{self, ROUND_KEYS, RoundKeys};
use std::arch::aarch64::*;

/// A block a round key.
pub(super) type Schedule = schedule::Schedule<16>;
/// The schedules of one data key, those of a decryption ready for AESD.
pub(in crate::crypt::xts) type Keys = schedule::Keys<16>;

/// 32-bit words of a key, and of all round keys.
const KEY_WORDS: usize = 8;
const WORDS: usize = 4 * ROUND_KEYS;

/// Expands both halves of a data key. Leaves round keys on the stack: to be run where it is scrubbed.
#[target_feature(enable = "aes")]
pub(in crate::crypt::xts) fn keys(data: &[u8; 32], tweak: &[u8; 32]) -> Keys {
    let data = expand(data);
    Keys::new(&data, &inverse(&data), &expand(tweak))
}

impl Schedule {
    /// Round key `round`, 0..=14. Read anew each time it is asked for, so that the compiler cannot keep it in
    /// a register across blocks and, short of registers, put it on the stack.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn round_key(&self, round: usize) -> uint8x16_t {
        let key: *const uint8x16_t = self.0[round].as_ptr().cast();
        // SAFETY: 16 initialised bytes, and aligned: a Schedule is to 64 bytes, and its entries have 16.
        unsafe { key.read_volatile() }
    }
}

#[target_feature(enable = "aes")]
fn expand(key: &[u8; 32]) -> RoundKeys {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(key.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    let mut constant = 1;
    for at in KEY_WORDS..WORDS {
        let before = words[at - 1];
        words[at] = words[at - KEY_WORDS]
            ^ match at % KEY_WORDS {
                0 => {
                    let rotated = substituted(before).rotate_right(8);
                    constant <<= 1;
                    rotated ^ (constant >> 1)
                }
                4 => substituted(before),
                _ => before,
            };
    }
    let mut keys = [[0; 16]; ROUND_KEYS];
    for (bytes, word) in keys.as_flattened_mut().as_chunks_mut().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    keys
}

/// The S-box on each byte of a word, in constant time. With a key of zeros, AESE substitutes bytes and shifts
/// rows; where all columns are the same, a shift of rows moves nothing.
#[target_feature(enable = "aes")]
fn substituted(word: u32) -> u32 {
    let columns = vreinterpretq_u8_u32(vdupq_n_u32(word));
    vgetq_lane_u32::<0>(vreinterpretq_u32_u8(vaeseq_u8(columns, vdupq_n_u8(0))))
}

/// The round keys of the equivalent inverse cipher (FIPS 197 section 5.3.5).
#[target_feature(enable = "aes")]
fn inverse(keys: &RoundKeys) -> RoundKeys {
    let mut reversed = *keys;
    reversed.reverse();
    for key in &mut reversed[1..ROUND_KEYS - 1] {
        // SAFETY: both are 16 bytes, and take any alignment.
        unsafe { vst1q_u8(key.as_mut_ptr(), vaesimcq_u8(vld1q_u8(key.as_ptr()))) };
    }
    reversed
}
