//! Volumes and snapshots: what they are called, what is known of them, who has one, how one is made and deleted.
//!
//! May assume: a local file system with OFD locks, atomic rename and fsync. Must not know:
//! sockets, VMMs. The bytes of `volume.json` and of the folders around it are described in `docs/format.md`.
#![forbid(unsafe_code)]

pub mod catalog;
pub mod copy;
pub mod export;
pub mod freeze;
pub mod from_snapshot;
pub mod gc;
pub mod hydrate;
pub mod hydrated;
pub mod id;
pub mod image;
pub mod image_lock;
pub mod import;
pub mod in_place;
pub mod io;
pub mod layers;
pub mod layout;
pub mod lifecycle;
pub mod lock;
pub mod map;
pub mod metadata;
mod pending;
mod references;
pub mod rekey;
pub mod resize;
pub mod rewrap;
pub mod seal;
pub mod shred;
pub mod snapshot;
pub mod tags;
mod transfer;

pub use catalog::Catalog;
pub use id::{LayerId, SnapshotId, VolumeId};
pub use metadata::Metadata;
pub use seal::Seal;
pub use snapshot::Snapshot;
