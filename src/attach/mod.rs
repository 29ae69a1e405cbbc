//! Attaching a volume: the one process that holds its data key, from the lock to the wipe.
//!
//! In order: the volume's lock, its metadata, its layers and QEMU's locks on them, a grant by way of the keeper
//! ([`grants`]), the data key by way of the [`unwrap`] helper, the seal, the sockets, the [`sandbox`], the threads.
//! Nothing listens before the helper is gone and the metadata has proved right; nothing that a VMM says is read before
//! the process is confined. The way back is the drop order of the same things.

pub mod control;
pub mod grants;
mod helper;
pub(crate) mod notify;
mod reach;
mod record;
pub mod rewrap;
pub mod sandbox;
mod snapshot;
pub mod socket;
mod trail;
pub mod unwrap;

use crate::config::Settings;
use crate::crypt::xts::{DataUnit, Engine, SectorCipher, new_cipher};
use crate::crypt::{Dek, SealKey};
use crate::error::{Context, Error, Kind, Result};
use crate::kms::embedded::root_key::passphrase;
use crate::kms::patience::Patience;
use crate::observe::events::{Event, EventLog};
use crate::store::Store;
use crate::store::file::ring;
use crate::vhost::backend::Device;
use crate::vhost::qos::{Limits, Qos};
use crate::vhost::server::{self, Socket, Stop};
use crate::vhost::session::Inlet;
use crate::vhost::worker::{Tuning, Worker};
use crate::virtio::Geometry;
use crate::virtio::config_space::ConfigSpace;
use crate::volume::image_lock;
use crate::volume::io::{Disk, Layers};
use crate::volume::layers::{self, Layer};
use crate::volume::lock::{Holder, Purpose, VolumeLock};
use crate::volume::metadata::{LayerRecord, Metadata};
use crate::volume::{Catalog, VolumeId};
use control::{Control, Orders, Status, UsedKey};
use grants::Keeper;
use notify::Notifier;
use record::Record;
use sandbox::{Identity, Mode};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::os::fd::RawFd;
use std::path::PathBuf;
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
    /// CPUs to bind the queues' threads to, one after the other and from the beginning again; none: unbound.
    pub cpus: Vec<usize>,
    /// How strictly the process is confined once it is ready.
    pub sandbox: Mode,
    /// The user to become then; none: the one that it was started as.
    pub user: Option<Identity>,
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
    let lock =
        VolumeLock::acquire(&catalog.folder(volume), volume, &holder).map_err(|e| e.context(attempt()))?;
    let events = EventLog::new(catalog.root(), settings);
    let opened = open(catalog, &lock, &events, settings, options).map_err(|e| e.context(attempt()))?;
    let Opened { mut held, geometry, metadata, seal_key, layers, keeper } = opened;
    drop(passphrase);

    let control = Control::bind(&catalog.folder(volume)).map_err(|e| e.context(attempt()))?;
    let inlet = Inlet::new(&catalog.folder(volume)).context(|| "make a socket in the volume's folder");
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
    let manager = Notifier::connect();
    let signals = Signals::new([SIGINT, SIGTERM]).context(attempt)?;
    // Beside the queues': for the flush at the end, and for what is done in the background and for clients.
    ring::prepare(usize::from(options.queues), 4).map_err(|e| cannot_serve(e).context(attempt()))?;
    let files = reach::rules(catalog, volume, options, path.as_deref()).map_err(|e| e.context(attempt()))?;
    let confinement = sandbox::confine(options.sandbox, options.user.as_ref(), &files);
    let confinement = confinement.map_err(|e| e.context(attempt()))?;
    log::info!("the host process is confined: {confinement}");

    let serial = options.serial.clone().unwrap_or_else(|| default_serial(volume));
    let disk = Disk::layered(geometry, &serial, layers::chain(&layers)).context(|| "open its layers");
    let disk = Arc::new(disk.map_err(|e| e.context(attempt()))?);
    let how = disk.describe();
    let unwrapped_by = metadata.keys().iter().map(UsedKey::of).collect();
    let record = Record::new(catalog.clone(), lock, metadata, seal_key, layers, options.read_only);
    let record = Arc::new(record);
    let status = Status { access: how.clone(), read_only: options.read_only, unwrapped_by };
    let stop = Stop::new()?;
    let qos = Arc::new(Qos::new(options.limits));
    let (on_detach, on_throttle, on_rewrap) = (stop.clone(), qos.clone(), record.clone());
    let (on_snapshot, engine) = (record.clone(), options.engine);
    let orders = Orders {
        detach: Box::new(move || on_detach.stop()),
        status: Box::new(move || status.clone()),
        throttle: Box::new(move |limits| on_throttle.set(limits)),
        rewrap: Box::new(move |new| on_rewrap.rewrap(new)),
        snapshot: Box::new(move |label, client| on_snapshot.snapshot(engine, label, client)),
    };
    let control = control.serve(orders).map_err(|e| e.context(attempt()))?;
    let failure: Arc<Mutex<Option<String>>> = Arc::default();
    let inlet = inlet.seen_from_descriptors();
    let device = device(disk, inlet, options, &qos, &stop, &failure).map_err(|e| e.context(attempt()))?;
    record.serve(&device);
    stop_on_signals(signals, stop.clone()).context(attempt)?;
    log::info!("{volume} is attached: {how}");
    ready(&Attached { volume, how: &how })?;
    manager.ready();

    let served = server::serve(&device, socket, &stop);
    manager.stopping();
    drop(name);
    record.stop_serving();
    // Threads end, rings are drained; then what they wrote is made durable, and with the disk goes the key.
    let disk = device.disk();
    drop(device);
    let result = served.context(|| format!("serve {volume}"));
    let result = result.and(disk.flush().context(|| format!("flush {volume}")));
    drop(disk);
    let result = match failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(reason) => Err(Error::new(Kind::Other, format!("serve {volume}: {reason}"))),
        None => result,
    };
    if let Some(held) = &mut held {
        held.ended(&result);
    }
    drop(held);
    // Who is told that the volume is detached can attach it at once: nothing of ours is in the way.
    let waiting = control.close();
    record.release();
    keeper.retire();
    log::info!("{volume} is detached");
    waiting.tell(&result);
    result
}

