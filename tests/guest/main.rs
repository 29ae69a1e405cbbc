//! Encrypted volumes under real Linux guests, which must take them for ordinary disks.
//!
//! The guests are Debian's cloud kernel under QEMU; `./ci/setup` makes what they need.

#[path = "../common/mod.rs"]
mod common;
mod disk;
mod import;
mod migration;
mod recovery;
mod resize;
mod snapshots;
mod upgrade;
