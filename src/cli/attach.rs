//! `sealblk attach`, `sealblk detach`, and the hidden commands of their helpers.

use crate::backing::coming;
use crate::base::plural::counted;
use crate::base::space::Reserve;
use crate::base::{Error, Kind, Result};
use crate::catalog::attach_settings::{self, AttachSettings, MAX_QUEUES};
use crate::cli::{Env, output};
use crate::crypt::xts::Engine;
use crate::helper::grants::keeper;
use crate::helper::rbd;
use crate::helper::unwrap;
use crate::host::socket::SocketAccess;
use crate::host::{Endpoint, NBD_RECONNECT, Options, control};
use crate::ops::modify;
use crate::sandbox::{self, Identity};
use crate::vhost::queue::qos::Limits;
use clap::Args;
use nix::sys::stat::Mode;
use nix::unistd::Gid;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// Arguments of `attach`, named as vhost-user back-ends name them.
#[derive(Args)]
#[command(after_help = "\
Example:
  sealblk attach db --socket-path /run/db.sock
  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \\
    -chardev socket,id=db,path=/run/db.sock -device vhost-user-blk-pci,chardev=db …
  cloud-hypervisor --cpus boot=2 --memory size=1G,shared=on \\
    --disk vhost_user=on,socket=/run/db.sock,num_queues=2 …

A VMM that asks for more queues than --queues offers refuses the disk: QEMU's num-queues (where nothing is
said, the guest's CPUs), cloud-hypervisor's num_queues, libvirt's queues. README.md has an example for each,
and for Firecracker.")]
pub struct AttachArgs {
    /// The volume: its id, a unique beginning of it, or its name.
    #[arg(required_unless_present = "print_capabilities")]
    volume: Option<String>,

    /// Listen for VMMs on a socket at this path. Where systemd passes the socket of that path (a .socket
    /// unit), that one is used, and stays when the volume is detached.
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"], conflicts_with = "fd")]
    socket_path: Option<PathBuf>,

    /// Use this inherited socket, listening or connected to a VMM.
    #[arg(long, value_name = "N")]
    fd: Option<i32>,

    /// Let this group connect to the socket, the VMM's [default: the one of --user, or this process's].
    #[arg(long, value_name = "NAME", conflicts_with = "fd", value_parser = group)]
    socket_group: Option<Gid>,

    /// The socket's permissions, in octal: who has the right to write may connect [default: 0660 with
    /// --socket-group, else what the umask leaves].
    #[arg(long, value_name = "MODE", conflicts_with = "fd", value_parser = socket_mode)]
    socket_mode: Option<Mode>,

    /// Queues that the guest may use, each served by a thread while in use; no fewer than the VMM asks for
    /// [default: what is kept with the volume, else the host's CPUs].
    #[arg(long, value_name = "N", value_parser = queues())]
    queues: Option<u16>,

    /// The most entries that a queue may have: a power of two.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = queue_size)]
    queue_size: u16,

    /// Refuse every write.
    #[arg(long)]
    read_only: bool,

    /// The disk's serial as the guest sees it, at most 20 bytes [default: what is kept with the volume, else
    /// the volume's id as EBS writes it].
    #[arg(long, value_name = "S", value_parser = serial)]
    serial: Option<String>,

