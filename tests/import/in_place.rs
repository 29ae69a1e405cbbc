//! Raw images that become volumes where they lie.

use crate::common::attach::{flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::killed::{End, killed_before};
use crate::rig::{Rig, files, qemu};
use serde_json::json;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Stdio;

const LEN: usize = 8 << 20;

#[test]
fn the_image_is_the_lowest_layer_and_what_a_guest_finds_below_what_it_writes() {
    for sector_size in ["512", "4096"] {
        let rig = Rig::new();
        let mut data = rig.raw("disk.img", LEN);
        let inode = fs::metadata(rig.path("disk.img")).unwrap().ino();
        let arguments = ["--in-place", "--name", "v", "--size", "12MiB", "--sector-size", sector_size];
        let made = rig.import(&[&[&*rig.path("disk.img")], &arguments[..]].concat());
        assert!(!fs::exists(rig.path("disk.img")).unwrap(), "its name is gone");
        let layers = made["layers"].as_array().unwrap();
        assert_eq!((layers.len(), &made["encrypted"]), (2, &json!(true)));
        assert_eq!((&layers[0]["key"], &layers[1]["key"]), (&json!(0), &json!(null)));
        assert_eq!((&layers[1]["masked"], &layers[1]["size"]), (&json!(false), &json!(LEN)));
        let lowest = fs::metadata(layers[1]["path"].as_str().unwrap()).unwrap();
        assert_eq!((lowest.ino(), lowest.nlink(), lowest.permissions().mode() & 0o777), (inode, 1, 0o444));
        let record = rig.store.root().join(format!("volumes/{}/volume.json", made["id"].as_str().unwrap()));
        let record: serde_json::Value = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
        assert_eq!((record["mac"].is_string(), &record["hydrate"]), (true, &layers[1]["id"]));
        rig.assert_guest_finds("v", &data);
        let host = rig.store.attach("v", &[]);
        let mut session = open(host.socket());
        for (seed, at) in [(7, 0), (8, LEN - 4096), (9, 10 << 20)] {
            let bytes = pattern(seed, 8192);
            write(&mut session.rings[0], at as u64 / 512, &bytes);
            data.resize(data.len().max(at + 8192), 0);
            data[at..at + 8192].copy_from_slice(&bytes);
        }
        flush(&mut session.rings[0]);
        assert!(read(&mut session.rings[0], 0, 64 << 10) == data[..64 << 10]);
        drop(session);
        host.detach();
        rig.assert_holds("v", &data);
        rig.store.ok(&["volume", "export", "v", &rig.path("out.img")]);
        assert!(fs::read(rig.path("out.img")).unwrap()[..data.len()] == data);
        rig.store.ok(&["volume", "delete", "v"]);
        rig.assert_nothing_is_left();
    }
}

#[test]
fn a_layer_in_the_clear_that_is_swapped_is_refused() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    let made = rig.import(&[&rig.path("disk.img"), "--in-place", "--name", "v"]);
    let record = rig.store.root().join(format!("volumes/{}/volume.json", made["id"].as_str().unwrap()));
    let (old, new) = (made["layers"][1]["id"].as_str().unwrap(), "0a0a0a0a-0000-4000-8000-000000000000");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace(old, new)).unwrap();
    rig.store.accept();
    let layers = rig.store.root().join("layers");
    fs::write(layers.join(format!("{new}.img")), vec![1; LEN]).unwrap();
    let said = rig.refuse(7, &["volume", "export", "v", &rig.path("out.img")]);
    assert!(said.contains("the MAC does not fit"), "{said}");
    // Nor does it help to take the seal away.
    let mut edited: serde_json::Value = serde_json::from_str(&text).unwrap();
    edited["mac"] = json!(null);
    edited["keys"][0]["check"] = json!(null);
    fs::write(&record, edited.to_string()).unwrap();
    rig.store.accept();
    let said = rig.refuse(7, &["volume", "export", "v", &rig.path("out.img")]);
    assert!(said.contains("it has no seal"), "{said}");
}

