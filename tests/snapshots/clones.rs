//! Volumes made from snapshots.

use crate::common::attach::{flush, open, write};
use crate::common::disk::pattern;
use crate::common::rig::Rig;
use sealblk::catalog::Seal;
use serde_json::json;

#[test]
fn a_clone_under_the_same_kms_key_has_the_same_data_key_wrapped_for_itself() {
    let rig = Rig::new(&[]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let made = rig.json(&["volume", "create", "--snapshot", &snapshot, "--name", "c"]);
    assert_eq!((&made["size"], &made["snapshot_id"]), (&json!(8 << 20), &json!(snapshot)));
    let reader = rig.reader();
    let (source, clone, snapshot) = (reader.volume("t"), reader.volume("c"), reader.snapshot(&snapshot));
    let keys = |m: &sealblk::catalog::Metadata| reader.deks(m.layout(), &m.encryption_context());
    assert!(keys(&source) == keys(&clone) && clone.keys().len() == 1);
    assert_ne!(clone.keys()[0].first().wrapped.blob, source.keys()[0].first().wrapped.blob);
    assert!(!clone.is_sealed() && clone.layout().hydrate().is_none());
    assert_eq!(&clone.layers()[1..], snapshot.layers());
    assert!(reader.volume_content(&clone) == rig.data);
    // The proof holds, with the data keys alone.
    let deks: Vec<_> = keys(&clone).iter().map(|k| sealblk::crypt::Dek::from_bytes(k).unwrap()).collect();
    assert_eq!(clone.verify(&deks).unwrap(), Seal::Unsealed);
    // And a clone of a clone.
    let next = rig.id(&["snapshot", "create", "c"]);
    assert!(rig.reader().volume("c").is_sealed());
    rig.place.store.ok(&["volume", "create", "--snapshot", &next, "--name", "d"]);
    assert!(rig.reader().volume_content(&rig.reader().volume("d")) == rig.data);
    rig.place.store.ok(&["snapshot", "create", "d"]);
    rig.assert_layers_are_named();
}

#[test]
fn a_clone_can_be_larger_and_not_smaller() {
    let rig = Rig::new(&["--sector-size", "4096"]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", &snapshot, "--size", "12MiB", "--name", "c"]);
    let clone = rig.reader().volume("c");
    let sizes: Vec<u64> = clone.layers().iter().map(|l| l.size).collect();
    assert_eq!((clone.size(), sizes), (12 << 20, vec![12 << 20, 8 << 20]));
    let mut expected = rig.data.clone();
    expected.resize(12 << 20, 0);
    assert!(rig.reader().volume_content(&clone) == expected);
    // Its snapshot has layers of two lengths.
    let next = rig.id(&["snapshot", "create", "c"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", &next, "--name", "d"]);
    rig.place.store.ok(&["snapshot", "create", "d"]);
    assert!(rig.reader().volume_content(&rig.reader().volume("d")) == expected);
    let said = rig.refuse(2, &["volume", "create", "--snapshot", &snapshot, "--size", "4MiB"]);
    assert!(said.contains("cannot be smaller"), "{said}");
    let said = rig.refuse(2, &["volume", "create", "--snapshot", &snapshot, "--sector-size", "512"]);
    assert!(said.contains("sectors of 4096 bytes"), "{said}");
}

#[test]
fn another_kms_key_gives_the_top_layer_a_data_key_of_its_own() {
    let rig = Rig::new(&[]);
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let create = ["volume", "create", "--snapshot", &snapshot, "--name", "c", "--key", "alias/other"];
    rig.place.store.ok(&create);
    let (clone, old) = (rig.reader().volume("c"), rig.reader().snapshot(&snapshot));
    assert_eq!((clone.keys().len(), clone.top().key, clone.layers()[1].key), (2, Some(1), Some(0)));
    assert_ne!(clone.keys()[1].first().wrapped.key_id, clone.keys()[0].first().wrapped.key_id);
    assert_eq!(clone.layout().hydrate(), Some(old.layout().top().id));
    assert!(!clone.is_sealed());
    assert!(rig.reader().volume_content(&clone) == rig.data);
    // Its own snapshot goes on with the move to the new key.
    let next = rig.id(&["snapshot", "create", "c"]);
    assert_eq!(rig.reader().snapshot(&next).layout().hydrate(), clone.layout().hydrate());
    rig.place.store.ok(&["volume", "create", "--snapshot", &next, "--name", "d"]);
    rig.place.store.ok(&["snapshot", "create", "d"]);
    assert!(rig.reader().volume_content(&rig.reader().volume("d")) == rig.data);
}

#[test]
fn the_key_that_the_snapshot_has_is_recognised_by_any_of_its_names() {
    let rig = Rig::new(&[]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    for key in ["alias/aws/ebs", &rig.place.key()] {
        let made = rig.json(&["volume", "create", "--snapshot", &snapshot, "--key", key]);
        assert_eq!(made["keys"].as_array().unwrap().len(), 1, "{key}");
    }
}

#[test]
fn encrypted_never_becomes_unencrypted() {
    let rig = Rig::new(&[]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let said = rig.refuse(2, &["volume", "create", "--snapshot", &snapshot, "--unencrypted"]);
    assert!(said.contains("is encrypted, and so is every volume that is made from it"), "{said}");
}

#[test]
fn an_unencrypted_snapshot_can_become_an_encrypted_volume_which_is_sealed_at_once() {
    let rig = Rig::new(&["--unencrypted"]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "plain"]);
    let plain = rig.reader().volume("plain");
    assert!(!plain.is_encrypted() && plain.keys().is_empty() && plain.layout().hydrate().is_none());
    let create = ["volume", "create", "--snapshot", &snapshot, "--name", "c", "--key", "alias/aws/ebs"];
    rig.place.store.ok(&create);
    let clone = rig.reader().volume("c");
    assert!(clone.is_encrypted() && clone.is_sealed());
    assert_eq!((clone.top().key, clone.layers()[1].key), (Some(0), None));
    assert_eq!(clone.layout().hydrate(), Some(clone.layers()[1].id));
    for volume in [plain, clone] {
        assert!(rig.reader().volume_content(&volume) == rig.data);
    }
    rig.place.store.configure("encrypt-by-default = true\n");
    let made = rig.json(&["volume", "create", "--snapshot", &snapshot]);
    assert_eq!(made["encrypted"], true);
    rig.refuse(2, &["volume", "create", "--snapshot", &snapshot, "--unencrypted"]);
}

#[test]
fn a_clone_outlives_what_it_was_made_from() {
    let rig = Rig::new(&[]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "c"]);
    rig.place.store.ok(&["volume", "delete", "t"]);
    rig.place.store.ok(&["snapshot", "delete", &snapshot]);
    rig.assert_layers_are_named();
    // Never attached, with nothing left of its snapshot: the proof is its own.
    rig.place.store.ok(&["snapshot", "create", "c"]);
    assert!(rig.reader().volume_content(&rig.reader().volume("c")) == rig.data);
    rig.refuse(3, &["volume", "create", "--snapshot", &snapshot]);
}

#[test]
fn a_kms_key_that_is_disabled_makes_no_clone() {
    let rig = Rig::new(&[]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let key = rig.place.key();
    rig.place.store.ok(&["key", "disable", "--yes", &key]);
    let layers = rig.files("layers");
    let said = rig.refuse(5, &["volume", "create", "--snapshot", &snapshot]);
    assert!(said.contains("is disabled; enable it with"), "{said}");
    assert_eq!(rig.files("layers"), layers);
    let event = rig.last_event();
    assert_eq!(
        (&event["detail"]["event"], &event["detail"]["result"]),
        (&json!("createVolume"), &json!("failed"))
    );
    assert_eq!(event["detail"]["cause"], format!("{key} is disabled."));
}

#[test]
fn volumes_are_found_by_tag_state_and_origin() {
    let rig = Rig::new(&["--tag", "Name=web", "--tag", "env=prod"]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "c", "--tag", "Name=web"]);
    let names = |filters: &[&str]| -> Vec<String> {
        let filters = filters.iter().flat_map(|f| ["--filter", f]);
        let arguments: Vec<&str> = ["volume", "list"].into_iter().chain(filters).collect();
        let listed = rig.json(&arguments);
        let mut names: Vec<String> =
            listed.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&["tag:Name=web"]), ["c", "t"]);
    assert_eq!(names(&["tag:Name=web", "tag:env=prod"]), ["t"]);
    assert_eq!(names(&[&format!("snapshot-id={snapshot}")]), ["c"]);
    assert_eq!(names(&["status=in-use"]), [""; 0]);
    // What is written since is a volume's own; what a snapshot names, too, it shares.
    let listed = rig.json(&["volume", "list"]);
    for volume in listed.as_array().unwrap() {
        assert_eq!(volume["space"]["own"], 0, "{volume}");
        assert!(volume["space"]["shared"].as_u64().unwrap() >= 3 * (64 << 10), "{volume}");
    }
    assert!(rig.place.store.ok(&["volume", "list"]).contains(" shared"));
    let (host, socket) = rig.attach("c");
    let mut session = open(&socket);
    write(&mut session.rings[0], 0, &pattern(8, 64 << 10));
    flush(&mut session.rings[0]);
    drop(session);
    host.end();
    let listed = rig.json(&["volume", "list", "--filter", "name=c"]);
    assert!(listed[0]["space"]["own"].as_u64().unwrap() >= 64 << 10, "{listed}");
    // Tags can be changed while the volume is attached.
    let host = rig.place.start(
        {
            let mut command = rig.place.store.command();
            rig.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "a"]);
            command.args(["attach", "a", "--socket-path"]).arg(rig.place.socket());
            command
        },
        vec![],
    );
    let tagged = rig.json(&["volume", "tag", "a", "Name=x", "y="]);
    assert_eq!(tagged["tags"], json!({"Name": "x", "y": ""}));
    assert_eq!(names(&["status=in-use", "tag-key=y"]), ["a"]);
    rig.place.store.ok(&["volume", "untag", "a", "y"]);
    rig.refuse(3, &["volume", "untag", "a", "y"]);
    host.end();
    assert_eq!(rig.json(&["volume", "show", "a"])["tags"], json!({"Name": "x"}));
}