    /// The XTS engine: auto, vaes512, vaes256, aesni, armv8 or portable.
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = engine)]
    xts_engine: Engine,

    /// How many microseconds a queue's thread may look for work before it sleeps; 0: none. It adapts: where
    /// that finds nothing it sleeps at once, and an idle volume costs nothing.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    poll_us: u64,

    /// Bind the queues' threads to these CPUs, one after the other: 2,3 or 4-7.
    #[arg(long, value_name = "LIST", value_parser = cpus)]
    cpus: Option<Cpus>,

    /// Take the volume over from the process that has it attached, once its VMM has stopped: the destination
    /// of a live migration, whose VMM waits for it ("-incoming" in QEMU) and connects here.
    #[arg(long)]
    incoming: bool,

    #[command(flatten)]
    limits: LimitArgs,

    /// Bytes a second, like 100MiB, at which a volume that is being re-keyed, flattened or encrypted has what
    /// its lower layers hold copied up; 0: no limit.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = crate::base::size::parse)]
    hydrate_rate: u64,

    /// How much of the store's file system that leaves free, like 2GiB; below that it waits [default: the
    /// settings' space-reserve, else a 20th of the file system, 4 GiB at most].
    #[arg(long, value_name = "SIZE", value_parser = crate::base::size::parse)]
    space_reserve: Option<u64>,

    /// Answer requests in the order they came, so that a crash loses none in flight where the VMM does
    /// without in-flight tracking (QEMU and cloud-hypervisor use it).
    #[arg(long)]
    in_order: bool,

    /// Take an RBD image from a host that still gives signs of life: Ceph does nothing for that one any more,
    /// and its guest's requests fail.
    #[arg(long, conflicts_with = "incoming")]
    break_lock: bool,

    /// How many seconds requests wait for an NBD server that is gone, or for the process that serves an RBD
    /// image, before they fail; 0: not at all.
    #[arg(long, value_name = "SECONDS", default_value_t = NBD_RECONNECT.as_secs(), value_parser = clap::value_parser!(u64).range(0..=86_400))]
    nbd_reconnect: u64,
    /// How long reads wait for what is still to come from the place of a snapshot that was pulled with
    /// --lazy; then they fail, and those that follow wait anew.
    #[arg(long, value_name = "SECONDS", default_value_t = coming::PATIENCE.as_secs(), value_parser = clap::value_parser!(u64).range(0..=86_400))]
    source_patience: u64,

    /// Become this user once everything is open: the volume's files must be his, the root key need not. The
    /// socket goes to the group [default: the user's own], or to --socket-group.
    #[arg(long, value_name = "NAME[:GROUP]")]
    user: Option<String>,

    /// Confine the process once it is ready: on, log (forbidden system calls are done, and
    /// reported by the kernel) or off.
    #[arg(long, value_name = "MODE", default_value = "on", value_parser = sandbox_mode)]
    sandbox: sandbox::Mode,

    /// Print what this back-end can do, as QEMU's vhost-user conventions have it, and exit.
    #[arg(long)]
    print_capabilities: bool,
}

/// Limits on a volume's requests, for all its queues together. What is not said is kept with the volume
/// ("sealblk volume modify"), or there is no limit.
#[derive(Args)]
pub(super) struct LimitArgs {
    /// Requests a second; 0: no limit.
    #[arg(long, value_name = "N")]
    iops: Option<u64>,

    /// Bytes a second, like 100MiB; 0: no limit.
    #[arg(long, value_name = "SIZE", value_parser = crate::base::size::parse)]
    throughput: Option<u64>,

    /// How many seconds' worth of the limits a volume saves up while it is idle [default: 1].
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    burst: Option<Duration>,
}

impl AttachArgs {
    /// Whether this is there for a store in a pool.
    pub(super) fn is_for_pools(&self) -> bool {
        !self.incoming && self.user.is_none()
    }
}

impl LimitArgs {
    /// The limits that are said, and nothing else.
    fn limits(&self) -> Limits {
        self.limits_over(&AttachSettings::default())
    }

    /// The limits that are said, and of what is not said those that are kept.
    fn limits_over(&self, kept: &AttachSettings) -> Limits {
        let mut settings = kept.clone();
        self.change(&mut settings);
        modify::limits(&settings)
    }

    /// Notes what is said, to be kept.
    pub(super) fn change(&self, kept: &mut AttachSettings) {
        kept.iops = self.iops.or(kept.iops);
        kept.throughput = self.throughput.or(kept.throughput);
        let milliseconds = |burst: Duration| u64::try_from(burst.as_millis()).unwrap_or(u64::MAX);
        kept.burst_ms = self.burst.map(milliseconds).or(kept.burst_ms);
    }

    pub(super) fn is_any(&self) -> bool {
        self.iops.is_some() || self.throughput.is_some() || self.burst.is_some()
    }
}

