//! What vhost-user-backend asks of a device: its features, its configuration space, and to take note of changes.

use super::dirty::{DirtyLog, GuestMemory};
use super::session::Inlet;
use super::vring::{Rings, Vring};
use super::worker::Worker;
use crate::virtio::config_space::{ConfigSpace, writeback_written};
use crate::virtio::features;
use crate::volume::io::Disk;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::epoll::EventSet;

/// An attached volume as a virtio device: what lasts from one VMM's connection to the next.
pub struct Device {
    /// The volume: what the queues serve. Locked while they are paused.
    pub disk: Mutex<Arc<Disk>>,
    /// Where sessions get their inner sockets.
    pub inlet: Inlet,
    /// One thread a queue.
    pub workers: Arc<[Worker]>,
    /// What the configuration space shows.
    pub config: ConfigSpace,
    /// Most entries of a ring: a power of two, 2..=1024.
    pub queue_size: u16,
    /// The `writeback` byte of the configuration space. It outlives connections: a VMM that comes back does not
    /// repeat what its guest chose, and a guest that chose write-through sends no flushes.
    pub writeback: AtomicBool,
}

/// The device during one connection.
#[derive(Clone)]
pub struct Backend(Arc<Session>);

struct Session {
    device: Arc<Device>,
    rings: Arc<Rings>,
    acked: AtomicU64,
    /// What follows for writes from that and the features; the queues' threads look at it.
    write_through: Arc<AtomicBool>,
}

impl Backend {
    /// A fresh session of `device`.
    pub fn new(device: Arc<Device>) -> Self {
        // Until features are acknowledged, no driver has promised to flush.
        let write_through = Arc::new(AtomicBool::new(true));
        let rings = Rings::new(device.workers.clone(), write_through.clone());
        Backend(Arc::new(Session { device, rings, acked: AtomicU64::new(0), write_through }))
    }

    /// The session's rings.
    pub fn rings(&self) -> &Arc<Rings> {
        &self.0.rings
    }
}

impl Session {
    fn update_write_through(&self) {
        let durable = features::write_through(
            self.acked.load(Ordering::Relaxed),
            self.device.writeback.load(Ordering::Relaxed),
        );
        if self.write_through.swap(durable, Ordering::AcqRel) != durable {
            log::debug!("writes are {} at completion", if durable { "durable" } else { "cached" });
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = DirtyLog;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.0.device.workers.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.0.device.queue_size)
    }

    fn features(&self) -> u64 {
        features::offered(self.0.device.config.geometry.read_only)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.0.acked.store(features, Ordering::Relaxed);
        self.0.update_write_through();
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.0.device.writeback.store(true, Ordering::Relaxed);
        self.acked_features(0);
    }

    // The rings were told one by one.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let writeback = self.0.device.writeback.load(Ordering::Relaxed);
        // An empty answer is the protocol's way to say that the range is not there.
        self.0.device.config.read(offset, size, writeback).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        if let Some(writeback) = writeback_written(offset, bytes) {
            self.0.device.writeback.store(writeback, Ordering::Relaxed);
            self.0.update_write_through();
        }
        Ok(())
    }

    fn update_memory(&self, _mem: GuestMemoryAtomic<GuestMemory>) -> io::Result<()> {
        // Rings that run hold the old memory: they are drained before it may go.
        self.0.rings.restart();
        Ok(())
    }

    /// No threads of the crate: the rings have their own.
    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(&self, _: u16, _: EventSet, _: &[Vring], _: usize) -> io::Result<()> {
        Err(io::Error::other("the crate's event loop has no threads"))
    }
}
