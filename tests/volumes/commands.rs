//! `sealblk volume`, `sealblk events` and the settings, through the binary: what a user types, reads and
//! finds on disk, and that a refusal changes nothing.

use crate::common::process::tie_to_test;
use sealblk::base::root::Root;
use sealblk::catalog::Catalog;
use sealblk::catalog::lock::{Holder, Purpose, VolumeLock};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

struct Store {
    dir: tempfile::TempDir,
}

/// What a command said, and how it ended.
struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Store {
    fn new() -> Self {
        Store { dir: tempfile::tempdir().unwrap() }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
        command.args(arguments).env("SEALBLK_ROOT", self.root());
        command.env("SEALBLK_CONFIG_DIR", self.dir.path().join("config")).env_remove("RUST_LOG");
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Said {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Said { code: status.code().expect("no signal"), out: text(stdout), err: text(stderr) }
    }

    /// Runs a command that succeeds and says so in JSON.
    fn json(&self, arguments: &[&str]) -> Value {
        let said = self.run(&[arguments, &["--json"]].concat());
        // The first key has more to say.
        let err: Vec<&str> = said.err.lines().filter(|line| !line.contains("made a KMS")).collect();
        assert_eq!((said.code, &err[..]), (0, &[][..]), "{arguments:?}");
        serde_json::from_str(&said.out).unwrap()
    }

    /// Runs a command that fails with `code`, says why, and changes nothing.
    fn refuse(&self, code: i32, arguments: &[&str]) -> String {
        let before = self.files();
        let said = self.run(arguments);
        assert_eq!((said.code, said.out.as_str()), (code, ""), "{arguments:?}: {}", said.err);
        assert_eq!(self.files(), before, "{arguments:?}");
        said.err
    }

    fn create(&self, arguments: &[&str]) -> Value {
        self.json(&[&["volume", "create", "--size", "1MiB"], arguments].concat())
    }

    fn volume_json(&self, volume: &Value) -> PathBuf {
        self.root().join("volumes").join(volume["id"].as_str().unwrap()).join("volume.json")
    }

    /// Every file of the volumes, and who they say has them.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.root().join("volumes"), self.root().join("layers")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => drop(files.insert(path.clone(), fs::read(&path).unwrap())),
                }
            }
        }
        files
    }
}

#[test]
fn a_volume_is_made_shown_and_deleted() {
    let store = Store::new();
    let made = store.create(&["--name", "db", "--sector-size", "4096"]);
    let id = made["id"].as_str().unwrap();
    assert_eq!(made["name"], "db");
    assert_eq!((made["size"].as_u64(), made["sector_size"].as_u64()), (Some(1 << 20), Some(4096)));
    assert_eq!((made["encrypted"].as_bool(), made["state"].as_str()), (Some(true), Some("available")));
    assert_eq!(made["keys"][0]["provider"], "embedded");
    assert!(made["keys"][0]["key_id"].as_str().unwrap().starts_with("arn:aws:kms:"));
    assert_eq!(fs::metadata(made["layers"][0]["path"].as_str().unwrap()).unwrap().len(), 1 << 20);
    for reference in ["db", id, &id[..12], &id[4..12]] {
        let mut shown = store.json(&["volume", "show", reference]);
        let more = ["attachment", "next_attach"].map(|field| shown.as_object_mut().unwrap().remove(field));
        assert!(more.iter().all(Option::is_some));
        let shared = shown["keys"][0].as_object_mut().unwrap().remove("shared_with");
        assert_eq!(shared, Some(json!({"snapshots": [], "volumes": []})));
        let layer = shown["layers"][0].as_object_mut().unwrap();
        let usage = ["on_disk", "on_device", "shared_with"].map(|field| layer.remove(field));
        assert_eq!(usage, [Some(json!(0)), Some(json!(false)), Some(json!([]))]);
        assert_eq!(shown, made, "{reference}");
    }
    let mut listed = store.json(&["volume", "list"]);
    let more = ["space", "file_system"].map(|field| listed[0].as_object_mut().unwrap().remove(field));
    assert!(more[0].as_ref().is_some_and(|space| space["shared"] == 0), "{more:?}");
    assert!(
        more[1].as_ref().is_some_and(|all| all["volumes"] == 1 << 20 && all["size"].is_u64()),
        "{more:?}"
    );
    assert_eq!(listed, json!([made]));
    let deleted = store.json(&["volume", "delete", "db"]);
    let nothing = json!({"given_back": 0, "moved": 0, "merged_layers": 0, "left_for_later": 0, "is_busy": false, "has_no_holes": false});
    assert_eq!(deleted, json!({"id": id, "state": "deleted", "space": nothing}));
    assert_eq!(store.json(&["volume", "list"]), json!([]));
    assert!(store.files().is_empty());
}

