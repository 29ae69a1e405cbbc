//! A volume's data key wrapped by another KMS key, attached and not.

use crate::common::attach::{Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::killed::{End, killed_before};
use crate::common::store::said;
use sealblk::kms::KeyProvider;
use serde_json::{Value, json};
use std::fs;
use std::process::Stdio;

/// The volume `t` with data, and KMS keys `alias/old`, which wraps its data key, and `alias/new`.
struct Two {
    place: Place,
    old: String,
    new: String,
}

impl Two {
    fn new() -> Self {
        let place = Place::new(&[]);
        let key = |alias: &str| {
            place.store.ok(&["key", "create", "--alias", alias]);
            place.kms().describe(alias).expect("it was just made").key_id
        };
        let (old, new) = (key("alias/old"), key("alias/new"));
        place.store.ok(&["volume", "delete", "t"]);
        place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "t", "--key", "alias/old"]);
        Two { place, old, new }
    }

    fn fill(&self) {
        let host = self.place.attach(&[]);
        let mut session = open(&self.place.socket());
        write(&mut session.rings[0], 128, &data());
        flush(&mut session.rings[0]);
        host.end();
    }

    fn rewrap(&self, arguments: &[&str]) -> Value {
        let said = self.place.store.ok(&[&["volume", "rewrap", "t", "--json"], arguments].concat());
        serde_json::from_str(&said).expect("JSON")
    }

    /// A rewrap that is refused with this exit code and changes nothing.
    #[track_caller]
    fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let before = fs::read(self.place.volume_json()).unwrap();
        let output = self.place.store.run(&[&["volume", "rewrap"], arguments].concat());
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(output.stdout.is_empty(), "{}", said(&output));
        assert!(fs::read(self.place.volume_json()).unwrap() == before);
        said(&output)
    }

    fn key_of_snapshot(&self, id: &str) -> String {
        let shown = self.place.store.ok(&["snapshot", "show", id, "--json"]);
        let shown: Value = serde_json::from_str(&shown).expect("JSON");
        shown["keys"][0]["key_id"].as_str().expect("a key").to_owned()
    }

    /// Nothing needs the old KMS key any more.
    fn assert_free_of_the_old(&self, written: bool) {
        self.place.store.ok(&["key", "disable", "--yes", "alias/old"]);
        assert_eq!(self.place.key(), self.new);
        let host = self.place.attach(&[]);
        let expected = if written { data() } else { vec![0; data().len()] };
        assert!(read(&mut open(&self.place.socket()).rings[0], 128, data().len()) == expected);
        host.end();
    }
}

fn data() -> Vec<u8> {
    pattern(1, 1 << 16)
}

#[test]
fn after_a_rewrap_the_old_kms_key_may_be_disabled() {
    let two = Two::new();
    two.fill();
    let (before, dek) = (two.place.metadata(), two.place.dek());
    let done = two.rewrap(&["--key", "alias/new"]);
    let [old, new] = [&two.old, &two.new].map(|arn| format!("embedded:{arn}"));
    assert_eq!(done, json!({"id": two.place.id(), "rewrapped": [{"key": 0, "from": old, "to": new}]}));
    let after = two.place.metadata();
    assert!(*two.place.dek() == *dek, "the data key is another");
    assert_eq!(after.keys()[0].check(), before.keys()[0].check());
    assert_eq!(after.generation(), before.generation() + 1);
    two.assert_free_of_the_old(true);
}

#[test]
fn a_volume_that_was_never_attached_can_be_rewrapped() {
    let two = Two::new();
    let dek = two.place.dek();
    two.rewrap(&["--key", "alias/new"]);
    assert!(*two.place.dek() == *dek, "the data key is another");
    two.assert_free_of_the_old(false);
}

#[test]
fn an_attached_volume_is_rewrapped_by_its_host_process() {
    let two = Two::new();
    let host = two.place.attach(&[]);
    let mut session = open(&two.place.socket());
    write(&mut session.rings[0], 128, &data());
    two.rewrap(&["--key", "alias/new"]);
    assert_eq!(two.place.key(), two.new);
    assert!(read(&mut session.rings[0], 128, data().len()) == data());
    // What the host process was attached with, and what the next attach asks for.
    let shown: Value = serde_json::from_str(&two.place.store.ok(&["volume", "show", "t", "--json"])).unwrap();
    let used = json!([{"provider": "embedded", "key_id": two.old}]);
    assert_eq!(shown["attachment"]["unwrapped_by"], used);
    assert_eq!(shown["keys"][0]["key_id"], json!(two.new));
    two.place.store.ok(&["key", "disable", "--yes", "alias/old"]);
    // Again, by the same key: the newest version.
    let blob = two.place.metadata().keys()[0].first().wrapped.blob.clone();
    two.rewrap(&[]);
    let again = two.place.metadata();
    assert_eq!(again.keys()[0].first().wrapped.key_id, two.new);
    assert_ne!(again.keys()[0].first().wrapped.blob, blob);
    flush(&mut session.rings[0]);
    host.end();
    two.assert_free_of_the_old(true);
}

