//! Volumes from disk images and back, from outside: through the program, with images that QEMU's own tools made.

#[path = "../common/attach.rs"]
mod attach;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/content.rs"]
mod content;
mod copied;
mod crash;
mod export;
mod hostile;
mod in_place;
#[path = "../common/killed.rs"]
mod killed;
#[path = "../common/process.rs"]
mod process;
mod qcow2;
mod rig;
#[path = "../common/store.rs"]
mod store;
