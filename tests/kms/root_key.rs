//! The embedded KMS's root key under a passphrase or as a systemd credential, as operators and services have
//! it: every way to give it, also to the helper of an attach, and what is said where it is missing or wrong.

use crate::common::attach::{Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::patience::limit;
use crate::common::process::{INHERITED, inherit, tie_to_test, wait_within};
use crate::common::store::{Store, said};
use nix::pty::openpty;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A pipe that has these words in it.
fn pipe_of(words: &str) -> OwnedFd {
    let (reader, mut writer) = std::io::pipe().expect("make a pipe");
    writer.write_all(words.as_bytes()).expect("they fit into a pipe");
    reader.into()
}

/// A command that can read `passphrase` from a pipe.
fn with_passphrase(store: &Store, passphrase: &str, arguments: &[&str]) -> Command {
    let mut command = store.command();
    command.args(arguments).env("SEALBLK_PASSPHRASE_FD", INHERITED.to_string());
    inherit(&mut command, pipe_of(passphrase), INHERITED);
    command
}

/// A command without a terminal, which must not wait for somebody to type.
fn run(mut command: Command) -> Output {
    // SAFETY: between fork and exec the closure makes one system call without pointers.
    unsafe { command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into)) };
    command.output().expect("start sealblk")
}

#[track_caller]
fn ok(command: Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[track_caller]
fn refused(code: i32, command: Command) -> String {
    let output = run(command);
    assert_eq!(output.status.code(), Some(code), "{}", said(&output));
    said(&output)
}

fn root_key_file(store: &Store) -> PathBuf {
    let files =
        fs::read_dir(store.config()).expect("list the configuration").map(|e| e.expect("list").path());
    files.into_iter().find(|path| path.extension().is_some_and(|e| e == "key")).expect("a root key")
}

/// Gives `new` by a pipe of its own.
fn set_passphrase(store: &Store, old: Option<&str>, new: &str, arguments: &[&str]) -> Command {
    let number = (INHERITED + 1).to_string();
    let arguments = [arguments, &["--new-passphrase-fd", &number]].concat();
    let mut command = match old {
        Some(old) => with_passphrase(store, old, &arguments),
        None => {
            let mut command = store.command();
            command.args(&arguments);
            command
        }
    };
    inherit(&mut command, pipe_of(new), INHERITED + 1);
    command
}

#[test]
fn a_store_can_be_under_a_passphrase_from_the_beginning() {
    let store = Store::new();
    ok(set_passphrase(&store, None, "open sesame\n", &["kms", "init"]));
    let line = fs::read_to_string(root_key_file(&store)).unwrap();
    assert!(line.starts_with("sealblk-kms-wrapped-root-key-1:argon2id:65536:3:4:"), "{line}");
    // With or without the end of the line.
    let made = ok(with_passphrase(&store, "open sesame", &["key", "create", "--json"]));
    assert!(
        ok(with_passphrase(&store, "open sesame\nmore", &["key", "list"])).contains("key/")
            || made.contains("key/")
    );
    let words = refused(5, with_passphrase(&store, "open barley", &["key", "list"]));
    assert!(words.contains("is not the one of the KMS root key"), "{words}");
    let mut nobody = store.command();
    nobody.args(["key", "list"]);
    let words = refused(2, nobody);
    assert!(words.contains("no terminal to ask") && words.contains("SEALBLK_PASSPHRASE_FD"), "{words}");
    // It is no secret that there is a store.
    let again = refused(4, set_passphrase(&store, Some("open sesame"), "x", &["kms", "init"]));
    assert!(again.contains("there is a KMS store in"), "{again}");
}

#[test]
fn a_passphrase_is_set_changed_and_removed_and_the_store_stays_as_it_is() {
    let store = Store::new();
    store.ok(&["key", "create"]);
    let (log, file) = (store.root().join("kms/log"), root_key_file(&store));
    let (before, plain) = (fs::read(&log).unwrap(), fs::read(&file).unwrap());
    ok(set_passphrase(&store, None, "first", &["kms", "passphrase", "set"]));
    let first = fs::read(&file).unwrap();
    let secret = String::from_utf8(plain[plain.len() - 65..plain.len() - 1].to_vec()).unwrap();
    assert!(!String::from_utf8_lossy(&first).contains(&secret));
    refused(5, set_passphrase(&store, Some("guess"), "mine", &["kms", "passphrase", "set"]));
    assert_eq!(fs::read(&file).unwrap(), first, "whoever does not know it changes nothing");
    ok(set_passphrase(&store, Some("first"), "second", &["kms", "passphrase", "set"]));
    refused(5, with_passphrase(&store, "first", &["key", "list"]));
    ok(with_passphrase(&store, "second", &["key", "list"]));
    ok(with_passphrase(&store, "second", &["kms", "passphrase", "remove"]));
    assert_eq!(fs::read(&file).unwrap(), plain);
    assert_eq!(fs::read(&log).unwrap(), before);
    for bad in ["", "\n", &"x".repeat(1025)] {
        let words = refused(2, set_passphrase(&store, None, bad, &["kms", "passphrase", "set"]));
        assert!(words.contains("a passphrase has 1 to 1024 bytes"), "{words}");
    }
}

#[test]
fn the_first_key_says_what_must_not_be_lost_once() {
    let store = Store::new();
    let create = || {
        let mut command = store.command();
        command.args(["volume", "create", "--size", "1MiB"]);
        let output = run(command);
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stderr).unwrap()
    };
    let first = create();
    let file = root_key_file(&store);
    assert!(first.contains(&format!("Its root key is {}", file.display())), "{first}");
    assert!(first.contains("sealblk kms backup FILE"), "{first}");
    assert_eq!(create(), "");
}

