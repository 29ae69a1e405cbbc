//! Another data key for a volume, attached or not.

use crate::common::attach::{flush, open};
use crate::common::patience::{Deadline, limit};
use crate::common::rig::Rig;
use crate::watch::{Guest, SLOW, attach, deks, full, sees, show, wait_for, wait_for_a_part, wait_until_done};
use sealblk::crypt::Dek;
use sealblk::crypt::xts::{Engine, new_cipher};
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};

/// Nothing of the volume needs what it had before it was re-keyed.
fn assert_free_of(rig: &Rig, old: &[u8], expected: &[u8]) {
    let reader = rig.reader();
    let volume = reader.volume("t");
    assert_eq!((volume.layers().len(), volume.keys().len(), volume.layout().hydrate()), (1, 1, None));
    let new = deks(rig, "t");
    assert!(new.len() == 1 && new[0] != old);
    assert!(reader.volume_content(&volume) == expected);
    // The old data key makes nothing but noise of what is there.
    let unit = volume.sector_size();
    let cipher = new_cipher(Engine::Portable, &Dek::from_bytes(old).unwrap(), unit).unwrap();
    let mut bytes = fs::read(reader.catalog().layer_path(volume.top().id)).unwrap();
    cipher.decrypt_in_place(&mut bytes, 0);
    let same = bytes.chunks(512).zip(expected.chunks(512)).filter(|(a, b)| a == b).count();
    assert_eq!(same, 0, "sectors that the old data key still opens");
}

fn results(rig: &Rig) -> Vec<Value> {
    let events = rig.place.events().into_iter().map(|e| e["detail"].clone());
    events.filter(|d| d["event"] == "hydrateVolume").map(|d| d["result"].clone()).collect()
}

#[test]
fn a_volume_in_use_is_rekeyed_and_needs_the_old_key_no_more() {
    for arguments in [&[][..], &["--sector-size", "4096"]] {
        let mut rig = full(arguments);
        rig.place.store.ok(&["key", "create", "--alias", "alias/new"]);
        let (old_dek, old_layer) = (deks(&rig, "t").remove(0), rig.place.layer());
        let (host, socket) = attach(&rig, "t", SLOW);
        let mut guest = Guest::on(&socket, 7);
        guest.work(&mut rig.data, 20);
        let said = rig.place.store.ok(&["volume", "rekey", "t", "--key", "alias/new"]);
        assert!(said.contains("new data key"), "{said}");
        wait_for_a_part(&rig, "t");
        let shown = rig.place.store.ok(&["volume", "show", "t"]);
        assert!(shown.contains("still under the old data keys"), "{shown}");
        guest.work(&mut rig.data, 100);
        // From now on as fast as it goes, under load.
        rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "16MiB"]);
        let mut follow = rig.place.store.command();
        let mut follow = follow.args(["volume", "flatten", "t", "--follow"]).spawn().unwrap();
        let deadline = Deadline::after(limit());
        while follow.try_wait().unwrap().is_none() {
            deadline.check("the volume is flat", || "the command still runs");
            guest.work(&mut rig.data, 5);
        }
        assert!(follow.wait().unwrap().success());
        guest.work(&mut rig.data, 50);
        flush(&mut guest.session.rings[0]);
        assert!(sees(&mut guest.session, 8 << 20) == rig.data);
        assert!(!old_layer.exists());
        let used = json!([{"provider": "embedded", "key_id": rig.place.key()}]);
        assert_eq!(show(&rig, "t")["attachment"]["unwrapped_by"], used);
        drop(guest);
        host.end();
        assert_free_of(&rig, &old_dek, &rig.data);
        rig.assert_layers_are_named();
        assert_eq!(results(&rig), ["hydrating", "completed"]);
        rig.place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
        let (host, socket) = rig.attach("t");
        assert!(sees(&mut open(&socket), 8 << 20) == rig.data);
        host.end();
        rig.place.store.ok(&["audit", "verify"]);
    }
}

