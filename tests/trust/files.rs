//! Links, pipes and folders where a store has files: nothing follows one, nothing waits for one.

use crate::common::attach::Place;
use crate::{ends, names, run};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file that is nobody's business, and what is in it.
const SECRET: &[u8] = b"root's own\n";

fn secret(place: &Place) -> PathBuf {
    let path = place.folder().join("secret");
    fs::write(&path, SECRET).unwrap();
    path
}

/// Every file of a store with one volume and one snapshot of it, each with commands that use it.
fn used(place: &Place, snapshot: &str) -> Vec<(PathBuf, Vec<Vec<String>>)> {
    let root = place.store.root();
    let (folder, layer) = (place.volume_folder(), place.layer());
    let id = folder.file_name().unwrap().to_str().unwrap().to_owned();
    let attach = ["attach", &id, "--socket-path", "/nonexistent/t.sock"];
    let list = |commands: &[&[&str]]| -> Vec<Vec<String>> {
        commands.iter().map(|command| command.iter().map(|part| part.to_string()).collect()).collect()
    };
    vec![
        (
            folder.join("volume.json"),
            list(&[&["volume", "list"], &["volume", "show", &id], &attach, &["gc"]]),
        ),
        (folder.join("pending.json"), list(&[&attach, &["snapshot", "create", &id], &["gc"]])),
        (folder.join("leaving.json"), list(&[&attach, &["gc"]])),
        (folder.join("tags.json"), list(&[&["volume", "show", &id], &["volume", "tag", &id, "a=b"]])),
        (folder.join("lock"), list(&[&["volume", "show", &id], &attach, &["volume", "delete", &id]])),
        (folder.join("control.sock"), list(&[&attach])),
        (layer, list(&[&["volume", "show", &id], &attach, &["snapshot", "create", &id], &["gc"]])),
        (
            root.join(format!("snapshots/{snapshot}.json")),
            list(&[&["snapshot", "list"], &["volume", "create", "--snapshot", snapshot], &["gc"]]),
        ),
        (root.join("events.jsonl"), list(&[&["events"], &["volume", "create", "--size", "1MiB"]])),
        (root.join("audit.jsonl"), list(&[&["audit", "show"], &["audit", "verify"], &attach])),
        (root.join("kms/store"), list(&[&["key", "list"], &attach])),
        (root.join("kms/lock"), list(&[&["key", "list"], &attach])),
        (root.join("apply.lock"), list(&[&["apply", "/dev/null"]])),
        (root.join("names.lock"), list(&[&["volume", "rename", &id, "t"]])),
        (root.join("key-watch.lock"), list(&[&["watch", "--once"]])),
        (root.join("key-watch.json"), list(&[&["watch", "--once"], &["volume", "list"]])),
        (
            root.join(format!("ledger/{id}.attach.json")),
            list(&[&["volume", "modify", &id, "--iops", "1"], &["volume", "show", &id], &attach]),
        ),
        (root.join("event-sinks/a.lock"), list(&[&["events", "deliver"]])),
        (root.join("event-sinks/a.json"), list(&[&["events", "deliver"]])),
    ]
}

/// A store of which every file is looked at in turn: what lies there is put aside, `lay` lays something in
/// its place, and every command that uses it is run.
fn with_each(lay: impl Fn(&Path)) {
    let place = Place::new(&[]);
    place.store.configure("[[event-sink]]\nname = 'a'\ncommand = ['/bin/true']\n");
    let snapshot = place.store.ok(&["snapshot", "create", "t"]).trim().to_owned();
    place.store.ok(&["events", "deliver"]);
    place.store.ok(&["volume", "modify", "t", "--iops", "1"]);
    place.store.ok(&["watch", "--once"]);
    for (path, commands) in used(&place, &snapshot) {
        let aside = path.with_extension("aside");
        let was_there = fs::rename(&path, &aside).is_ok();
        for command in commands {
            lay(&path);
            let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
            let (code, said) = run(&place, &arguments);
            // Not what it cost, but that it ends, and does not end by a signal or a panic.
            assert!(code != 101, "{} {command:?}: {said}", path.display());
            let _ = fs::remove_file(&path);
        }
        if was_there {
            fs::rename(&aside, &path).unwrap();
        }
    }
    place.store.accept();
    place.attach(&[]).end();
}

