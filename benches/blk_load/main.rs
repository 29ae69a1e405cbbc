//! The load generator: a vhost-user front-end that polls, for measuring any vhost-user-blk back-end the way a
//! busy guest would use it, without a guest's own costs. `ci/bench` compares back-ends with it.
//!
//! `cargo bench --bench blk_load -- --help` says what it can do.

mod histogram;
mod process;
mod report;
mod worker;

#[path = "../../tests/common/frontend/mod.rs"]
mod frontend;
#[path = "../../tests/common/patience.rs"]
#[allow(dead_code, reason = "what tests wait with, of which the load generator needs the limit alone")]
mod patience;

use clap::{Parser, ValueEnum};
use frontend::session::{F_INDIRECT, F_LOG_ALL};
use frontend::{Fault, Layout, Options, Result, Session, server};
use nix::unistd::Pid;
use process::Sleeps;
use report::{IdleReport, Report};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};
use worker::{Tally, Work};

/// Loads a vhost-user-blk back-end and reports what it did.
///
/// One thread a queue keeps a fixed number of requests in flight and looks for completions all the time
/// (it takes a whole core; use taskset(1) to choose which). Requests are indirect, as Linux makes them.
/// It fails if any request failed.
///
/// Example: blk_load --socket /run/vol.sock --rw randread --bs 4k --qd 32 --seconds 3
/// --server-pid 4711 --json
#[derive(Parser, Clone, Debug)]
#[command(name = "blk_load", version, verbatim_doc_comment)]
pub struct Args {
    /// The back-end's vhost-user socket.
    #[arg(long)]
    socket: PathBuf,
    /// Access pattern; the writing ones destroy what is on the device.
    #[arg(long, value_enum, default_value = "randread")]
    rw: Pattern,
    /// Bytes of a request: a multiple of 512; k and m mean KiB and MiB.
    #[arg(long, value_parser = bytes, default_value = "4k")]
    bs: u64,
    /// Requests in flight, on each queue.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    qd: u16,
    /// Queues.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Threads here that share the queues among them; by default one for each queue.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64), conflicts_with = "interrupts")]
    threads: Option<u16>,
    /// How long to measure, seconds.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// How long to run before measuring, seconds.
    #[arg(long, default_value_t = 0.5)]
    ramp: f64,
    /// Use only the first so many bytes of the device (k, m, g); by default all of it.
    #[arg(long, value_parser = bytes)]
    range: Option<u64>,
    /// Cut the data of a request into descriptors of at most so many bytes; by default it is in one.
    #[arg(long, value_parser = bytes)]
    segment: Option<u64>,
    /// Descriptors in the ring's own table instead of indirect ones.
    #[arg(long)]
    direct: bool,
    /// Guest memory in huge pages, of 2 MiB; an error where the kernel has none for it (see
    /// /sys/kernel/mm/transparent_hugepage/shmem_enabled).
    #[arg(long)]
    huge_pages: bool,
    /// Of how many in a hundred requests --rw randrw makes reads.
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u8).range(1..=99))]
    reads: u8,
    /// First write random data over the range, unmeasured.
    #[arg(long)]
    fill: bool,
    /// Wait for interrupts instead of polling (one core less, more latency).
    #[arg(long)]
    interrupts: bool,
    /// After the ramp stay connected, send nothing for --seconds, and report how often the back-end woke up.
    #[arg(long, requires = "server_pid")]
    idle: bool,
    /// The back-end's process: its CPU time a request and its memory are reported.
    #[arg(long, value_parser = pid)]
    server_pid: Option<Pid>,
    /// One JSON object on standard output instead of text.
    #[arg(long)]
    json: bool,
    /// Given by `cargo bench`; has no effect.
    #[arg(long, hide = true)]
    bench: bool,
}

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
const FILL_BLOCK: u64 = 128 << 10;
/// How long a back-end may stay awake after its last request before it counts as idle.
const REST: Duration = Duration::from_secs(1);

/// What is read or written where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum Pattern {
    /// Reads at random places.
    RandRead,
    /// Writes at random places.
    RandWrite,
    /// Reads and writes at random places, mixed.
    RandRw,
    /// Reads in order.
    Read,
    /// Writes in order.
    Write,
}

