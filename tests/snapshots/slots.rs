//! Snapshots whose data keys several KMS keys wrap, and what is made of them.

use crate::common::rig::Rig;
use crate::common::store::said;
use sealblk::kms::KeyProvider;
use serde_json::{Value, json};

/// The volume `t` under `alias/a` and `alias/b`, and a snapshot of it; there is also `alias/c`.
fn rig() -> (Rig, String) {
    let rig = Rig::new(&[]);
    for alias in ["alias/a", "alias/b", "alias/c"] {
        rig.place.store.ok(&["key", "create", "--alias", alias]);
    }
    rig.place.store.ok(&["volume", "rewrap", "t", "--key", "alias/a"]);
    rig.place.store.ok(&["volume", "key", "add", "t", "--key", "alias/b"]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    (rig, snapshot)
}

fn arns(rig: &Rig, aliases: &[&str]) -> Vec<String> {
    let arn = |alias: &&str| rig.place.kms().describe(alias).expect("it was made").key_id;
    aliases.iter().map(arn).collect()
}

/// The ARNs of the KMS keys of each data key.
fn slots(shown: &Value) -> Vec<Vec<String>> {
    let arns = |key: &Value| {
        let slots = key["slots"].as_array().expect("a list").iter();
        slots.map(|slot| slot["key_id"].as_str().expect("a text").to_owned()).collect()
    };
    shown["keys"].as_array().expect("a list").iter().map(arns).collect()
}

fn of_snapshot(rig: &Rig, id: &str) -> Vec<Vec<String>> {
    slots(&rig.json(&["snapshot", "show", id]))
}

fn of_volume(rig: &Rig, name: &str) -> Vec<Vec<String>> {
    slots(&rig.json(&["volume", "show", name]))
}

/// Whatever a clone of that name holds is what the volume held.
#[track_caller]
fn assert_opens(rig: &Rig, name: &str) {
    let (host, _) = rig.attach(name);
    host.end();
    let out = rig.place.folder().join(format!("{name}.img"));
    rig.place.store.ok(&["volume", "export", "--force", name, out.to_str().unwrap()]);
    assert!(std::fs::read(&out).unwrap() == rig.data, "{name}");
}

#[test]
fn snapshots_copies_and_clones_have_every_kms_key() {
    let (rig, snapshot) = rig();
    let both = [arns(&rig, &["alias/a", "alias/b"])];
    assert_eq!(of_snapshot(&rig, &snapshot), both);
    let copy = rig.id(&["snapshot", "copy", &snapshot]);
    assert_eq!(of_snapshot(&rig, &copy), both);
    rig.place.store.ok(&["volume", "create", "--snapshot", &copy, "--name", "c"]);
    assert_eq!(of_volume(&rig, "c"), both);
    // Attached, too.
    let (host, _) = rig.attach("t");
    let of_attached = rig.id(&["snapshot", "create", "t"]);
    assert_eq!(of_snapshot(&rig, &of_attached), both);
    host.end();
    for (off, on) in [("alias/a", "alias/b"), ("alias/b", "alias/a")] {
        rig.place.store.ok(&["key", "enable", on]);
        rig.place.store.ok(&["key", "disable", off]);
        assert_opens(&rig, "c");
        let out = rig.place.folder().join(format!("{}.img", &off[6..]));
        rig.place.store.ok(&["snapshot", "export", &copy, out.to_str().unwrap()]);
        assert!(std::fs::read(&out).unwrap() == rig.data);
    }
    rig.place.store.ok(&["store", "check"]);
}

#[test]
fn what_a_lost_kms_key_cannot_wrap_anew_is_made_without_it() {
    let (rig, snapshot) = rig();
    rig.place.store.ok(&["key", "disable", "alias/a"]);
    let output = rig.place.store.run(&["snapshot", "copy", &snapshot]);
    assert!(output.status.success(), "{}", said(&output));
    let id = String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned();
    let words = said(&output);
    let a = arns(&rig, &["alias/a"]).remove(0);
    assert!(
        words.contains(&format!("is made without embedded:{a}")) && words.contains("is disabled"),
        "{words}"
    );
    assert_eq!(of_snapshot(&rig, &id), [arns(&rig, &["alias/b"])]);
    rig.place.store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "c"]);
    assert_eq!(of_volume(&rig, "c"), [arns(&rig, &["alias/b"])]);
    assert_opens(&rig, "c");
    // When it can be used again, it is added.
    rig.place.store.ok(&["key", "enable", "alias/a"]);
    rig.place.store.ok(&["volume", "key", "add", "c", "--key", "alias/a"]);
    rig.place.store.ok(&["key", "disable", "alias/b"]);
    assert_opens(&rig, "c");
    rig.place.store.ok(&["key", "disable", "alias/a"]);
    let words = rig.refuse(5, &["snapshot", "copy", &snapshot]);
    assert!(words.contains("none of the 2 KMS keys gives the data key"), "{words}");
}