#[test]
fn a_root_key_that_was_lost_comes_back_from_its_copy() {
    let place = Place::new(&[]);
    let (store, id) = (&place.store, place.id());
    let show = || -> serde_json::Value {
        serde_json::from_str(&store.ok(&["kms", "show", "--json"])).expect("JSON")
    };
    let file = root_key_file(store);
    let plain = fs::read_to_string(&file).unwrap();
    assert_eq!(show()["root_key"]["kept"], "file");
    let copy = place.folder().join("copy");
    let copied = copy.to_str().unwrap();
    ok(set_passphrase(store, None, "for bad days", &["kms", "backup", copied]));
    let text = fs::read_to_string(&copy).unwrap();
    let digits = plain.trim_end().rsplit(':').next().unwrap();
    assert!(!text.contains(digits) && text.lines().count() == 2, "{text}");
    assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o7777, 0o600);
    let words = refused(4, set_passphrase(store, None, "x", &["kms", "backup", copied]));
    assert!(words.contains("there is something at"), "{words}");
    assert_eq!(fs::read_to_string(&copy).unwrap(), text);
    let piped = ok(set_passphrase(store, None, "another", &["kms", "backup", "-"]));
    assert!(piped.lines().count() == 2 && piped.lines().next() == text.lines().next(), "{piped}");
    let there = refused(4, with_passphrase(store, "for bad days", &["kms", "restore", copied]));
    assert!(there.contains("there is a root key already"), "{there}");
    // It is lost, and the head of the KMS's log with it.
    fs::remove_file(&file).unwrap();
    fs::remove_file(file.with_extension("head")).unwrap();
    assert_eq!(show()["root_key"]["kept"], "missing");
    let words = place.refuse(8, &[]);
    assert!(words.contains("sealblk kms restore"), "{words}");
    // Neither another store's, nor with another passphrase, nor a part of it.
    let other = Store::new();
    other.ok(&["key", "create"]);
    let foreign = ok(set_passphrase(&other, None, "for bad days", &["kms", "backup", "-"]));
    let wrong = place.folder().join("wrong");
    for (code, bytes, passphrase, expected) in [
        (2, foreign.as_bytes(), "for bad days", "it is the root key of the KMS store"),
        (5, text.as_bytes(), "guess", "is not the one of the KMS root key"),
        (2, &text.as_bytes()[..text.len() / 2], "for bad days", "that is no backup"),
        (2, plain.as_bytes(), "for bad days", "that is no backup"),
        (2, b"", "for bad days", "that is no backup"),
    ] {
        fs::write(&wrong, bytes).unwrap();
        let restore = ["kms", "restore", wrong.to_str().unwrap()];
        let words = refused(code, with_passphrase(store, passphrase, &restore));
        assert!(words.contains(expected), "{words}");
        assert!(!file.exists(), "{words}");
    }
    // The other store's key under this one's name: what it would be put in the place of tells.
    let claimed = format!("{}\n{}\n", text.lines().next().unwrap(), foreign.lines().nth(1).unwrap());
    fs::write(&wrong, claimed).unwrap();
    refused(5, with_passphrase(store, "for bad days", &["kms", "restore", wrong.to_str().unwrap()]));
    assert!(!file.exists());
    ok(with_passphrase(store, "for bad days", &["kms", "restore", copied]));
    assert_eq!(show()["root_key"]["kept"], "passphrase");
    ok(with_passphrase(store, "for bad days", &["kms", "passphrase", "remove"]));
    assert_eq!(fs::read_to_string(&file).unwrap(), plain);
    store.ok(&["volume", "show", &id, "--check-key"]);
    place.attach(&[]).end();
}

