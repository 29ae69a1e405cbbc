//! `sealblk apply`: what a file says, and nothing else, becomes so.

use crate::common::store::Store;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;

const FIRST: &str = r#"
[[volume]]
name = "db"
size = "20MiB"
key = "alias/prod"
sector-size = 4096
tags = { env = "prod", Name = "db" }

[[volume]]
name = "scratch"
size = 1048576
unencrypted = true

[[volume]]
name = "logs"
size = "8MiB"
"#;

fn prepared() -> Store {
    let store = Store::new();
    store.ok(&["key", "create", "--alias", "alias/prod"]);
    store.ok(&["key", "create", "--alias", "alias/other"]);
    store
}

fn write(store: &Store, text: &str) -> String {
    let path = store.root().join("../volumes.toml");
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// Applies `text`, successfully; returns what it said in JSON.
#[track_caller]
fn apply(store: &Store, text: &str, arguments: &[&str]) -> Value {
    let path = write(store, text);
    serde_json::from_str(&store.ok(&[&["apply", &path, "--json"], arguments].concat())).unwrap()
}

/// Applies what must be refused with this exit code, and change nothing; returns what it said.
#[track_caller]
fn refuse(store: &Store, code: i32, text: &str) -> String {
    let (path, before) = (write(store, text), volumes(store));
    for arguments in [&["--dry-run"][..], &[]] {
        let output = store.run(&[&["apply", &path], arguments].concat());
        assert_eq!((output.status.code(), output.stdout.len()), (Some(code), 0), "{text}: {output:?}");
        assert_eq!(volumes(store), before, "nothing is done");
    }
    String::from_utf8(store.run(&["apply", &path]).stderr).unwrap()
}

/// Every volume by its name.
fn volumes(store: &Store) -> BTreeMap<String, Value> {
    let list: Vec<Value> = serde_json::from_str(&store.ok(&["volume", "list", "--json"])).unwrap();
    list.into_iter().map(|volume| (volume["name"].as_str().unwrap_or("-").to_owned(), volume)).collect()
}

fn actions(said: &Value) -> Vec<(&str, &str)> {
    let changes = said["changes"].as_array().unwrap();
    changes.iter().map(|c| (c["name"].as_str().unwrap(), c["action"].as_str().unwrap())).collect()
}

#[test]
fn what_is_missing_is_made_once_and_the_next_time_there_is_nothing_to_do() {
    let store = prepared();
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "mine"]);
    let planned = apply(&store, FIRST, &["--dry-run"]);
    assert_eq!(volumes(&store).len(), 1, "a plan changes nothing");
    let done = apply(&store, FIRST, &[]);
    let expected = [("db", "create"), ("scratch", "create"), ("logs", "create")];
    assert_eq!((actions(&planned), actions(&done)), (expected.to_vec(), expected.to_vec()));
    let made = volumes(&store);
    assert_eq!(made.len(), 4);
    let key: Value = serde_json::from_str(&store.ok(&["key", "show", "alias/prod", "--json"])).unwrap();
    assert_eq!(made["db"]["keys"][0]["key_id"], key["arn"]);
    assert_eq!((&made["db"]["size"], &made["db"]["sector_size"]), (&json!(20 << 20), &json!(4096)));
    assert_eq!(made["db"]["tags"], json!({"env": "prod", "Name": "db"}));
    assert_eq!((&made["scratch"]["encrypted"], &made["logs"]["encrypted"]), (&json!(false), &json!(true)));
    assert_eq!(done["changes"][0]["id"], made["db"]["id"]);
    for _ in 0..2 {
        let again = apply(&store, FIRST, &[]);
        assert_eq!((&again["changes"], &again["unchanged"]), (&json!([]), &json!(["db", "scratch", "logs"])));
        assert_eq!(volumes(&store), made);
    }
    let path = write(&store, FIRST);
    let said = store.ok(&["apply", &path]);
    assert!(said.contains("db       is as it shall be") && said.ends_with("nothing to do\n"), "{said}");
}