#[test]
fn a_volume_that_nobody_has_attached_is_rekeyed_by_the_command_or_at_the_next_attach() {
    let rig = full(&[]);
    let old = deks(&rig, "t").remove(0);
    rig.place.store.ok(&["volume", "rekey", "t", "--follow"]);
    assert_free_of(&rig, &old, &rig.data);
    rig.assert_layers_are_named();
    let second = deks(&rig, "t").remove(0);
    let said = rig.place.store.ok(&["volume", "rekey", "t"]);
    assert!(said.contains("copied up while it is attached"), "{said}");
    let shown = show(&rig, "t");
    assert_eq!((&shown["hydration"]["layers"], &shown["attachment"]), (&json!(1), &Value::Null));
    assert!(shown["hydration"]["allocated"].as_u64().unwrap() >= 6 << 20, "{shown}");
    assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data);
    let (host, _) = rig.attach("t");
    wait_until_done(&rig, "t");
    rig.place.store.ok(&["detach", "t"]);
    host.ends_well();
    assert_free_of(&rig, &second, &rig.data);
    rig.assert_layers_are_named();
    assert_eq!(results(&rig), ["hydrating", "completed", "hydrating", "completed"]);
}

#[test]
fn a_snapshot_in_the_middle_holds_what_was_there_and_the_copy_goes_on() {
    let mut rig = full(&[]);
    let old = deks(&rig, "t").remove(0);
    let (host, socket) = attach(&rig, "t", SLOW);
    let mut guest = Guest::on(&socket, 11);
    rig.place.store.ok(&["volume", "rekey", "t"]);
    guest.work(&mut rig.data, 30);
    wait_for_a_part(&rig, "t");
    let then = rig.data.clone();
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    guest.work(&mut rig.data, 30);
    rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "0"]);
    rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
    guest.work(&mut rig.data, 30);
    flush(&mut guest.session.rings[0]);
    drop(guest);
    host.end();
    assert_free_of(&rig, &old, &rig.data);
    let reader = rig.reader();
    assert!(reader.snapshot_content(&reader.snapshot(&snapshot)) == then);
    rig.assert_layers_are_named();
    // A clone of it has what it had to do as well.
    rig.place.store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "c"]);
    rig.place.store.ok(&["volume", "flatten", "c", "--follow"]);
    assert!(rig.reader().volume_content(&rig.reader().volume("c")) == then);
    assert_eq!(rig.reader().volume("c").layers().len(), 1);
    rig.place.store.ok(&["snapshot", "delete", &snapshot]);
    rig.assert_layers_are_named();
}

#[test]
fn the_layer_of_a_snapshot_in_the_middle_is_not_copied_again() {
    let mut rig = full(&[]);
    let (host, socket) = attach(&rig, "t", SLOW);
    let mut guest = Guest::on(&socket, 13);
    rig.place.store.ok(&["volume", "rekey", "t"]);
    guest.work(&mut rig.data, 30);
    rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "0"]);
    wait_until_done(&rig, "t");
    guest.work(&mut rig.data, 30);
    flush(&mut guest.session.rings[0]);
    drop(guest);
    host.end();
    let (reader, volume) = (rig.reader(), rig.reader().volume("t"));
    // The snapshot's top, under the new key, stays below; what it has was not copied.
    assert_eq!((volume.layers().len(), volume.keys().len()), (2, 1));
    assert!(reader.volume_content(&volume) == rig.data);
    rig.place.store.ok(&["gc"]);
    rig.assert_layers_are_named();
}

#[test]
fn a_copy_goes_on_after_a_detach_and_after_a_crash() {
    let mut rig = full(&[]);
    let old = deks(&rig, "t").remove(0);
    let (mut host, socket) = attach(&rig, "t", SLOW);
    let mut guest = Guest::on(&socket, 3);
    rig.place.store.ok(&["volume", "rekey", "t"]);
    for round in 0..4 {
        guest.work(&mut rig.data, 20);
        flush(&mut guest.session.rings[0]);
        wait_for_a_part(&rig, "t");
        drop(guest);
        if round % 2 == 0 {
            host.crash()
        } else {
            host.end()
        }
        assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data, "round {round}");
        let (next, socket) = attach(&rig, "t", SLOW);
        guest = Guest::on(&socket, 100 + round);
        host = next;
    }
    drop(guest);
    rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "0"]);
    rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
    host.end();
    assert_free_of(&rig, &old, &rig.data);
    rig.assert_layers_are_named();
}

