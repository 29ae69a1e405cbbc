//! Attaching a volume: the one process that holds its data key, from the lock to the wipe.
//!
//! In order: the volume's lock, its metadata, its layer and QEMU's locks on it, a grant by way of the keeper ([`grants`]),
//! the data key by way of the [`unwrap`] helper, the seal, the threads, the sockets. Nothing listens before the helper is gone and the metadata
//! has proved right. The way back is the drop order of the same things. With [`Options::incoming`] the lock, the layers
//! and the threads come last: when another process has let go of the volume ([`handover`]).

pub mod control;
pub mod grants;
pub mod handover;
mod helper;
mod record;
pub mod rewrap;
pub mod sandbox;
pub mod socket;
pub mod unwrap;

use crate::config::Settings;
use crate::crypt::Dek;
use crate::crypt::xts::{DataUnit, Engine, SectorCipher, new_cipher};
use crate::error::{Context, Error, Kind, Result};
use crate::kms::patience::Patience;
use crate::observe::events::{Event, EventLog};
use crate::store::Store;
use crate::store::file::FileStore;
use crate::vhost::backend::Device;
use crate::vhost::gate::Channel;
use crate::vhost::qos::{Limits, Qos};
use crate::vhost::server::{self, Socket, Stop};
use crate::vhost::session::Inlet;
use crate::vhost::worker::Tuning;
use crate::virtio::{Geometry, SECTOR_SIZE, SharedGeometry};
use crate::volume::image_lock;
use crate::volume::io::{Disk, Layers};
use crate::volume::layers::{self, Layer};
use crate::volume::lock::{Holder, LockFile, Purpose, Turn, VolumeLock};
use crate::volume::metadata::{LayerRecord, Metadata};
use crate::volume::seal::Seal;
use crate::volume::{Catalog, VolumeId};
use control::{Control, Orders, Status, UsedKey};
use grants::Keeper;
use handover::{Handover, Parts};
use record::Record;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
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
    let events = EventLog::new(catalog.root(), settings);
    let mut keys = None;
    let get_keys = |metadata: &Metadata| {
        let (deks, keeper) = unwrap_all(catalog, metadata, &events, settings, !options.incoming)?;
        keys = Some((metadata.keys().iter().map(UsedKey::of).collect(), keeper));
        Ok(Arc::from(deks))
    };
    let opener = match &place {
        Place::Holder(lock) => Opener::with_disk(catalog, lock, options, get_keys),
        Place::Next(_) => Opener::without(catalog, volume, options, get_keys),
    };
    let (opener, how, disk) = opener.map_err(|e| e.context(attempt()))?;
    let Some((unwrapped_by, keeper)) = keys else { unreachable!("nothing is opened without its keys") };
    let record = Arc::new(Record::new(catalog.clone()));
    let status = Status { access: how.clone(), read_only: options.read_only, unwrapped_by };

    let stop = Stop::new()?;
    let qos = Arc::new(Qos::new(options.limits));
    let (on_detach, on_throttle, on_rewrap) = (stop.clone(), qos.clone(), record.clone());
    let orders = Orders {
        detach: Box::new(move || on_detach.stop()),
        status: Box::new(move || status.clone()),
        throttle: Box::new(move |limits| on_throttle.set(limits)),
        rewrap: Box::new(move |new| on_rewrap.rewrap(new)),
    };
    let control = Control::listen(&folder, options.incoming, orders).map_err(|e| e.context(attempt()))?;
    let inlet = if options.incoming { "inner-incoming.sock" } else { "inner.sock" };
    let inlet = Inlet::new(&folder, inlet).context(|| "make a socket in the volume's folder");
    let inlet = inlet.map_err(|e| e.context(attempt()))?;
    let (geometry, channel, name) = (opener.geometry.clone(), Arc::<Channel>::default(), control.name());
    let writeback = Arc::new(AtomicBool::new(true));
    let parts = Parts {
        opener,
        lock_file,
        holder,
        record: record.clone(),
        queues: options.queues,
        cpus: options.cpus.clone(),
        tuning: Tuning { poll: options.poll, in_order: options.in_order, cpu: None, qos },
        channel: channel.clone(),
        stop: stop.clone(),
        writeback: writeback.clone(),
        taken: Box::new(move || name.become_holders()),
    };
    let handover = match (place, disk) {
        (Place::Holder(lock), Some(disk)) => Handover::holding(parts, disk, lock),
        (Place::Next(turn), _) => Ok(Handover::waiting(parts, turn)),
        (Place::Holder(_), None) => unreachable!("who has the volume has opened it"),
    };
    let handover = Arc::new(handover.map_err(|e| e.context(attempt()))?);
    handover.heed_announcements().map_err(|e| e.context(attempt()))?;
    let device = Arc::new(Device {
        tenure: handover.clone(),
        geometry,
        inlet,
        channel,
        queues: options.queues,
        seg_max: SEG_MAX.min(u32::from(options.queue_size) - 2),
        queue_size: options.queue_size,
        writeback,
    });
    let (socket, name) = match (inherited, &path) {
        (Some(socket), _) => (socket, None),
        (None, Some(path)) => {
            let (listener, name) = socket::listen(path).map_err(|e| e.context(attempt()))?;
            (Socket::Listening(listener), Some(name))
        }
        (None, None) => unreachable!("an endpoint is a path or a descriptor"),
    };
    stop_on_signals(stop.clone()).context(attempt)?;
    log::info!("{volume} is {}: {how}", if options.incoming { "awaited" } else { "attached" });
    ready(&Attached { volume, how: &how })?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let served = server::serve(&device, socket, &stop);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    drop(name);
    // Threads end, rings are drained; then what they wrote is made durable, and with the rest go the keys.
    drop(device);
    let result = handover.end().and(served.context(|| format!("serve {volume}")));
    drop(handover);
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

