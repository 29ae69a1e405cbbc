//! Speed of the cipher engines: GB/s, and ns for a 4 KiB request, on one core.
//!
//! Engines and data units take turns in every round, so that a machine whose speed drifts slows all
//! alike; what is printed is the best round of each, by the CPU time of this thread. Beside them stand
//! two ceilings: how fast the CPU's AES units alone could be, and how fast it copies as many bytes
//! from one place to the other.

use sealblk::crypt::xts::{Engine, SectorCipher, new_cipher};
use sealblk::crypt::{Dek, SectorSize};
use std::hint::black_box;
use std::time::Duration;
use vm_memory::VolatileSlice;

const USAGE: &str = "\
Speed of the AES-256-XTS engines that this CPU can run, one core.

usage: cargo bench --bench xts [-- [--rounds N] [--request BYTES]]

  --rounds N       rounds of all engines, data units and directions in turn (default 20)
  --request BYTES  length of one request, a multiple of 4096 (default 131072, as for throughput);
                   requests of 4096 bytes are measured besides";

struct Options {
    rounds: u32,
    request: usize,
}

/// Bytes that begin a page, as those of guests and bounce buffers do.
struct Aligned(Vec<u8>);

impl Aligned {
    fn new(len: usize) -> Self {
        Aligned(vec![0x5a; len + 4096])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let begin = self.0.as_ptr().align_offset(4096);
        let len = self.0.len() - 4096;
        &mut self.0[begin..begin + len]
    }
}

/// One thing to measure and the best that it has shown.
struct Case {
    engine: Engine,
    unit: SectorSize,
    encrypt: bool,
    cipher: Box<dyn SectorCipher>,
    ns_per_request: f64,
    ns_per_4k: f64,
}

fn main() {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(wrong) => {
            eprintln!("{wrong} is not understood\n\n{USAGE}");
            std::process::exit(2);
        }
    };
    let mut cases = cases();
    let (mut guest, mut buffer) = (Aligned::new(options.request), Aligned::new(options.request));
    let mut ceilings = [
        ("AES-256, in registers of 128 bits", f64::INFINITY),
        ("AES-256, in registers of 256 bits", f64::INFINITY),
        ("AES-256, in registers of 512 bits", f64::INFINITY),
        ("copy of the request", f64::INFINITY),
    ];
    for _ in 0..options.rounds {
        let (from, to) = (guest.bytes(), buffer.bytes());
        let copy = || {
            VolatileSlice::from(&mut *from).copy_to(black_box(&mut *to));
        };
        let [narrow, middle, wide] = aes_units(options.request);
        let measured = [narrow, middle, wide, Some(each(copy))];
        for (ceiling, found) in ceilings.iter_mut().zip(measured) {
            ceiling.1 = ceiling.1.min(found.unwrap_or(f64::INFINITY));
        }
        for case in &mut cases {
            case.ns_per_request = case.ns_per_request.min(ns_each(case, guest.bytes(), buffer.bytes()));
            let (guest, buffer) = (&mut guest.bytes()[..4096], &mut buffer.bytes()[..4096]);
            case.ns_per_4k = case.ns_per_4k.min(ns_each(case, guest, buffer));
        }
    }
    report(&cases, options.request);
    for (what, ns) in ceilings.iter().filter(|(_, ns)| ns.is_finite()) {
        println!("ceiling: {what} {:.2} GB/s", options.request as f64 / ns);
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { rounds: 20, request: 128 * 1024 };
    while let Some(arg) = args.next() {
        // cargo bench hands every bench this flag.
        if arg == "--bench" {
            continue;
        }
        if arg == "--help" {
            println!("{USAGE}");
            std::process::exit(0);
        }
        let number = args.next().and_then(|n| n.parse::<usize>().ok()).filter(|n| *n > 0);
        match (arg.as_str(), number) {
            ("--rounds", Some(n)) => options.rounds = n as u32,
            ("--request", Some(n)) if n.is_multiple_of(4096) => options.request = n,
            _ => return Err(arg),
        }
    }
    Ok(options)
}