#[test]
fn a_pipe_keeps_no_command_waiting() {
    with_each(|path| mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap());
}

#[test]
fn what_a_symbolic_link_leads_to_stays_as_it_is() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("secret");
    fs::write(&target, SECRET).unwrap();
    with_each(|path| {
        symlink(&target, path).unwrap();
        assert!(fs::read(&target).unwrap() == SECRET);
    });
    assert!(fs::read(&target).unwrap() == SECRET, "something was written through a link");
    // Where there is nothing yet, nothing is made.
    let absent = outside.path().join("absent");
    with_each(|path| symlink(&absent, path).unwrap());
    assert!(!absent.exists(), "something was made through a link");
}

#[test]
fn a_pending_resize_truncates_nothing_by_a_link() {
    let place = Place::new(&[]);
    let secret = secret(&place);
    let (layer, folder) = (place.layer(), place.volume_folder());
    let id = folder.file_name().unwrap().to_str().unwrap().to_owned();
    fs::rename(&layer, place.folder().join("layer")).unwrap();
    for path in [&layer, &folder.join(layer.file_name().unwrap())] {
        symlink(&secret, path).unwrap();
        fs::write(
            folder.join("pending.json"),
            json!({"format": 1, "change": {"resize": SECRET.len()}}).to_string(),
        )
        .unwrap();
        let (code, said) = run(&place, &["attach", &id, "--socket-path", "/nonexistent/t.sock"]);
        assert_eq!(code, 7, "{said}");
        assert!(fs::read(&secret).unwrap() == SECRET);
    }
}

#[test]
fn a_folder_that_is_a_link_is_not_entered() {
    let place = Place::new(&[]);
    let (root, folder) = (place.store.root(), place.volume_folder());
    let id = folder.file_name().unwrap().to_str().unwrap().to_owned();
    for inside in
        [folder.clone(), root.join("volumes"), root.join("layers"), root.join("snapshots"), root.join("kms")]
    {
        let elsewhere = place.folder().join("elsewhere");
        if inside.exists() {
            fs::rename(&inside, &elsewhere).unwrap();
        } else {
            fs::create_dir(&elsewhere).unwrap();
        }
        let before = names(&elsewhere);
        symlink(&elsewhere, &inside).unwrap();
        for command in [
            &["attach", &id, "--socket-path", "/nonexistent/t.sock"][..],
            &["volume", "create", "--size", "1MiB"],
            &["volume", "delete", &id],
            &["snapshot", "create", &id],
            &["gc"],
        ] {
            let (code, said) = run(&place, command);
            if inside != folder || command[0] == "attach" {
                assert!(said.contains("symbolic link"), "{} {command:?}: {said}", inside.display());
                assert!(code != 0 || command == ["gc"], "{} {command:?}: {said}", inside.display());
            }
        }
        assert_eq!(names(&elsewhere), before, "{}", inside.display());
        fs::remove_file(&inside).unwrap();
        fs::rename(&elsewhere, &inside).unwrap();
    }
    place.store.ok(&["volume", "show", &id]);
}

#[test]
fn the_root_itself_may_be_reached_by_a_link() {
    let place = Place::new(&[]);
    let link = place.folder().join("by-link");
    symlink(place.folder(), &link).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
    command.env("SEALBLK_CONFIG_DIR", link.join("config")).arg("--root").arg(link.join("root"));
    command.args(["volume", "show", "t"]);
    let (code, said) = ends(command);
    assert_eq!(code, 0, "{said}");
}