#[test]
fn what_cannot_be_taken_in_place_is_refused_and_stays_as_it_was() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    rig.raw("odd.img", LEN + 100);
    fs::hard_link(rig.path("disk.img"), rig.path("two.img")).unwrap();
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", &rig.path("x.qcow2"), "1M"]);
    let shm = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    shm.as_file().set_len(LEN as u64).unwrap();
    let elsewhere = shm.path().to_str().unwrap();
    for (path, words) in [
        (&*rig.path("two.img"), "has another name"),
        (&rig.path("odd.img"), "truncate --size=%512"),
        #[cfg(feature = "qcow2")]
        (&rig.path("x.qcow2"), "only a raw image"),
        (elsewhere, "on another file system"),
    ] {
        let said = rig.refuse(2, &["volume", "import", path, "--in-place"]);
        assert!(said.contains(words), "{said}");
    }
    fs::remove_file(rig.path("two.img")).unwrap();
    rig.refuse(2, &["volume", "import", &rig.path("disk.img"), "--in-place", "--unencrypted"]);
    assert!(fs::read(rig.path("disk.img")).unwrap() == data);
    assert_eq!(fs::metadata(rig.path("disk.img")).unwrap().nlink(), 1);
    rig.assert_nothing_is_left();
    // Another volume's layer is not taken away from it.
    rig.import(&[&rig.path("disk.img"), "--name", "other"]);
    let layer = rig.store.only_layer();
    let layer = ["volume", "import", layer.to_str().unwrap(), "--in-place", "--format", "raw"];
    let said = rig.refuse(2, &layer);
    assert!(said.contains("lies in the store itself"), "{said}");
    rig.assert_holds("other", &data);
    // A symbolic link would be left behind, and lead nowhere.
    std::os::unix::fs::symlink(rig.path("disk.img"), rig.path("link.img")).unwrap();
    let said = rig.refuse(2, &["volume", "import", &rig.path("link.img"), "--in-place"]);
    assert!(said.contains("name the file itself"), "{said}");
    rig.import(&[&rig.path("disk.img"), "--in-place", "--name", "v"]);
    rig.assert_holds("v", &data);
    assert!(!fs::exists(rig.path("disk.img")).unwrap());
}

#[test]
fn a_kms_that_refuses_leaves_the_image_where_it_is() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    rig.store.ok(&["key", "create", "--alias", "alias/k"]);
    rig.store.ok(&["key", "disable", "--yes", "alias/k"]);
    let said = rig.refuse(5, &["volume", "import", &rig.path("disk.img"), "--in-place", "--key", "alias/k"]);
    assert!(said.contains("is disabled"), "{said}");
    assert!(fs::read(rig.path("disk.img")).unwrap() == data);
    rig.assert_nothing_is_left();
}

#[test]
fn killed_at_any_step_the_image_is_there_by_its_name_or_in_its_volume() {
    let mut seen = [0; 3];
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let rig = Rig::new();
        let data = rig.raw("disk.img", 2 << 20);
        rig.store.ok(&["key", "create", "--alias", "alias/k"]);
        let image = rig.path("disk.img");
        let import = ["volume", "import", &image, "--in-place", "--name", "v", "--key", "alias/k"];
        let mut command = rig.store.command();
        let end = killed_before(command.args(import).stdout(Stdio::null()).stderr(Stdio::null()), step);
        let volumes = files(&rig.store.root().join("volumes"));
        let is_volume = volumes.iter().any(|volume| volume.join("volume.json").exists());
        let has_name = fs::exists(&image).unwrap();
        match (is_volume, has_name) {
            (false, false) => panic!("step {step}: it is lost"),
            (true, with_name) => {
                rig.assert_holds("v", &data);
                if with_name {
                    let said = rig.refuse(2, &import);
                    assert!(said.contains("has another name"), "{said}");
                    fs::remove_file(&image).unwrap();
                }
                rig.assert_guest_finds("v", &data);
                seen[1 + usize::from(with_name)] += 1;
            }
            (false, true) => {
                assert!(fs::read(&image).unwrap() == data, "step {step}");
                rig.assert_nothing_is_left();
                rig.store.ok(&import);
                rig.assert_holds("v", &data);
                assert!(!fs::exists(&image).unwrap());
                seen[0] += 1;
            }
        }
        if end != End::Killed {
            assert_eq!((end, is_volume, has_name), (End::Exited(0), true, false), "step {step}");
            break;
        }
    }
    assert!(seen.iter().all(|times| *times > 0), "before, after and in between: {seen:?}");
}
