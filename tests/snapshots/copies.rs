//! Copies of snapshots, and volumes that are made larger.

use crate::common::killed::{End, killed_before};
use crate::common::rig::Rig;
use serde_json::json;
use std::fs;
use std::process::Stdio;

#[test]
fn a_copy_has_the_same_data_key_wrapped_for_itself_and_shares_the_data() {
    let rig = Rig::new(&[]);
    let source = rig.id(&["snapshot", "create", "t", "--description", "first", "--tag", "a=b"]);
    let layers = rig.files("layers");
    let made = rig.json(&["snapshot", "copy", &source, "--key", "alias/aws/ebs"]);
    let id = made["id"].as_str().unwrap();
    assert_eq!((&made["copy_of"], &made["description"]), (&json!(source), &json!("first")));
    assert_eq!((&made["tags"], rig.files("layers")), (&json!({}), layers));
    let reader = rig.reader();
    let (copy, original) = (reader.snapshot(id), reader.snapshot(&source));
    let deks = |s: &sealblk::catalog::Snapshot| reader.deks(s.layout(), &s.encryption_context());
    assert!(deks(&copy) == deks(&original));
    assert_ne!(copy.encryption_context(), original.encryption_context());
    assert_ne!(copy.keys()[0].first().wrapped.blob, original.keys()[0].first().wrapped.blob);
    let event = rig.last_event();
    let detail = &event["detail"];
    assert_eq!((&detail["event"], &detail["result"]), (&json!("copySnapshot"), &json!("succeeded")));
    assert_eq!(detail["Incremental"], "true");
    assert!(detail["source"].as_str().unwrap().ends_with(&source));
    assert!(detail["snapshot_id"].as_str().unwrap().ends_with(id));
    // It outlives its original and the volume, and makes clones that prove right.
    rig.place.store.ok(&["snapshot", "delete", &source]);
    rig.place.store.ok(&["volume", "delete", "t"]);
    assert!(rig.reader().snapshot_content(&copy) == rig.data);
    let again = rig.id(&["snapshot", "copy", id]);
    rig.place.store.ok(&["volume", "create", "--snapshot", &again, "--name", "c"]);
    let (host, _) = rig.attach("c");
    host.end();
    assert!(rig.reader().volume_content(&rig.reader().volume("c")) == rig.data);
    rig.assert_layers_are_named();
}

#[test]
fn a_copy_with_anothers_layers_makes_clones_that_are_refused() {
    let rig = Rig::new(&[]);
    let (one, two) = (rig.id(&["snapshot", "create", "t"]), rig.id(&["snapshot", "create", "t"]));
    let copy = rig.id(&["snapshot", "copy", &two]);
    let record = |id: &str| rig.place.store.root().join(format!("snapshots/{id}.json"));
    let other: serde_json::Value = serde_json::from_slice(&fs::read(record(&one)).unwrap()).unwrap();
    let mut edited: serde_json::Value = serde_json::from_slice(&fs::read(record(&copy)).unwrap()).unwrap();
    edited["layers"] = other["layers"].clone();
    fs::write(record(&copy), edited.to_string()).unwrap();
    rig.place.store.accept();
    rig.place.store.ok(&["volume", "create", "--snapshot", &copy, "--name", "c"]);
    let said = rig.refuse(7, &["snapshot", "create", "c"]);
    assert!(said.contains("are not those that"), "{said}");
}

#[test]
fn a_copy_needs_the_kms_and_knows_its_key() {
    let rig = Rig::new(&[]);
    let source = rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    rig.place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    let said = rig.refuse(5, &["snapshot", "copy", &source, "--key", "alias/other"]);
    assert!(said.contains("is disabled"), "{said}");
    let said = rig.refuse(5, &["snapshot", "copy", &source]);
    assert!(said.contains("is disabled"), "{said}");
    let detail = rig.last_event()["detail"].clone();
    assert_eq!((&detail["event"], &detail["result"]), (&json!("copySnapshot"), &json!("failed")));
    assert_eq!(rig.files("snapshots").len(), 1);
}

/// A snapshot with three layers, and what it holds.
fn of_three_layers(rig: &mut Rig) -> String {
    rig.id(&["snapshot", "create", "t"]);
    for n in 0..2 {
        let (host, socket) = rig.attach("t");
        let mut session = crate::common::attach::open(&socket);
        let (at, data) = ((2 + n) << 20, crate::common::disk::pattern(n, 1 << 20));
        crate::common::attach::write(&mut session.rings[0], at / 512, &data);
        rig.data[at as usize..][..1 << 20].copy_from_slice(&data);
        drop(session);
        host.end();
        if n == 0 {
            rig.id(&["snapshot", "create", "t"]);
        }
    }
    rig.id(&["snapshot", "create", "t"])
}

