//! What a volume or snapshot holds, in the clear, outside of the store.

use crate::common::attach::{flush, open, write};
use crate::common::disk::pattern;
use crate::common::killed::{End, interrupted_before, killed_before};
use crate::rig::{Rig, files};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

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
        (2, "/dev/null", "is not a file"),
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
    rig.store.ok(&["key", "disable", "alias/aws/ebs"]);
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

#[test]
fn nothing_is_written_that_is_not_on_the_record_whenever_it_is_killed() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", 1 << 20);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let (before, out) = (files(&rig.folder()), rig.path("out.img"));
    let (mut recorded, mut begun) = (0, 0);
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let mut command = rig.store.command();
        command.args(["volume", "export", "v", &out]).stdout(Stdio::null()).stderr(Stdio::null());
        let end = killed_before(&mut command, step);
        let new: Vec<_> = files(&rig.folder()).into_iter().filter(|path| !before.contains(path)).collect();
        let records = audit(&rig, "ExportVolume").len();
        assert!(new.is_empty() || records > recorded, "step {step}: {new:?} without a record");
        recorded = records;
        // The file has its name when all of it is there.
        assert!(new.iter().all(|path| *path != *out || fs::read(path).unwrap() == data), "step {step}");
        begun += u32::from(new.iter().any(|path| *path != *out));
        new.iter().for_each(|path| fs::remove_file(path).unwrap());
        if end != End::Killed {
            assert_eq!((end, new), (End::Exited(0), vec![out.into()]));
            break;
        }
    }
    assert!(begun > 0, "it was killed in the middle, too");
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
