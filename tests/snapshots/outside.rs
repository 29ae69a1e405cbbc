//! Snapshots in a folder outside: pushed, listed, verified, pulled, removed; and what a
//! place that lies cannot do.

use crate::common::attach::{Place, flush, open, write};
use crate::common::disk::pattern;
use crate::common::killed::{End, killed_before};
use crate::common::kms_server::{KmsServer, Variables};
use crate::common::rig::{Rig, files};
use crate::common::store::Store;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const BLOCK: usize = 512 << 10;

/// A folder outside, and its URL.
pub struct Outside {
    folder: tempfile::TempDir,
}

impl Outside {
    pub fn new() -> Self {
        Outside { folder: tempfile::tempdir().expect("make a temporary folder") }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn url(&self) -> String {
        format!("file://{}", self.path().display())
    }

    pub fn of(&self, snapshot: &str) -> String {
        format!("{}/{snapshot}", self.url())
    }

    pub fn manifest(&self, snapshot: &str) -> PathBuf {
        self.path().join(format!("snapshots/{snapshot}.json"))
    }

    /// Every file in it, with what it holds.
    pub fn all(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut all = BTreeMap::new();
        let mut folders = vec![self.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for path in files(&folder) {
                match path.is_dir() {
                    true => folders.push(path),
                    false => drop(all.insert(path.clone(), fs::read(&path).expect("read a file"))),
                }
            }
        }
        all
    }

    /// The files of blocks or pages.
    pub fn objects(&self, folder: &str) -> Vec<PathBuf> {
        let of = self.path().join(folder);
        self.all().into_keys().filter(|path| path.starts_with(&of)).collect()
    }
}

/// Writes into the attached volume `t`.
pub fn write_to(rig: &mut Rig, at: usize, bytes: &[u8]) {
    rig.place.put(at as u64 / 512, bytes);
    rig.data[at..at + bytes.len()].copy_from_slice(bytes);
}

/// What a snapshot holds.
pub fn content(rig: &Rig, snapshot: &str) -> Vec<u8> {
    rig.reader().snapshot_content(&rig.reader().snapshot(snapshot))
}

#[test]
fn what_is_pushed_comes_back_as_another_snapshot() {
    let rig = Rig::new(&[]);
    let outside = Outside::new();
    let id = rig.id(&["snapshot", "create", "t", "--name", "nightly", "--description", "first"]);
    let pushed = rig.json(&["snapshot", "push", "nightly", &outside.url()]);
    assert_eq!((&pushed["url"], &pushed["was_there"]), (&json!(outside.of(&id)), &json!(false)));
    // Three blocks have something, and each is as long as that is.
    assert_eq!((&pushed["blocks"], &pushed["put_blocks"]), (&json!(3), &json!(3)));
    let lengths: Vec<usize> =
        outside.objects("blocks").iter().map(|it| fs::read(it).unwrap().len()).collect();
    assert_eq!(lengths, [128 + (64 << 10); 3]);
    let event = rig.last_event();
    assert_eq!(
        (&event["detail"]["event"], &event["detail"]["result"]),
        (&json!("pushSnapshot"), &json!("succeeded"))
    );
    let listed = rig.json(&["snapshot", "list", &outside.url()]);
    assert_eq!(
        (&listed["snapshots"][0]["id"], &listed["snapshots"][0]["state"]),
        (&json!(id), &json!("known"))
    );
    let verified = rig.json(&["snapshot", "verify", &outside.url()]);
    assert_eq!(verified["snapshots"], json!([{"id": id, "blocks": 3, "problem": null}]));
    // Again, nothing is to be done.
    let before = outside.all();
    assert_eq!(rig.json(&["snapshot", "push", &id, &outside.url()])["was_there"], true);
    assert_eq!(outside.all(), before);
    rig.place.store.ok(&["snapshot", "delete", &id]);
    rig.place.store.ok(&["volume", "delete", "t"]);
    let pulled = rig.json(&["snapshot", "pull", &outside.url(), "--name", "back"]);
    let event = rig.last_event();
    assert_eq!(
        (&event["detail"]["event"], &event["detail"]["result"]),
        (&json!("pullSnapshot"), &json!("succeeded"))
    );
    assert!(event["detail"]["source"].as_str().unwrap().ends_with(&id));
    assert_eq!((&pulled["copy_of"], &pulled["description"]), (&json!(id), &json!("first")));
    assert_eq!(pulled["tags"], json!({"Name": "back"}));
    assert_ne!(pulled["id"], json!(id));
    assert!(content(&rig, "back") == rig.data);
    // It makes clones that prove right.
    rig.place.store.ok(&["volume", "create", "--snapshot", "back", "--name", "c"]);
    let (host, _) = rig.attach("c");
    host.end();
    assert!(rig.reader().volume_content(&rig.reader().volume("c")) == rig.data);
    rig.assert_layers_are_named();
    // It can be pushed in its turn, and shares what is there.
    let again = rig.json(&["snapshot", "push", "back", &outside.url()]);
    assert_eq!(outside.objects("blocks").len(), 3, "{again}");
    assert_eq!(fs::read_dir(outside.path().join("leases")).unwrap().count(), 0);
}

#[test]
fn only_what_has_changed_is_read_and_travels() {
    let mut rig = Rig::new(&["--sector-size", "4096"]);
    let outside = Outside::new();
    let first = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &first, &outside.url()]);
    // What lies in the layer that the place has is not read again: else this would travel as well.
    let old = rig.reader().snapshot(&first).layers()[0].id;
    let layer = rig.reader().catalog().layer_path(old);
    write_to(&mut rig, 3 << 20, &pattern(9, 4096));
    let second = rig.id(&["snapshot", "create", "t"]);
    let whole = fs::read(&layer).unwrap();
    let mut damaged = whole.clone();
    damaged[1 << 20] ^= 1;
    fs::write(&layer, damaged).unwrap();
    let pushed = rig.json(&["snapshot", "push", &second, &outside.url()]);
    fs::write(&layer, whole).unwrap();
    assert_eq!(
        (&pushed["base"], &pushed["put_blocks"], &pushed["blocks"]),
        (&json!(first), &json!(1), &json!(4))
    );
    assert_eq!(pushed["put_bytes"].as_u64().unwrap(), 128 + 4096 + (15 + 4 + 4 * 34));
    rig.json(&["snapshot", "verify", &outside.url()]);
    let back = rig.id(&["snapshot", "pull", &outside.of(&second)]);
    assert!(content(&rig, &back) == rig.data);
    // The base has gone at home, and its layer is merged with the next one: all is looked
    // at, and little travels.
    rig.place.store.ok(&["snapshot", "delete", &back]);
    rig.place.store.ok(&["snapshot", "delete", &first]);
    write_to(&mut rig, 0, &pattern(10, 512 << 10));
    let third = rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["snapshot", "delete", &second]);
    let pushed = rig.json(&["snapshot", "push", &third, &outside.url()]);
    assert_eq!((&pushed["base"], &pushed["blocks"]), (&Value::Null, &json!(4)));
    // Of the two in the place, one is as old as the other, to the second.
    assert!(pushed["put_blocks"].as_u64().unwrap() <= 2, "{pushed}");
    let back = rig.id(&["snapshot", "pull", &outside.of(&third)]);
    assert!(content(&rig, &back) == rig.data);
    rig.json(&["snapshot", "verify", &outside.url()]);
}

