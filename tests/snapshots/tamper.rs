//! Records that were edited, swapped, or put where they do not belong: no data is shown.
//!
//! A snapshot of a clone proves the clone as its first attach would.

use crate::common::rig::Rig;
use crate::common::store::Store;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use sealblk::kms::KeyProvider;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Edits a record, which an operator then accepts.
fn edit(store: &Store, path: &Path, edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let whole = fs::read(path).unwrap();
    let mut value: Value = serde_json::from_slice(&whole).unwrap();
    edit(&mut value);
    put(store, path, &serde_json::to_vec_pretty(&value).unwrap());
    whole
}

fn put(store: &Store, path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
    store.accept();
}

/// A volume with two snapshots under one data key, of different states.
struct Two {
    rig: Rig,
    first: String,
    second: String,
}

impl Two {
    fn new() -> Self {
        let rig = Rig::new(&[]);
        let (first, second) = (rig.id(&["snapshot", "create", "t"]), rig.id(&["snapshot", "create", "t"]));
        Two { rig, first, second }
    }

    fn record(&self, id: &str) -> PathBuf {
        self.rig.place.store.root().join(format!("snapshots/{id}.json"))
    }

    /// A clone of the second snapshot, whose record is edited so.
    fn clone_of_edited(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let whole = edit(&self.rig.place.store, &self.record(&self.second), change);
        let create = ["volume", "create", "--snapshot", &self.second, "--name", name];
        self.rig.place.store.ok(&create);
        put(&self.rig.place.store, &self.record(&self.second), &whole);
    }

    fn volume_json(&self, name: &str) -> PathBuf {
        let reader = self.rig.reader();
        reader.catalog().folder(reader.volume(name).id()).join("volume.json")
    }

    /// The clone is proved and refused, by a snapshot of it and by an attach.
    #[track_caller]
    fn refused(&self, name: &str, code: i32, words: &str) {
        let said = self.rig.refuse(code, &["snapshot", "create", name]);
        assert!(said.contains(words), "{name}: {said}");
        let mut command = self.rig.place.store.command();
        command.args(["attach", name, "--socket-path"]).arg(self.rig.place.socket());
        let said = self.rig.place.run(command, vec![]);
        assert_eq!((said.code, said.out.as_str()), (code, ""), "{name}: {}", said.err);
        assert!(said.err.contains(words), "{name}: {}", said.err);
        assert!(!self.rig.place.socket().exists(), "{name}");
    }
}

const NOT_SEALED_SO: &str = "are not those that";

#[test]
fn a_snapshot_whose_layers_were_edited_makes_clones_that_are_refused() {
    let two = Two::new();
    let first: Value = serde_json::from_slice(&fs::read(two.record(&two.first)).unwrap()).unwrap();
    two.clone_of_edited("swapped", |v| v["layers"] = first["layers"].clone());
    two.refused("swapped", 7, NOT_SEALED_SO);
    two.clone_of_edited("swapped-with-mac", |v| {
        v["layers"] = first["layers"].clone();
        v["mac"] = first["mac"].clone();
    });
    two.refused("swapped-with-mac", 7, NOT_SEALED_SO);
    two.clone_of_edited("reordered", |v| v["layers"].as_array_mut().unwrap().reverse());
    two.refused("reordered", 7, NOT_SEALED_SO);
    two.clone_of_edited("shortened", |v| drop(v["layers"].as_array_mut().unwrap().pop()));
    two.refused("shortened", 7, NOT_SEALED_SO);
    two.clone_of_edited("plaintext", |v| v["layers"][1]["key"] = Value::Null);
    two.refused("plaintext", 7, NOT_SEALED_SO);
    two.clone_of_edited("masked", |v| {
        v["layers"][1]["key"] = Value::Null;
        v["layers"][1]["masked"] = json!(true);
    });
    two.refused("masked", 7, NOT_SEALED_SO);
    two.clone_of_edited("mac", |v| v["mac"] = json!("00".repeat(32)));
    two.refused("mac", 7, NOT_SEALED_SO);
    // What is edited is what is refused: the others are whole.
    two.clone_of_edited("whole", |_| ());
    two.rig.place.store.ok(&["snapshot", "create", "whole"]);
}

