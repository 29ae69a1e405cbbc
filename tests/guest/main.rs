//! Encrypted volumes under real Linux guests, which must take them for ordinary disks.
//!
//! The guests are Debian's cloud kernel under QEMU; `./ci/setup` makes what they need.

#[path = "../common/mod.rs"]
mod common;
mod disk;
mod import;
mod lazy;
mod migration;
mod recovery;
mod resize;
mod snapshots;
mod upgrade;

use common::guest::Guest;
use common::store::{Attached, Store};

/// A volume `t` of 192 MiB, attached, and a guest whose fio writes, reads and verifies on
/// a file system on it.
fn under_load(store: &Store) -> (Attached<'_>, Guest) {
    store.ok(&["volume", "create", "--size", "192MiB", "--name", "t"]);
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).boot();
    guest.ok("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && mkdir /mnt/load");
    guest.start_fio("/mnt/load");
    (attached, guest)
}