#[test]
fn a_snapshot_of_an_attached_and_growing_volume_goes_as_it_is() {
    let mut rig = Rig::new(&[]);
    let outside = Outside::new();
    rig.id(&["snapshot", "create", "t", "--name", "one"]);
    rig.json(&["snapshot", "push", "one", &outside.url()]);
    rig.place.store.ok(&["volume", "resize", "t", "9MiB"]);
    rig.data.resize(9 << 20, 0);
    let host = rig.place.attach(&[]);
    let mut session = open(&rig.place.socket());
    let bytes = pattern(4, 64 << 10);
    let at = (9 << 20) - bytes.len();
    write(&mut session.rings[0], at as u64 / 512, &bytes);
    flush(&mut session.rings[0]);
    rig.data[at..].copy_from_slice(&bytes);
    let two = rig.id(&["snapshot", "create", "t"]);
    write(&mut session.rings[0], 0, &pattern(5, 64 << 10));
    let pushed = rig.json(&["snapshot", "push", &two, &outside.url()]);
    assert_eq!((&pushed["blocks"], &pushed["put_blocks"]), (&json!(4), &json!(1)));
    drop(session);
    host.end();
    let back = rig.id(&["snapshot", "pull", &outside.of(&two)]);
    assert!(content(&rig, &back) == rig.data);
    assert!(
        content(
            &rig,
            &rig.id(&["snapshot", "pull", &outside.of(&rig.reader().snapshot("one").id().to_string())])
        ) == rig.data[..8 << 20].to_vec()
    );
}

