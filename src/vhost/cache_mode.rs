//! Whether writes must be durable when they complete: what the driver agreed to, and what
//! it has chosen since.

use crate::virtio::features;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The cache mode of one session.
#[derive(Default)]
pub struct CacheMode {
    /// Virtio features that were acknowledged.
    acked: AtomicU64,
    /// The `writeback` byte of the configuration space, which is the device's.
    writeback: Arc<AtomicBool>,
    /// What follows; the queues' threads look at it.
    durable: Arc<AtomicBool>,
}

impl CacheMode {
    /// For a device with that `writeback` byte. Until features are acknowledged, no driver
    /// has promised to flush.
    pub fn new(writeback: Arc<AtomicBool>) -> Self {
        let mode = CacheMode { writeback, ..CacheMode::default() };
        mode.decide();
        mode
    }

    /// The driver has acknowledged `features`.
    pub fn acked(&self, features: u64) {
        self.acked.store(features, Ordering::Relaxed);
        self.decide();
    }

    /// Looks again: the `writeback` byte may have changed.
    pub fn decide(&self) {
        let durable = features::write_through(
            self.acked.load(Ordering::Relaxed),
            self.writeback.load(Ordering::Relaxed),
        );
        if self.durable.swap(durable, Ordering::AcqRel) != durable {
            log::debug!("writes are {} at completion", if durable { "durable" } else { "cached" });
        }
    }

    /// Whether writes must be durable; changes while rings run.
    pub fn durable(&self) -> &Arc<AtomicBool> {
        &self.durable
    }
}
