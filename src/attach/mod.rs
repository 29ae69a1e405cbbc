//! Attaching a volume: the one process that holds its data key, from the lock to the wipe.
//!
//! In order: the volume's lock, its metadata, its layer and QEMU's locks on it, the data key by way of the
//! [`unwrap`] helper, the seal, the threads, the sockets. Nothing listens before the helper is gone and the metadata
//! has proved right. The way back is the drop order of the same things. With [`Options::incoming`] the lock, the layer
//! and the threads come last: when the VMM of another process has let go of the volume ([`handover`]).

pub mod control;
pub mod handover;
pub mod sandbox;
pub mod socket;
pub mod unwrap;

use crate::config::Settings;
use crate::crypt::Dek;
use crate::crypt::xts::{DataUnit, Engine, SectorCipher, new_cipher};
use crate::error::{Context, Error, Kind, Result};
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
use crate::volume::image_lock::{self, ImageLock};
use crate::volume::io::Disk;
use crate::volume::lock::{Holder, LockFile, Purpose, Turn, VolumeLock};
use crate::volume::metadata::Metadata;
use crate::volume::seal::Seal;
use crate::volume::{Catalog, VolumeId};
use control::{Control, Orders};
use handover::{Handover, Parts};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

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
    let (opener, how, disk) = match &place {
        Place::Holder(lock) => Opener::with_disk(catalog, lock, &events, options),
        Place::Next(_) => Opener::without(catalog, volume, &events, options),
    }
    .map_err(|e| e.context(attempt()))?;

    let stop = Stop::new()?;
    let qos = Arc::new(Qos::new(options.limits));
    let (on_detach, on_throttle) = (stop.clone(), qos.clone());
    let orders = Orders {
        detach: Box::new(move || on_detach.stop()),
        throttle: Box::new(move |limits| on_throttle.set(limits)),
    };
    let control = Control::listen(&folder, options.incoming, orders).map_err(|e| e.context(attempt()))?;
    let inlet = if options.incoming { "inner-incoming.sock" } else { "inner.sock" };
    let inlet = Inlet::new(&folder, inlet).context(|| "make a socket in the volume's folder");
    let inlet = inlet.map_err(|e| e.context(attempt()))?;
    let (geometry, channel, control_name) =
        (opener.geometry.clone(), Arc::<Channel>::default(), control.name());
    let parts = Parts {
        opener,
        lock_file,
        holder,
        queues: options.queues,
        cpus: options.cpus.clone(),
        tuning: Tuning { poll: options.poll, in_order: options.in_order, cpu: None, qos },
        channel: channel.clone(),
        stop: stop.clone(),
        taken: Box::new(move || control_name.become_holders()),
    };
    let handover = match (place, disk) {
        (Place::Holder(lock), Some(disk)) => Handover::holding(parts, disk, lock),
        (Place::Next(turn), _) => Ok(Handover::waiting(parts, turn)),
        (Place::Holder(_), None) => unreachable!("who has the volume has opened it"),
    };
    let handover = Arc::new(handover.map_err(|e| e.context(attempt()))?);
    let device = Arc::new(Device {
        tenure: handover.clone(),
        geometry,
        inlet,
        channel,
        queues: options.queues,
        seg_max: SEG_MAX.min(u32::from(options.queue_size) - 2),
        queue_size: options.queue_size,
        writeback: true.into(),
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
    match options.incoming {
        true => log::info!("{volume} is awaited: {how}"),
        false => log::info!("{volume} is attached: {how}"),
    }
    ready(&Attached { volume, how: &how })?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let served = server::serve(&device, socket, &stop);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    drop(name);
    let (ended, lock) = handover.end();
    let result = ended.and(served.context(|| format!("serve {volume}")));
    // Who is told that the volume is detached can attach it at once: nothing of ours is in the way.
    let waiting = control.close();
    match lock {
        Some(lock) => {
            drop(lock);
            log::info!("{volume} is detached");
        }
        None => log::info!("{volume} is no longer this process's"),
    }
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
        if incoming {
            lock_file.announce().map(Place::Next)
        } else {
            lock_file.acquire(holder).map(Place::Holder)
        }
    }
}

/// How the volume is opened, each time that this process gets it: once, unless it is handed over. It keeps the data
/// keys.
pub struct Opener {
    catalog: Catalog,
    volume: VolumeId,
    options: Options,
    deks: Vec<Dek>,
    geometry: Arc<SharedGeometry>,
}

/// A layer that nobody else writes.
struct Layer {
    store: FileStore,
    image_lock: ImageLock,
}

impl Opener {
    /// Gets the data keys, and opens the volume, which this process has.
    fn with_disk(
        catalog: &Catalog,
        lock: &VolumeLock,
        events: &EventLog,
        options: &Options,
    ) -> Result<(Self, String, Option<Arc<Disk>>)> {
        let metadata = load(catalog, lock.volume())?;
        // Before anybody is asked for a key.
        let layer = open_layer(catalog, &metadata, options)?;
        let opener = Opener::new(catalog, &metadata, events, options)?;
        let disk = opener.disk(lock, metadata, layer)?;
        Ok((opener, disk.describe(), Some(disk)))
    }

