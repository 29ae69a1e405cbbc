//! Whole stores are backed up to a place outside, and come back on an empty host: named, at one moment where
//! that was said, without what failed, and with nothing but the place and the root key, or another KMS.

use crate::common::attach::{Place, flush, open, write};
use crate::common::disk::pattern;
use crate::common::killed::{End, killed_before, killed_with_all_before};
use crate::common::kms_server::KmsServer;
use crate::common::process::{INHERITED, inherit};
use crate::common::rig::{Rig, files};
use crate::common::store::{Store, said};
use crate::moves::content;
use crate::outside::{Outside, write_to};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// What every backup of these tests says, whose root keys nobody needs to keep.
const KEPT: &str = "--root-key-is-kept";

/// Runs a command that ends with this exit code, and has printed JSON all the same.
#[track_caller]
fn json_of(store: &Store, code: i32, arguments: &[&str]) -> Value {
    let output = store.run(&[arguments, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", said(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A command that can read `passphrase` from a pipe.
fn with_passphrase(store: &Store, name: &str, arguments: &[&str], passphrase: &str) -> Output {
    let (reader, mut writer) = std::io::pipe().expect("make a pipe");
    writer.write_all(passphrase.as_bytes()).expect("they fit into a pipe");
    drop(writer);
    let mut command: Command = store.command();
    command.args(arguments);
    match name {
        "" => command.env("SEALBLK_PASSPHRASE_FD", INHERITED.to_string()),
        option => command.args([option, &INHERITED.to_string()]),
    };
    inherit(&mut command, reader.into(), INHERITED);
    command.output().expect("start sealblk")
}

/// The root key's file of a store.
fn root_key(store: &Store) -> PathBuf {
    let all = files(&store.config());
    all.into_iter().find(|path| path.extension().is_some_and(|e| e == "key")).expect("a root key")
}

/// Gives a host the root key of another one, where it lies there.
fn give_root_key(from: &Store, to: &Store) {
    let key = root_key(from);
    fs::create_dir_all(to.config()).expect("make the configuration folder");
    fs::copy(&key, to.config().join(key.file_name().expect("a name"))).expect("copy the root key");
}

/// Writes into a volume that nobody has attached.
fn fill(place: &Place, volume: &str, at: usize, bytes: &[u8]) {
    let attached = place.store.attach(volume, &[]);
    let mut session = open(attached.socket());
    write(&mut session.rings[0], at as u64 / 512, bytes);
    flush(&mut session.rings[0]);
    drop(session);
    attached.detach();
}

fn list(store: &Store, what: &str) -> Vec<Value> {
    let listed = serde_json::from_str(&store.ok(&[what, "list", "--json"])).expect("JSON");
    let Value::Array(all) = listed else { panic!("{listed}") };
    all
}

#[test]
fn an_empty_host_gets_every_volume_back_from_the_place_and_the_root_key() {
    let mut rig = Rig::new(&["--tag", "env=prod", "--sector-size", "4096"]);
    let (outside, store) = (Outside::new(), &rig.place.store);
    store.ok(&["volume", "modify", "t", "--iops", "3000", "--serial", "db-01"]);
    store.ok(&["volume", "create", "--size", "3MiB", "--name", "other one"]);
    fill(&rig.place, "other one", 1 << 20, &pattern(9, 512 << 10));
    let unnamed = rig.id(&["volume", "create", "--size", "1MiB"]);
    // Who would have to be without the root key is asked first, and nothing is begun.
    let url = outside.url();
    let told = rig.refuse(2, &["backup", &url]);
    assert!(told.contains("root key") && told.contains("sealblk kms backup FILE"), "{told}");
    assert!(outside.all().is_empty() && rig.files("snapshots").is_empty());
    let copy = rig.place.folder().join("copy");
    let copied = with_passphrase(
        &rig.place.store,
        "--new-passphrase-fd",
        &["kms", "backup", copy.to_str().unwrap()],
        "for bad days",
    );
    assert!(copied.status.success(), "{}", said(&copied));
    let done = rig.json(&["backup", &url]);
    assert_eq!(done["volumes"].as_array().unwrap().len(), 3);
    assert_eq!((&done["needed"]["root_key"], &done["removed"]), (&json!(true), &Value::Null));
    assert!(
        done["needed"]["root_key_copied"].is_string() && done["needed"]["kms_keys"][0]["key"].is_string()
    );
    // The next one sends what has changed alone, and is what comes back.
    write_to(&mut rig, 2 << 20, &pattern(5, 4096));
    let text = rig.place.store.run(&["backup", &url]);
    assert!(text.status.success(), "{}", said(&text));
    assert!(said(&text).contains("the root key of the embedded KMS"), "{}", said(&text));
    let other = content(&rig.place.store, "other one");

    let empty = Store::new();
    let told = empty.run(&["restore", &url]);
    assert_eq!(told.status.code(), Some(3), "{}", said(&told));
    assert!(said(&told).contains("the root key of the KMS"), "{}", said(&told));
    assert!(files(&empty.root().join("kms")).iter().all(|path| !path.ends_with("log")));
    give_root_key(&rig.place.store, &empty);
    let back = json_of(&empty, 0, &["restore", &url]);
    assert_eq!(back["store"], done["store"]);
    assert!(content(&empty, "t") == rig.data);
    assert!(content(&empty, "other one") == other);
    let shown: Value = serde_json::from_str(&empty.ok(&["volume", "show", "t", "--json"])).unwrap();
    assert_eq!((&shown["tags"]["env"], &shown["sector_size"]), (&json!("prod"), &json!(4096)));
    assert_eq!(
        (&shown["attach"]["iops"], &shown["attach"]["serial"]),
        (&json!(3000), &json!("db-01")),
        "{shown}"
    );
    let nameless = back["volumes"].as_array().unwrap().iter().find(|it| it["name"].is_null()).unwrap();
    assert_eq!(nameless["volume_was"], json!(unnamed));
    assert!(list(&empty, "snapshot").is_empty());
    // What was restored serves guests, is backed up as any other, and is left as it is the next time.
    let attached = empty.attach("t", &[]);
    attached.detach();
    let again = json_of(&empty, 0, &["restore", &url]);
    assert!(again["volumes"].as_array().unwrap().iter().all(|it| it["was_there"] == true), "{again}");
    json_of(&empty, 0, &["backup", &url, KEPT]);
    let told = Store::new().run(&["restore", &url]);
    assert!(told.status.code() == Some(2) && said(&told).contains("several stores"), "{}", said(&told));
    // On a third host, out of the copy and its passphrase.
    let third = Store::new();
    let of = done["store"].as_str().unwrap();
    let arguments = ["restore", &url, "--store", of, "--volume", "t", "--root-key", copy.to_str().unwrap()];
    let wrong = with_passphrase(&third, "", &arguments, "wrong");
    assert_eq!(wrong.status.code(), Some(5), "{}", said(&wrong));
    assert!(
        list(&third, "volume").is_empty()
            && files(&third.root().join("kms")).iter().all(|it| !it.ends_with("log"))
    );
    let right = with_passphrase(&third, "", &arguments, "for bad days");
    assert!(right.status.success(), "{}", said(&right));
    let exported = rig.place.folder().join("exported");
    let export =
        with_passphrase(&third, "", &["volume", "export", "t", exported.to_str().unwrap()], "for bad days");
    assert!(export.status.success(), "{}", said(&export));
    assert!(fs::read(exported).unwrap() == rig.data);
    assert_eq!(list(&third, "volume").len(), 1);
}

#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn an_empty_host_gets_every_volume_back_by_a_kms_that_both_reach() {
    let kms = KmsServer::start();
    let (key, variables) = (kms.create_key(), kms.principal("root").environment(&kms.url));
    let store = Store::new();
    store.set_environment(variables.clone());
    let mut rig = Rig::of(Place::of(store, &["--key", &format!("aws:{key}")]));
    rig.place.store.ok(&[
        "volume",
        "create",
        "--size",
        "1MiB",
        "--name",
        "two",
        "--key",
        &format!("aws:{key}"),
    ]);
    let outside = Outside::new();
    // No root key is asked for, and there is none.
    let done = rig.json(&["backup", &outside.url()]);
    assert_eq!((&done["needed"]["root_key"], &done["needed"]["embedded_kms"]), (&json!(false), &Value::Null));
    write_to(&mut rig, 0, &pattern(7, 64 << 10));
    let host = rig.place.attach(&[]);
    let done = rig.json(&["backup", &outside.url()]);
    host.end();
    // The empty one has nothing of which a base could tell.
    assert!(done["volumes"].as_array().unwrap().iter().all(|it| it["error"].is_null()), "{done}");
    assert!(done["volumes"].as_array().unwrap().iter().any(|it| it["base"].is_string()), "{done}");
    let empty = Store::new();
    empty.set_environment(variables);
    let drill = json_of(&empty, 0, &["restore", &outside.url(), "--drill"]);
    assert_eq!(drill["volumes"].as_array().unwrap().len(), 2);
    assert!(list(&empty, "volume").is_empty());
    json_of(&empty, 0, &["restore", &outside.url()]);
    assert!(content(&empty, "t") == rig.data && content(&empty, "two") == vec![0; 1 << 20]);
}

#[test]
fn what_fails_for_one_volume_is_told_and_stops_no_other() {
    let rig = Rig::new(&[]);
    let (outside, store) = (Outside::new(), &rig.place.store);
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "clear", "--unencrypted"]);
    store.ok(&["key", "create", "--alias", "alias/off"]);
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "off", "--key", "alias/off"]);
    store.ok(&["key", "disable", "--yes", "alias/off"]);
    let done = json_of(store, 8, &["backup", &outside.url(), KEPT]);
    let one = |done: &Value, name: &str| {
        done["volumes"].as_array().unwrap().iter().find(|it| it["name"] == name || it["id"] == name).cloned()
    };
    let clear = rig.reader().volume("clear").id().to_string();
    assert_eq!(one(&done, &clear).unwrap()["error"]["kind"], json!("unsupported"), "{done}");
    assert_eq!(one(&done, "off").unwrap()["error"]["kind"], json!("kms-refused"), "{done}");
    assert_eq!(one(&done, "t").unwrap()["error"], Value::Null);
    assert_eq!(rig.files("snapshots").len(), 1);
    let output = store.run(&["backup", &outside.url(), KEPT]);
    let told = said(&output);
    assert!(
        told.contains("2 volumes are not backed up") && told.contains("nothing leaves in the clear"),
        "{told}"
    );
    json_of(store, 0, &["backup", &outside.url(), KEPT, "--filter", "name=t"]);
    for (code, arguments) in
        [(3, &["--filter", "name=nothing"][..]), (2, &["--filter", "colour=red"]), (2, &["--keep-last", "0"])]
    {
        rig.refuse(code, &[&["backup", &outside.url(), KEPT], arguments].concat());
    }
    rig.refuse(3, &["backup", "file:///there/is/no/such/folder", KEPT]);
    rig.refuse(2, &["backup", &outside.of("snap-0123456789abcdef0"), KEPT]);
    // A name that is taken, and a volume that nobody has backed up.
    store.ok(&["key", "enable", "alias/off"]);
    json_of(store, 0, &["backup", &outside.url(), KEPT, "--filter", "name=t", "--filter", "name=off"]);
    store.ok(&["volume", "delete", "off"]);
    let back = json_of(store, 4, &["restore", &outside.url()]);
    assert_eq!(one(&back, "t").unwrap()["error"]["kind"], json!("busy"), "{back}");
    assert_eq!(one(&back, "off").unwrap()["error"], Value::Null, "{back}");
    assert!(content(store, "off") == vec![0; 1 << 20]);
    rig.refuse(3, &["restore", &outside.url(), "--volume", "nothing"]);
    rig.refuse(3, &["restore", &outside.url(), "--at", "2001-01-01T00:00:00Z"]);
    rig.refuse(3, &["restore", &outside.url(), "--store", "00000000-0000-0000-0000-000000000000"]);
    let another = Outside::new();
    rig.json(&["snapshot", "push", &rig.id(&["snapshot", "create", "t"]), &another.url()]);
    let told = rig.refuse(3, &["restore", &another.url()]);
    assert!(told.contains("no backup that \"sealblk backup\" has made"), "{told}");
}