/// A volume whose metadata has proved right, its data, and what it took to have it. Nothing of it has a thread yet.
struct Opened {
    /// That this process has the data keys: to be dropped after the layers, which have them.
    held: Option<KeysHeld>,
    geometry: Geometry,
    metadata: Metadata,
    seal_key: Option<SealKey>,
    /// With their keys.
    layers: Vec<Layer>,
    keeper: Keeper,
}

/// Opens the volume's data, its metadata proved right.
fn open(
    catalog: &Catalog,
    lock: &VolumeLock,
    events: &EventLog,
    settings: &Settings,
    options: &Options,
) -> Result<Opened> {
    let mut metadata = catalog.load(lock.volume())?;
    catalog.recover(lock, &metadata)?;
    catalog.check_layers(&metadata)?;
    let block_size = metadata.sector_size().bytes();
    let mut layers = open_layers(catalog, &metadata, options.read_only)?;
    let Layers { store, .. } = layers::chain(&layers);
    // Before anybody is asked for a key; the queues' threads would find it out when a guest waits for them already.
    store.open_queue(1).map_err(cannot_serve)?;
    // Before the keys, to be dropped after them.
    let held;
    let (deks, keeper) = unwrap_all(catalog, &metadata, events, settings)?;
    seal(catalog, lock, &mut metadata, &deks, &*layers[0].store)?;
    held = KeysHeld::begin(catalog.root(), &metadata)?;
    let Some(unit) = DataUnit::from_bytes(block_size as usize) else {
        unreachable!("sector sizes are data units");
    };
    // Layers under the same key share its round keys.
    let ciphers = deks.iter().map(|dek| Ok(Arc::from(new_cipher(options.engine, dek, unit)?)));
    let ciphers = ciphers.collect::<Result<Vec<Arc<dyn SectorCipher>>>>()?;
    for (layer, record) in layers.iter_mut().zip(metadata.layers()) {
        layer.cipher = match record.key {
            Some(key) => Some(ciphers[key].clone()),
            None if record.masked => {
                let mask = Dek::mask_of_layer(record.id.as_bytes())?;
                Some(Arc::from(new_cipher(options.engine, &mask, unit)?))
            }
            None => None,
        };
    }
    let geometry = Geometry { sectors: metadata.size() / 512, block_size, read_only: options.read_only };
    let seal_key = metadata.seal_key(&deks)?;
    Ok(Opened { held, geometry, metadata, seal_key, layers, keeper })
}

