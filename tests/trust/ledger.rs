//! What whoever can write the store, or breaks into a host process, makes of records: nothing
//! that a command believes.

use crate::common::attach::Place;
use crate::{edit, refused, run};
use sealblk::catalog::Metadata;
use sealblk::crypt::Dek;
use sealblk::kms::KeyProvider;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

const SOCKET: &str = "/nonexistent/t.sock";

fn shown(place: &Place, volume: &str) -> Value {
    serde_json::from_str(&place.store.ok(&["volume", "show", volume, "--json"])).unwrap()
}

fn record_of(place: &Place, volume: &str) -> PathBuf {
    let id = shown(place, volume)["id"].as_str().unwrap().to_owned();
    place.store.root().join(format!("volumes/{id}/volume.json"))
}

/// What `store check` says of each record that it does not believe.
fn problems(place: &Place) -> Vec<String> {
    let output = place.store.run(&["store", "check", "--json"]);
    let (code, said) = (output.status.code().unwrap(), String::from_utf8_lossy(&output.stdout));
    let found: Value = serde_json::from_str(&said).unwrap();
    let records = found["records"].as_array().unwrap();
    let problems: Vec<_> = records.iter().filter_map(|r| r["problem"].as_str()).map(str::to_owned).collect();
    assert_eq!(code, if problems.is_empty() { 0 } else { 7 }, "{said}");
    problems
}

/// Every command that would act on the volume `id`, or show what it holds, refuses.
#[track_caller]
fn all_refuse(place: &Place, id: &str, words: &str) {
    let out = place.folder().join("out.img");
    for command in [
        &["attach", id, "--socket-path", SOCKET][..],
        &["attach", id, "--socket-path", SOCKET, "--read-only"],
        &["attach", id, "--socket-path", SOCKET, "--incoming"],
        &["snapshot", "create", id],
        &["volume", "show", id],
        &["volume", "resize", id, "64MiB"],
        &["volume", "flatten", id],
        &["volume", "rekey", id],
        &["volume", "rewrap", id],
        &["volume", "export", id, out.to_str().unwrap()],
        &["volume", "tag", id, "a=b"],
        &["volume", "delete", id],
    ] {
        let said = refused(place, command, 7, words);
        assert!(said.contains("sealblk store accept"), "{command:?}: {said}");
    }
    assert!(!out.exists());
}

/// The files of a folder and below, with what they hold.
fn copy_of(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match fs::symlink_metadata(&path).unwrap().file_type() {
            kind if kind.is_dir() => files.extend(copy_of(&path)),
            kind if kind.is_file() => files.push((path.clone(), fs::read(&path).unwrap())),
            _ => {}
        }
    }
    files
}

fn put_back(files: &[(PathBuf, Vec<u8>)]) {
    for (path, bytes) in files {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(path);
        fs::write(path, bytes).unwrap();
    }
}

#[test]
fn a_tenant_does_not_get_anothers_volume_by_its_name() {
    let place = Place::new(&[]);
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "other"]);
    let (own, others) = (record_of(&place, "t"), record_of(&place, "other"));
    let whole = (fs::read(&own).unwrap(), fs::read(&others).unwrap());
    edit(&own, |volume| volume["name"] = json!("other"));
    edit(&others, |volume| volume["name"] = json!("t"));
    refused(&place, &["attach", "t", "--socket-path", SOCKET], 7, "its name is \"t\" and was \"other\"");
    refused(&place, &["volume", "delete", "other"], 7, "its name is \"other\" and was \"t\"");
    refused(&place, &["volume", "create", "--size", "1MiB", "--name", "t"], 4, "has the name \"t\" already");
    assert_eq!(problems(&place).len(), 2);
    fs::write(&own, whole.0).unwrap();
    fs::write(&others, whole.1).unwrap();
    place.attach(&[]).end();
    // A name that was taken away, too.
    let id = place.id();
    edit(&own, |volume| volume["name"] = Value::Null);
    all_refuse(&place, &id, "its name is none and was \"t\"");
}

#[test]
fn what_is_encrypted_stays_encrypted() {
    let place = Place::new(&[]);
    place.attach(&[]).end();
    let snapshot = place.store.ok(&["snapshot", "create", "t"]).trim().to_owned();
    let id = place.id();
    let bare = |record: &mut Value| {
        record["encrypted"] = json!(false);
        record["keys"] = json!([]);
        record["mac"] = Value::Null;
        let layers = record["layers"].as_array_mut().unwrap();
        layers.drain(1..);
        layers[0]["key"] = Value::Null;
    };
    edit(&place.volume_json(), bare);
    all_refuse(&place, &id, "it is not encrypted and was encrypted");
    let record = place.store.root().join(format!("snapshots/{snapshot}.json"));
    edit(&record, bare);
    let out = place.folder().join("out.img");
    for command in [
        &["volume", "create", "--snapshot", &snapshot][..],
        &["snapshot", "show", &snapshot],
        &["snapshot", "copy", &snapshot],
        &["snapshot", "export", &snapshot, out.to_str().unwrap()],
        &["snapshot", "delete", &snapshot],
    ] {
        refused(&place, command, 7, "its record is not the one that it had");
    }
    assert_eq!(problems(&place).len(), 2);
    assert_eq!(place.store.ok(&["audit", "show"]).matches("AcceptRecord").count(), 0);
}