#[test]
fn one_snapshot_of_each_volume_stays_here_and_so_many_there_as_are_kept() {
    let mut rig = Rig::new(&[]);
    let (outside, away) = (Outside::new(), Outside::new());
    let mine = rig.id(&["snapshot", "create", "t", "--name", "mine"]);
    rig.json(&["snapshot", "push", "mine", &outside.url()]);
    let mut last = Value::Null;
    for n in 0..3 {
        write_to(&mut rig, n << 20, &pattern(30 + n as u64, 4096));
        let done = rig.json(&["backup", &outside.url(), KEPT, "--keep-last", "2"]);
        let one = &done["volumes"][0];
        let expected = if n == 0 { json!(mine) } else { last.clone() };
        assert_eq!((&one["base"], &one["put_blocks"]), (&expected, &json!(1)), "{n}: {done}");
        assert_eq!(done["removed"].as_array().unwrap().len(), usize::from(n == 2), "{done}");
        last = one["snapshot"].clone();
        assert_eq!(list(&rig.place.store, "snapshot").len(), 2);
    }
    // What a backup has not made stays in the place.
    assert!(outside.manifest(&mine).exists());
    assert_eq!(files(&outside.path().join("snapshots")).len(), 3);
    // To another place, it is another backup.
    rig.json(&["backup", &away.url(), KEPT]);
    assert_eq!(list(&rig.place.store, "snapshot").len(), 3);
    // A push that does not get through is ended by the next backup.
    write_to(&mut rig, 5 << 20, &pattern(40, 1 << 20));
    let pages = outside.path().join("pages");
    fs::rename(&pages, outside.path().join("elsewhere")).unwrap();
    fs::write(&pages, "in the way").unwrap();
    let output = rig.place.store.run(&["backup", &outside.url(), KEPT]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    fs::remove_file(&pages).unwrap();
    fs::rename(outside.path().join("elsewhere"), &pages).unwrap();
    assert_eq!(list(&rig.place.store, "snapshot").len(), 4);
    let done = rig.json(&["backup", &outside.url(), KEPT]);
    assert_eq!(done["volumes"][0]["put_blocks"], json!(0), "{done}");
    assert_eq!(files(&outside.path().join("snapshots")).len(), 5);
    assert_eq!(list(&rig.place.store, "snapshot").len(), 3);
    // Of a volume that is gone, what is in the place is enough.
    rig.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "two"]);
    rig.place.store.ok(&["volume", "delete", "t"]);
    rig.json(&["backup", &outside.url(), KEPT]);
    let left: Vec<Value> = list(&rig.place.store, "snapshot");
    assert_eq!(left.len(), 3, "mine, that of the other place, and that of two: {left:?}");
    let back = rig.json(&["restore", &outside.url(), "--volume", "t"]);
    assert_eq!(back["volumes"].as_array().unwrap().len(), 1);
    assert!(content(&rig.place.store, "t") == rig.data);
}