#[test]
fn where_the_kms_is_gone_no_other_takes_its_place() {
    let place = Place::new(&[]);
    let store = &place.store;
    let snapshot = store.ok(&["snapshot", "create", "t"]);
    let (kms, aside) = (store.root().join("kms"), place.folder().join("aside"));
    fs::rename(&kms, &aside).unwrap();
    for arguments in [
        &["volume", "create", "--size", "1MiB"][..],
        &["key", "create"],
        &["kms", "init"],
        &["kms", "principal", "create", "host"],
    ] {
        let mut command = store.command();
        command.args(arguments);
        let words = refused(7, command);
        assert!(words.contains("the store's own KMS is gone"), "{words}");
        assert!(words.contains(&place.id()) && words.contains("and 1 more are"), "{words}");
        assert!(!kms.join("log").exists(), "{arguments:?}");
    }
    let words = place.refuse(3, &[]);
    assert!(words.contains("restore the folder from a backup"), "{words}");
    // Back in its place, it goes on as before.
    let _ = fs::remove_dir_all(&kms);
    fs::rename(&aside, &kms).unwrap();
    place.attach(&[]).end();
    // Lost for good, with all that was under its keys, the store can begin anew.
    fs::remove_dir_all(&kms).unwrap();
    store.ok(&["snapshot", "delete", snapshot.trim()]);
    store.ok(&["volume", "delete", "t"]);
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "new"]);
}

/// Serves the volume to a VMM, and returns what the host process still has open.
fn serve(place: &Place, command: Command, keep: Vec<OwnedFd>) -> Vec<PathBuf> {
    let host = place.start(command, keep);
    let mut session = open(&place.socket());
    let data = pattern(1, 4096);
    write(&mut session.rings[0], 0, &data);
    flush(&mut session.rings[0]);
    assert!(read(&mut session.rings[0], 0, 4096) == data);
    drop(session);
    let open = fs::read_dir(host.proc("fd")).expect("list").map(|fd| fd.expect("list").path()).collect();
    host.end();
    open
}

#[test]
fn an_attach_finds_the_passphrase_by_its_helper_and_keeps_nothing_of_it() {
    let place = Place::new(&[]);
    ok(set_passphrase(&place.store, None, "sesame", &["kms", "passphrase", "set"]));
    let said = place.run(place.attach_command(&[]), vec![]);
    assert_eq!(said.code, 2, "{}", said.err);
    // From a descriptor: a pipe, and a file, which would still have it.
    let file = place.folder().join("passphrase");
    fs::write(&file, "sesame\n").unwrap();
    for descriptor in [pipe_of("sesame"), File::open(&file).unwrap().into()] {
        let mut command = place.attach_command(&[]);
        command.env("SEALBLK_PASSPHRASE_FD", INHERITED.to_string());
        inherit(&mut command, descriptor, INHERITED);
        let open = serve(&place, command, vec![]);
        assert!(open.len() > 5 && open.iter().all(|fd| !fd.ends_with(INHERITED.to_string())), "{open:?}");
    }
    // From a credential.
    let credentials = place.folder().join("credentials");
    fs::create_dir(&credentials).unwrap();
    fs::write(credentials.join("sealblk-kms-passphrase"), "sesame").unwrap();
    let mut command = place.attach_command(&[]);
    command.env("CREDENTIALS_DIRECTORY", &credentials);
    serve(&place, command, vec![]);
    fs::write(credentials.join("sealblk-kms-passphrase"), "barley").unwrap();
    let mut command = place.attach_command(&[]);
    command.env("CREDENTIALS_DIRECTORY", &credentials);
    let said = place.run(command, vec![]);
    assert_eq!(said.code, 5, "{}", said.err);
    assert!(said.err.contains("the passphrase in ") && !said.err.contains("barley"), "{}", said.err);
}

#[test]
fn a_root_key_can_be_a_credential_and_nothing_else() {
    let place = Place::new(&[]);
    let file = root_key_file(&place.store);
    let credentials = place.folder().join("credentials");
    fs::create_dir(&credentials).unwrap();
    let credential = credentials.join("sealblk-kms-root-key");
    fs::rename(&file, &credential).unwrap();
    let said = place.run(place.attach_command(&[]), vec![]);
    assert!(said.code == 8 && said.err.contains("if it is a systemd credential"), "{}", said.err);
    let attach = || {
        let mut command = place.attach_command(&[]);
        command.env("CREDENTIALS_DIRECTORY", &credentials);
        command
    };
    serve(&place, attach(), vec![]);
    let mut command = set_passphrase(&place.store, None, "x", &["kms", "passphrase", "set"]);
    command.env("CREDENTIALS_DIRECTORY", &credentials);
    assert!(refused(8, command).contains("the root key comes from a credential"));
    // One of another store, and one that is none.
    let other = Store::new();
    other.ok(&["key", "create"]);
    fs::copy(root_key_file(&other), &credential).unwrap();
    let said = place.run(attach(), vec![]);
    assert!(said.code == 7 && said.err.contains("is not the one this store was made with"), "{}", said.err);
    fs::write(&credential, "x").unwrap();
    let said = place.run(attach(), vec![]);
    assert!(
        said.code == 7 && said.err.contains("sealblk-kms-root-key is not a KMS root key"),
        "{}",
        said.err
    );
}