#[test]
fn a_record_that_is_not_a_whole_record_is_refused() {
    let two = Two::new();
    let path = two.record(&two.first);
    type Case = (&'static str, fn(&mut Value));
    let cases: [Case; 8] = [
        ("unknown field `colour`", |v| v["colour"] = json!("red")),
        ("format version 2", |v| v["format"] = json!(2)),
        ("it is encrypted, but has no MAC", |v| {
            v["mac"] = Value::Null;
            v["keys"][0]["check"] = Value::Null;
        }),
        ("it is no copy, and sealed as", |v| v["sealed_as"] = json!("snap-0123456789abcdef0")),
        ("is not that of", |v| v["keys"][0]["context"]["aws:ebs:id"] = json!("vol-0123456789abcdef0")),
        ("is not that of", |v| v["copy_of"] = json!("snap-0123456789abcdef0")),
        ("reserved", |v| v["tags"]["aws:x"] = json!("1")),
        ("more than the whole", |v| v["layers"][0]["size"] = json!(16 << 20)),
    ];
    for (words, change) in cases {
        let whole = edit(&two.rig.place.store, &path, change);
        for command in
            [&["snapshot", "show"][..], &["volume", "create", "--snapshot"], &["snapshot", "delete"]]
        {
            let said = two.rig.refuse(7, &[command, &[&two.first]].concat());
            assert!(said.contains(words) && said.contains(path.to_str().unwrap()), "{words}: {said}");
        }
        put(&two.rig.place.store, &path, &whole);
    }
    // Under another's name.
    fs::copy(two.record(&two.second), &path).unwrap();
    assert!(two.rig.refuse(7, &["snapshot", "show", &two.first]).contains("it describes"));
}

#[test]
fn an_unsealed_clone_that_was_edited_is_refused() {
    let two = Two::new();
    two.clone_of_edited("c", |_| ());
    let path = two.volume_json("c");
    let nowhere = "nothing says where the layers below its top are from";
    let first: Value = serde_json::from_slice(&fs::read(two.record(&two.first)).unwrap()).unwrap();
    type Case<'a> = (&'a str, Box<dyn Fn(&mut Value)>);
    let cases: Vec<Case<'_>> = vec![
        (NOT_SEALED_SO, Box::new(|v| v["layers"].as_array_mut().unwrap().swap(1, 2))),
        (NOT_SEALED_SO, Box::new(|v| v["layers"][2]["key"] = Value::Null)),
        (NOT_SEALED_SO, Box::new(|v| v["origin"]["proof"]["size"] = json!(4096 + (8 << 20)))),
        (NOT_SEALED_SO, Box::new(|v| v["origin"]["proof"]["volume"] = json!("vol-0123456789abcdef0"))),
        (NOT_SEALED_SO, Box::new(move |v| v["origin"]["proof"]["mac"] = first["mac"].clone())),
        (nowhere, Box::new(|v| v["origin"] = Value::Null)),
        (nowhere, Box::new(|v| v["origin"]["proof"] = Value::Null)),
        // Somebody's plaintext, slipped in below.
        (
            nowhere,
            Box::new(|v| {
                v["layers"][1]["key"] = Value::Null;
                v["layers"][1]["masked"] = json!(true);
            }),
        ),
        ("is plaintext, and not the lowest", Box::new(|v| v["layers"][1]["key"] = Value::Null)),
    ];
    // By its id: its name may not be readable any more.
    let id = two.rig.reader().volume("c").id().to_string();
    for (words, change) in cases {
        let whole = edit(&two.rig.place.store, &path, change);
        two.refused(&id, 7, words);
        put(&two.rig.place.store, &path, &whole);
    }
    two.rig.place.store.ok(&["snapshot", "create", "c"]);
}

