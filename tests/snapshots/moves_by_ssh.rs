//! A volume moves to another host by a connection: by ssh, or by whatever has made two streams. And what goes
//! wrong on the way: the other end says nothing, something else, too much, or is gone.

use crate::common::attach::{flush, open, write};
use crate::common::disk::pattern;
use crate::common::helpers::helper;
use crate::common::leaks::{Needles, look_through};
use crate::common::patience::{limit, wait_for};
use crate::common::process::{tie_to_test, wait_within};
use crate::common::rig::{Rig, files};
use crate::common::store::{Store, said};
use crate::moves::{Hosts, content, end};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};

/// What stands for ssh: it runs the command here, with nothing of what it was started with.
const SSH: &str =
    "#!/bin/sh\n[ \"$1 $2 $3\" = '-T -- root@other' ] || exit 255\nexec env -i /bin/sh -c \"$4\"\n";

/// A folder with an `ssh` that leads to another host's store.
struct Ssh {
    folder: tempfile::TempDir,
}

impl Ssh {
    fn new() -> Self {
        let ssh = Ssh { folder: tempfile::tempdir().expect("make a temporary folder") };
        ssh.script("ssh", SSH);
        ssh
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).expect("write a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it a program");
        path
    }

    /// The command there that runs the program with these arguments, after this beginning of a script.
    fn remote(&self, other: &Store, arguments: &str, first: &str) -> String {
        let command = other.command();
        let quoted = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
        let mut text = format!("#!/bin/sh\n{first}\n");
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                let value = quoted(value.to_str().expect("UTF-8"));
                text.push_str(&format!("export {}={value}\n", name.to_str().expect("UTF-8")));
            }
        }
        let words = [command.get_program()].into_iter().chain(command.get_args());
        let words: Vec<_> = words.map(|word| quoted(word.to_str().expect("UTF-8"))).collect();
        text.push_str(&format!("exec {} {arguments}\n", words.join(" ")));
        self.script("remote", &text).display().to_string()
    }

    /// Starts `volume send t --to` the other host, whose command this is.
    fn start(&self, store: &Store, remote: &str, more: &[&str]) -> Child {
        let mut command = store.command();
        let path = format!("{}:{}", self.folder.path().display(), std::env::var("PATH").expect("a path"));
        command.args(["volume", "send", "t", "--to", "ssh:root@other", "--remote-command", remote, "--json"]);
        command.args(more).env("PATH", path).env("TMPDIR", self.temporary());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        tie_to_test(&mut command, vec![]);
        command.spawn().expect("start sealblk")
    }

    /// The folder for temporary files, which nothing may be left in.
    fn temporary(&self) -> PathBuf {
        let path = self.folder.path().join("tmp");
        fs::create_dir_all(&path).expect("make a folder");
        path
    }
}

/// What lies where volumes arrive.
fn arrived(other: &Store) -> Vec<String> {
    let name = |path: &PathBuf| path.file_name().expect("a name").to_str().expect("UTF-8").to_owned();
    let mut names: Vec<String> = files(&other.root().join("arrivals/place")).iter().map(name).collect();
    names.sort();
    names
}

#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn a_volume_goes_to_another_host_by_ssh_while_it_is_used() {
    let Hosts { _kms, mut rig, other, .. } = Hosts::new();
    let (ssh, store) = (Ssh::new(), &rig.place.store);
    let remote = ssh.remote(&other, "volume receive -", "");
    let attached = store.attach("t", &[]);
    let mut session = open(attached.socket());
    let bytes = pattern(6, 64 << 10);
    write(&mut session.rings[0], 3 << 11, &bytes);
    flush(&mut session.rings[0]);
    rig.data[3 << 20..][..bytes.len()].copy_from_slice(&bytes);
    let sends = ssh.start(store, &remote, &[]);
    let sent = end(sends);
    assert!(sent.status.success(), "{}", said(&sent));
    drop(session);
    attached.ends();
    let done: Value = serde_json::from_slice(&sent.stdout).expect("JSON");
    assert!(done["sent_before"].as_u64() > done["sent_after"].as_u64(), "{done}");
    assert!(done["downtime_ms"].is_u64() && done["kept"] == json!(false), "{done}");
    assert!(content(&other, "t") == rig.data);
    other.attach("t", &[]).detach();
    rig.refuse(3, &["volume", "show", "t"]);
    assert!(rig.files("snapshots").is_empty());
    assert_eq!(other.ok(&["snapshot", "list", "--json"]).trim(), "[]");
    // What says that it has come stays there; what it came by does not, on either host.
    assert_eq!(arrived(&other), ["moves", "place.json"]);
    assert!(files(&ssh.temporary()).is_empty(), "{:?}", files(&ssh.temporary()));
    // The other host's word is of no use any more, and clearing up removes nothing of it.
    other.ok(&["gc"]);
    assert_eq!(arrived(&other), ["moves", "place.json"]);
}