/// A volume that was never attached has no seal: the data key could be one that somebody else made.
#[test]
fn a_data_key_that_was_planted_is_not_used() {
    let place = Place::new(&[]);
    let key = place.store.ok(&["key", "create", "--alias", "alias/theirs"]);
    assert!(key.contains("key"), "{key}");
    let context = sealblk::kms::EncryptionContext::pair("aws:ebs:id", place.id());
    let planted = place.kms().generate_wrapped("alias/theirs", 64, &context).unwrap();
    use base64::Engine;
    let blob = base64::engine::general_purpose::STANDARD.encode(&planted.blob);
    let id = place.id();
    for sealed in [false, true] {
        if sealed {
            place.attach(&[]).end();
        }
        let whole = fs::read(place.volume_json()).unwrap();
        edit(&place.volume_json(), |volume| {
            volume["keys"][0]["key_id"] = json!(planted.key_id);
            volume["keys"][0]["wrapped"] = json!(blob);
            volume["keys"][0]["check"] = Value::Null;
            volume["mac"] = Value::Null;
        });
        let words = if sealed { "it has no seal any more" } else { "its wrapped data keys are not those" };
        all_refuse(&place, &id, words);
        fs::write(place.volume_json(), whole).unwrap();
    }
    place.attach(&[]).end();
}

/// What was written after a re-keying does not go under the old data key again.
/// Each wrapped copy of a data key is what a command has made, and there are no more, and no fewer.
#[test]
fn a_slot_that_no_command_has_made_is_not_asked() {
    let place = Place::new(&[]);
    place.attach(&[]).end();
    for alias in ["alias/second", "alias/theirs"] {
        place.store.ok(&["key", "create", "--alias", alias]);
    }
    let alone = fs::read(place.volume_json()).unwrap();
    place.store.ok(&["volume", "key", "add", "t", "--key", "alias/second"]);
    place.attach(&[]).end();
    let id = place.id();
    let whole = fs::read(place.volume_json()).unwrap();
    let metadata = place.metadata();
    let (kms, context) = (place.kms(), metadata.encryption_context());
    // Also one that unwraps to the very data key.
    let theirs = kms.rewrap(&metadata.keys()[0].first().wrapped, &context, "alias/theirs", &context).unwrap();
    use base64::Engine;
    let blob = base64::engine::general_purpose::STANDARD.encode(&theirs.blob);
    let theirs = json!({"provider": "embedded", "key_id": theirs.key_id, "wrapped": blob});
    type Edit<'a> = &'a dyn Fn(&mut Vec<Value>);
    let edits: [Edit<'_>; 4] = [
        &|slots| slots.push(theirs.clone()),
        &|slots| slots[0] = theirs.clone(),
        &|slots| slots[1] = theirs.clone(),
        &|slots| slots.reverse(),
    ];
    for change in edits {
        edit(&place.volume_json(), |volume| change(volume["keys"][0]["slots"].as_array_mut().unwrap()));
        all_refuse(&place, &id, "its wrapped data keys are not those that it had");
        refused(&place, &["volume", "key", "list", "t"], 7, "its wrapped data keys");
        refused(&place, &["volume", "key", "add", &id, "--key", "alias/theirs"], 7, "its wrapped data keys");
        refused(
            &place,
            &["volume", "key", "remove", &id, "--key", "alias/second"],
            7,
            "its wrapped data keys",
        );
        fs::write(place.volume_json(), &whole).unwrap();
    }
    place.attach(&[]).end();
    // What was there before the slot was added, and after it is removed, is no more what there is.
    fs::write(place.volume_json(), &alone).unwrap();
    all_refuse(&place, &id, "its wrapped data keys are not those that it had");
    fs::write(place.volume_json(), &whole).unwrap();
    place.store.ok(&["volume", "key", "remove", "t", "--key", "alias/second"]);
    fs::write(place.volume_json(), &whole).unwrap();
    all_refuse(&place, &id, "its wrapped data keys are not those that it had");
}

