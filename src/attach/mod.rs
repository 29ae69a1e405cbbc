//! Attaching a volume: the one process that holds its data key, from the lock to the wipe.
//!
//! In order: the volume's lock, its metadata, its layers and QEMU's locks on them, a grant by way of the keeper
//! ([`grants`]), the data key by way of the [`unwrap`] helper, the seal, the sockets, the [`sandbox`], the threads.
//! Nothing listens before the helper is gone and the metadata has proved right; nothing that a VMM says is read before
//! the process is confined. The way back is the drop order of the same things. With [`Options::incoming`] the lock, the
//! layers and what serves them come last: when another process has let go of the volume ([`handover`]).

pub mod control;
pub mod grants;
pub mod handover;
mod helper;
pub mod hydration;
mod keyring;
pub(crate) mod notify;
mod opener;
mod reach;
mod record;
mod rekey;
mod resize;
pub mod rewrap;
pub mod sandbox;
mod snapshot;
pub mod socket;
mod trail;
pub mod unwrap;

use crate::config::Settings;
use crate::crypt::xts::Engine;
use crate::error::{Context, Result};
use crate::kms::embedded::root_key::passphrase;
use crate::kms::patience::Patience;
use crate::observe::events::{Event, EventLog};
use crate::store::file::ring;
use crate::vhost::backend::Device;
use crate::vhost::gate::Channel;
use crate::vhost::qos::{Limits, Qos};
use crate::vhost::server::{self, Socket, Stop};
use crate::vhost::session::Inlet;
use crate::vhost::worker::Tuning;
use crate::virtio::SECTOR_SIZE;
use crate::volume::lock::{Holder, LockFile, Purpose, Turn, VolumeLock};
use crate::volume::metadata::Metadata;
use crate::volume::{Catalog, VolumeId};
use control::{Control, Orders, Status};
use grants::Keeper;
use handover::{Handover, Parts};
use hydration::Hydrator;
use keyring::Deks;
use notify::Notifier;
use opener::{Opener, cannot_serve};
use record::Record;
use sandbox::{Identity, Mode};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use trail::KeysHeld;
use unwrap::Refusal;

/// Most data segments in a request: what a ring of 128 entries, the smallest default of any VMM, can carry.
const SEG_MAX: u32 = 126;

/// Where VMMs connect.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// A socket to be made at this path.
    Path(PathBuf),
    /// A listening or connected socket that this process was started with.
    Fd(RawFd),
}

/// How a volume is attached.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where VMMs connect.
    pub endpoint: Endpoint,
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
    /// CPUs to bind the queues' threads to, one after the other and from the beginning again; none: unbound.
    pub cpus: Vec<usize>,
    /// How strictly the process is confined once it is ready.
    pub sandbox: Mode,
    /// The user to become then; none: the one that it was started as.
    pub user: Option<Identity>,
    /// Take the volume over from the process that has it, when a VMM starts its rings here.
    pub incoming: bool,
}

/// What whoever started the attach is told once VMMs can connect.
pub struct Attached<'a> {
    /// The volume.
    pub volume: VolumeId,
    /// Whether it is encrypted, how, and how the layer is reached.
    pub how: &'a str,
}

