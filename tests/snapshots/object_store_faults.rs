//! What goes wrong with an object store at each request of whatever is done with it, one that is
//! slow, and one that is killed.

use crate::common::attach::{open, read};
use crate::common::frontend::Request;
use crate::common::patience::wait_for;
use crate::common::process::tie_to_test;
use crate::common::rig::Rig;
use crate::moves::end;
use crate::object_store::{PLACE, Protocol, Server};
use crate::outside::content;
use serde_json::json;
use std::process::{Child, Stdio};

/// A volume of which a snapshot is in the bucket.
fn pushed(s3: &Server) -> (Rig, String) {
    let rig = s3.rig();
    let id = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &id, PLACE]);
    (rig, id)
}

/// Does something again and again, each time with another request of it going wrong, every one of so many,
/// until it has no more.
#[track_caller]
fn at_each_request(s3: &Server, step: u64, mut act: impl FnMut()) {
    for kind in ["busy", "cut"] {
        for at in (0..).step_by(step as usize) {
            assert!(at < 2000, "it never ends");
            s3.fail(&json!({"kind": kind, "at": at}));
            act();
            if s3.count() <= at {
                break;
            }
        }
    }
    s3.fail(&json!({}));
}

#[test]
fn what_is_looked_for_in_a_store_is_found_whichever_request_goes_wrong() {
    let s3 = Server::start(Protocol::S3);
    let (rig, id) = pushed(&s3);
    at_each_request(&s3, 1, || {
        let listed = rig.json(&["snapshot", "list", PLACE]);
        assert_eq!(
            (&listed["snapshots"][0]["id"], listed["snapshots"].as_array().unwrap().len()),
            (&json!(id), 1)
        );
    });
    at_each_request(&s3, 1, || {
        let verified = rig.json(&["snapshot", "verify", PLACE]);
        assert_eq!(verified["snapshots"], json!([{"id": id, "blocks": 3, "problem": null}]));
    });
}

#[test]
fn what_comes_later_comes_whichever_request_goes_wrong() {
    let s3 = Server::start(Protocol::S3);
    let (rig, _) = pushed(&s3);
    at_each_request(&s3, 1, || {
        let back = rig.id(&["snapshot", "pull", PLACE, "--lazy", "--limit", "1"]);
        rig.place.store.ok(&["volume", "create", "--snapshot", &back, "--name", "c"]);
        let (host, socket) = rig.attach("c");
        let mut session = open(&socket);
        assert!(read(&mut session.rings[0], 0, 64 << 10) == rig.data[..64 << 10]);
        drop(session);
        host.end();
        rig.place.store.ok(&["snapshot", "complete", &back]);
        assert!(content(&rig, &back) == rig.data);
        rig.place.store.ok(&["volume", "delete", "c"]);
        rig.place.store.ok(&["snapshot", "delete", &back]);
    });
}

#[test]
fn what_is_removed_is_gone_whichever_request_goes_wrong() {
    let s3 = Server::start(Protocol::S3);
    let (rig, id) = pushed(&s3);
    // Each sweep lists 512 folders.
    at_each_request(&s3, 97, || {
        let other = rig.id(&["snapshot", "create", "t"]);
        rig.json(&["snapshot", "push", &other, PLACE]);
        rig.json(&["snapshot", "remove", &format!("{PLACE}/{other}")]);
        rig.place.store.ok(&["snapshot", "delete", &other]);
        let listed = rig.json(&["snapshot", "list", PLACE]);
        assert_eq!(
            (&listed["snapshots"][0]["id"], listed["snapshots"].as_array().unwrap().len()),
            (&json!(id), 1)
        );
    });
    let verified = rig.json(&["snapshot", "verify", PLACE]);
    assert_eq!(verified["snapshots"], json!([{"id": id, "blocks": 3, "problem": null}]));
}

#[test]
fn a_slow_store_is_waited_for() {
    let s3 = Server::start(Protocol::S3);
    s3.fail(&json!({"kind": "slow"}));
    let (rig, id) = pushed(&s3);
    rig.id(&["snapshot", "pull", PLACE, "--name", "s", "--lazy", "--limit", "1"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", "s", "--name", "c"]);
    let (host, socket) = rig.attach("c");
    let mut session = open(&socket);
    for at in (0..rig.data.len()).step_by(1 << 20) {
        assert!(read(&mut session.rings[0], at as u64 / 512, 64 << 10) == rig.data[at..at + (64 << 10)]);
    }
    drop(session);
    host.end();
    let verified = rig.json(&["snapshot", "verify", PLACE]);
    assert_eq!(verified["snapshots"], json!([{"id": id, "blocks": 3, "problem": null}]));
}

/// Starts a command in the background.
fn start(rig: &Rig, arguments: &[&str]) -> Child {
    let mut command = rig.place.store.command();
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
    tie_to_test(&mut command, vec![]);
    command.spawn().expect("start sealblk")
}

#[test]
fn a_store_that_is_killed_ends_a_push_in_words_and_makes_reads_wait() {
    let s3 = Server::start(Protocol::S3);
    let (rig, id) = pushed(&s3);
    rig.id(&["snapshot", "pull", PLACE, "--name", "s", "--lazy", "--limit", "1"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", "s", "--name", "c"]);
    let (host, socket) = rig.attach("c");
    let mut session = open(&socket);
    assert!(read(&mut session.rings[0], 0, 4096) == rig.data[..4096]);
    s3.fail(&json!({}));
    // All of it would take half a minute.
    let pushes = start(&rig, &["snapshot", "push", &id, "s3://bucket/other", "--limit", "8KiB"]);
    wait_for("it is under way", || match s3.count() {
        0..3 => Err("it is not"),
        _ => Ok(()),
    });
    s3.kill();
    let pending = Request::read(2048, 4096).submit(&mut session.rings[0]).expect("room on the ring");
    session.rings[0].kick_if_wanted();
    let pushed = end(pushes);
    let said = String::from_utf8_lossy(&pushed.stderr);
    assert!(!pushed.status.success() && said.contains("s3://bucket/other"), "{said}");
    wait_for("it is said that nothing comes", || {
        match rig.json(&["volume", "show", "c"])["attachment"]["coming"]["away"].clone() {
            away if away.is_string() => Ok(()),
            other => Err(other),
        }
    });
    drop(session);
    host.end();
    drop(pending);
}
