//! Whose folders a store is in, and whose what commands make there.

use crate::common::attach::{Host, Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::store::said;
use crate::common::successor::Successor;
use crate::{refused, run};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const NOBODY: u32 = 65534;

/// Every path below `folder`, and the folder.
fn all_below(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut todo) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(path) = todo.pop() {
        if fs::symlink_metadata(&path).is_ok_and(|it| it.is_dir()) {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.push(path);
    }
    found
}

/// A volume in a store that belongs to the user nobody, whole, except for the root key.
fn nobodys() -> Place {
    let place = Place::with_settings("[[event-sink]]\nname = \"s\"\ncommand = [\"/bin/true\"]\n", &[]);
    place.store.let_belong_to("nobody");
    all_below(&place.store.root()).iter().for_each(|path| chown(path, Some(NOBODY), Some(NOBODY)).unwrap());
    fs::set_permissions(place.folder(), fs::Permissions::from_mode(0o711)).unwrap();
    place
}

/// Runs a command as root. Everything in the store is nobody's afterwards as well.
#[track_caller]
fn leaves_all_to_nobody(place: &Place, arguments: &[&str]) -> String {
    let said = place.store.ok(arguments);
    let is_not = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|it| it.uid() != NOBODY);
    let others: Vec<_> = all_below(&place.store.root()).into_iter().filter(is_not).collect();
    assert!(others.is_empty(), "{arguments:?} leaves {others:?} to root");
    said.trim().to_owned()
}

/// Everything that can be asked for of the volume `t`, whether it is attached or not.
fn change_everything(place: &Place) {
    let done = |arguments: &[&str]| leaves_all_to_nobody(place, arguments);
    let made = done(&["key", "create"]);
    let key = made.split_whitespace().nth(1).expect("it prints the key's id").to_owned();
    let nightly = done(&["snapshot", "create", "t"]);
    done(&["volume", "tag", "t", "vm=web"]);
    done(&["snapshot", "create", "--all-of", "tag:vm=web", "--name", "all"]);
    done(&["snapshot", "tag", &nightly, "a=b"]);
    done(&["snapshot", "rewrap", &nightly, "--key", &key]);
    done(&["snapshot", "copy", &nightly]);
    done(&["snapshot", "copy", &nightly, "--key", "alias/aws/ebs"]);
    done(&["snapshot", "delete", "all"]);
    done(&["volume", "tag", "t", "a=b"]);
    done(&["volume", "untag", "t", "a"]);
    done(&["volume", "rewrap", "t", "--key", &key]);
    let larger = (place.metadata().size() + (1 << 20)).to_string();
    done(&["volume", "resize", "t", &larger]);
    done(&["volume", "rekey", "t", "--key", "alias/aws/ebs", "--follow"]);
    done(&["snapshot", "create", "t"]);
    done(&["volume", "flatten", "t", "--follow"]);
    done(&["events", "deliver"]);
    done(&["store", "accept", "--all"]);
    done(&["gc"]);
}

/// Attaches the volume as this user, writes, and reads what was written before.
#[track_caller]
fn attaches(place: &Place, arguments: &[&str], round: u64) -> Host {
    let host = place.attach(arguments);
    let mut session = open(&place.socket());
    if round > 0 {
        assert!(read(&mut session.rings[0], 64, 8192) == pattern(round, 8192));
    }
    write(&mut session.rings[0], 64, &pattern(round + 1, 8192));
    flush(&mut session.rings[0]);
    host
}

fn folders(place: &Place) -> Vec<PathBuf> {
    let root = place.store.root();
    place.store.ok(&["snapshot", "create", "t"]);
    let inner = ["volumes", "layers", "snapshots", "kms"].map(|name| root.join(name));
    std::iter::once(root).chain(inner).collect()
}

#[test]
fn a_store_in_which_somebody_else_can_write_is_refused() {
    let place = Place::new(&[]);
    let folders = folders(&place);
    let above = place.folder();
    for folder in folders.iter().chain([&above]) {
        let shown = folder.display().to_string();
        let before = fs::metadata(folder).unwrap().permissions();
        for (mode, words) in [(0o757, "every user"), (0o777, "every user")] {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).unwrap();
            let said = refused(&place, &["volume", "list"], 2, words);
            assert!(said.contains(&shown) && said.contains("chmod go-w"), "{said}");
        }
        // Group 0 is root's own; any other may have others in it.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o775)).unwrap();
        place.store.ok(&["volume", "list"]);
        chown(folder, None, Some(NOBODY)).unwrap();
        refused(&place, &["volume", "list"], 2, "its group");
        chown(folder, None, Some(0)).unwrap();
        fs::set_permissions(folder, before).unwrap();
        chown(folder, Some(NOBODY), None).unwrap();
        let said = refused(&place, &["volume", "list"], 2, "belongs to nobody");
        assert!(said.contains(&shown) && said.contains("store-users"), "{said}");
        chown(folder, Some(0), None).unwrap();
        place.store.ok(&["volume", "list"]);
    }
    // Names that only their owners can change will do above the root, and not in it.
    fs::set_permissions(&above, fs::Permissions::from_mode(0o1777)).unwrap();
    place.store.ok(&["volume", "list"]);
    fs::set_permissions(&folders[0], fs::Permissions::from_mode(0o1777)).unwrap();
    refused(&place, &["volume", "list"], 2, "every user");
}

