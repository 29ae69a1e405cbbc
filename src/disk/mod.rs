//! A volume as a run of sectors: between guest memory and ciphertext.
//!
//! [`Disk`] is what all queues of an attached volume share; each queue's thread has a [`DiskQueue`]. A
//! transfer goes through a buffer of the backing's queue, so that the kernel never holds a guest pointer, a
//! write reads guest memory exactly once, and the guest never sees ciphertext.
//!
//! An all-zero 512-byte sector of a layer means "not in this layer". Where there is one layer, as mostly, it
//! reads as zeros; what several layers take is in [`layered`].

mod blocking;
pub mod cipher_time;
mod durability;
mod fence;
mod guest;
pub mod hydrate;
mod layered;
pub mod map;
mod queue;
mod refusals;
pub mod transfer;

pub(crate) use blocking::WaitingQueue;
pub use guest::GuestData;
pub use queue::{DiskQueue, Event, Zeroed, Zeroing};

use crate::backing::Backing;
use crate::base::Timestamp;
use crate::base::space::Space;
use crate::crypt::xts::SectorCipher;
use crate::disk::map::{LayerMap, MAX_HEIGHT};
use crate::image::lock::ImageLock;
use crate::reactor::Reactor;
use crate::virtio::request::ID_BYTES;
use crate::virtio::{SECTOR_SIZE, Shape};
use durability::Durability;
use fence::Fence;
use refusals::Refusals;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

const SECTOR: usize = SECTOR_SIZE as usize;

/// How a layer is encrypted; not at all without one. Layers under the same key share it.
pub type Cipher = Option<Arc<dyn SectorCipher>>;

/// An attached volume, as its queues see it.
pub struct Disk {
    shape: Shape,
    serial: [u8; ID_BYTES],
    backing: Arc<dyn Backing>,
    /// The top layer's.
    cipher: Cipher,
    /// The layers below the top, from the one right below it.
    below: Vec<Below>,
    /// Which layers may have what, where there are several.
    map: Option<Arc<LayerMap>>,
    /// What keeps queues out of the way of a copy, where there may be one.
    fence: Option<Arc<Fence>>,
    /// The height of the uppermost of the leaving layers, from which the disk is hydrated; 0: there is none.
    leaving: u8,
    /// Keep others off the layers for as long as they are served.
    _image_locks: Vec<Arc<ImageLock>>,
    durability: Arc<Durability>,
    refusals: Arc<Refusals>,
}

/// The layers of a volume as they were opened, and what goes with each, the top first.
pub struct Layers {
    /// Where they lie.
    pub backing: Arc<dyn Backing>,
    /// How they are encrypted.
    pub ciphers: Vec<Cipher>,
    /// What keeps others off them.
    pub image_locks: Vec<Arc<ImageLock>>,
}

/// What went wrong so far, which the disk that takes this one's place has to know.
#[derive(Default)]
struct Told {
    durability: Arc<Durability>,
    refusals: Arc<Refusals>,
}

/// A frozen layer.
struct Below {
    cipher: Cipher,
    /// How many sectors it has; it may be shorter than the volume.
    sectors: u64,
}

impl Disk {
    /// A disk of one layer in `backing`; no `cipher` means an unencrypted volume. `serial` is cut to 20
    /// bytes, as virtio has it.
    pub fn new(
        shape: Shape,
        serial: &str,
        backing: Box<dyn Backing>,
        cipher: Option<Box<dyn SectorCipher>>,
        image_lock: ImageLock,
    ) -> Self {
        Disk {
            shape,
            serial: padded(serial),
            backing: backing.into(),
            cipher: cipher.map(Arc::from),
            below: Vec::new(),
            map: None,
            fence: None,
            leaving: 0,
            _image_locks: vec![Arc::new(image_lock)],
            durability: Arc::default(),
            refusals: Arc::default(),
        }
    }

    /// A disk of several layers, or of one.
    ///
    /// # Errors
    /// `InvalidInput` if such layers cannot be served: more than [`MAX_HEIGHT`], one below the top that is
    /// not whole blocks long, or one without a cipher above another, in which zeros could not be kept.
    pub fn layered(shape: Shape, serial: &str, layers: Layers) -> io::Result<Self> {
        Self::over(shape, padded(serial), layers, None, Told::default())
    }

