//! Attaching a volume: the one process that holds its data key, from the lock to the wipe.
//!
//! In order: the volume's lock, its metadata, its layers and QEMU's locks on them, a grant by way of the
//! keeper ([`grants`]), the data key by way of the [`unwrap`] helper, the seal, the sockets, the [`sandbox`],
//! the threads. Nothing listens before the helper is gone and the metadata has proved right; nothing that a
//! VMM says is read before the process is confined. The way back is the drop order of the same things. With
//! [`Options::incoming`] the lock, the layers and what serves them come last: when another process has let go
//! of the volume ([`handover`]).

pub mod changes;
pub mod control;
mod descriptors;
mod file_system;
mod files;
pub mod handover;
mod keyring;
mod keys_held;
pub(crate) mod notify;
mod opener;
mod service;
pub mod socket;
mod start;
mod state;
pub mod stats;
pub mod status;
pub mod upgrade;

use crate::backing::coming;
use crate::backing::nbd;
use crate::base::hardened::Hardened;
use crate::base::space::Reserve;
use crate::base::{Context, Error, Result, log_fields};
use crate::catalog::{Catalog, VolumeId};
use crate::config::Settings;
use crate::crypt::xts::Engine;
use crate::events::Event;
use crate::helper::fetch::Fetcher;
use crate::helper::{dial, rbd};
use crate::kms::embedded::root_key::passphrase;
use crate::reactor::ring;
use crate::sandbox::{self, Identity, Mode};
use crate::vhost::boundary::Next;
use crate::vhost::listener::{self, Socket, Stop};
use crate::vhost::queue::qos::Limits;
use crate::volume::open::cannot_serve;
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::Uid;
use notify::Notifier;
use service::{Leaves, Service};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use socket::{Passed, SocketAccess};
use start::{Sockets, Taken};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use upgrade::Taking;

/// Where VMMs connect.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// A socket at this path: to be made, unless a service manager has made it, and passes it (`LISTEN_FDS`,
    /// sd_listen_fds(3)).
    Path(PathBuf),
    /// A listening or connected socket that this process was started with.
    Fd(RawFd),
}

/// How long requests wait for an NBD server that is gone, if nobody says.
pub const NBD_RECONNECT: Duration = Duration::from_secs(30);

/// How a volume is attached.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where VMMs connect.
    pub endpoint: Endpoint,
    /// Who may connect to a socket that is made for that.
    pub access: SocketAccess,
    /// Queues that the guest may use, each with a thread, 1..=64.
    pub queues: u16,
    /// Most entries of a ring: a power of two, 4..=1024.
    pub queue_size: u16,
    /// Refuse writes.
    pub read_only: bool,
    /// What the guest sees as the disk's serial; by default EBS's way to write the volume's id.
    pub serial: Option<String>,
    /// The XTS engine.
    pub engine: Engine,
    /// How long a queue's thread may look for work before it sleeps; zero: not at all.
    pub poll: Duration,
    /// Answer requests in the order in which they were taken.
    pub in_order: bool,
    /// Limits on requests and bytes a second.
    pub limits: Limits,
    /// Bytes a second at which what lower layers hold is copied up where that is to be done; 0: no limit.
    pub hydrate_rate: u64,
    /// How much of the file system what is copied up leaves free.
    pub space_reserve: Reserve,
    /// CPUs to bind the queues' threads to, one after the other and from the beginning again; none: unbound.
    pub cpus: Vec<usize>,
    /// How strictly the process is confined once it is ready.
    pub sandbox: Mode,
    /// The user to become then; none: the one that it was started as.
    pub user: Option<Identity>,
    /// Take the volume over from the process that has it, when a VMM starts its rings here.
    pub incoming: bool,
    /// How long requests wait for an NBD server that is gone.
    pub nbd_reconnect: Duration,
    /// How long reads wait for what is still to come from the place of a snapshot that was pulled lazily.
    pub source_patience: Duration,
}

/// What whoever started the attach is told once VMMs can connect.
pub struct Attached<'a> {
    /// The volume.
    pub volume: VolumeId,
    /// Whether it is encrypted, how, and how the layer is reached.
    pub how: &'a str,
}

