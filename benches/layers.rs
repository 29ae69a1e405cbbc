//! What a chain of layers costs a read: 4 KiB random reads of a volume of one layer, of the same
//! data at the bottom of many, and of the same data spread over them, through a disk's queue in
//! this process, without a VMM.
//!
//! At the bottom it lies in one file as with one layer: that is what the chain itself costs. Spread over many
//! files it is in many more extents, which is what the file system makes of it.
//!
//! They take turns in every round, so that a machine whose speed drifts slows all alike; what is printed
//! is the best round of each. Run it on an otherwise idle machine, once in a folder on a disk and once
//! on a memory file system.

use sealblk::backing::file::Place;
use sealblk::crypt::xts::{Engine, new_cipher};
use sealblk::crypt::{Dek, SectorSize};
use sealblk::disk::{Cipher, Disk, DiskQueue, Event, GuestData};
use sealblk::image::lock::Access;
use sealblk::reactor::Wait;
use sealblk::virtio::{Segment, Shape};
use sealblk::volume::layers::{Layer, chain};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const USAGE: &str = "\
What a chain of layers costs a 4 KiB random read, in ns and CPU ns, one thread.

usage: cargo bench --bench layers [-- [--folder PATH] [--layers N] [--size MIB] [--depth N] [--rounds N]]

  --folder PATH  where the layers are made (default: the folder for temporary files)
  --layers N     layers of the chain, 2 to 127 (default 32)
  --size MIB     size of the volume (default 256)
  --depth N      reads in flight (default 32)
  --rounds N     rounds (default 20)";

const BLOCK: u64 = 4096;
const READS: u64 = 20_000;

struct Options {
    folder: PathBuf,
    layers: u64,
    size: u64,
    depth: u64,
    rounds: u64,
}

/// One chain and the best that it has shown: time and CPU time a read.
struct Case {
    name: String,
    queue: DiskQueue,
    best: (Duration, Duration),
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(wrong) => {
            eprintln!("{wrong} is not understood\n\n{USAGE}");
            std::process::exit(2);
        }
    };
    let folder = tempfile::tempdir_in(&options.folder)?;
    let wanted = [(1, Spread::Lowest), (options.layers, Spread::Lowest), (options.layers, Spread::All)];
    let cases = wanted.map(|(layers, spread)| case(folder.path(), layers, spread, &options));
    let mut cases = cases.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (options.depth * BLOCK) as usize)])?;
    let mut random = 1;
    for round in 0..=options.rounds {
        for case in &mut cases {
            let took = measure(&mut case.queue, &mem, &options, &mut random)?;
            // The first round warms up.
            if round > 0 {
                case.best = (case.best.0.min(took.0), case.best.1.min(took.1));
            }
        }
    }
    let ns = |time: Duration| time.as_nanos() as f64 / READS as f64;
    let percent = |a: Duration, b: Duration| 100.0 * (ns(b) / ns(a) - 1.0);
    let one = cases[0].best;
    for Case { name, best, .. } in &cases {
        println!("{name:22} {:7.0} ns a read  {:7.0} ns of CPU", ns(best.0), ns(best.1));
    }
    for Case { name, best, .. } in &cases[1..] {
        let (time, cpu) = (percent(one.0, best.0), percent(one.1, best.1));
        println!("{name} cost {time:+.1} % time, {cpu:+.1} % CPU");
    }
    Ok(())
}

/// In which layers the data lies.
#[derive(Clone, Copy, PartialEq)]
enum Spread {
    Lowest,
    All,
}

