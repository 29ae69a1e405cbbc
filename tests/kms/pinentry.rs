//! The PIN of a token from a pinentry: Debian's on a terminal, and programs that pretend to be one.

use crate::common::patience::limit;
use crate::common::softhsm::SoftHsm;
use crate::common::store::{Store, said};
use nix::pty::openpty;
use nix::unistd::ttyname;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;

struct Site {
    hsm: SoftHsm,
    store: Store,
    folder: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let hsm = SoftHsm::with_tokens(&["one"]);
        let store = Store::new();
        store.configure("kms-patience = 1");
        store.set_environment(hsm.environment());
        Site { hsm, store, folder: tempfile::tempdir().expect("make a temporary folder") }
    }

    /// A program that runs this shell script.
    fn program(&self, name: &str, script: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("write a file");
        fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("let it be run");
        path
    }

    /// A pinentry that answers so to GETPIN, and keeps what it was told and what it was given.
    fn pinentry(&self, answer: &str) -> PathBuf {
        let seen = self.seen().display().to_string();
        let script = format!(
            "env > {seen}.env; ls /proc/self/fd > {seen}.fds; echo OK\nwhile read -r line; do echo \"$line\" \
             >> {seen}; case $line in GETPIN) {answer} ;; BYE) exit ;; *) echo OK ;; esac; done"
        );
        self.program("pinentry", &script)
    }

    fn seen(&self) -> PathBuf {
        self.folder.path().join("seen")
    }

    fn add(&self, pinentry: &Path) -> Command {
        let mut command = self.store.command();
        command.args(["kms", "store", "add", "--token", "one", "--pkcs11"]).arg(SoftHsm::module());
        command.arg(format!("--pinentry={}", pinentry.display()));
        command
    }

    fn key_stores(&self) -> usize {
        let listed = self.store.ok(&["--json", "kms", "store", "list"]);
        let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
        listed["key_stores"].as_array().expect("a list").len()
    }
}

fn gives(pin: &str) -> String {
    format!("echo 'D {pin}'; echo OK")
}

#[test]
fn a_pinentry_gives_the_pin_to_commands_and_to_helpers() {
    let site = Site::new();
    let right = site.pinentry(&gives(&SoftHsm::pin("one").replace('-', "%2D")));
    let mut add = site.add(&right);
    add.env("AWS_SECRET_ACCESS_KEY", "x").env("GPG_TTY", "/dev/pts/999").env("TERM", "dumb");
    let output = add.output().expect("start sealblk");
    assert!(output.status.success(), "{}", said(&output));
    let told = fs::read_to_string(site.seen()).expect("read a file");
    for line in ["OPTION ttyname=/dev/pts/999", "OPTION ttytype=dumb", "SETPROMPT PIN:"] {
        assert!(told.lines().any(|it| it == line), "{line}: {told}");
    }
    assert!(told.contains("SETDESC sealblk needs the PIN for the key store \"one\"."), "{told}");
    // It has neither credentials nor anything that was open.
    let environment = fs::read_to_string(site.seen().with_extension("env")).expect("read a file");
    assert!(!environment.contains("AWS_") && !environment.contains("SEALBLK_"), "{environment}");
    let open = fs::read_to_string(site.seen().with_extension("fds")).expect("read a file");
    assert!(open.lines().all(|fd| fd.parse::<u32>().is_ok_and(|fd| fd <= 3)), "{open}");

    // Whoever needs a key asks by the program that the environment names: the helper of an attach as well.
    let with = |arguments: &[&str]| {
        let mut command = site.store.command();
        command.args(arguments).env("SEALBLK_PINENTRY", &right);
        let output = command.output().expect("start sealblk");
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    };
    with(&["key", "create", "--key-store", "one", "--alias", "one"]);
    with(&["volume", "create", "--size", "8MiB", "--name", "v", "--key", "alias/one"]);
    with(&["volume", "rewrap", "v"]);
    site.store.ok(&["kms", "store", "disconnect", "one"]);
    let mut connect = site.store.command();
    connect.args(["kms", "store", "connect", "one", &format!("--pinentry={}", right.display())]);
    assert!(connect.status().expect("start sealblk").success());
    assert_eq!(site.hsm.keys(), 1);
}

