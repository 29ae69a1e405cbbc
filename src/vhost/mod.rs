//! vhost-user: the VMM's protocol, and the threads that serve its rings.
//!
//! ```text
//! VMM ── gate ── vhost-user crate ── backend, vring ──► worker: ring ─► virtio::parse ─► volume::io
//! ```
//!
//! It knows a volume only as a [`Disk`](crate::volume::io::Disk). Both sides of the sockets are hostile: the
//! gate checks what the VMM says, `virtio` what the guest writes.

pub mod backend;
pub mod dirty;
pub mod gate;
pub mod inflight;
pub mod pause;
pub mod poll;
pub mod qos;
pub mod ring;
pub mod server;
pub mod session;
pub mod vring;
pub mod worker;