/// Attaches the volume `reference` and serves it until it is detached. `ready` is called
/// when VMMs can connect.
pub fn attach(
    catalog: &Catalog,
    settings: &Settings,
    reference: &str,
    options: &Options,
    hardened: Hardened,
    ready: impl FnOnce(&Attached<'_>) -> Result<()>,
) -> Result<()> {
    // Before anything opens a descriptor that could have the same number.
    let passed = match &options.endpoint {
        Endpoint::Fd(fd) => Some(Passed { socket: socket::inherited(*fd)?, is_kept: false }),
        Endpoint::Path(path) => socket::of_service_manager(path)?,
    };
    // The helpers' affair, not this process's.
    let passphrase = passphrase::inherited_descriptors()?;
    sandbox::report_lost_memory()?;
    let volume = catalog.resolve(reference)?;
    log_fields::is_of_volume(volume);
    let attempt = || format!("attach {volume}");
    let memory_regions = descriptors::make_room(options.queues).context(attempt)?;
    file_system::check_writable(catalog.root()).context(attempt)?;
    let explained = |e| file_system::explained(e, catalog.root());
    let path = match &options.endpoint {
        Endpoint::Path(path) => Some(std::path::absolute(path)?),
        Endpoint::Fd(_) => None,
    };
    let started_by = nix::unistd::geteuid();
    let taken = Taken::take(catalog, settings, volume, options, path.as_deref(), hardened);
    let taken = taken.map_err(explained).context(attempt)?;
    drop(passphrase);
    // From here on, what proves records is out of this process's reach.
    let catalog = &catalog.without_ledger();
    let sockets = Sockets::bind(&catalog.folder(volume), options, passed, path.as_deref())
        .map_err(explained)
        .context(attempt)?;
    let path = path.as_deref();
    let manager = Notifier::connect();
    let attaching =
        Attaching { catalog, options, taken, sockets, path, memory_regions, started_by, manager, from: None };
    run(attaching, ready)
}

/// A volume that is taken, or is to be taken over, with all that was got before the process is confined.
struct Attaching<'a> {
    /// Without the ledger.
    catalog: &'a Catalog,
    options: &'a Options,
    taken: Taken,
    sockets: Sockets,
    /// Where VMMs connect, if that is a path.
    path: Option<&'a Path>,
    /// How many regions of memory a VMM may share.
    memory_regions: u16,
    /// Whose process this is before it becomes another user's.
    started_by: Uid,
    manager: Notifier,
    /// The process that serves the volume until now.
    from: Option<Taking>,
}

