//! How an attach is asked for and how it ends.

use crate::common::attach::{Host, Place, flush, listens, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::session::{F_DISCARD, F_RO, F_WRITE_ZEROES};
use crate::common::frontend::{Options, Request, Segment, Session, block};
use crate::common::patience::limit;
use crate::common::store::{Store, said};
use nix::sys::signal::Signal;
use sealblk::catalog::lock::Held;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

/// The way that `end` knows ends the attachment in order: with a VMM connected, with one that
/// has left, and with none.
fn ends_in_order(end: impl Fn(&Place, Host)) {
    let place = Place::new(&[]);
    let data = pattern(1, 1 << 20);
    for vmm in ["connected", "gone", "never there"] {
        let host = place.attach(&[]);
        if vmm != "never there" {
            let mut session = open(&place.socket());
            write(&mut session.rings[0], 0, &data);
            if vmm == "gone" {
                drop(session);
            } else {
                std::mem::forget(session);
            }
        }
        end(&place, host);
        assert!(!place.socket().exists(), "VMM {vmm}: the socket is still there");
        assert!(!place.volume_folder().join("control.sock").exists(), "VMM {vmm}");
        assert_eq!(fs::read(place.volume_folder().join("lock")).unwrap(), b"", "VMM {vmm}");
    }
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    assert!(read(&mut session.rings[0], 0, data.len()) == data);
    host.end();
}

#[test]
fn sigterm_detaches() {
    ends_in_order(|_, host| {
        host.signal(Signal::SIGTERM);
        host.ends_well();
    });
}

#[test]
fn sigint_detaches() {
    ends_in_order(|_, host| {
        host.signal(Signal::SIGINT);
        host.ends_well();
    });
}

#[test]
fn the_detach_command_detaches() {
    ends_in_order(|place, host| {
        assert_eq!(place.store.ok(&["detach", "t"]), format!("{} is detached\n", place.id()));
        host.ends_well();
    });
}

#[test]
fn a_detach_lets_requests_in_flight_finish() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    let data = |n: u64| pattern(n + 1, 65536);
    let submit = |n| Request::write(128 * n, &data(n)).submit(&mut session.rings[0]);
    let pending: Vec<_> = (0..32).map(submit).collect::<Result<_, _>>().expect("room on the ring");
    session.rings[0].kick();
    place.store.ok(&["detach", "t"]);
    host.ends_well();
    let mut taken = vec![false; pending.len()];
    while let Some(used) = session.rings[0].pop_used() {
        let index = pending.iter().position(|p| u32::from(p.head) == used.id).expect("it is one of these");
        assert!(!std::mem::replace(&mut taken[index], true), "request {index} was completed twice");
    }
    drop(session);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    for (n, taken) in taken.into_iter().enumerate() {
        let found = read(&mut session.rings[0], 128 * n as u64, 65536);
        let untouched = found.iter().all(|b| *b == 0);
        assert!(found == data(n as u64) || (!taken && untouched), "request {n}, completed: {taken}");
    }
    host.end();
}

/// Who is told that a volume is detached may attach it at once, although the old process may still be ending.
#[test]
fn after_a_detach_the_volume_is_free_at_once() {
    let place = Place::new(&[]);
    let mut before: Option<Host> = None;
    for _ in 0..25 {
        let host = place.attach(&[]);
        if let Some(before) = before.replace(host) {
            before.ends_well();
        }
        place.store.ok(&["detach", "t"]);
    }
    place.store.ok(&["volume", "delete", "t"]);
    before.expect("there was a last one").ends_well();
}

/// Nothing of the attachment is left for one who looks at the very moment of the answer.
#[test]
fn a_detach_is_answered_when_nothing_is_left_of_it() {
    let place = Place::new(&[]);
    let control = place.volume_folder().join("control.sock");
    let volume = place.metadata().id();
    for _ in 0..20 {
        let host = place.attach(&[]);
        let mut client = UnixStream::connect(&control).unwrap();
        client.set_read_timeout(Some(limit())).unwrap();
        client.write_all(b"{\"op\":\"detach\"}\n").unwrap();
        let mut answer = String::new();
        BufReader::new(client).read_line(&mut answer).unwrap();
        assert!(!control.exists() && !place.socket().exists());
        assert_eq!(place.catalog().held(volume).unwrap(), Held::Free);
        assert_eq!(answer, "\"detached\"\n");
        host.ends_well();
    }
}

#[test]
fn a_control_client_that_talks_nonsense_is_told_so_and_changes_nothing() {
    let place = Place::new(&[]);
    let control = place.volume_folder().join("control.sock");
    let host = place.attach(&[]);
    let long = [b'x'; 5000];
    for words in [&b"\n"[..], b"detach\n", b"{\"op\":\"explode\"}\n", b"{\"op\":\"detach\",\"x\":1}\n", &long]
    {
        let mut client = UnixStream::connect(&control).unwrap();
        client.set_read_timeout(Some(limit())).unwrap();
        client.write_all(words).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        BufReader::new(client).read_line(&mut answer).unwrap();
        let answer: Value = serde_json::from_str(&answer).expect("an answer");
        assert_eq!(answer["failed"]["kind"], "usage", "{answer}");
    }
    assert!(listens(&place.socket()));
    host.end();
}