#[test]
fn a_snapshot_under_two_data_keys_has_both_and_goes_on_being_rekeyed() {
    let mut rig = Rig::new(&[]);
    let outside = Outside::new();
    rig.id(&["snapshot", "create", "t", "--name", "before"]);
    rig.json(&["snapshot", "push", "before", &outside.url()]);
    rig.place.store.ok(&["volume", "rekey", "t"]);
    // Over a part of what is under the old key, and over nothing.
    write_to(&mut rig, 32 << 10, &pattern(6, 16 << 10));
    write_to(&mut rig, 5 << 20, &pattern(7, 4096));
    let id = rig.id(&["snapshot", "create", "t"]);
    let layers = rig.reader().snapshot(&id).layers().len();
    if rig.reader().snapshot(&id).keys().len() < 2 {
        // The copy was faster than this test.
        return;
    }
    assert!(layers > 1);
    rig.json(&["snapshot", "push", &id, &outside.url()]);
    rig.json(&["snapshot", "verify", &outside.url()]);
    let back = rig.id(&["snapshot", "pull", &outside.of(&id)]);
    let snapshot = rig.reader().snapshot(&back);
    assert_eq!((snapshot.layers().len(), snapshot.keys().len()), (2, 2));
    assert_eq!(snapshot.layout().hydrate(), Some(snapshot.layers()[1].id));
    assert!(content(&rig, &back) == rig.data);
    rig.place.store.ok(&["volume", "create", "--snapshot", &back, "--name", "c"]);
    rig.place.store.ok(&["volume", "flatten", "c", "--follow"]);
    assert!(rig.reader().volume_content(&rig.reader().volume("c")) == rig.data);
}

/// As root, whose place is another user's; and on a medium that cannot be written.
#[test]
fn a_place_is_its_owner_s_and_may_be_read_alone() {
    let rig = Rig::new(&[]);
    let outside = Outside::new();
    let nobody = 65534;
    std::os::unix::fs::chown(outside.path(), Some(nobody), Some(nobody)).unwrap();
    let id = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &id, &outside.url()]);
    for (path, _) in outside.all() {
        assert_eq!(fs::metadata(&path).unwrap().uid(), nobody, "{}", path.display());
    }
    let dir = tempfile::tempdir().unwrap();
    let mount =
        |arguments: &[&str]| assert!(Command::new("mount").args(arguments).status().unwrap().success());
    let (from, to) = (outside.path().to_str().unwrap(), dir.path().to_str().unwrap());
    mount(&["--bind", from, to]);
    mount(&["-o", "remount,bind,ro", to]);
    let url = format!("file://{to}");
    let verified = rig.place.store.run(&["snapshot", "verify", &url]);
    let pulled = rig.place.store.run(&["snapshot", "pull", &url]);
    let other = rig.id(&["snapshot", "create", "t"]);
    let pushed = rig.place.store.run(&["snapshot", "push", &other, &url]);
    assert!(Command::new("umount").arg(to).status().unwrap().success());
    for output in [verified, pulled] {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let said = String::from_utf8(pushed.stderr).unwrap();
    assert!(
        pushed.status.code() == Some(2) && said.contains("nothing can be written there: Read-only"),
        "{said}"
    );
}

#[test]
fn nothing_leaves_in_the_clear() {
    let rig = Rig::new(&["--unencrypted"]);
    let outside = Outside::new();
    let id = rig.id(&["snapshot", "create", "t"]);
    let said = rig.refuse(8, &["snapshot", "push", &id, &outside.url()]);
    assert!(said.contains("nothing leaves in the clear") && said.contains("snapshot copy"), "{said}");
    assert!(outside.all().is_empty());
    let copy = rig.id(&["snapshot", "copy", &id, "--key", "alias/aws/ebs"]);
    rig.json(&["snapshot", "push", &copy, &outside.url()]);
    let back = rig.id(&["snapshot", "pull", &outside.url()]);
    assert!(content(&rig, &back) == rig.data);
    let plain =
        rig.data.chunks(512).filter(|sector| sector.iter().any(|byte| *byte != 0)).collect::<Vec<_>>();
    for (path, bytes) in outside.all() {
        let has_some = bytes.windows(512).step_by(1).any(|window| window == plain[0]);
        assert!(!has_some, "{}", path.display());
    }
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    let rig = Rig::new(&[]);
    let id = rig.id(&["snapshot", "create", "t"]);
    for (code, url, words) in [
        (2, "/mnt/backup", "is no place"),
        (2, "file://backup", "names no folder"),
        (2, "s3://B/x", "no bucket's name"),
        (3, "file:///there/is/no/such/folder", "no such folder"),
    ] {
        for arguments in
            [&["push", &id, url][..], &["pull", url], &["verify", url], &["list", url], &["remove", url]]
        {
            let said = rig.refuse(code, &[&["snapshot"], arguments].concat());
            assert!(said.contains(words), "{arguments:?}: {said}");
        }
    }
    let outside = Outside::new();
    let said = rig.refuse(2, &["snapshot", "push", &id, &outside.url(), "--region", "x"]);
    assert!(said.contains("no region"), "{said}");
    for command in ["pull", "verify", "list", "remove"] {
        let said = rig.refuse(3, &["snapshot", command, &outside.url()]);
        assert!(said.contains("no snapshots of sealblk's"), "{command}: {said}");
    }
    rig.json(&["snapshot", "push", &id, &outside.url()]);
    let other = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &other, &outside.url()]);
    let said = rig.refuse(2, &["snapshot", "pull", &outside.url()]);
    assert!(said.contains("has 2 snapshots"), "{said}");
    let said = rig.refuse(3, &["snapshot", "pull", &outside.of("snap-0123456789abcdef0")]);
    assert!(said.contains("there is no snapshot"), "{said}");
    assert!(outside.all().keys().all(|path| !path.starts_with(outside.path().join("leases"))));
}