#[test]
fn sizes_grow_and_tags_become_what_is_written_while_a_volume_is_attached_too() {
    let store = prepared();
    apply(&store, FIRST, &[]);
    store.ok(&["volume", "tag", "logs", "by=hand"]);
    let text =
        FIRST.replace("20MiB", "24MiB").replace("env = \"prod\"", "env = \"test\"").replace("8MiB", "9MiB");
    let host = store.attach("logs", &[]);
    let planned = apply(&store, &text, &["--dry-run"]);
    assert_eq!(actions(&planned), [("db", "grow"), ("db", "tag"), ("logs", "grow")]);
    assert_eq!(
        (&planned["changes"][0]["from"], &planned["changes"][0]["to"]),
        (&json!(20 << 20), &json!(24 << 20))
    );
    assert_eq!(planned["unchanged"], json!(["scratch"]));
    let path = write(&store, &text);
    let said = store.ok(&["apply", &path]);
    assert!(said.contains("~  db       grow from 20 MiB to 24 MiB"), "{said}");
    let now = volumes(&store);
    assert_eq!((&now["db"]["size"], &now["logs"]["size"]), (&json!(24 << 20), &json!(9 << 20)));
    assert_eq!(now["db"]["tags"], json!({"env": "test", "Name": "db"}));
    // Of tags that the file does not speak of, none is touched.
    assert_eq!(now["logs"]["tags"], json!({"by": "hand"}));
    host.detach();
    assert_eq!(apply(&store, &text, &[])["changes"], json!([]));
    let text = text.replace("tags = { env = \"test\", Name = \"db\" }", "tags = {}");
    assert_eq!(actions(&apply(&store, &text, &[])), [("db", "tag")]);
    assert_eq!(volumes(&store)["db"]["tags"], json!({}));
}

#[test]
fn what_cannot_be_changed_is_refused_before_anything_is_done() {
    let store = prepared();
    apply(&store, FIRST, &[]);
    store.ok(&["snapshot", "create", "logs", "--name", "nightly"]);
    let new = "[[volume]]\nname = \"new\"\nsize = \"1MiB\"\n";
    for (from, to, words) in [
        ("20MiB", "19MiB", "cannot be made smaller"),
        ("alias/prod", "alias/other", "is under the key"),
        ("sector-size = 4096", "sector-size = 512", "sectors of 4096 bytes"),
        ("unencrypted = true", "unencrypted = false", "is not encrypted"),
        ("unencrypted = true", "key = \"alias/prod\"", "is not encrypted"),
        ("size = \"8MiB\"", "size = \"8MiB\"\nunencrypted = true", "is encrypted"),
        ("size = \"8MiB\"", "size = \"8MiB\"\nsnapshot = \"nightly\"", "was not made from a snapshot"),
    ] {
        let text = format!("{new}{}", FIRST.replace(from, to));
        assert_ne!(text, format!("{new}{FIRST}"));
        let said = refuse(&store, 2, &text);
        assert!(said.contains(words), "{from} to {to}: {said}");
    }
    assert!(!volumes(&store).contains_key("new"));
}

#[test]
fn what_could_not_be_made_is_refused_before_anything_is_done() {
    let store = prepared();
    store.ok(&["volume", "create", "--size", "8MiB", "--name", "source"]);
    store.ok(&["snapshot", "create", "source", "--name", "nightly"]);
    store.ok(&["key", "disable", "--yes", "alias/other"]);
    for (code, volume, words) in [
        (2, "size = 1000", "whole sectors"),
        (3, "size = 1024\nkey = \"alias/gone\"", "alias/gone"),
        (5, "size = 1024\nkey = \"alias/other\"", "is disabled"),
        (3, "snapshot = \"weekly\"", "weekly"),
        (2, "snapshot = \"nightly\"\nsize = \"4MiB\"", "cannot be smaller"),
        (2, "snapshot = \"nightly\"\nsector-size = 4096", "sectors of 512 bytes"),
        (2, "snapshot = \"nightly\"\nunencrypted = true", "is encrypted"),
        (2, "size = 1024\ncolour = \"red\"", "colour"),
    ] {
        let text =
            format!("[[volume]]\nname = \"good\"\nsize = 1024\n[[volume]]\nname = \"bad\"\n{volume}\n");
        let said = refuse(&store, code, &text);
        assert!(said.contains(words), "{volume}: {said}");
    }
    store.configure("encrypt-by-default = true\n");
    let said = refuse(&store, 2, "[[volume]]\nname = \"bad\"\nsize = 1024\nunencrypted = true\n");
    assert!(said.contains("encrypt-by-default"), "{said}");
}

