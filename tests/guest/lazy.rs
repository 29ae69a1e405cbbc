//! A guest boots from a volume that is still coming from a place outside: its programs, and what fio
//! verifies, come as they are read.

use crate::common::guest::Guest;
use crate::common::patience::{guest_limit, wait_for_within};
use crate::common::store::Store;
use serde_json::{Value, json};
use std::fs;

/// Instead of the guest's own beginning: goes on with what is on the disk.
const FROM_DISK: &str = "rdinit=/bin/busybox -- sh -c \"\
    /bin/busybox mkdir -p /proc /sys /dev /disk /sbin /usr/bin /usr/sbin; /bin/busybox --install -s; \
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; \
    while read -r module; do modprobe $module; done </etc/modules; \
    until [ -b /dev/vda ]; do sleep 0.1; done; \
    mount -t ext4 /dev/vda /disk; exec switch_root /disk /init\"";

/// All that the guest has in memory goes to the disk, with checksums.
const COPY: &str = "
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    for name in /*; do
        case $name in
            /proc | /sys | /dev | /run | /tmp | /mnt) mkdir -p /mnt$name ;;
            /lost+found) ;;
            *) cp -a $name /mnt/ ;;
        esac
    done
    mkdir -p /mnt/load
    head -c 20000000 /dev/urandom >/mnt/random
    cd /mnt && find . -xdev -type f -print0 | xargs -0 sha256sum >/tmp/sums && cp /tmp/sums sums
    cd / && umount /mnt
";

fn json(store: &Store, arguments: &[&str]) -> Value {
    serde_json::from_str(&store.ok(&[arguments, &["--json"]].concat())).expect("JSON")
}

/// What the host process says of what is to come.
fn coming(store: &Store) -> Value {
    json(store, &["volume", "show", "root"])["attachment"]["coming"].clone()
}

#[test]
fn a_guest_boots_from_a_volume_that_is_still_coming() {
    let store = Store::new();
    store.ok(&["volume", "create", "--size", "384MiB", "--name", "t"]);
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    guest.ok(COPY);
    guest.shutdown();
    attached.detach();
    let place = store.root().parent().expect("it lies in a folder").join("place");
    fs::create_dir(&place).expect("make a folder");
    let url = format!("file://{}", place.display());
    store.ok(&["snapshot", "create", "t", "--name", "image"]);
    store.ok(&["snapshot", "push", "image", &url]);
    store.ok(&["snapshot", "delete", "image"]);
    store.ok(&["volume", "delete", "t"]);

    // Nothing comes but what is read.
    store.ok(&["snapshot", "pull", &url, "--name", "s", "--lazy", "--limit", "1"]);
    store.ok(&["volume", "create", "--snapshot", "s", "--name", "root"]);
    let attached = store.attach("root", &["--queues", "2", "--source-patience", "3600"]);
    let mut guest = Guest::builder().disk(attached.socket()).env("APPEND", FROM_DISK).boot();
    guest.ok("grep -q '^/dev/vda / ext4 ' /proc/mounts");
    guest.start_fio("/load");
    let found = coming(&store);
    assert!(found["come"].as_u64() < found["all"].as_u64(), "it has not all come: {found}");
    guest.more_load();

    // The place is away while the guest reads what has not come: it waits, and sees no error.
    let elsewhere = place.with_extension("elsewhere");
    fs::rename(&place, &elsewhere).expect("take the place away");
    guest.start("cd / && sha256sum -c /sums >/tmp/checked");
    wait_for_within(guest_limit(), "the guest waits", || match coming(&store) {
        found if found["waiting"].as_u64() > Some(0) && found["away"].is_string() => Ok(()),
        found => Err(found),
    });
    fs::rename(&elsewhere, &place).expect("bring the place back");
    let checked = guest.finish();
    assert_eq!(checked.status, 0, "{}", checked.stdout);
    guest.more_load();

    // The rest comes while the guest goes on, and then the place is not needed any more.
    store.ok(&["snapshot", "complete", "s"]);
    assert_eq!(json(&store, &["snapshot", "show", "s"])["state"], json!("completed"));
    fs::remove_dir_all(&place).expect("remove the place");
    guest.more_load();
    guest.stop_fio();
    guest.ok("echo 3 >/proc/sys/vm/drop_caches; cd / && sha256sum -c /sums >/tmp/checked");
    assert_eq!(coming(&store)["failed"], json!(0));
    guest.ok("sync; mount -o remount,ro /");
    guest.shutdown();
    attached.detach();

    let attached = store.attach("root", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    guest.ok("e2fsck -fn /dev/vda");
    guest.shutdown();
    attached.detach();
}
