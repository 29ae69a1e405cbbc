//! A wrapped data key opens its own volume and no other, and only as long as its KMS key lives.

use crate::common::attach::{Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::store::said;
use crate::common::tree::Tree;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use sealblk::base::root::Root;
use sealblk::catalog::Metadata;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::{Clock, Moment, SystemClock};
use sealblk::kms::{KeyProvider, WrappedKey};
use serde_json::{Value, json};
use std::fs;

/// The volume `t` with data, and a volume `o` with data of its own.
struct Two {
    place: Place,
    data: Vec<u8>,
    whole: Vec<u8>,
    other: Metadata,
}

impl Two {
    fn new() -> Self {
        let place = Place::new(&[]);
        let data = pattern(1, 1 << 16);
        let host = place.attach(&[]);
        let mut session = open(&place.socket());
        write(&mut session.rings[0], 128, &data);
        flush(&mut session.rings[0]);
        host.end();
        place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "o"]);
        let mut command = place.store.command();
        command.args(["attach", "o", "--socket-path"]).arg(place.socket());
        let host = place.start(command, vec![]);
        write(&mut open(&place.socket()).rings[0], 128, &data);
        host.end();
        let catalog = place.catalog();
        let other = catalog.load(catalog.resolve("o").unwrap()).unwrap();
        let whole = fs::read(place.volume_json()).unwrap();
        Two { place, data, whole, other }
    }

    /// Edits the volume's metadata and attaches it, which is refused; then puts it back.
    #[track_caller]
    fn refused(&self, what: &str, code: i32, words: &str, events: usize, edit: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&self.whole).unwrap();
        edit(&mut value);
        let (path, before) = (self.place.volume_json(), self.place.events().len());
        fs::write(&path, serde_json::to_vec_pretty(&value).unwrap()).unwrap();
        self.place.store.accept();
        let tree = Tree::of(&self.place);
        let mut command = self.place.store.command();
        let id = value["id"].as_str().unwrap().to_owned();
        command.args(["attach", &id, "--socket-path"]).arg(self.place.socket());
        let said = self.place.run(command, vec![]);
        assert_eq!((said.code, said.out.as_str()), (code, ""), "{what}: {}", said.err);
        assert!(said.err.contains(words), "{what}: {}", said.err);
        tree.assert_unchanged(&self.place, what, events);
        for event in &self.place.events()[before..] {
            assert_eq!(event["detail"]["event"], "reattachVolume", "{what}");
            let cause = event["detail"]["cause"].as_str().unwrap().trim_end_matches('.');
            assert!(!cause.is_empty() && said.err.contains(cause), "{what}: {cause}");
            assert_eq!(event["resources"][1], value["keys"][0]["key_id"], "{what}");
        }
        fs::write(&path, &self.whole).unwrap();
        self.place.store.accept();
    }

    #[track_caller]
    fn assert_whole(&self) {
        let host = self.place.attach(&[]);
        assert!(read(&mut open(&self.place.socket()).rings[0], 128, self.data.len()) == self.data);
        host.end();
    }
}

fn wrapped(blob: &[u8]) -> Value {
    json!(BASE64.encode(blob))
}

#[test]
fn another_volumes_wrapped_key_is_refused() {
    let two = Two::new();
    let theirs = &two.other.keys()[0].first().wrapped;
    let words = "InvalidCiphertextException; the wrapped data key is damaged, or was made for another volume";
    two.refused("their wrapped key", 5, words, 1, |v| {
        v["keys"][0]["wrapped"] = wrapped(&theirs.blob);
    });
    let their_context = json!(two.other.encryption_context().pairs());
    two.refused("their wrapped key with their context", 7, "is not that of", 0, |v| {
        v["keys"][0]["wrapped"] = wrapped(&theirs.blob);
        v["keys"][0]["context"] = their_context;
    });
    let their_json: Value = serde_json::from_slice(&two.other.to_json()).unwrap();
    two.refused("all their keys, seal and all", 5, "InvalidCiphertextException", 1, |v| {
        let context = v["keys"][0]["context"].take();
        v["keys"] = their_json["keys"].clone();
        v["keys"][0]["context"] = context;
        v["mac"] = their_json["mac"].clone();
    });
    two.assert_whole();
}

/// Who may use the KMS may wrap any data key for this volume: then the check value tells.
#[test]
fn another_data_key_for_the_same_volume_is_refused() {
    let two = Two::new();
    let (kms, context) = (two.place.kms(), two.place.metadata().encryption_context());
    let key = two.place.key();
    let words = "unwraps to another key than the one the volume was written with";
    let fresh = kms.generate_wrapped(&key, 64, &context).unwrap();
    two.refused("a fresh data key", 7, words, 0, |v| v["keys"][0]["wrapped"] = wrapped(&fresh.blob));
    let theirs = &two.other.keys()[0].first().wrapped;
    let moved = kms.rewrap(theirs, &two.other.encryption_context(), &key, &context).unwrap();
    two.refused("their data key, wrapped for us", 7, words, 0, |v| {
        v["keys"][0]["wrapped"] = wrapped(&moved.blob)
    });
    let seal: Value = serde_json::from_slice(&two.other.to_json()).unwrap();
    two.refused("the same with their seal", 7, "the MAC does not fit", 0, |v| {
        v["keys"][0]["wrapped"] = wrapped(&moved.blob);
        v["keys"][0]["check"] = seal["keys"][0]["check"].clone();
        v["mac"] = seal["mac"].clone();
    });
    two.refused("the same without a seal", 7, "there is data in its layer, but no seal", 0, |v| {
        v["keys"][0]["wrapped"] = wrapped(&moved.blob);
        v["keys"][0]["check"] = Value::Null;
        v["mac"] = Value::Null;
    });
    two.assert_whole();
}

