//! Round keys as these kernels load them, and key expansion by AES-NI.

use crate::crypt::xts::schedule::{self, ROUND_KEYS, RoundKeys};
use std::arch::x86_64::*;

/// As wide as the widest register: every round key stands four times in a row.
pub(super) type Schedule = schedule::Schedule<64>;
/// The schedules of one data key, those of a decryption ready for `aesdec`.
pub(in crate::crypt::xts) type Keys = schedule::Keys<64>;

/// Expands both halves of a data key. Leaves round keys on the stack: to be run where it is scrubbed.
#[target_feature(enable = "aes,sse2")]
pub(in crate::crypt::xts) fn keys(data: &[u8; 32], tweak: &[u8; 32]) -> Keys {
    let data = expand(data);
    Keys::new(&bytes(&data), &bytes(&inverse(&data)), &bytes(&expand(tweak)))
}

impl Schedule {
    /// Round key `round`, 0..=14. Read anew each time it is asked for, so that the compiler cannot keep it in
    /// a register across blocks and, short of registers, put it on the stack.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn round_key(&self, round: usize) -> __m512i {
        let wide: *const __m512i = self.0[round].as_ptr().cast();
        // SAFETY: 64 initialised bytes, and aligned: a Schedule is to 64 bytes, of which
        // every entry is a multiple.
        unsafe { wide.read_volatile() }
    }

    /// The round key for two blocks.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn round_key_256(&self, round: usize) -> __m256i {
        let wide: *const __m256i = self.0[round].as_ptr().cast();
        // SAFETY: as above, of which this is the first half.
        unsafe { wide.read_volatile() }
    }

    /// The round key for one block.
    #[inline]
    #[target_feature(enable = "avx")]
    pub(super) fn round_key_128(&self, round: usize) -> __m128i {
        let block: *const __m128i = self.0[round].as_ptr().cast();
        // SAFETY: as above, of which this is the first quarter.
        unsafe { block.read_volatile() }
    }
}

#[target_feature(enable = "sse2")]
fn bytes(keys: &[__m128i; ROUND_KEYS]) -> RoundKeys {
    let mut bytes = [[0; 16]; ROUND_KEYS];
    for (place, key) in bytes.iter_mut().zip(keys) {
        // SAFETY: `place` is 16 bytes; the store takes any alignment.
        unsafe { _mm_storeu_si128(place.as_mut_ptr().cast(), *key) };
    }
    bytes
}

#[target_feature(enable = "aes")]
fn expand(key: &[u8; 32]) -> [__m128i; ROUND_KEYS] {
    let mut keys = [_mm_setzero_si128(); ROUND_KEYS];
    // SAFETY: both halves of `key` are 16 bytes; the loads take any alignment.
    unsafe {
        keys[0] = _mm_loadu_si128(key.as_ptr().cast());
        keys[1] = _mm_loadu_si128(key[16..].as_ptr().cast());
    }
    two_keys::<0x01>(&mut keys, 2);
    two_keys::<0x02>(&mut keys, 4);
    two_keys::<0x04>(&mut keys, 6);
    two_keys::<0x08>(&mut keys, 8);
    two_keys::<0x10>(&mut keys, 10);
    two_keys::<0x20>(&mut keys, 12);
    two_keys::<0x40>(&mut keys, 14);
    keys
}

/// Round keys `at` and, where there is one, `at + 1`; the first of a pair takes a rotated word and the round
/// constant, the second neither.
#[target_feature(enable = "aes")]
fn two_keys<const CONSTANT: i32>(keys: &mut [__m128i; ROUND_KEYS], at: usize) {
    let assist = _mm_aeskeygenassist_si128::<CONSTANT>(keys[at - 1]);
    keys[at] = _mm_xor_si128(running_xor(keys[at - 2]), _mm_shuffle_epi32::<0b11_11_11_11>(assist));
    if at + 1 < ROUND_KEYS {
        let assist = _mm_aeskeygenassist_si128::<0>(keys[at]);
        keys[at + 1] = _mm_xor_si128(running_xor(keys[at - 1]), _mm_shuffle_epi32::<0b10_10_10_10>(assist));
    }
}

/// Each 32-bit word xored with all those below it.
#[target_feature(enable = "sse2")]
fn running_xor(words: __m128i) -> __m128i {
    let pairs = _mm_xor_si128(words, _mm_slli_si128::<4>(words));
    _mm_xor_si128(pairs, _mm_slli_si128::<8>(pairs))
}

#[target_feature(enable = "aes")]
fn inverse(keys: &[__m128i; ROUND_KEYS]) -> [__m128i; ROUND_KEYS] {
    let mut reversed = *keys;
    reversed.reverse();
    for key in &mut reversed[1..ROUND_KEYS - 1] {
        *key = _mm_aesimc_si128(*key);
    }
    reversed
}