#[test]
fn a_volumes_folder_that_is_somebody_elses_is_not_used() {
    let place = Place::new(&[]);
    let (folder, id) = (place.volume_folder(), place.id());
    let attach = ["attach", &id, "--socket-path", "/nonexistent/t.sock"];
    chown(&folder, Some(NOBODY), None).unwrap();
    refused(&place, &attach, 2, "belongs to nobody");
    refused(&place, &["snapshot", "create", &id], 2, "belongs to nobody");
    chown(&folder, Some(0), None).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    refused(&place, &attach, 2, "every user");
}

#[test]
fn the_users_that_may_have_a_store_are_named_beside_the_root_key() {
    let place = Place::new(&[]);
    chown(place.store.root(), Some(NOBODY), None).unwrap();
    refused(&place, &["volume", "list"], 2, "belongs to nobody");
    place.store.let_belong_to("nobody");
    place.store.ok(&["volume", "list"]);
    // Not in the store, and not where somebody else could write them.
    let users = place.store.config().join("store-users");
    fs::rename(&users, place.store.root().join("store-users")).unwrap();
    refused(&place, &["volume", "list"], 2, "belongs to nobody");
    fs::rename(place.store.root().join("store-users"), &users).unwrap();
    fs::set_permissions(&users, fs::Permissions::from_mode(0o666)).unwrap();
    refused(&place, &["volume", "list"], 2, "every user");
    fs::set_permissions(&users, fs::Permissions::from_mode(0o644)).unwrap();
    chown(&users, Some(NOBODY), None).unwrap();
    refused(&place, &["volume", "list"], 2, "belongs to nobody");
    chown(&users, Some(0), None).unwrap();
    fs::write(&users, "no-such-user\n").unwrap();
    let (code, said) = run(&place, &["volume", "list"]);
    assert!(code == 2 && said.contains("there is no user no-such-user"), "{said}");
}

#[test]
fn what_root_makes_in_a_users_store_is_that_users() {
    let place = nobodys();
    attaches(&place, &["--user", "nobody"], 0).end();
    change_everything(&place);
    let host = attaches(&place, &["--user", "nobody"], 1);
    change_everything(&place);
    leaves_all_to_nobody(&place, &["detach", "t"]);
    host.ends_well();
    // What is made, imported and deleted beside it.
    let done = |arguments: &[&str]| leaves_all_to_nobody(&place, arguments);
    let snapshot = done(&["snapshot", "create", "t"]);
    done(&["volume", "create", "--snapshot", &snapshot, "--own-data-key", "--name", "clone"]);
    let images = [place.folder().join("a.img"), place.folder().join("b.img")];
    images.iter().for_each(|image| fs::write(image, pattern(9, 1 << 20)).unwrap());
    done(&["volume", "import", images[0].to_str().unwrap(), "--format", "raw", "--name", "a"]);
    done(&["volume", "import", images[1].to_str().unwrap(), "--format", "raw", "--name", "b", "--in-place"]);
    let file = place.folder().join("volumes.toml");
    fs::write(&file, "[[volume]]\nname = \"applied\"\nsize = \"1MiB\"\ntags = { a = \"b\" }\n").unwrap();
    done(&["apply", file.to_str().unwrap()]);
    done(&["volume", "delete", "clone"]);
    done(&["volume", "delete", "b", "--shred"]);
    attaches(&place, &["--user", "nobody"], 2).end();
}

/// Without capabilities it could give nothing away.
#[test]
fn what_a_host_process_of_roots_makes_in_a_users_store_is_that_users() {
    let place = nobodys();
    let host = attaches(&place, &[], 0);
    change_everything(&place);
    leaves_all_to_nobody(&place, &["detach", "t"]);
    host.ends_well();
    assert!(!place.socket().exists(), "the socket's name was in root's folder");
    attaches(&place, &["--user", "nobody"], 1).end();
}

/// Where volumes are several users', the folder of their layers is nobody's alone.
#[test]
fn a_volumes_new_layer_is_the_volumes_owners() {
    let place = nobodys();
    for folder in [place.store.root().to_owned(), place.store.root().join("layers")] {
        chown(&folder, Some(0), Some(0)).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o711)).unwrap();
    }
    place.store.ok(&["snapshot", "create", "t"]);
    assert_eq!(fs::metadata(place.layer()).unwrap().uid(), NOBODY);
    attaches(&place, &["--user", "nobody"], 0).end();
}

#[test]
fn a_user_may_ask_the_host_process_that_root_has_started_for_the_user() {
    let place = nobodys();
    let host = attaches(&place, &["--user", "nobody"], 0);
    let socket = place.volume_folder().join("control.sock");
    let connect = |user| {
        let mut python = Command::new("python3");
        python.args(["-c", "import socket,sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"]);
        python.arg(&socket).stderr(Stdio::null()).uid(user).gid(user).status().unwrap().success()
    };
    assert!(connect(NOBODY) && !connect(NOBODY - 1));
    host.end();
}

