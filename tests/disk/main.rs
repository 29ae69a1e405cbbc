//! The path of the data: the cipher, what lies on the disk, and volumes of several layers.

mod ciphertext;
#[path = "../common/mod.rs"]
mod common;
mod devices;
mod host_disks;
mod layers;
mod nbd;
mod rbd;
mod xts_vectors;
