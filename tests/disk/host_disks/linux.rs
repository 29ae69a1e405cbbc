//! A Linux guest whose disk lies on one with larger blocks: it makes a file system, and its journal
//! goes on over a snapshot.

use crate::common::guest::Guest;
use crate::common::loop_disk::{Kind, LoopDisk};
use crate::common::store::Store;

#[test]
fn a_guest_makes_a_file_system_mounts_it_and_goes_on_over_a_snapshot() {
    let store = Store::new();
    let kind = Kind { block: 4096, file_system: "ext4" };
    let Some(_disk) = LoopDisk::mount(kind, store.root().parent().unwrap()) else { return };
    store.ok(&["volume", "create", "--size", "64MiB", "--name", "t"]);
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).boot();
    // Blocks of 1024 bytes, which are parts of the disk's.
    guest.ok("mkfs.ext4 -q -b 1024 /dev/vda && mount /dev/vda /mnt && head -c 3000001 /dev/urandom >/mnt/a \
              && sync");
    for n in 1..=2 {
        store.ok(&["snapshot", "create", "t"]);
        guest.ok(&format!(
            "cp /mnt/a /mnt/b.{n} && sync && echo 3 >/proc/sys/vm/drop_caches && cmp /mnt/a /mnt/b.{n} && rm \
             /mnt/b.{n}"
        ));
    }
    store.ok(&["volume", "flatten", "t", "--follow"]);
    guest
        .ok("umount /mnt && e2fsck -fn /dev/vda && mount /dev/vda /mnt && [ $(stat -c %s /mnt/a) = 3000001 \
              ] && umount /mnt");
    guest.shutdown();
    attached.detach();
    // What the guest has on it is whole at the next attach, too.
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).boot();
    guest.ok("e2fsck -fn /dev/vda");
    guest.shutdown();
    attached.detach();
}