#[test]
fn volumes_of_one_moment_come_back_as_of_one_moment() {
    let rig = Rig::new(&["--tag", "vm=web"]);
    let (outside, store) = (Outside::new(), &rig.place.store);
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "log", "--tag", "vm=web"]);
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "alone", "--tag", "vm=mail"]);
    let backup = |byte: u8| {
        for volume in ["t", "log", "alone"] {
            fill(&rig.place, volume, 0, &[byte; 512]);
        }
        json_of(store, 0, &["backup", &outside.url(), KEPT, "--group-by", "vm"])
    };
    backup(1);
    let second = backup(2);
    let of = |done: &Value, name: &str| {
        let all = done["volumes"].as_array().unwrap();
        all.iter().find(|it| it["name"] == name).unwrap()["snapshot"].as_str().unwrap().to_owned()
    };
    let moment = |id: &str| {
        let manifest = String::from_utf8(fs::read(outside.manifest(id)).unwrap()).unwrap();
        let at = manifest.find("sealblk:moment").expect("it says its moment");
        manifest[at..at + 60].to_owned()
    };
    assert_eq!(moment(&of(&second, "t")), moment(&of(&second, "log")));
    assert_ne!(moment(&of(&second, "t")), moment(&of(&second, "alone")));
    // One of the second moment is lost: both come back as of the first.
    rig.json(&["snapshot", "remove", &outside.url(), &of(&second, "log")]);
    let empty = Store::new();
    give_root_key(store, &empty);
    let back = json_of(&empty, 0, &["restore", &outside.url()]);
    let passed_over: Vec<(&Value, &Value)> = back["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (&it["name"], &it["newer_passed_over"]))
        .collect();
    for (volume, byte) in [("t", 1), ("log", 1), ("alone", 2)] {
        assert_eq!(content(&empty, volume)[..512], [byte; 512], "{volume}: {passed_over:?}");
    }
    let passed = |name: &str| passed_over.iter().find(|(it, _)| *it == name).unwrap().1.clone();
    assert_eq!((passed("t"), passed("log"), passed("alone")), (json!(1), json!(0), json!(0)));
}