/// Arguments of `throttle`.
#[derive(Args)]
#[command(after_help = "\
Example:
  sealblk throttle db --iops 3000 --throughput 125MiB
  sealblk throttle db                                   lifts all limits of the guest's
  sealblk throttle db --hydrate-rate 200MiB             changes nothing else

It lasts until the volume is detached. \"sealblk volume modify\" keeps limits with the volume, for this attach and
the next ones.")]
pub struct ThrottleArgs {
    /// The volume: its id, a unique beginning of it, or its name.
    volume: String,

    #[command(flatten)]
    limits: LimitArgs,

    /// Bytes a second at which what lower layers hold is copied up; 0: no limit [default: as it is].
    #[arg(long, value_name = "SIZE", value_parser = crate::base::size::parse)]
    hydrate_rate: Option<u64>,

    /// How much of the file system that leaves free [default: as it is].
    #[arg(long, value_name = "SIZE", value_parser = crate::base::size::parse)]
    space_reserve: Option<u64>,
}

/// Arguments of `detach`.
#[derive(Args)]
#[command(after_help = "Example:\n  sealblk detach db")]
pub struct DetachArgs {
    /// The volume: its id, a unique beginning of it, or its name.
    volume: String,
}

/// Attaches a volume and serves it in the foreground.
pub fn attach(env: &Env, args: &AttachArgs) -> Result<()> {
    if args.print_capabilities {
        return output::print_json(&json!({"type": "block", "features": ["read-only"]}));
    }
    let missing = || Error::new(Kind::Usage, "give a volume and --socket-path PATH or --fd N");
    let volume = args.volume.as_deref().ok_or_else(missing)?;
    let endpoint = match (&args.socket_path, args.fd) {
        (Some(path), _) => Endpoint::Path(path.clone()),
        (None, Some(fd)) => Endpoint::Fd(fd),
        (None, None) => return Err(missing()),
    };
    let settings = env.settings()?;
    let catalog = env.catalog();
    let kept = catalog.attach_settings(catalog.resolve(volume)?)?;
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get().min(64) as u16);
    let options = Options {
        endpoint,
        access: SocketAccess { group: args.socket_group, mode: args.socket_mode },
        queues: args.queues.or(kept.queues).unwrap_or(cpus),
        queue_size: args.queue_size,
        read_only: args.read_only,
        serial: args.serial.clone().or_else(|| kept.serial.clone()),
        engine: args.xts_engine,
        poll: Duration::from_micros(args.poll_us),
        in_order: args.in_order,
        limits: args.limits.limits_over(&kept),
        hydrate_rate: args.hydrate_rate,
        space_reserve: args.space_reserve.map_or(settings.space_reserve, Reserve::of),
        cpus: args.cpus.clone().map_or(Vec::new(), |cpus| cpus.0),
        incoming: args.incoming,
        sandbox: args.sandbox,
        user: args.user.as_deref().map(Identity::parse).transpose()?,
        nbd_reconnect: Duration::from_secs(args.nbd_reconnect),
        source_patience: Duration::from_secs(args.source_patience),
    };
    rbd::set_break_lock(args.break_lock);
    crate::host::attach(&catalog, &settings, volume, &options, env.hardened, |attached| {
        // It was for taking the image, and not for keeping it.
        rbd::set_break_lock(false);
        if env.json {
            return output::print_json(&json!({
                "id": attached.volume,
                "state": if args.incoming { "incoming" } else { "attached" },
                "socket": args.socket_path.as_ref().map(|path| path.display().to_string()),
                "access": attached.how,
                "queues": options.queues,
            }));
        }
        let at = args.socket_path.as_ref().map_or("its socket".into(), |p| p.display().to_string());
        let is = if args.incoming { "is awaited" } else { "is attached" };
        let queues = counted(options.queues, "queue", "queues");
        let said = format!("{} {is} and listens on {at} ({}; {queues})\n", attached.volume, attached.how);
        output::print(&said).map(drop)
    })
}