/// A volume's data keys, in the order of its keys.
type Deks = Arc<[Dek]>;

/// How the volume is opened, each time that this process gets it: once, unless it is handed over. It keeps the data
/// keys.
pub struct Opener {
    catalog: Catalog,
    volume: VolumeId,
    options: Options,
    deks: Deks,
    geometry: Arc<SharedGeometry>,
}

impl Opener {
    /// Opens the volume, which this process has; the data keys come from `keys`.
    fn with_disk(
        catalog: &Catalog,
        lock: &VolumeLock,
        options: &Options,
        keys: impl FnOnce(&Metadata) -> Result<Deks>,
    ) -> Result<(Self, String, Option<Arc<Disk>>)> {
        let (disk, deks) = open(catalog, lock, options, keys)?;
        let opener = Opener::new(catalog, lock.volume(), options, deks, disk.geometry());
        Ok((opener, disk.describe(), Some(disk)))
    }

    /// Finds out whether the volume could be opened, which another process has.
    fn without(
        catalog: &Catalog,
        volume: VolumeId,
        options: &Options,
        keys: impl FnOnce(&Metadata) -> Result<Deks>,
    ) -> Result<(Self, String, Option<Arc<Disk>>)> {
        let metadata = catalog.load(volume)?;
        catalog.check_layers(&metadata)?;
        let geometry = shape(&metadata, options);
        let path = catalog.layer_path(metadata.top().id);
        let top = FileStore::open(&path, true, geometry.block_size);
        let top = top.context(|| path.display().to_string())?;
        top.open_queue(1).map_err(cannot_serve)?;
        let deks = keys(&metadata)?;
        // A volume without a seal gets it from whoever has it first.
        let _ = metadata.verify(&deks)?;
        let engine = match ciphers(&deks, &metadata, options)?.first() {
            Some(cipher) => format!("XTS engine {}", cipher.engine()),
            None => "not encrypted".into(),
        };
        let how = format!("{}; {engine}", top.caps().access);
        Ok((Opener::new(catalog, volume, options, deks, geometry), how, None))
    }

