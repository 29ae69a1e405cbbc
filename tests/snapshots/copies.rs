//! Copies of snapshots, and volumes that are made larger.

use crate::rig::Rig;
use serde_json::json;
use std::fs;

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
    let deks = |s: &sealblk::volume::Snapshot| reader.deks(s.layout(), &s.encryption_context());
    assert!(deks(&copy) == deks(&original));
    assert_ne!(copy.encryption_context(), original.encryption_context());
    assert_ne!(copy.keys()[0].wrapped.blob, original.keys()[0].wrapped.blob);
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
    rig.place.store.ok(&["volume", "create", "--snapshot", &copy, "--name", "c"]);
    let said = rig.refuse(7, &["snapshot", "create", "c"]);
    assert!(said.contains("are not those that"), "{said}");
}

#[test]
fn a_copy_needs_the_kms_and_knows_its_key() {
    let rig = Rig::new(&[]);
    let source = rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    let said = rig.refuse(8, &["snapshot", "copy", &source, "--key", "alias/other"]);
    assert!(said.contains("is under another KMS key"), "{said}");
    rig.place.store.ok(&["key", "disable", "alias/aws/ebs"]);
    let said = rig.refuse(5, &["snapshot", "copy", &source]);
    assert!(said.contains("is disabled"), "{said}");
    let detail = rig.last_event()["detail"].clone();
    assert_eq!((&detail["event"], &detail["result"]), (&json!("copySnapshot"), &json!("failed")));
    assert_eq!(rig.files("snapshots").len(), 1);
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
        let mut session = crate::attach::open(&socket);
        let end = crate::common::disk::pattern(5, 4096);
        crate::attach::write(&mut session.rings[0], (12 << 20) / 512 - 8, &end);
        drop(session);
        host.end();
        for (size, words) in [("4MiB", "cannot be made smaller"), ("12582913", "not whole sectors")] {
            assert!(rig.refuse(2, &["volume", "resize", "t", size]).contains(words));
        }
        rig.place.store.ok(&["volume", "resize", "t", "12MiB"]);
    }
}
