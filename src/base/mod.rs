//! What every room needs: errors, where a store lies and how its files are changed durably, points in time.
//!
//! Knows nothing of what the other modules are about.

pub(crate) mod child;
pub mod error;
pub mod hardened;
mod locality;
pub mod locks;
pub(crate) mod log_fields;
pub mod plural;
pub(crate) mod prefetch;
pub mod printable;
pub mod root;
pub mod size;
pub mod space;
pub(crate) mod spare;
pub(crate) mod sync;
mod timestamp;
pub(crate) mod wait;
pub(crate) mod wire;
pub(crate) mod zeros;

pub use error::{Context, Error, Kind, Result};
pub use locality::Locality;
pub use timestamp::Timestamp;

/// The largest disk in bytes: what a file offset can say, in whole sectors of any size.
pub const MAX_DISK_SIZE: u64 = (1 << 63) - 4096;
