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

/// An ordinary user, who runs a copy of the program in a folder that he can reach, whoever built it.
struct Nobody {
    folder: tempfile::TempDir,
}

impl Nobody {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("make a folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("let him in");
        // Not by fs::copy: a descriptor for writing that another test's child inherits would
        // keep it from being run.
        let program = folder.path().join("sealblk");
        let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_sealblk")).arg(&program).status();
        assert!(copied.expect("start cp").success());
        let his = folder.path().join("his");
        fs::create_dir(&his).expect("make a folder");
        std::os::unix::fs::chown(&his, Some(NOBODY), Some(NOBODY)).expect("give it to him");
        Nobody { folder }
    }

    /// A folder of his.
    fn his(&self) -> std::path::PathBuf {
        self.folder.path().join("his")
    }

    /// A command of his, who may lock so many KiB of memory.
    fn command(&self, kib: u64, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.folder.path().join("sealblk"));
        command.args(arguments).stdin(Stdio::null());
        command
            .env("SEALBLK_ROOT", self.his().join("root"))
            .env("SEALBLK_CONFIG_DIR", self.his().join("config"));
        // SAFETY: between fork and exec the closure makes system calls (setrlimit, setgid, setuid) on values.
        unsafe {
            command.pre_exec(move || {
                setrlimit(Resource::RLIMIT_MEMLOCK, kib << 10, kib << 10)?;
                setgid(Gid::from_raw(NOBODY))?;
                Ok(setuid(Uid::from_raw(NOBODY))?)
            });
        }
        tie_to_test(&mut command, vec![]);
        command
    }

    fn run(&self, kib: u64, arguments: &[&str]) -> Output {
        self.command(kib, arguments).output().expect("start sealblk")
    }
}

/// As a user whose memory limit is what most systems give.
#[test]
fn an_ordinary_user_is_told_what_his_limits_cost_him() {
    let nobody = Nobody::new();
    // Not every root may raise it.
    let most = getrlimit(Resource::RLIMIT_MEMLOCK).expect("there is such a limit").1 >> 10;
    let kib = most.min(4096);
    let output = nobody.run(kib, &["doctor", "--json"]);
    assert!(output.status.success(), "{}", said(&output));
    let (verdict, found) = finding(&output, "locked memory");
    assert!(verdict == "note" && found.starts_with(&format!("{kib} KiB: ")), "{found}");
    if most >= 65536 {
        let output = nobody.run(65536, &["doctor", "--json"]);
        assert_eq!(finding(&output, "locked memory"), ("ok".into(), "65536 KiB".into()));
    }
}

/// With 64 KiB a key can be locked, and an io_uring cannot be had; with nothing, no volume is made at all.
#[test]
fn where_too_little_memory_can_be_locked_doctor_says_what_the_command_says() {
    let nobody = Nobody::new();
    // Not every root may raise it.
    let most = getrlimit(Resource::RLIMIT_MEMLOCK).expect("there is such a limit").1 >> 10;
    let made = nobody.run(most.min(65536), &["volume", "create", "--size", "1MiB", "--name", "t"]);
    assert!(made.status.success(), "{}", said(&made));
    let socket = nobody.his().join("s");
    let attach = ["attach", "t", "--socket-path", socket.to_str().expect("UTF-8")];
    let create = ["volume", "create", "--size", "1MiB", "--name", "u"];
    // Without the ids of the volumes.
    let reason =
        |words: &str| words.rsplit_once("vol-").map_or(words, |(_, rest)| &rest[18..]).trim().to_owned();
    let cases: [(u64, &[&str], i32, &str); 2] =
        [(64, &attach, 8, "attach a volume: "), (0, &create, 1, "make a volume: create a volume: ")];
    for (kib, command, code, step) in cases {
        let output = nobody.run(kib, command);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        let words = String::from_utf8(output.stderr).expect("UTF-8");
        let words = words.lines().last().expect("it says why");
        let doctor = nobody.run(kib, &["doctor", "--json"]);
        assert_eq!(doctor.status.code(), Some(8), "{}", said(&doctor));
        let (verdict, found) = finding(&doctor, "trial");
        assert!(verdict == "bad" && found.contains("LimitMEMLOCK="), "{found}");
        let found = found.strip_prefix(step).unwrap_or_else(|| panic!("{found}"));
        let words = words.strip_prefix("sealblk: ").expect("the program's name");
        let words = words.strip_prefix("create a volume: ").unwrap_or(words);
        assert_eq!(reason(found), reason(words));
    }
}

/// As root of a user namespace in which no other can be made.
#[test]
fn a_user_namespace_is_looked_at_as_an_attach_finds_it() {
    let store = Store::new();
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new("unshare");
        let forbid =
            "echo 0 >/proc/sys/user/max_user_namespaces && ! unshare --user true 2>&- && exec \"$@\"";
        command.args(["--user", "--map-root-user", "sh", "-c", forbid, "sh", program]).args(arguments);
        command.env("SEALBLK_ROOT", store.root()).env("SEALBLK_CONFIG_DIR", store.config());
        limit_resource(&mut command, Resource::RLIMIT_MEMLOCK, 8 << 20, 8 << 20);
        tie_to_test(&mut command, vec![]);
        command.output().expect("start unshare")
    };
    let program = env!("CARGO_BIN_EXE_sealblk");
    let output = run(program, &["doctor", "--json"]);
    assert!(output.status.success(), "{}", said(&output));
    // Root of the host has no such limit.
    let (verdict, found) = finding(&output, "locked memory");
    assert!(verdict == "note" && found.starts_with("8192 KiB: "), "{found}");
    let (verdict, found) = finding(&output, "trial");
    assert!(verdict == "ok" && found.contains("XTS engine"), "{found}");
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