#[test]
fn without_a_key_the_newest_version_of_the_same_one_wraps() {
    let two = Two::new();
    two.fill();
    let kms = two.place.kms();
    let material = |two: &Two| {
        let metadata = two.place.metadata();
        let blob = &metadata.keys()[0].first().wrapped.blob;
        kms.open_blob(None, blob, &metadata.encryption_context()).expect("it unwraps").material
    };
    let before = material(&two);
    kms.rotate_on_demand("alias/old").expect("rotate");
    assert_eq!(material(&two), before);
    two.rewrap(&[]);
    assert_ne!(material(&two), before);
    assert_eq!(two.place.key(), two.old);
    let host = two.place.attach(&[]);
    assert!(read(&mut open(&two.place.socket()).rings[0], 128, data().len()) == data());
    host.end();
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let two = Two::new();
    two.fill();
    two.place.store.ok(&["key", "disable", "--yes", "alias/new"]);
    let words = two.refused(5, &["t", "--key", "alias/new"]);
    assert!(
        words.contains(&format!("{} is disabled; enable it with \"sealblk key enable alias/new\"", two.new))
    );
    two.place.store.ok(&["key", "enable", "alias/new"]);
    two.place.store.ok(&["key", "disable", "--yes", "alias/old"]);
    let words = two.refused(5, &["t", "--key", "alias/new"]);
    assert!(words.contains(&format!("\"sealblk key enable {}\"", two.old)), "{words}");
    two.place.store.ok(&["key", "enable", "alias/old"]);
    two.refused(3, &["t", "--key", "alias/none"]);
    two.refused(3, &["none"]);
    two.refused(2, &[]);
    two.refused(2, &["t", "--all"]);
    let words = two.refused(2, &["t", "--from", "alias/new"]);
    assert!(words.contains(&format!("are wrapped by embedded:{}", two.old)), "{words}");
    two.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "plain", "--unencrypted"]);
    let words = two.refused(2, &["plain"]);
    assert!(words.contains("is not encrypted"), "{words}");
}

/// The wrapped key of another data key, put in place of the volume's: what it would be
/// rewrapped to is as wrong.
#[test]
fn a_wrapped_key_that_was_swapped_is_not_wrapped_anew() {
    let two = Two::new();
    two.fill();
    let metadata = two.place.metadata();
    let fresh = two.place.kms().generate_wrapped("alias/old", 64, &metadata.encryption_context()).unwrap();
    let mut value: Value = serde_json::from_slice(&fs::read(two.place.volume_json()).unwrap()).unwrap();
    use base64::Engine;
    value["keys"][0]["wrapped"] = json!(base64::engine::general_purpose::STANDARD.encode(&fresh.blob));
    fs::write(two.place.volume_json(), value.to_string()).unwrap();
    two.place.store.accept();
    let words = two.refused(7, &["t", "--key", "alias/new"]);
    assert!(words.contains("unwraps to another key"), "{words}");
}

#[test]
fn a_fleet_moves_from_one_kms_key_to_another() {
    let two = Two::new();
    two.fill();
    let create = |name: &str, more: &[&str]| {
        two.place.store.ok(&[&["volume", "create", "--size", "1MiB", "--name", name], more].concat());
    };
    create("a", &["--key", "alias/old"]);
    create("b", &[]);
    create("c", &["--unencrypted"]);
    let snapshot = |name: &str| two.place.store.ok(&["snapshot", "create", name]).trim().to_owned();
    let (of_a, of_c) = (snapshot("a"), snapshot("c"));
    let host = two.place.attach(&[]);
    let all = ["volume", "rewrap", "--all", "--from", "alias/old", "--key", "alias/new", "--json"];
    let done: Value = serde_json::from_str(&two.place.store.ok(&all)).unwrap();
    assert_eq!(done.as_array().unwrap().len(), 3, "{done}");
    assert_eq!(done[2]["id"], json!(of_a));
    let keys = || {
        let catalog = two.place.catalog();
        let key = |name| {
            let metadata = catalog.load(catalog.resolve(name).unwrap()).unwrap();
            metadata.keys()[0].first().wrapped.key_id.clone()
        };
        ["t", "a", "b"].map(key)
    };
    let [t, a, b] = keys();
    assert_eq!((&t, &a), (&two.new, &two.new));
    assert!(b != two.old && b != two.new);
    assert_eq!(two.key_of_snapshot(&of_a), two.new);
    let none = two.place.store.run(&["snapshot", "rewrap", &of_c]);
    assert!(none.status.code() == Some(2) && said(&none).contains("it is not encrypted"), "{}", said(&none));
    // One that fails is named, and keeps no other from it.
    let broken = two.place.catalog();
    let broken = broken.folder(broken.resolve("a").unwrap()).join("volume.json");
    fs::write(&broken, "{").unwrap();
    let all = ["volume", "rewrap", "--all", "--key", "alias/old"];
    let output = two.place.store.run(&all);
    assert_eq!(output.status.code(), Some(7));
    assert!(said(&output).contains("3 volumes and snapshots done, 1 not"), "{}", said(&output));
    assert_eq!(two.place.key(), two.old);
    host.end();
}

