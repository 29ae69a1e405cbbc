//! What a volume or snapshot holds, in the clear, outside of the store.

use crate::common::attach::{flush, open, write};
use crate::common::disk::pattern;
use crate::common::killed::{End, interrupted_before, killed_before};
use crate::rig::{Rig, files};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

const LEN: usize = 8 << 20;

fn audit(rig: &Rig, name: &str) -> Vec<Value> {
    // Without a key there is nothing to be noted.
    let text = fs::read_to_string(rig.store.root().join("audit.jsonl")).unwrap_or_default();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter(|record| record["eventName"] == name).collect()
}

#[test]
fn what_was_imported_comes_out_again_and_that_is_on_the_record() {
    for arguments in [&[][..], &["--sector-size", "4096"], &["--unencrypted"]] {
        let rig = Rig::new();
        let data = rig.raw("disk.img", LEN);
        let made = rig.import(&[&[&*rig.path("disk.img"), "--name", "v"], arguments].concat());
        let out = rig.path("out.img");
        let said: Value =
            serde_json::from_str(&rig.store.ok(&["volume", "export", "v", &out, "--json"])).unwrap();
        assert_eq!(said, json!({"file": out, "format": "raw", "size": LEN}));
        assert!(fs::read(&out).unwrap() == data);
        let found = fs::metadata(&out).unwrap();
        assert_eq!(found.permissions().mode() & 0o777, 0o600);
        assert!(found.blocks() * 512 < 1 << 20, "zeros take no space");
        let records = audit(&rig, "ExportVolume");
        assert_eq!(records.len(), made["keys"].as_array().unwrap().len());
        for record in records {
            let parameters = &record["requestParameters"];
            assert_eq!(
                (&parameters["file"], &parameters["keyId"]),
                (&json!(out), &made["keys"][0]["key_id"])
            );
            assert_eq!(parameters["encryptionContext"]["aws:ebs:id"], made["id"]);
        }
        let event = &rig.events("exportVolume")[0];
        assert_eq!(
            (&event["detail"]["result"], &event["detail"]["cause"]),
            (&json!("succeeded"), &json!(""))
        );
        assert!(event["resources"][0].as_str().unwrap().ends_with(made["id"].as_str().unwrap()));
        assert!(made["keys"] == json!([]) || rig.store.run(&["audit", "verify"]).status.success());
    }
}

#[test]
fn a_file_that_is_there_stays_unless_it_is_to_be_replaced() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let out = rig.path("out.img");
    fs::write(&out, "mine").unwrap();
    fs::set_permissions(&out, PermissionsExt::from_mode(0o644)).unwrap();
    let said = rig.refuse(4, &["volume", "export", "v", &out]);
    assert!(said.contains("--force"), "{said}");
    assert_eq!(fs::read(&out).unwrap(), b"mine");
    assert_eq!(audit(&rig, "ExportVolume").len(), 0);
    rig.store.ok(&["volume", "export", "v", &out, "--force"]);
    assert!(fs::read(&out).unwrap() == data);
    assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o600);
    for (code, target, words) in [
        (2, "/dev/null", "write to standard output"),
        (2, &*rig.path("root"), "is not a file"),
        (3, "/nowhere/x", "nowhere"),
    ] {
        let said = rig.refuse(code, &["volume", "export", "v", target, "--force"]);
        assert!(said.contains(words), "{said}");
    }
    let said = rig.refuse(2, &["volume", "export", "v", &rig.path("new"), "--format", "qcow2"]);
    assert!(said.contains("is not written"), "{said}");
    assert!(files(&rig.folder()).iter().all(|path| path.extension().is_none_or(|e| e != "partial")));
}

#[test]
fn an_attached_volume_is_exported_by_way_of_a_snapshot() {
    let rig = Rig::new();
    let mut data = rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let host = rig.store.attach("v", &[]);
    let mut session = open(host.socket());
    let mut put = |seed, at: usize| {
        let bytes = pattern(seed, 64 << 10);
        write(&mut session.rings[0], at as u64 / 512, &bytes);
        flush(&mut session.rings[0]);
        bytes
    };
    data[3 << 20..(3 << 20) + (64 << 10)].copy_from_slice(&put(8, 3 << 20));
    let out = rig.path("out.img");
    let said = rig.refuse(4, &["volume", "export", "v", &out]);
    assert!(said.contains("sealblk snapshot create"), "{said}");
    let snapshot = rig.store.ok(&["snapshot", "create", "v"]).trim().to_owned();
    put(9, 3 << 20);
    rig.store.ok(&["snapshot", "export", &snapshot, &out]);
    assert!(fs::read(&out).unwrap() == data);
    assert_eq!(audit(&rig, "ExportVolume")[0]["requestParameters"]["snapshotId"], snapshot);
    assert!(rig.events("exportSnapshot")[0]["resources"][0].as_str().unwrap().ends_with(&snapshot));
    drop(session);
    host.detach();
    // A volume of two layers, and a copy of the snapshot.
    data[3 << 20..(3 << 20) + (64 << 10)].copy_from_slice(&pattern(9, 64 << 10));
    rig.store.ok(&["volume", "export", "v", &out, "--force"]);
    assert!(fs::read(&out).unwrap() == data);
    let copy = rig.store.ok(&["snapshot", "copy", &snapshot]).trim().to_owned();
    rig.store.ok(&["snapshot", "export", &copy, &rig.path("copy.img")]);
    assert!(fs::read(rig.path("copy.img")).unwrap() != data);
}

