//! Tests that work with a key leaves none of it on the stack.
//!
//! Round keys 0 and 1 of AES-256 are the key itself, and every schedule holds them (that of a decryption at
//! its end); so the key's own 16-byte pieces are what to look for.

use crate::crypt::xts::{Engine, SectorCipher, new_cipher};
use crate::crypt::{Dek, SectorSize};
use std::hint::black_box;
use std::io::{Read, Seek, SeekFrom};
use vm_memory::VolatileSlice;

fn key() -> Vec<u8> {
    (0..64u8).map(|i| i.wrapping_mul(37) ^ 0xc3).collect()
}

/// Runs `work` deep down on a stack of its own and tells how many of the four 16-byte pieces of [`key`] are
/// found on that stack afterwards.
fn pieces_left(work: impl FnOnce() + Send + 'static) -> usize {
    let thread = std::thread::spawn(move || {
        let mut work = Some(work);
        deeper(64, &mut || work.take().expect("called once")());
        let stack = own_stack();
        key().chunks(16).filter(|piece| stack.windows(16).any(|found| found == *piece)).count()
    });
    thread.join().unwrap()
}

/// Calls `work` some KiB further down, where the frames of what looks at the stack later do not reach.
#[inline(never)]
fn deeper(kib: usize, work: &mut dyn FnMut()) {
    let padding = black_box([0u8; 1024]);
    if kib == 0 {
        work()
    } else {
        deeper(kib - 1, work)
    }
    black_box(&padding);
}

/// The stack of this thread, also the part that is free again.
fn own_stack() -> Vec<u8> {
    let local = 0u8;
    let address = black_box(&raw const local) as u64;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut ranges = maps.lines().filter_map(|line| {
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        Some(u64::from_str_radix(from, 16).ok()?..u64::from_str_radix(to, 16).ok()?)
    });
    let range = ranges.find(|range| range.contains(&address)).unwrap();
    let mut stack = vec![0; (range.end - range.start) as usize];
    let mut memory = std::fs::File::open("/proc/self/mem").unwrap();
    memory.seek(SeekFrom::Start(range.start)).unwrap();
    memory.read_exact(&mut stack).unwrap();
    stack
}

/// Every sort of request.
fn use_cipher(cipher: &dyn SectorCipher) {
    let (mut guest, mut disk) = (vec![1; 80 * 4096], vec![0; 80 * 4096]);
    cipher.encrypt(VolatileSlice::from(&mut guest[..]), &mut disk, 8);
    let (from, to) = (VolatileSlice::from(&mut disk[..]), VolatileSlice::from(&mut guest[..]));
    assert_eq!(cipher.decrypt_written(from, to, 8), 80 * 4096);
    cipher.encrypt_in_place(&mut disk, 8);
    cipher.decrypt_in_place(&mut disk[..4096], 8);
}

#[test]
fn a_key_left_on_the_stack_would_be_found() {
    let left = pieces_left(|| {
        let mut copy = [0; 64];
        copy.copy_from_slice(&key());
        black_box(&copy);
    });
    assert_eq!(left, 4);
}

#[test]
fn making_a_key_and_what_is_derived_from_it_leaves_nothing() {
    let left = pieces_left(|| {
        let dek = Dek::from_bytes(&key()).unwrap();
        black_box(dek.check_value());
        black_box(dek.metadata_mac("vol-0123456789abcdef0", b"metadata"));
    });
    assert_eq!(left, 0);
}

#[test]
fn making_a_cipher_leaves_nothing() {
    for engine in Engine::available() {
        let left = pieces_left(move || {
            let dek = Dek::from_bytes(&key()).unwrap();
            black_box(new_cipher(engine, &dek, SectorSize::B512).unwrap());
        });
        assert_eq!(left, 0, "{engine}");
    }
}

#[test]
fn requests_leave_nothing() {
    for engine in Engine::available() {
        for unit in [SectorSize::B512, SectorSize::B4096] {
            let left = pieces_left(move || {
                let dek = Dek::from_bytes(&key()).unwrap();
                use_cipher(&*new_cipher(engine, &dek, unit).unwrap());
            });
            assert_eq!(left, 0, "{engine} {unit:?}");
        }
    }
}