/// A pull that must be refused, and leave nothing.
#[track_caller]
fn refuse_pull(rig: &Rig, url: &str, words: &str) {
    let before = (rig.files("snapshots"), rig.files("layers"), rig.files("ledger"));
    let said = rig.refuse(7, &["snapshot", "pull", url]);
    assert!(said.contains(words), "{said}");
    assert_eq!((rig.files("snapshots"), rig.files("layers"), rig.files("ledger")), before);
}

#[test]
fn what_the_place_has_changed_is_found_and_nothing_of_it_is_kept() {
    let rig = Rig::new(&[]);
    let outside = Outside::new();
    let id = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &id, &outside.url()]);
    let (url, pages, blocks) = (outside.of(&id), outside.objects("pages"), outside.objects("blocks"));
    assert_eq!((pages.len(), blocks.len()), (1, 3));
    let verify = |words: &str| {
        let output = rig.place.store.run(&["snapshot", "verify", &url, "--json"]);
        assert_eq!(output.status.code(), Some(7));
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.contains(words), "{said}");
    };
    for path in pages.iter().chain(&blocks) {
        let whole = fs::read(path).unwrap();
        let mut edits: Vec<(Option<Vec<u8>>, &str)> = vec![
            (None, "is missing"),
            (Some(Vec::new()), "what it is named for"),
            (Some(whole[..whole.len() - 1].to_vec()), "what it is named for"),
        ];
        for at in [0, whole.len() / 2, whole.len() - 1] {
            let mut edited = whole.clone();
            edited[at] ^= 1;
            edits.push((Some(edited), "what it is named for"));
        }
        // Another object of the place, which is what it is named for elsewhere.
        let other = blocks.iter().find(|other| *other != path).unwrap();
        edits.push((Some(fs::read(other).unwrap()), "named for"));
        edits.push((Some(vec![0; 2 << 20]), "is longer than"));
        for (edit, words) in edits {
            match edit {
                Some(bytes) => fs::write(path, bytes).unwrap(),
                None => fs::remove_file(path).unwrap(),
            }
            if words != "is longer than" {
                verify(words);
                refuse_pull(&rig, &url, words);
            } else {
                let said = rig.refuse(7, &["snapshot", "pull", &url]);
                assert!(said.contains(words), "{said}");
            }
            fs::write(path, &whole).unwrap();
        }
    }
    rig.json(&["snapshot", "verify", &url]);
    rig.id(&["snapshot", "pull", &url]);
}

