//! The engine that runs everywhere: XTS over the `aes` crate, many blocks a call.
//!
//! `aes` chooses its instructions at run time, which costs a call that cannot be inlined; so tweaks for a
//! whole batch are laid out first and the batch goes through `aes` at once. Guest memory is copied once, and
//! what is encrypted is the copy.
#![forbid(unsafe_code)]

use crate::base::Result;
use crate::crypt::secret_mem::{Secret, wipe_stack};
use crate::crypt::xts::{Direction, SectorCipher, TweakInput, check_request};
use crate::crypt::{Dek, SectorSize};
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes256Dec, Aes256Enc, Block};
use vm_memory::VolatileSlice;

/// Blocks a group: what one chain of tweak doublings covers. A 512-byte unit is one group, a 4096-byte
/// unit eight.
const GROUP_BLOCKS: usize = 32;
const GROUP_BYTES: usize = GROUP_BLOCKS * 16;
/// Groups a batch: what goes through `aes` in one call.
const BATCH_GROUPS: usize = 8;
const BATCH_BYTES: usize = BATCH_GROUPS * GROUP_BYTES;
const BATCH_BLOCKS: usize = BATCH_GROUPS * GROUP_BLOCKS;
/// Units whose initial tweaks are encrypted together.
const UNITS_AHEAD: usize = 64;
/// How deep the frames of `aes` go, bytes; it keeps widened round keys there. Optimised they need less than 2
/// KiB, in development builds each step moves them once more.
const AES_STACK: usize = if cfg!(debug_assertions) { 16 * 1024 } else { 4096 };

/// The portable engine.
pub(super) struct Portable {
    keys: Secret<Keys>,
    unit: SectorSize,
}

/// The expanded keys. Of what `aes` makes of a key, nothing can be read: so its halves are kept as well, as
/// far from each other as the two schedules of other engines.
#[repr(C)]
struct Keys {
    data_key: [u8; 32],
    encrypt: Aes256Enc,
    decrypt: Aes256Dec,
    tweak: Aes256Enc,
    tweak_key: [u8; 32],
}

impl Portable {
    pub(super) fn new(dek: &Dek, unit: SectorSize) -> Result<Self> {
        let (data, tweak) = dek.halves();
        let keys = Secret::new(|| Keys {
            encrypt: Aes256Enc::new(data.into()),
            decrypt: Aes256Dec::new(data.into()),
            tweak: Aes256Enc::new(tweak.into()),
            data_key: *data,
            tweak_key: *tweak,
        })?;
        Ok(Portable { keys, unit })
    }

    /// Runs `len` bytes, whole data units, through the cipher: `each` is called for every batch in order,
    /// with its offset, its length and the batch cipher, and brings the bytes to and from where they live; it
    /// says whether to go on. Returns how many bytes are done.
    #[inline(always)]
    fn for_each_batch(
        &self,
        len: usize,
        first: TweakInput,
        mut each: impl FnMut(usize, &mut Batch<'_>) -> bool,
    ) -> usize {
        let mut batch =
            Batch { keys: &self.keys, starts: [0; BATCH_GROUPS], tweaks: [0; BATCH_BLOCKS], len: 0 };
        let mut initial = [Block::default(); UNITS_AHEAD];
        let unit_bytes = self.unit.bytes() as usize;
        let mut done = 0;
        'all: for offset in (0..len).step_by(UNITS_AHEAD * unit_bytes) {
            let ahead = (len - offset).min(UNITS_AHEAD * unit_bytes);
            let units = ahead / unit_bytes;
            let mut input = first.plus(offset as u64 / 512);
            for block in &mut initial[..units] {
                *block = input.to_bytes().into();
                input = input.plus(self.unit.tweak_step());
            }
            self.keys.tweak.encrypt_blocks(&mut initial[..units]);
            for at in (0..ahead).step_by(BATCH_BYTES) {
                batch.len = (ahead - at).min(BATCH_BYTES);
                match self.unit {
                    SectorSize::B512 => batch.start_each_group(&initial[at / GROUP_BYTES..units]),
                    SectorSize::B4096 => batch.start_one_unit(&initial[at / BATCH_BYTES]),
                }
                if !each(offset + at, &mut batch) {
                    break 'all;
                }
                done += batch.len;
            }
        }
        wipe_stack::<AES_STACK>();
        done
    }
}

