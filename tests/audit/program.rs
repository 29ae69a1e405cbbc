//! The log as an operator meets it: what a volume's life leaves in it, show, verify, and a disk that is full.

use crate::common::process::tie_to_test;
use crate::common::store::{Store, said};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use serde_json::Value;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

fn records(store: &Store, arguments: &[&str]) -> Vec<Value> {
    let shown = store.ok(&[&["audit", "show", "--json"], arguments].concat());
    shown.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn names(records: &[Value]) -> Vec<String> {
    let name = |record: &Value| {
        let name = record["eventName"].as_str().unwrap();
        record["errorCode"].as_str().map_or(name.to_owned(), |code| format!("{name} {code}"))
    };
    records.iter().map(name).collect()
}

#[test]
fn the_life_of_a_volume_and_its_key_is_in_the_log_and_no_secret() {
    let store = Store::new();
    store.configure("grantee-principal = 'arn:aws:iam::000000000000:root'\n");
    let id = store.ok(&["volume", "create", "--size", "1MiB", "--name", "v"]).trim().to_owned();
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "plain", "--unencrypted"]);
    store.attach("v", &[]).detach();
    store.attach("plain", &[]).detach();
    let arn = {
        let shown: Value = serde_json::from_str(&store.ok(&["volume", "show", "v", "--json"])).unwrap();
        shown["keys"][0]["key_id"].as_str().unwrap().to_owned()
    };
    store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    let refused = store.run(&["attach", "v", "--socket-path", "/nowhere/s"]);
    assert_eq!(refused.status.code(), Some(5), "{}", said(&refused));
    store.ok(&["volume", "delete", "v"]);

    let made = ["GenerateDataKeyWithoutPlaintext", "GenerateDek"];
    let attached = ["CreateGrant", "Decrypt", "UnwrapDek", "AttachVolume", "DetachVolume"];
    let end = ["CreateGrant DisabledException", "DestroyDek"];
    let of_volume = records(&store, &["--volume", &id]);
    assert_eq!(names(&of_volume), [&made[..], &attached, &end].concat());
    let of_key = records(&store, &["--key", "alias/aws/ebs"]);
    let rest = ["RetireGrant", "DisableKey"];
    assert_eq!(names(&of_key), [&["CreateKey"], &made[..], &attached, &rest, &end].concat());
    assert_eq!(records(&store, &["--since", "2999-01-01T00:00:00Z"]).len(), 0);
    assert_eq!(records(&store, &["--since", "1h"]).len(), of_key.len());
    for record in &of_key {
        assert_eq!(record["resources"][0]["ARN"], arn.as_str(), "{record}");
        assert!(record["process"]["pid"].is_u64() && record["process"]["uid"].is_u64());
        assert!(record["process"]["program"].as_str().unwrap().contains("sealblk"));
    }
    // Only what a volume's process writes itself has no MAC.
    let without: Vec<Value> = of_volume.into_iter().filter(|record| record["mac"].is_null()).collect();
    assert_eq!(names(&without), ["AttachVolume", "DetachVolume", "DestroyDek"]);
    let verified = store.ok(&["audit", "verify"]);
    assert!(verified.contains(&format!("{} records", of_key.len())), "{verified}");
}

