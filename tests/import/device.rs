//! Block devices, from which volumes are imported, and onto which they are exported.

use crate::common::loop_disk::{BareDisk, Kind, LoopDisk};
use crate::rig::{QemuIo, Rig};
use nix::fcntl::OFlag;
use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, symlink};

const LEN: usize = 8 << 20;
const BLOCKS: [u32; 2] = [512, 4096];

#[test]
fn a_volume_goes_onto_a_device_and_comes_from_it_again() {
    for block in BLOCKS {
        let rig = Rig::new();
        // Not whole blocks of the larger kind of device.
        let data = rig.raw("disk.img", LEN + 512);
        rig.import(&[&rig.path("disk.img"), "--name", "v"]);
        let Some(disk) = BareDisk::new(LEN as u64 + (1 << 20), block) else { return };
        let link = rig.path("link");
        symlink(&disk.device, &link).unwrap();
        let said = rig.refuse(4, &["volume", "export", "v", &link]);
        assert!(said.contains("--force overwrites what it holds"), "{said}");
        assert!(disk.content().iter().all(|byte| *byte == 0xff));
        rig.store.ok(&["volume", "export", "v", &link, "--force"]);
        let content = disk.content();
        assert!(content[..data.len()] == data, "block size {block}");
        assert!(content[data.len()..].iter().all(|byte| *byte == 0xff), "the rest stays");
        let device = disk.device.to_str().unwrap();
        let made = rig.import(&[device, "--name", "again", "--sector-size", "4096"]);
        assert_eq!(made["size"], content.len());
        rig.assert_holds("again", &content);
        drop(disk);
    }
}

#[test]
fn a_device_that_is_too_small_is_left_as_it_is() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let Some(disk) = BareDisk::new(LEN as u64 - 4096, 512) else { return };
    let said = rig.refuse(2, &["volume", "export", "v", disk.device.to_str().unwrap(), "--force"]);
    assert!(said.contains("8388608 are needed"), "{said}");
    assert!(disk.content().iter().all(|byte| *byte == 0xff));
}

#[test]
fn a_device_that_is_mounted_is_neither_read_nor_written() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let folder = rig.folder().join("mounted");
    let Some(disk) = LoopDisk::mount(Kind { block: 512, file_system: "ext4" }, &folder) else { return };
    fs::write(folder.join("file"), "there").unwrap();
    let device = disk.device.to_str().unwrap();
    let (import, export) = (["volume", "import", device], ["volume", "export", "v", device, "--force"]);
    for command in [&import[..], &["volume", "import", device, "--in-place"], &export] {
        let said = rig.refuse(4, command);
        assert!(said.contains("is mounted"), "{said}");
    }
    assert_eq!(fs::read(folder.join("file")).unwrap(), b"there");
}

#[test]
fn a_device_that_another_program_has_for_itself_is_refused() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let Some(disk) = BareDisk::new(LEN as u64, 512) else { return };
    let device = disk.device.to_str().unwrap();
    let mut exclusively = File::options();
    exclusively.read(true).custom_flags(OFlag::O_EXCL.bits());
    let other = exclusively.open(device).unwrap();
    for command in [&["volume", "import", device][..], &["volume", "export", "v", device, "--force"]] {
        let said = rig.refuse(4, command);
        assert!(said.contains("another program has it for itself"), "{said}");
    }
    drop(other);
    // QEMU keeps others from a device by the same locks as from a file.
    let qemu_io = QemuIo::on(device);
    for command in [&["volume", "import", device][..], &["volume", "export", "v", device, "--force"]] {
        let said = rig.refuse(4, command);
        assert!(said.contains("is open in QEMU"), "{said}");
    }
    drop(qemu_io);
    rig.import(&[device, "--name", "w"]);
    rig.assert_holds("w", &vec![0xff; LEN]);
}