fn cases() -> Vec<Case> {
    let key: Vec<u8> = (0..64).collect();
    let dek = Dek::from_bytes(&key).expect("a key with different halves");
    let mut cases = Vec::new();
    for unit in [SectorSize::B512, SectorSize::B4096] {
        for encrypt in [true, false] {
            for engine in Engine::available() {
                let cipher = new_cipher(engine, &dek, unit).expect("an engine that is available");
                let (ns_per_request, ns_per_4k) = (f64::INFINITY, f64::INFINITY);
                cases.push(Case { engine, unit, encrypt, cipher, ns_per_request, ns_per_4k });
            }
        }
    }
    cases
}

/// CPU time of one request in nanoseconds, averaged over about 5 ms.
fn ns_each(case: &Case, guest: &mut [u8], buffer: &mut [u8]) -> f64 {
    each(|| request(case, guest, buffer))
}

/// CPU time of one call in nanoseconds, averaged over about 5 ms.
fn each(mut call: impl FnMut()) -> f64 {
    let (begin, mut calls) = (cpu_time(), 0u32);
    loop {
        for _ in 0..16 {
            call();
        }
        calls += 16;
        let spent = cpu_time() - begin;
        if spent >= Duration::from_millis(5) {
            return spent.as_nanos() as f64 / f64::from(calls);
        }
    }
}

/// What this thread has had of a CPU.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec to where the pointer leads.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "every thread has this clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// CPU time of the rounds of AES-256 for so many bytes in nanoseconds, as fast as this CPU can do them with
/// registers of 128, 256 and 512 bits: ten independent ones, and nothing read or written.
#[cfg(target_arch = "x86_64")]
fn aes_units(bytes: usize) -> [Option<f64>; 3] {
    use std::arch::x86_64::*;

    macro_rules! rounds {
        ($features:literal, $zero:ident, $encrypt:ident) => {{
            #[target_feature(enable = $features)]
            fn rounds(bytes: usize) {
                let (mut blocks, key) = ([$zero(); 10], black_box($zero()));
                for _ in 0..bytes.div_ceil(size_of_val(&blocks)) {
                    for _ in 0..14 {
                        for block in &mut blocks {
                            *block = $encrypt(*block, key);
                        }
                    }
                }
                black_box(blocks);
            }
            // SAFETY: called only where the CPU has what the function uses.
            move || each(|| unsafe { rounds(bytes) })
        }};
    }

    let vaes = is_x86_feature_detected!("vaes");
    [
        is_x86_feature_detected!("aes").then(rounds!("aes", _mm_setzero_si128, _mm_aesenc_si128)),
        (vaes && is_x86_feature_detected!("avx2")).then(rounds!(
            "avx2,vaes",
            _mm256_setzero_si256,
            _mm256_aesenc_epi128
        )),
        (vaes && is_x86_feature_detected!("avx512f")).then(rounds!(
            "avx512f,vaes",
            _mm512_setzero_si512,
            _mm512_aesenc_epi128
        )),
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn aes_units(_: usize) -> [Option<f64>; 3] {
    [None; 3]
}

fn request(case: &Case, guest: &mut [u8], buffer: &mut [u8]) {
    let guest = VolatileSlice::from(guest);
    if case.encrypt {
        case.cipher.encrypt(guest, black_box(buffer), 4096);
    } else {
        case.cipher.decrypt_written(VolatileSlice::from(black_box(buffer)), guest, 4096);
    }
}

fn report(cases: &[Case], request: usize) {
    println!("{:9} {:>4}  {:7} {:>7} {:>10}", "engine", "unit", "", "GB/s", "ns/4 KiB");
    for case in cases {
        let gbps = request as f64 / case.ns_per_request;
        let way = if case.encrypt { "encrypt" } else { "decrypt" };
        println!(
            "{:9} {:>4}  {way:7} {gbps:>7.2} {:>10.0}",
            case.engine.name(),
            case.unit.bytes(),
            case.ns_per_4k
        );
    }
    for fast in cases.iter().filter(|c| c.engine != Engine::Portable) {
        let same = |c: &&Case| (c.engine, c.unit, c.encrypt) == (Engine::Portable, fast.unit, fast.encrypt);
        let portable = cases.iter().find(same).expect("portable runs everywhere");
        let ratio = portable.ns_per_request / fast.ns_per_request;
        let way = if fast.encrypt { "encrypt" } else { "decrypt" };
        println!("{} / portable, {} {way}: {ratio:.2}", fast.engine, fast.unit.bytes());
    }
}