#[test]
fn data_keys_of_a_wrong_shape_are_refused() {
    let two = Two::new();
    let (kms, context) = (two.place.kms(), two.place.metadata().encryption_context());
    let key = two.place.key();
    for (plaintext, words) in [
        (&[7; 32][..], "has 32 bytes instead of 64"),
        (&[7; 65], "has 65 bytes instead of 64"),
        (&[7; 64], "both halves of the data key are the same"),
    ] {
        let blob = kms.encrypt(&key, plaintext, &context).unwrap().blob;
        two.refused(words, 7, words, 1, |v| v["keys"][0]["wrapped"] = wrapped(&blob));
    }
    two.assert_whole();
}

#[test]
fn a_wrapped_key_that_was_changed_is_refused() {
    let two = Two::new();
    let blob = two.place.metadata().keys()[0].first().wrapped.blob.clone();
    for at in [0, 4, 37, 61, 100, blob.len() - 1] {
        let mut changed = blob.clone();
        changed[at] ^= 1;
        let what = format!("byte {at}");
        two.refused(&what, 5, "InvalidCiphertextException", 1, |v| {
            v["keys"][0]["wrapped"] = wrapped(&changed)
        });
    }
    for (what, bytes) in
        [("a short blob", &blob[..140]), ("one byte", &blob[..1]), ("a long one", &[0; 6144])]
    {
        two.refused(what, 5, "InvalidCiphertextException", 1, |v| v["keys"][0]["wrapped"] = wrapped(bytes));
    }
    two.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    let other = two.place.kms().describe("alias/other").unwrap().key_id;
    two.refused("another KMS key", 5, "The key ID in the request does not identify", 1, |v| {
        v["keys"][0]["key_id"] = json!(other);
    });
    let none = "arn:aws:kms:us-east-1:000000000000:key/00000000-0000-4000-8000-000000000000";
    two.refused("a KMS key that never was", 3, &format!("Key '{none}' does not exist"), 1, |v| {
        v["keys"][0]["key_id"] = json!(none);
    });
    two.refused("a provider of another version", 8, "the pkcs11 provider is not in this version", 1, |v| {
        v["keys"][0]["provider"] = json!("pkcs11");
    });
    two.assert_whole();
}

#[test]
fn the_same_data_key_under_another_kms_key_is_as_good() {
    let two = Two::new();
    two.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    let metadata = two.place.metadata();
    let context = metadata.encryption_context();
    let WrappedKey { key_id, blob } = two
        .place
        .kms()
        .rewrap(&metadata.keys()[0].first().wrapped, &context, "alias/other", &context)
        .unwrap();
    let mut value: Value = serde_json::from_slice(&two.whole).unwrap();
    value["keys"][0]["key_id"] = json!(key_id);
    value["keys"][0]["wrapped"] = wrapped(&blob);
    fs::write(two.place.volume_json(), serde_json::to_vec(&value).unwrap()).unwrap();
    two.place.store.accept();
    two.place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    two.assert_whole();
}

/// The machine's clock, some days later.
struct Later {
    days: i64,
}

impl Clock for Later {
    fn now(&self) -> Moment {
        let now = SystemClock.now();
        let ms = self.days * 24 * 3_600_000;
        Moment { wall: now.wall + ms, up: now.up + ms, ..now }
    }
}

#[test]
fn a_kms_key_that_was_deleted_takes_its_volumes_with_it() {
    let two = Two::new();
    let arn = two.place.key();
    two.place.store.ok(&["key", "schedule-deletion", "--yes", &arn, "--days", "7"]);
    let clock = Box::new(Later { days: 8 });
    let kms = Embedded::at(
        Root::new(two.place.store.root()).kms(),
        two.place.store.config(),
        clock,
        sealblk::base::hardened::harden().unwrap(),
    );
    assert!(kms.describe(&arn).is_err(), "it is gone");
    two.refused("a deleted KMS key", 3, &format!("Key '{arn}' does not exist"), 1, |_| {});
}

/// Where the KMS is said to be stands in the ARNs of its keys, in records as well, and may be changed.
#[test]
fn a_kms_that_is_said_to_be_elsewhere_opens_what_it_had() {
    let place = Place::new(&[]);
    place.store.ok(&["key", "create", "--alias", "alias/new"]);
    let old = place.key();
    place.store.configure("region = \"eu-central-1\"\naccount = \"123456789012\"\n");
    place.attach(&[]).end();
    place.store.ok(&["volume", "show", "t", "--check-key"]);
    let snapshot = place.store.ok(&["snapshot", "create", "t"]).trim().to_owned();
    place.store.ok(&["volume", "create", "--snapshot", &snapshot]);
    // An ARN like those of AWS is of who has that key; that of an alias says neither the one nor the other.
    let listed = place.store.ok(&["key", "show", "alias/new", "--json"]);
    let new = serde_json::from_str::<Value>(&listed).unwrap()["arn"].clone();
    let new = new.as_str().unwrap_or_else(|| panic!("{listed}"));
    assert!(new.starts_with("arn:aws:kms:eu-central-1:123456789012:key/"), "{new}");
    let alias = "arn:aws:kms:eu-central-1:123456789012:alias/new";
    let output = place.store.run(&["volume", "rewrap", "t", "--key", alias]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    let words = format!("write \"aws:{alias}\" or \"embedded:{alias}\"");
    assert!(said(&output).contains(&words), "{}", said(&output));
    assert_eq!(place.key(), old);
    let from = old.rsplit('/').next().unwrap();
    place.store.ok(&["volume", "rewrap", "--all", "--from", from, "--key", new]);
    assert_eq!(place.key(), new);
    place.store.configure("");
    place.attach(&[]).end();
}