#[test]
fn verify_names_the_first_bad_record_and_says_so_by_its_exit_code() {
    let store = Store::new();
    store.ok(&["key", "create", "--alias", "a"]);
    store.ok(&["key", "disable", "--yes", "alias/a"]);
    store.ok(&["key", "enable", "alias/a"]);
    let path = store.root().join("audit.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("DisableKey", "DescribeKey")).unwrap();
    let found = store.run(&["audit", "verify"]);
    assert_eq!(found.status.code(), Some(7));
    assert!(said(&found).contains("record 3 was changed"), "{}", said(&found));
    let found = store.run(&["audit", "verify", "--json"]);
    let report: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!((&report["problem"]["record"], &report["problem"]["damage"]), (&3.into(), &"changed".into()));
    assert_eq!(found.status.code(), Some(7));
    // Who removes the whole log leaves the marks.
    fs::remove_file(&path).unwrap();
    assert_eq!(store.run(&["audit", "verify"]).status.code(), Some(7));
}

/// A command that can make no file longer than `bytes`, as if the disk was full.
fn with_full_disk(store: &Store, bytes: u64) -> std::process::Command {
    let mut command = store.command();
    tie_to_test(&mut command, vec![]);
    // SAFETY: between fork and exec the closure only makes system calls (sigaction, setrlimit) on values.
    unsafe {
        command.pre_exec(move || {
            // The write is to fail, not the process to be ended.
            signal(Signal::SIGXFSZ, SigHandler::SigIgn)?;
            Ok(setrlimit(Resource::RLIMIT_FSIZE, bytes, bytes)?)
        });
    }
    command
}

#[test]
fn no_data_key_is_released_that_the_log_does_not_know_of() {
    let store = Store::new();
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "v"]);
    store.attach("v", &[]).detach();
    let path = store.root().join("audit.jsonl");
    let before = fs::read(&path).unwrap();
    // Room for half a record; every other file of the store's is shorter.
    let output = with_full_disk(&store, before.len() as u64 + 300)
        .args(["attach", "v", "--socket-path", "/nowhere/s"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let words = said(&output);
    assert!(words.contains("could not be recorded in the audit log"), "{words}");
    assert!(words.contains(path.to_str().unwrap()), "{words}");
    assert_eq!(fs::read(&path).unwrap(), before, "half a record was taken back");
    // The reason is the event's cause too.
    let events = store.ok(&["events"]);
    assert!(events.contains("reattachVolume  failed") && events.contains("audit log"), "{events}");
    store.attach("v", &[]).detach();
    store.ok(&["audit", "verify"]);
}

#[test]
fn a_change_that_cannot_be_recorded_is_said_to_be_so() {
    let store = Store::new();
    store.ok(&["key", "create", "--alias", "a"]);
    let path = store.root().join("audit.jsonl");
    let output = with_full_disk(&store, fs::metadata(&path).unwrap().len() + 50)
        .args(["key", "disable", "--yes", "alias/a"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let words = said(&output);
    assert!(words.contains("DisableKey is not answered") && words.contains("may have been made"), "{words}");
    assert!(store.ok(&["key", "show", "alias/a"]).contains("Disabled"));
}

#[test]
fn records_name_the_command_whatever_its_options_are_called() {
    let store = Store::new();
    // A folder, a name and an alias that are commands' names, too.
    let root = store.root().parent().unwrap().join("kms");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
        command.env("SEALBLK_CONFIG_DIR", store.config()).arg("--root").arg(&root).args(arguments);
        let ran = command.output().unwrap();
        assert!(ran.status.success(), "{arguments:?}: {}", said(&ran));
    };
    run(&["volume", "create", "--size", "1MiB", "--name", "attach"]);
    run(&["key", "create", "--alias", "alias/gc"]);
    run(&["volume", "rewrap", "attach", "--key", "alias/gc"]);
    let log = fs::read_to_string(root.join("audit.jsonl")).unwrap();
    let programs: Vec<String> = log
        .lines()
        .map(|line| {
            let record: Value = serde_json::from_str(line).unwrap();
            let (program, name) = (&record["process"]["program"], &record["eventName"]);
            let (program, name) = (program.as_str().unwrap(), name.as_str().unwrap());
            let (_, command) = program.split_once("sealblk ").unwrap_or_else(|| panic!("{program}"));
            format!("{name}: {command}")
        })
        .collect();
    for expected in ["GenerateDek: volume create", "CreateKey: key create", "RewrapDek: rewrap-key"] {
        assert!(programs.iter().any(|found| found == expected), "{expected}: {programs:?}");
    }
}
