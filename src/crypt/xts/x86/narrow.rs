//! The kernels for registers of 128 and of 256 bits: data units from source to destination through XTS, eight
//! registers at a time.
//!
//! There are sixteen registers only. With eight of data, all that the AES units can have in flight is in one
//! group, and there are none left for tweaks. So these are made by the integer units, which have nothing else
//! to do: a doubling is five of their instructions (IEEE 1619 section 5.2), put between the rounds. They are
//! written to memory, and are read from there as a register's worth where a group begins and where it ends.
//! That memory is secret (see [`Scratch`]).
//!
//! What is read so was written by several narrower stores, which a CPU does not pass on from store
//! to load: the load waits until they are in the cache. So a sector's tweaks are made while the
//! sector before it is crypted.

use crate::base::prefetch::prefetch;
use crate::crypt::SectorSize;
use crate::crypt::xts::TweakInput;
use crate::crypt::xts::kernels::{AHEAD, begins_with_zeros};
use crate::crypt::xts::schedule::LAST_ROUND;
use crate::crypt::xts::x86::keys::{Keys, Schedule};
use std::arch::asm;
use std::hint::black_box;
use zeroize::Zeroize;

/// A loop that is a straight line whatever the compiler thinks of its length.
macro_rules! unrolled {
    ($name:ident of $($value:literal)*: $body:expr) => {
        $({
            let $name = $value;
            $body
        })*
    };
}

/// Registers in a group.
pub(super) const WIDTH: usize = 8;
/// Bytes, and blocks, of a sector.
const SECTOR: usize = SectorSize::B512.bytes() as usize;
const BLOCKS: usize = SECTOR / 16;
/// Data units whose initial tweaks are encrypted together.
const UNITS_AHEAD: usize = 8;

/// A block's tweak, or another block of the size.
type Block = [u64; 2];

/// What a kernel writes for itself: tweaks, as secret as what they are made of.
#[derive(Zeroize)]
#[repr(C, align(64))]
pub(super) struct Scratch {
    /// Those of the sector that is crypted, and of the next.
    sectors: [[Block; BLOCKS]; 2],
    /// Initial tweaks of data units; where the one of unit n stands is n modulo their number.
    initial: [Block; UNITS_AHEAD],
    /// The tweak that comes after those that are made.
    next: Block,
}

impl Scratch {
    /// Empty.
    pub(super) const EMPTY: Scratch =
        Scratch { sectors: [[[0; 2]; BLOCKS]; 2], initial: [[0; 2]; UNITS_AHEAD], next: [0; 2] };
}

/// A vector register.
///
/// Each function is inlined into a kernel, which has the instructions that it is made of. That is what they
/// are unsafe for: the CPU has to have them; and whatever is said of their pointers.
pub(super) trait Register: Copy {
    /// How many blocks it has.
    const BLOCKS: usize;
    /// Two tweak inputs at most, as many as there are blocks, of data units that are `step` sectors long.
    unsafe fn inputs(first: TweakInput, step: u64) -> Self;
    /// Reads it, at any address, exactly once: the memory may be a guest's, which may change it at any time.
    unsafe fn read(at: *const u8) -> Self;
    /// Writes it, at any address.
    unsafe fn write(self, at: *mut u8);
    /// Reads a round key anew.
    unsafe fn round_key(keys: &Schedule, round: usize) -> Self;
    /// Has all of these computed before any is used: else the compiler takes one after the other through all
    /// rounds that are left, and the AES units wait.
    unsafe fn together(blocks: &mut [Self; WIDTH]);
    unsafe fn xor(self, other: Self) -> Self;
    unsafe fn encrypt(self, key: Self) -> Self;
    unsafe fn encrypt_last(self, key: Self) -> Self;
    unsafe fn decrypt(self, key: Self) -> Self;
    unsafe fn decrypt_last(self, key: Self) -> Self;
}

