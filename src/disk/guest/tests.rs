//! Data in pieces of any shape, against a model that knows only bytes and sectors: ciphertext by the
//! `xts-mode` crate, guest memory as one array.

use super::*;
use crate::crypt::xts::{Direction, Engine, new_cipher};
use crate::crypt::{Dek, SectorSize};
use aes::Aes256;
use aes::cipher::KeyInit;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use xts_mode::{Xts128, get_tweak_default};

const SEED: u64 = 0x5ea1_b1c0_0f0c_ede5;
const CASES: usize = 600;
/// Regions of guest memory: the first two touch, so that a run may cross from one to the other.
const REGIONS: [(u64, usize); 3] = [(0, 0x1_5a00), (0x1_5a00, 0x1_5a00), (0x8_0000, 0x1_0000)];
const KEY: [u8; 64] = {
    let mut key = [0; 64];
    let mut i = 0;
    while i < 64 {
        key[i] = (i * 7 + 1) as u8;
        i += 1;
    }
    key
};

/// Numbers that only look random (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// A request's place in guest memory and on the disk.
struct Case {
    cipher: Box<dyn SectorCipher>,
    block: usize,
    sector: u64,
    /// Bytes to move: whole blocks.
    len: usize,
    segments: Vec<Segment>,
    mem: GuestMemoryMmap<()>,
    /// What is in each region.
    before: Vec<Vec<u8>>,
}

impl Case {
    fn new(numbers: &mut Numbers) -> Self {
        let engines = Engine::available();
        let engine = engines[numbers.below(engines.len())];
        let unit = [SectorSize::B512, SectorSize::B4096][numbers.below(2)];
        let block = unit.bytes() as usize;
        let len = block * (1 + numbers.below(0x1_0000 / block));
        let ranges = REGIONS.map(|(start, len)| (GuestAddress(start), len));
        let mem = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let before: Vec<_> = REGIONS.iter().map(|&(_, len)| numbers.bytes(len)).collect();
        for ((start, _), bytes) in REGIONS.iter().zip(&before) {
            mem.write_slice(bytes, GuestAddress(*start)).unwrap();
        }
        Case {
            cipher: new_cipher(engine, &Dek::from_bytes(&KEY).unwrap(), unit).unwrap(),
            block,
            sector: (numbers.next() >> (8 + numbers.below(56))) & !(unit.tweak_step() - 1),
            len,
            segments: scatter(numbers, len, block),
            mem,
            before,
        }
    }

    fn guest(&self, skip: usize) -> GuestData<'_, GuestMemoryMmap<()>> {
        GuestData { mem: &self.mem, segments: &self.segments, skip: skip as u64 }
    }

    /// Pieces as the queue's thread makes them: whole blocks, one after the other.
    fn pieces(&self, numbers: &mut Numbers) -> Vec<(usize, usize)> {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < self.len {
            let blocks = (self.len - at) / self.block;
            let len = self.block * (1 + numbers.below(blocks));
            pieces.push((at, len));
            at += len;
        }
        pieces
    }

    /// The guest's bytes at `data`'s place, by the model.
    fn gather(&self) -> Vec<u8> {
        self.places().map(|(region, at)| self.before[region][at]).collect()
    }

    /// Guest memory when `data` was put there, by the model.
    fn put(&self, data: &[u8]) -> Vec<Vec<u8>> {
        let mut after = self.before.clone();
        for ((region, at), byte) in self.places().zip(data) {
            after[region][at] = *byte;
        }
        after
    }

    /// Region and place of each byte of the request, in order.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let addresses = self.segments.iter().flat_map(|s| s.addr.0..s.addr.0 + u64::from(s.len));
        addresses.take(self.len).map(|addr| {
            let inside = |&(start, len): &(u64, usize)| (start..start + len as u64).contains(&addr);
            let region = REGIONS.iter().position(inside).unwrap();
            (region, (addr - REGIONS[region].0) as usize)
        })
    }

    fn memory(&self) -> Vec<Vec<u8>> {
        let read = |&(start, len): &(u64, usize)| {
            let mut bytes = vec![0; len];
            self.mem.read_slice(&mut bytes, GuestAddress(start)).unwrap();
            bytes
        };
        REGIONS.iter().map(read).collect()
    }

    /// Block by block through the other implementation.
    fn model(&self, data: &[u8], direction: Direction) -> Vec<u8> {
        let half = |bytes| Aes256::new_from_slice(bytes).unwrap();
        let xts = Xts128::new(half(&KEY[..32]), half(&KEY[32..]));
        let mut data = data.to_vec();
        for (i, block) in data.chunks_mut(self.block).enumerate() {
            let sector = self.sector + (i * self.block / SECTOR) as u64;
            let tweak = get_tweak_default(sector.into());
            match direction {
                Direction::Encrypt => xts.encrypt_sector(block, tweak),
                Direction::Decrypt => xts.decrypt_sector(block, tweak),
            }
        }
        data
    }
}

/// Runs of guest memory for `len` bytes and perhaps some more: of odd lengths, of blocks,
/// or a few large ones.
fn scatter(numbers: &mut Numbers, len: usize, block: usize) -> Vec<Segment> {
    let longest = [40, 700, 5000, 0x1_0000][numbers.below(4)];
    let whole_blocks = numbers.below(3) == 0;
    let mut left = len + [0, 1, 513][numbers.below(3)];
    // The regions that touch are one place for this, the island another.
    let mut places = [(0, 0x2_b400u64), (0x8_0000, 0x9_0000)];
    let mut segments = Vec::new();
    while left > 0 {
        let wanted = if whole_blocks { block * (1 + numbers.below(4)) } else { 1 + numbers.below(longest) };
        let run = wanted.min(left) as u64;
        let fits: Vec<_> = (0..2).filter(|&i| places[i].0 + run <= places[i].1).collect();
        let place = &mut places[fits[numbers.below(fits.len())]];
        // A gap where there is room for one.
        let gap = if place.1 - place.0 > 0x1_1000 { numbers.below(48) as u64 } else { 0 };
        let start = place.0 + gap.min(place.1 - place.0 - run);
        segments.push(Segment { addr: GuestAddress(start), len: run as u32 });
        place.0 = start + run;
        left -= run as usize;
    }
    segments
}