#[test]
fn rekeying_what_is_being_rekeyed_gives_it_the_last_key() {
    let mut rig = full(&[]);
    let old = deks(&rig, "t").remove(0);
    let (host, socket) = attach(&rig, "t", SLOW);
    let mut guest = Guest::on(&socket, 5);
    for _ in 0..3 {
        guest.work(&mut rig.data, 20);
        rig.place.store.ok(&["volume", "rekey", "t"]);
    }
    assert_eq!(rig.reader().volume("t").keys().len(), 4);
    rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "0"]);
    rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
    guest.work(&mut rig.data, 20);
    flush(&mut guest.session.rings[0]);
    drop(guest);
    host.end();
    assert_free_of(&rig, &old, &rig.data);
    rig.assert_layers_are_named();
}

#[test]
fn what_stands_in_the_way_is_told_and_the_copy_goes_on_when_it_is_gone() {
    let rig = full(&[]);
    rig.place.store.ok(&["volume", "rekey", "t"]);
    let below = rig.reader().catalog().layer_path(rig.reader().volume("t").layers()[1].id);
    let (host, socket) = attach(&rig, "t", SLOW);
    wait_for_a_part(&rig, "t");
    let file = OpenOptions::new().write(true).open(&below).unwrap();
    let rest = fs::read(&below).unwrap().split_off(2 << 20);
    file.set_len(2 << 20).unwrap();
    rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "0"]);
    let shown = wait_for(&rig, "t", "there is a problem", |shown| {
        shown["attachment"]["hydration"]["problem"].is_string()
    });
    assert!(shown["attachment"]["hydration"]["problem"].as_str().unwrap().contains("hydrating"), "{shown}");
    // The guest goes on with what is there.
    assert!(crate::common::attach::read(&mut open(&socket).rings[0], 0, 1 << 20) == rig.data[..1 << 20]);
    std::os::unix::fs::FileExt::write_all_at(&file, &rest, 2 << 20).unwrap();
    wait_until_done(&rig, "t");
    assert!(sees(&mut open(&socket), 8 << 20) == rig.data);
    host.end();
    assert_eq!(results(&rig), ["hydrating", "failed", "completed"]);
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let rig = Rig::new(&["--unencrypted"]);
    assert!(rig.refuse(2, &["volume", "rekey", "t"]).contains("not encrypted"));
    let rig = Rig::new(&[]);
    let before = fs::read(rig.place.volume_json()).unwrap();
    rig.place.store.ok(&["key", "create", "--alias", "alias/off"]);
    rig.place.store.ok(&["key", "disable", "--yes", "alias/off"]);
    assert!(rig.refuse(5, &["volume", "rekey", "t", "--key", "alias/off"]).contains("is disabled"));
    assert!(rig.refuse(3, &["volume", "rekey", "t", "--key", "alias/none"]).contains("alias/none"));
    let (host, _) = attach(&rig, "t", &["--read-only"]);
    assert!(rig.refuse(4, &["volume", "rekey", "t"]).contains("read-only"));
    assert!(rig.refuse(4, &["volume", "flatten", "t"]).contains("read-only"));
    host.end();
    assert_eq!(rig.files("layers").len(), 1);
    let after = fs::read(rig.place.volume_json()).unwrap();
    assert_eq!(after, before);
}

#[test]
fn a_volume_is_made_larger_while_it_is_rekeyed() {
    let mut rig = full(&[]);
    let old = deks(&rig, "t").remove(0);
    let (host, socket) = attach(&rig, "t", SLOW);
    let mut guest = Guest::on(&socket, 17);
    rig.place.store.ok(&["volume", "rekey", "t"]);
    wait_for_a_part(&rig, "t");
    guest.work(&mut rig.data, 20);
    rig.place.store.ok(&["volume", "resize", "t", "12MiB"]);
    rig.data.resize(12 << 20, 0);
    guest.work(&mut rig.data, 40);
    rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "0"]);
    wait_until_done(&rig, "t");
    guest.work(&mut rig.data, 20);
    flush(&mut guest.session.rings[0]);
    drop(guest);
    rig.place.store.ok(&["detach", "t"]);
    host.ends_well();
    assert_free_of(&rig, &old, &rig.data);
    rig.assert_layers_are_named();
}