#[test]
fn a_copy_under_another_key_has_its_own_data_and_needs_nothing_of_the_original() {
    for arguments in [&[][..], &["--unencrypted", "--sector-size", "4096"]] {
        let mut rig = Rig::new(arguments);
        let source = of_three_layers(&mut rig);
        rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
        // While the volume is in use.
        let (host, _) = rig.attach("t");
        let id = rig.id(&["snapshot", "copy", &source, "--key", "alias/other"]);
        let detail = rig.last_event()["detail"].clone();
        assert_eq!((&detail["event"], &detail["result"]), (&json!("copySnapshot"), &json!("succeeded")));
        assert_eq!(detail["Incremental"], "false");
        host.end();
        let reader = rig.reader();
        let (copy, original) = (reader.snapshot(&id), reader.snapshot(&source));
        let deks = |s: &sealblk::catalog::Snapshot| reader.deks(s.layout(), &s.encryption_context());
        assert_eq!((copy.layers().len(), copy.is_encrypted()), (1, true));
        assert!(!deks(&original).contains(&deks(&copy)[0]));
        assert!(reader.snapshot_content(&copy) == rig.data);
        let stored = fs::read(reader.catalog().layer_path(copy.layers()[0].id)).unwrap();
        let in_the_clear = stored.chunks(512).zip(rig.data.chunks(512)).filter(|(a, b)| a == b && a[0] != 0);
        assert_eq!(in_the_clear.count(), 0);
        for snapshot in reader.catalog().snapshot_ids().unwrap() {
            if snapshot != copy.id() {
                rig.place.store.ok(&["snapshot", "delete", &snapshot.to_string()]);
            }
        }
        rig.place.store.ok(&["volume", "delete", "t"]);
        if arguments.is_empty() {
            rig.place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
        }
        rig.place.store.ok(&["volume", "create", "--snapshot", &id, "--name", "c"]);
        let (host, _) = rig.attach("c");
        host.end();
        assert!(rig.reader().volume_content(&rig.reader().volume("c")) == rig.data);
        rig.assert_layers_are_named();
        let again = rig.id(&["snapshot", "copy", &id]);
        assert_eq!(rig.reader().snapshot(&again).layers(), copy.layers());
    }
}

#[test]
fn a_copy_that_is_killed_is_gone_on_with_or_cleared_away() {
    let mut rig = Rig::new(&[]);
    let source = of_three_layers(&mut rig);
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    let (before, layers) = (rig.files("snapshots"), rig.files("layers"));
    let copy = ["snapshot", "copy", &source, "--key", "alias/other"];
    for step in 0.. {
        assert!(step < 100, "it never ends");
        let mut command = rig.place.store.command();
        command.args(copy).stdout(Stdio::null()).stderr(Stdio::null());
        let end = killed_before(&mut command, step);
        let left = rig.files("snapshots");
        let unfinished = left.iter().find(|path| path.extension().is_some_and(|e| e == "copying")).cloned();
        match (step % 2, &unfinished) {
            // What was begun becomes the copy.
            (0, Some(path)) => {
                let id = rig.id(&copy);
                assert!(path.to_str().unwrap().contains(&id), "step {step}: {id}");
                assert!(
                    rig.reader().snapshot_content(&rig.reader().snapshot(&id)) == rig.data,
                    "step {step}"
                );
            }
            (1, Some(path)) => {
                assert!(
                    rig.place.store.ok(&["gc", "--dry-run"]).contains(path.to_str().unwrap()),
                    "step {step}"
                );
            }
            _ => {}
        }
        rig.place.store.ok(&["gc"]);
        for snapshot in rig.reader().catalog().snapshot_ids().unwrap() {
            if !before.contains(&rig.place.store.root().join(format!("snapshots/{snapshot}.json"))) {
                assert!(
                    rig.reader().snapshot_content(&rig.reader().snapshot(&snapshot.to_string())) == rig.data
                );
                rig.place.store.ok(&["snapshot", "delete", &snapshot.to_string()]);
            }
        }
        assert_eq!(
            (rig.files("snapshots"), rig.files("layers")),
            (before.clone(), layers.clone()),
            "step {step}"
        );
        if end == End::Exited(0) {
            assert!(step > 8 && unfinished.is_none(), "step {step}");
            break;
        }
        assert_eq!(end, End::Killed, "step {step}");
    }
}

/// Under a new data key it would prove right what nobody with the old one had made.
#[test]
fn what_was_tampered_with_is_not_copied_under_another_key() {
    let rig = Rig::new(&[]);
    let (one, two) = (rig.id(&["snapshot", "create", "t"]), rig.id(&["snapshot", "create", "t"]));
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    let record = |id: &str| rig.place.store.root().join(format!("snapshots/{id}.json"));
    let other: serde_json::Value = serde_json::from_slice(&fs::read(record(&one)).unwrap()).unwrap();
    let mut edited: serde_json::Value = serde_json::from_slice(&fs::read(record(&two)).unwrap()).unwrap();
    edited["layers"] = other["layers"].clone();
    fs::write(record(&two), edited.to_string()).unwrap();
    rig.place.store.accept();
    let said = rig.refuse(7, &["snapshot", "copy", &two, "--key", "alias/other"]);
    assert!(said.contains("is not what it was sealed with"), "{said}");
    assert_eq!(rig.files("snapshots").len(), 2);
}

#[test]
fn a_volume_is_made_larger_and_never_smaller() {
    for arguments in [&[][..], &["--unencrypted", "--sector-size", "4096"]] {
        let mut rig = Rig::new(arguments);
        rig.place.store.ok(&["snapshot", "create", "t"]);
        let grown = rig.json(&["volume", "resize", "t", "12MiB"]);
        assert_eq!((&grown["size"], &grown["problem"]), (&json!(12 << 20), &json!(null)));
        rig.data.resize(12 << 20, 0);
        assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data);
        let told: Vec<_> = rig.place.events().iter().map(|e| e["detail"]["result"].clone()).collect();
        assert_eq!(told[told.len() - 3..], ["modifying", "optimizing", "completed"]);
        let (host, socket) = rig.attach("t");
        let mut session = crate::common::attach::open(&socket);
        let end = crate::common::disk::pattern(5, 4096);
        crate::common::attach::write(&mut session.rings[0], (12 << 20) / 512 - 8, &end);
        drop(session);
        host.end();
        for (size, words) in [("4MiB", "cannot be made smaller"), ("12582913", "not whole sectors")] {
            assert!(rig.refuse(2, &["volume", "resize", "t", size]).contains(words));
        }
        rig.place.store.ok(&["volume", "resize", "t", "12MiB"]);
    }
}