#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn two_streams_are_a_connection_as_well() {
    let Hosts { _kms, rig, other, .. } = Hosts::new();
    let pipe = || std::io::pipe().expect("make a pipe");
    let ((there, to_other), (here, to_us)) = (pipe(), pipe());
    let start = |store: &Store, arguments: &[&str], from: std::io::PipeReader, to: std::io::PipeWriter| {
        let mut command = store.command();
        command.args(arguments).stdin(from).stdout(to).stderr(Stdio::piped());
        tie_to_test(&mut command, vec![]);
        command.spawn().expect("start sealblk")
    };
    let receives = start(&other, &["volume", "receive", "-", "t", "--json"], there, to_us);
    let sends = start(&rig.place.store, &["volume", "send", "t", "-", "--keep"], here, to_other);
    let (sent, received) = (end(sends), end(receives));
    assert!(sent.status.success(), "{}", said(&sent));
    assert!(received.status.success(), "{}", said(&received));
    assert!(said(&sent).contains("stays here as well") && sent.stdout.is_empty(), "{}", said(&sent));
    let text = String::from_utf8(received.stderr).expect("UTF-8");
    let line = text.lines().find(|line| line.starts_with('{')).expect("it says what has come");
    let said_there: Value = serde_json::from_str(line).expect("JSON");
    assert_eq!((&said_there["came_ahead"], &said_there["name"]), (&json!(true), &json!("t")), "{said_there}");
    assert!(content(&other, "t") == rig.data && content(&rig.place.store, "t") == rig.data);
    // Who has no connection is told so at once.
    let told = rig.place.store.run(&["volume", "send", "t", "-"]);
    assert_eq!(told.status.code(), Some(1), "{}", said(&told));
    assert!(said(&told).contains("before it said anything"), "{}", said(&told));
    // Who waits for an answer that does not come can be interrupted.
    let (silent, _writer) = pipe();
    let mut command = rig.place.store.command();
    command.args(["volume", "send", "t", "-"]).stdin(silent).stdout(Stdio::piped()).stderr(Stdio::piped());
    tie_to_test(&mut command, vec![]);
    let mut waits = command.spawn().expect("start sealblk");
    let mut hello = [0; 16];
    waits.stdout.as_mut().expect("piped").read_exact(&mut hello).expect("it greets");
    assert_eq!(&hello, b"sealblk place 1\n");
    kill(Pid::from_raw(waits.id() as i32), Signal::SIGTERM).expect("it runs");
    let ended = end(waits);
    assert!(!ended.status.success() && said(&ended).contains("interrupted"), "{}", said(&ended));
    rig.refuse(2, &["volume", "send", "t"]);
    rig.refuse(2, &["volume", "send", "t", "--to", "other"]);
    rig.refuse(2, &["volume", "send", "t", "--to", "ssh:-oProxyCommand=x"]);
    rig.refuse(2, &["volume", "send", "t", "-", "--to", "ssh:other"]);
    rig.refuse(2, &["volume", "receive", "-", "--limit", "1MiB"]);
}

