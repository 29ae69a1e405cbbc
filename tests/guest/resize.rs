//! A Linux guest sees its disk grow.

use crate::common::attach::Place;
use crate::common::guest::Guest;
use serde_json::Value;

/// The volume's size at first, and then.
const SMALL: u64 = 8 << 20;
const LARGE: u64 = 24 << 20;

#[test]
fn a_linux_guest_under_qemu_sees_its_disk_grow() {
    let place = Place::new(&[]);
    let host = place.attach(&["--queues", "2"]);
    let mut guest = Guest::builder().disk(place.socket()).queues(2).boot();
    assert_eq!(guest.ok("blockdev --getsize64 /dev/vda").trim(), SMALL.to_string());
    guest.ok("mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; echo before >/mnt/file; sync");
    let grown = place.store.ok(&["volume", "resize", "t", &LARGE.to_string(), "--json"]);
    let grown: Value = serde_json::from_str(&grown).expect("JSON");
    // "sent" where QEMU acknowledges it later than the host process waits for that.
    assert!(["confirmed", "sent"].contains(&grown["vmm"].as_str().unwrap_or_default()), "{grown}");
    guest.wait_for(
        "the disk is larger",
        &format!("blockdev --getsize64 /dev/vda | tee /dev/stderr | grep -qx {LARGE}"),
    );
    let last = LARGE / 4096 - 1;
    guest.ok(&format!(
        "head -c 4096 /dev/urandom >/tmp/block
         dd if=/tmp/block of=/dev/vda bs=4096 seek={last} oflag=direct status=none
         dd if=/dev/vda bs=4096 skip={last} iflag=direct status=none | cmp - /tmp/block
         cat /mnt/file; umount /mnt; e2fsck -fn /dev/vda"
    ));
    guest.shutdown();
    host.end();
}
