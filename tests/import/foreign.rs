//! Files that hold a disk in a form that is not read here. Each is refused with a command, and the command
//! works.

use crate::rig::{Rig, qemu};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const LEN: usize = 8 << 20;

/// Runs what a shell is given, in a folder.
#[track_caller]
fn shell(folder: &Path, command: &str) {
    let output =
        Command::new("sh").arg("-ec").arg(command).current_dir(folder).output().expect("start a shell");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The first command that a message names.
#[track_caller]
fn command_in(said: &str) -> &str {
    let (_, rest) = said.split_once("with \"").unwrap_or_else(|| panic!("no command: {said}"));
    rest.split_once('"').expect("it ends").0
}

/// The import of `image` is refused, with words, and does as it was told; answers the folder where that was
/// done.
#[track_caller]
fn refused_and_unpacked(rig: &Rig, image: &str, words: &str) -> PathBuf {
    for arguments in [&[][..], &["--in-place"]] {
        let said = rig.refuse(2, &[&["volume", "import", image], arguments].concat());
        assert!(said.contains(words) && said.contains("--format raw"), "{image}: {said}");
    }
    rig.assert_nothing_is_left();
    let said = rig.refuse(2, &["volume", "import", image]);
    let folder = rig.folder().join("unpacked");
    fs::create_dir(&folder).expect("make a folder");
    shell(&folder, command_in(&said));
    folder
}

/// What was unpacked is imported, holds `data`, and is gone then.
#[track_caller]
fn import_unpacked(rig: &Rig, folder: &Path, image: &str, data: &[u8]) {
    rig.import(&[folder.join(image).to_str().expect("UTF-8"), "--name", "v"]);
    rig.assert_holds("v", data);
    rig.store.ok(&["volume", "delete", "v"]);
    fs::remove_dir_all(folder).expect("remove a folder");
}

#[test]
fn a_compressed_image_is_refused_with_the_command_that_unpacks_it() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    for (tool, ending) in [("gzip", "gz"), ("xz", "xz"), ("bzip2", "bz2")] {
        shell(&rig.folder(), &format!("{tool} --keep disk.img"));
        let packed = rig.path(&format!("disk.img.{ending}"));
        let folder = refused_and_unpacked(&rig, &packed, &format!("begins like {tool}"));
        import_unpacked(&rig, &folder, "disk.img", &data);
    }
    // An ending decides nothing, and who says that it is raw gets the bytes.
    fs::rename(rig.path("disk.img.gz"), rig.path("disk.qcow2")).unwrap();
    let said = rig.refuse(2, &["volume", "import", &rig.path("disk.qcow2")]);
    assert!(said.contains("begins like gzip"), "{said}");
    let said = rig.refuse(2, &["volume", "import", &rig.path("disk.qcow2"), "--format", "qcow2"]);
    assert!(said.contains("begins like gzip"), "{said}");
    let packed = fs::read(rig.path("disk.qcow2")).unwrap();
    rig.import(&[&rig.path("disk.qcow2"), "--format", "raw", "--name", "v"]);
    rig.assert_holds("v", &packed);
}

#[test]
fn an_ova_is_refused_and_so_is_the_disk_in_it() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    fs::write(rig.path("a.ovf"), "<Envelope/>").unwrap();
    let (raw, disk) = (rig.path("disk.img"), rig.path("a-disk1.vmdk"));
    qemu("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", &raw, &disk]);
    for (name, format) in [("a.ova", "ustar"), ("old.tar", "v7"), ("gnu.tar", "gnu")] {
        shell(&rig.folder(), &format!("tar --format={format} --create --file={name} a.ovf a-disk1.vmdk"));
        let folder = refused_and_unpacked(&rig, &rig.path(name), "begins like tar");
        let inner = folder.join("a-disk1.vmdk");
        let said = rig.refuse(2, &["volume", "import", inner.to_str().unwrap()]);
        shell(&folder, command_in(&said));
        import_unpacked(&rig, &folder, "a-disk1.qcow2", &data);
    }
}

#[test]
fn images_that_qemu_knows_are_refused_with_the_command_that_converts_them() {
    let rig = Rig::new();
    let mut data = rig.raw("my disk.img", LEN);
    let raw = rig.path("my disk.img");
    for (name, format, options, words) in [
        ("a.vmdk", "vmdk", "subformat=monolithicSparse", "begins like VMDK"),
        ("b.vmdk", "vmdk", "subformat=streamOptimized", "begins like VMDK"),
        ("c.vmdk", "vmdk", "subformat=monolithicFlat", "begins like a VMDK descriptor"),
        ("d.vmdk", "vmdk", "subformat=twoGbMaxExtentSparse", "begins like a VMDK descriptor"),
        ("e.vhd", "vpc", "subformat=dynamic,force_size=on", "begins like VHD"),
        ("f.vhd", "vpc", "subformat=fixed,force_size=on", "ends like a VHD"),
        ("g.vhdx", "vhdx", "subformat=dynamic", "begins like VHDX"),
        ("h.vdi", "vdi", "static=off", "begins like VDI"),
        ("i.hdd", "parallels", "cluster_size=65536", "begins like Parallels"),
        ("j.qed", "qed", "cluster_size=65536", "begins like QED"),
        ("k.qcow", "qcow", "encryption=off", "begins like qcow"),
        ("its own's", "vdi", "static=on", "begins like VDI"),
    ] {
        let image = rig.path(name);
        qemu("qemu-img", &["convert", "-f", "raw", "-O", format, "-o", options, &raw, &image]);
        let folder = refused_and_unpacked(&rig, &image, words);
        let made = fs::read_dir(&folder).unwrap().next().expect("the command made a file").unwrap();
        assert_eq!(made.path().extension().unwrap(), "qcow2");
        import_unpacked(&rig, &folder, made.file_name().to_str().unwrap(), &data);
    }
    // A part of a disk is not the disk; the flat one is a raw image.
    let said = rig.refuse(2, &["volume", "import", &rig.path("d-s001.vmdk")]);
    assert!(said.contains("a part of a disk"), "{said}");
    rig.import(&[&rig.path("c-flat.vmdk"), "--name", "flat"]);
    rig.assert_holds("flat", &data);
    // Nor is a VHD without the program that has left its last byte out, or when it is taken for raw.
    let mut footer = fs::read(rig.path("f.vhd")).unwrap();
    footer.pop();
    fs::write(rig.path("old.vhd"), &footer).unwrap();
    let said = rig.refuse(2, &["volume", "import", &rig.path("old.vhd")]);
    assert!(said.contains("ends like a VHD"), "{said}");
    rig.import(&[&rig.path("f.vhd"), "--format", "raw", "--name", "footer"]);
    data.extend(&footer[data.len()..]);
    rig.assert_holds("footer", &data[..data.len() - 1]);
}