#[test]
fn a_manifest_that_was_edited_swapped_or_put_back_is_refused() {
    let rig = Rig::new(&[]);
    let outside = Outside::new();
    let (one, two) = (rig.id(&["snapshot", "create", "t"]), rig.id(&["snapshot", "create", "t"]));
    for id in [&one, &two] {
        rig.json(&["snapshot", "push", id, &outside.url()]);
    }
    let (path, url) = (outside.manifest(&one), outside.of(&one));
    let whole = fs::read(&path).unwrap();
    let text = String::from_utf8(whole.clone()).unwrap();
    let edit = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1).into_bytes()
    };
    // As for a host that has not seen the place before: else each would be another one
    // than that of this number.
    fs::remove_dir_all(rig.place.store.config().join("places")).unwrap();
    for (bytes, words) in [
        (edit("\"number\":1", "\"number\":2"), "MAC does not fit"),
        (edit("\"description\":\"\"", "\"description\":\"x\""), "MAC does not fit"),
        (edit("\"size\":8388608", "\"size\":9223372036854771712"), "the record in the manifest"),
        (edit("{\"format\":1", "{\"format\":9"), "format version 9"),
        (fs::read(outside.manifest(&two)).unwrap(), "it is the manifest of"),
        (whole[..whole.len() / 2].to_vec(), "manifest"),
        (b"{}".to_vec(), "manifest"),
        (Vec::new(), "manifest"),
    ] {
        fs::write(&path, bytes).unwrap();
        refuse_pull(&rig, &url, words);
    }
    fs::write(&path, &whole).unwrap();
    rig.json(&["snapshot", "verify", &outside.url()]);
    fs::write(&path, edit("\"description\":\"\"", "\"description\":\"x\"")).unwrap();
    refuse_pull(&rig, &url, "not the one of this number");
    fs::write(&path, &whole).unwrap();
    // Wrapped by another key, it is pushed once more, and no block travels.
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    rig.place.store.ok(&["snapshot", "rewrap", &one, "--key", "alias/other"]);
    let pushed = rig.json(&["snapshot", "push", &one, &outside.url()]);
    assert_eq!((&pushed["was_there"], &pushed["put_blocks"]), (&json!(false), &json!(0)));
    let newer = fs::read(&path).unwrap();
    fs::write(&path, &whole).unwrap();
    refuse_pull(&rig, &url, "older than number 2");
    let listed = rig.json(&["snapshot", "list", &outside.url()]);
    assert!(listed.to_string().contains("older than number 2"), "{listed}");
    fs::remove_file(&path).unwrap();
    let listed = rig.json(&["snapshot", "list", &outside.url()]);
    assert_eq!(listed["missing"], json!([one]));
    let output = rig.place.store.run(&["snapshot", "verify", &outside.url(), "--json"]);
    assert_eq!(output.status.code(), Some(7));
    fs::write(&path, &newer).unwrap();
    rig.json(&["snapshot", "verify", &outside.url()]);
    // Into another place, with everything that it names, as if it were of that.
    let other = Outside::new();
    rig.json(&["snapshot", "push", &two, &other.url()]);
    for (path, bytes) in outside.all().into_iter().filter(|(path, _)| !path.ends_with("place.json")) {
        let to = other.path().join(path.strip_prefix(outside.path()).unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, bytes).unwrap();
    }
    refuse_pull(&rig, &other.of(&one), "written for another place");
    // The place is another one than it was.
    fs::copy(other.path().join("place.json"), outside.path().join("place.json")).unwrap();
    refuse_pull(&rig, &url, "is another place");
}

#[test]
fn what_the_kms_refuses_names_the_key() {
    let rig = Rig::new(&[]);
    let outside = Outside::new();
    let id = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &id, &outside.url()]);
    // Of another host, which has a KMS of its own.
    let other = Rig::new(&[]);
    let key = rig.reader().snapshot(&id).keys()[0].first().wrapped.key_id.clone();
    let said = other.refuse(3, &["snapshot", "pull", &outside.of(&id)]);
    assert!(said.contains(&key) && said.contains("of the KMS \"embedded\""), "{said}");
    let detail = other.last_event()["detail"].clone();
    assert_eq!((&detail["event"], &detail["result"]), (&json!("pullSnapshot"), &json!("failed")));
    rig.place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    let said = rig.refuse(5, &["snapshot", "pull", &outside.of(&id)]);
    assert!(said.contains("is disabled") && said.contains(&key), "{said}");
    let output = rig.place.store.run(&["snapshot", "verify", &outside.url()]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(5) && said.contains("is disabled"), "{said}");
    rig.place.store.ok(&["key", "enable", "alias/aws/ebs"]);
    // Under another key, it needs the first one no more.
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    let back = rig.id(&["snapshot", "pull", &outside.of(&id), "--key", "alias/other"]);
    rig.place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    assert!(content(&rig, &back) == rig.data);
}