#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn what_goes_wrong_on_the_way_leaves_the_volume_here_and_the_same_command_brings_it() {
    let Hosts { _kms, rig, other, .. } = Hosts::new();
    let (ssh, store) = (Ssh::new(), &rig.place.store);
    let stays = |remote: &str, more: &[&str], code: i32, words: &str| {
        let sent = end(ssh.start(store, remote, more));
        let told = said(&sent);
        assert!(sent.status.code() == Some(code) && told.contains(words), "{remote}: {told}");
        assert!(content(store, "t") == rig.data, "{remote}");
        assert!(rig.files("snapshots").is_empty(), "{remote}: {told}");
        assert!(files(&ssh.temporary()).is_empty(), "{remote}");
        assert_eq!(other.ok(&["volume", "list", "--json"]).trim(), "[]", "{remote}");
    };
    stays("exit 127", &[], 1, "before it said anything");
    stays("echo Last login: Mon; sleep 1", &[], 1, "that is not sealblk");
    stays("printf 'sealblk place 2\\n'; sleep 1", &[], 1, "use the same version");
    // A greeting, and then noise; a length without end.
    stays("printf 'sealblk place 1\\n'; yes", &[], 1, "a message of");
    stays("printf 'sealblk place 1\\n\\377\\377\\377\\377\\377\\377\\377\\377'; cat", &[], 1, "a message of");
    let full = ssh.remote(&other, "volume receive - --space-reserve 1000TiB", "");
    stays(&full, &[], 8, "the host that receives it has");
    let remote = ssh.remote(&other, "volume receive -", "");
    // The connection breaks while most of it is on the way: the process that has it there is killed.
    let sends = ssh.start(store, &remote, &["--limit", "128KiB"]);
    let server = helper(Pid::from_raw(sends.id() as i32), "serve-place");
    wait_for("a block is there", || match files(&other.root().join("arrivals/place")).len() {
        0 | 1 => Err("nothing"),
        _ => Ok(()),
    });
    kill(server, Signal::SIGKILL).expect("it runs");
    let sent = end(sends);
    assert!(!sent.status.success() && said(&sent).contains("connection"), "{}", said(&sent));
    assert!(content(store, "t") == rig.data);
    // What had come is cleared away by hand, or goes with the next volume that comes.
    let left: Value = serde_json::from_str(&other.ok(&["gc", "--dry-run", "--json"])).expect("JSON");
    assert!(left.to_string().contains("arrival"), "{left}");
    other.ok(&["gc"]);
    assert_eq!(arrived(&other), ["place.json"]);
    let sent = end(ssh.start(store, &remote, &[]));
    assert!(sent.status.success(), "{}", said(&sent));
    assert!(content(&other, "t") == rig.data);
    rig.refuse(3, &["volume", "show", "t"]);
}

/// Another host that says what no sealblk says.
struct Peer {
    receives: Child,
    number: u64,
}