/// What the kernel says of a process, by the name of a line of its status.
fn status_of(pid: nix::unistd::Pid, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name}: {text}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_successor_is_who_the_process_before_was_and_as_confined() {
    let place = nobodys();
    let host = attaches(&place, &["--user", "nobody"], 0);
    let said: serde_json::Value =
        serde_json::from_str(&place.store.ok(&["upgrade", "t", "--json"])).expect("JSON");
    let successor = Successor::of(&said);
    drop(host);
    for (name, expected) in [
        ("Uid", "65534 65534 65534 65534"),
        ("Gid", "65534 65534 65534 65534"),
        ("Seccomp", "2"),
        ("CapEff", "0000000000000000"),
        ("NoNewPrivs", "1"),
    ] {
        assert_eq!(status_of(successor.pid(), name), expected, "{name}");
    }
    assert!(read(&mut open(&place.socket()).rings[0], 64, 8192) == pattern(1, 8192));
    // The user whom it has become gets no data key: root has started it.
    let ask = "import fcntl, json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
fd = os.memfd_create('key', os.MFD_ALLOW_SEALING)
os.ftruncate(fd, 4096)
fcntl.fcntl(fd, 1033, 7)
socket.send_fds(s, [b'{\"op\": \"upgrade\", \"protocol\": 1}\\n'], [fd])
said = json.loads(s.makefile().readline())
assert 'data keys go to root' in said['failed']['message'], said
assert os.pread(fd, 64, 0) == bytes(64)
";
    let mut python = Command::new("python3");
    python.args(["-c", ask]).arg(place.volume_folder().join("control.sock"));
    assert!(python.uid(NOBODY).gid(NOBODY).status().expect("start python").success());
    place.store.ok(&["detach", "t"]);
    successor.ends();
}

/// All of it is one user's, who is not root.
#[test]
fn a_user_upgrades_what_the_same_user_has_attached() {
    let place = nobodys();
    for path in all_below(&place.folder()) {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let own = |mut command: Command| {
        command.uid(NOBODY).gid(NOBODY);
        command
    };
    let host = place.start(own(place.attach_command(&["--queues", "1"])), vec![]);
    let mut upgrade = own(place.store.command());
    let output = upgrade.args(["upgrade", "t", "--json"]).output().expect("start sealblk");
    assert!(output.status.success(), "{}", said(&output));
    let successor = Successor::of(&serde_json::from_slice(&output.stdout).expect("JSON"));
    drop(host);
    assert_eq!(status_of(successor.pid(), "Seccomp"), "2");
    write(&mut open(&place.socket()).rings[0], 0, &pattern(7, 4096));
    let detached = own(place.store.command()).args(["detach", "t"]).output().expect("start sealblk");
    assert!(detached.status.success(), "{}", said(&detached));
    successor.ends();
}

/// Who has no right to give files away would leave some that their folder's owner cannot use.
#[test]
fn what_cannot_be_given_to_the_folders_owner_is_not_made() {
    const DAEMON: u32 = 1;
    let place = nobodys();
    fs::write(place.store.config().join("store-users"), "nobody\ndaemon\n").unwrap();
    let root = place.store.root();
    all_below(&place.store.config()).iter().for_each(|path| chown(path, Some(DAEMON), Some(DAEMON)).unwrap());
    // As far as the group goes, daemon may write here.
    all_below(&root).iter().for_each(|path| chown(path, Some(NOBODY), Some(DAEMON)).unwrap());
    for path in all_below(&root) {
        let mode = if path.is_dir() { 0o770 } else { 0o660 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let before = all_below(&root);
    let mut command = place.store.command();
    command.args(["volume", "tag", "t", "a=b"]).uid(DAEMON).gid(DAEMON);
    let (code, said) = crate::ends(command);
    assert!(code == 1 && said.contains("belongs to nobody") && said.contains("as root"), "{code}: {said}");
    assert_eq!(all_below(&root), before);
}

/// A file of root's could have been given a second name there.
#[test]
fn what_was_there_before_is_not_given_away() {
    let place = nobodys();
    let precious = place.folder().join("precious");
    fs::write(&precious, "").unwrap();
    for name in ["apply.lock", "event-sinks/s.lock"] {
        let path = place.store.root().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        chown(path.parent().unwrap(), Some(NOBODY), Some(NOBODY)).unwrap();
        fs::hard_link(&precious, path).unwrap();
    }
    let file = place.folder().join("volumes.toml");
    fs::write(&file, "[[volume]]\nname = \"applied\"\nsize = \"1MiB\"\n").unwrap();
    place.store.ok(&["apply", file.to_str().unwrap()]);
    place.store.ok(&["events", "deliver"]);
    assert_eq!(fs::metadata(&precious).unwrap().uid(), 0);
}