fn for_each_case(mut check: impl FnMut(&Case, &mut Numbers)) {
    println!("seed {SEED:#x}");
    let mut numbers = Numbers(SEED);
    for number in 0..CASES {
        let case = Case::new(&mut numbers);
        println!("case {number}: {} bytes at sector {}, blocks of {}", case.len, case.sector, case.block);
        check(&case, &mut numbers);
    }
}

#[test]
fn what_the_guest_gives_is_encrypted_as_one_piece() {
    for_each_case(|case, numbers| {
        let mut disk = vec![0; case.len];
        for (at, len) in case.pieces(numbers) {
            let (part, sector) = (&mut disk[at..at + len], case.sector + (at / SECTOR) as u64);
            case.guest(at).encrypt_into(&*case.cipher, part, sector, case.block as u32).unwrap();
        }
        let plain = case.gather();
        assert!(disk == case.model(&plain, Direction::Encrypt));
        assert!(case.memory() == case.before, "the guest's memory has changed");

        let mut copy = vec![0; case.len];
        case.guest(0).copy_into(&mut copy).unwrap();
        assert!(copy == plain);
    });
}

#[test]
fn what_was_never_written_reads_as_zeros_sector_by_sector() {
    for_each_case(|case, numbers| {
        let mut disk = numbers.bytes(case.len);
        let mut expected = case.model(&disk, Direction::Decrypt);
        // No hole, few, many, nothing but holes; single sectors and whole blocks.
        let (often, run) = ([0, 1, 4, 8][numbers.below(4)], [SECTOR, case.block][numbers.below(2)]);
        for (part, plain) in disk.chunks_mut(run).zip(expected.chunks_mut(run)) {
            if numbers.below(8) < often {
                part.fill(0);
                plain.fill(0);
            }
        }
        deliver(case, numbers, &disk, &expected);
    });
}

#[test]
fn sectors_that_are_almost_zero_were_written() {
    for_each_case(|case, numbers| {
        let mut disk = vec![0; case.len];
        for sector in disk.chunks_mut(SECTOR) {
            sector[[numbers.below(8), 8 + numbers.below(504), 511][numbers.below(3)]] = 1;
        }
        let expected = case.model(&disk, Direction::Decrypt);
        deliver(case, numbers, &disk, &expected);
    });
}

/// Decrypts `disk` into the guest's memory in pieces: there is `expected` then, and nothing else has changed.
fn deliver(case: &Case, numbers: &mut Numbers, disk: &[u8], expected: &[u8]) {
    for (at, len) in case.pieces(numbers) {
        let (mut part, sector) = (disk[at..at + len].to_vec(), case.sector + (at / SECTOR) as u64);
        case.guest(at).decrypt_from(&*case.cipher, &mut part, sector, case.block as u32).unwrap();
    }
    assert!(case.memory() == case.put(expected));
}

#[test]
fn unencrypted_data_is_copied() {
    for_each_case(|case, numbers| {
        let disk = numbers.bytes(case.len);
        for (at, len) in case.pieces(numbers) {
            case.guest(at).copy_from(&disk[at..at + len]).unwrap();
        }
        assert!(case.memory() == case.put(&disk));
    });
}

#[test]
fn too_little_room_and_room_that_is_not_there_are_errors() {
    let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let cipher = new_cipher(Engine::Auto, &Dek::from_bytes(&KEY).unwrap(), SectorSize::B512).unwrap();
    let segment = |addr, len| Segment { addr: GuestAddress(addr), len };
    for (segments, skip) in [
        (&[][..], 0),
        (&[segment(0, 1023)], 0),
        (&[segment(0, 1024)], 1),
        (&[segment(0, 512), segment(0x800, 512)], 512),
        (&[segment(0, 1024)], 1024),
        (&[segment(0, 1024)], u64::MAX),
        (&[segment(0xe00, 1024)], 0),
        (&[segment(0, 512), segment(0x1000, 512)], 0),
    ] {
        let guest = GuestData { mem: &mem, segments, skip };
        let mut bytes = [7; 1024];
        assert!(guest.copy_into(&mut bytes).is_err());
        assert!(guest.copy_from(&bytes).is_err());
        assert!(guest.encrypt_into(&*cipher, &mut bytes, 0, 512).is_err());
        assert!(guest.decrypt_from(&*cipher, &mut bytes, 0, 512).is_err());
    }
}

#[test]
fn nothing_is_moved_without_an_error() {
    let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let cipher = new_cipher(Engine::Auto, &Dek::from_bytes(&KEY).unwrap(), SectorSize::B512).unwrap();
    let guest = GuestData { mem: &mem, segments: &[], skip: 0 };
    guest.copy_into(&mut []).unwrap();
    guest.copy_from(&[]).unwrap();
    guest.encrypt_into(&*cipher, &mut [], 0, 512).unwrap();
    guest.decrypt_from(&*cipher, &mut [], 0, 512).unwrap();
    assert_eq!(guest.decrypt_written(&*cipher, VolatileSlice::from(&mut [][..]), 0, 512).unwrap(), 0);
}
