//! Snapshots of volumes that nobody has attached: what they hold, what they leave, and what is refused.

use crate::common::attach::{Host, Place};
use crate::common::rig::Rig;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

#[test]
fn a_snapshot_holds_what_the_volume_held() {
    for arguments in [&[][..], &["--sector-size", "4096"], &["--unencrypted"]] {
        let rig = Rig::new(arguments);
        let before = rig.reader().volume("t");
        let id = rig.id(&["snapshot", "create", "t", "--description", "nightly", "--tag", "env=prod"]);
        let (volume, snapshot) = (rig.reader().volume("t"), rig.reader().snapshot(&id));
        assert!(rig.reader().snapshot_content(&snapshot) == rig.data, "{arguments:?}");
        assert!(rig.reader().volume_content(&volume) == rig.data, "{arguments:?}");
        assert_eq!(snapshot.layers(), before.layers());
        assert_eq!(&volume.layers()[1..], before.layers());
        assert_eq!(
            (volume.generation(), volume.is_sealed()),
            (before.generation() + 1, before.is_encrypted())
        );
        let new = fs::metadata(rig.reader().catalog().layer_path(volume.top().id)).unwrap();
        assert_eq!((new.len(), new.blocks(), new.permissions().mode() & 0o777), (8 << 20, 0, 0o600));
        let frozen = fs::metadata(rig.reader().catalog().layer_path(before.top().id)).unwrap();
        assert_eq!(frozen.permissions().mode() & 0o777, 0o444);
        assert!(!rig.place.volume_folder().join("pending.json").exists());
        let mut shown = rig.json(&["snapshot", "show", &id]);
        for layer in shown["layers"].as_array_mut().unwrap() {
            // What a list does not look at.
            let more = ["on_disk", "on_device", "shared_with"];
            layer.as_object_mut().unwrap().retain(|field, _| !more.contains(&&**field));
        }
        assert_eq!(shown, rig.json(&["snapshot", "list"])[0]);
        assert_eq!((&shown["volume_id"], &shown["size"]), (&json!(volume.id()), &json!(8 << 20)));
        assert_eq!((&shown["description"], &shown["tags"]), (&json!("nightly"), &json!({"env": "prod"})));
        assert_eq!((&shown["state"], &shown["problem"]), (&json!("completed"), &json!(null)));
    }
}

#[test]
fn the_event_is_that_of_ebs() {
    let rig = Rig::new(&[]);
    let id = rig.id(&["snapshot", "create", "t"]);
    let event = rig.last_event();
    assert_eq!(event["detail-type"], "EBS Snapshot Notification");
    let arn = |kind: &str, id: &str| format!("arn:aws:ec2:us-east-1:000000000000:{kind}/{id}");
    assert_eq!(event["resources"], json!([arn("snapshot", &id)]));
    let detail = &event["detail"];
    assert_eq!((&detail["event"], &detail["result"]), (&json!("createSnapshot"), &json!("succeeded")));
    assert_eq!(detail["snapshot_id"], arn("snapshot", &id));
    assert_eq!(detail["source"], arn("volume", &rig.place.id()));
    assert!(detail["startTime"].as_str().unwrap() <= detail["endTime"].as_str().unwrap());
}

#[test]
fn a_volume_that_was_never_attached_is_sealed_by_its_snapshot() {
    let place = Place::new(&[]);
    assert!(!place.metadata().is_sealed());
    place.store.ok(&["snapshot", "create", "t"]);
    assert!(place.metadata().is_sealed());
}

#[test]
fn without_its_kms_key_there_is_no_snapshot() {
    let rig = Rig::new(&[]);
    let key = rig.place.key();
    rig.place.store.ok(&["key", "disable", "--yes", &key]);
    let (layers, before) = (rig.files("layers"), fs::read(rig.place.volume_json()).unwrap());
    let said = rig.refuse(5, &["snapshot", "create", "t"]);
    assert!(said.contains(&format!("{key} is disabled; enable it with")), "{said}");
    let detail = rig.last_event()["detail"].clone();
    assert_eq!((&detail["event"], &detail["result"]), (&json!("createSnapshot"), &json!("failed")));
    assert_eq!(
        (&detail["cause"], &detail["snapshot_id"]),
        (&json!(format!("{key} is disabled.")), &json!(""))
    );
    assert_eq!((rig.files("layers"), rig.files("snapshots")), (layers, vec![]));
    assert!(fs::read(rig.place.volume_json()).unwrap() == before);
}