#[test]
fn a_pull_that_is_killed_is_gone_on_with_or_cleared_away() {
    let rig = Rig::new(&[]);
    let outside = Outside::new();
    let id = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &id, &outside.url()]);
    let (before, layers) = (rig.files("snapshots"), rig.files("layers"));
    let url = outside.of(&id);
    let pull = ["snapshot", "pull", &url];
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let mut command = rig.place.store.command();
        command.args(pull).stdout(Stdio::null()).stderr(Stdio::null());
        let end = killed_before(&mut command, step);
        let left = rig.files("snapshots");
        let unfinished = left.iter().find(|path| path.extension().is_some_and(|e| e == "copying")).cloned();
        if let (0, Some(path)) = (step % 2, &unfinished) {
            // What was begun becomes the snapshot.
            let id = rig.id(&pull);
            assert!(path.to_str().unwrap().contains(&id), "step {step}: {id}");
        }
        rig.place.store.ok(&["gc"]);
        for snapshot in rig.reader().catalog().snapshot_ids().unwrap() {
            if !before.contains(&rig.place.store.root().join(format!("snapshots/{snapshot}.json"))) {
                assert!(content(&rig, &snapshot.to_string()) == rig.data, "step {step}");
                rig.place.store.ok(&["snapshot", "delete", &snapshot.to_string()]);
            }
        }
        assert_eq!(
            (rig.files("snapshots"), rig.files("layers")),
            (before.clone(), layers.clone()),
            "step {step}"
        );
        if end == End::Exited(0) {
            assert!(step > 8 && unfinished.is_none(), "step {step}");
            break;
        }
        assert_eq!(end, End::Killed, "step {step}");
    }
}

#[test]
fn a_push_that_is_killed_leaves_no_snapshot_and_is_gone_on_with() {
    let mut rig = Rig::new(&[]);
    let outside = Outside::new();
    let first = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &first, &outside.url()]);
    write_to(&mut rig, 2 << 20, &pattern(8, 2 << 20));
    let id = rig.id(&["snapshot", "create", "t"]);
    let mut seen = [false; 2];
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let mut command = rig.place.store.command();
        command.args(["snapshot", "push", &id, &outside.url()]).stdout(Stdio::null()).stderr(Stdio::null());
        let end = killed_before(&mut command, step);
        let is_there = outside.manifest(&id).exists();
        seen[usize::from(is_there)] = true;
        if is_there {
            rig.json(&["snapshot", "verify", &outside.url()]);
        }
        let pushed = rig.json(&["snapshot", "push", &id, &outside.url()]);
        assert_eq!((&pushed["blocks"], &pushed["was_there"]), (&json!(7), &json!(is_there)), "step {step}");
        assert_eq!(fs::read_dir(outside.path().join("leases")).unwrap().count(), 0, "step {step}");
        let back = rig.id(&["snapshot", "pull", &outside.of(&id)]);
        assert!(content(&rig, &back) == rig.data, "step {step}");
        rig.place.store.ok(&["snapshot", "delete", &back]);
        let removed = rig.json(&["snapshot", "remove", &outside.of(&id)]);
        assert_eq!(removed["removed"], json!([id]), "step {step}");
        assert_eq!(outside.objects("blocks").len(), 3, "step {step}");
        if end == End::Exited(0) {
            break;
        }
        assert_eq!(end, End::Killed, "step {step}");
    }
    assert_eq!(seen, [true; 2]);
}

