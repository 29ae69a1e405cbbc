//! Encrypted volumes under a real Linux guest, which must take them for ordinary disks.

use crate::common::guest::{CHECK_FILES, Guest, MAKE_FILES};
use crate::common::loop_disk::BareDisk;
use crate::common::patience::AtEnd;
use crate::common::store::Store;
use base64::Engine;
use sealblk::base::root::Root;
use sealblk::catalog::Catalog;
use sealblk::kms::KeyProvider;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::SystemClock;
use serde_json::json;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// A store with one volume called `t`.
fn store_with_volume(sector_size: u32) -> Store {
    let store = Store::new();
    let sector_size = sector_size.to_string();
    store.ok(&["volume", "create", "--size", "256MiB", "--name", "t", "--sector-size", &sector_size]);
    store
}

/// Writes one file on /mnt again and again, each time to the disk.
const BUSY: &str = "while :; do head -c 100000 /dev/urandom >/mnt/busy; sync; done";

/// Random reads and writes of files on /mnt through both queues, every block verified.
const VERIFIED_LOAD: &str = "
    for size in 4k 16k 68k 256k; do
        fio --name=load --directory=/mnt --size=3M --numjobs=2 --rw=randrw --bs=$size --direct=1 \
            --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1 \
            --group_reporting --output=/tmp/fio || { cat /tmp/fio; exit 1; }
        rm /mnt/load.*
    done
";

fn encrypted_disk_behaves_as_an_ordinary_one(sector_size: u32) {
    let store = store_with_volume(sector_size);
    let attached = store.attach("t", &["--queues", "2", "--serial", "sealblk-guest-test-1"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).boot();

    assert_eq!(guest.ok("blockdev --getsize64 /dev/vda").trim(), (256 << 20).to_string());
    assert_eq!(guest.ok("blockdev --getss /dev/vda").trim(), sector_size.to_string());
    assert_eq!(guest.ok("cat /sys/block/vda/serial").trim(), "sealblk-guest-test-1");
    assert_eq!(guest.ok("ls /sys/block/vda/mq").split_whitespace().collect::<Vec<_>>(), ["0", "1"]);
    assert_eq!(guest.ok("cat /sys/block/vda/ro").trim(), "0");

    let files = guest.ok(MAKE_FILES);
    guest.ok(VERIFIED_LOAD);
    guest.ok("umount /mnt; e2fsck -fn /dev/vda");

    guest.reboot();
    guest.ok("mount /dev/vda /mnt");
    assert_eq!(guest.ok(CHECK_FILES), files, "after a hot reboot");
    guest.ok("umount /mnt; e2fsck -fn /dev/vda");
    guest.shutdown();
    attached.detach();

    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).boot();
    guest.ok("e2fsck -fn /dev/vda; mount /dev/vda /mnt");
    assert_eq!(guest.ok(CHECK_FILES), files, "after another attach");
    guest.ok("umount /mnt");
    guest.shutdown();
    attached.detach();
}

#[test]
fn a_disk_of_512_byte_sectors_behaves_as_an_ordinary_one() {
    encrypted_disk_behaves_as_an_ordinary_one(512);
}

#[test]
fn a_disk_of_4096_byte_sectors_behaves_as_an_ordinary_one() {
    encrypted_disk_behaves_as_an_ordinary_one(4096);
}

#[test]
fn a_guest_goes_on_while_its_volume_is_rekeyed_again_and_again() {
    let store = store_with_volume(512);
    store.ok(&["key", "create", "--alias", "alias/new"]);
    let attached = store.attach("t", &["--queues", "2", "--hydrate-rate", "16MiB"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).boot();
    let files = guest.ok(MAKE_FILES);
    let is_over = AtomicBool::new(false);
    let times = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let _end = AtEnd(&is_over);
        let rekeying = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                store.ok(&["volume", "rekey", "t", "--follow"]);
                times.fetch_add(1, Ordering::Relaxed);
            }
            store.ok(&["volume", "rekey", "t", "--key", "alias/new", "--follow"]);
        });
        // Once more, as long as it was not re-keyed twice meanwhile.
        while times.load(Ordering::Relaxed) < 2 && !rekeying.is_finished() {
            guest.ok(VERIFIED_LOAD);
        }
        is_over.store(true, Ordering::Relaxed);
        rekeying.join().expect("it is re-keyed");
    });
    assert_eq!(guest.ok(CHECK_FILES), files);
    guest.ok("umount /mnt; e2fsck -fn /dev/vda");
    guest.shutdown();
    attached.detach();
    store.only_layer();
    store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).boot();
    guest.ok("e2fsck -fn /dev/vda; mount /dev/vda /mnt");
    assert_eq!(guest.ok(CHECK_FILES), files, "under the new key");
    guest.ok("umount /mnt");
    guest.shutdown();
    attached.detach();
}

