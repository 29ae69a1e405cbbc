//! Chains of layers made one.

use crate::common::attach::{flush, open};
use crate::common::rig::{Rig, files};
use crate::watch::{Guest, SLOW, attach, deks, full, sees, wait_for_a_part, wait_until_done};

/// A volume with so many snapshots, and what each of them holds.
fn chain(arguments: &[&str], snapshots: usize) -> (Rig, Vec<(String, Vec<u8>)>) {
    let mut rig = full(arguments);
    let (host, socket) = rig.attach("t");
    let mut guest = Guest::on(&socket, 21);
    let made = (0..snapshots)
        .map(|_| {
            guest.work(&mut rig.data, 10);
            (rig.id(&["snapshot", "create", "t"]), rig.data.clone())
        })
        .collect();
    guest.work(&mut rig.data, 10);
    flush(&mut guest.session.rings[0]);
    drop(guest);
    host.end();
    (rig, made)
}

fn assert_snapshots_are_whole(rig: &Rig, snapshots: &[(String, Vec<u8>)]) {
    let reader = rig.reader();
    for (id, expected) in snapshots {
        assert!(reader.snapshot_content(&reader.snapshot(id)) == *expected, "{id}");
    }
}

#[test]
fn a_chain_becomes_one_layer_attached_or_not() {
    for arguments in [&[][..], &["--sector-size", "4096"], &["--unencrypted"]] {
        let (mut rig, snapshots) = chain(arguments, 3);
        assert_eq!(rig.reader().volume("t").layers().len(), 4);
        let before = deks(&rig, "t");
        let (host, socket) = attach(&rig, "t", SLOW);
        let mut guest = Guest::on(&socket, 22);
        rig.place.store.ok(&["volume", "flatten", "t"]);
        wait_for_a_part(&rig, "t");
        guest.work(&mut rig.data, 50);
        rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "0"]);
        rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
        guest.work(&mut rig.data, 20);
        flush(&mut guest.session.rings[0]);
        assert!(sees(&mut guest.session, 8 << 20) == rig.data);
        drop(guest);
        host.end();
        let volume = rig.reader().volume("t");
        assert!(volume.layers().len() == 1 && deks(&rig, "t") == before, "{arguments:?}");
        assert!(rig.reader().volume_content(&volume) == rig.data);
        assert_snapshots_are_whole(&rig, &snapshots);
        rig.assert_layers_are_named();
        let said = rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
        assert!(said.contains("nothing to do"), "{said}");
        // Its clones by the command itself.
        let (snapshot, expected) = &snapshots[1];
        rig.place.store.ok(&["volume", "create", "--snapshot", snapshot, "--name", "c", "--size", "9MiB"]);
        rig.place.store.ok(&["volume", "flatten", "c", "--follow"]);
        let clone = rig.reader().volume("c");
        assert!(clone.layers().len() == 1 && clone.is_encrypted() != (arguments == ["--unencrypted"]));
        assert!(rig.reader().volume_content(&clone)[..8 << 20] == *expected);
        for (id, _) in &snapshots {
            rig.place.store.ok(&["snapshot", "delete", id]);
        }
        rig.assert_layers_are_named();
        let (host, socket) = rig.attach("c");
        assert!(sees(&mut open(&socket), 8 << 20) == *expected);
        host.end();
    }
}