#[test]
fn people_read_text() {
    let store = Store::new();
    let made = store.run(&["volume", "create", "--size", "20MiB", "--name", "db"]);
    let id = made.out.trim();
    assert_eq!(made.out, format!("{id}\n"));
    let list = store.run(&["volume", "list"]).out;
    let lines: Vec<Vec<&str>> = list.lines().map(|l| l.split_whitespace().collect()).collect();
    let head = ["ID", "NAME", "SIZE", "SECTOR", "ENCRYPTED", "STATE", "CREATED", "ON", "DISK"];
    assert_eq!(lines[0], head);
    assert!(list.contains("20.0 MiB in all volumes") && !list.contains("overcommitted"), "{list}");
    assert_eq!(lines[1][..7], [id, "db", "20", "MiB", "512", "yes", "available"]);
    let show = store.run(&["volume", "show", "db"]).out;
    assert!(show.contains("20 MiB (20971520 bytes)") && show.contains("embedded: arn:aws:kms:"), "{show}");
    assert_eq!(store.run(&["volume", "delete", "db"]).out, format!("{id} deleted\n"));
    let events = store.run(&["events"]).out;
    let words: Vec<Vec<&str>> = events.lines().map(|l| l.split_whitespace().skip(1).collect()).collect();
    assert_eq!(words, [["createVolume", "available", id], ["deleteVolume", "deleted", id]]);
}

#[test]
fn volumes_that_are_larger_than_the_disk_in_all_are_said_to_be() {
    let store = Store::new();
    for name in ["a", "b"] {
        store.json(&["volume", "create", "--size", "15TiB", "--name", name]);
    }
    let list = store.run(&["volume", "list"]).out;
    assert!(list.contains("30.0 TiB in all volumes") && list.contains("overcommitted"), "{list}");
    assert_eq!(store.json(&["volume", "list"])[1]["file_system"]["volumes"], 30_u64 << 40);
}

#[test]
fn the_default_key_is_made_once() {
    let store = Store::new();
    let (one, other) = (store.create(&[]), store.create(&["--key", "alias/aws/ebs"]));
    assert_eq!(one["keys"], other["keys"]);
    let other = store.json(&["key", "create", "--alias", "alias/mine"]);
    let third = store.create(&["--key", "alias/mine"]);
    assert_ne!(third["keys"], one["keys"]);
    let key = third["keys"][0]["key_id"].as_str().unwrap();
    assert!(other.to_string().contains(key), "{other} {key}");
}

#[test]
fn a_disabled_key_makes_no_volume() {
    let store = Store::new();
    let arn = store.create(&[])["keys"][0]["key_id"].as_str().unwrap().to_string();
    store.json(&["key", "disable", "--yes", "alias/aws/ebs"]);
    let said = store.refuse(5, &["volume", "create", "--size", "1MiB"]);
    assert!(said.contains(&format!("{arn} is disabled; enable it with")), "{said}");
    let events = store.run(&["events", "--json"]).out;
    let event: Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
    assert_eq!(event["detail-type"], "EBS Volume Notification");
    assert_eq!(
        (&event["detail"]["event"], &event["detail"]["result"]),
        (&json!("createVolume"), &json!("failed"))
    );
    assert_eq!(event["detail"]["cause"], format!("{arn} is disabled."));
    store.json(&["key", "enable", "alias/aws/ebs"]);
    store.create(&[]);
}

#[test]
fn bad_arguments_are_refused_before_anything_is_made() {
    let store = Store::new();
    for size in
        ["", "0", "1", "513", "-1", "1.5.5GiB", "20Gi", "lots", "8EiB", "18446744073709551616", "8192PiB"]
    {
        store.refuse(2, &["volume", "create", &format!("--size={size}")]);
    }
    for arguments in [
        &["--size=512", "--sector-size=4096"][..],
        &["--size=4096", "--sector-size=1024"],
        &["--size=4096", "--name="],
        &["--size=4096", "--name=vol-1"],
        &["--size=4096", "--name=a\nb"],
        &["--size=4096", "--key=alias/x", "--unencrypted"],
        &["--name=a"],
        &["--size=4096", "--tag=novalue"],
        &["--size=4096", "--tag=aws:x=1"],
    ] {
        store.refuse(2, &[&["volume", "create"], arguments].concat());
    }
    store.refuse(3, &["volume", "create", "--size=4096", "--key=alias/none"]);
    store.refuse(3, &["volume", "show", "none"]);
    store.refuse(3, &["volume", "delete", "vol-0123456789abcdef0"]);
    store.refuse(3, &["volume", "show", ""]);
    assert!(store.files().is_empty());
}