/// What [`super::Kernel`] says, for data units of SECTORS sectors.
///
/// # Safety
/// As there; `scratch` is nobody else's meanwhile; the CPU has what R is made of.
#[inline(always)]
pub(super) unsafe fn run<R: Register, const DECRYPT: bool, const WRITTEN: bool, const SECTORS: usize>(
    keys: &Keys,
    scratch: *mut Scratch,
    mut src: *const u8,
    mut dst: *mut u8,
    units: usize,
    first: TweakInput,
) -> usize {
    let data_keys = if DECRYPT { &keys.decrypt } else { &keys.encrypt };
    // SAFETY: inside of `scratch`, which the caller vouches for.
    let (initial, next, mut here, mut there) = unsafe {
        let [here, there] = [0, 1].map(|sector| (&raw mut (*scratch).sectors[sector]).cast::<Block>());
        ((&raw mut (*scratch).initial).cast::<Block>(), &raw mut (*scratch).next, here, there)
    };
    // Later, what is ahead is asked for in time; what a request begins with, only here. It comes while
    // the first tweaks are made.
    for at in (0..(units * SECTORS * SECTOR).min(AHEAD)).step_by(64) {
        prefetch(src.wrapping_add(at));
    }
    let mut input = first;
    // SAFETY: as above: each has room for what is written.
    unsafe {
        encrypt_inputs::<R, SECTORS>(&keys.tweak, input, initial);
        begin(initial, here, next);
    }
    for unit in 0..units {
        for sector in 0..SECTORS {
            // SAFETY: both pointers stand where a sector begins that the data unit has left.
            unsafe {
                if WRITTEN && begins_with_zeros(src) {
                    return unit;
                }
                // Where the tweak of the sector that comes next is.
                let mut from = next.cast_const();
                if sector == SECTORS - 1 {
                    let place = unit.wrapping_add(1) % UNITS_AHEAD;
                    if place == 0 && unit.wrapping_add(1) != units {
                        input = input.plus((UNITS_AHEAD * SECTORS) as u64);
                        encrypt_inputs::<R, SECTORS>(&keys.tweak, input, initial);
                    }
                    from = initial.add(place);
                }
                let (mut tweaks, mut to) = (here, there);
                for _ in 0..BLOCKS / (WIDTH * R::BLOCKS) {
                    crypt::<R, DECRYPT>(data_keys, src, dst, tweaks.cast(), Made { from, to, next });
                    src = src.add(WIDTH * R::BLOCKS * 16);
                    dst = dst.add(WIDTH * R::BLOCKS * 16);
                    tweaks = tweaks.add(WIDTH * R::BLOCKS);
                    to = to.add(WIDTH * R::BLOCKS);
                    from = next;
                }
                (here, there) = (there, here);
            }
        }
    }
    units
}

/// Where a group's worth of tweaks is made from, and where they are put; and the one after them.
struct Made {
    from: *const Block,
    to: *mut Block,
    next: *mut Block,
}

/// Crypts a group whose tweaks are at `tweaks`, and makes as many others meanwhile.
#[inline(always)]
unsafe fn crypt<R: Register, const DECRYPT: bool>(
    keys: &Schedule,
    src: *const u8,
    dst: *mut u8,
    tweaks: *const u8,
    made: Made,
) {
    let size = R::BLOCKS * 16;
    // SAFETY: the caller vouches for a group at `src`, `dst` and `tweaks`, and for what is made.
    unsafe {
        let mut tweak = Tweak::read(made.from);
        let key = R::round_key(keys, 0);
        let mut blocks = [key; WIDTH];
        let mut at = 0;
        for block in &mut blocks {
            prefetch(src.wrapping_add(at).wrapping_add(AHEAD));
            *block = R::read(src.add(at)).xor(key).xor(R::read(tweaks.add(at)));
            at = at.wrapping_add(size);
        }
        let mut to = made.to;
        unrolled!(round of 1 2 3 4 5 6 7 8: {
            one_round::<R, DECRYPT>(keys, round, &mut blocks);
            for _ in 0..R::BLOCKS {
                tweak.write(to);
                tweak = tweak.doubled();
                to = to.add(1);
            }
        });
        tweak.write(made.next);
        unrolled!(round of 9 10 11 12 13: one_round::<R, DECRYPT>(keys, round, &mut blocks));
        let key = R::round_key(keys, LAST_ROUND);
        let mut at = 0;
        for block in blocks {
            // The last round ends in an xor with its key, so the tweak goes in with it.
            let key = key.xor(R::read(tweaks.add(at)));
            let done = if DECRYPT { block.decrypt_last(key) } else { block.encrypt_last(key) };
            done.write(dst.add(at));
            at = at.wrapping_add(size);
        }
    }
}

#[inline(always)]
unsafe fn one_round<R: Register, const DECRYPT: bool>(
    keys: &Schedule,
    round: usize,
    blocks: &mut [R; WIDTH],
) {
    // SAFETY: the caller vouches for the CPU.
    unsafe {
        let key = R::round_key(keys, round);
        for block in &mut *blocks {
            *block = if DECRYPT { block.decrypt(key) } else { block.encrypt(key) };
        }
        R::together(blocks);
    }
}

