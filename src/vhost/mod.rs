//! vhost-user: the VMM's protocol, and the threads that serve its rings.
//!
//! ```text
//! VMM ── gate ── vhost-user crate ── device, vring ──► queue: ring ─► virtio::parse ─► disk
//! ```
//!
//! It knows a volume only as a [`Disk`](crate::disk::Disk). Both sides of the sockets are hostile: the
//! gate checks what the VMM says, `virtio` what the guest writes.

pub mod boundary;
pub mod cache_mode;
pub mod device;
pub mod dirty;
pub mod gate;
pub mod listener;
pub mod pause;
pub mod queue;
pub mod session;
mod shared;
pub mod tenure;
pub mod vring;
