//! What is in flight survives the host process: it is killed at any moment, another takes its place at the
//! same socket, and the front-end goes on as QEMU or as cloud-hypervisor does.

mod crafted;
mod kills;
mod regions;
pub mod rig;