/// Ends the attachment of a volume and waits until it is over.
pub fn detach(env: &Env, args: &DetachArgs) -> Result<()> {
    let catalog = env.catalog();
    let volume = catalog.resolve(&args.volume)?;
    control::detach(&catalog, volume)?;
    // What the host process took out of the volume's chain, and could not remove.
    if let Err(e) = catalog.clear_left(volume) {
        log::warn!("{e}; \"sealblk gc\" tries again");
    }
    if env.json {
        return output::print_json(&json!({"id": volume, "state": "detached"}));
    }
    output::print(&format!("{volume} is detached\n")).map(drop)
}

/// Sets the limits of an attached volume.
pub fn throttle(env: &Env, args: &ThrottleArgs) -> Result<()> {
    let catalog = env.catalog();
    let volume = catalog.resolve(&args.volume)?;
    // Without a word about anything, the guest's limits are lifted.
    let is_of_copy = args.hydrate_rate.is_some() || args.space_reserve.is_some();
    let limits = (args.limits.is_any() || !is_of_copy).then(|| args.limits.limits());
    if let Some(limits) = limits {
        control::throttle(&catalog, volume, limits)?;
    }
    if let Some(rate) = args.hydrate_rate {
        control::set_hydrate_rate(&catalog, volume, rate)?;
    }
    if let Some(reserve) = args.space_reserve {
        control::set_space_reserve(&catalog, volume, reserve)?;
    }
    if env.json {
        let mut value = json!({"id": volume});
        if let Some(limits) = limits {
            value["iops"] = json!(limits.iops);
            value["throughput"] = json!(limits.throughput);
            value["burst_seconds"] = json!(limits.burst.as_secs_f64());
        }
        if let Some(rate) = args.hydrate_rate {
            value["hydrate_rate"] = json!(rate);
        }
        if let Some(reserve) = args.space_reserve {
            value["space_reserve"] = json!(reserve);
        }
        return output::print_json(&value);
    }
    let amount = |n: u64, unit: &str| if n == 0 { "unlimited".into() } else { format!("{n} {unit}") };
    let mut said = Vec::new();
    if let Some(limits) = limits {
        said.extend([amount(limits.iops, "requests/s"), amount(limits.throughput, "bytes/s")]);
    }
    said.extend(args.hydrate_rate.map(|rate| format!("copying up {}", amount(rate, "bytes/s"))));
    said.extend(args.space_reserve.map(|bytes| format!("leaving {bytes} bytes free")));
    output::print(&format!("{volume}: {}\n", said.join(", "))).map(drop)
}

/// The unwrap helper's whole life.
pub fn unwrap(env: &Env) -> Result<()> {
    unwrap::help(env.hardened, &env.root)
}

/// The whole life of an attach's grants' keeper.
pub fn keep_grants(env: &Env) -> Result<()> {
    keeper::keep(&env.root)
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (4..=1024).contains(&size) => Ok(size),
        _ => Err("a power of two from 4 to 1024".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "a number of seconds".to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

/// A list of CPUs.
#[derive(Clone, Debug)]
struct Cpus(Vec<usize>);

fn cpus(text: &str) -> Result<Cpus, String> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<usize>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last && last < 1024).then_some(first..=last)
    };
    let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
    let ranges = ranges.ok_or("CPU numbers below 1024, like 2,3 or 4-7")?;
    Ok(Cpus(ranges.into_iter().flatten().collect()))
}

pub(super) fn group(text: &str) -> Result<Gid, String> {
    sandbox::group_called(text).map_err(|e| e.to_string())
}

pub(super) fn socket_mode(text: &str) -> Result<Mode, String> {
    let bits = u32::from_str_radix(text, 8).ok().filter(|bits| *bits <= 0o777);
    bits.map(Mode::from_bits_truncate).ok_or_else(|| "permissions in octal, like 0660".into())
}

pub(super) fn serial(text: &str) -> Result<String, String> {
    attach_settings::check_serial(text).map(|()| text.into())
}

pub(super) fn queues() -> impl clap::builder::TypedValueParser<Value = u16> {
    clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES))
}

fn sandbox_mode(text: &str) -> Result<sandbox::Mode, String> {
    text.parse().map_err(|e: Error| e.to_string())
}

fn engine(text: &str) -> Result<Engine, String> {
    text.parse().map_err(|e: Error| e.to_string())
}