#[test]
fn a_drill_tries_all_of_it_and_leaves_nothing() {
    let rig = Rig::new(&[]);
    let (outside, store) = (Outside::new(), &rig.place.store);
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "two"]);
    rig.json(&["backup", &outside.url(), KEPT]);
    let copy = rig.place.folder().join("copy");
    let path = copy.to_str().unwrap();
    let copied = with_passphrase(store, "--new-passphrase-fd", &["kms", "backup", path], "for bad days");
    assert!(copied.status.success(), "{}", said(&copied));
    let left = |folder: &Path| -> Vec<PathBuf> {
        let is_left = |it: &PathBuf| it.to_string_lossy().contains("drill-");
        files(folder).into_iter().filter(is_left).collect()
    };
    let before = (rig.files("snapshots"), rig.files("layers"), rig.files("volumes"));
    let leaves_nothing = || {
        assert_eq!((rig.files("snapshots"), rig.files("layers"), rig.files("volumes")), before);
        assert_eq!((left(&store.root()), left(&store.config())), (vec![], vec![]));
    };
    // Folders of one that was killed are cleared away.
    let killed = store.root().join(format!("drill-{}", "0".repeat(32)));
    fs::create_dir_all(killed.join("layers")).unwrap();
    let done = rig.json(&["restore", &outside.url(), "--drill"]);
    assert_eq!((&done["drill"], done["volumes"].as_array().unwrap().len()), (&json!(true), 2));
    assert!(done["volumes"].as_array().unwrap().iter().all(|it| it["error"].is_null()), "{done}");
    leaves_nothing();
    let arguments = ["restore", &outside.url(), "--drill", "--root-key", path];
    let right = with_passphrase(store, "", &arguments, "for bad days");
    assert!(right.status.success() && said(&right).contains("can be restored"), "{}", said(&right));
    leaves_nothing();
    let wrong = with_passphrase(store, "", &arguments, "wrong");
    assert_eq!(wrong.status.code(), Some(5), "{}", said(&wrong));
    leaves_nothing();
    // What the place has lost is found, of one volume as of the KMS.
    let of_two = done["volumes"].as_array().unwrap().iter().find(|it| it["name"] == "t").unwrap();
    let block = outside.objects("blocks").remove(0);
    let whole = fs::read(&block).unwrap();
    fs::write(&block, "damaged").unwrap();
    let done = json_of(store, 7, &["restore", &outside.url(), "--drill"]);
    let failed: Vec<&Value> =
        done["volumes"].as_array().unwrap().iter().filter(|it| !it["error"].is_null()).collect();
    assert_eq!((failed.len(), &failed[0]["snapshot"]), (1, &of_two["snapshot"]));
    fs::write(&block, whole).unwrap();
    leaves_nothing();
    let log = files(&outside.path().join("kms")).remove(0);
    let whole = fs::read(&log).unwrap();
    for (bytes, words) in [
        (None, "is not there"),
        (Some(b"x".to_vec()), "header"),
        (Some([&whole[..50], &[whole[50] ^ 1], &whole[51..]].concat()), "root key"),
        (Some([&whole[..whole.len() - 1], &[whole[whole.len() - 1] ^ 1]].concat()), "damaged"),
    ] {
        match bytes {
            Some(bytes) => fs::write(&log, bytes).unwrap(),
            None => fs::remove_file(&log).unwrap(),
        }
        let output = store.run(&["restore", &outside.url(), "--drill"]);
        assert!(!output.status.success() && said(&output).contains(words), "{words}: {}", said(&output));
        leaves_nothing();
    }
    fs::write(&log, whole).unwrap();
    rig.json(&["restore", &outside.url(), "--drill"]);
    leaves_nothing();
}