/// A snapshot, a copy of it, and what is made of them, under the new KMS key alone.
#[test]
fn a_snapshot_outlives_the_kms_key_that_it_was_made_under() {
    let two = Two::new();
    let store = &two.place.store;
    two.fill();
    let snapshot = store.ok(&["snapshot", "create", "t"]).trim().to_owned();
    let copy = store.ok(&["snapshot", "copy", &snapshot, "--key", "alias/old"]).trim().to_owned();
    let record = |id: &str| store.root().join("snapshots").join(format!("{id}.json"));
    let needed = |key: &str| -> Value {
        let shown = store.ok(&["key", "show", key, "--json"]);
        serde_json::from_str::<Value>(&shown).unwrap()["needed_by"].clone()
    };
    let host = two.place.attach(&[]);
    let mut snapshots = [&snapshot, &copy];
    snapshots.sort();
    let volume = [two.place.id()];
    let without = [&volume[0], snapshots[0], snapshots[1]];
    let all = json!({
        "volumes": volume, "attached": volume, "snapshots": snapshots, "without_another_key": without
    });
    assert_eq!(needed("alias/old"), all);
    assert!(store.ok(&["key", "show", "alias/old"]).contains(&format!("needed by {} (attached", volume[0])));
    host.end();
    for id in [&snapshot, &copy] {
        let before = fs::read(record(id)).unwrap();
        // Neither by a key that is not there, nor from one that it is not under, is anything done.
        for (code, arguments) in [(3, ["--key", "alias/none"]), (2, ["--from", "alias/new"])] {
            let output = store.run(&[&["snapshot", "rewrap", id][..], &arguments].concat());
            assert_eq!(output.status.code(), Some(code), "{}", said(&output));
            assert!(fs::read(record(id)).unwrap() == before);
        }
        let done = store.ok(&["snapshot", "rewrap", id, "--key", "alias/new", "--json"]);
        let done: Value = serde_json::from_str(&done).unwrap();
        let [old, new] = [&two.old, &two.new].map(|arn| format!("embedded:{arn}"));
        assert_eq!(done, json!({"id": id, "rewrapped": [{"key": 0, "from": old, "to": new}]}));
        assert_eq!(two.key_of_snapshot(id), two.new);
    }
    store.ok(&["store", "check"]);
    store.ok(&["volume", "rewrap", "t", "--key", "alias/new"]);
    let nobody = json!({"volumes": [], "attached": [], "snapshots": [], "without_another_key": []});
    assert_eq!(needed("alias/old"), nobody);
    two.assert_free_of_the_old(true);
    store.ok(&["volume", "delete", "t"]);
    for id in [&snapshot, &copy] {
        store.ok(&["volume", "create", "--snapshot", id, "--name", "t"]);
        two.assert_free_of_the_old(true);
        store.ok(&["volume", "delete", "t"]);
    }
}

/// A rewrap that is killed at any moment leaves a volume that attaches.
#[test]
fn a_killed_rewrap_leaves_one_of_the_two() {
    let two = Two::new();
    two.fill();
    let keys = [&two.old, &two.new];
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let mut command = two.place.store.command();
        command.args(["volume", "rewrap", "t", "--key", "alias/new"]);
        let end = killed_before(command.stdout(Stdio::null()).stderr(Stdio::null()), step);
        let key = two.place.key();
        assert!(keys.contains(&&key), "step {step}: {key}");
        assert_eq!(two.place.dek().len(), 64, "step {step}");
        if end == End::Exited(0) {
            assert!(step > 3, "step {step}");
            break;
        }
        assert_eq!(end, End::Killed, "step {step}");
        two.place.store.ok(&["volume", "rewrap", "t", "--key", "alias/old"]);
    }
    two.assert_free_of_the_old(true);
}