/// A process group with a terminal of its own, at which somebody types.
struct Terminal {
    ours: File,
    theirs: OwnedFd,
    shown: String,
}

impl Terminal {
    fn new() -> Self {
        let pair = openpty(None, None).expect("make a terminal");
        for end in [&pair.master, &pair.slave] {
            use nix::fcntl::{FcntlArg, FdFlag, fcntl};
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("close on exec");
        }
        Terminal { ours: pair.master.into(), theirs: pair.slave, shown: String::new() }
    }

    fn give(&self, command: &mut Command) {
        let theirs = self.theirs.try_clone().expect("dup");
        // SAFETY: between fork and exec the closure makes system calls alone, on a descriptor that it owns.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                match libc::ioctl(theirs.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) {
                    -1 => Err(std::io::Error::last_os_error()),
                    _ => Ok(()),
                }
            });
        }
    }

    /// Waits for the words, and types a line.
    fn answer(&mut self, words: &str, line: &str) {
        let mut seen = String::new();
        while !seen.contains(words) {
            let mut buffer = [0; 256];
            let len = self.ours.read(&mut buffer).expect("read what is shown");
            seen += &String::from_utf8_lossy(&buffer[..len]);
        }
        self.shown += &seen;
        self.ours.write_all(format!("{line}\n").as_bytes()).expect("type");
    }
}

/// Runs a command at a terminal, where these questions come and get these answers.
fn at_terminal(mut command: Command, conversation: &[(&str, &str)]) -> (bool, String) {
    let mut terminal = Terminal::new();
    terminal.give(&mut command);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    tie_to_test(&mut command, vec![]);
    let mut child = command.spawn().expect("start sealblk");
    for (words, line) in conversation {
        terminal.answer(words, line);
    }
    let status = wait_within(&mut child, limit()).expect("it ends");
    (status.success(), terminal.shown)
}

#[test]
fn somebody_at_a_terminal_is_asked_and_nothing_is_shown() {
    let store = Store::new();
    let of = |arguments: &[&str]| {
        let mut command = store.command();
        command.args(arguments);
        command
    };
    let new = "New passphrase";
    let differ = [(new, "sesame"), ("The same again", "sesam")];
    assert!(!at_terminal(of(&["kms", "init", "--passphrase"]), &differ).0);
    let same = [(new, "sesame"), ("The same again", "sesame")];
    let (done, shown) = at_terminal(of(&["kms", "init", "--passphrase"]), &same);
    assert!(done && !shown.contains("sesame"), "{shown}");
    let asked = "Passphrase of the KMS root key";
    let (done, shown) = at_terminal(of(&["key", "create"]), &[(asked, "barley"), (asked, "sesame")]);
    assert!(done && !shown.contains("barley"), "{shown}");
    // Asked once, although both the old key and the new line are its affair.
    let change = [(new, "second"), ("The same again", "second")];
    let (done, _) =
        at_terminal(of(&["kms", "passphrase", "set"]), &[&[(asked, "sesame")][..], &change].concat());
    assert!(done);
    let (done, _) = at_terminal(of(&["key", "list"]), &[(asked, "second")]);
    assert!(done);
}

#[test]
fn whoever_attaches_at_a_terminal_is_asked_by_the_helper() {
    let place = Place::new(&[]);
    ok(set_passphrase(&place.store, None, "sesame", &["kms", "passphrase", "set"]));
    let mut terminal = Terminal::new();
    let mut command = place.attach_command(&[]);
    terminal.give(&mut command);
    std::thread::scope(|threads| {
        threads.spawn(|| terminal.answer("Passphrase of the KMS root key", "sesame"));
        serve(&place, command, vec![]);
    });
    assert!(!terminal.shown.contains("sesame"), "{}", terminal.shown);
}

#[test]
fn a_descriptor_that_is_not_there_is_said_to_be_missing() {
    let store = Store::new();
    ok(set_passphrase(&store, None, "sesame", &["kms", "init"]));
    for number in ["0", "77", "x"] {
        let mut command = store.command();
        command.args(["key", "list"]).env("SEALBLK_PASSPHRASE_FD", number);
        let words = refused(2, command);
        assert!(
            words.contains("that this process was started with") || words.contains("is not a number"),
            "{words}"
        );
    }
    assert!(Path::new(&root_key_file(&store)).exists());
}