impl Peer {
    fn connect(other: &Store) -> Self {
        let mut command = other.command();
        command.args(["volume", "receive", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        tie_to_test(&mut command, vec![]);
        let mut peer = Peer { receives: command.spawn().expect("start sealblk"), number: 0 };
        peer.say(b"sealblk place 1\n");
        let mut hello = [0; 16];
        peer.receives.stdout.as_mut().expect("piped").read_exact(&mut hello).expect("it greets");
        assert_eq!(&hello, b"sealblk place 1\n");
        peer
    }

    fn say(&mut self, bytes: &[u8]) {
        self.receives.stdin.as_mut().expect("piped").write_all(bytes).expect("it hears");
    }

    /// What comes of a request: its outcome.
    fn ask(&mut self, what: &Value, object: &[u8]) -> Value {
        self.number += 1;
        let header = json!({ "number": self.number, "what": what }).to_string();
        let lengths = [header.len() as u32, object.len() as u32].map(u32::to_le_bytes).concat();
        self.say(&[&lengths, header.as_bytes(), object].concat());
        let from = self.receives.stdout.as_mut().expect("piped");
        let mut lengths = [0; 8];
        from.read_exact(&mut lengths).expect("it answers");
        let length = |at: usize| u32::from_le_bytes(lengths[at..at + 4].try_into().expect("four")) as usize;
        let (mut header, mut object) = (vec![0; length(0)], vec![0; length(4)]);
        from.read_exact(&mut header).expect("it answers");
        from.read_exact(&mut object).expect("it answers");
        let answer: Value = serde_json::from_slice(&header).expect("JSON");
        assert_eq!(answer["number"], json!(self.number));
        answer["outcome"].clone()
    }
}

/// Whoever may start "volume receive -" brings a volume, and does nothing else there.
#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn who_brings_no_volume_changes_nothing_that_another_one_needs() {
    let Hosts { _kms, rig, other, .. } = Hosts::new();
    let place = other.root().join("arrivals/place");
    let mut peer = Peer::connect(&other);
    let id = fs::read(place.join("place.json")).expect("the place is begun");
    let moves = format!("moves/{}", "snap-0123456789abcdef0");
    let put = |name: &str, put: &str| json!({ "put": { "name": name, "put": put } });
    let withdrawn = b"sealblk move 1 withdrawn\n";
    assert_eq!(peer.ask(&put(&moves, "if-new"), withdrawn), json!({ "done": true }));
    assert_eq!(peer.ask(&put("place.json", "if-new"), b"x"), json!({ "done": false }));
    for (what, object) in [
        (put("place.json", "replace"), &b"x"[..]),
        (put("place.json/x", "if-new"), b"x"),
        (put("moves/snap-0123456789abcdef1", "if-new"), b"another word"),
        (put(&moves, "replace"), withdrawn),
        (put("others/x", "if-new"), b"x"),
        (put("blocks/x", "if-new"), b"x"),
        (json!({ "remove": { "name": moves } }), b""),
        (json!({ "remove": { "name": "place.json" } }), b""),
        (json!({ "list": { "folder": "moves" } }), b""),
    ] {
        let outcome = peer.ask(&what, object);
        let words = outcome["failed"][1].as_str().unwrap_or_default();
        assert!(words.contains("lets nobody do that"), "{what}: {outcome}");
    }
    drop(peer.receives.stdin.take());
    let ended = end(peer.receives);
    assert!(!ended.status.success(), "{}", said(&ended));
    assert_eq!(arrived(&other), ["moves", "place.json"]);
    assert_eq!(fs::read(place.join("place.json")).expect("it is there"), id);
    assert_eq!(fs::read(place.join(&moves)).expect("it is there"), withdrawn);
    // A place without its id, whoever has taken that, is put right, and a volume comes.
    fs::write(place.join("place.json"), "x").expect("write a file");
    let ssh = Ssh::new();
    let sent = end(ssh.start(&rig.place.store, &ssh.remote(&other, "volume receive -", ""), &[]));
    assert!(sent.status.success(), "{}", said(&sent));
    assert!(content(&other, "t") == rig.data);
    // As it is when this host has noted the id.
    let id = fs::read(place.join("place.json")).expect("it is there");
    fs::write(place.join("place.json"), "x").expect("write a file");
    drop(Peer::connect(&other).receives.wait_with_output());
    assert_eq!(fs::read(place.join("place.json")).expect("it is there"), id);
}

/// While a volume goes slowly: the processes that hear the other host have no key, no network, and are
/// confined.
#[test]
fn who_hears_the_other_host_has_no_key_and_is_confined() {
    // No KMS is asked there before most of it has come.
    let (mut rig, other) = (Rig::new(&[]), Store::new());
    crate::outside::write_to(&mut rig, 0, &pattern(8, 4 << 20));
    let (ssh, dek) = (Ssh::new(), rig.place.dek());
    let remote = ssh.remote(&other, "volume receive -", "");
    let mut sends = ssh.start(&rig.place.store, &remote, &["--limit", "256KiB"]);
    let pid = Pid::from_raw(sends.id() as i32);
    let step = helper(pid, "backup-step");
    let (relay, server) = (helper(pid, "relay"), helper(pid, "serve-place"));
    wait_for("two blocks are there", || match files(&other.root().join("arrivals/place/blocks")).len() {
        0 | 1 => Err("nothing"),
        _ => Ok(()),
    });
    [relay, server].iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).expect("it runs"));
    let needles = Needles::of_key(&dek);
    for pid in [relay, server] {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
            assert!(status.contains(line), "{line}: {status}");
        }
        let found = look_through(pid, &needles);
        assert!(found.found.is_empty(), "{:?}", found.found);
    }
    // Whoever does not find what is there is not looking.
    assert!(!look_through(server, &Needles::words("arrivals/place")).found.is_empty());
    let network = fs::read_to_string(format!("/proc/{step}/status")).expect("it runs");
    assert!(network.contains("Seccomp:\t2"), "{network}");
    sends.kill().expect("end it");
    let ended = wait_within(&mut sends, limit()).expect("it ends");
    assert_eq!(ended.signal(), Some(9));
    // With whoever started it, each of them ends, on this host and on the other.
    for pid in [relay, server] {
        let _ = kill(pid, Signal::SIGCONT);
        wait_for("it ends", || match fs::read(format!("/proc/{pid}/environ")) {
            Ok(bytes) if !bytes.is_empty() => Err("it runs"),
            _ => Ok(()),
        });
    }
}