#[test]
fn an_error_in_json_is_one_object_on_standard_error() {
    let store = Store::new();
    let said = store.refuse(3, &["--json", "volume", "show", "none"]);
    let error: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(error["error"]["kind"], "not-found");
    assert!(error["error"]["message"].as_str().unwrap().contains("\"none\""));
}

#[test]
fn an_id_prefix_must_mean_one_volume() {
    let store = Store::new();
    // 17 ids share 16 first digits.
    let ids: Vec<String> =
        (0..17).map(|_| store.create(&["--unencrypted"])["id"].as_str().unwrap().to_string()).collect();
    let shared = ids.iter().find(|a| ids.iter().filter(|b| b[..5] == a[..5]).count() > 1).unwrap();
    let said = store.refuse(2, &["volume", "show", &shared[..5]]);
    for id in &ids {
        assert_eq!(said.contains(id.as_str()), id[..5] == shared[..5], "{said}");
    }
    store.refuse(2, &["volume", "delete", &shared[4..5]]);
    // A name comes before the first digit of somebody's id.
    let named = store.create(&["--unencrypted", "--name", &shared[4..5]]);
    assert_eq!(store.json(&["volume", "show", &shared[4..5]])["id"], named["id"]);
}

/// One record that cannot be read: the others go on as before, and there is a way out.
#[test]
fn what_cannot_be_read_stands_in_nobodys_way() {
    let store = Store::new();
    let [bad, other, third] = ["bad", "other", "third"].map(|name| store.create(&["--name", name]));
    let layer = |volume: &Value| PathBuf::from(volume["layers"][0]["path"].as_str().unwrap());
    let (id, record) = (bad["id"].as_str().unwrap(), store.volume_json(&bad));
    let tags = record.with_file_name("tags.json");
    fs::write(&tags, "{").unwrap();
    let list = store.json(&["volume", "list"]);
    let listed = list.as_array().unwrap().iter().find(|v| v["id"] == id).unwrap();
    assert_eq!((&listed["tags"], &listed["state"]), (&Value::Null, &json!("available")));
    assert!(listed["problem"].as_str().unwrap().contains(tags.to_str().unwrap()), "{listed}");
    // What it may name is known all the same: the others' layers are not among it.
    fs::write(&record, "{").unwrap();
    store.json(&["volume", "delete", "other"]);
    assert!(!layer(&other).exists() && layer(&bad).exists());
    store.json(&["gc"]);
    assert!(layer(&bad).exists());
    let said = store.refuse(7, &["volume", "delete", id]);
    assert!(said.contains("\"delete --unreadable\""), "{said}");
    let said = store.refuse(2, &["volume", "delete", "third", "--unreadable"]);
    assert!(said.contains("its record can be read"), "{said}");
    store.refuse(3, &["volume", "delete", "vol-0123456789abcdef0", "--unreadable"]);
    store.json(&["volume", "delete", id, "--unreadable"]);
    assert!(!record.parent().unwrap().exists() && layer(&bad).exists());
    store.json(&["gc"]);
    assert!(!layer(&bad).exists() && layer(&third).exists());
    assert_eq!(store.run(&["store", "check"]).code, 0);
    // The same of a snapshot's record.
    let snapshot = store.json(&["snapshot", "create", "third"]);
    let snapshot = snapshot["id"].as_str().unwrap_or_else(|| panic!("{snapshot}"));
    let path = store.root().join("snapshots").join(format!("{snapshot}.json"));
    fs::write(&path, "{").unwrap();
    store.json(&["volume", "delete", "third"]);
    assert!(layer(&third).exists());
    let said = store.refuse(7, &["snapshot", "delete", snapshot]);
    assert!(said.contains("\"delete --unreadable\""), "{said}");
    store.json(&["snapshot", "delete", snapshot, "--unreadable"]);
    store.json(&["gc"]);
    assert!(!layer(&third).exists());
    assert_eq!(fs::read_dir(store.root().join("layers")).unwrap().count(), 0);
    assert_eq!(store.run(&["store", "check"]).code, 0);
}

