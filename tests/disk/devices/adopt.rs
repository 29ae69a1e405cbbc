//! A device that goes to another host, which has nothing of the volume but the device and the KMS.

use super::rig::{MIB, Rig, is_zero, refuse};
use crate::common::content::Reader;
use crate::common::killed::{End, killed_before};
use crate::common::loop_disk::BareDisk;
use crate::common::store::Store;
use std::path::Path;
use std::process::Command;

const SIZE: usize = 8 << 20;

/// A store on a host that has access to the same KMS.
pub fn elsewhere(rig: &Rig) -> Rig {
    let store = Store::new();
    let copy = |from: &Path, to: &Path| {
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        let copied = Command::new("cp").arg("--archive").args([from, to]).status().unwrap();
        assert!(copied.success());
    };
    copy(&rig.store().root().join("kms"), &store.root().join("kms"));
    copy(&rig.store().config(), &store.config());
    // Of the other store.
    std::fs::remove_dir_all(store.config().join("stores")).unwrap();
    Rig { place: crate::common::attach::Place::of(store, &[]) }
}

#[test]
fn a_volume_goes_with_its_device_to_another_host_and_back() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let there = elsewhere(&rig);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let data = guest.leave();
    let said = there.refuse(4, &["volume", "adopt", disk.name()]);
    assert!(said.contains("another program has it for itself"), "while it is attached on this host: {said}");
    host.end();
    let said = there.refuse(4, &["volume", "adopt", disk.name()]);
    assert!(said.contains("has the name \"t\" already"), "{said}");
    let before = disk.content();
    let id = there.id(&["volume", "adopt", disk.name(), "--name", "mine"]);
    assert_eq!(id, rig.place.id());
    assert!(disk.content()[MIB as usize..] == before[MIB as usize..]);
    let (host, mut guest) = there.attach("mine", 512, data);
    guest.look();
    guest.work();
    let data = guest.leave();
    host.end();
    let reader = Reader::new(&there.store().root(), there.store().config());
    assert!(reader.volume_content(&reader.volume("mine")) == data);

    // The first one has lost it, and touches nothing.
    let said = rig.refuse_attach(7);
    assert!(said.contains("was taken over by another store"), "{said}");
    // What it knows is still what the device says: it can take it back.
    rig.store().ok(&["volume", "adopt", disk.name()]);
    let (host, mut guest) = rig.attach("t", 512, data.clone());
    guest.look();
    drop(guest);
    host.end();
    let said =
        crate::common::store::said(&there.store().run(&["attach", "mine", "--socket-path", "/nowhere/x"]));
    assert!(said.contains("was taken over by another store"), "{said}");
    let before = disk.content();
    there.store().ok(&["volume", "delete", "mine"]);
    assert!(disk.content() == before, "a device that is another store's is not touched");
    there.store().ok(&["volume", "adopt", disk.name(), "--name", "mine"]);
    there.store().ok(&["volume", "resize", "mine", "9MiB"]);
    // But now the two differ.
    let said = rig.refuse(4, &["volume", "adopt", disk.name()]);
    assert!(said.contains("is not what the device says"), "{said}");
    rig.store().ok(&["volume", "delete", "t"]);
    rig.store().ok(&["volume", "adopt", disk.name()]);
    assert_eq!(rig.json(&["volume", "show", "mine"])["size"], 9 * MIB, "the header knows of it");
}

#[test]
fn what_the_data_key_does_not_prove_is_not_adopted() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let there = elsewhere(&rig);
    let whole = disk.content()[..MIB as usize].to_vec();
    // Whoever can write the device can write a header that is whole.
    for (from, to, code, words) in [
        ("\"size\": 8388608", "\"size\": 4194304", 7, "the MAC does not fit"),
        ("\"sector_size\": 512", "\"sector_size\": 4096", 7, "the MAC does not fit"),
        ("\"frozen\": false", "\"frozen\": true", 4, "snapshots or clones share"),
        ("\"encrypted\": true", "\"encrypted\": false", 7, "not encrypted, but has keys"),
        ("\"format\": 2", "\"format\": 9", 7, "format version 9"),
    ] {
        disk.overwrite(0, &edited(&whole, from, to));
        let before = disk.content();
        let said = there.refuse(code, &["volume", "adopt", disk.name(), "--name", "mine"]);
        assert!(said.contains(words), "{to}: {said}");
        assert!(disk.content() == before, "{to}");
    }
    // A host without access to the KMS.
    disk.overwrite(0, &whole);
    let stranger = Store::new();
    stranger.ok(&["volume", "create", "--size", "1MiB"]);
    let said = refuse(&stranger, 3, &["volume", "adopt", disk.name()]);
    assert!(said.contains("does not exist"), "{said}");
    let none = std::fs::read_dir(stranger.root().join("layers")).unwrap().count();
    assert_eq!(none, 1, "nothing of it is left");
    // Nothing is there.
    disk.overwrite(0, &vec![0; MIB as usize]);
    let said = there.refuse(3, &["volume", "adopt", disk.name()]);
    assert!(said.contains("no header of sealblk's"), "{said}");
}

