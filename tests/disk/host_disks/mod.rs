//! Volumes on disks whose blocks are as large as their sectors, or larger: everything that makes a layer
//! that is written, and unaligned requests of several queues on it, through the program and on file
//! systems of the test's own.

mod images;
mod linux;
mod memory;
pub mod rig;
mod tops;
