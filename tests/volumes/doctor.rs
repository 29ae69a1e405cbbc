//! `sealblk doctor`: it says what the machine has, fails where volumes cannot be attached,
//! and leaves nothing behind.

use crate::common::process::{forbid_io_uring, limit_resource, tie_to_test};
use crate::common::store::{Store, said};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgid, setuid};
use sealblk::crypt::xts::Engine;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

/// What it looks at, in its order.
const LOOKED_AT: [&str; 8] = [
    "XTS engines",
    "memory for keys",
    "locked memory",
    "io_uring",
    "seccomp",
    "Landlock",
    "data folder",
    "trial",
];

const NOBODY: u32 = 65534;

fn doctor(store: &Store, arguments: &[&str]) -> Output {
    store.run(&[&["doctor"], arguments].concat())
}

/// What it found of `what`: the verdict, and the words.
#[track_caller]
fn finding(output: &Output, what: &str) -> (String, String) {
    let findings: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let findings = findings.as_array().expect("a list");
    let looked_at: Vec<&str> = findings.iter().filter_map(|f| f["what"].as_str()).collect();
    assert_eq!(looked_at, LOOKED_AT);
    let found = findings.iter().find(|f| f["what"] == what).expect("it was looked at");
    let text = |name: &str| found[name].as_str().expect("a text").to_owned();
    (text("verdict"), text("found"))
}

/// Everything below a folder, and its mode.
fn all_below(store: &Store) -> Vec<(std::path::PathBuf, u32)> {
    let (mut all, mut todo) = (Vec::new(), vec![store.root()]);
    while let Some(path) = todo.pop() {
        let metadata = fs::symlink_metadata(&path).expect("look at a file");
        if metadata.is_dir() {
            todo.extend(fs::read_dir(&path).expect("list").map(|entry| entry.expect("list").path()));
        }
        all.push((path, metadata.permissions().mode()));
    }
    all.sort();
    all
}

#[test]
fn where_tests_run_volumes_can_be_attached() {
    let store = Store::new();
    let output = doctor(&store, &["--json"]);
    assert!(output.status.success(), "{}", said(&output));
    let engines: Vec<&str> = Engine::available().into_iter().map(Engine::name).collect();
    let (verdict, found) = finding(&output, "XTS engines");
    assert!(found.starts_with(&engines.join(", ")), "{found}");
    assert_eq!(verdict, if engines.len() > 1 { "ok" } else { "note" });
    for needed in ["memory for keys", "io_uring", "seccomp", "trial"] {
        assert_ne!(finding(&output, needed).0, "bad", "{needed}");
    }
    // For people, there is a line for each.
    let table = doctor(&store, &[]);
    let lines = String::from_utf8(table.stdout).expect("UTF-8");
    assert!(table.status.success() && lines.lines().count() == LOOKED_AT.len(), "{lines}");
    for (line, what) in lines.lines().zip(LOOKED_AT) {
        assert!(line.contains(what) && (line.starts_with("ok") || line.starts_with("note")), "{line}");
    }
    assert!(!store.root().exists() && !store.config().exists(), "it was only to look");
}

#[test]
fn the_data_folder_is_tried_and_left_as_it_was() {
    let store = Store::new();
    let data_folder = || {
        let output = doctor(&store, &["--json"]);
        assert!(output.status.success(), "{}", said(&output));
        let (verdict, found) = finding(&output, "data folder");
        let words = found.strip_prefix(&format!("{}: ", store.root().display()));
        (verdict, words.expect("it says which").to_owned())
    };
    assert_eq!(data_folder(), ("ok".into(), "not there yet; the first volume makes it".into()));
    store.ok(&["volume", "create", "--size", "1MiB", "--unencrypted"]);
    let before = all_below(&store);
    let (verdict, found) = data_folder();
    assert!(verdict == "ok" && !found.is_empty(), "{found}");
    assert_eq!(all_below(&store), before);
    fs::set_permissions(store.root(), fs::Permissions::from_mode(0o755)).expect("change the mode");
    let (verdict, found) = data_folder();
    assert!(verdict == "note" && found.contains("mode 755"), "{found}");
    // What is no folder cannot have volumes.
    fs::remove_dir_all(store.root()).expect("remove the root");
    fs::write(store.root(), "precious").expect("write a file");
    fs::set_permissions(store.root(), fs::Permissions::from_mode(0o600)).expect("change the mode");
    let output = doctor(&store, &["--json"]);
    assert_eq!(output.status.code(), Some(8), "{}", said(&output));
    let (verdict, found) = finding(&output, "data folder");
    assert!(verdict == "bad" && found.ends_with(": it is not a folder"), "{found}");
    assert_eq!(fs::read(store.root()).expect("read the file"), b"precious");
}

