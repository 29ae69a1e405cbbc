//! Which devices become a volume's, and which are refused; what `--wipe` does.

use super::rig::{MIB, Rig, is_zero, refuse};
use crate::common::killed::{End, interrupted_before, killed_before};
use crate::common::loop_disk::{BareDisk, Kind, LoopDisk};
use crate::common::process::tool;
use crate::common::store::Store;
use nix::fcntl::OFlag;
use std::fs::File;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;

fn create<'a>(disk: &'a BareDisk, more: &[&'a str]) -> Vec<&'a str> {
    [&["volume", "create", "--device", disk.name()], more].concat()
}

#[test]
fn a_device_with_anything_on_it_is_left_as_it_is_and_told_what_it_holds() {
    let store = Store::new();
    let Some(disk) = BareDisk::zeros(32 * MIB, 512) else { return };
    // The last byte alone is enough.
    disk.overwrite(32 * MIB - 1, &[1]);
    let said = refuse(&store, 4, &create(&disk, &[]));
    assert!(said.contains("data (the first byte that is not zero is at 33554431)"), "{said}");
    assert!(said.contains("--wipe"), "{said}");
    for (program, arguments, words) in [
        ("mkfs.ext4", &["-q", "-F"][..], "an ext2, ext3 or ext4 file system"),
        ("mkfs.btrfs", &["-q", "-f", "--mixed"], "a btrfs file system"),
        ("mkswap", &[], "swap space"),
    ] {
        let Some(disk) = BareDisk::zeros(32 * MIB, 512) else { return };
        let made = tool(program).args(arguments).arg(&disk.device).output().unwrap();
        assert!(made.status.success(), "{program}: {}", String::from_utf8_lossy(&made.stderr));
        let before = disk.content();
        let said = refuse(&store, 4, &create(&disk, &[]));
        assert!(said.contains(words) && said.contains("--wipe"), "{program}: {said}");
        assert!(disk.content() == before, "{program}");
        assert!(!store.root().join("volumes").exists(), "nothing was made");
    }
}

#[test]
fn a_wiped_device_holds_a_header_and_nothing_else() {
    let store = Store::new();
    let Some(disk) = BareDisk::new(32 * MIB, 4096) else { return };
    let id = store.ok(&create(&disk, &["--wipe"])).trim().to_owned();
    let content = disk.content();
    assert!(content.starts_with(b"sealblk device 1"));
    assert!(is_zero(&content[MIB as usize..]));
    let shown = store.ok(&["volume", "show", &id, "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    // All of it, in the device's own blocks.
    assert_eq!((&shown["size"], &shown["sector_size"]), (&(31 * MIB).into(), &4096.into()));
    assert_eq!(shown["layers"][0]["path"], disk.name());
    let list = store.ok(&["volume", "list"]);
    assert!(list.contains("DEVICE") && list.contains(disk.name()) && list.contains("31.0 MiB of devices"));
}

#[test]
fn a_device_that_is_in_use_is_refused_whatever_is_said() {
    let store = Store::new();
    let folder = store.root().parent().unwrap().join("mounted");
    let Some(disk) = LoopDisk::mount(Kind { block: 512, file_system: "ext4" }, &folder) else { return };
    let device = disk.device.to_str().unwrap();
    for more in [&[][..], &["--wipe"]] {
        let said = refuse(&store, 4, &[&["volume", "create", "--device", device], more].concat());
        assert!(said.contains(&format!("mounted on {}", folder.display())), "{said}");
    }
    let Some(disk) = BareDisk::zeros(8 * MIB, 512) else { return };
    let mut exclusively = File::options();
    let other = exclusively.read(true).custom_flags(OFlag::O_EXCL.bits()).open(&disk.device).unwrap();
    let said = refuse(&store, 4, &create(&disk, &["--wipe"]));
    assert!(said.contains("another program has it for itself"), "{said}");
    drop(other);
    store.ok(&create(&disk, &[]));
}

#[test]
fn what_is_no_device_or_too_small_a_one_is_refused() {
    let store = Store::new();
    let folder = store.root().parent().unwrap().to_owned();
    let file = folder.join("file");
    std::fs::write(&file, vec![0; 4 << 20]).unwrap();
    let at = |path: &Path| path.to_str().unwrap().to_owned();
    let said = refuse(&store, 2, &["volume", "create", "--device", &at(&file)]);
    assert!(said.contains("no block device"), "{said}");
    refuse(&store, 3, &["volume", "create", "--device", &at(&folder.join("none"))]);
    let said = refuse(&store, 2, &["volume", "create", "--device", "/dev/null"]);
    assert!(said.contains("neither a file nor a block device"), "{said}");
    let Some(small) = BareDisk::zeros(MIB, 512) else { return };
    let said = refuse(&store, 2, &create(&small, &[]));
    assert!(said.contains("1 MiB for its header"), "{said}");
    let Some(disk) = BareDisk::zeros(8 * MIB, 512) else { return };
    let said = refuse(&store, 2, &create(&disk, &["--size", "8MiB"]));
    assert!(said.contains("room for a volume of 7340032 bytes"), "{said}");
    let said = refuse(&store, 2, &create(&disk, &["--size", "4097KB"]));
    assert!(said.contains("use 4096000 or 4100096"), "{said}");
    refuse(&store, 2, &create(&disk, &["--preallocate"]));
    refuse(&store, 2, &["volume", "create", "--size", "1MiB", "--wipe"]);
    assert!(is_zero(&disk.content()));
}

#[test]
fn a_device_that_a_volume_lies_on_is_not_given_to_another_one() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let before = disk.content();
    for more in [&[][..], &["--wipe"]] {
        let said = rig.refuse(4, &create(&disk, more));
        assert!(said.contains(&format!("a layer of {}", rig.place.id())), "{said}");
    }
    // A store that does not know it.
    let other = Store::new();
    let said = refuse(&other, 4, &create(&disk, &[]));
    assert!(said.contains(&rig.place.id()) && said.contains("--wipe"), "{said}");
    assert!(disk.content() == before);
    let (host, guest) = rig.attach("t", 512, vec![0; 8 << 20]);
    let said = refuse(&other, 4, &create(&disk, &["--wipe"]));
    assert!(said.contains("another program has it for itself"), "{said}");
    drop(guest);
    host.end();
    assert!(disk.content()[MIB as usize..] == before[MIB as usize..]);
    // The operator has said so.
    other.ok(&create(&disk, &["--wipe", "--name", "u"]));
    let said = rig.refuse_attach(7);
    assert!(said.contains("another device by now"), "{said}");
    // Nor is what is there now touched by what becomes of the one that was.
    let after = disk.content();
    rig.store().ok(&["volume", "delete", "t"]);
    assert!(disk.content() == after && rig.layers("device").is_empty());
}

#[test]
fn a_wipe_that_is_interrupted_goes_on() {
    let store = Store::new();
    let Some(disk) = BareDisk::new(64 * MIB, 512) else { return };
    let mut stopped = 0;
    for step in (0..).step_by(5) {
        let mut command = store.command();
        command.args(create(&disk, &["--wipe"]));
        let Some(output) = interrupted_before(&mut command, step) else { break };
        if output.status.success() {
            break;
        }
        stopped += 1;
        let list = store.ok(&["volume", "list", "--json"]);
        assert_eq!(list.trim(), "[]", "there is no volume before the device is zeros");
        assert!(step < 1000, "it does not come to its end");
    }
    assert!(stopped > 0);
    assert!(is_zero(&disk.content()[MIB as usize..]));
}

#[test]
fn wherever_a_creation_is_killed_the_device_is_free_again_or_the_volume_is_there() {
    let store = Store::new();
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "first"]);
    let Some(disk) = BareDisk::zeros(8 * MIB, 512) else { return };
    let mut seen = 0;
    for step in 0.. {
        let mut command = store.command();
        command.args(create(&disk, &["--name", "t"]));
        let end = killed_before(&mut command, step);
        let list: serde_json::Value = serde_json::from_str(&store.ok(&["volume", "list", "--json"])).unwrap();
        match list.as_array().unwrap().len() {
            1 => store.ok(&["gc"]),
            _ => store.ok(&["volume", "delete", "t"]),
        };
        assert!(is_zero(&disk.content()), "step {step}: no header is left");
        let left = std::fs::read_dir(store.root().join("layers")).unwrap().count();
        assert_eq!(left, 1, "step {step}");
        if !matches!(end, End::Killed) {
            break;
        }
        seen += 1;
    }
    assert!(seen > 10, "{seen} steps");
}

#[test]
fn a_link_of_the_user_s_own_is_resolved() {
    let store = Store::new();
    let Some(disk) = BareDisk::zeros(8 * MIB, 512) else { return };
    let link = store.root().parent().unwrap().join("link");
    symlink(&disk.device, &link).unwrap();
    let output = store.run(&["volume", "create", "--device", link.to_str().unwrap(), "--name", "t"]);
    let said = crate::common::store::said(&output);
    assert!(output.status.success() && said.contains("may have another name after the next boot"), "{said}");
    let shown = store.ok(&["volume", "show", "t"]);
    assert!(shown.contains(disk.name()) && !shown.contains("link"), "{shown}");
}
