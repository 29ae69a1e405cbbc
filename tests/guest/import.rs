//! Disks of a real Linux guest that become encrypted volumes: as a compressed qcow2 image,
//! and where they lie.

use crate::common::guest::{CHECK_FILES, Guest, MAKE_FILES};
use crate::common::patience::{guest_limit, wait_for_within};
use crate::common::process::tool;
use crate::common::store::Store;
use serde_json::Value;
use std::fs::File;

#[test]
#[cfg_attr(not(feature = "qcow2"), ignore = "it needs the feature qcow2")]
fn a_guest_finds_its_files_on_the_encrypted_volume_that_its_disk_became() {
    let store = Store::new();
    let folder = store.root().parent().expect("it lies in a folder").to_owned();
    let (raw, qcow2) = (folder.join("disk.img"), folder.join("disk.qcow2"));
    File::create(&raw).and_then(|file| file.set_len(128 << 20)).expect("make a disk");
    let mut guest = Guest::builder().plain_disk(&raw).boot();
    let files = guest.ok(MAKE_FILES);
    guest.ok("umount /mnt");
    guest.shutdown();
    let mut convert = tool("qemu-img");
    convert.args(["convert", "-c", "-f", "raw", "-O", "qcow2"]).args([&raw, &qcow2]);
    assert!(convert.status().expect("start qemu-img").success());
    let (raw, qcow2) = (raw.display().to_string(), qcow2.display().to_string());
    store.ok(&["volume", "import", &qcow2, "--name", "copied", "--size", "160MiB"]);
    store.ok(&["volume", "import", &raw, "--in-place", "--name", "taken"]);

    let (copied, taken) =
        (store.attach("copied", &["--queues", "2"]), store.attach("taken", &["--queues", "2"]));
    let mut guest = Guest::builder().disk(copied.socket()).disk(taken.socket()).boot();
    assert_eq!(guest.ok("blockdev --getsize64 /dev/vda").trim(), (160 << 20).to_string());
    for disk in ["/dev/vda", "/dev/vdb"] {
        guest.ok(&format!("e2fsck -fn {disk}; mount {disk} /mnt"));
        assert_eq!(guest.ok(CHECK_FILES), files, "{disk}");
        // What is written now covers what was there.
        guest.ok("cd /mnt && seq 1 80000 >numbers && rm -r many && sync");
        guest.ok(&format!("umount /mnt; e2fsck -fn {disk}"));
    }
    guest.shutdown();
    copied.detach();
    taken.detach();

    let (copied, taken) =
        (store.attach("copied", &["--queues", "2"]), store.attach("taken", &["--queues", "2"]));
    let mut guest = Guest::builder().disk(copied.socket()).disk(taken.socket()).boot();
    for disk in ["/dev/vda", "/dev/vdb"] {
        guest.ok(&format!("e2fsck -fn {disk}; mount {disk} /mnt; seq 1 80000 | cmp - /mnt/numbers"));
        guest.ok("test ! -e /mnt/many; umount /mnt");
    }
    guest.shutdown();
    copied.detach();
    taken.detach();
}

/// What `volume show` says of the volume.
fn show(store: &Store, volume: &str) -> Value {
    serde_json::from_str(&store.ok(&["volume", "show", volume, "--json"])).expect("JSON")
}

#[test]
fn an_image_is_encrypted_where_it_lies_while_its_guest_works_on_it() {
    const MARK: &str = "words that only plaintext has";
    let store = Store::new();
    let raw = store.root().parent().expect("it lies in a folder").join("disk.img");
    File::create(&raw).and_then(|file| file.set_len(192 << 20)).expect("make a disk");
    let mut guest = Guest::builder().plain_disk(&raw).boot();
    let files = guest.ok(MAKE_FILES);
    guest.ok(&format!(
        "mkdir /mnt/load; for i in $(seq 30000); do echo '{MARK}' $i; done \
         >/mnt/marked; umount /mnt"
    ));
    guest.shutdown();
    let image = std::fs::read(&raw).expect("read the image");
    assert!(image.windows(MARK.len()).any(|found| found == MARK.as_bytes()));
    store.ok(&["volume", "import", &raw.display().to_string(), "--in-place", "--name", "taken"]);

    // Nothing is copied yet when the guest begins.
    let attached = store.attach("taken", &["--queues", "2", "--hydrate-rate", "1"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).boot();
    guest.ok("mount /dev/vda /mnt");
    guest.start_fio("/mnt/load");
    assert_eq!(show(&store, "taken")["layers"].as_array().expect("its layers").len(), 2);
    // So slowly that the load goes on beside it, and then as fast as is usual.
    store.ok(&["throttle", "taken", "--hydrate-rate", "1MiB"]);
    guest.more_load();
    store.ok(&["throttle", "taken", "--hydrate-rate", "32MiB"]);
    wait_for_within(guest_limit(), "everything is encrypted", || match show(&store, "taken") {
        shown if shown["layers"].as_array().is_some_and(|layers| layers.len() == 1) => Ok(()),
        shown => Err(format!("{shown}; the host process said: {}", attached.output())),
    });
    guest.more_load();
    guest.stop_fio();
    assert_eq!(guest.ok(CHECK_FILES), files);
    guest.ok("umount /mnt; e2fsck -fn /dev/vda");
    guest.shutdown();
    attached.detach();
    assert!(!raw.exists());
    let layer = std::fs::read(store.only_layer()).expect("read the layer");
    assert!(
        !layer.windows(MARK.len()).any(|found| found == MARK.as_bytes()),
        "plaintext is left in the layer"
    );
}