#[test]
fn a_machine_where_volumes_cannot_be_attached_is_said_to_be_one() {
    let store = Store::new();
    let run = |arguments: &[&str]| {
        let mut command = store.command();
        command.arg("doctor").args(arguments);
        forbid_io_uring(&mut command);
        command.output().expect("start sealblk")
    };
    let output = run(&["--json"]);
    assert_eq!(output.status.code(), Some(8), "{}", said(&output));
    let (verdict, found) = finding(&output, "io_uring");
    assert!(verdict == "bad" && found.contains("filter of system calls"), "{found}");
    let words = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(words.contains("io_uring: ") && words.contains(&found), "{words}");
    let table = String::from_utf8(run(&[]).stdout).expect("UTF-8");
    assert!(table.lines().any(|line| line.starts_with("BAD") && line.contains("io_uring")), "{table}");
}

/// As a user whose memory limit is what most systems give.
#[test]
fn an_ordinary_user_is_told_what_his_limits_cost_him() {
    let store = Store::new();
    // Where he can reach it, whoever built it.
    let folder = tempfile::tempdir().expect("make a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("let him in");
    let program = folder.path().join("sealblk");
    // Not by fs::copy: a descriptor for writing that another test's child inherits would
    // keep it from being run.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_sealblk")).arg(&program).status();
    assert!(copied.expect("start cp").success());
    let doctor = |kib: u64| {
        let mut command = Command::new(&program);
        command.args(["doctor", "--json", "--root"]).arg(folder.path().join("root")).stdin(Stdio::null());
        command.env("SEALBLK_CONFIG_DIR", store.config());
        // SAFETY: between fork and exec the closure makes system calls (setrlimit, setgid, setuid) on values.
        unsafe {
            command.pre_exec(move || {
                setrlimit(Resource::RLIMIT_MEMLOCK, kib << 10, kib << 10)?;
                setgid(Gid::from_raw(NOBODY))?;
                Ok(setuid(Uid::from_raw(NOBODY))?)
            });
        }
        tie_to_test(&mut command, vec![]);
        command.output().expect("start sealblk")
    };
    // Not every root may raise it.
    let most = getrlimit(Resource::RLIMIT_MEMLOCK).expect("there is such a limit").1 >> 10;
    let kib = most.min(4096);
    let output = doctor(kib);
    assert!(output.status.success(), "{}", said(&output));
    let (verdict, found) = finding(&output, "locked memory");
    assert!(verdict == "note" && found.starts_with(&format!("{kib} KiB: ")), "{found}");
    if most >= 65536 {
        assert_eq!(finding(&doctor(65536), "locked memory"), ("ok".into(), "65536 KiB".into()));
    }
}

/// What an attach would meet, and nothing else looks at.
#[test]
fn what_keeps_an_attach_from_working_is_found_by_a_trial() {
    let store = Store::new();
    let temporary = tempfile::tempdir().expect("make a folder");
    let doctor = |limit: Option<u64>| {
        let mut command = store.command();
        command.args(["doctor", "--json"]).env("TMPDIR", temporary.path());
        if let Some(limit) = limit {
            limit_resource(&mut command, Resource::RLIMIT_NOFILE, limit, limit);
        }
        command.output().expect("start sealblk")
    };
    let (verdict, found) = finding(&doctor(None), "trial");
    assert!(verdict == "ok" && found.contains("XTS engine"), "{found}");
    let output = doctor(Some(120));
    assert_eq!(output.status.code(), Some(8), "{}", said(&output));
    let (verdict, found) = finding(&output, "trial");
    assert!(verdict == "bad" && found.contains("LimitNOFILE="), "{found}");
    assert_eq!(fs::read_dir(temporary.path()).expect("list").count(), 0, "nothing is left of a trial");
}