/// Confines the process, and serves the volume until it is detached, or another process takes over. `ready`
/// is called when VMMs can connect.
fn run(attaching: Attaching<'_>, ready: impl FnOnce(&Attached<'_>) -> Result<()>) -> Result<()> {
    let Attaching { catalog, options, mut taken, sockets, path, memory_regions, started_by, manager, from } =
        attaching;
    let volume = taken.metadata.id();
    log_fields::is_of_volume(volume);
    let attempt = || format!("attach {volume}");
    let Sockets { control, inlet, socket, name, is_kept } = sockets;
    // Where the socket is somebody else's, no name is removed.
    let named = path.filter(|_| name.is_some());
    let is_ours = name.is_some();
    let announcements = taken.lock_file.announcements();
    if let Err(e) = taken.events.keep_open() {
        log::warn!("{e}; this process will report no events");
    }
    let signals = Signals::new([SIGINT, SIGTERM]).context(attempt)?;
    // Beside the queues': for the flush at the end, and for what is done in the background and for clients.
    ring::prepare(usize::from(options.queues), 4).map_err(cannot_serve).context(attempt)?;
    nbd::set_patience(options.nbd_reconnect);
    let exports = catalog.exports(&taken.metadata, options.read_only).context(attempt)?;
    if let Some(from) = &from {
        from.inherit_images(&exports).context(attempt)?;
    }
    // Threads of theirs would not be confined.
    nbd::rest();
    rbd::start(&exports).context(attempt)?;
    tell_of_lost_images(&taken).context(attempt)?;
    let exports: Vec<_> = exports.into_iter().map(|(address, _)| address).collect();
    if exports.iter().any(|address| address.server().is_some()) {
        dial::start(catalog.root(), exports, from.as_ref().map(Taking::log)).context(attempt)?;
    }
    coming::set_patience(options.source_patience);
    let fetcher = taken.coming.take().map(|keys| {
        Fetcher::start(catalog.root(), volume, keys, from.as_ref().map(Taking::log)).context(attempt)
    });
    let fetcher = fetcher.transpose()?;
    let removable = files::socket_folder(catalog, &taken.metadata, named);
    let files = files::rules(catalog, &taken.metadata, options, removable)?;
    let name = match (name, named) {
        (Some(name), Some(path)) if removable.is_none() && options.sandbox == Mode::On => {
            log::info!(
                "{} stays when the volume is detached: the store or its keys lie below the socket's folder, \
                 in which a confined process may remove nothing. Give the socket a folder of its own",
                path.display()
            );
            name.leave();
            None
        }
        (name, _) => name,
    };
    if let Some(pooled) = catalog.root().pool() {
        let layers = taken.metadata.layers().iter().map(|layer| catalog.device_file(layer.id));
        let layers: Vec<String> =
            layers.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect();
        pooled.records.narrow(&format!("volumes/{volume}"), &layers).context(attempt)?;
    }
    let confinement = sandbox::confine(options.sandbox, options.user.as_ref(), &files).context(attempt)?;
    log::info!("the host process is confined: {confinement}");

    fetcher.map(|it| it.go_on(taken.events.clone())).transpose().context(attempt)?;
    let service = Service::start(catalog, options, taken, announcements, control.name()).context(attempt)?;
    let device = Arc::new(service.device(options, inlet, memory_regions));
    let manager = Arc::new(manager);
    let listener = socket.as_ref().and_then(Socket::listener).transpose().context(attempt)?.map(Arc::new);
    let leaves = Leaves {
        listener: listener.clone(),
        path,
        is_name_ours: name.is_some(),
        memory_regions,
        started_by,
        manager: manager.clone(),
        boundary: device.boundary.clone(),
    };
    let predecessor = service.predecessor(options, leaves).context(attempt)?;
    let control = control.serve(service.orders(options, predecessor)).context(attempt)?;
    stop_on_signals(signals, service.stop.clone()).context(attempt)?;
    let how = service.describe();
    let kept = listener.filter(|_| is_ours);
    let served = match from {
        None => {
            log::info!("{volume} is {}: {how}", if options.incoming { "awaited" } else { "attached" });
            ready(&Attached { volume, how: &how })?;
            manager.ready();
            if let Some(listener) = kept.as_ref().filter(|_| !is_kept) {
                manager.keep(listener.as_fd());
            }
            listener::serve(&device, socket, None, &service.stop).map_err(Error::from)
        }
        Some(taking) => taking
            .take(&service)
            .and_then(|inherited| Ok(listener::serve(&device, socket, inherited, &service.stop)?)),
    };
    let is_over = !matches!(served, Ok(Next::Successor)) && !service.is_anothers();
    if is_over {
        manager.stopping(is_ours);
        if let Some(listener) = &kept {
            // Nobody can connect any more, also while the manager has it still: the next
            // attach finds the place free.
            let _ = shutdown(listener.as_raw_fd(), Shutdown::Both);
        }
        drop(name);
    } else if let Some(name) = name {
        // It is the other process's, as the socket is.
        name.leave();
    }
    let (result, given_up) = service.end(device, served.map(drop).context(|| format!("serve {volume}")));
    // Who is told that the volume is detached can attach it at once: nothing of ours is in the way.
    let waiting = control.close(!given_up.has_volume());
    let had_it = given_up.release();
    log::info!("{volume} is {}", if had_it { "detached" } else { "no longer this process's" });
    waiting.tell(&result);
    result
}

/// Has an event tell of an RBD image that another host has taken.
fn tell_of_lost_images(taken: &Taken) -> Result<()> {
    let (events, volume) = (taken.events.clone(), taken.metadata.id());
    nbd::when_lost(Box::new(move |_, why| events.record(&Event::lost_image(volume, why))));
    Ok(())
}

fn stop_on_signals(mut signals: Signals, stop: Arc<Stop>) -> std::io::Result<()> {
    let wait = move || {
        for signal in &mut signals {
            log::info!("signal {signal}: detaching");
            stop.stop();
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(())
}