/// A device's first MiB in which a text was replaced by another one, with digests that fit.
fn edited(whole: &[u8], from: &str, to: &str) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    let mut edited = whole.to_vec();
    for slot in [0, 512 << 10] {
        let len = u32::from_le_bytes(whole[slot + 24..slot + 28].try_into().unwrap()) as usize;
        let text = std::str::from_utf8(&whole[slot + 60..slot + 60 + len]).unwrap();
        assert!(text.contains(from), "{from}: {text}");
        let text = text.replace(from, to);
        edited[slot + 60..slot + 60 + len].fill(0);
        edited[slot + 60..slot + 60 + text.len()].copy_from_slice(text.as_bytes());
        edited[slot + 24..slot + 28].copy_from_slice(&(text.len() as u32).to_le_bytes());
        let mut digest = Sha256::new();
        digest.update(&edited[slot..slot + 28]);
        digest.update(text);
        edited[slot + 28..slot + 60].copy_from_slice(&digest.finalize());
    }
    edited
}

#[test]
fn an_unencrypted_volume_and_one_with_layers_elsewhere_are_told_apart() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &["--unencrypted"]);
    rig.store().ok(&["key", "create"]);
    let there = elsewhere(&rig);
    let said = there.refuse(2, &["volume", "adopt", disk.name()]);
    assert!(said.contains("nothing proves what it is"), "{said}");
    there.store().ok(&["volume", "adopt", disk.name(), "--unencrypted", "--name", "mine"]);
    there.store().ok(&["snapshot", "create", "mine"]);
    let said = rig.refuse(4, &["volume", "adopt", disk.name(), "--unencrypted"]);
    assert!(said.contains("snapshots or clones share"), "{said}");
    drop(there);
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let snapshot = {
        rig.store().ok(&["volume", "create", "--size", "4MiB", "--name", "file"]);
        rig.id(&["snapshot", "create", "file"])
    };
    rig.store().ok(&["volume", "create", "--snapshot", &snapshot, "--device", disk.name(), "--name", "c"]);
    let there = elsewhere(&rig);
    let said = there.refuse(4, &["volume", "adopt", disk.name()]);
    assert!(said.contains("has 2 layers"), "{said}");
    rig.store().ok(&["volume", "flatten", "c", "--follow"]);
    there.store().ok(&["volume", "adopt", disk.name()]);
}

#[test]
fn wherever_an_adoption_is_killed_the_data_are_there_for_the_next() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let data = guest.leave();
    host.end();
    let there = elsewhere(&rig);
    let mut killed = 0;
    for step in (0..).step_by(3) {
        let mut command = there.store().command();
        command.args(["volume", "adopt", disk.name(), "--name", "mine"]);
        if killed_before(&mut command, step) != End::Killed {
            break;
        }
        killed += 1;
        there.store().ok(&["gc"]);
        let content = disk.content();
        assert!(content.starts_with(b"sealblk device 1"), "step {step}: the header stays");
        // It can be done again, and taken back.
        if step % 2 == 0 {
            there.store().ok(&["volume", "adopt", disk.name(), "--name", "mine"]);
            there.store().ok(&["volume", "show", "mine"]);
            rig.store().ok(&["volume", "adopt", disk.name()]);
            there.store().ok(&["volume", "delete", "mine"]);
        } else if there.store().run(&["volume", "show", "mine"]).status.success() {
            rig.store().ok(&["volume", "adopt", disk.name()]);
            there.store().ok(&["volume", "delete", "mine"]);
        }
    }
    assert!(killed > 5, "{killed} times");
    let (host, mut guest) = there.attach("mine", 512, data);
    guest.look();
    drop(guest);
    host.end();
    assert!(!is_zero(&disk.content()[..4096]));
}
