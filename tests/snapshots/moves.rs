//! A volume moves to another host by a place that both reach: there in the end, and here no more; or called
//! off, and never in both.

use crate::common::attach::{Place, flush, open, write};
use crate::common::content::Reader;
use crate::common::disk::pattern;
use crate::common::frontend::{Request, Segment, SplitRing, block};
use crate::common::killed::{End, killed_before};
use crate::common::kms_server::{KmsServer, Variables};
use crate::common::patience::{limit, wait_for};
use crate::common::process::{tie_to_test, wait_within};
use crate::common::rig::{Rig, files};
use crate::common::store::{Store, said};
use crate::outside::Outside;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs;
use std::process::{Child, Output, Stdio};

/// A host with a volume `t`, another one without, and the KMS that both reach.
pub struct Hosts {
    pub _kms: KmsServer,
    pub rig: Rig,
    pub other: Store,
    pub variables: Variables,
    pub key: String,
}

impl Hosts {
    pub fn new() -> Self {
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

/// Makes so many sectors zeros, and gives their space back.
fn zero(ring: &mut SplitRing, sector: u64, count: u32) {
    let segment = Segment { sector, count, flags: 1 };
    let outcome = Request::write_zeroes(&[segment]).run(ring).expect("the request completes");
    assert_eq!(outcome.status, block::OK);
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
pub fn end(mut child: Child) -> Output {
    if !matches!(child.try_wait(), Ok(Some(_))) {
        wait_within(&mut child, limit()).expect("it ends");
    }
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

/// What a volume holds, as the program says.
pub fn content(store: &Store, volume: &str) -> Vec<u8> {
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
    assert_eq!(received["came_ahead"], json!(true));
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
    kill(Pid::from_raw(sends.id() as i32), Signal::SIGTERM).expect("send a signal");
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

/// A place that has the other host's word can show it to the sender, and say to the other host that the move
/// was called off: what was pulled is kept then.
#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn a_place_that_says_two_things_has_the_volume_deleted_on_one_host_at_most() {
    let Hosts { _kms, mut rig, other, key, .. } = Hosts::new();
    crate::outside::write_to(&mut rig, 0, &pattern(8, 4 << 20));
    let (outside, store) = (Outside::new(), &rig.place.store);
    let sends = start(store, &["volume", "send", "t", &outside.url(), "--wait", "120"]);
    let last = last_snapshot(&outside, &[]);
    // It says that it has the volume, and cannot make the volume: the name is taken meanwhile.
    let receive = ["volume", "receive", &outside.url(), "t", "--wait", "30"];
    let slowly = [&receive[..], &["--limit", "1MiB"]].concat();
    let mut receives = start(&other, &slowly);
    wait_for("it comes", || match (in_the_making(&other).is_empty(), receives.try_wait()) {
        (false, _) => Ok(()),
        (true, ended) => Err(format!("nothing comes: {ended:?}")),
    });
    other.ok(&["volume", "create", "--size", "1MiB", "--name", "t", "--key", &key]);
    let told = end(receives);
    assert!(
        told.status.code() == Some(4) && said(&told).contains("was told that it is here"),
        "{}",
        said(&told)
    );
    let sent = end(sends);
    assert!(sent.status.success(), "{}", said(&sent));
    rig.refuse(3, &["volume", "show", "t"]);
    other.ok(&["volume", "rename", "t", "another"]);
    fs::write(outside.path().join("moves").join(&last), "sealblk move 1 withdrawn\n").expect("write a file");
    for _ in 0..2 {
        let told = other.run(&receive);
        assert!(told.status.code() == Some(4) && said(&told).contains("is kept here"), "{}", said(&told));
    }
    let kept = other.ok(&["snapshot", "list", "--json"]);
    let kept: Vec<Value> = serde_json::from_str(&kept).expect("JSON");
    let [kept] = &kept[..] else { panic!("{kept:?}") };
    let id = kept["id"].as_str().expect("an id");
    other.ok(&["volume", "create", "--snapshot", id, "--name", "t"]);
    assert!(content(&other, "t") == rig.data);
}

/// Whoever sends a volume chooses the snapshot's id. One that a volume was made of already leads
/// to nothing of that volume.
#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn an_id_that_a_volume_was_made_of_does_not_lead_to_that_volume() {
    let Hosts { _kms, rig, other, key, .. } = Hosts::new();
    let (outside, store) = (Outside::new(), &rig.place.store);
    store.ok(&["volume", "modify", "t", "--iops", "500"]);
    let sends = start(store, &["volume", "send", "t", &outside.url(), "--wait", "120"]);
    let last = last_snapshot(&outside, &[]);
    let mark = format!("sealblk:restored={last}");
    other.ok(&["volume", "create", "--size", "1MiB", "--name", "another", "--key", &key, "--tag", &mark]);
    let shown = || other.ok(&["volume", "show", "another", "--json"]);
    let before = shown();
    let told = other.run(&["volume", "receive", &outside.url(), "t", "--wait", "30"]);
    assert!(told.status.code() == Some(4) && said(&told).contains("another snapshot"), "{}", said(&told));
    assert_eq!(shown(), before);
    assert_eq!(other.ok(&["snapshot", "list", "--json"]).trim(), "[]");
    // Nobody was told that it has come.
    assert!(!outside.path().join("moves").join(&last).exists());
    kill(Pid::from_raw(sends.id() as i32), Signal::SIGTERM).expect("send a signal");
    assert!(!end(sends).status.success());
    assert!(content(store, "t") == rig.data);
}

/// The records of snapshots in the making, without white space.
fn in_the_making(store: &Store) -> Vec<String> {
    let all = files(&store.root().join("snapshots"));
    let copying = all.into_iter().filter(|path| path.extension().is_some_and(|e| e == "copying"));
    copying.map(|path| fs::read_to_string(path).unwrap_or_default().split_whitespace().collect()).collect()
}

/// What has changed since the most of it came is written over it, and what is not there any more is not
/// there on the other host; also if that is killed while it does so, and has forgotten what it had.
#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn what_has_changed_since_the_most_of_it_came_is_all_that_comes_in_the_end() {
    for is_killed in [false, true] {
        let Hosts { _kms, mut rig, other, .. } = Hosts::new();
        let (outside, store) = (Outside::new(), &rig.place.store);
        let attached = store.attach("t", &[]);
        let mut session = open(attached.socket());
        let bytes = pattern(6, 3 << 20);
        write(&mut session.rings[0], 4 << 11, &bytes);
        flush(&mut session.rings[0]);
        rig.data[4 << 20..][..bytes.len()].copy_from_slice(&bytes);
        // Slowly, so that there is time to write while it comes.
        let arguments = ["volume", "receive", &outside.url(), "t", "--limit", "1MiB", "--json"];
        let mut receives = start(&other, &arguments);
        let sends = start(store, &["volume", "send", "t", &outside.url(), "--json"]);
        wait_for("it comes ahead", || match (in_the_making(&other).is_empty(), receives.try_wait()) {
            (false, _) => Ok(()),
            (true, ended) => Err(format!("nothing comes: {ended:?}")),
        });
        // A block that is there is changed in a part, another one whole, one is new, and two go.
        for (n, at, len) in [(7, 4 << 20, 4096), (8, 5 << 20, 512 << 10), (9, 3 << 20, 4096)] {
            let bytes = pattern(n, len);
            write(&mut session.rings[0], at as u64 / 512, &bytes);
            rig.data[at..at + len].copy_from_slice(&bytes);
        }
        zero(&mut session.rings[0], 6 << 11, 1 << 11);
        rig.data[6 << 20..7 << 20].fill(0);
        flush(&mut session.rings[0]);
        if is_killed {
            wait_for("it becomes the last one", || {
                match in_the_making(&other).iter().any(|text| text.contains("\"sealblk:sent\":\"last\"")) {
                    true => Ok(()),
                    false => Err("it is the first one"),
                }
            });
            receives.kill().expect("end it");
            end(receives);
            receives = start(&other, &arguments);
        }
        let (sent, received) = (end(sends), end(receives));
        assert!(sent.status.success() && received.status.success(), "{} {}", said(&sent), said(&received));
        drop(session);
        attached.ends();
        let received: Value = serde_json::from_slice(&received.stdout).unwrap();
        assert_eq!(received["came_ahead"], json!(!is_killed), "{received}");
        assert!(content(&other, "t") == rig.data, "killed: {is_killed}");
        assert!(in_the_making(&other).is_empty());
        other.ok(&["gc"]);
        let reader = Reader::new(&other.root(), other.config());
        assert_eq!(files(&other.root().join("layers")).len(), 2, "{:?}", reader.volume("t").layers());
    }
}

/// A sender that is killed at any moment has not lost the volume, and its next try brings it to the other
/// host or finds that it is there.
#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn a_sender_that_is_killed_finds_out_who_has_the_volume() {
    let Hosts { _kms, rig, other, .. } = Hosts::new();
    let stores = [&rig.place.store, &other];
    let is_there = |store: &Store| store.run(&["volume", "show", "t"]).status.success();
    // Many of the calls are alike: every so many of them, others each time round.
    for (round, step) in (0..).map(|n| n * 6 + n % 6).enumerate() {
        assert!(step < 400, "it never ends");
        let (from, to) = (stores[round % 2], stores[(round + 1) % 2]);
        let outside = Outside::new();
        let url = outside.url();
        let receive = ["volume", "receive", &url, "t", "--wait", "60"];
        let send = ["volume", "send", "t", &url, "--wait", "60"];
        let mut receives = start(to, &receive);
        let mut command = from.command();
        command.args(send).stdout(Stdio::null()).stderr(Stdio::null());
        let ended = killed_before(&mut command, step);
        if ended != End::Exited(0) {
            assert_eq!(ended, End::Killed, "step {step}");
            let was_here = is_there(from);
            assert!(was_here || is_there(to), "step {step}: it is lost");
            let mut again = start(from, &send);
            wait_for("the second try ends", || {
                // What was called off ends whoever was about to take it.
                let taker = receives.try_wait().expect("ask for it");
                if taker.is_some_and(|status| !status.success()) {
                    receives = start(to, &receive);
                }
                again.try_wait().expect("ask for it").ok_or("it runs")
            });
            let again = end(again);
            let told = said(&again);
            match again.status.code() {
                // It was all but over: what is left is snapshots, without their volume.
                Some(3) => {
                    assert!(!was_here && told.contains("no volume"), "step {step}: {told}");
                    let left = from.ok(&["snapshot", "list", "--json"]);
                    let left: Vec<Value> = serde_json::from_str(&left).expect("JSON");
                    for snapshot in left {
                        assert!(snapshot["tags"]["sealblk:sent"].is_string(), "step {step}: {snapshot}");
                        from.ok(&["snapshot", "delete", snapshot["id"].as_str().expect("an id")]);
                    }
                }
                code => assert_eq!(code, Some(0), "step {step}: {told}"),
            }
        }
        let received = end(receives);
        assert!(received.status.success(), "step {step}: {}", said(&received));
        assert!(content(to, "t") == rig.data, "step {step}");
        assert!(!is_there(from), "step {step}");
        from.ok(&["gc"]);
        assert_eq!(from.ok(&["snapshot", "list", "--json"]).trim(), "[]", "step {step}");
        if ended == End::Exited(0) {
            break;
        }
    }
}

/// Killed after the other host took the volume and before it knew: the next try ends the move, unless the
/// volume was used here since. Then nothing is deleted.
#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "no KMS that two hosts can reach")]
fn what_the_other_host_has_is_not_sent_to_it_again() {
    for is_written in [false, true] {
        let Hosts { _kms, mut rig, other, .. } = Hosts::new();
        let outside = Outside::new();
        let send = ["volume", "send", "t", &outside.url(), "--wait", "120"];
        let mut sends = start(&rig.place.store, &send);
        last_snapshot(&outside, &[]);
        let pid = Pid::from_raw(sends.id() as i32);
        kill(pid, Signal::SIGSTOP).expect("it runs");
        other.ok(&["volume", "receive", &outside.url(), "t"]);
        sends.kill().expect("end it");
        end(sends);
        let before = rig.data.clone();
        if is_written {
            crate::outside::write_to(&mut rig, 0, &pattern(9, 4096));
        }
        let again = end(start(&rig.place.store, &send));
        let told = said(&again);
        assert!(told.contains("another host has it already"), "{told}");
        assert!(content(&other, "t") == before);
        match is_written {
            false => {
                assert!(again.status.success(), "{told}");
                rig.refuse(3, &["volume", "show", "t"]);
                assert!(rig.files("snapshots").is_empty() && rig.files("layers").is_empty());
            }
            true => {
                assert!(again.status.code() == Some(4) && told.contains("there are two of it now"), "{told}");
                assert!(content(&rig.place.store, "t") == rig.data);
                // The next one says the same.
                assert_eq!(end(start(&rig.place.store, &send)).status.code(), Some(4));
            }
        }
    }
}
