//! Data keys that several KMS keys wrap: the embedded KMS's own, one in a token of an HSM, and those of a KMS
//! elsewhere. With each of them in each bad state, whatever needs the data key has it by another one.

use crate::common::attach::{Place, open, read};
use crate::common::disk::pattern;
use crate::common::kms_server::{KmsServer, Principal};
use crate::common::softhsm::{SoftHsm, give_pin};
use crate::common::store::{Store, said};
use crate::suite::Admin;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Of the embedded KMS.
    Here,
    /// Of the embedded KMS, in a token.
    Token,
    /// Of a KMS elsewhere, by AWS's protocol.
    Served,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bad {
    Disabled,
    Dying,
    /// The wrapped copy was damaged.
    Broken,
    /// The key store is not connected.
    Disconnected,
    /// The token, or the KMS, is away.
    Away,
}

impl Kind {
    fn bad_states(self) -> &'static [Bad] {
        match self {
            Kind::Here => &[Bad::Disabled, Bad::Dying, Bad::Broken],
            Kind::Token => &[Bad::Disabled, Bad::Disconnected, Bad::Away, Bad::Broken],
            Kind::Served => &[Bad::Disabled, Bad::Dying, Bad::Away, Bad::Broken],
        }
    }
}

struct Key {
    kind: Kind,
    arn: String,
}

impl Key {
    fn reference(&self) -> String {
        let provider = if self.kind == Kind::Served { "aws" } else { "embedded" };
        format!("{provider}:{}", self.arn)
    }
}

/// The volume `t` with data under such keys, and a snapshot of it.
struct Mixed {
    hsm: SoftHsm,
    kms: KmsServer,
    root: Principal,
    place: Place,
    keys: Vec<Key>,
    snapshot: String,
}

impl Mixed {
    fn new(kinds: &[Kind]) -> Self {
        let (hsm, kms) = (SoftHsm::with_tokens(&["one"]), KmsServer::start());
        let root = kms.principal("root");
        let store = Store::new();
        store.configure("kms-patience = 1");
        store.set_environment([root.environment(&kms.url), hsm.environment()].concat());
        let mut add = store.command();
        add.args(["kms", "store", "add", "--token", "one", "--keep-pin", "--pkcs11"]).arg(SoftHsm::module());
        give_pin(&mut add, &SoftHsm::pin("one"));
        let output = add.output().expect("start sealblk");
        assert!(output.status.success(), "{}", said(&output));
        let make = |kind: &Kind| {
            let own = |arguments: &[&str]| {
                let made = store.ok(&[&["--json", "key", "create"], arguments].concat());
                let made: Value = serde_json::from_str(&made).expect("JSON");
                made["arn"].as_str().expect("a text").to_owned()
            };
            let arn = match kind {
                Kind::Here => own(&[]),
                Kind::Token => own(&["--key-store", "one"]),
                Kind::Served => kms.create_key(),
            };
            Key { kind: *kind, arn }
        };
        let keys: Vec<Key> = kinds.iter().map(make).collect();
        let mut arguments = vec!["--key".to_owned(), keys[0].reference()];
        arguments.extend(keys[1..].iter().flat_map(|key| ["--also-key".to_owned(), key.reference()]));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let place = Place::of(store, &arguments);
        assert_eq!(place.metadata().keys()[0].slots().len(), kinds.len());
        place.put(128, &data());
        let snapshot = place.store.ok(&["snapshot", "create", "t"]).trim().to_owned();
        Mixed { hsm, kms, root, place, keys, snapshot }
    }

    /// Has the key in this state, or in a good one again.
    fn set(&self, slot: usize, bad: Bad, is_bad: bool) {
        let (key, store) = (&self.keys[slot], &self.place.store);
        let admin = self.kms.admin();
        match (bad, key.kind, is_bad) {
            (Bad::Disabled, Kind::Served, true) => Admin::disable(&admin, &key.arn).expect("disable it"),
            (Bad::Disabled, _, true) => drop(store.ok(&["key", "disable", &key.arn])),
            (Bad::Dying, Kind::Served, true) => {
                Admin::schedule_deletion(&admin, &key.arn).expect("schedule its deletion");
            }
            (Bad::Dying, _, true) => drop(store.ok(&["key", "schedule-deletion", &key.arn])),
            (Bad::Disabled | Bad::Dying, Kind::Served, false) => {
                if bad == Bad::Dying {
                    Admin::cancel_deletion(&admin, &key.arn).expect("keep it");
                }
                Admin::enable(&admin, &key.arn).expect("enable it");
            }
            (Bad::Disabled | Bad::Dying, _, false) => {
                if bad == Bad::Dying {
                    store.ok(&["key", "cancel-deletion", &key.arn]);
                }
                store.ok(&["key", "enable", &key.arn]);
            }
            (Bad::Disconnected, ..) => {
                store.ok(&["kms", "store", if is_bad { "disconnect" } else { "connect" }, "one"]);
            }
            (Bad::Away, Kind::Served, _) => {
                // Nobody listens there.
                let url = if is_bad { "http://127.0.0.1:1" } else { &self.kms.url };
                store.set_environment([self.root.environment(url), self.hsm.environment()].concat());
            }
            (Bad::Away, ..) => {
                let (here, away) = (self.hsm.tokens(), self.hsm.tokens().with_extension("away"));
                if is_bad {
                    fs::rename(&here, &away).expect("rename a folder");
                    fs::create_dir(&here).expect("make a folder");
                } else {
                    fs::remove_dir(&here).expect("remove a folder");
                    fs::rename(&away, &here).expect("rename a folder");
                }
            }
            // Once more is what it was.
            (Bad::Broken, ..) => {
                for path in self.records() {
                    let mut record: Value =
                        serde_json::from_slice(&fs::read(&path).expect("read")).expect("JSON");
                    let wrapped = &mut record["keys"][0]["slots"][slot]["wrapped"];
                    let mut blob = STANDARD.decode(wrapped.as_str().expect("a text")).expect("base64");
                    *blob.last_mut().expect("it has bytes") ^= 1;
                    *wrapped = json!(STANDARD.encode(&blob));
                    fs::write(&path, record.to_string()).expect("write");
                }
                store.accept();
            }
        }
    }

