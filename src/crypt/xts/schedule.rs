//! AES-256 key schedules in the form that kernels load (FIPS 197 sections 5.2 and 5.3.5).
#![forbid(unsafe_code)]

use crate::crypt::Dek;

/// Round keys of AES-256: 14 rounds and the whitening before them.
pub(super) const ROUND_KEYS: usize = 15;
/// The last of its rounds.
pub(super) const LAST_ROUND: usize = ROUND_KEYS - 1;

/// What a key is expanded into.
pub(super) type RoundKeys = [[u8; 16]; ROUND_KEYS];

/// One schedule, for registers of BYTES: every round key stands in it once for each block of a register.
#[repr(C, align(64))]
pub(super) struct Schedule<const BYTES: usize>(pub(super) [[u8; BYTES]; ROUND_KEYS]);

impl<const BYTES: usize> Schedule<BYTES> {
    fn new(round_keys: &RoundKeys) -> Self {
        let mut schedule = Schedule([[0; BYTES]; ROUND_KEYS]);
        for (wide, key) in schedule.0.iter_mut().zip(round_keys) {
            for place in wide.chunks_exact_mut(key.len()) {
                place.copy_from_slice(key);
            }
        }
        schedule
    }

    /// Writes the key that an encryption's schedule was expanded from, 32 bytes: its first two round keys.
    fn write_key(&self, out: &mut [u8]) {
        let (first, second) = out.split_at_mut(16);
        first.copy_from_slice(&self.0[0][..16]);
        second.copy_from_slice(&self.0[1][..16]);
    }
}

/// The schedules of one data key. For a decryption the round keys are in reverse, and those between the first
/// and the last are the equivalent inverse cipher's.
pub(super) struct Keys<const BYTES: usize> {
    pub(super) encrypt: Schedule<BYTES>,
    pub(super) decrypt: Schedule<BYTES>,
    pub(super) tweak: Schedule<BYTES>,
}

impl<const BYTES: usize> Keys<BYTES> {
    /// Out of what both halves of a data key are expanded into, and the round keys of a decryption. Leaves
    /// round keys on the stack: to be run where it is scrubbed.
    pub(super) fn new(data: &RoundKeys, inverse: &RoundKeys, tweak: &RoundKeys) -> Self {
        Keys { encrypt: Schedule::new(data), decrypt: Schedule::new(inverse), tweak: Schedule::new(tweak) }
    }

    /// Writes the data key, 64 bytes.
    pub(super) fn write_key(&self, out: &mut [u8]) {
        let (data, tweak) = out.split_at_mut(Dek::LEN / 2);
        self.encrypt.write_key(data);
        self.tweak.write_key(tweak);
    }
}