#[test]
fn a_volume_from_a_snapshot_stays_what_it_is_when_the_snapshot_is_gone() {
    let store = prepared();
    store.ok(&["volume", "create", "--size", "8MiB", "--name", "source", "--key", "alias/prod"]);
    let id = store.ok(&["snapshot", "create", "source"]).trim().to_owned();
    let other = store.ok(&["snapshot", "create", "source"]).trim().to_owned();
    let text =
        format!("[[volume]]\nname = \"clone\"\nsnapshot = \"{id}\"\nsize = \"9MiB\"\nkey = \"alias/prod\"\n");
    assert_eq!(actions(&apply(&store, &text, &[])), [("clone", "create")]);
    let clone = &volumes(&store)["clone"];
    assert_eq!((&clone["snapshot_id"], &clone["size"]), (&json!(id), &json!(9 << 20)));
    let said = refuse(&store, 2, &text.replace(&id, &other));
    assert!(said.contains(&format!("was made from {id}")), "{said}");
    store.ok(&["snapshot", "delete", &id]);
    assert_eq!(apply(&store, &text, &[])["changes"], json!([]));
}

#[test]
fn many_at_once_make_each_volume_once() {
    let store = prepared();
    let text: String =
        (0..6).map(|n| format!("[[volume]]\nname = \"v{n}\"\nsize = 4096\nunencrypted = true\n")).collect();
    let path = write(&store, &text);
    let start =
        || store.command().args(["apply", &path, "--json"]).stdout(std::process::Stdio::piped()).spawn();
    let started: Vec<_> = (0..4).map(|_| start().expect("start sealblk")).collect();
    let made: usize = started
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success());
            actions(&serde_json::from_slice(&output.stdout).unwrap()).len()
        })
        .sum();
    assert_eq!((made, volumes(&store).len()), (6, 6));
}

#[test]
fn json_and_standard_input_are_taken_too() {
    let store = prepared();
    let json = json!({"volume": [{"name": "a", "size": 8192, "tags": {"k": "v"}}]}).to_string();
    assert_eq!(actions(&apply(&store, &json, &[])), [("a", "create")]);
    assert_eq!(volumes(&store)["a"]["tags"], json!({"k": "v"}));
    let mut command = store.command();
    command.args(["apply", "-", "--json"]).stdin(fs::File::open(write(&store, &json)).unwrap());
    let said: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
    assert_eq!(said["unchanged"], json!(["a"]));
}

#[test]
fn a_data_key_of_its_own_can_be_said_of_a_volume_from_a_snapshot() {
    let store = prepared();
    apply(&store, "[[volume]]\nname = \"base\"\nsize = \"1MiB\"\n", &[]);
    store.ok(&["snapshot", "create", "base", "--name", "golden"]);
    let own = "[[volume]]\nname = \"own\"\nsnapshot = \"golden\"\nown-data-key = true\n";
    apply(&store, own, &[]);
    let keys = |name: &str| volumes(&store)[name]["keys"].as_array().unwrap().len();
    assert_eq!(keys("own"), 2);
    let before = volumes(&store);
    apply(&store, own, &[]);
    assert_eq!(volumes(&store), before, "applied again, it does nothing");
    apply(&store, "[[volume]]\nname = \"same\"\nsnapshot = \"golden\"\n", &[]);
    assert_eq!(keys("same"), 1);
    let said = refuse(&store, 2, "[[volume]]\nname = \"same\"\nsnapshot = \"golden\"\nown-data-key = true\n");
    assert!(said.contains("volume rekey"), "{said}");
    refuse(&store, 2, "[[volume]]\nname = \"x\"\nsize = 1024\nown-data-key = true\n");
    // What the settings say holds here as well.
    store.configure("clone-data-key = \"own\"\n");
    apply(&store, "[[volume]]\nname = \"set\"\nsnapshot = \"golden\"\n", &[]);
    assert_eq!(keys("set"), 2);
}

