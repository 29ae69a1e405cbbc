//! Volumes from disk images and back, from outside: through the program, with images that
//! QEMU's own tools made.

#[path = "../common/mod.rs"]
mod common;
mod copied;
mod crash;
mod device;
mod export;
mod foreign;
#[cfg(feature = "qcow2")]
mod hostile;
mod in_place;
#[cfg(feature = "qcow2")]
mod qcow2;
mod rig;
mod stream;
