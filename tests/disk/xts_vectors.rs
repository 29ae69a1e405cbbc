//! AES-256-XTS against published vectors and against `xts-mode`, for every engine that this CPU can run.

use aes::Aes256;
use aes::cipher::KeyInit;
use sealblk::base::error::Kind;
use sealblk::crypt::xts::{Direction, Engine, SectorCipher, new_cipher};
use sealblk::crypt::{Dek, SectorSize};
use std::panic::{AssertUnwindSafe, catch_unwind};
use vm_memory::VolatileSlice;
use xts_mode::{Xts128, get_tweak_default};

const UNITS: [SectorSize; 2] = [SectorSize::B512, SectorSize::B4096];

/// Every engine of this CPU under `key`, with both data units.
fn ciphers(key: &[u8]) -> Vec<Box<dyn SectorCipher>> {
    let dek = Dek::from_bytes(key).unwrap();
    let engines = Engine::available();
    assert!(engines.contains(&Engine::Portable));
    let pairs = engines.into_iter().flat_map(|engine| UNITS.map(|unit| (engine, unit)));
    pairs.map(|(engine, unit)| new_cipher(engine, &dek, unit).unwrap()).collect()
}

fn name(cipher: &dyn SectorCipher) -> String {
    format!("{} with {} bytes a unit", cipher.engine(), cipher.sector_size().bytes())
}

mod published {
    use super::*;

    struct Vector<'a> {
        name: &'a str,
        directions: &'static [Direction],
        key: Vec<u8>,
        tweak: [u8; 16],
        plain: Vec<u8>,
        cipher: Vec<u8>,
    }

    fn parse(file: &str) -> Vec<Vector<'_>> {
        let lines = file.lines().filter(|line| !line.starts_with('#'));
        let parse_line = |line| {
            let fields: Vec<&str> = str::split(line, ' ').collect();
            let bytes = |i: usize| hex::decode(fields[i]).unwrap();
            Vector {
                name: fields[0],
                directions: match fields[1] {
                    "encrypt" => &[Direction::Encrypt],
                    "decrypt" => &[Direction::Decrypt],
                    "both" => &[Direction::Encrypt, Direction::Decrypt],
                    other => panic!("{other}"),
                },
                key: bytes(2),
                tweak: bytes(3).try_into().unwrap(),
                plain: bytes(4),
                cipher: bytes(5),
            }
        };
        lines.map(parse_line).collect()
    }

    /// Checks every vector on every engine. Vectors are shorter than a data unit; without ciphertext stealing
    /// each block depends on its own place only, so a vector is the beginning of a data unit.
    fn check(file: &str, count: usize) {
        let vectors = parse(file);
        assert_eq!(vectors.len(), count);
        for vector in &vectors {
            for cipher in ciphers(&vector.key) {
                for direction in vector.directions {
                    let (from, to) = match direction {
                        Direction::Encrypt => (&vector.plain, &vector.cipher),
                        Direction::Decrypt => (&vector.cipher, &vector.plain),
                    };
                    let mut unit = vec![0xd7; cipher.sector_size().bytes() as usize];
                    unit[..from.len()].copy_from_slice(from);
                    cipher.crypt_unit(*direction, &mut unit, vector.tweak);
                    assert_eq!(
                        hex::encode(&unit[..to.len()]),
                        hex::encode(to),
                        "{} {direction:?}, {}",
                        vector.name,
                        name(&*cipher)
                    );
                }
            }
        }
    }

    #[test]
    fn ieee_1619() {
        check(include_str!("vectors/ieee1619.txt"), 5);
    }

    #[test]
    fn nist_xtsgen() {
        check(include_str!("vectors/nist_xtsgen_aes256.txt"), 120);
    }

    #[test]
    fn wycheproof() {
        check(include_str!("vectors/wycheproof_aes_xts.txt"), 21);
    }

    /// The standard's vectors through the requests that volumes make: the standard's data
    /// unit numbers are sectors.
    #[test]
    fn ieee_1619_as_sectors_of_512_bytes() {
        for vector in parse(include_str!("vectors/ieee1619.txt")) {
            let sector = u64::from_le_bytes(vector.tweak[..8].try_into().unwrap());
            assert_eq!((vector.plain.len(), &vector.tweak[8..]), (512, &[0; 8][..]));
            for cipher in ciphers(&vector.key).iter().filter(|c| c.sector_size() == SectorSize::B512) {
                let mut guest = vector.plain.clone();
                let mut disk = vec![0; 512];
                cipher.encrypt(VolatileSlice::from(&mut guest[..]), &mut disk, sector);
                assert_eq!(disk, vector.cipher, "{} {}", vector.name, cipher.engine());
                guest.fill(0);
                let (from, to) = (VolatileSlice::from(&mut disk[..]), VolatileSlice::from(&mut guest[..]));
                assert_eq!(cipher.decrypt_written(from, to, sector), 512);
                assert_eq!(guest, vector.plain, "{} {}", vector.name, cipher.engine());
            }
        }
    }
}

