//! `sealblk settings`: what is written, what is refused, and that it holds.

use crate::common::store::{Store, said};
use serde_json::Value;
use std::fs;

fn settings(store: &Store, arguments: &[&str]) -> Value {
    serde_json::from_str(&store.ok(&[&["settings", "--json"], arguments].concat())).expect("JSON")
}

/// A command that is refused with this exit code and leaves the settings as they are.
#[track_caller]
fn refused(store: &Store, code: i32, arguments: &[&str]) -> String {
    let before = fs::read(store.settings()).ok();
    let output = store.run(&[&["settings"], arguments].concat());
    assert_eq!(output.status.code(), Some(code), "{}", said(&output));
    assert_eq!(fs::read(store.settings()).ok(), before);
    said(&output)
}

fn key_of(store: &Store, volume: &str) -> String {
    let shown: Value = serde_json::from_str(&store.ok(&["volume", "show", volume, "--json"])).unwrap();
    shown["keys"][0]["key_id"].as_str().expect("a key").to_owned()
}

#[test]
fn what_is_set_holds_for_volumes_that_are_made_afterwards() {
    let store = Store::new();
    let shown = settings(&store, &["show"]);
    assert_eq!(
        (&shown["default_key"], &shown["encrypt_by_default"]),
        (&"alias/aws/ebs".into(), &false.into())
    );
    assert!(!store.root().exists(), "showing makes nothing");

    store.ok(&["volume", "create", "--size", "1MiB", "--name", "before", "--unencrypted"]);
    assert_eq!(settings(&store, &["encrypt-by-default", "on"])["encrypt_by_default"], true);
    let output = store.run(&["volume", "create", "--size", "1MiB", "--unencrypted"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    store.ok(&["volume", "show", "before"]);
    assert_eq!(settings(&store, &["encrypt-by-default", "off"])["encrypt_by_default"], false);
    store.ok(&["volume", "create", "--size", "1MiB", "--unencrypted"]);

    store.ok(&["key", "create", "--alias", "alias/mine"]);
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "a"]);
    assert_eq!(settings(&store, &["default-key", "alias/mine"])["default_key"], "alias/mine");
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "b"]);
    assert_eq!(settings(&store, &["default-key", "--reset"])["default_key"], "alias/aws/ebs");
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "c"]);
    let [a, b, c] = ["a", "b", "c"].map(|name| key_of(&store, name));
    assert!(a == c && a != b);
}

#[test]
fn a_default_key_must_be_there_and_usable() {
    let store = Store::new();
    // Made at first use, so it may be missing now.
    settings(&store, &["default-key", "alias/aws/ebs"]);
    let words = refused(&store, 3, &["default-key", "alias/mine"]);
    assert!(words.contains("make alias/mine the default key"), "{words}");
    store.ok(&["key", "create", "--alias", "alias/mine"]);
    store.ok(&["key", "disable", "--yes", "alias/mine"]);
    let words = refused(&store, 5, &["default-key", "alias/mine"]);
    assert!(words.contains("is disabled; enable it with \"sealblk key enable alias/mine\""), "{words}");
    store.ok(&["key", "schedule-deletion", "--yes", "alias/mine"]);
    refused(&store, 5, &["default-key", "alias/mine"]);
    refused(&store, 2, &["default-key"]);
    refused(&store, 2, &["default-key", "alias/mine", "--reset"]);
    refused(&store, 2, &["encrypt-by-default", "perhaps"]);
}

#[test]
fn what_the_operator_wrote_stays() {
    let store = Store::new();
    let file = store.settings();
    let text = "# Ours\nregion = 'eu-1' # here\n\n# No plain disks.\nencrypt-by-default = false\n";
    store.configure(text);
    store.ok(&["settings", "encrypt-by-default", "on"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), text.replace("false", "true"));
    assert_eq!(fs::read_dir(store.config()).unwrap().count(), 1, "no temporary file is left");
    // An ARN of this place is the embedded KMS's.
    store.ok(&["key", "create", "--alias", "alias/mine"]);
    let arn = "arn:aws:kms:eu-1:000000000000:alias/mine";
    assert_eq!(settings(&store, &["default-key", arn])["default_key"], arn);
    store.ok(&["volume", "create", "--size", "1MiB"]);

    fs::write(&file, "region = \n").unwrap();
    let words = refused(&store, 2, &["encrypt-by-default", "on"]);
    assert!(words.contains("sealblk.toml"), "{words}");
}

#[test]
fn two_commands_at_once_lose_nothing() {
    let store = Store::new();
    store.ok(&["key", "create", "--alias", "alias/mine"]);
    for round in 0..5 {
        let (state, key) = [("on", "alias/mine"), ("off", "alias/aws/ebs")][round % 2];
        std::thread::scope(|scope| {
            scope.spawn(|| store.ok(&["settings", "encrypt-by-default", state]));
            scope.spawn(|| store.ok(&["settings", "default-key", key]));
        });
        let shown = settings(&store, &["show"]);
        assert_eq!(shown["encrypt_by_default"], state == "on");
        assert_eq!(shown["default_key"], key);
    }
}