    /// This volume when its top is frozen and `layers` has a new, empty one above it; nothing of it is
    /// hydrated any more unless that [is said](Disk::hydrating_lowest). The volume's queues must be held
    /// meanwhile, so that nothing is written through this disk any more.
    ///
    /// # Errors
    /// As for [`Disk::layered`], and if a hydration is still running.
    pub fn with_new_top(&self, layers: Layers) -> io::Result<Self> {
        self.check_not_hydrated()?;
        assert_eq!(layers.ciphers.len(), self.below.len() + 2, "one layer is new");
        Self::over(self.shape(), self.serial, layers, self.map.clone(), self.told())
    }

    /// This volume with the same layers, of which the lowest so many are going to be
    /// [hydrated](crate::disk::hydrate). The volume's queues must be held meanwhile.
    ///
    /// # Errors
    /// As for [`Disk::layered`], and if a hydration is still running.
    pub fn with_leaving_layers(&self, layers: Layers, leaving: usize) -> io::Result<Self> {
        self.check_not_hydrated()?;
        assert_eq!(layers.ciphers.len(), self.below.len() + 1, "the layers are the same");
        let next = Self::over(self.shape(), self.serial, layers, self.map.clone(), self.told());
        Ok(next?.hydrating_lowest(leaving))
    }

    /// This volume with other layers, or another size; nothing of it is hydrated any more unless that
    /// [is said](Disk::hydrating_lowest). The volume's queues must be held meanwhile.
    ///
    /// # Errors
    /// As for [`Disk::layered`], and if a hydration is still running.
    pub fn with_layers(&self, shape: Shape, layers: Layers) -> io::Result<Self> {
        self.check_not_hydrated()?;
        Self::over(shape, self.serial, layers, None, self.told())
    }

    fn over(
        shape: Shape,
        serial: [u8; ID_BYTES],
        layers: Layers,
        map: Option<Arc<LayerMap>>,
        Told { durability, refusals }: Told,
    ) -> io::Result<Self> {
        let Layers { backing, mut ciphers, image_locks } = layers;
        assert_eq!(ciphers.len(), backing.below().len() + 1, "every layer has its cipher, or none");
        check_layers(&shape, &ciphers, backing.below())?;
        let below = backing.below().iter().map(|len| len / SECTOR_SIZE).zip(ciphers.drain(1..));
        let below: Vec<_> = below.map(|(sectors, cipher)| Below { cipher, sectors }).collect();
        let map = match map {
            None if !below.is_empty() => Some(Arc::new(LayerMap::build(backing.clone())?)),
            map => map,
        };
        let cipher = ciphers.remove(0);
        Ok(Disk {
            shape,
            serial,
            backing,
            cipher,
            below,
            map,
            fence: None,
            leaving: 0,
            _image_locks: image_locks,
            durability,
            refusals,
        })
    }

    /// Has `hear` called, by a queue's thread, when a flush fails first: after that none succeeds. It must
    /// not take long.
    pub fn hear_of_failed_flush(&self, hear: impl Fn(&io::Error) + Send + Sync + 'static) {
        self.durability.hear(Box::new(hear));
    }

    /// Whether a flush has failed, after which none succeeds.
    pub fn has_failed_flush(&self) -> bool {
        self.durability.has_failed()
    }

    fn told(&self) -> Told {
        Told { durability: self.durability.clone(), refusals: self.refusals.clone() }
    }

    /// Has `hear` called, by a queue's thread, when a request fails for want of space: of the first, and then
    /// once in a while, with how many there were since the last time. It must not take long.
    pub fn hear_of_refusals(&self, hear: impl Fn(u64, &io::Error) + Send + Sync + 'static) {
        self.refusals.hear(Box::new(hear));
    }

    /// How many requests have failed for want of space, and when the last one did.
    pub fn refusals(&self) -> Option<(u64, Timestamp)> {
        self.refusals.known()
    }

    /// A request has failed.
    pub(crate) fn note_failure(&self, e: &io::Error) {
        self.refusals.note(e);
    }

    /// This disk, made to be [hydrated](crate::disk::hydrate) from all layers below the top. Call it
    /// before any queue is opened.
    pub fn hydrating(self) -> Self {
        let below = self.below.len();
        self.hydrating_lowest(below)
    }

    /// As [`Disk::hydrating`], from the lowest so many layers, which are below the top.
    pub fn hydrating_lowest(mut self, layers: usize) -> Self {
        assert!(layers <= self.below.len(), "the top stays");
        self.leaving = layers as u8;
        self.fence = (layers > 0).then(Arc::default);
        self
    }