/// The process that has the volume cannot remove what has left the chain: whoever comes next does.
#[test]
fn layers_that_have_left_are_removed_by_who_comes_next() {
    type Next = fn(&Rig);
    let detach: Next = |rig| drop(rig.place.store.ok(&["detach", "t"]));
    let gc: Next = |rig| drop(rig.place.store.ok(&["gc"]));
    let attach_again: Next = |rig| {
        rig.place.store.ok(&["detach", "t"]);
        let (host, _) = rig.attach("t");
        host.end();
    };
    for (what, next) in [("a detach", detach), ("gc", gc), ("an attach", attach_again)] {
        let rig = full(&[]);
        rig.place.store.ok(&["volume", "rekey", "t"]);
        let (host, _) = rig.attach("t");
        wait_until_done(&rig, "t");
        assert_eq!(rig.files("layers").len(), 2, "{what}");
        next(&rig);
        rig.assert_layers_are_named();
        match what {
            "gc" => host.end(),
            _ => host.ends_well(),
        }
        let (host, _) = rig.attach("t");
        host.end();
        let left = files(&rig.place.volume_folder());
        assert!(left.iter().all(|p| p.ends_with("lock") || p.ends_with("volume.json")), "{what}: {left:?}");
    }
}

#[test]
fn flattening_is_cancelled_and_taken_up_again() {
    let (mut rig, snapshots) = chain(&[], 2);
    // Attached: what was copied stays, and so do the layers.
    let (host, socket) = attach(&rig, "t", SLOW);
    let mut guest = Guest::on(&socket, 23);
    rig.place.store.ok(&["volume", "flatten", "t"]);
    wait_for_a_part(&rig, "t");
    assert!(rig.place.store.ok(&["volume", "flatten", "t", "--cancel"]).contains("not flattened any more"));
    let shown = rig.json(&["volume", "show", "t"]);
    assert!(shown["hydration"].is_null() && shown["attachment"]["hydration"].is_null(), "{shown}");
    assert!(rig.place.store.ok(&["volume", "flatten", "t", "--cancel"]).contains("nothing to cancel"));
    guest.work(&mut rig.data, 50);
    flush(&mut guest.session.rings[0]);
    assert!(sees(&mut guest.session, 8 << 20) == rig.data);
    drop(guest);
    host.end();
    assert_eq!(rig.reader().volume("t").layers().len(), 3);
    // Not attached.
    rig.place.store.ok(&["volume", "flatten", "t"]);
    assert!(rig.reader().volume("t").layout().hydrate().is_some());
    rig.place.store.ok(&["volume", "flatten", "t", "--cancel"]);
    let volume = rig.reader().volume("t");
    assert!(volume.layout().hydrate().is_none() && volume.layers().len() == 3);
    assert!(rig.reader().volume_content(&volume) == rig.data);
    assert_snapshots_are_whole(&rig, &snapshots);
    let events = rig.place.events().into_iter().filter(|event| event["detail"]["result"] == "cancelled");
    assert_eq!(events.count(), 2);
    rig.place.store.ok(&["store", "check"]);
    rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
    let volume = rig.reader().volume("t");
    assert!(volume.layers().len() == 1 && rig.reader().volume_content(&volume) == rig.data);
}

/// The mark is the only thing that says of an old data key that it is to go.
#[test]
fn what_another_data_key_encrypts_is_copied_to_the_end() {
    let rig = full(&[]);
    rig.place.store.ok(&["volume", "rekey", "t"]);
    let marked = rig.reader().volume("t").layout().hydrate();
    for command in [&["volume", "rekey", "t", "--cancel"][..], &["volume", "flatten", "t", "--cancel"]] {
        let said = rig.refuse(2, command);
        assert!(said.contains("another data key") && said.contains("--hydrate-rate 1"), "{said}");
    }
    let (host, _) = attach(&rig, "t", SLOW);
    assert!(rig.refuse(2, &["volume", "rekey", "t", "--cancel"]).contains("another data key"));
    host.end();
    assert_eq!(rig.reader().volume("t").layout().hydrate(), marked);
    let image = rig.place.folder().join("raw.img");
    std::fs::write(&image, &rig.data).unwrap();
    rig.place.store.ok(&["volume", "import", image.to_str().unwrap(), "--in-place", "--name", "i"]);
    let said = rig.refuse(2, &["volume", "flatten", "i", "--cancel"]);
    assert!(said.contains("not encrypted yet"), "{said}");
    rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
}