/// Fills 3 MiB with a byte that is not zero and keeps its checksum.
const FILL: &str = "
    tr '\\0' 'x' </dev/zero | head -c 3145728 >/tmp/full
    dd if=/tmp/full of=/dev/vda bs=1M oflag=direct status=none
    cmp -n 3145728 /dev/vda /tmp/full
";

/// The second of the three MiB reads as zeros, those around it as they were.
const SECOND_MIB_IS_ZERO: &str = "
    blockdev --flushbufs /dev/vda
    dd if=/dev/vda of=/tmp/now bs=1M count=3 iflag=direct status=none
    head -c 1048576 /dev/zero | dd of=/tmp/full bs=1M seek=1 conv=notrunc status=none
    cmp /tmp/now /tmp/full
";

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_leave_their_neighbours_alone() {
    let store = store_with_volume(512);
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    for command in ["blkdiscard", "blkdiscard --zeroout"] {
        guest.ok(FILL);
        guest.ok(&format!("{command} --offset 1048576 --length 1048576 /dev/vda"));
        guest.ok(SECOND_MIB_IS_ZERO);
    }
    guest.ok("blkdiscard /dev/vda; head -c 3145728 /dev/zero >/tmp/full; cmp -n 3145728 /dev/vda /tmp/full");
    let files = guest.ok(MAKE_FILES);
    guest.ok("rm -r /mnt/many; sync; fstrim -v /mnt; cd /; umount /mnt; e2fsck -fn /dev/vda");
    guest.ok("mount /dev/vda /mnt");
    let left = guest.ok("cd /mnt; sha256sum numbers random");
    assert!(files.starts_with(&left), "a trim damaged a file: {files}\n{left}");
}

