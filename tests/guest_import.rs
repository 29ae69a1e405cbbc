//! Disks of a real Linux guest that become encrypted volumes: as a compressed qcow2 image, and where they lie.

#[path = "common/guest.rs"]
mod guest;
#[path = "common/process.rs"]
mod process;
#[path = "common/qemu.rs"]
mod qemu;
#[path = "common/store.rs"]
mod store;

use guest::Guest;
use std::fs::File;
use std::process::Command;
use store::Store;

/// Makes a file system with some files on the disk, and answers their checksums.
const MAKE_FILES: &str = "
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    seq 1 300000 >/mnt/numbers
    head -c 5000001 /dev/urandom >/mnt/random
    mkdir /mnt/many
    for i in $(seq 200); do echo \"file $i\" >/mnt/many/$i; done
    cd /mnt && sha256sum numbers random many/*
    cd / && umount /mnt
";

#[test]
fn a_guest_finds_its_files_on_the_encrypted_volume_that_its_disk_became() {
    let store = Store::new();
    let folder = store.root().parent().expect("it lies in a folder").to_owned();
    let (raw, qcow2) = (folder.join("disk.img"), folder.join("disk.qcow2"));
    File::create(&raw).and_then(|file| file.set_len(128 << 20)).expect("make a disk");
    let mut guest = Guest::builder().plain_disk(&raw).boot();
    let files = guest.ok(MAKE_FILES);
    guest.shutdown();
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-c", "-f", "raw", "-O", "qcow2"]).args([&raw, &qcow2]);
    assert!(convert.status().expect("qemu-img, of Debian's qemu-utils, is needed").success());
    let (raw, qcow2) = (raw.display().to_string(), qcow2.display().to_string());
    store.ok(&["volume", "import", &qcow2, "--name", "copied", "--size", "160MiB"]);
    store.ok(&["volume", "import", &raw, "--in-place", "--name", "taken"]);

    let (copied, taken) = (store.attach("copied", &[]), store.attach("taken", &[]));
    let mut guest = Guest::builder().disk(copied.socket()).disk(taken.socket()).boot();
    assert_eq!(guest.ok("blockdev --getsize64 /dev/vda").trim(), (160 << 20).to_string());
    for disk in ["/dev/vda", "/dev/vdb"] {
        guest.ok(&format!("e2fsck -fn {disk}; mount {disk} /mnt"));
        assert_eq!(guest.ok("cd /mnt && sha256sum numbers random many/*"), files, "{disk}");
        // What is written now covers what was there.
        guest.ok("cd /mnt && seq 1 400000 >numbers && rm -r many && sync");
        guest.ok(&format!("umount /mnt; e2fsck -fn {disk}"));
    }
    guest.shutdown();
    copied.detach();
    taken.detach();

    let (copied, taken) = (store.attach("copied", &[]), store.attach("taken", &[]));
    let mut guest = Guest::builder().disk(copied.socket()).disk(taken.socket()).boot();
    for disk in ["/dev/vda", "/dev/vdb"] {
        guest.ok(&format!("e2fsck -fn {disk}; mount {disk} /mnt; seq 1 400000 | cmp - /mnt/numbers"));
        guest.ok("test ! -e /mnt/many; umount /mnt");
    }
    guest.shutdown();
    copied.detach();
    taken.detach();
}