    /// The height of the uppermost of the leaving layers; 0: there is none.
    pub(crate) fn leaving(&self) -> u8 {
        self.leaving
    }

    /// What a copy keeps queues out of its way with.
    pub(crate) fn fence(&self) -> Option<&Arc<Fence>> {
        self.fence.as_ref()
    }

    /// Nothing may be written into a layer that is being frozen, nor read from one that is being dropped.
    fn check_not_hydrated(&self) -> io::Result<()> {
        match &self.fence {
            Some(fence) if fence.is_taken() => Err(io::Error::other("its hydration was not stopped first")),
            _ => Ok(()),
        }
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The serial, padded with zero bytes.
    pub fn serial(&self) -> &[u8; ID_BYTES] {
        &self.serial
    }

    /// How it is reached and by which cipher engine, for the log.
    pub fn describe(&self) -> String {
        let engine =
            self.cipher.as_ref().map_or("not encrypted".into(), |c| format!("XTS engine {}", c.engine()));
        let layers = match self.below.len() {
            0 => String::new(),
            n => format!("; {} layers", n + 1),
        };
        format!("{}; {engine}{layers}", self.backing.caps().access)
    }

    /// How many layers there are, which is the top's height: the lowest has 1.
    pub(crate) fn height(&self) -> u8 {
        // At most MAX_HEIGHT.
        (self.below.len() + 1) as u8
    }

    fn cipher_at(&self, height: u8) -> &Cipher {
        match self.height() - height {
            0 => &self.cipher,
            n => &self.below[usize::from(n) - 1].cipher,
        }
    }

    /// How much space there is for what the top layer does not have yet; none where that is not limited, or
    /// not known.
    pub(crate) fn space(&self) -> io::Result<Option<Space>> {
        self.backing.space()
    }

    /// Which layers may have what; none for a disk of one layer.
    pub fn map(&self) -> Option<&Arc<LayerMap>> {
        self.map.as_ref()
    }

    /// What a thread can wait with whose queue is to have at most `depth` operations in flight.
    ///
    /// # Errors
    /// Those of [`crate::reactor::Uring::new`].
    pub fn reactor(&self, depth: u16) -> io::Result<Rc<dyn Reactor>> {
        self.backing.reactor(depth)
    }

    /// A way to the disk for at most `depth` operations at a time, and a reactor for it alone.
    pub fn open_queue(self: &Arc<Self>, depth: u16) -> io::Result<DiskQueue> {
        self.open_queue_by(&self.reactor(depth)?, depth)
    }

    /// A way to the disk for at most `depth` operations at a time, for the thread whose `reactor` is.
    pub fn open_queue_by(self: &Arc<Self>, reactor: &Rc<dyn Reactor>, depth: u16) -> io::Result<DiskQueue> {
        DiskQueue::open(self, reactor, depth, self.fence.as_ref())
    }

    /// Opens a queue for whoever copies up: it does not wait for the copy to leave a range,
    /// since the copy is its own.
    pub(crate) fn open_free_queue(self: &Arc<Self>, depth: u16) -> io::Result<DiskQueue> {
        DiskQueue::open(self, &self.reactor(depth)?, depth, None)
    }

    /// Makes everything written durable, by the calling thread.
    pub fn flush(self: &Arc<Self>) -> io::Result<()> {
        self.open_free_queue(1)?.flush_and_wait()
    }
}

fn padded(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    for (to, from) in id.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    id
}

/// Whether such layers can be served.
fn check_layers(shape: &Shape, ciphers: &[Cipher], below: &[u64]) -> io::Result<()> {
    let refuse = |message: String| Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    if ciphers.len() > MAX_HEIGHT {
        return refuse(format!("{} layers; at most {MAX_HEIGHT} can be served: flatten it", ciphers.len()));
    }
    let block = u64::from(shape.block_size);
    if let Some(len) = below.iter().find(|&len| len % block != 0) {
        return refuse(format!("a layer of {len} bytes, which are not whole blocks of {block} bytes"));
    }
    // Zeros mean "not in this layer": what is above another must have a way to write zeros that are none.
    if ciphers[..ciphers.len() - 1].iter().any(Option::is_none) {
        return refuse("a layer without a key lies above another; only the lowest can be without".into());
    }
    Ok(())
}