#[test]
fn damaged_metadata_is_refused_and_named() {
    let store = Store::new();
    let (bad, good) = (store.create(&["--name", "bad"]), store.create(&["--name", "good"]));
    let (id, path) = (bad["id"].as_str().unwrap(), store.volume_json(&bad));
    let whole = fs::read(&path).unwrap();
    let edit = |edit: fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&whole).unwrap();
        edit(&mut value);
        serde_json::to_vec(&value).unwrap()
    };
    let other_key = fs::read(store.volume_json(&good)).unwrap();
    let cases: [(&str, Vec<u8>); 8] = [
        ("cut short", Vec::new()),
        ("cut short", whole[..whole.len() / 2].to_vec()),
        ("not what sealblk writes", vec![0; whole.len()]),
        ("format version 3", edit(|v| v["format"] = json!(3))),
        ("unknown field `colour`", edit(|v| v["colour"] = json!("red"))),
        ("not whole sectors", edit(|v| v["size"] = json!(1000))),
        ("is not that of", edit(|v| v["keys"][0]["context"]["aws:ebs:id"] = json!("vol-0123456789abcdef0"))),
        ("it describes", other_key),
    ];
    for (words, bytes) in cases {
        fs::write(&path, bytes).unwrap();
        for command in ["show", "delete"] {
            let said = store.refuse(7, &["volume", command, id]);
            assert!(said.contains(words) && said.contains(path.to_str().unwrap()), "{words}: {said}");
        }
        // A damaged volume does not hide the others, nor stop new ones.
        let list = store.run(&["volume", "list"]);
        assert_eq!(list.code, 0);
        assert!(list.out.contains("damaged") && list.out.contains("good") && list.err.contains(words));
        store.json(&["volume", "show", "good"]);
    }
    let list = store.json(&["volume", "list"]);
    let damaged = list.as_array().unwrap().iter().find(|v| v["id"] == id).unwrap();
    assert_eq!((&damaged["state"], &damaged["error"]["kind"]), (&json!("damaged"), &json!("corrupt")));
    store.create(&["--name", "new"]);
    fs::write(&path, whole).unwrap();
    store.json(&["volume", "delete", "bad"]);
}

#[test]
fn a_missing_layer_is_shown_and_does_not_stop_the_deletion() {
    let store = Store::new();
    let made = store.create(&[]);
    fs::remove_file(made["layers"][0]["path"].as_str().unwrap()).unwrap();
    let id = made["id"].as_str().unwrap();
    assert!(store.json(&["volume", "show", id])["problem"].as_str().unwrap().contains("is missing"));
    assert!(store.run(&["volume", "show", id]).out.contains("is missing"));
    store.json(&["volume", "delete", id]);
    assert!(store.files().is_empty());
}

#[test]
fn a_volume_in_use_says_by_whom_and_is_not_deleted() {
    let store = Store::new();
    let made = store.create(&["--name", "db"]);
    let id = made["id"].as_str().unwrap().parse().unwrap();
    let holder = Holder::this_process(Purpose::Attach, Some(Path::new("/run/db.sock"))).unwrap();
    let folder = Catalog::new(&Root::new(store.root())).folder(id);
    let lock = VolumeLock::acquire(&folder, id, &holder).unwrap();
    let said = store.refuse(4, &["volume", "delete", "db"]);
    let words = format!("{id} is attached by process {} (since ", std::process::id());
    assert!(said.contains(&words) && said.contains("socket /run/db.sock)"), "{said}");
    let shown = store.json(&["volume", "show", "db"]);
    assert_eq!(
        (&shown["state"], &shown["attached_by"]["pid"]),
        (&json!("in-use"), &json!(std::process::id()))
    );
    drop(lock);
    assert_eq!(store.json(&["volume", "show", "db"])["state"], "available");
}