#[test]
fn what_is_not_understood_is_refused_and_changes_nothing() {
    let rig = Rig::new(&["--unencrypted"]);
    let long = "x".repeat(256);
    for arguments in [
        &["snapshot", "create", "t", "--description", &long][..],
        &["snapshot", "create", "t", "--description", "a\nb"],
        &["snapshot", "create", "t", "--tag", "aws:x=1"],
        &["snapshot", "create", "t", "--tag", "x"],
        &["snapshot", "list", "--filter", "colour=red"],
    ] {
        rig.refuse(2, arguments);
    }
    for arguments in [
        &["snapshot", "create", "none"][..],
        &["snapshot", "show", "snap-0123456789abcdef0"],
        &["snapshot", "delete", "none"],
        &["snapshot", "show", ""],
    ] {
        rig.refuse(3, arguments);
    }
    assert_eq!((rig.files("layers").len(), rig.files("snapshots").len()), (1, 0));
}

#[test]
fn snapshots_are_found_by_name_tag_and_source() {
    let rig = Rig::new(&["--unencrypted"]);
    let (one, other) = (
        rig.id(&["snapshot", "create", "t", "--name", "monday"]),
        rig.id(&["snapshot", "create", "t", "--name", "tuesday", "--tag", "keep=yes"]),
    );
    assert_eq!(rig.json(&["snapshot", "show", "monday"])["id"], one.as_str());
    assert_eq!(rig.json(&["snapshot", "show", &other[..18]])["id"], other.as_str());
    for (filter, expected) in [
        ("tag:Name=monday", vec![&one]),
        ("tag-key=keep", vec![&other]),
        ("tag:keep=no", vec![]),
        ("volume-id=vol-0123456789abcdef0", vec![]),
        ("encrypted=false", vec![&one, &other]),
        ("status=completed", vec![&one, &other]),
    ] {
        let listed = rig.json(&["snapshot", "list", "--filter", filter, "--filter", "encrypted=false"]);
        let ids = listed.as_array().unwrap().iter().map(|s| s["id"].as_str().unwrap().to_owned());
        let (ids, expected): (BTreeSet<_>, BTreeSet<_>) =
            (ids.collect(), expected.into_iter().cloned().collect());
        assert_eq!(ids, expected, "{filter}");
    }
    rig.place.store.ok(&["snapshot", "tag", "monday", "Name=tuesday"]);
    assert!(rig.refuse(2, &["snapshot", "show", "tuesday"]).contains(&one));
    rig.place.store.ok(&["snapshot", "untag", &one, "Name"]);
    rig.refuse(3, &["snapshot", "untag", &one, "Name"]);
    assert_eq!(rig.json(&["snapshot", "show", "tuesday"])["id"], other.as_str());
}

#[test]
fn layers_go_when_nothing_names_them() {
    let rig = Rig::new(&[]);
    let one = rig.id(&["snapshot", "create", "t"]);
    let two = rig.id(&["snapshot", "create", "t"]);
    assert_eq!(rig.files("layers").len(), 3);
    // The volume's chain needs them all.
    rig.place.store.ok(&["snapshot", "delete", &one]);
    assert_eq!(rig.files("layers").len(), 3);
    rig.assert_layers_are_named();
    // The volume goes, and with it its top alone.
    rig.place.store.ok(&["volume", "delete", "t"]);
    assert_eq!(rig.files("layers").len(), 2);
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&two)) == rig.data);
    rig.place.store.ok(&["snapshot", "delete", &two]);
    assert_eq!((rig.files("layers"), rig.files("snapshots"), rig.files("volumes")), (vec![], vec![], vec![]));
}