/// Opens the layers of a volume, the top first. Only that is ever written.
fn open_layers(catalog: &Catalog, metadata: &Metadata, read_only: bool) -> Result<Vec<Layer>> {
    let open = |(number, layer): (usize, &LayerRecord)| {
        let frozen = read_only || number > 0;
        let access = if frozen { image_lock::Access::Read } else { image_lock::Access::ReadWrite };
        Layer::open(&catalog.layer_path(layer.id), access, metadata.sector_size().bytes(), None)
    };
    metadata.layers().iter().enumerate().map(open).collect()
}

/// The data keys, in the order of the volume's keys, and who keeps the grants. A refusal is an event, with the KMS's words
/// as its cause.
fn unwrap_all(
    catalog: &Catalog,
    metadata: &Metadata,
    events: &EventLog,
    settings: &Settings,
) -> Result<(Vec<Dek>, Keeper)> {
    let until = Instant::now() + settings.kms_patience;
    let patience = || Patience(until.saturating_duration_since(Instant::now()));
    let first = metadata.keys().first().map(|key| key.wrapped.key_id.as_str());
    let refused = |refusal: Refusal| {
        let (key, cause) = (refusal.key_id.as_deref().or(first), refusal.cause.as_str());
        events.record(&Event::attach_failed(metadata.id(), key, cause, metadata.attached_before()));
        refusal.error()
    };
    let keeper = Keeper::start(catalog.root(), settings, metadata, patience()).map_err(refused)?;
    let mut deks = Vec::new();
    for (n, key) in metadata.keys().iter().enumerate() {
        let dek = unwrap::unwrap_granted(catalog.root(), metadata.id(), key, keeper.token(n), patience());
        deks.push(dek.map_err(refused)?);
    }
    Ok((deks, keeper))
}

/// Checks the metadata's seal, or sets it if nobody had the keys before, and notes the first attach.
fn seal(
    catalog: &Catalog,
    lock: &VolumeLock,
    metadata: &mut Metadata,
    deks: &[Dek],
    store: &dyn Store,
) -> Result<()> {
    let was_sealed = metadata.is_sealed();
    metadata.prove(deks, store)?;
    if metadata.mark_attached() || metadata.is_sealed() != was_sealed {
        catalog.store(lock, metadata)?;
    }
    Ok(())
}

fn device(
    disk: Arc<Disk>,
    inlet: Inlet,
    options: &Options,
    qos: &Arc<Qos>,
    stop: &Arc<Stop>,
    failure: &Arc<Mutex<Option<String>>>,
) -> Result<Arc<Device>> {
    let spawn = |index: u16| {
        let (stop, failure) = (stop.clone(), failure.clone());
        let index = usize::from(index);
        let cpu = options.cpus.get(index % options.cpus.len().max(1)).copied();
        let tuning = Tuning { poll: options.poll, in_order: options.in_order, cpu, qos: qos.clone() };
        Worker::spawn(index, disk.clone(), tuning, move |reason| {
            log::error!("{reason}");
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
            stop.stop();
        })
    };
    let workers: Vec<Worker> = (0..options.queues).map(spawn).collect::<std::io::Result<_>>()?;
    Ok(Arc::new(Device {
        inlet,
        workers: workers.into(),
        config: ConfigSpace {
            geometry: *disk.geometry(),
            queues: options.queues,
            seg_max: SEG_MAX.min(u32::from(options.queue_size) - 2),
        },
        disk: disk.into(),
        queue_size: options.queue_size,
        writeback: true.into(),
    }))
}

fn cannot_serve(e: std::io::Error) -> Error {
    let hint = "look at the sysctl kernel.io_uring_disabled and, in a container, at its seccomp profile";
    Error::new(Kind::Unsupported, format!("{e}; {hint}"))
}

/// EBS shows `vol0123456789abcdef0`: exactly the 20 bytes that there are.
fn default_serial(volume: VolumeId) -> String {
    volume.to_string().replace('-', "")
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