    /// Those of the volume and the snapshot.
    fn records(&self) -> [PathBuf; 2] {
        let snapshot = self.place.store.root().join("snapshots").join(format!("{}.json", self.snapshot));
        [self.place.volume_json(), snapshot]
    }

    /// Everything that needs the data key, which cannot be had by the key of this slot.
    fn works(&self, slot: usize, what: &str) {
        let store = &self.place.store;
        let host = self.place.attach(&[]);
        assert!(read(&mut open(&self.place.socket()).rings[0], 128, data().len()) == data(), "{what}");
        // Attached as well as not.
        let made = store.ok(&["snapshot", "create", "t"]);
        store.ok(&["snapshot", "delete", made.trim()]);
        host.end();
        let made = store.ok(&["snapshot", "create", "t"]);
        store.ok(&["snapshot", "delete", made.trim()]);
        let copy = store.ok(&["snapshot", "copy", &self.snapshot]);
        self.holds(&["snapshot", "export", copy.trim()], what);
        store.ok(&["snapshot", "delete", copy.trim()]);
        store.ok(&["volume", "create", "--snapshot", &self.snapshot, "--name", "c"]);
        self.holds(&["volume", "export", "c"], what);
        store.ok(&["volume", "delete", "c"]);
        // A new data key is wrapped by all of the keys, or none is made.
        let output = store.run(&["volume", "rekey", "k"]);
        if !output.status.success() {
            assert!(matches!(output.status.code(), Some(5 | 6)), "{what}: {}", said(&output));
            let names_it = [&*self.keys[slot].arn, "there is no such token", "could not reach"];
            assert!(names_it.iter().any(|it| said(&output).contains(it)), "{what}: {}", said(&output));
            let good = self.keys.iter().enumerate().filter(|(n, key)| {
                *n != slot && !(what.contains("Away") && key.kind == self.keys[slot].kind)
            });
            let mut good = good.map(|(_, key)| key.reference());
            let mut arguments = vec!["volume".into(), "rekey".into(), "k".into(), "--key".into()];
            arguments.push(good.next().expect("there is another one"));
            arguments.extend(good.flat_map(|key| ["--also-key".to_owned(), key]));
            store.ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        }
        self.holds(&["volume", "export", "k"], what);
        store.ok(&["volume", "delete", "k"]);
    }

    /// Whether what such a command exports is the data.
    fn holds(&self, export: &[&str], what: &str) {
        let out = self.place.folder().join("out.img");
        let _ = fs::remove_file(&out);
        self.place.store.ok(&[export, &[out.to_str().expect("UTF-8")]].concat());
        let bytes = fs::read(&out).expect("read a file");
        assert!(bytes[128 * 512..][..data().len()] == data(), "{what}: {export:?}");
    }
}

fn data() -> Vec<u8> {
    pattern(7, 1 << 16)
}

fn each_bad_state_of_each(kinds: &[Kind]) {
    let mixed = Mixed::new(kinds);
    for (slot, kind) in kinds.iter().enumerate() {
        for bad in kind.bad_states() {
            let what = format!("slot {slot} of {kinds:?}: {bad:?}");
            // With a copy by each key.
            mixed.place.store.ok(&["volume", "create", "--snapshot", &mixed.snapshot, "--name", "k"]);
            mixed.set(slot, *bad, true);
            mixed.works(slot, &what);
            mixed.set(slot, *bad, false);
        }
    }
    let slots = mixed.place.metadata().keys()[0].slots().len();
    assert_eq!(slots, kinds.len());
    mixed.place.store.ok(&["store", "check"]);
}

#[test]
fn of_two_keys_either_may_be_in_any_bad_state() {
    each_bad_state_of_each(&[Kind::Token, Kind::Served]);
}

#[test]
fn of_three_keys_any_may_be_in_any_bad_state() {
    each_bad_state_of_each(&[Kind::Here, Kind::Token, Kind::Served]);
}

#[test]
fn of_four_keys_any_may_be_in_any_bad_state() {
    each_bad_state_of_each(&[Kind::Served, Kind::Here, Kind::Token, Kind::Served]);
}