#[test]
fn a_fresh_volume_with_somebodys_layer_below_is_refused() {
    let two = Two::new();
    two.rig.place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "fresh"]);
    two.rig.place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "plain", "--unencrypted"]);
    let plain = two.rig.reader().volume("plain").top().id;
    let layer = two.rig.reader().catalog().layer_path(plain);
    edit(&two.rig.place.store, &two.volume_json("fresh"), |v| {
        let lower = json!({"id": plain, "key": null, "masked": false, "size": 8 << 20});
        v["layers"].as_array_mut().unwrap().push(lower);
    });
    // Whose volume still writes to it, and when nobody's does.
    two.refused("fresh", 7, "is named by");
    two.rig.place.store.ok(&["volume", "delete", "plain"]);
    fs::write(layer, vec![0x41; 8 << 20]).unwrap();
    two.refused("fresh", 7, "nothing says where the layers below its top are from");
}

#[test]
fn a_clone_with_anothers_wrapped_key_is_refused() {
    let two = Two::new();
    two.clone_of_edited("c", |_| ());
    let path = two.volume_json("c");
    two.rig.place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "o"]);
    let (reader, kms) = (two.rig.reader(), two.rig.place.kms());
    let (clone, source, other) = (reader.volume("c"), reader.volume("t"), reader.volume("o"));
    let plant = |blob: &[u8]| {
        let blob = BASE64.encode(blob);
        edit(&two.rig.place.store, &path, |v| v["keys"][0]["wrapped"] = json!(blob))
    };
    for theirs in [&source, &other] {
        let whole = plant(&theirs.keys()[0].first().wrapped.blob);
        two.refused("c", 5, "InvalidCiphertextException");
        put(&two.rig.place.store, &path, &whole);
    }
    // Who may use the KMS can wrap another data key for the clone, and then the proof does not hold.
    let key = &clone.keys()[0].first().wrapped.key_id;
    let fresh = kms.generate_wrapped(key, 64, &clone.encryption_context()).unwrap();
    let moved = kms
        .rewrap(
            &other.keys()[0].first().wrapped,
            &other.encryption_context(),
            key,
            &clone.encryption_context(),
        )
        .unwrap();
    for blob in [fresh.blob, moved.blob] {
        let whole = plant(&blob);
        two.refused("c", 7, NOT_SEALED_SO);
        put(&two.rig.place.store, &path, &whole);
    }
    two.rig.place.store.ok(&["snapshot", "create", "c"]);
}

#[test]
fn a_clone_whose_seal_was_taken_away_is_missed_where_there_is_data() {
    let two = Two::new();
    two.clone_of_edited("c", |_| ());
    let (path, never_attached) = (two.volume_json("c"), fs::read(two.volume_json("c")).unwrap());
    // Data in its top layer, which a guest wrote after the first attach.
    let top = two.rig.reader().catalog().layer_path(two.rig.reader().volume("c").top().id);
    two.rig.place.store.ok(&["volume", "tag", "c", "used=yes"]);
    let mut bytes = fs::read(&top).unwrap();
    bytes[4096] = 1;
    fs::write(&top, bytes).unwrap();
    two.refused("c", 7, "there is data in its layer, but no seal");
    assert!(fs::read(&path).unwrap() == never_attached);
}

#[test]
fn an_encrypted_volume_over_plaintext_is_never_without_a_seal() {
    let rig = Rig::new(&["--unencrypted"]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let create = ["volume", "create", "--snapshot", &snapshot, "--name", "c", "--key", "alias/aws/ebs"];
    rig.place.store.ok(&create);
    let two = Two { rig, first: String::new(), second: String::new() };
    let path = two.volume_json("c");
    let whole = edit(&two.rig.place.store, &path, |v| {
        v["mac"] = Value::Null;
        v["keys"][0]["check"] = Value::Null;
    });
    two.refused("c", 7, "nothing says where the layers below its top are from");
    put(&two.rig.place.store, &path, &whole);
    // Nor with another plaintext layer than it was sealed with.
    let other = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    let layers = two.rig.place.store.root().join("layers");
    fs::write(layers.join(format!("{other}.img")), vec![0x41; 8 << 20]).unwrap();
    edit(&two.rig.place.store, &path, |v| {
        v["layers"][1]["id"] = json!(other);
        v["hydrate"] = json!(other);
    });
    two.refused("c", 7, "the MAC does not fit the rest");
    put(&two.rig.place.store, &path, &whole);
    two.rig.place.store.ok(&["snapshot", "create", "c"]);
}