#[test]
fn what_is_not_attached_cannot_be_detached() {
    let place = Place::new(&[]);
    for (code, volume, words) in [(3, "t", "is not attached"), (3, "none", "there is no volume \"none\"")] {
        let output = place.store.run(&["detach", volume]);
        assert_eq!(output.status.code(), Some(code));
        assert!(said(&output).contains(words), "{}", said(&output));
    }
    let host = place.attach(&[]);
    let id = place.id();
    let told: Value = serde_json::from_str(&place.store.ok(&["detach", &id[..12], "--json"])).unwrap();
    assert_eq!(told, json!({"id": id, "state": "detached"}));
    host.ends_well();
}

#[test]
fn an_attach_says_what_it_serves_and_where() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let socket = place.socket().display().to_string();
    let line = format!("{} is attached and listens on {socket} (", place.id());
    assert!(host.output().starts_with(&line) && host.output().contains("XTS engine"), "{}", host.output());
    host.end();
    let host = place.attach(&["--json"]);
    let told: Value = serde_json::from_str(&host.output()).expect("one JSON value");
    assert_eq!((&told["id"], &told["state"]), (&json!(place.id()), &json!("attached")));
    assert_eq!(told["socket"], json!(socket));
    assert!(told["access"].as_str().expect("text").contains("XTS engine"));
    host.end();
}

#[test]
fn a_read_only_attach_refuses_writes() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    let data = pattern(1, 65536);
    write(&mut session.rings[0], 128, &data);
    host.end();
    let layer = fs::read(place.layer()).unwrap();

    let host = place.attach(&["--read-only"]);
    let mut session = open(&place.socket());
    assert_eq!(session.offered & F_RO, F_RO);
    assert_eq!(session.offered & (F_DISCARD | F_WRITE_ZEROES), 0);
    let range = [Segment { sector: 128, count: 8, flags: 0 }];
    let ring = &mut session.rings[0];
    for (request, status) in [
        (Request::write(128, &pattern(2, 4096)), block::IOERR),
        (Request::write(128, &pattern(2, 4096)), block::IOERR),
        (Request::discard(&range), block::UNSUPP),
        (Request::write_zeroes(&range), block::UNSUPP),
    ] {
        assert_eq!(request.run(ring).expect("it completes").status, status, "type {}", request.kind);
    }
    flush(ring);
    assert!(read(ring, 128, data.len()) == data);
    assert!(read(ring, 8192, 4096) == [0; 4096]);
    let opened = fs::read_dir(host.proc("fd")).unwrap().map(|fd| fd.unwrap().path());
    let to_layer: Vec<_> =
        opened.filter(|fd| fs::read_link(fd).is_ok_and(|to| to == place.layer())).collect();
    assert!(!to_layer.is_empty());
    for fd in to_layer {
        let number = fd.file_name().unwrap().to_str().unwrap();
        let info = fs::read_to_string(host.proc("fdinfo").join(number)).unwrap();
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap().trim();
        let access = i32::from_str_radix(flags, 8).unwrap() & nix::libc::O_ACCMODE;
        assert_eq!(access, nix::libc::O_RDONLY, "the layer is open for writing");
    }
    host.end();
    assert!(fs::read(place.layer()).unwrap() == layer, "the layer has changed");
}

#[test]
fn the_serial_is_the_id_as_ebs_writes_it_or_what_one_says() {
    let place = Place::new(&[]);
    let serial = |arguments: &[&str]| {
        let host = place.attach(arguments);
        let outcome = Request::get_id(20).run(&mut open(&place.socket()).rings[0]).expect("it completes");
        assert_eq!(outcome.status, block::OK);
        host.end();
        String::from_utf8(outcome.data).expect("text").trim_end_matches('\0').to_owned()
    };
    assert_eq!(serial(&[]), place.id().replace('-', ""));
    assert_eq!(serial(&["--serial", "short"]), "short");
    assert_eq!(serial(&["--serial", "exactly-20-bytes-xxx"]), "exactly-20-bytes-xxx");
}