#[test]
fn a_chain_has_an_end() {
    let rig = Rig::new(&["--unencrypted"]);
    for n in 1..64 {
        rig.place.store.ok(&["snapshot", "create", "t"]);
        // A layer that holds nothing would leave the chain.
        let top = File::options().write(true).open(rig.place.layer()).unwrap();
        top.write_all_at(&[1; 512], n * 4096).unwrap();
    }
    let data = rig.reader().volume_content(&rig.reader().volume("t"));
    assert_eq!(rig.reader().volume("t").layers().len(), 64);
    let said = rig.refuse(8, &["snapshot", "create", "t"]);
    assert!(said.contains("has 64 layers") && said.contains("flatten"), "{said}");
    assert!(rig.reader().volume_content(&rig.reader().volume("t")) == data);
    rig.assert_layers_are_named();
}

/// The ledger knows which layers a record may name that cannot be read: those stay, and no others.
#[test]
fn a_record_that_cannot_be_read_holds_back_the_layers_that_it_may_name_and_no_others() {
    let rig = Rig::new(&["--unencrypted"]);
    let (one, two) = (rig.id(&["snapshot", "create", "t"]), rig.id(&["snapshot", "create", "t"]));
    rig.place.store.ok(&["volume", "delete", "t"]);
    let of_one = rig.reader().snapshot(&one).layers().iter().map(|layer| layer.id).collect::<Vec<_>>();
    let root = rig.place.store.root();
    let record = root.join(format!("snapshots/{one}.json"));
    let whole = fs::read(&record).unwrap();
    fs::write(&record, &whole[..40]).unwrap();
    let list = rig.json(&["snapshot", "list"]);
    let states: Vec<_> = list.as_array().expect("a list").iter().map(|it| it["state"].as_str()).collect();
    assert!(states.len() == 2 && states.contains(&Some("damaged")), "{list}");
    let layers = rig.files("layers");
    assert_eq!(layers.len(), of_one.len() + 1);
    // Where the ledger does not know either, nothing is removed.
    let entry = root.join(format!("ledger/{one}.json"));
    let known = fs::read(&entry).unwrap();
    fs::remove_file(&entry).unwrap();
    let said = rig.refuse(7, &["snapshot", "delete", &two]);
    assert!(said.contains(record.to_str().unwrap()) && said.contains("nothing is removed"), "{said}");
    assert!(rig.refuse(7, &["gc"]).contains(record.to_str().unwrap()));
    assert_eq!(rig.files("layers"), layers);
    // What is left is removed by the next command that knows.
    fs::write(&entry, known).unwrap();
    rig.place.store.ok(&["gc"]);
    let left = rig.files("layers");
    let named: Vec<String> = of_one.iter().map(|id| format!("{id}.img")).collect();
    assert!(
        left.len() == named.len() && left.iter().all(|file| named.iter().any(|name| file.ends_with(name))),
        "{left:?}"
    );
    fs::write(&record, whole).unwrap();
    rig.place.store.ok(&["store", "check"]);
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&one)) == rig.data);
}

/// Whoever has the volume: nobody, or a host process.
#[test]
fn twenty_at_a_time_are_made_one_after_the_other() {
    let rig = Rig::new(&[]);
    let mut ids = BTreeSet::new();
    for is_attached in [false, true] {
        let host = is_attached.then(|| rig.attach("t").0);
        for (code, said) in rig.place.store.together(&[&["snapshot", "create", "t"][..]; 20]) {
            assert_eq!(code, 0, "{said}");
            let id = said.lines().find(|line| line.starts_with("snap-")).expect("it prints the id");
            assert!(ids.insert(id.to_owned()), "{id} twice");
        }
        host.into_iter().for_each(Host::end);
    }
    assert_eq!(ids.len(), 40);
    // Of those that were made while nobody had it attached, the empty layers have left the chain.
    let layers = rig.reader().volume("t").layers().len();
    assert!((22..=24).contains(&layers), "{layers}");
    rig.assert_layers_are_named();
}
