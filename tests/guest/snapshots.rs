//! Snapshots of a disk that a Linux guest writes to and verifies, and a clone that boots beside the original:
//! each snapshot holds what the guest had flushed, and nobody notices anything of the other.

use crate::common::guest::Guest;
use crate::common::store::{Attached, Store};
use crate::under_load;
use serde_json::Value;

/// How many snapshots are made under load.
const SNAPSHOTS: u32 = 5;

/// What a guest must find on a disk as it was after snapshot number `n`; its journal is gone through first.
fn expect_state(guest: &mut Guest, disk: &str, n: u32) {
    guest.ok(&format!(
        "mkdir -p /tmp/disk && mount {disk} /tmp/disk
         [ \"$(cat /tmp/disk/state)\" = 'after {n}' ]
         ! [ -e /tmp/disk/later ]
         (cd /tmp/disk && sha256sum -c sums)
         umount /tmp/disk && e2fsck -fn {disk}"
    ));
}

#[test]
fn snapshots_under_load_and_a_clone_beside_the_original() {
    let store = Store::new();
    let (attached, mut guest) = under_load(&store);
    for n in 1..=SNAPSHOTS {
        // Flushed before the snapshot begins: it is in it. What comes later is not.
        guest.ok(&format!(
            "rm -f /mnt/later
             echo 'after {n}' >/mnt/state
             head -c 300001 /dev/urandom >/mnt/random.{n}
             (cd /mnt && sha256sum state random.* >sums)
             sync"
        ));
        attached.more_load();
        let made = store.ok(&["snapshot", "create", "t", "--name", &format!("s{n}"), "--json"]);
        let made: Value = serde_json::from_str(&made).expect("JSON");
        assert!(made["pause_us"].as_u64().is_some_and(|us| us > 0), "{made}");
        guest.ok("echo too late >/mnt/later; echo wrong >/mnt/state; sync");
    }
    attached.more_load();

    // The original goes on under load while a clone of its past boots beside it, and is written to.
    let middle = SNAPSHOTS / 2 + 1;
    store.ok(&[
        "volume",
        "create",
        "--snapshot",
        &format!("s{middle}"),
        "--name",
        "clone",
        "--size",
        "256MiB",
    ]);
    let beside = store.attach("clone", &["--queues", "2"]);
    let mut other = Guest::builder().disk(beside.socket()).queues(2).boot();
    expect_state(&mut other, "/dev/vda", middle);
    other.ok(
        "[ $(blockdev --getsize64 /dev/vda) = $((256 << 20)) ]
         mount /dev/vda /mnt && rm -r /mnt/load && head -c 20000000 /dev/zero >/mnt/of-the-clone && umount /mnt
         e2fsck -fn /dev/vda",
    );
    guest.more_load();
    guest.stop_fio();
    guest.ok("! [ -e /mnt/of-the-clone ]; umount /mnt; e2fsck -fn /dev/vda");
    guest.shutdown();
    attached.detach();
    other.shutdown();
    beside.detach();

    // Each snapshot is what it was, whatever was written above it since.
    let names: Vec<_> = (1..=SNAPSHOTS).map(|n| format!("of-s{n}")).collect();
    let mut builder = Guest::builder();
    let mut hosts = Vec::new();
    for (n, name) in (1..=SNAPSHOTS).zip(&names) {
        store.ok(&["volume", "create", "--snapshot", &format!("s{n}"), "--name", name]);
        hosts.push(store.attach(name, &["--queues", "2"]));
        builder = builder.disk(hosts[hosts.len() - 1].socket());
    }
    let mut reader = builder.queues(2).boot();
    for (n, disk) in (1..=SNAPSHOTS).zip('a'..) {
        expect_state(&mut reader, &format!("/dev/vd{disk}"), n);
    }
    reader.shutdown();
    hosts.into_iter().for_each(Attached::detach);
}