#[test]
fn a_chain_of_mixed_keys_comes_out_whole() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v", "--unencrypted"]);
    rig.store.ok(&["key", "create", "--alias", "alias/other"]);
    let mut snapshot = rig.store.ok(&["snapshot", "create", "v"]).trim().to_owned();
    for (name, key) in [("a", "alias/aws/ebs"), ("b", "alias/other")] {
        rig.store.ok(&[
            "volume",
            "create",
            "--snapshot",
            &snapshot,
            "--key",
            key,
            "--name",
            name,
            "--size",
            "9MiB",
        ]);
        snapshot = rig.store.ok(&["snapshot", "create", name]).trim().to_owned();
    }
    rig.store.ok(&["volume", "export", "b", &rig.path("out.img")]);
    let out = fs::read(rig.path("out.img")).unwrap();
    assert!(out.len() == 9 << 20 && out[..LEN] == data && out[LEN..].iter().all(|b| *b == 0));
    assert_eq!(audit(&rig, "ExportVolume").len(), 2);
}

#[test]
fn without_the_key_or_with_an_edited_record_nothing_comes_out() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    let made = rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let snapshot = rig.store.ok(&["snapshot", "create", "v"]).trim().to_owned();
    let out = rig.path("out.img");
    rig.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    let said = rig.refuse(5, &["volume", "export", "v", &out]);
    assert!(said.contains("is disabled"), "{said}");
    let failed = &rig.events("exportVolume")[0]["detail"];
    assert_eq!(failed["result"], "failed");
    assert_eq!(failed["cause"], format!("{} is disabled.", made["keys"][0]["key_id"].as_str().unwrap()));
    rig.store.ok(&["key", "enable", "alias/aws/ebs"]);
    // Sectors twice as large are another meaning of the same bytes.
    let record = rig.store.root().join(format!("snapshots/{snapshot}.json"));
    let volume = rig.store.root().join(format!("volumes/{}/volume.json", made["id"].as_str().unwrap()));
    for (path, command, of) in [(record, "snapshot", &*snapshot), (volume, "volume", "v")] {
        let text = fs::read_to_string(&path).unwrap();
        let edited = text.replace("\"sector_size\": 512", "\"sector_size\": 4096");
        assert_ne!(text, edited);
        fs::write(&path, edited).unwrap();
        rig.store.accept();
        rig.refuse(7, &[command, "export", of, &out]);
    }
    assert_eq!(audit(&rig, "ExportVolume").len(), 0);
    assert!(!fs::exists(&out).unwrap());
}

/// Has a command find a file system that has no files without a name, as those of many USB sticks and
/// servers.
fn without_unnamed_files(command: &mut Command) {
    let is_unnamed = SeccompCondition::new(
        2,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(libc::O_TMPFILE as u64),
        libc::O_TMPFILE as u64,
    );
    let rule = SeccompRule::new(vec![is_unnamed.expect("a condition")]).expect("a rule");
    let answer = SeccompAction::Errno(libc::EOPNOTSUPP as u32);
    let machine = std::env::consts::ARCH.try_into().expect("a machine that has filters");
    let rules = [(libc::SYS_openat, vec![rule])].into_iter().collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, machine).expect("a filter");
    let program: BpfProgram = filter.try_into().expect("a program");
    // SAFETY: between fork and exec the closure makes system calls alone, on memory that it owns.
    unsafe {
        command.pre_exec(move || seccompiler::apply_filter(&program).map_err(std::io::Error::other));
    }
}