impl SectorCipher for Portable {
    fn engine(&self) -> &'static str {
        "portable"
    }

    fn sector_size(&self) -> SectorSize {
        self.unit
    }

    fn write_key(&self, out: &mut [u8]) {
        let (data, tweak) = out.split_at_mut(Dek::LEN / 2);
        data.copy_from_slice(&self.keys.data_key);
        tweak.copy_from_slice(&self.keys.tweak_key);
    }

    fn encrypt(&self, src: VolatileSlice<'_>, dst: &mut [u8], first_sector: u64) {
        check_request(self.unit, src.len(), dst.len(), first_sector);
        self.for_each_batch(dst.len(), TweakInput::sector(first_sector), |at, batch| {
            let chunk = &mut dst[at..at + batch.len];
            src.offset(at).expect("a batch lies inside the request").copy_to(chunk);
            batch.crypt(Direction::Encrypt, chunk);
            true
        });
    }

    fn decrypt_written(&self, src: VolatileSlice<'_>, dst: VolatileSlice<'_>, first_sector: u64) -> usize {
        check_request(self.unit, src.len(), dst.len(), first_sector);
        let mut plain = [0; BATCH_BYTES];
        self.for_each_batch(src.len(), TweakInput::sector(first_sector), |at, batch| {
            let plain = &mut plain[..batch.len];
            src.offset(at).expect("a batch lies inside the request").copy_to(plain);
            if plain.chunks_exact(512).any(|sector| sector[..8] == [0; 8]) {
                return false;
            }
            batch.crypt(Direction::Decrypt, plain);
            dst.offset(at).expect("a batch lies inside the request").copy_from(plain);
            true
        })
    }

    #[inline(never)]
    fn in_place(&self, direction: Direction, data: &mut [u8], first: TweakInput) {
        self.for_each_batch(data.len(), first, |at, batch| {
            batch.crypt(direction, &mut data[at..at + batch.len]);
            true
        });
    }
}

/// Up to [`BATCH_BYTES`] of a request, with the tweak that each of its groups starts with.
struct Batch<'a> {
    keys: &'a Keys,
    starts: [u128; BATCH_GROUPS],
    /// Scratch of `crypt`; here, so that the frames that hold round keys are not far below it.
    tweaks: [u128; BATCH_BLOCKS],
    /// Bytes; whole groups.
    len: usize,
}

impl Batch<'_> {
    /// 512-byte units: every group has an initial tweak of its own.
    fn start_each_group(&mut self, initial: &[Block]) {
        for (start, block) in self.starts.iter_mut().zip(initial) {
            *start = u128::from_le_bytes((*block).into());
        }
    }

    /// A 4096-byte unit: each group goes on where the one before it ends.
    fn start_one_unit(&mut self, initial: &Block) {
        let mut tweak = u128::from_le_bytes((*initial).into());
        for start in &mut self.starts {
            *start = tweak;
            tweak = times_alpha_32(tweak);
        }
    }

    /// XEX: xor the tweaks, encrypt or decrypt, xor them again. `data` has `self.len` bytes.
    fn crypt(&mut self, direction: Direction, data: &mut [u8]) {
        let groups = data.len() / GROUP_BYTES;
        lay_out_tweaks(&self.starts, &mut self.tweaks[..groups.next_multiple_of(4) * GROUP_BLOCKS]);
        let (blocks, _) = data.as_chunks_mut();
        xor(blocks, &self.tweaks);
        match direction {
            Direction::Encrypt => self.keys.encrypt.encrypt_blocks(Block::cast_slice_from_core_mut(blocks)),
            Direction::Decrypt => self.keys.decrypt.decrypt_blocks(Block::cast_slice_from_core_mut(blocks)),
        }
        xor(blocks, &self.tweaks);
    }
}

fn xor(blocks: &mut [[u8; 16]], tweaks: &[u128]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

/// The tweaks of whole groups, of which there are a multiple of four. Doubling is a chain in which each step
/// waits for the one before; four chains side by side keep the CPU busy.
fn lay_out_tweaks(starts: &[u128], tweaks: &mut [u128]) {
    let (quads, _) = tweaks.as_chunks_mut::<{ 4 * GROUP_BLOCKS }>();
    let (starts, _) = starts.as_chunks::<4>();
    for (quad, starts) in quads.iter_mut().zip(starts) {
        let mut now = *starts;
        for i in 0..GROUP_BLOCKS {
            for (chain, tweak) in now.iter_mut().enumerate() {
                quad[chain * GROUP_BLOCKS + i] = *tweak;
                *tweak = times_alpha(*tweak);
            }
        }
    }
}

/// Multiplies by α in GF(2¹²⁸) modulo x¹²⁸ + x⁷ + x² + x + 1 (IEEE 1619 section 5.2).
fn times_alpha(tweak: u128) -> u128 {
    let carry = tweak >> 127;
    (tweak << 1) ^ carry.wrapping_mul(0x87)
}

/// Multiplies by α³²: the 32 bits that are shifted out, times x⁷ + x² + x + 1, come back in below.
fn times_alpha_32(tweak: u128) -> u128 {
    let carry = tweak >> 96;
    (tweak << 32) ^ carry ^ (carry << 1) ^ (carry << 2) ^ (carry << 7)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thirty_two_doublings_are_one_jump() {
        for start in [1, 1 << 127, u128::MAX, 0x0123_4567_89ab_cdef_fedc_ba98_7654_3210] {
            let doubled = (0..32).fold(start, |tweak, _| times_alpha(tweak));
            assert_eq!(times_alpha_32(start), doubled);
        }
    }
}