#[test]
fn a_pinentry_that_gives_no_pin_makes_no_key_store() {
    let site = Site::new();
    for (answer, code, words) in [
        ("echo 'ERR 83886179 Operation cancelled <Pinentry>'", 5, "it was cancelled"),
        ("echo 'ERR 83886142 Timeout <Pinentry>'", 5, "nobody gave one in time"),
        ("head -c 100000 /dev/zero | tr '\\0' x", 2, "too long"),
        ("head -c 300 /dev/urandom | od -c", 2, "it says what no pinentry says"),
        ("kill -9 $$", 2, "is gone before it gave a PIN"),
        (&gives("not-the-pin"), 5, "CKR_PIN_INCORRECT"),
    ] {
        let output = site.add(&site.pinentry(answer)).output().expect("start sealblk");
        assert_eq!(output.status.code(), Some(code), "{answer}: {}", said(&output));
        assert!(said(&output).contains(words), "{answer}: {}", said(&output));
        assert!(!said(&output).contains("not-the-pin") && !said(&output).contains("xxxx"));
        assert_eq!(site.key_stores(), 0, "{answer}");
    }
    let output = site.add(Path::new("/nowhere/pinentry")).output().expect("start sealblk");
    assert!(output.status.code() == Some(2) && said(&output).contains("No such file"), "{}", said(&output));
}

/// Runs `command`, types `keys` at its terminal when that shows `prompt`, and returns what it said and
/// what the terminal has shown.
fn at_terminal(mut command: Command, prompt: &'static str, keys: &'static [u8]) -> (Output, String) {
    let pty = openpty(None, None).expect("a terminal");
    let name = ttyname(&pty.slave).expect("its name");
    command.env("GPG_TTY", &name).env("TERM", "vt100").stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("start sealblk");
    let mut master = File::from(pty.master);
    let mut keyboard = master.try_clone().expect("another descriptor");
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let mut part = [0; 1024];
        while let Ok(count @ 1..) = master.read(&mut part) {
            if send.send(part[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut shown = Vec::new();
    while !String::from_utf8_lossy(&shown).contains(prompt) {
        let part = receive.recv_timeout(limit());
        shown.extend(part.unwrap_or_else(|_| panic!("{prompt}: {}", String::from_utf8_lossy(&shown))));
    }
    keyboard.write_all(keys).expect("type");
    let output = child.wait_with_output().expect("wait");
    shown.extend(receive.try_iter().flatten());
    drop(pty.slave);
    (output, String::from_utf8_lossy(&shown).into_owned())
}

#[test]
fn debians_pinentries_ask_at_the_terminal() {
    let cache = std::env::var_os("SEALBLK_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/ci"));
    let tree = cache.join("pinentry");
    assert!(tree.exists(), "there is no {}; run ./ci/setup first", tree.display());
    let libraries = format!("{0}/usr/lib/x86_64-linux-gnu:{0}/lib/x86_64-linux-gnu", tree.display());
    for (name, prompt) in [("pinentry-curses", "<OK>"), ("pinentry-tty", "PIN")] {
        let site = Site::new();
        let script = format!("LD_LIBRARY_PATH={libraries} exec {}/usr/bin/{name} \"$@\"", tree.display());
        let program = site.program(name, &script);
        let (output, shown) = at_terminal(site.add(&program), prompt, b"wrong-pin\r");
        assert_eq!(output.status.code(), Some(5), "{name}: {}", said(&output));
        assert!(said(&output).contains("CKR_PIN_INCORRECT"), "{name}: {}", said(&output));
        assert!(!shown.contains("wrong-pin"), "it is not shown: {shown}");
        let (output, shown) = at_terminal(site.add(&program), prompt, b"pin-of-the-token-one\r");
        assert!(output.status.success(), "{name}: {}\n{shown}", said(&output));
        assert_eq!(site.key_stores(), 1);
    }
    // By way of its other button.
    let site = Site::new();
    let script = format!("LD_LIBRARY_PATH={libraries} exec {}/usr/bin/pinentry-curses", tree.display());
    let program = site.program("pinentry-curses", &script);
    let (output, _) = at_terminal(site.add(&program), "<OK>", b"\t\t\r");
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(said(&output).contains("it was cancelled"), "{}", said(&output));
}