/// Encrypts the tweak inputs of [`UNITS_AHEAD`] data units, the first of which is `first`.
#[inline(always)]
unsafe fn encrypt_inputs<R: Register, const SECTORS: usize>(
    keys: &Schedule,
    first: TweakInput,
    to: *mut Block,
) {
    // SAFETY: the caller vouches for room at `to`.
    unsafe {
        // black_box: it is always zero except for test vectors, and must not hold a
        // register through the loop.
        let mut input = TweakInput { high: black_box(first.high), ..first };
        let mut tweaks = [R::round_key(keys, 0); UNITS_AHEAD];
        for tweak in &mut tweaks[..UNITS_AHEAD / R::BLOCKS] {
            *tweak = tweak.xor(R::inputs(input, SECTORS as u64));
            input = input.plus((R::BLOCKS * SECTORS) as u64);
        }
        for round in 1..LAST_ROUND {
            let key = R::round_key(keys, round);
            for tweak in &mut tweaks[..UNITS_AHEAD / R::BLOCKS] {
                *tweak = tweak.encrypt(key);
            }
        }
        let key = R::round_key(keys, LAST_ROUND);
        let mut to = to;
        for tweak in &tweaks[..UNITS_AHEAD / R::BLOCKS] {
            tweak.encrypt_last(key).write(to.cast());
            to = to.add(R::BLOCKS);
        }
    }
}

/// Makes the tweaks of the first sector, whose first one is at `initial`, and the one after them. Here
/// nothing else is to be done meanwhile, so that four rows of them are made side by side.
#[inline(always)]
unsafe fn begin(initial: *const Block, to: *mut Block, next: *mut Block) {
    const ROW: usize = 8;
    const { assert!(4 * ROW == BLOCKS) };
    // SAFETY: the caller vouches for room at `to` and at `next`.
    unsafe {
        let first = Tweak::read(initial);
        let second = first.doubled_8_times();
        let third = second.doubled_8_times();
        let mut rows = [first, second, third, third.doubled_8_times()];
        let mut to = to;
        for _ in 0..ROW {
            let mut row_at = to;
            for row in &mut rows {
                row.write(row_at);
                *row = row.doubled();
                row_at = row_at.add(ROW);
            }
            to = to.add(1);
        }
        let [.., last] = rows;
        last.write(next);
    }
}

/// A tweak in general registers.
#[derive(Clone, Copy)]
struct Tweak {
    low: u64,
    high: u64,
}

impl Tweak {
    #[inline(always)]
    unsafe fn read(at: *const Block) -> Tweak {
        // SAFETY: the caller vouches for a readable block.
        unsafe {
            let half = at.cast::<u64>();
            Tweak { low: half.read_volatile(), high: half.add(1).read_volatile() }
        }
    }

    /// Volatile, so that nothing of a tweak is kept anywhere else.
    #[inline(always)]
    unsafe fn write(self, at: *mut Block) {
        // SAFETY: the caller vouches for a writable block.
        unsafe {
            let half = at.cast::<u64>();
            half.write_volatile(self.low);
            half.add(1).write_volatile(self.high);
        }
    }

    /// Times α: shifted up by a bit, and where one falls out, the polynomial's lower part comes in.
    #[inline(always)]
    fn doubled(self) -> Tweak {
        let Tweak { mut low, mut high } = self;
        // SAFETY: arithmetic in registers. As an instruction sequence: what the compiler makes of shifts is
        // longer, and it would have vector registers do it.
        unsafe {
            asm!(
                "mov {carry}, {high}", "sar {carry}, 63", "and {carry:e}, 0x87",
                "add {low}, {low}", "adc {high}, {high}", "xor {low}, {carry}",
                low = inout(reg) low, high = inout(reg) high, carry = out(reg) _,
                options(pure, nomem, nostack),
            );
        }
        Tweak { low, high }
    }

    /// Times α⁸: shifted up by a byte, and what falls out, times the polynomial's lower part, comes in.
    #[inline(always)]
    fn doubled_8_times(self) -> Tweak {
        let out = self.high >> 56;
        let folded = out ^ (out << 1) ^ (out << 2) ^ (out << 7);
        Tweak { low: (self.low << 8) ^ folded, high: (self.high << 8) | (self.low >> 56) }
    }
}