    /// Gets the data keys, and finds out whether the volume could be opened, which another process has.
    fn without(
        catalog: &Catalog,
        volume: VolumeId,
        events: &EventLog,
        options: &Options,
    ) -> Result<(Self, String, Option<Arc<Disk>>)> {
        let metadata = load(catalog, volume)?;
        let store = open_store(catalog, &metadata, true)?;
        let opener = Opener::new(catalog, &metadata, events, options)?;
        // A volume without a seal gets it from whoever has it first.
        let _ = metadata.verify(&opener.deks)?;
        let cipher = opener.cipher(&metadata)?;
        Ok((opener, Disk::describe_parts(&store, cipher.as_deref()), None))
    }

    fn new(catalog: &Catalog, metadata: &Metadata, events: &EventLog, options: &Options) -> Result<Self> {
        let geometry = Geometry {
            sectors: metadata.size() / SECTOR_SIZE,
            block_size: metadata.sector_size().bytes(),
            read_only: options.read_only,
        };
        Ok(Opener {
            catalog: catalog.clone(),
            volume: metadata.id(),
            options: options.clone(),
            deks: unwrap_all(catalog, metadata, events)?,
            geometry: Arc::new(SharedGeometry::new(geometry)),
        })
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Its shape, as this process knows it.
    pub fn geometry(&self) -> &SharedGeometry {
        &self.geometry
    }

    /// Opens the volume anew, as it is now.
    ///
    /// # Errors
    /// Also if it has changed in a way that a guest or a process that has its data keys cannot follow.
    pub fn open(&self, lock: &VolumeLock) -> Result<Arc<Disk>> {
        let metadata = load(&self.catalog, lock.volume())?;
        let now = self.geometry.now();
        let (sectors, block_size) = (metadata.size() / SECTOR_SIZE, metadata.sector_size().bytes());
        if metadata.keys().len() != self.deks.len() || block_size != now.block_size || sectors < now.sectors {
            let message = "it has got other data keys, or another size; attach it anew";
            return Err(Error::new(Kind::Busy, format!("{}: {message}", self.volume)));
        }
        let layer = open_layer(&self.catalog, &metadata, &self.options)?;
        let disk = self.disk(lock, metadata, layer)?;
        self.geometry.grow(sectors);
        Ok(disk)
    }

    /// The disk, its metadata proved right.
    fn disk(&self, lock: &VolumeLock, mut metadata: Metadata, layer: Layer) -> Result<Arc<Disk>> {
        seal(&self.catalog, lock, &mut metadata, &self.deks, &layer.store)?;
        let cipher = self.cipher(&metadata)?;
        let serial = self.options.serial.clone().unwrap_or_else(|| default_serial(metadata.id()));
        let Layer { store, image_lock } = layer;
        Ok(Arc::new(Disk::new(self.geometry.clone(), &serial, Box::new(store), cipher, image_lock)))
    }

    fn cipher(&self, metadata: &Metadata) -> Result<Option<Box<dyn SectorCipher>>> {
        let Some(key) = metadata.top().key else { return Ok(None) };
        let unit = DataUnit::from_bytes(metadata.sector_size().bytes() as usize);
        let unit = unit.unwrap_or_else(|| unreachable!("sector sizes are data units"));
        new_cipher(self.options.engine, &self.deks[key], unit).map(Some)
    }
}

/// The volume's metadata, with layers that are there.
fn load(catalog: &Catalog, volume: VolumeId) -> Result<Metadata> {
    let metadata = catalog.load(volume)?;
    catalog.check_layers(&metadata)?;
    if metadata.layers().len() != 1 {
        let message =
            format!("{} has {} layers; this version serves one", metadata.id(), metadata.layers().len());
        return Err(Error::new(Kind::Unsupported, message));
    }
    Ok(metadata)
}

/// Opens the layer and locks it against QEMU and its tools.
fn open_layer(catalog: &Catalog, metadata: &Metadata, options: &Options) -> Result<Layer> {
    let path = catalog.layer_path(metadata.top().id);
    let access = if options.read_only { image_lock::Access::Read } else { image_lock::Access::ReadWrite };
    let image_lock = ImageLock::acquire(&path, access)?;
    Ok(Layer { store: open_store(catalog, metadata, options.read_only)?, image_lock })
}

/// Opens the layer and finds out whether a queue's thread could use it, for which a guest would be waiting then.
fn open_store(catalog: &Catalog, metadata: &Metadata, read_only: bool) -> Result<FileStore> {
    let path = catalog.layer_path(metadata.top().id);
    let store = FileStore::open(&path, read_only, metadata.sector_size().bytes());
    let store = store.context(|| path.display().to_string())?;
    store.open_queue(1).map_err(cannot_serve)?;
    Ok(store)
}

/// The data keys, in the order of the volume's keys. A refusal is an event, with the KMS's words as its cause.
fn unwrap_all(catalog: &Catalog, metadata: &Metadata, events: &EventLog) -> Result<Vec<Dek>> {
    let mut deks = Vec::new();
    for key in metadata.keys() {
        let dek = unwrap::unwrap(catalog.root(), metadata.id(), key).map_err(|refusal| {
            let (arn, reattach) = (&key.wrapped.key_id, metadata.attached_before());
            events.record(&Event::attach_failed(metadata.id(), Some(arn), refusal.cause.as_str(), reattach));
            refusal.error()
        });
        deks.push(dek?);
    }
    Ok(deks)
}

/// Checks the metadata's seal, or sets it if nobody had the keys before, and notes the first attach.
fn seal(
    catalog: &Catalog,
    lock: &VolumeLock,
    metadata: &mut Metadata,
    deks: &[Dek],
    store: &FileStore,
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