#[test]
fn what_no_snapshot_needs_goes_and_nothing_else() {
    let mut rig = Rig::new(&[]);
    let outside = Outside::new();
    let mut ids = Vec::new();
    for n in 0..4 {
        write_to(&mut rig, n << 20, &pattern(20 + n as u64, BLOCK));
        let id = rig.id(&["snapshot", "create", "t"]);
        rig.json(&["snapshot", "push", &id, &outside.url()]);
        ids.push((id, rig.data.clone()));
    }
    // Of the first, one block is in no other snapshot: it was written over.
    let before = outside.objects("blocks").len();
    let look = rig.json(&["snapshot", "remove", &outside.url(), "--keep-last", "3", "--dry-run"]);
    let count = |what: &Value| what.as_array().unwrap().len();
    assert_eq!(
        (count(&look["removed"]), count(&look["kept"]), outside.objects("blocks").len()),
        (1, 3, before)
    );
    let look = rig.json(&[
        "snapshot",
        "remove",
        &outside.url(),
        "--keep-daily",
        "1",
        "--keep-last",
        "1",
        "--dry-run",
    ]);
    assert!(count(&look["removed"]) >= 2, "they are of today, or of two days");
    let removed = rig.json(&["snapshot", "remove", &outside.of(&ids[0].0)]);
    assert_eq!((&removed["removed"], count(&removed["kept"])), (&json!([ids[0].0]), 3));
    // The old block 2, at 1 MiB, and the page that named it.
    assert_eq!(removed["swept_objects"], json!(2));
    assert_eq!(outside.objects("blocks").len(), before - 1);
    let said = rig.refuse(3, &["snapshot", "pull", &outside.of(&ids[0].0)]);
    assert!(said.contains("there is no snapshot"), "{said}");
    for (id, data) in &ids[1..] {
        let back = rig.id(&["snapshot", "pull", &outside.of(id)]);
        assert!(&content(&rig, &back) == data);
        rig.place.store.ok(&["snapshot", "delete", &back]);
    }
    // What was gone on another's command is forgotten.
    fs::remove_file(outside.manifest(&ids[1].0)).unwrap();
    let removed = rig.json(&["snapshot", "remove", &outside.url(), &ids[1].0]);
    assert_eq!((&removed["removed"], &removed["gone"]), (&json!([]), &json!([ids[1].0])));
    assert_eq!(rig.json(&["snapshot", "list", &outside.url()])["missing"], json!([]));
    rig.json(&["snapshot", "verify", &outside.url()]);
    for arguments in
        [&["--keep-last", "0"][..], &["--keep-last", "1", &ids[2].0], &["--volume", "vol-0123456789abcdef0"]]
    {
        rig.refuse(2, &[&["snapshot", "remove", &outside.url()], arguments].concat());
    }
    let rest: Vec<String> = ids[2..].iter().map(|(id, _)| id.clone()).collect();
    rig.json(&["snapshot", "remove", &outside.url(), &rest[0], &rest[1]]);
    assert!(outside.objects("blocks").is_empty() && outside.objects("pages").is_empty());
}

#[test]
fn nothing_is_swept_while_somebody_pushes_or_what_is_needed_cannot_be_read() {
    let rig = Rig::new(&[]);
    let outside = Outside::new();
    let (one, two) = (rig.id(&["snapshot", "create", "t"]), rig.id(&["snapshot", "create", "t"]));
    for id in [&one, &two] {
        rig.json(&["snapshot", "push", id, &outside.url()]);
    }
    // Another host's, which is at it.
    let lease = outside.path().join(format!("leases/push-{one}-{}", "1".repeat(32)));
    fs::write(&lease, "x").unwrap();
    let (removed, before) = (rig.json(&["snapshot", "remove", &outside.of(&one)]), outside.objects("blocks"));
    assert_eq!((&removed["removed"], &removed["swept_objects"]), (&json!([one]), &Value::Null));
    assert_eq!(outside.objects("blocks"), before);
    // One that was cut off long ago counts no more.
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(25 * 3600);
    fs::File::options().write(true).open(&lease).unwrap().set_modified(long_ago).unwrap();
    let page = outside.objects("pages").remove(0);
    let whole = fs::read(&page).unwrap();
    fs::write(&page, "x").unwrap();
    let said = rig.refuse(7, &["snapshot", "remove", &outside.url()]);
    assert!(said.contains("nothing is swept") && outside.objects("blocks") == before, "{said}");
    fs::write(&page, whole).unwrap();
    fs::write(outside.path().join("blocks/00").join("left.0123.tmp"), "x")
        .or_else(|_| {
            fs::create_dir_all(outside.path().join("blocks/00"))?;
            fs::write(outside.path().join("blocks/00/left.0123.tmp"), "x")
        })
        .unwrap();
    let removed = rig.json(&["snapshot", "remove", &outside.url()]);
    assert_eq!(removed["swept_objects"], json!(1));
    assert_eq!((outside.objects("blocks"), lease.exists()), (before, false));
    rig.json(&["snapshot", "verify", &outside.url()]);
}

/// A host of several that share a KMS, and what its snapshots hold.
struct Host {
    place: Place,
    data: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
}

impl Host {
    fn new(kms: &Variables, key: &str) -> Self {
        let store = Store::new();
        store.set_environment(kms.clone());
        let place = Place::of(store, &["--key", &format!("aws:{key}")]);
        Host { place, data: vec![0; 8 << 20], snapshots: BTreeMap::new() }
    }

    fn write(&mut self, random: &mut Random) {
        let host = self.place.attach(&[]);
        let mut session = open(&self.place.socket());
        for _ in 0..1 + random.below(3) {
            let len = 4096 << random.below(6);
            let at = random.below((self.data.len() - len) / 4096) * 4096;
            let bytes = pattern(random.next(), len);
            write(&mut session.rings[0], at as u64 / 512, &bytes);
            self.data[at..at + len].copy_from_slice(&bytes);
        }
        flush(&mut session.rings[0]);
        drop(session);
        host.end();
    }