/// Killed at any moment of its own, a backup is ended by the next one: what is in the place can be restored,
/// and one snapshot of each volume is left here.
#[test]
fn a_backup_that_is_killed_is_ended_by_the_next_one() {
    let mut rig = Rig::new(&[]);
    let outside = Outside::new();
    rig.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "two"]);
    rig.json(&["backup", &outside.url(), KEPT]);
    for step in 0.. {
        assert!(step < 200, "it never ends");
        write_to(&mut rig, (step % 8) << 20, &pattern(60 + step as u64, 4096));
        let mut command = rig.place.store.command();
        command.args(["backup", &outside.url(), KEPT]).stdout(Stdio::null()).stderr(Stdio::null());
        let ended = killed_before(&mut command, step * 4);
        let verified = rig.json(&["snapshot", "verify", &outside.url()]);
        assert!(verified["snapshots"].as_array().unwrap().iter().all(|it| it["problem"].is_null()), "{step}");
        let done = rig.json(&["backup", &outside.url(), KEPT, "--keep-last", "1"]);
        assert!(done["volumes"].as_array().unwrap().iter().all(|it| it["error"].is_null()), "{step}: {done}");
        assert_eq!(list(&rig.place.store, "snapshot").len(), 2, "step {step}");
        assert!(files(&outside.path().join("leases")).is_empty(), "step {step}");
        rig.place.store.ok(&["gc"]);
        rig.assert_layers_are_named();
        if ended == End::Exited(0) {
            assert!(step > 4, "step {step}");
            break;
        }
        assert_eq!(ended, End::Killed, "step {step}");
    }
    rig.place.store.ok(&["volume", "delete", "t"]);
    rig.json(&["restore", &outside.url(), "--volume", "t"]);
    assert!(content(&rig.place.store, "t") == rig.data);
}