impl Pattern {
    fn reads(self) -> bool {
        matches!(self, Pattern::RandRead | Pattern::Read | Pattern::RandRw)
    }

    fn writes(self) -> bool {
        matches!(self, Pattern::RandWrite | Pattern::Write | Pattern::RandRw)
    }

    fn random(self) -> bool {
        matches!(self, Pattern::RandRead | Pattern::RandWrite | Pattern::RandRw)
    }
}

fn main() -> ExitCode {
    // `cargo test --all-targets` and a bare `cargo bench` start this without a back-end to load.
    if std::env::args().skip(1).all(|a| a == "--bench") {
        let _ = <Args as clap::CommandFactory>::command().print_long_help();
        return ExitCode::SUCCESS;
    }
    let args = Args::parse();
    let done = match args.server_pid.filter(|_| args.idle) {
        Some(pid) => idle(&args, pid).map(|report| (report.json(), report.to_string(), true)),
        None => run(&args).map(|report| (report.json(), report.to_string(), report.clean())),
    };
    match done {
        Ok((json, text, clean)) => {
            if args.json {
                println!("{json}");
            } else {
                println!("{text}");
            }
            // A failed request is a fault of the back-end, not a measurement.
            if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => {
            eprintln!("blk_load: {}: {e}", args.socket.display());
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<Report> {
    if args.fill {
        fill(args)?;
    }
    let mut session = open(args)?;
    let work = work(args, &session)?;
    let (tally, time, cpu_ns) = drive(&mut session, &work, args, args.seconds)?;
    let holdings = args.server_pid.map(|pid| server::holdings(pid.as_raw())).transpose()?;
    session.stop()?;
    Ok(Report::new(args, tally, time, cpu_ns, holdings))
}

/// Loads the device for the ramp, lets it come to rest and watches it doing nothing.
fn idle(args: &Args, pid: Pid) -> Result<IdleReport> {
    let mut session = open(args)?;
    let work = work(args, &session)?;
    let (tally, ..) = drive(&mut session, &work, args, args.ramp)?;
    if tally.failed > 0 {
        return Err(Fault::Protocol(format!("{} requests failed before the rest", tally.failed)));
    }
    std::thread::sleep(REST);
    let (sleeps, cpu, start) = (Sleeps::of(pid)?, process::cpu_ns(pid)?, Instant::now());
    std::thread::sleep(Duration::from_secs_f64(args.seconds));
    let (time, used) = (start.elapsed(), process::cpu_ns(pid)? - cpu);
    let wakeups = Sleeps::of(pid)?.since(&sleeps);
    let held = server::holdings(pid.as_raw())?;
    session.stop()?;
    Ok(IdleReport::new(time, wakeups, used, held))
}

/// Writes the whole range once, over a connection of its own.
fn fill(args: &Args) -> Result<()> {
    let bs = FILL_BLOCK.min(args.range.unwrap_or(FILL_BLOCK));
    let args =
        Args { rw: Pattern::Write, bs, qd: 8, queues: 1, direct: false, segment: None, ..args.clone() };
    let mut session = open(&args)?;
    let work = Work { once: true, ..work(&args, &session)? };
    let phase = AtomicU8::new(worker::RAMP);
    let tally = worker::run(&mut session.rings[..1], &work, 0, &phase)?;
    session.stop()?;
    match tally.failed {
        0 => Ok(()),
        n => Err(Fault::Protocol(format!("{n} requests of the fill failed"))),
    }
}

/// What every queue has to do on the device of this session.
fn work(args: &Args, session: &Session) -> Result<Work> {
    let device = session.config()?.capacity * 512;
    let range = args.range.unwrap_or(device).min(device) / args.bs * args.bs;
    if range == 0 {
        return Err(Fault::Protocol(format!("requests of {} bytes do not fit into the range", args.bs)));
    }
    Ok(Work {
        pattern: args.rw,
        reads: args.reads,
        bs: args.bs,
        depth: args.qd,
        queues: args.queues,
        range,
        segment: args.segment.unwrap_or(u64::MAX),
        direct: args.direct,
        interrupts: args.interrupts,
        once: false,
    })
}

/// Connects with as much memory and as long rings as the work needs.
fn open(args: &Args) -> Result<Session> {
    let depth = u64::from(args.qd);
    let descriptors = 2 + args.segment.map_or(1, |s| args.bs.div_ceil(s));
    // A slot of a mixed load has a chain for each of the two.
    let chains = depth * u64::from(1 + u8::from(args.rw == Pattern::RandRw));
    let entries = if args.direct { chains * descriptors } else { chains }.next_power_of_two().max(128);
    if entries > 1024 {
        return Err(Fault::Protocol(format!("{entries} descriptors do not fit into a ring of 1024")));
    }
    let slot = args.bs + 2 * 16 * descriptors + 4 * PAGE;
    let ram = (slot * depth + 64 * PAGE) * u64::from(args.queues) + (1 << 20);
    let features = !(F_LOG_ALL | if args.direct { F_INDIRECT } else { 0 });
    let options = Options {
        features,
        queues: usize::from(args.queues),
        queue_size: entries as u16,
        layout: Layout { huge: args.huge_pages, ..Layout::flat(ram.next_multiple_of(HUGE_PAGE)) },
        ..Options::default()
    };
    let before = process::memory_files_in_huge_pages()?;
    let session = Session::open(&args.socket, &options)?;
    if args.huge_pages && process::memory_files_in_huge_pages()? < before + ram.next_multiple_of(HUGE_PAGE) {
        let message = "the kernel gives memory files no huge pages, or has none left: see \
                       /sys/kernel/mm/transparent_hugepage/shmem_enabled, which should be \"advise\"";
        return Err(Fault::Protocol(message.into()));
    }
    Ok(session)
}

/// Runs the threads; what they did while it was measured, for how long, and the server's CPU time.
fn drive(
    session: &mut Session,
    work: &Work,
    args: &Args,
    seconds: f64,
) -> Result<(Tally, Duration, Option<u64>)> {
    let phase = AtomicU8::new(worker::RAMP);
    let each = usize::from(args.queues.div_ceil(args.threads.unwrap_or(args.queues).min(args.queues)));
    std::thread::scope(|scope| {
        let spawn = |(index, rings)| {
            scope.spawn({
                let phase = &phase;
                move || worker::run(rings, work, index * each, phase)
            })
        };
        let workers: Vec<_> = session.rings.chunks_mut(each).enumerate().map(spawn).collect();
        let measured = measure(args.ramp, seconds, args.server_pid, &phase);
        // Whatever went wrong, the workers must end.
        phase.store(worker::STOP, Ordering::SeqCst);
        let mut tally = Tally::default();
        for worker in workers {
            tally.add(&worker.join().expect("a worker does not panic")?);
        }
        measured.map(|(time, cpu)| (tally, time, cpu))
    })
}

fn measure(ramp: f64, seconds: f64, pid: Option<Pid>, phase: &AtomicU8) -> Result<(Duration, Option<u64>)> {
    let cpu = || pid.map(process::cpu_ns).transpose();
    std::thread::sleep(Duration::from_secs_f64(ramp));
    let (before, start) = (cpu()?, Instant::now());
    phase.store(worker::MEASURE, Ordering::SeqCst);
    std::thread::sleep(Duration::from_secs_f64(seconds));
    phase.store(worker::STOP, Ordering::SeqCst);
    let time = start.elapsed();
    let spent = cpu()?.zip(before).map(|(after, before)| after.saturating_sub(before));
    Ok((time, spent))
}

fn pid(text: &str) -> std::result::Result<Pid, String> {
    let number = text.parse().ok().filter(|n| *n > 0);
    number.map(Pid::from_raw).ok_or_else(|| format!("{text:?} is not a process id"))
}

/// A number of bytes with k, m or g behind it.
fn bytes(text: &str) -> std::result::Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let (digits, shift) = match lower.strip_suffix(['k', 'm', 'g']) {
        Some(digits) => (
            digits,
            match lower.as_bytes()[lower.len() - 1] {
                b'k' => 10,
                b'm' => 20,
                _ => 30,
            },
        ),
        None => (lower.as_str(), 0),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is not a number of bytes; try 4096 or 4k"))?;
    let bytes = number.checked_mul(1 << shift).filter(|b| *b > 0 && b % 512 == 0);
    bytes.ok_or_else(|| format!("{text:?} is not a positive multiple of 512"))
}