    /// Runs a command that succeeds; what it printed, as JSON.
    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        let text = self.place.store.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).expect("JSON")
    }

    /// What a snapshot holds, as the program says, when all of it has come.
    fn content(&self, id: &str) -> Vec<u8> {
        self.place.store.ok(&["snapshot", "complete", id]);
        let file = self.place.folder().join("exported");
        self.place.store.ok(&["snapshot", "export", id, file.to_str().expect("UTF-8"), "--force"]);
        fs::read(file).expect("read a file")
    }
}

/// Numbers that follow from the first one.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn one_of<'a, T>(&mut self, all: &'a BTreeMap<String, T>) -> Option<(&'a String, &'a T)> {
        all.iter().nth(self.below(all.len()))
    }
}

/// Writes, snapshots, pushes, pulls, deletions and removals of two hosts, in any order.
#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn what_several_hosts_push_pull_and_remove_is_what_a_model_says() {
    let kms = KmsServer::start();
    let (key, kms) = (kms.create_key(), (kms.principal("root").environment(&kms.url), kms));
    for seed in [1, 2] {
        let outside = Outside::new();
        let mut random = Random(seed);
        let mut hosts = [Host::new(&kms.0, &key), Host::new(&kms.0, &key)];
        let mut there: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for step in 0..60 {
            let host = &mut hosts[random.below(2)];
            match random.below(10) {
                0..3 => {
                    host.write(&mut random);
                    let id =
                        host.json(&["snapshot", "create", "t"])["id"].as_str().expect("an id").to_owned();
                    host.snapshots.insert(id, host.data.clone());
                }
                3..6 => {
                    let Some((id, data)) = random.one_of(&host.snapshots) else { continue };
                    host.place.store.ok(&["snapshot", "complete", id]);
                    let was_there = there.insert(id.clone(), data.clone()).is_some();
                    let pushed = host.json(&["snapshot", "push", id, &outside.url()]);
                    assert_eq!(pushed["was_there"], json!(was_there), "step {step}");
                }
                6..8 => {
                    let Some((id, data)) = random.one_of(&there) else { continue };
                    let (url, is_lazy) = (outside.of(id), random.below(2) == 0);
                    let back = host.json(
                        &[&["snapshot", "pull", &url][..], &["--lazy"][..usize::from(is_lazy)]].concat(),
                    );
                    let back = back["id"].as_str().expect("an id").to_owned();
                    // What is still to come, what follows is about as well.
                    if !is_lazy || random.below(2) == 0 {
                        assert!(&host.content(&back) == data, "step {step}");
                    }
                    host.snapshots.insert(back, data.clone());
                }
                8 => {
                    let Some((id, _)) = random.one_of(&host.snapshots) else { continue };
                    let id = id.clone();
                    host.place.store.ok(&["snapshot", "delete", &id]);
                    host.snapshots.remove(&id);
                }
                _ => {
                    let Some((id, _)) = random.one_of(&there) else { continue };
                    let id = id.clone();
                    // Each host alone knows what is still coming to it.
                    for host in &hosts {
                        host.snapshots.keys().for_each(|id| drop(host.json(&["snapshot", "complete", id])));
                    }
                    let removed = hosts[0].json(&["snapshot", "remove", &outside.of(&id)]);
                    assert!(removed["swept_objects"].is_number(), "step {step}: {removed}");
                    there.remove(&id);
                    // The other one knows of it when it is told.
                    hosts.iter().for_each(|host| drop(host.json(&["snapshot", "remove", &outside.of(&id)])));
                }
            }
        }
        for host in &hosts {
            let verified = host.json(&["snapshot", "verify", &outside.url()]);
            let ids: Vec<&str> = verified["snapshots"]
                .as_array()
                .unwrap()
                .iter()
                .map(|it| it["id"].as_str().unwrap())
                .collect();
            assert_eq!(ids, there.keys().collect::<Vec<_>>());
            for (id, data) in &there {
                let back = host.json(&["snapshot", "pull", &outside.of(id)]);
                assert!(&host.content(back["id"].as_str().unwrap()) == data, "{id}");
            }
        }
        hosts[0].snapshots.keys().for_each(|id| drop(hosts[0].json(&["snapshot", "complete", id])));
        let rest: Vec<&str> = there.keys().map(String::as_str).collect();
        hosts[0].json(&[&["snapshot", "remove", &outside.url()], &rest[..]].concat());
        assert!(outside.objects("blocks").is_empty() && outside.objects("pages").is_empty());
    }
}
