//! Devices that are not what they were: another one in the place of the right one, one that was put back,
//! that shrinks, that disappears; and stores in which somebody has changed where a layer lies.

use super::rig::{MIB, Rig, is_zero};
use crate::common::attach::{flush, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::Request;
use crate::common::frontend::block::{IOERR, OK};
use crate::common::loop_disk::BareDisk;
use serde_json::{Value, json};
use std::os::unix::fs::symlink;

const SIZE: usize = 8 << 20;

/// Changes the file that says where the only layer on a device lies.
fn point(rig: &Rig, edit: impl FnOnce(&mut Value)) {
    let path = &rig.layers("device")[0];
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

#[test]
fn a_device_of_the_same_size_does_not_pass_for_the_right_one() {
    let disks = [(); 3].map(|()| BareDisk::zeros(10 * MIB, 512));
    let [Some(disk), Some(empty), Some(another)] = disks else { return };
    let rig = Rig::on(&disk, &[]);
    rig.id(&["volume", "create", "--device", another.name(), "--name", "other", "--size", "8MiB"]);
    let (before, other) = (disk.content(), another.content());
    let mine = rig
        .layers("device")
        .into_iter()
        .find(|path| std::fs::read_to_string(path).unwrap().contains(disk.name()));
    let path = mine.unwrap();
    let named = std::fs::read_to_string(&path).unwrap();
    for (device, words) in [
        (empty.name(), "has no header of sealblk's"),
        (another.name(), "another device by now"),
        ("/dev/no-such-device", "is not there; connect it"),
        ("/dev/null", "no block device any more"),
    ] {
        std::fs::write(&path, named.replace(disk.name(), device)).unwrap();
        let said = rig.refuse_attach(7);
        assert!(said.contains(words), "{device}: {said}");
        let shown = rig.json(&["volume", "show", "t"]);
        assert!(shown["problem"].as_str().unwrap().contains(words), "{shown}");
    }
    // Nor does what deletes the volume touch another device.
    std::fs::write(&path, named.replace(disk.name(), another.name())).unwrap();
    rig.store().ok(&["volume", "delete", "t"]);
    assert!(is_zero(&empty.content()) && another.content() == other && disk.content() == before);
    let (host, guest) = rig.attach("other", 512, vec![0; SIZE]);
    guest.leave();
    host.end();
}

#[test]
fn a_header_that_is_another_store_s_or_damaged_is_refused() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    // Whoever can write the store alone.
    point(&rig, |value| value["token"] = json!("0123456789abcdef0123456789abcdef"));
    let said = rig.refuse_attach(7);
    assert!(said.contains("was taken over by another store"), "{said}");
    point(&rig, |value| value["token"] = json!("x"));
    assert!(rig.refuse_attach(7).contains("no token"));
    point(&rig, |value| value["colour"] = json!("red"));
    assert!(rig.refuse_attach(7).contains("colour"));
    let before = disk.content();
    rig.store().ok(&["volume", "delete", "t"]);
    assert!(disk.content() == before && rig.layers("device").is_empty());

    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let whole = disk.content();
    // One of the two slots is enough, whichever it is; and it is made whole again.
    for slot in [0, 512 << 10] {
        disk.overwrite(slot + 100, &[0xff; 64]);
        let (host, guest) = rig.attach("t", 512, vec![0; SIZE]);
        drop(guest);
        host.end();
    }
    for slot in [0, 512 << 10] {
        disk.overwrite(slot + 100, &[0xff; 64]);
    }
    let said = rig.refuse_attach(7);
    assert!(said.contains("neither of its two copies is whole"), "{said}");
    disk.overwrite(0, &whole[..MIB as usize]);
    let (host, guest) = rig.attach("t", 512, vec![0; SIZE]);
    drop(guest);
    host.end();
}

#[test]
fn a_header_that_was_put_back_decides_nothing_at_home_and_is_brought_up_to_date() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let old = disk.content()[..MIB as usize].to_vec();
    let key = rig.json(&["key", "create"])["key_id"].as_str().unwrap().to_owned();
    rig.store().ok(&["volume", "rewrap", "t", "--key", &key]);
    let says = |key: &str| String::from_utf8_lossy(&disk.content()[..MIB as usize]).contains(key);
    assert!(says(&key), "the header has the record's copy");
    let before = rig.place.key();
    assert!(before.contains(&key));
    disk.overwrite(0, &old);
    assert!(!says(&key));
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    guest.leave();
    host.end();
    assert!(says(&key), "the attach has written the header anew");
    assert_eq!(rig.place.key(), before);
}

#[test]
fn a_layer_of_the_store_does_not_become_a_device_by_a_link_or_a_node() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let pointer = rig.layers("device").remove(0);
    let image = pointer.with_extension("img");
    // A file in place of the device, as long as the layer: the device counts.
    std::fs::write(&image, vec![7; SIZE]).unwrap();
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.look();
    guest.leave();
    host.end();
    std::fs::remove_file(&image).unwrap();
    // A link to the device in place of what says where it is.
    std::fs::remove_file(&pointer).unwrap();
    symlink(&disk.device, &image).unwrap();
    let before = disk.content();
    rig.refuse_attach(7);
    std::fs::remove_file(&image).unwrap();
    symlink(&disk.device, &pointer).unwrap();
    rig.refuse_attach(7);
    rig.store().run(&["gc"]);
    assert!(disk.content() == before);
}

#[test]
fn a_device_that_has_shrunk_is_refused_and_served_again_when_it_is_whole() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let data = guest.leave();
    host.end();
    disk.set_len(9 * MIB - 4096);
    let said = rig.refuse_attach(7);
    assert!(said.contains("it has shrunk"), "{said}");
    disk.set_len(10 * MIB);
    // The loop device's file was cut off: what was in its end is gone.
    let mut data = data;
    data[SIZE - 4096..].fill(0);
    let (host, mut guest) = rig.attach("t", 512, data);
    guest.look();
    guest.leave();
    host.end();
}

#[test]
fn a_device_that_fails_under_load_fails_requests_and_nothing_else() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    let ring = &mut guest.session.rings[0];
    let bytes = pattern(1, 1 << 16);
    write(ring, 0, &bytes);
    write(ring, 12288, &bytes);
    flush(ring);
    disk.lose_behind(4 * MIB);
    assert_eq!(Request::read(12288, 4096).run(ring).unwrap().status, IOERR);
    assert!(read(ring, 0, bytes.len()) == bytes, "what is there is served");
    assert_eq!(Request::write(8, &bytes).run(ring).unwrap().status, OK);
    drop(guest);
    host.end();
}
