//! A volume moves to another host by a place that both reach: there in the end, and here no more; or called
//! off, and never in both.

use crate::common::attach::{Place, flush, open, write};
use crate::common::disk::pattern;
use crate::common::kms_server::{KmsServer, Variables};
use crate::common::patience::{limit, wait_for};
use crate::common::process::{tie_to_test, wait_within};
use crate::common::rig::{Rig, files};
use crate::common::store::{Store, said};
use crate::outside::Outside;
use serde_json::{Value, json};
use std::fs;
use std::process::{Child, Output, Stdio};

/// A host with a volume `t`, another one without, and the KMS that both reach.
struct Hosts {
    _kms: KmsServer,
    rig: Rig,
    other: Store,
    variables: Variables,
    key: String,
}

impl Hosts {
    fn new() -> Self {
        let kms = KmsServer::start();
        let (key, variables) = (kms.create_key(), kms.principal("root").environment(&kms.url));
        let (store, other) = (Store::new(), Store::new());
        store.set_environment(variables.clone());
        other.set_environment(variables.clone());
        let key = format!("aws:{key}");
        let rig = Rig::of(Place::of(store, &["--key", &key, "--tag", "env=prod"]));
        Hosts { _kms: kms, rig, other, variables, key }
    }
}

/// Starts a command in the background.
fn start(store: &Store, arguments: &[&str]) -> Child {
    let mut command = store.command();
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    tie_to_test(&mut command, vec![]);
    command.spawn().expect("start sealblk")
}

/// Waits until it has ended.
#[track_caller]
fn end(mut child: Child) -> Output {
    wait_within(&mut child, limit()).expect("it ends");
    child.wait_with_output().expect("read what it said")
}

/// Waits until the last snapshot of a volume is in the place, which is none of `others`, and returns its id.
fn last_snapshot(outside: &Outside, others: &[String]) -> String {
    let mut found = String::new();
    wait_for("the last snapshot is there", || {
        for path in files(&outside.path().join("snapshots")) {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let id = path.file_stem().expect("a name").to_str().expect("UTF-8").to_owned();
            if text.contains("\"sealblk:sent\":\"last\"") && !others.contains(&id) {
                found = id;
                return Ok(());
            }
        }
        Err("it is not there".to_owned())
    });
    found
}

fn content(store: &Store, volume: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("make a temporary folder");
    let file = folder.path().join("exported");
    store.ok(&["volume", "export", volume, file.to_str().expect("UTF-8")]);
    fs::read(file).expect("read a file")
}

#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn a_volume_that_is_used_is_on_the_other_host_in_the_end_and_here_no_more() {
    let Hosts { _kms, mut rig, other, .. } = Hosts::new();
    let (outside, store) = (Outside::new(), &rig.place.store);
    store.ok(&["volume", "modify", "t", "--iops", "500"]);
    rig.id(&["snapshot", "create", "t", "--name", "mine"]);
    // Whoever receives may wait already, for a place that is not begun.
    let receives = start(&other, &["volume", "receive", &outside.url(), "t", "--wait", "120", "--json"]);
    let attached = store.attach("t", &[]);
    let mut session = open(attached.socket());
    let bytes = pattern(6, 64 << 10);
    write(&mut session.rings[0], 3 << 11, &bytes);
    flush(&mut session.rings[0]);
    rig.data[3 << 20..][..bytes.len()].copy_from_slice(&bytes);
    let sent = rig.json(&["volume", "send", "t", &outside.url(), "--wait", "120"]);
    drop(session);
    attached.ends();
    let received = end(receives);
    assert!(received.status.success(), "{}", said(&received));
    let received: Value = serde_json::from_slice(&received.stdout).unwrap();
    assert_eq!((&received["snapshot"], &received["volume_was"]), (&sent["snapshot"], &sent["id"]));
    assert!(sent["downtime_ms"].is_u64() && sent["sent_before"].as_u64() > sent["sent_after"].as_u64());
    assert!(content(&other, "t") == rig.data);
    let shown: Value = serde_json::from_str(&other.ok(&["volume", "show", "t", "--json"])).unwrap();
    assert_eq!((&shown["tags"]["env"], &shown["attach"]["iops"]), (&json!("prod"), &json!(500)));
    other.attach("t", &[]).detach();
    // Here, only what nobody has made for it is left.
    rig.refuse(3, &["volume", "show", "t"]);
    let left: Value = serde_json::from_str(&rig.place.store.ok(&["snapshot", "list", "--json"])).unwrap();
    assert_eq!((left.as_array().unwrap().len(), &left[0]["tags"]["Name"]), (1, &json!("mine")));
    assert_eq!(other.ok(&["snapshot", "list", "--json"]).trim(), "[]");
    // It can be received once.
    let again = other.run(&["volume", "receive", &outside.url(), "--wait", "0"]);
    assert_eq!(again.status.code(), Some(3), "{}", said(&again));
    // No backup is taken for it.
    let none = other.run(&["restore", &outside.url()]);
    assert_eq!(none.status.code(), Some(3), "{}", said(&none));
    // What was brought for it goes with its snapshots.
    let sent: Vec<String> = files(&outside.path().join("snapshots"))
        .iter()
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    rig.json(&["snapshot", "remove", &outside.url(), &sent[0], &sent[1]]);
    assert!(files(&outside.path().join("moves")).is_empty() && outside.objects("blocks").is_empty());
}

