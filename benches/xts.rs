//! Speed of the cipher engines: GB/s, and ns for a 4 KiB request, on one core.
//!
//! Engines and data units take turns in every round, so that a machine whose speed drifts slows all alike;
//! what is printed is the best round of each. Run it on an otherwise idle machine.

use sealblk::crypt::xts::{Engine, SectorCipher, new_cipher};
use sealblk::crypt::{Dek, SectorSize};
use std::hint::black_box;
use std::time::{Duration, Instant};
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
    for _ in 0..options.rounds {
        for case in &mut cases {
            case.ns_per_request = case.ns_per_request.min(ns_each(case, guest.bytes(), buffer.bytes()));
            let (guest, buffer) = (&mut guest.bytes()[..4096], &mut buffer.bytes()[..4096]);
            case.ns_per_4k = case.ns_per_4k.min(ns_each(case, guest, buffer));
        }
    }
    report(&cases, options.request);
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

/// Time of one request, averaged over about 5 ms.
fn ns_each(case: &Case, guest: &mut [u8], buffer: &mut [u8]) -> f64 {
    let (begin, mut requests) = (Instant::now(), 0u32);
    while begin.elapsed() < Duration::from_millis(5) {
        for _ in 0..16 {
            request(case, guest, buffer);
        }
        requests += 16;
    }
    begin.elapsed().as_nanos() as f64 / f64::from(requests)
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