/// splitmix64: numbers that are the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// `plain` as `xts-mode` encrypts it, one data unit after the other.
fn by_xts_mode(key: &[u8], unit: SectorSize, plain: &[u8], first_sector: u64) -> Vec<u8> {
    let half = |half: &[u8]| Aes256::new_from_slice(half).unwrap();
    let oracle = Xts128::new(half(&key[..32]), half(&key[32..]));
    let mut data = plain.to_vec();
    for (i, chunk) in data.chunks_mut(unit.bytes() as usize).enumerate() {
        let sector = first_sector.wrapping_add(i as u64 * unit.tweak_step());
        oracle.encrypt_sector(chunk, get_tweak_default(sector.into()));
    }
    data
}

/// Bytes at a chosen distance from an address that is a multiple of 64, with untouched bytes around them.
struct Placed {
    memory: Vec<u8>,
    begin: usize,
    len: usize,
}

impl Placed {
    const AROUND: u8 = 0xbd;

    fn new(misalignment: usize, contents: &[u8]) -> Self {
        let mut memory = vec![Self::AROUND; contents.len() + 256];
        let begin = memory.as_ptr().align_offset(64) + 64 + misalignment;
        memory[begin..begin + contents.len()].copy_from_slice(contents);
        Placed { memory, begin, len: contents.len() }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.begin..self.begin + self.len]
    }

    fn surroundings_are_untouched(&self) -> bool {
        let (before, rest) = self.memory.split_at(self.begin);
        before.iter().chain(&rest[self.len..]).all(|b| *b == Self::AROUND)
    }
}

/// Source, destination and in place, both directions, at these misalignments.
fn compare(
    cipher: &dyn SectorCipher,
    first_sector: u64,
    plain: &[u8],
    expected: &[u8],
    misaligned: [usize; 2],
) {
    let what = format!("{}, {} bytes at sector {first_sector}, {misaligned:?}", name(cipher), plain.len());
    let zeros = vec![0; plain.len()];

    let (mut guest, mut disk) = (Placed::new(misaligned[0], plain), Placed::new(misaligned[1], &zeros));
    cipher.encrypt(VolatileSlice::from(guest.bytes()), disk.bytes(), first_sector);
    assert!(disk.bytes() == expected, "encrypt: {what}");
    assert!(guest.bytes() == plain, "encrypt changed its source: {what}");
    assert!(disk.surroundings_are_untouched(), "encrypt wrote outside: {what}");

    let mut guest = Placed::new(misaligned[0], &zeros);
    let (from, to) = (VolatileSlice::from(disk.bytes()), VolatileSlice::from(guest.bytes()));
    assert_eq!(cipher.decrypt_written(from, to, first_sector), plain.len(), "{what}");
    assert!(guest.bytes() == plain, "decrypt: {what}");
    assert!(disk.bytes() == expected, "decrypt changed its source: {what}");
    assert!(guest.surroundings_are_untouched(), "decrypt wrote outside: {what}");

    cipher.encrypt_in_place(guest.bytes(), first_sector);
    assert!(guest.bytes() == expected, "encrypt in place: {what}");
    cipher.decrypt_in_place(guest.bytes(), first_sector);
    assert!(guest.bytes() == plain, "decrypt in place: {what}");
    assert!(guest.surroundings_are_untouched(), "in place wrote outside: {what}");
}

#[test]
fn every_engine_gives_its_key_back() {
    let key: Vec<u8> = (0..64).map(|n| n * 3).collect();
    for engine in Engine::available() {
        for unit in [SectorSize::B512, SectorSize::B4096] {
            let cipher = new_cipher(engine, &Dek::from_bytes(&key).unwrap(), unit).unwrap();
            let mut back = [0; Dek::LEN];
            cipher.write_key(&mut back);
            assert_eq!(back[..], key[..], "{engine}");
        }
    }
}