/// Attaches the volume `reference` and serves it until it is detached. `ready` is called when VMMs can connect.
pub fn attach(
    catalog: &Catalog,
    settings: &Settings,
    reference: &str,
    options: &Options,
    ready: impl FnOnce(&Attached<'_>) -> Result<()>,
) -> Result<()> {
    // Before anything opens a descriptor that could have the same number.
    let inherited = match &options.endpoint {
        Endpoint::Fd(fd) => Some(socket::inherited(*fd)?),
        Endpoint::Path(_) => None,
    };
    // The helpers' affair, not this process's.
    let passphrase = passphrase::inherited_descriptor()?;
    sandbox::harden()?;
    sandbox::report_lost_memory()?;
    let volume = catalog.resolve(reference)?;
    let attempt = || format!("attach {volume}");
    let path = match &options.endpoint {
        Endpoint::Path(path) => Some(std::path::absolute(path)?),
        Endpoint::Fd(_) => None,
    };
    let holder = Holder::this_process(Purpose::Attach, path.as_deref())?;
    let folder = catalog.folder(volume);
    let lock_file = LockFile::open(&folder, volume).map_err(|e| e.context(attempt()))?;
    let place = Place::take(&lock_file, &holder, options.incoming).map_err(|e| e.context(attempt()))?;
    let mut events = EventLog::new(catalog.root(), settings);
    let mut granted = None;
    let get_keys = |metadata: &Metadata| {
        let (deks, keeper) = unwrap_all(catalog, metadata, &events, settings, !options.incoming)?;
        granted = Some((metadata.clone(), keeper));
        Ok(deks)
    };
    let opened = match &place {
        Place::Holder(lock) => Opener::with_layers(catalog, lock, options, get_keys),
        Place::Next(_) => Opener::without(catalog, volume, options, get_keys),
    };
    let (opener, opened) = opened.map_err(|e| e.context(attempt()))?;
    let Some((metadata, keeper)) = granted else { unreachable!("nothing is opened without its keys") };
    // To be dropped after the data keys.
    let held = KeysHeld::begin(catalog.root(), &metadata).map_err(|e| e.context(attempt()))?;
    let held = Arc::new(Mutex::new(held));
    drop(passphrase);

    let control = Control::bind(&folder, options.incoming).map_err(|e| e.context(attempt()))?;
    let inlet = if options.incoming { "inner-incoming.sock" } else { "inner.sock" };
    let inlet = Inlet::new(&folder, inlet).context(|| "make a socket in the volume's folder");
    let inlet = inlet.map_err(|e| e.context(attempt()))?;
    let (socket, name) = match (inherited, &path) {
        (Some(socket), _) => (socket, None),
        (None, Some(path)) => {
            let (listener, name) = socket::listen(path).map_err(|e| e.context(attempt()))?;
            (Socket::Listening(listener), Some(name))
        }
        (None, None) => unreachable!("an endpoint is a path or a descriptor"),
    };
    if let (Some(user), Some(path)) = (&options.user, &path) {
        user.give_socket(path).map_err(|e| e.context(attempt()))?;
    }
    let announcements = lock_file.announcements().map_err(|e| e.context(attempt()))?;
    events.keep_open().map_err(|e| e.context(attempt()))?;
    let manager = Notifier::connect();
    let signals = Signals::new([SIGINT, SIGTERM]).context(attempt)?;
    // Beside the queues': for the flush at the end, and for what is done in the background and for clients.
    ring::prepare(usize::from(options.queues), 4).map_err(|e| cannot_serve(e).context(attempt()))?;
    let files = reach::rules(catalog, volume, options, path.as_deref()).map_err(|e| e.context(attempt()))?;
    let confinement = sandbox::confine(options.sandbox, options.user.as_ref(), &files);
    let confinement = confinement.map_err(|e| e.context(attempt()))?;
    log::info!("the host process is confined: {confinement}");

    let stop = Stop::new()?;
    let qos = Arc::new(Qos::new(options.limits));
    let keeper = Arc::new(keeper);
    let keys = hydration::Keys { ring: opener.keys.clone(), held: held.clone(), grants: keeper.clone() };
    let hydrator = Hydrator::new(keys, events, options.hydrate_rate);
    let record = Record::new(catalog.clone(), hydrator);
    let (writeback, channel) = (Arc::new(AtomicBool::new(true)), Arc::<Channel>::default());
    let (geometry, control_name) = (opener.geometry.clone(), control.name());
    let parts = Parts {
        opener,
        lock_file,
        holder,
        record: record.clone(),
        channel: channel.clone(),
        stop: stop.clone(),
        writeback: writeback.clone(),
        taken: Box::new(move || control_name.become_holders()),
    };
    let tuning = Tuning { poll: options.poll, in_order: options.in_order, cpu: None, qos: qos.clone() };
    let handover = Handover::new(parts, options.queues, &options.cpus, &tuning).and_then(|handover| {
        match (place, opened) {
            (Place::Holder(lock), Some(opened)) => handover.begin(opened, lock),
            (Place::Next(turn), _) => handover.wait(turn),
            (Place::Holder(_), None) => unreachable!("who has the volume has opened it"),
        }?;
        handover.heed(announcements)?;
        Ok(handover)
    });
    let handover = handover.map_err(|e| e.context(attempt()))?;
    let how = handover.describe();
    let (access, read_only) = (how.clone(), options.read_only);
    let (on_detach, on_throttle, on_rewrap) = (stop.clone(), qos.clone(), record.clone());
    let (on_status, on_rate) = (record.clone(), record.clone());
    let (on_snapshot, engine) = (record.clone(), options.engine);
    let (on_rekey, on_flatten) = (record.clone(), record.clone());
    let (on_resize, shown, vmm) = (record.clone(), geometry.clone(), channel.clone());
    let orders = Orders {
        detach: Box::new(move || on_detach.stop()),
        status: Box::new(move || Status {
            access: access.clone(),
            read_only,
            unwrapped_by: on_status.hydrator.unwrapped_by().clone(),
            hydration: on_status.hydration(),
        }),
        throttle: Box::new(move |limits| on_throttle.set(limits)),
        hydrate_rate: Box::new(move |rate| on_rate.set_hydrate_rate(rate)),
        rewrap: Box::new(move |new| on_rewrap.rewrap(new)),
        resize: Box::new(move |size| {
            on_resize.resize(size)?;
            shown.grow(size / SECTOR_SIZE);
            Ok(vmm.config_changed())
        }),
        snapshot: Box::new(move |label, client| on_snapshot.snapshot(engine, label, client)),
        rekey: Box::new(move |key, dek, client| on_rekey.rekey(engine, key, dek, client)),
        flatten: Box::new(move || on_flatten.flatten()),
    };
    let control = control.serve(orders).map_err(|e| e.context(attempt()))?;
    let device = Arc::new(Device {
        tenure: handover.clone(),
        geometry,
        inlet: inlet.seen_from_descriptors(),
        channel,
        queues: options.queues,
        seg_max: SEG_MAX.min(u32::from(options.queue_size) - 2),
        queue_size: options.queue_size,
        writeback,
    });
    stop_on_signals(signals, stop.clone()).context(attempt)?;
    log::info!("{volume} is {}: {how}", if options.incoming { "awaited" } else { "attached" });
    ready(&Attached { volume, how: &how })?;
    manager.ready();

    let served = server::serve(&device, socket, &stop);
    manager.stopping();
    drop(name);
    record.stop_serving();
    // Threads end, rings are drained; then what they wrote is made durable, and with the rest go the keys.
    drop(device);
    let result = handover.end().and(served.context(|| format!("serve {volume}")));
    drop(handover);
    let held = held.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(mut held) = held {
        held.ended(&result);
    }
    // Who is told that the volume is detached can attach it at once: nothing of ours is in the way.
    let waiting = control.close();
    let had_it = record.release();
    keeper.retire();
    log::info!("{volume} is {}", if had_it { "detached" } else { "no longer this process's" });
    waiting.tell(&result);
    result
}

/// What this process is to the volume: who has it, or who is to have it next.
enum Place {
    Holder(VolumeLock),
    Next(Turn),
}

impl Place {
    fn take(lock_file: &LockFile, holder: &Holder, incoming: bool) -> Result<Self> {
        match incoming {
            true => lock_file.announce().map(Place::Next),
            false => lock_file.acquire(holder).map(Place::Holder),
        }
    }
}

/// The data keys, in the order of the volume's keys, and who keeps the grants. A refusal is an event, with the KMS's words
/// as its cause.
fn unwrap_all(
    catalog: &Catalog,
    metadata: &Metadata,
    events: &EventLog,
    settings: &Settings,
    alone: bool,
) -> Result<(Deks, Keeper)> {
    let until = Instant::now() + settings.kms_patience;
    let patience = || Patience(until.saturating_duration_since(Instant::now()));
    let first = metadata.keys().first().map(|key| key.wrapped.key_id.as_str());
    let refused = |refusal: Refusal| {
        let (key, cause) = (refusal.key_id.as_deref().or(first), refusal.cause.as_str());
        events.record(&Event::attach_failed(metadata.id(), key, cause, metadata.attached_before()));
        refusal.error()
    };
    let keeper = Keeper::start(catalog.root(), settings, metadata, patience(), alone).map_err(refused)?;
    let mut deks = Deks::new();
    for (n, key) in metadata.keys().iter().enumerate() {
        let dek = unwrap::unwrap_granted(catalog.root(), metadata.id(), key, keeper.token(n), patience());
        deks.push(Arc::new(dek.map_err(refused)?));
    }
    Ok((deks, keeper))
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