    fn new(catalog: &Catalog, volume: VolumeId, options: &Options, deks: Deks, geometry: Geometry) -> Self {
        let geometry = Arc::new(SharedGeometry::new(geometry));
        Opener { catalog: catalog.clone(), volume, options: options.clone(), deks, geometry }
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Opens the volume anew, as it is now. Answers whether it is larger than this process knew.
    ///
    /// # Errors
    /// Also if it has changed in a way that a guest, or a process that has these data keys, cannot follow.
    pub fn open(&self, lock: &VolumeLock) -> Result<(Arc<Disk>, bool)> {
        let now = self.geometry.now();
        let keys = |metadata: &Metadata| {
            let shape = shape(metadata, &self.options);
            if metadata.keys().len() == self.deks.len()
                && shape.block_size == now.block_size
                && shape.sectors >= now.sectors
            {
                return Ok(self.deks.clone());
            }
            let message = "it has got other data keys or a smaller size meanwhile; attach it anew";
            Err(Error::new(Kind::Busy, format!("{}: {message}", self.volume)))
        };
        let (disk, _) = open(&self.catalog, lock, &self.options, keys)?;
        let grew = self.geometry.grow(disk.geometry().sectors);
        Ok((disk, grew))
    }
}

fn shape(metadata: &Metadata, options: &Options) -> Geometry {
    let block_size = metadata.sector_size().bytes();
    Geometry { sectors: metadata.size() / SECTOR_SIZE, block_size, read_only: options.read_only }
}

/// Opens the volume's data, its metadata proved right; the data keys come from `keys`.
fn open(
    catalog: &Catalog,
    lock: &VolumeLock,
    options: &Options,
    keys: impl FnOnce(&Metadata) -> Result<Deks>,
) -> Result<(Arc<Disk>, Deks)> {
    let mut metadata = catalog.load(lock.volume())?;
    catalog.check_layers(&metadata)?;
    let mut layers = open_layers(catalog, &metadata, options.read_only)?;
    let Layers { store, .. } = layers::chain(&layers);
    // Before anybody is asked for a key; the queues' threads would find it out when a guest waits for them already.
    store.open_queue(1).map_err(cannot_serve)?;
    let deks = keys(&metadata)?;
    seal(catalog, lock, &mut metadata, &deks, &*store)?;
    let ciphers = ciphers(&deks, &metadata, options)?;
    for (layer, record) in layers.iter_mut().zip(metadata.layers()) {
        layer.cipher = record.key.map(|key| ciphers[key].clone());
    }
    let serial = options.serial.clone().unwrap_or_else(|| default_serial(metadata.id()));
    let disk = Disk::layered(shape(&metadata, options), &serial, layers::chain(&layers));
    Ok((Arc::new(disk.context(|| "open its layers")?), deks))
}

/// The ciphers, in the order of the data keys. Layers under the same key share its round keys.
fn ciphers(deks: &[Dek], metadata: &Metadata, options: &Options) -> Result<Vec<Arc<dyn SectorCipher>>> {
    let Some(unit) = DataUnit::from_bytes(metadata.sector_size().bytes() as usize) else {
        unreachable!("sector sizes are data units");
    };
    deks.iter().map(|dek| Ok(Arc::from(new_cipher(options.engine, dek, unit)?))).collect()
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
    alone: bool,
) -> Result<(Vec<Dek>, Keeper)> {
    let until = Instant::now() + settings.kms_patience;
    let patience = || Patience(until.saturating_duration_since(Instant::now()));
    let first = metadata.keys().first().map(|key| key.wrapped.key_id.as_str());
    let refused = |refusal: Refusal| {
        let (key, cause) = (refusal.key_id.as_deref().or(first), refusal.cause.as_str());
        events.record(&Event::attach_failed(metadata.id(), key, cause, metadata.attached_before()));
        refusal.error()
    };
    let keeper = Keeper::start(catalog.root(), settings, metadata, patience(), alone).map_err(refused)?;
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
    match metadata.verify(deks)? {
        Seal::Sealed | Seal::NotEncrypted => {}
        Seal::Unsealed if store.has_data()? => {
            let message = format!(
                "{}: there is data in its layer, but no seal in volume.json, which was edited or replaced; restore \
                 it from a backup",
                metadata.id()
            );
            return Err(Error::new(Kind::Corrupt, message));
        }
        Seal::Unsealed => metadata.seal(deks),
    }
    if metadata.mark_attached() {
        catalog.store(lock, metadata)?;
    }
    Ok(())
}

fn cannot_serve(e: std::io::Error) -> Error {
    let hint = "look at the sysctl kernel.io_uring_disabled and, in a container, at its seccomp profile";
    Error::new(Kind::Unsupported, format!("{e}; {hint}"))
}

/// EBS shows `vol0123456789abcdef0`: exactly the 20 bytes that there are.
fn default_serial(volume: VolumeId) -> String {
    volume.to_string().replace('-', "")
}

fn stop_on_signals(stop: Arc<Stop>) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let wait = move || {
        for signal in &mut signals {
            log::info!("signal {signal}: detaching");
            stop.stop();
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(())
}
