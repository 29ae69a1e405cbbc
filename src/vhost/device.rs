//! What vhost-user-backend asks of a device: its features, its configuration space, and to
//! take note of changes.

use crate::vhost::boundary::Boundary;
use crate::vhost::cache_mode::CacheMode;
use crate::vhost::dirty::GuestMemory;
use crate::vhost::gate::Channel;
use crate::vhost::session::{Farewell, Inlet};
use crate::vhost::tenure::Tenure;
use crate::vhost::vring::{Rings, Vring};
use crate::virtio::config_space::{ConfigSpace, writeback_written};
use crate::virtio::{SharedShape, features};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::epoll::EventSet;

/// The most memory regions that a VMM may share: as many as the vhost-user crate takes.
pub const MAX_MEMORY_REGIONS: u16 = 509;

/// An attached volume as a virtio device: what lasts from one VMM's connection to the next.
pub struct Device {
    /// Who may serve the volume, and by which threads.
    pub tenure: Arc<dyn Tenure>,
    /// The disk's shape.
    pub shape: Arc<SharedShape>,
    /// Where sessions get their inner sockets.
    pub inlet: Inlet,
    /// The connected VMM's own channel.
    pub channel: Arc<Channel>,
    /// Request queues that the driver may use, 1..=64.
    pub queues: u16,
    /// Most data segments in a request.
    pub seg_max: u32,
    /// Most entries of a ring: a power of two, 2..=1024.
    pub queue_size: u16,
    /// Most memory regions that a VMM may share, each with a descriptor of its own: at most
    /// [`MAX_MEMORY_REGIONS`].
    pub memory_regions: u16,
    /// Where something is done with the session between two of the VMM's messages.
    pub boundary: Arc<Boundary>,
    /// The `writeback` byte of the configuration space. It outlives connections: a VMM that comes back does
    /// not repeat what its guest chose, and a guest that chose write-through sends no flushes.
    pub writeback: Arc<AtomicBool>,
}

impl Device {
    fn config(&self) -> ConfigSpace {
        ConfigSpace { shape: self.shape.now(), queues: self.queues, seg_max: self.seg_max }
    }
}

/// The device during one connection.
#[derive(Clone)]
pub struct Backend(Arc<Session>);

struct Session {
    device: Arc<Device>,
    rings: Arc<Rings>,
    cache_mode: Arc<CacheMode>,
    /// What the crate's thread leaves behind for the gate when it ends.
    farewell: Farewell,
}

impl Backend {
    /// A fresh session of `device`. `farewell` comes when the thread ends on which the crate calls.
    pub fn new(device: Arc<Device>, farewell: Farewell) -> Self {
        let cache_mode = Arc::new(CacheMode::new(device.writeback.clone()));
        let rings = Rings::new(device.tenure.clone(), device.queues.into(), cache_mode.clone());
        Backend(Arc::new(Session { device, rings, cache_mode, farewell }))
    }

    /// The session's rings.
    pub fn rings(&self) -> &Arc<Rings> {
        &self.0.rings
    }
}

impl Session {
    /// Sets the `writeback` byte.
    fn choose(&self, writeback: bool) {
        if self.device.writeback.swap(writeback, Ordering::Relaxed) != writeback {
            self.device.tenure.guest_chose(!writeback);
        }
        self.cache_mode.decide();
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.0.device.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.0.device.queue_size)
    }

    fn features(&self) -> u64 {
        // The first that the gate asks, on the thread that it then relies on.
        self.0.farewell.at_the_end_of_this_thread();
        features::offered(self.0.device.shape.now().read_only)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.0.cache_mode.acked(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.0.choose(true);
        self.acked_features(0);
    }

    // The rings were told one by one.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let writeback = self.0.device.writeback.load(Ordering::Relaxed);
        // An empty answer is the protocol's way to say that the range is not there.
        self.0.device.config().read(offset, size, writeback).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        if let Some(writeback) = writeback_written(offset, bytes) {
            self.0.choose(writeback);
        }
        Ok(())
    }

    fn update_memory(&self, mem: GuestMemoryAtomic<GuestMemory>) -> io::Result<()> {
        // Rings that run hold the old memory: where that is not a part of the new, they are drained before it
        // may go.
        self.0.rings.use_memory(&mem)
    }

    /// No threads of the crate: the rings have their own.
    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(&self, _: u16, _: EventSet, _: &[Vring], _: usize) -> io::Result<()> {
        Err(io::Error::other("the crate's event loop has no threads"))
    }
}