#[test]
fn what_is_kept_for_attaches_becomes_what_is_written() {
    let store = prepared();
    let limited =
        "[[volume]]\nname = \"db\"\nsize = \"1MiB\"\niops = 3000\nthroughput = \"1MiB\"\nqueues = 2\n";
    apply(&store, limited, &[]);
    let attach = |volume: &Value| volume["attach"].clone();
    let kept = json!({
        "iops": 3000, "throughput": 1 << 20, "burst_seconds": null, "serial": null, "queues": 2
    });
    assert_eq!(attach(&volumes(&store)["db"]), kept);
    assert_eq!(apply(&store, limited, &[])["changes"], json!([]));
    // What the file does not speak of stays; what it says is in force at once.
    let host = store.attach("db", &[]);
    let other = "[[volume]]\nname = \"db\"\nsize = \"1MiB\"\niops = 500\nserial = \"s\"\n";
    assert_eq!(actions(&apply(&store, other, &["--dry-run"])), [("db", "modify")]);
    let path = write(&store, other);
    let said = store.ok(&["apply", &path]);
    assert!(
        said.contains("500 requests/s, 1 MiB/s, serial s") && said.ends_with("1 change was made\n"),
        "{said}"
    );
    let shown: Value = serde_json::from_str(&store.ok(&["volume", "show", "db", "--json"])).unwrap();
    let in_force = &shown["attachment"]["limits"];
    assert_eq!((&in_force["iops"], &in_force["throughput"]), (&json!(500), &json!(1 << 20)));
    host.detach();
    let said = refuse(&store, 2, "[[volume]]\nname = \"db\"\nsize = \"1MiB\"\nqueues = 0\n");
    assert!(said.contains("1 to 64"), "{said}");
}

#[test]
fn the_keys_that_open_a_volume_besides_are_made_and_looked_at() {
    let store = prepared();
    let slots = |name: &str| volumes(&store)[name]["keys"][0]["slots"].as_array().map(Vec::len);
    let two =
        "[[volume]]\nname = \"db\"\nsize = \"1MiB\"\nkey = \"alias/prod\"\nalso-keys = [\"alias/other\"]\n";
    apply(&store, two, &[]);
    assert_eq!(slots("db"), Some(2));
    assert_eq!(apply(&store, two, &[])["changes"], json!([]));
    store.ok(&["key", "create", "--alias", "alias/third"]);
    let said = refuse(&store, 2, &two.replace("alias/other", "alias/third"));
    assert!(said.contains("\"sealblk volume key add\" changes that"), "{said}");
    store.ok(&["volume", "key", "add", "db", "--key", "alias/third"]);
    assert_eq!(apply(&store, &two.replace("alias/other", "alias/third"), &[])["changes"], json!([]));
    // Before anything is made, it is seen that they can be used.
    store.ok(&["key", "disable", "alias/third"]);
    let new = two.replace("\"db\"", "\"new\"").replace("alias/other", "alias/third");
    assert!(refuse(&store, 5, &new).contains("is disabled"));
    refuse(
        &store,
        2,
        "[[volume]]\nname = \"x\"\nsize = 1024\nunencrypted = true\nalso-keys = [\"alias/prod\"]\n",
    );
    store.configure("also-keys = [\"alias/other\"]\n");
    apply(
        &store,
        "[[volume]]\nname = \"usual\"\nsize = \"1MiB\"\n[[volume]]\nname = \"lone\"\nsize = \
         \"1MiB\"\nalso-keys = []\n",
        &[],
    );
    assert_eq!((slots("usual"), slots("lone")), (Some(2), Some(1)));
}