/// A volume full of data, each block of which lies in one of the layers.
fn case(
    folder: &Path,
    layers: u64,
    spread: Spread,
    options: &Options,
) -> Result<Case, Box<dyn std::error::Error>> {
    let cipher: Cipher = Some(Arc::from(new_cipher(
        Engine::Auto,
        &Dek::from_bytes(&std::array::from_fn::<u8, 64, _>(|i| i as u8))?,
        SectorSize::B512,
    )?));
    let name = format!("{layers} layers, {}", if spread == Spread::Lowest { "lowest" } else { "spread" });
    // Runs of blocks, as guests write them, in no order.
    let layer_of = |block: u64| match spread {
        Spread::Lowest => layers - 1,
        Spread::All => (block / 16).wrapping_mul(0x9e37_79b9) % layers,
    };
    let mut opened = Vec::new();
    let noise: Vec<u8> = (0..BLOCK).map(|i| (i * 7 + i / 256) as u8 | 1).collect();
    for layer in 0..layers {
        let path = folder.join(format!("{name}, {layer}.img"));
        let file = File::create_new(&path)?;
        file.set_len(options.size)?;
        for block in (0..options.size / BLOCK).filter(|&block| layer_of(block) == layer) {
            file.write_all_at(&noise, block * BLOCK)?;
        }
        file.sync_all()?;
        let access = if layer == 0 { Access::ReadWrite } else { Access::Read };
        opened.push(Layer::open(&Place::whole(&path), access, 512, cipher.clone(), None)?);
    }
    let shape = Shape { sectors: options.size / 512, block_size: 512, read_only: false };
    let disk = Disk::layered(shape, "bench", chain(&opened))?;
    if let Some(map) = disk.map() {
        map.wait(Duration::MAX);
    }
    let queue = Arc::new(disk).open_queue(options.depth as u16)?;
    Ok(Case { name, queue, best: (Duration::MAX, Duration::MAX) })
}

/// Random reads, so many in flight; returns the time and the CPU time that all took.
fn measure(
    queue: &mut DiskQueue,
    mem: &GuestMemoryMmap<()>,
    options: &Options,
    random: &mut u64,
) -> io::Result<(Duration, Duration)> {
    let segments: Vec<_> = (0..options.depth)
        .map(|slot| [Segment { addr: GuestAddress(slot * BLOCK), len: BLOCK as u32 }])
        .collect();
    let mut sectors = vec![0; options.depth as usize];
    let mut free: Vec<u64> = (0..options.depth).collect();
    let (mut begun, mut done) = (0, 0);
    let (time, cpu) = (Instant::now(), cpu_time()?);
    while done < READS {
        while let Some(slot) = free.pop_if(|_| begun < READS) {
            *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let sector = (*random >> 33) % (options.size / BLOCK) * (BLOCK / 512);
            begun += 1;
            let guest = GuestData { mem, segments: &segments[slot as usize], skip: 0 };
            if queue.read_now(sector, BLOCK, guest)? {
                done += 1;
                free.push(slot);
                continue;
            }
            let buffer = queue.alloc(sector, BLOCK as usize).ok_or(io::ErrorKind::WouldBlock)?;
            sectors[slot as usize] = sector;
            queue.read(slot, sector, buffer);
        }
        if done < READS {
            queue.wait(Wait::Event)?;
        }
        while let Some(event) = queue.next_event() {
            let Event::Done { tag, buffer: Some(buffer), result } = event else { continue };
            result?;
            let guest = GuestData { mem, segments: &segments[tag as usize], skip: 0 };
            if queue.deliver(tag, sectors[tag as usize], buffer, guest)? {
                done += 1;
                free.push(tag);
            }
        }
    }
    Ok((time.elapsed(), cpu_time()? - cpu))
}

fn cpu_time() -> io::Result<Duration> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD)?;
    let time = |t: nix::sys::time::TimeVal| {
        Duration::from_secs(t.tv_sec() as u64) + Duration::from_micros(t.tv_usec() as u64)
    };
    Ok(time(usage.user_time()) + time(usage.system_time()))
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options =
        Options { folder: std::env::temp_dir(), layers: 32, size: 256 << 20, depth: 32, rounds: 20 };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| arg.clone());
        let number = |text: String, range: std::ops::RangeInclusive<u64>| {
            text.parse().ok().filter(|n| range.contains(n)).ok_or(format!("{arg} {text}"))
        };
        match arg.as_str() {
            "--folder" => options.folder = value()?.into(),
            "--layers" => options.layers = number(value()?, 2..=127)?,
            "--size" => options.size = number(value()?, 1..=1 << 20)? << 20,
            "--depth" => options.depth = number(value()?, 1..=256)?,
            "--rounds" => options.rounds = number(value()?, 1..=10_000)?,
            // What cargo adds.
            "--bench" => {}
            _ => return Err(arg),
        }
    }
    Ok(options)
}