#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn what_nobody_takes_is_called_off_and_cannot_be_taken_any_more() {
    let Hosts { _kms, rig, other, variables, key } = Hosts::new();
    let (outside, store) = (Outside::new(), &rig.place.store);
    let before = rig.files("layers");
    let told = rig.refuse(4, &["volume", "send", "t", &outside.url(), "--wait", "0"]);
    assert!(told.contains("no other host has taken it"), "{told}");
    assert!(content(store, "t") == rig.data && rig.files("snapshots").is_empty());
    rig.assert_layers_are_named();
    assert!(rig.files("layers").len() <= before.len() + 2);
    let told = other.run(&["volume", "receive", &outside.url(), "--wait", "0"]);
    assert_eq!(told.status.code(), Some(3), "{}", said(&told));
    // While the other host could still take it, nobody attaches it here; interrupted, it is called off.
    let called_off = last_snapshot(&outside, &[]);
    let sends = start(store, &["volume", "send", "t", &outside.url(), "--wait", "120"]);
    last_snapshot(&outside, &[called_off]);
    rig.refuse(4, &["volume", "rename", "t", "u"]);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(sends.id() as i32), nix::sys::signal::Signal::SIGTERM)
        .expect("send a signal");
    let ended = end(sends);
    assert!(!ended.status.success() && said(&ended).contains("interrupted"), "{}", said(&ended));
    let told = other.run(&["volume", "receive", &outside.url(), "--wait", "0"]);
    assert_eq!(told.status.code(), Some(3), "{}", said(&told));
    // Another host's word that was not written by who has the data key deletes nothing.
    let place = Outside::new();
    let sends = start(store, &["volume", "send", "t", &place.url(), "--wait", "120"]);
    let last = last_snapshot(&place, &[]);
    fs::create_dir_all(place.path().join("moves")).unwrap();
    let forged = format!("sealblk move 1 received {last} {}\n", "0".repeat(64));
    fs::write(place.path().join("moves").join(&last), forged).unwrap();
    let ended = end(sends);
    assert_eq!(ended.status.code(), Some(7), "{}", said(&ended));
    assert!(said(&ended).contains("the volume stays here"), "{}", said(&ended));
    assert!(content(store, "t") == rig.data);
    // A name that is taken there is told before anything is pulled.
    let taken = Store::new();
    taken.set_environment(variables);
    taken.ok(&["volume", "create", "--size", "1MiB", "--name", "t", "--key", &key]);
    let last_place = Outside::new();
    let sends = start(store, &["volume", "send", "t", &last_place.url(), "--wait", "120", "--keep"]);
    last_snapshot(&last_place, &[]);
    let told = taken.run(&["volume", "receive", &last_place.url(), "t", "--wait", "60"]);
    assert!(told.status.code() == Some(4) && said(&told).contains("has its name"), "{}", said(&told));
    let received = other.run(&["volume", "receive", &last_place.url(), "t", "--wait", "60"]);
    assert!(received.status.success(), "{}", said(&received));
    let ended = end(sends);
    assert!(ended.status.success() && said(&ended).contains("stays here as well"), "{}", said(&ended));
    assert!(content(store, "t") == rig.data && content(&other, "t") == rig.data);
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "clear", "--unencrypted"]);
    rig.refuse(8, &["volume", "send", "clear", &last_place.url()]);
    rig.refuse(2, &["volume", "send", "t", &last_place.of("snap-0123456789abcdef0")]);
    rig.refuse(3, &["volume", "send", "nothing", &last_place.url()]);
    // Where nothing can ever come, nobody waits.
    let told = rig.refuse(3, &["volume", "receive", "file:///there/is/no/such/folder"]);
    assert!(told.contains("no such folder"), "{told}");
}