#[test]
fn a_record_from_before_is_refused() {
    let place = Place::new(&[]);
    place.attach(&[]).end();
    let before = copy_of(&place.store.root());
    place.store.ok(&["volume", "rekey", "t", "--follow"]);
    let (id, whole) = (place.id(), copy_of(&place.store.root()));
    let of =
        |name: &'static str| move |(path, _): &&(PathBuf, Vec<u8>)| path.to_str().unwrap().contains(name);
    // The record and its layer.
    let some: Vec<_> = before.iter().filter(|f| of("/volumes/")(f) || of("/layers/")(f)).cloned().collect();
    put_back(&some);
    all_refuse(&place, &id, "its layers are not those that it had");
    // And with its entry in the ledger, which is as it was written.
    let all: Vec<_> = before.iter().filter(|f| of("/ledger/")(f)).cloned().chain(some).collect();
    put_back(&all);
    all_refuse(&place, &id, "is an older one, put back");
    // The operator has restored a backup.
    assert_eq!(problems(&place), ["its entry in the store's ledger is an older one, put back"]);
    place.store.ok(&["store", "accept", "t"]);
    assert_eq!(problems(&place), Vec::<String>::new());
    place.attach(&[]).end();
    let audit = place.store.ok(&["audit", "show", "--json"]);
    let accepted: Vec<Value> = audit.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let accepted: Vec<_> = accepted.iter().filter(|r| r["eventName"] == "AcceptRecord").collect();
    assert_eq!(accepted.len(), 1, "{audit}");
    assert_eq!(accepted[0]["requestParameters"]["record"], json!(id));
    place.store.ok(&["audit", "verify"]);
    // What was current until then is refused from now on.
    put_back(&whole.iter().filter(|f| of("/volumes/")(f)).cloned().collect::<Vec<_>>());
    refused(&place, &["volume", "show", &id], 7, "its layers are not those");
}

#[test]
fn a_volume_that_was_deleted_does_not_come_back_by_itself() {
    let place = Place::new(&[]);
    let (id, before) = (place.id(), copy_of(&place.store.root()));
    place.store.ok(&["volume", "delete", "t"]);
    put_back(&before);
    all_refuse(&place, &id, "this host does not know it");
    place.store.ok(&["store", "accept", &id]);
    place.attach(&[]).end();
}

#[test]
fn an_entry_is_written_by_whoever_has_the_stores_key() {
    let place = Place::new(&[]);
    let (id, snapshot) = (place.id(), place.store.ok(&["snapshot", "create", "t"]).trim().to_owned());
    for (subject, command) in [(&id, ["volume", "show"]), (&snapshot, ["snapshot", "show"])] {
        let entry = place.store.root().join(format!("ledger/{subject}.json"));
        let whole = fs::read_to_string(&entry).unwrap();
        let (body, mac) = whole.trim_end().rsplit_once('\n').unwrap();
        let number = body.replacen("\"number\":", "\"number\":9", 1);
        let other_mac = if mac.starts_with('0') { "1" } else { "0" }.to_owned() + &mac[1..];
        for forged in [
            format!("{number}\n{mac}\n"),
            format!("{body}\n{other_mac}\n"),
            format!("{body}\n{}\n", &mac[..62]),
            format!("{body}\n"),
            String::new(),
            "\n".into(),
        ] {
            fs::write(&entry, forged).unwrap();
            let command = [&command[..], &[subject]].concat();
            refused(&place, &command, 7, "is not one that this host has written");
        }
        fs::remove_file(&entry).unwrap();
        refused(&place, &[&command[..], &[subject]].concat(), 7, "this host does not know it");
        fs::write(&entry, whole).unwrap();
        place.store.ok(&[&command[..], &[subject]].concat());
    }
    // Nor is one record's entry another one's.
    let other = place.store.ok(&["volume", "create", "--size", "8MiB"]).trim().to_owned();
    let entry = |id: &str| place.store.root().join(format!("ledger/{id}.json"));
    fs::copy(entry(&other), entry(&id)).unwrap();
    refused(&place, &["volume", "show", &id], 7, "is not one that this host has written");
}