#[test]
fn every_engine_agrees_with_xts_mode_on_random_requests() {
    let seed = 0x5ea1_b10c;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    for _ in 0..12 {
        let key = random.bytes(64);
        for cipher in ciphers(&key) {
            let unit = cipher.sector_size();
            for _ in 0..6 {
                let units = 1 + random.below(90 * 512 / unit.bytes() as usize + 4);
                let sector = random.next() >> random.below(64);
                let sector = sector - sector % unit.tweak_step();
                let plain = random.bytes(units * unit.bytes() as usize);
                let expected = by_xts_mode(&key, unit, &plain, sector);
                compare(&*cipher, sector, &plain, &expected, [random.below(64), random.below(64)]);
            }
        }
    }
}

/// A hole is decrypted by no engine: what would come out, a guest has never written.
#[test]
fn what_was_not_written_ends_a_decryption() {
    let key = Random(7).bytes(64);
    for cipher in ciphers(&key) {
        let unit = cipher.sector_size().bytes() as usize;
        let plain = Random(8).bytes(24 * 4096);
        let written = by_xts_mode(&key, cipher.sector_size(), &plain, 64);
        let mut random = Random(9);
        let holes = [(0, 512), (512, 512), (4096, 8), (8192 + 3584, 8), (plain.len() - 512, 512)];
        let more = (0..40).map(|_| (random.below(plain.len() / 512) * 512, 8 + random.below(504)));
        for (at, len) in holes.into_iter().chain(more.collect::<Vec<_>>()) {
            let mut disk = written.clone();
            disk[at..at + len].fill(0);
            let mut guest = vec![0x77; plain.len()];
            let (from, to) = (VolatileSlice::from(&mut disk[..]), VolatileSlice::from(&mut guest[..]));
            let done = cipher.decrypt_written(from, to, 64);
            let what = format!("{}: {len} bytes at {at}, {done} done", name(&*cipher));
            assert!(done.is_multiple_of(unit) && done <= at && done + 4096 > at, "{what}");
            assert!(guest[..done] == plain[..done], "{what}");
            assert!(guest[at..].iter().all(|&byte| byte == 0x77), "{what}");
            // Between the two there is nothing but the beginning of a data unit that is to be read otherwise.
            let between = &guest[done..at];
            let decrypted = between.iter().zip(&plain[done..at]).take_while(|(a, b)| a == b).count();
            assert!(between[decrypted..].iter().all(|&byte| byte == 0x77), "{what}");
        }
    }
}

/// Each count up to more than what an engine takes at once, so that every kind of remainder comes up.
#[test]
fn every_number_of_data_units_works() {
    let key = Random(1).bytes(64);
    for cipher in ciphers(&key) {
        let unit = cipher.sector_size();
        let most = if unit == SectorSize::B512 { 140 } else { 70 };
        let plain = Random(2).bytes(most * unit.bytes() as usize);
        let expected = by_xts_mode(&key, unit, &plain, 4096);
        for units in 0..=most {
            let len = units * unit.bytes() as usize;
            compare(&*cipher, 4096, &plain[..len], &expected[..len], [0, 0]);
        }
    }
}

#[test]
fn requests_end_at_the_last_byte_of_mapped_memory() {
    let key = Random(3).bytes(64);
    for cipher in ciphers(&key) {
        let unit = cipher.sector_size().bytes() as usize;
        for len in [unit, 3 * unit, 9 * unit] {
            let (source, target) = (GuardedPages::new(len), GuardedPages::new(len));
            let plain = Random(4).bytes(len);
            let mut expected = by_xts_mode(&key, cipher.sector_size(), &plain, 64);
            let mut buffer = plain.clone();
            for at in [source.last(len), source.first(len)] {
                at.copy_from(&plain);
                cipher.encrypt(at, &mut buffer, 64);
                assert!(buffer == expected, "{}", name(&*cipher));
            }
            for at in [target.last(len), target.first(len)] {
                let done = cipher.decrypt_written(VolatileSlice::from(&mut expected[..]), at, 64);
                assert_eq!(done, len, "{}", name(&*cipher));
                let mut found = vec![0; len];
                at.copy_to(&mut found);
                assert!(found == plain, "{}", name(&*cipher));
            }
        }
    }
}

/// Pages between two that must not be touched: a byte too far ends the test with SIGSEGV.
struct GuardedPages {
    base: *mut u8,
    data: usize,
}

impl GuardedPages {
    const PAGE: usize = 4096;