#[test]
fn queues_are_as_many_and_as_long_as_asked_for() {
    let place = Place::new(&[]);
    let host = place.attach(&["--queues", "3", "--queue-size", "64"]);
    let options = Options { queues: 3, queue_size: 64, ..Options::default() };
    let mut session = Session::open(&place.socket(), &options).expect("three queues of 64");
    let config = session.config().expect("the configuration");
    assert_eq!((config.num_queues, config.seg_max), (3, 62));
    for (n, ring) in session.rings.iter_mut().enumerate() {
        write(ring, 8 * n as u64, &pattern(n as u64, 4096));
    }
    drop(session);
    let too_long = Options { queue_size: 128, ..Options::default() };
    assert!(Session::open(&place.socket(), &too_long).is_err_and(|fault| fault.is_refusal()));
    host.end();
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    let place = Place::new(&[]);
    for arguments in [
        &["--queues", "0"][..],
        &["--queues", "65"],
        &["--queue-size", "0"],
        &["--queue-size", "2"],
        &["--queue-size", "100"],
        &["--queue-size", "2048"],
        &["--serial", "twenty-one-bytes-long"],
        &["--serial", "a b"],
        &["--serial", "Größe"],
        &["--xts-engine", "rot13"],
        &["--fd", "3"],
        &["--no-such-option"],
    ] {
        place.refuse(2, arguments);
    }
    for arguments in [&["attach", "t"][..], &["attach", "--socket-path", "x"], &["detach"]] {
        assert_eq!(place.store.run(arguments).status.code(), Some(2), "{arguments:?}");
    }
    let output = place.store.run(&["attach", "none", "--socket-path", "x"]);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
}

#[test]
fn capabilities_are_printed_without_a_store() {
    let store = Store::new();
    let told: Value = serde_json::from_str(&store.ok(&["attach", "--print-capabilities"])).expect("JSON");
    assert_eq!(told, json!({"type": "block", "features": ["read-only"]}));
    assert!(!store.root().exists() && !store.config().exists());
}

/// The program with the configuration folder of `place`, but not its root.
fn sealblk(place: &Place) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
    command.env("SEALBLK_CONFIG_DIR", place.store.config());
    command
}

/// A socket's address has 107 bytes at most, wherever the store lies.
#[test]
fn a_long_path_to_the_root_is_no_obstacle() {
    let place = Place::new(&[]);
    let mut long = place.folder();
    (0..4).for_each(|_| long.push("x".repeat(60)));
    fs::create_dir_all(&long).unwrap();
    long.push("root");
    fs::rename(place.store.root(), &long).unwrap();
    assert!(long.as_os_str().len() > 240);
    let long_store = |arguments: &[&str]| {
        let mut command = sealblk(&place);
        command.arg("--root").arg(&long).args(arguments);
        command
    };
    // It is another store by its path, until the operator says that it is right.
    let unknown = long_store(&["volume", "show", "t"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(7), "{}", said(&unknown));
    let accepted = long_store(&["store", "accept", "t"]).output().unwrap();
    assert!(accepted.status.success(), "{}", said(&accepted));
    let mut attach = long_store(&["attach", "t", "--socket-path"]);
    attach.arg(place.socket());
    let host = place.start(attach, vec![]);
    write(&mut open(&place.socket()).rings[0], 0, &pattern(1, 4096));
    let volume = fs::read_dir(long.join("volumes")).unwrap().next().unwrap().unwrap().path();
    assert!(volume.join("control.sock").exists());
    let busy = long_store(&["attach", "t", "--socket-path", "/nowhere"]).output().unwrap();
    assert_eq!(busy.status.code(), Some(4), "{}", said(&busy));
    let detach = long_store(&["detach", "t"]).output().unwrap();
    assert!(detach.status.success(), "{}", said(&detach));
    host.ends_well();
    assert!(!volume.join("control.sock").exists());
}

#[test]
fn relative_paths_mean_the_same_to_every_process() {
    let place = Place::new(&[]);
    let here = |folder: &Path, arguments: &[&str]| {
        let mut command = sealblk(&place);
        command.current_dir(folder).args(arguments);
        command
    };
    let folder = place.folder().join("run");
    fs::create_dir(&folder).unwrap();
    let arguments = ["--root", "../root", "attach", "t", "--socket-path", "relative.sock"];
    let host = place.start(here(&folder, &arguments), vec![]);
    assert!(listens(&folder.join("relative.sock")));
    let shown: Value = serde_json::from_str(&place.store.ok(&["volume", "show", "t", "--json"])).unwrap();
    assert_eq!(shown["attached_by"]["socket"], json!(folder.join("relative.sock").display().to_string()));
    let elsewhere = place.folder().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let detach = here(&elsewhere, &["--root", "../root", "detach", "t"]).output().unwrap();
    assert!(detach.status.success(), "{}", said(&detach));
    host.ends_well();
    assert!(!folder.join("relative.sock").exists());
}

#[test]
fn a_root_behind_a_symbolic_link_is_the_same_root() {
    let place = Place::new(&[]);
    let link = place.folder().join("link");
    symlink(place.store.root(), &link).unwrap();
    let mut command = sealblk(&place);
    command.env("SEALBLK_ROOT", &link);
    command.args(["attach", "t", "--socket-path"]).arg(place.socket());
    let host = place.start(command, vec![]);
    let mut second = place.store.command();
    second.args(["attach", "t", "--socket-path"]).arg(place.folder().join("second.sock"));
    assert_eq!(place.run(second, vec![]).code, 4);
    place.store.ok(&["detach", "t"]);
    host.ends_well();
}