#[test]
fn a_key_that_is_named_wraps_alone_and_with_those_that_are_named_besides() {
    let (rig, snapshot) = rig();
    let copy = |more: &[&str]| {
        let layers = rig.files("layers");
        let id = rig.id(&[&["snapshot", "copy", &snapshot], more].concat());
        assert_eq!(rig.files("layers"), layers, "it shares the data");
        of_snapshot(&rig, &id)
    };
    assert_eq!(copy(&["--key", "alias/b"]), [arns(&rig, &["alias/b"])]);
    assert_eq!(copy(&["--key", "alias/b", "--also-key", "alias/c"]), [arns(&rig, &["alias/b", "alias/c"])]);
    assert_eq!(copy(&["--also-key", "alias/c"]), [arns(&rig, &["alias/a", "alias/b", "alias/c"])]);
    let create = |name: &str, more: &[&str]| {
        rig.place.store.ok(&[&["volume", "create", "--snapshot", &snapshot, "--name", name], more].concat());
        assert_opens(&rig, name);
        of_volume(&rig, name)
    };
    assert_eq!(create("only", &["--key", "alias/b"]), [arns(&rig, &["alias/b"])]);
    assert_eq!(create("more", &["--also-key", "alias/c"]), [arns(&rig, &["alias/a", "alias/b", "alias/c"])]);
    // A data key of its own: below it stays what the snapshot has.
    let (ab, b) = (arns(&rig, &["alias/a", "alias/b"]), arns(&rig, &["alias/b"]));
    assert_eq!(create("own", &["--own-data-key"]), [ab.clone(), ab.clone()]);
    assert_eq!(create("own-b", &["--own-data-key", "--key", "alias/b"]), [ab.clone(), b]);
    let c = arns(&rig, &["alias/c", "alias/b"]);
    assert_eq!(create("other", &["--key", "alias/c", "--also-key", "alias/b"]).last(), Some(&c));
    // Everything copied under a new data key.
    let full = rig.id(&["snapshot", "copy", &snapshot, "--key", "alias/c", "--also-key", "alias/b"]);
    assert_eq!(of_snapshot(&rig, &full), [c]);
    // What it has already is not wrapped twice.
    assert_eq!(copy(&["--key", "alias/b", "--also-key", "alias/b"]), [arns(&rig, &["alias/b"])]);
}

#[test]
fn the_kms_keys_of_a_snapshot_come_and_go() {
    let (rig, snapshot) = rig();
    let record = || std::fs::read(rig.place.store.root().join(format!("snapshots/{snapshot}.json"))).unwrap();
    let format = || serde_json::from_slice::<Value>(&record()).unwrap()["format"].clone();
    assert_eq!(format(), json!(2));
    let added = rig.json(&["snapshot", "key", "add", &snapshot, "--key", "alias/c"]);
    let c = arns(&rig, &["alias/c"]).remove(0);
    assert_eq!(added["added"], json!([{"key": 0, "provider": "embedded", "key_id": c}]));
    rig.place.store.ok(&["snapshot", "key", "remove", &snapshot, "--key", "alias/a", "--key", "alias/b"]);
    assert_eq!((of_snapshot(&rig, &snapshot), format()), (vec![vec![c]], json!(1)));
    let before = record();
    let words = rig.refuse(2, &["snapshot", "key", "remove", &snapshot, "--key", "alias/c"]);
    assert!(words.contains("no KMS key would be left"), "{words}");
    assert!(record() == before);
    // The volume has its own.
    assert_eq!(of_volume(&rig, "t"), [arns(&rig, &["alias/a", "alias/b"])]);
    rig.place.store.ok(&["key", "disable", "alias/a"]);
    rig.place.store.ok(&["key", "disable", "alias/b"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "c"]);
    assert_opens(&rig, "c");
    rig.place.store.ok(&["store", "check"]);
}

/// What was written before there were slots is what it was, for the ledger as well.
#[test]
fn a_record_without_slots_is_written_as_it_always_was() {
    let rig = Rig::new(&[]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let path = rig.place.store.root().join(format!("snapshots/{snapshot}.json"));
    let record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(record["format"], json!(1));
    let fields: Vec<&String> = record["keys"][0].as_object().unwrap().keys().collect();
    assert_eq!(fields, ["check", "context", "key_id", "provider", "wrapped"]);
    let ledger = rig.place.store.root().join(format!("ledger/{}.json", rig.place.id()));
    assert!(std::fs::read_to_string(ledger).unwrap().starts_with("{\"format\":1,"));
    // A version that says more than the record has is none that sealblk writes.
    let mut newer = record.clone();
    newer["format"] = json!(2);
    std::fs::write(&path, newer.to_string()).unwrap();
    let words = rig.refuse(7, &["snapshot", "show", &snapshot]);
    assert!(words.contains("format version 2"), "{words}");
}