/// Kills an export to `out.img` at each step, and looks at what is there beside what was there before, and at
/// the number of records in the audit log.
fn at_each_step(
    rig: &Rig,
    arguments: &[&str],
    prepare: impl Fn(&mut Command),
    mut check: impl FnMut(&[PathBuf], usize),
) {
    let out = rig.path("out.img");
    let before = files(&rig.folder());
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let mut command = rig.store.command();
        command.args(["volume", "export", "v", &out]).args(arguments);
        prepare(command.stdout(Stdio::null()).stderr(Stdio::null()));
        let end = killed_before(&mut command, step);
        let new: Vec<_> = files(&rig.folder()).into_iter().filter(|path| !before.contains(path)).collect();
        check(&new, audit(rig, "ExportVolume").len());
        if end != End::Killed {
            assert_eq!(end, End::Exited(0));
            return;
        }
    }
}

#[test]
fn killed_at_any_step_it_leaves_the_whole_file_or_nothing_and_never_without_a_record() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", 1 << 20);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let out = PathBuf::from(rig.path("out.img"));
    let mut recorded = 0;
    let mut is_there = false;
    at_each_step(
        &rig,
        &[],
        |_| (),
        |new, records| {
            assert!(new.is_empty() || records > recorded, "{new:?} without a record");
            recorded = records;
            is_there = !new.is_empty();
            if is_there {
                assert_eq!(new, std::slice::from_ref(&out));
                assert!(fs::read(&out).unwrap() == data);
                fs::remove_file(&out).unwrap();
            }
        },
    );
    assert!(is_there, "in the end it was");
    // A file that is replaced is the old one or the new one; for a moment the new one has a name of its own.
    fs::write(&out, "old").unwrap();
    let mut seen = [0; 3];
    at_each_step(
        &rig,
        &["--force"],
        |_| (),
        |new, _| {
            let content = fs::read(&out).unwrap();
            assert!(content == b"old" || content == data);
            assert!(new.iter().all(|partial| content == b"old" && fs::read(partial).unwrap() == data));
            assert!(new.len() < 2, "what the last one left is cleared: {new:?}");
            seen[if content == data { 2 } else { new.len() }] += 1;
            fs::write(&out, "old").unwrap();
        },
    );
    assert!(seen.iter().all(|times| *times > 0), "{seen:?}");
}

#[test]
fn where_files_have_names_what_a_killed_export_left_is_cleared_by_the_next() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", 1 << 20);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let out = rig.path("out.img");
    let mut begun = 0;
    at_each_step(&rig, &[], without_unnamed_files, |new, records| {
        assert!(new.len() < 2 && (new.is_empty() || records > 0), "{new:?}, {records} records");
        begun += u32::from(new.iter().any(|path| *path != *out));
        // The name is the file's when all of it is there.
        if fs::exists(&out).unwrap() {
            assert!(fs::read(&out).unwrap() == data);
            fs::remove_file(&out).unwrap();
        }
    });
    assert!(begun > 0, "it was killed in the middle, too");
    // What is left is said before, and when it is cleared.
    let left = format!("{out}.0123456789abcdef0123456789abcdef.partial");
    fs::write(&left, &data[..100]).unwrap();
    let mut command = rig.store.command();
    without_unnamed_files(command.args(["volume", "export", "v", &out]));
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains(&format!("removed {left}")) && said.contains("if this is killed"), "{said}");
    assert!(fs::read(&out).unwrap() == data && !fs::exists(&left).unwrap());
}

#[test]
fn a_folder_may_be_reached_by_a_link() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", 1 << 20);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    fs::create_dir(rig.path("real")).unwrap();
    std::os::unix::fs::symlink("real", rig.path("link")).unwrap();
    rig.store.ok(&["volume", "export", "v", &rig.path("link/out.img")]);
    assert!(fs::read(rig.path("real/out.img")).unwrap() == data);
}

#[test]
fn an_export_that_is_interrupted_leaves_no_file() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", 1 << 20);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let (before, out) = (files(&rig.folder()), rig.path("out.img"));
    let mut interrupted = 0;
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let mut command = rig.store.command();
        command.args(["volume", "export", "v", &out]).stdout(Stdio::null()).stderr(Stdio::piped());
        let Some(output) = interrupted_before(&mut command, step) else { break };
        if output.status.success() {
            assert!(fs::read(&out).unwrap() == data, "step {step}");
            fs::remove_file(&out).unwrap();
        } else {
            let said = String::from_utf8(output.stderr).unwrap();
            interrupted += u32::from(said.contains("it was interrupted; nothing of it is left"));
            assert!(
                output.status.signal() == Some(15) || output.status.code() == Some(1),
                "step {step}: {said}"
            );
        }
        assert_eq!(files(&rig.folder()), before, "step {step}");
    }
    assert!(interrupted > 0, "it was interrupted by the signal itself");
    assert!(rig.events("exportVolume").iter().any(|event| event["detail"]["result"] == "failed"));
}