    fn new(len: usize) -> Self {
        let data = len.next_multiple_of(Self::PAGE);
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping where the kernel likes; then its middle, which nobody uses
        // yet, made accessible.
        unsafe {
            let base =
                libc::mmap(std::ptr::null_mut(), data + 2 * Self::PAGE, libc::PROT_NONE, anonymous, -1, 0);
            assert_ne!(base, libc::MAP_FAILED);
            let middle = base.byte_add(Self::PAGE);
            assert_eq!(libc::mprotect(middle, data, libc::PROT_READ | libc::PROT_WRITE), 0);
            GuardedPages { base: base.cast(), data }
        }
    }

    fn first(&self, len: usize) -> VolatileSlice<'_> {
        assert!(len <= self.data);
        // SAFETY: `len` bytes from the first accessible page, alive as long as `self`.
        unsafe { VolatileSlice::new(self.base.add(Self::PAGE), len) }
    }

    fn last(&self, len: usize) -> VolatileSlice<'_> {
        assert!(len <= self.data);
        // SAFETY: the last `len` accessible bytes, alive as long as `self`.
        unsafe { VolatileSlice::new(self.base.add(Self::PAGE + self.data - len), len) }
    }
}

impl Drop for GuardedPages {
    fn drop(&mut self) {
        // SAFETY: the whole mapping of `new`; slices of it cannot outlive `self`.
        unsafe { libc::munmap(self.base.cast(), self.data + 2 * Self::PAGE) };
    }
}

#[test]
fn requests_that_are_not_whole_data_units_are_refused_before_anything_is_written() {
    for cipher in ciphers(&Random(5).bytes(64)) {
        let (unit, sectors) = (cipher.sector_size().bytes() as usize, cipher.sector_size().tweak_step());
        let mut cases = vec![(unit - 16, 0), (unit + 1, 0), (unit / 2, 0)];
        if sectors > 1 {
            cases.push((unit, 1));
        }
        for (len, sector) in cases {
            let mut data = vec![7; len];
            let refused = catch_unwind(AssertUnwindSafe(|| cipher.encrypt_in_place(&mut data, sector)));
            assert!(refused.is_err(), "{} took {len} bytes at sector {sector}", name(&*cipher));
            assert!(data.iter().all(|b| *b == 7));
        }
        let (mut short, mut long) = (vec![7; unit], vec![7; 2 * unit]);
        let refused = catch_unwind(AssertUnwindSafe(|| {
            cipher.encrypt(VolatileSlice::from(&mut short[..]), &mut long, 0);
        }));
        assert!(refused.is_err() && long.iter().all(|b| *b == 7));
        let refused = catch_unwind(AssertUnwindSafe(|| {
            cipher.decrypt_written(
                VolatileSlice::from(&mut long[..]),
                VolatileSlice::from(&mut short[..]),
                0,
            );
        }));
        assert!(refused.is_err() && short.iter().all(|b| *b == 7));
    }
}

#[test]
fn auto_takes_the_first_available_engine_and_a_lacking_one_is_refused() {
    let dek = Dek::from_bytes(&Random(6).bytes(64)).unwrap();
    let engine_of = |engine| new_cipher(engine, &dek, SectorSize::B512).map(|cipher| cipher.engine());
    assert_eq!(engine_of(Engine::Auto).unwrap(), Engine::available()[0].name());
    for engine in [Engine::Portable, Engine::AesNi, Engine::Vaes256, Engine::Vaes512, Engine::Armv8] {
        match engine_of(engine) {
            Ok(name) => assert_eq!((name, Engine::available().contains(&engine)), (engine.name(), true)),
            Err(e) => {
                assert!(!Engine::available().contains(&engine));
                assert_eq!(e.kind(), Kind::Unsupported);
                assert!(e.to_string().contains("this CPU"), "{e}");
            }
        }
    }
}

#[test]
fn engine_names_are_read_as_they_are_written() {
    let all =
        [Engine::Auto, Engine::Portable, Engine::AesNi, Engine::Vaes256, Engine::Vaes512, Engine::Armv8];
    for engine in all {
        assert_eq!(engine.to_string().parse::<Engine>().unwrap(), engine);
    }
    let e = "VAES".parse::<Engine>().unwrap_err();
    assert_eq!(e.kind(), Kind::Usage);
    assert!(e.to_string().contains("auto, portable, aesni, vaes256, vaes512, armv8"), "{e}");
}