#[test]
fn settings_choose_the_key_and_forbid_plaintext() {
    let store = Store::new();
    let other = store.create(&["--unencrypted"]);
    assert_eq!((&other["encrypted"], &other["keys"]), (&json!(false), &json!([])));
    store.json(&["key", "create", "--alias", "alias/mine"]);
    let settings = store.dir.path().join("config/sealblk.toml");
    fs::write(&settings, "default-key = 'alias/mine'\nencrypt-by-default = true\nregion = 'eu-1'\n").unwrap();
    let said = store.refuse(2, &["volume", "create", "--size=1MiB", "--unencrypted"]);
    assert!(said.contains("encrypt-by-default"), "{said}");
    let (mine, named) = (store.create(&[]), store.create(&["--key", "alias/mine"]));
    assert_eq!(mine["keys"], named["keys"]);
    let events = store.run(&["events", "--json"]).out;
    assert!(events.lines().last().unwrap().contains("arn:aws:ec2:eu-1:000000000000:volume/vol-"));
    fs::write(&settings, "encrypt_by_default = true\n").unwrap();
    let said = store.refuse(2, &["volume", "create", "--size=1MiB"]);
    assert!(said.contains("sealblk.toml") && said.contains("encrypt_by_default"), "{said}");
}

/// `sealblk events --follow --json`, ended when dropped.
struct Follower {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Follower {
    fn start(store: &Store) -> Self {
        let mut command = store.command(&["events", "--follow", "--json"]);
        tie_to_test(&mut command, vec![]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Follower { child, lines }
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn interrupt(&self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn events_are_followed_until_interrupted() {
    let store = Store::new();
    let first = store.create(&["--unencrypted"]);
    let mut follower = Follower::start(&store);
    let volume = |event: Value| event["resources"][0].as_str().unwrap().to_string();
    assert!(volume(follower.next()).ends_with(first["id"].as_str().unwrap()));
    for _ in 0..3 {
        let made = store.create(&["--unencrypted"]);
        assert!(volume(follower.next()).ends_with(made["id"].as_str().unwrap()));
    }
    // A log that was put aside, as logrotate does, is followed by its successor.
    fs::rename(store.root().join("events.jsonl"), store.root().join("events.jsonl.1")).unwrap();
    let made = store.create(&["--unencrypted"]);
    assert!(volume(follower.next()).ends_with(made["id"].as_str().unwrap()));
    follower.interrupt();
    let mut rest = String::new();
    follower.lines.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), follower.child.wait().unwrap().code()), ("", Some(0)));
}

#[test]
fn following_can_begin_before_there_is_a_store() {
    let store = Store::new();
    let mut follower = Follower::start(&store);
    let made = store.create(&["--unencrypted"]);
    assert!(follower.next().to_string().contains(made["id"].as_str().unwrap()));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let store = Store::new();
    store.create(&["--unencrypted"]);
    for arguments in [&["volume", "list"][..], &["events"], &["events", "--follow"], &["key", "list"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = store.command(arguments);
        let output =
            command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.as_str()), (Some(0), ""), "{arguments:?}");
    }
}

#[test]
fn an_empty_store_has_empty_lists_and_is_not_made_by_looking() {
    let store = Store::new();
    assert_eq!(store.json(&["volume", "list"]), json!([]));
    assert_eq!(store.run(&["events"]).code, 0);
    assert!(!store.root().exists());
}

/// The names of what is listed, in order; of what has none, "-".
fn listed(store: &Store, arguments: &[&str]) -> Vec<String> {
    let listed = store.json(arguments);
    let name = |it: &Value| it["name"].as_str().or(it["tags"]["Name"].as_str()).unwrap_or("-").to_owned();
    listed.as_array().unwrap().iter().map(name).collect()
}

#[test]
fn lists_are_in_the_order_of_names_unless_another_is_asked_for() {
    let store = Store::new();
    for (name, size) in [("c", "1MiB"), ("a", "3MiB"), ("b", "2MiB")] {
        store.json(&["volume", "create", "--unencrypted", "--size", size, "--name", name]);
    }
    store.create(&["--unencrypted"]);
    assert_eq!(listed(&store, &["volume", "list"]), ["a", "b", "c", "-"]);
    assert_eq!(listed(&store, &["volume", "ls", "--reverse"]), ["-", "c", "b", "a"]);
    assert_eq!(
        listed(&store, &["volume", "ls", "--sort", "size", "--filter", "name=c", "--filter", "name=b"]),
        ["c", "b"]
    );
    let ids = store.json(&["volume", "list", "--sort", "id"]);
    let ids: Vec<&str> = ids.as_array().unwrap().iter().map(|it| it["id"].as_str().unwrap()).collect();
    assert!(ids.is_sorted(), "{ids:?}");
    for name in ["z", "x", "y"] {
        store.json(&["snapshot", "create", "a", "--name", name]);
    }
    assert_eq!(listed(&store, &["snapshot", "ls"]), ["x", "y", "z"]);
    store.json(&["snapshot", "rm", "y"]);
    store.json(&["volume", "rm", "c"]);
    assert_eq!(listed(&store, &["snapshot", "list", "-r"]), ["z", "x"]);
    let said = store.refuse(2, &["volume", "list", "--sort", "colour"]);
    assert!(said.contains("name, id, size, created"), "{said}");
}

#[test]
fn a_volume_is_called_what_it_is_renamed_to() {
    let store = Store::new();
    // A name that could not be the beginning of an id.
    let (mail, other) = (store.create(&["--name", "mail"]), store.create(&["--name", "other"]));
    let renamed = store.json(&["volume", "rename", "mail", "mail-old"]);
    assert_eq!((&renamed["id"], &renamed["name"]), (&mail["id"], &json!("mail-old")));
    assert_eq!(store.json(&["volume", "show", "mail-old"])["id"], mail["id"]);
    store.refuse(3, &["volume", "show", "mail"]);
    let said = store.refuse(4, &["volume", "rename", "mail-old", "other"]);
    assert!(said.contains(other["id"].as_str().unwrap()), "{said}");
    // The name that it has is nobody else's.
    assert_eq!(
        store.json(&["volume", "rename", "mail-old", "mail-old"])["generation"],
        renamed["generation"]
    );
    store.refuse(2, &["volume", "rename", "mail-old", "vol-1"]);
    store.refuse(2, &["volume", "rename", "mail-old"]);
    store.refuse(2, &["volume", "rename", "mail-old", "x", "--unnamed"]);
    assert_eq!(store.json(&["volume", "rename", "mail-old", "--unnamed"])["name"], Value::Null);
    // What was given up can be had by another.
    assert_eq!(store.json(&["volume", "rename", "other", "mail"])["name"], "mail");
    assert_eq!(store.run(&["store", "check"]).code, 0);
}

#[test]
fn settings_are_kept_with_a_volume_until_it_is_deleted() {
    let store = Store::new();
    let id = store.create(&["--name", "db"])["id"].as_str().unwrap().to_owned();
    let none =
        json!({"iops": null, "throughput": null, "burst_seconds": null, "serial": null, "queues": null});
    assert_eq!(store.json(&["volume", "show", "db"])["attach"], none);
    assert!(!store.run(&["volume", "list"]).out.contains("LIMITS"));
    let arguments =
        ["--iops", "3000", "--throughput", "125MiB", "--burst", "2.5", "--serial", "db-01", "--queues", "4"];
    let modified = store.json(&[&["volume", "modify", "db", "--tag", "env=prod"], &arguments[..]].concat());
    let kept =
        json!({"iops": 3000, "throughput": 125 << 20, "burst_seconds": 2.5, "serial": "db-01", "queues": 4});
    assert_eq!((&modified["attach"], &modified["tags"]["env"]), (&kept, &json!("prod")));
    assert_eq!(modified["in_force"], false);
    assert_eq!(store.json(&["volume", "list"])[0]["attach"], kept);
    let list = store.run(&["volume", "list"]).out;
    assert!(list.contains("LIMITS") && list.contains("3000 requests/s, 125 MiB/s"), "{list}");
    let show = store.run(&["volume", "show", "db"]).out;
    assert!(show.contains("a burst of 2.5 s, serial db-01, 4 queues"), "{show}");
    let events = store.run(&["events"]).out;
    assert!(events.contains("modifyVolume  completed"), "{events}");
    // What is not said stays, and what is reset goes.
    let modified =
        store.json(&["volume", "modify", "db", "--iops", "0", "--reset", "serial", "--reset", "queues"]);
    let kept =
        json!({"iops": 0, "throughput": 125 << 20, "burst_seconds": 2.5, "serial": null, "queues": null});
    assert_eq!(modified["attach"], kept);
    for arguments in
        [&[][..], &["--serial", "a b"], &["--queues", "65"], &["--queues", "0"], &["--tag", "aws:x=1"]]
    {
        store.refuse(2, &[&["volume", "modify", "db"], arguments].concat());
    }
    store.refuse(3, &["volume", "modify", "db", "--untag", "none"]);
    store.refuse(3, &["volume", "modify", "none", "--iops", "1"]);
    assert_eq!(store.json(&["volume", "show", "db"])["attach"], kept);
    // They go with the volume.
    store.json(&["volume", "rename", "db", "other"]);
    assert_eq!(store.json(&["volume", "show", "other"])["attach"], kept);
    let entry = store.root().join(format!("ledger/{id}.attach.json"));
    assert!(entry.exists());
    store.json(&["volume", "delete", "other"]);
    assert!(!entry.exists());
}

/// Whoever can write the store could lift the limits of a neighbour, or give it another serial.
#[test]
fn settings_that_no_command_has_kept_are_not_believed() {
    let store = Store::new();
    let id = store.create(&["--name", "db"])["id"].as_str().unwrap().to_owned();
    store.json(&["volume", "modify", "db", "--iops", "10"]);
    let entry = store.root().join(format!("ledger/{id}.attach.json"));
    let first = fs::read(&entry).unwrap();
    store.json(&["volume", "modify", "db", "--iops", "20"]);
    let second = fs::read(&entry).unwrap();
    let forged = String::from_utf8(second.clone()).unwrap().replace("20", "99");
    let attach = ["attach", "db", "--socket-path", "/nonexistent/t.sock"];
    for (bytes, accepted) in [(Some(forged.into_bytes()), Some(99)), (Some(first), Some(10)), (None, None)] {
        match &bytes {
            Some(bytes) => fs::write(&entry, bytes).unwrap(),
            None => fs::remove_file(&entry).unwrap(),
        }
        for command in [&attach[..], &["volume", "modify", "db", "--iops", "1"]] {
            let said = store.refuse(7, command);
            assert!(
                said.contains("settings") && said.contains(&format!("sealblk store accept {id}")),
                "{said}"
            );
        }
        assert_eq!(store.json(&["volume", "show", "db"])["attach"], Value::Null);
        assert_eq!(store.run(&["store", "check"]).code, 7);
        store.json(&["store", "accept", "db"]);
        assert_eq!(store.run(&["store", "check"]).code, 0);
        assert_eq!(store.json(&["volume", "show", "db"])["attach"]["iops"], json!(accepted));
        store.json(&["volume", "modify", "db", "--iops", "20"]);
    }
}

#[test]
fn the_configuration_folder_can_be_named_and_is_left_clean_when_it_is_asked_for() {
    let store = Store::new();
    let config = store.dir.path().join("elsewhere");
    let run = |arguments: &[&str]| {
        let mut command = store.command(&["--config-dir", config.to_str().unwrap(), "--json"]);
        let output = command.args(arguments).env_remove("SEALBLK_CONFIG_DIR").output().unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (
            output.status.code().unwrap(),
            serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default(),
            said,
        )
    };
    let image = store.dir.path().join("image");
    // Its helper is given the data key by the KMS whose root key is there.
    for arguments in [
        &["volume", "create", "--size", "1MiB", "--name", "db"][..],
        &["volume", "export", "db", image.to_str().unwrap()],
    ] {
        let (code, _, said) = run(arguments);
        assert_eq!(code, 0, "{said}");
    }
    assert!(config.join("stores").is_dir() && !store.dir.path().join("config").exists());
    let root = store.root().canonicalize().unwrap();
    let root = root.to_str().unwrap();
    let one = |state: &str| {
        let (_, listed, said) = run(&["store", "list"]);
        let stores = listed["stores"].as_array().unwrap_or_else(|| panic!("{said}")).clone();
        assert_eq!(stores.len(), 1, "{said}");
        assert_eq!((&stores[0]["root"], &stores[0]["state"]), (&json!(root), &json!(state)));
        stores[0].clone()
    };
    let used = one("used");
    let key = PathBuf::from(used["root_key"].as_str().unwrap());
    assert!(
        key.starts_with(&config) && key.exists() && used["records"] == 1 && used["made"].is_string(),
        "{used}"
    );
    let (code, _, said) = run(&["store", "forget", root]);
    assert!(code == 4 && said.contains("has volumes or snapshots"), "{said}");
    fs::remove_dir_all(store.root()).unwrap();
    one("gone");
    assert_eq!(run(&["store", "forget", root]).1["root_key"], "kept");
    // Of a store that is gone, the root key tells whose it is.
    assert_eq!(one("gone")["root_key"], used["root_key"]);
    assert_eq!(run(&["store", "forget", root, "--root-key"]).1["root_key"], "removed");
    assert!(!key.exists());
    assert_eq!(run(&["store", "list"]).1["stores"], json!([]));
    assert_eq!(run(&["store", "forget", root]).0, 3);
}

#[test]
fn whoever_gives_no_command_is_shown_which_there_are() {
    let store = Store::new();
    for words in [&[][..], &["volume"], &["--json", "volume"]] {
        let said = store.run(words);
        assert_eq!((said.code, said.out.as_str()), (2, ""), "{words:?}");
        assert!(said.err.contains("Usage: sealblk"), "{}", said.err);
        for hidden in ["rewrap-key", "keep-grants", "unwrap"] {
            assert!(!said.err.contains(hidden), "{}", said.err);
        }
    }
    let said = store.run(&["unwrapp"]);
    assert!(said.code == 2 && !said.err.contains("'unwrap'"), "{}", said.err);
}

#[test]
fn a_key_that_cannot_be_used_is_heard_of_before_the_next_attach() {
    let store = Store::new();
    let ids = ["a", "b"].map(|name| store.create(&["--name", name])["id"].as_str().unwrap().to_owned());
    store.json(&["volume", "create", "--size", "1MiB", "--name", "plain", "--unencrypted"]);
    let key = store.json(&["volume", "show", "a"])["keys"][0]["key_id"].clone();
    let watch = || {
        let said = store.run(&["watch", "--once", "--json"]);
        assert_eq!(said.code, 0, "{}", said.err);
        said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let events = || {
        let events = store.run(&["events", "--json"]).out;
        let events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.filter(|event| event["detail"]["event"] == "watchKey").collect::<Vec<Value>>()
    };
    let last_known = |name: &str| {
        let listed = store.json(&["volume", "list", "--filter", &format!("name={name}")]);
        listed[0]["keys"][0]["last_known"].clone()
    };
    assert_eq!(last_known("a"), Value::Null);
    assert!(!store.run(&["volume", "list"]).out.contains("KEY"));
    assert_eq!(watch(), [Value::Null; 0]);
    assert_eq!((events().len(), &last_known("a")["state"]), (0, &json!("usable")));
    store.json(&["key", "disable", "alias/aws/ebs"]);
    let changed = watch();
    assert_eq!((changed.len(), &changed[0]["key_id"], &changed[0]["state"]), (1, &key, &json!("disabled")));
    assert_eq!(changed[0]["volumes"].as_array().unwrap().len(), 2);
    // It is told once.
    assert_eq!(watch(), [Value::Null; 0]);
    let told = events();
    assert_eq!((told.len(), &told[0]["detail"]["result"]), (1, &json!("unusable")));
    assert!(told[0]["detail"]["cause"].as_str().unwrap().contains("is disabled"), "{}", told[0]);
    let resources = told[0]["resources"].to_string();
    assert!(
        ids.iter().all(|id| resources.contains(id)) && resources.contains(key.as_str().unwrap()),
        "{resources}"
    );
    let list = store.run(&["volume", "list"]).out;
    let cell = |name: &str| list.lines().find(|line| line.contains(name)).unwrap().trim_end().to_owned();
    assert!(
        list.contains("KEY") && cell(" a ").ends_with("disabled") && cell(" plain ").ends_with('-'),
        "{list}"
    );
    store.json(&["key", "schedule-deletion", "alias/aws/ebs", "--days", "7"]);
    let dying = watch();
    assert_eq!((&dying[0]["state"], dying[0]["deletion"].is_string()), (&json!("pending-deletion"), true));
    let deletion = dying[0]["deletion"].as_str().unwrap();
    let told = events();
    assert_eq!(told[1]["detail"]["result"], "pending-deletion");
    assert!(told[1]["detail"]["cause"].as_str().unwrap().contains(deletion), "{}", told[1]);
    store.json(&["key", "cancel-deletion", "alias/aws/ebs"]);
    store.json(&["key", "enable", "alias/aws/ebs"]);
    assert_eq!(watch()[0]["state"], "usable");
    assert_eq!(events()[2]["detail"]["result"], "usable");
    // What lies in the file is believed for nothing but what was told: without it, a key that is usable is
    // no news, and one that is not is told again.
    fs::write(store.root().join("key-watch.json"), "{").unwrap();
    assert_eq!(watch(), [Value::Null; 0]);
    store.json(&["key", "disable", "alias/aws/ebs"]);
    fs::remove_file(store.root().join("key-watch.json")).unwrap();
    assert_eq!((watch().len(), events().len()), (1, 4));
}