/// A guest that has broken into its host process seals what it likes, with the data key.
#[test]
fn a_host_process_makes_nothing_of_its_volume_that_no_command_has() {
    let place = Place::new(&[]);
    place.attach(&[]).end();
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "golden"]);
    let frozen = shown(&place, "golden")["layers"][0].clone();
    place.store.ok(&["snapshot", "create", "golden"]);
    let (id, path, whole) = (place.id(), place.volume_json(), fs::read(place.volume_json()).unwrap());
    let deks = [Dek::from_bytes(&place.dek()).unwrap()];
    type Change = Box<dyn Fn(&mut Value)>;
    let changes: [(&str, Change); 6] = [
        ("its name is \"golden\" and was \"t\"", Box::new(|v| v["name"] = json!("golden"))),
        (
            "it has 4194304 bytes",
            Box::new(|v| {
                v["size"] = json!(4 << 20);
                v["layers"][0]["size"] = json!(4 << 20);
            }),
        ),
        ("its layers are not those", Box::new(move |v| v["layers"][0]["id"] = frozen["id"].clone())),
        (
            "its layers are not those",
            Box::new(|v| {
                let below = json!({"id": uuid::Uuid::new_v4(), "key": 0, "masked": false, "size": 8 << 20});
                v["layers"].as_array_mut().unwrap().push(below);
            }),
        ),
        (
            "the snapshot that it was made of is another one",
            Box::new(|v| {
                v["origin"] = json!({"snapshot": "snap-0123456789abcdef0", "proof": null});
            }),
        ),
        ("it was made at another time", Box::new(|v| v["created"] = json!("2020-01-01T00:00:00Z"))),
    ];
    for (words, change) in changes {
        edit(&path, change);
        let mut metadata = Metadata::from_json(&fs::read(&path).unwrap()).unwrap();
        metadata.seal(&deks);
        fs::write(&path, metadata.to_json()).unwrap();
        all_refuse(&place, &id, words);
        fs::write(&path, &whole).unwrap();
    }
    place.attach(&[]).end();
}

/// Whatever commands do, attached or not, the ledger says so when they have ended.
#[test]
fn what_commands_make_is_believed() {
    let place = Place::new(&[]);
    place.store.ok(&["key", "create", "--alias", "alias/new"]);
    for attached in [true, false] {
        let host = attached.then(|| place.attach(&["--hydrate-rate", "1GiB"]));
        for command in [
            &["snapshot", "create", "t", "--name", "one"][..],
            &["volume", "resize", "t", if attached { "16MiB" } else { "32MiB" }],
            &["volume", "rewrap", "t", "--key", if attached { "alias/new" } else { "alias/aws/ebs" }],
            &["volume", "rekey", "t"],
            &["snapshot", "create", "t"],
            &["volume", "flatten", "t", "--follow"],
            &["volume", "tag", "t", "a=b"],
        ] {
            place.store.ok(command);
            assert_eq!(problems(&place), Vec::<String>::new(), "{command:?}, attached: {attached}");
        }
        if let Some(host) = host {
            host.end();
        }
        assert_eq!(problems(&place), Vec::<String>::new());
    }
    let snapshots = fs::read_dir(place.store.root().join("snapshots")).unwrap();
    let ids: Vec<String> = snapshots
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    let copy = place.store.ok(&["snapshot", "copy", &ids[0]]).trim().to_owned();
    let full = place.store.ok(&["snapshot", "copy", &ids[0], "--key", "alias/new"]).trim().to_owned();
    place.store.ok(&["snapshot", "tag", &copy, "a=b"]);
    let clone = place.store.ok(&["volume", "create", "--snapshot", &full]).trim().to_owned();
    assert_eq!(problems(&place), Vec::<String>::new());
    for id in ids.iter().chain([&copy, &full]) {
        place.store.ok(&["snapshot", "delete", id]);
    }
    place.store.ok(&["volume", "delete", &clone]);
    place.store.ok(&["volume", "delete", "t"]);
    assert_eq!(problems(&place), Vec::<String>::new());
    // Nothing is left of what is gone: neither entries nor marks.
    assert_eq!(copy_of(&place.store.root().join("ledger")), []);
    let marks = copy_of(&place.store.config().join("stores"));
    assert!(marks.iter().all(|(path, _)| !path.to_str().unwrap().contains("/marks/")), "{marks:?}");
}

/// A store that was made elsewhere, or by an earlier version.
#[test]
fn a_store_that_is_brought_here_is_accepted_first() {
    let place = Place::new(&[]);
    place.attach(&[]).end();
    place.store.ok(&["snapshot", "create", "t"]);
    let id = place.id();
    let stores = place.store.config().join("stores");
    fs::remove_dir_all(&stores).unwrap();
    all_refuse(&place, &id, "this host does not know it");
    refused(&place, &["volume", "create", "--size", "1MiB"], 7, "sealblk store accept --all");
    assert_eq!(problems(&place).len(), 2);
    place.store.ok(&["store", "accept", "--all"]);
    assert_eq!(problems(&place), Vec::<String>::new());
    place.attach(&[]).end();
    place.store.ok(&["volume", "create", "--size", "1MiB"]);
    // A record that cannot be read is accepted by nobody, and keeps no other from it.
    fs::remove_dir_all(&stores).unwrap();
    let broken = place.store.root().join("snapshots/snap-00000000000000000.json");
    fs::write(&broken, "{").unwrap();
    refused(&place, &["store", "accept", "--all"], 7, "cannot be read");
    place.attach(&[]).end();
    let (code, said) = run(&place, &["store", "accept", "no-such-volume"]);
    assert_eq!(code, 3, "{said}");
}