#[test]
fn a_read_only_disk_is_readable_and_refuses_writes() {
    let store = store_with_volume(512);
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    let files = guest.ok(MAKE_FILES);
    guest.ok("umount /mnt");
    guest.shutdown();
    attached.detach();
    let layer = std::fs::read(store.only_layer()).expect("read the layer file");

    let attached = store.attach("t", &["--read-only", "--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    assert_eq!(guest.ok("cat /sys/block/vda/ro").trim(), "1");
    guest.refused("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct");
    guest.refused("blkdiscard --force /dev/vda");
    guest.refused("mount -o rw /dev/vda /mnt && touch /mnt/new");
    guest.ok("umount /mnt 2>/dev/null || true; mount -o ro /dev/vda /mnt");
    assert_eq!(guest.ok(CHECK_FILES), files);
    guest.ok("umount /mnt");
    guest.shutdown();
    attached.detach();
    assert!(std::fs::read(store.only_layer()).expect("read the layer file") == layer, "the layer changed");
}

#[test]
fn what_was_flushed_survives_a_crash_of_the_vmm_and_then_of_the_host_process() {
    let store = store_with_volume(512);
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    let files = guest.ok(&format!("{MAKE_FILES}\nsync"));
    guest.start(BUSY);
    attached.more_load();
    guest.kill();

    // The volume stays attached, and the next VMM finds it at once.
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    guest.ok("mount /dev/vda /mnt");
    assert_eq!(guest.ok(CHECK_FILES), files, "after a crash of the VMM");
    guest.ok("echo more >/mnt/more; sync");
    guest.start(BUSY);
    attached.more_load();
    attached.kill();
    guest.kill();

    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    guest.ok("mount /dev/vda /mnt");
    assert_eq!(guest.ok(CHECK_FILES), files, "after a crash of the host process");
    assert_eq!(guest.ok("cat /mnt/more"), "more\n");
    guest.ok("umount /mnt; e2fsck -fn /dev/vda");
}

#[test]
fn a_guest_under_load_can_be_paused_and_reset() {
    let store = store_with_volume(512);
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).boot();
    let files = guest.ok(&format!("{MAKE_FILES}\nsync"));
    guest.start_fio("/mnt");
    for _ in 0..5 {
        guest.more_load();
        guest.qmp("stop", json!({}));
        let layer = || std::fs::read(store.only_layer()).expect("read the layer file");
        assert!(layer() == layer(), "the disk changes while the guest is paused");
        guest.qmp("cont", json!({}));
    }
    guest.more_load();
    guest.stop_fio();

    guest.start(BUSY);
    attached.more_load();
    guest.qmp("system_reset", json!({}));
    guest.wait_ready();
    guest.ok("mount /dev/vda /mnt");
    assert_eq!(guest.ok(CHECK_FILES), files, "after a reset");
    guest.ok("umount /mnt; e2fsck -fn /dev/vda");
}

#[test]
fn a_disk_can_be_unplugged_and_plugged_in_again() {
    let store = store_with_volume(512);
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    let files = guest.ok(MAKE_FILES);
    guest.ok("umount /mnt");

    let same_connection = "sock0";
    guest.qmp("device_del", json!({ "id": "disk0" }));
    guest.qmp_event("DEVICE_DELETED");
    guest.refused("test -e /dev/vda");
    guest.qmp(
        "device_add",
        json!({ "driver": "vhost-user-blk-pci", "id": "disk0", "chardev": same_connection, "num-queues": 2 }),
    );
    guest.wait_for("the disk is there", "[ -b /dev/vda ]");
    guest.ok("mount /dev/vda /mnt");
    assert_eq!(guest.ok(CHECK_FILES), files);
    guest.ok("umount /mnt; e2fsck -fn /dev/vda");
}

/// The data key of the volume `t`, in base64, as the KMS hands it out to who has the
/// context and the root key.
fn data_key(store: &Store) -> String {
    let root = Root::new(store.root());
    let catalog = Catalog::new(&root);
    let volume = catalog.load(catalog.resolve("t").expect("find the volume")).expect("read its metadata");
    let kms = Embedded::at(
        root.kms(),
        store.config(),
        Box::new(SystemClock),
        sealblk::base::hardened::harden().unwrap(),
    );
    let dek =
        kms.decrypt(&volume.keys()[0].first().wrapped, &volume.encryption_context()).expect("unwrap the key");
    assert_eq!(dek.len(), 64);
    base64::engine::general_purpose::STANDARD.encode(&*dek)
}

/// Whoever has the data key needs no sealblk: the layer is what dm-crypt itself would have written.
fn cryptsetup_reads_the_layer(sector_size: u32) {
    let store = store_with_volume(sector_size);
    cryptsetup_reads(&store, sector_size, "", || store.only_layer());
}

/// What lies where `place` says is what dm-crypt would have written, read with these options besides.
fn cryptsetup_reads(store: &Store, sector_size: u32, options: &str, place: impl FnOnce() -> PathBuf) {
    let attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).boot();
    let files = guest.ok(MAKE_FILES);
    guest.ok("umount /mnt");
    guest.shutdown();
    attached.detach();

    let mut guest = Guest::builder().plain_read_only_disk(place()).boot();
    guest.refused("mount -o ro /dev/vda /mnt");
    guest.ok(&format!(
        "echo {} | base64 -d >/tmp/key
         cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --sector-size {sector_size} \\
             {options} --key-file /tmp/key --readonly /dev/vda clear
         mount -o ro /dev/mapper/clear /mnt",
        data_key(store)
    ));
    assert_eq!(guest.ok(CHECK_FILES), files);
}

#[test]
fn cryptsetup_reads_a_layer_of_512_byte_sectors() {
    cryptsetup_reads_the_layer(512);
}

#[test]
fn cryptsetup_reads_a_device_behind_its_header() {
    let Some(disk) = BareDisk::zeros(257 << 20, 512) else { return };
    let store = Store::new();
    store.ok(&["volume", "create", "--device", disk.name(), "--name", "t"]);
    let copy = store.root().parent().expect("it lies in a folder").join("device.img");
    cryptsetup_reads(&store, 512, "--offset 2048", || {
        std::fs::write(&copy, disk.content()).expect("copy the device");
        copy
    });
}

#[test]
fn cryptsetup_reads_a_layer_of_4096_byte_sectors() {
    cryptsetup_reads_the_layer(4096);
}