/// Killed at any moment, also while a process of its own works for it, a restore is gone on with by the same
/// command, and makes no volume twice.
#[test]
fn a_restore_that_is_killed_is_gone_on_with() {
    let rig = Rig::new(&[]);
    let (outside, store) = (Outside::new(), &rig.place.store);
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "two"]);
    ["t", "two"].iter().for_each(|volume| drop(store.ok(&["volume", "modify", volume, "--iops", "500"])));
    rig.json(&["backup", &outside.url(), KEPT]);
    ["t", "two"].iter().for_each(|volume| drop(store.ok(&["volume", "delete", volume])));
    let mut made_before = [false; 2];
    // Many of the calls are alike: those of every so many steps, others each time round.
    for step in (0..).map(|n| n * 5 + n % 5) {
        assert!(step < 2000, "it never ends");
        let mut command = store.command();
        command.args(["restore", &outside.url()]).stdout(Stdio::null()).stderr(Stdio::null());
        let ended = killed_with_all_before(&mut command, step);
        let back = json_of(store, 0, &["restore", &outside.url()]);
        let was_there =
            back["volumes"].as_array().unwrap().iter().filter(|it| it["was_there"] == true).count();
        made_before[usize::from(was_there == 1)] = true;
        assert!(content(store, "t") == rig.data, "step {step}");
        for volume in ["t", "two"] {
            assert_eq!(rig.json(&["volume", "show", volume])["attach"]["iops"], json!(500), "step {step}");
        }
        store.ok(&["gc"]);
        assert_eq!((list(store, "volume").len(), list(store, "snapshot").len()), (2, 2), "step {step}");
        rig.assert_layers_are_named();
        if ended == End::Exited(0) {
            assert!(step > 20 && was_there == 2, "step {step}");
            break;
        }
        assert_eq!(ended, End::Killed, "step {step}");
        ["t", "two"].iter().for_each(|volume| drop(store.ok(&["volume", "delete", volume])));
    }
    assert_eq!(made_before, [true; 2], "one volume was made, and none");
}
