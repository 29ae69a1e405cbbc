//! Places that are away while something is still to come from them: who waits, how long, and who does not.

use super::{attach, coming, fails, read_all, results, said, wait_until_complete};
use crate::common::attach::{Host, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::block::{Outcome, Pending};
use crate::common::frontend::vmm::Kind;
use crate::common::frontend::{Options, Request, Session, SplitRing, Vmm, block};
use crate::common::patience::wait_for;
use crate::common::rig::Rig;
use crate::common::successor::Successor;
use crate::outside::{Outside, content};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

/// Longer than any test waits.
const FOR_EVER: [&str; 2] = ["--source-patience", "86400"];

/// A place that is away, until [`Away::back`].
struct Away {
    path: PathBuf,
    elsewhere: PathBuf,
}

impl Away {
    fn of(outside: &Outside) -> Self {
        let (path, elsewhere) = (outside.path().to_owned(), outside.path().with_extension("elsewhere"));
        fs::rename(&path, &elsewhere).expect("take the place away");
        Away { path, elsewhere }
    }

    fn back(self) {}
}

impl Drop for Away {
    fn drop(&mut self) {
        fs::rename(&self.elsewhere, &self.path).expect("bring the place back");
    }
}

/// As [`coming`], attached with these arguments while the place is away.
#[track_caller]
fn attached(rate: &str, arguments: &[&str]) -> (Rig, Outside, Away, Host, PathBuf) {
    let (rig, outside) = coming(rate);
    let away = Away::of(&outside);
    let (host, socket) = attach(&rig, "c", arguments);
    (rig, outside, away, host, socket)
}

/// Waits until so many reads wait, and it is known that the place is away.
#[track_caller]
fn wait_until_waiting(rig: &Rig, reads: u64) {
    wait_for("reads wait, and why is said", || match said(rig, "c") {
        it if it["away"].is_string() && it["waiting"] == json!(reads) => Ok(()),
        it => Err(it),
    });
}

#[track_caller]
fn end(ring: &mut SplitRing, pending: Pending) -> Outcome {
    let used = ring.wait_used().expect("the read ends");
    pending.finish(ring, used).expect("it is whole")
}

/// Submits a read that waits.
fn begin_read(ring: &mut SplitRing, sector: u64) -> Pending {
    let pending = Request::read(sector, 4096).submit(ring).expect("room on the ring");
    ring.kick_if_wanted();
    pending
}

#[test]
fn a_source_that_is_away_makes_reads_wait_until_it_is_back() {
    let (rig, _outside, away, host, socket) = attached("0", &[]);
    let mut session = open(&socket);
    let pending = begin_read(&mut session.rings[0], (4 << 20) / 512);
    wait_until_waiting(&rig, 1);
    assert!(rig.place.store.ok(&["volume", "show", "c"]).contains("nothing comes at the moment"));
    let metrics = rig.place.store.ok(&["metrics"]);
    let shown = metrics.lines().find(|line| line.starts_with("sealblk_volume_source_away{")).unwrap();
    assert!(shown.ends_with(" 1"), "{shown}");
    away.back();
    let outcome = end(&mut session.rings[0], pending);
    assert_eq!(outcome.status, block::OK);
    assert!(outcome.data == rig.data[4 << 20..][..4096]);
    wait_until_complete(&rig, "s");
    assert_eq!(results(&rig), ["succeeded", "waiting", "pulling", "completed"]);
    assert_eq!(said(&rig, "c")["away"], Value::Null);
    drop(session);
    host.end();
}

#[test]
fn no_snapshot_waits_for_a_read_that_waits() {
    let (rig, _outside, away, host, socket) = attached("1", &[]);
    let mut session = open(&socket);
    write(&mut session.rings[0], (4 << 20) / 512 + 128, &pattern(3, 4096));
    // It has some of the top, and waits for the rest.
    let sector = (4 << 20) / 512 + 120;
    let pending = Request::read(sector, 8192).submit(&mut session.rings[0]).expect("room on the ring");
    session.rings[0].kick_if_wanted();
    let waits = || {
        wait_for("the read waits", || match said(&rig, "c")["waiting"].as_u64() {
            Some(1) => Ok(()),
            other => Err(format!("{other:?}")),
        });
    };
    waits();
    let made = rig.json(&["snapshot", "create", "c"]);
    waits();
    rig.json(&["snapshot", "create", "c"]);
    write(&mut session.rings[0], 0, &pattern(4, 512));
    waits();
    away.back();
    let outcome = end(&mut session.rings[0], pending);
    assert_eq!(outcome.status, block::OK, "{made}");
    let at = sector as usize * 512;
    assert!(outcome.data == [&rig.data[at..at + 4096], &pattern(3, 4096)[..]].concat());
    assert_eq!(said(&rig, "c")["failed"], json!(0));
    drop(session);
    host.end();
}

#[test]
fn many_reads_wait_at_a_time_and_each_gets_what_is_its_own() {
    let (rig, _outside, away, host, socket) = attached("1", &[]);
    let mut session = open(&socket);
    let ring = &mut session.rings[0];
    let places = (0..30).map(|n| match n {
        0..8 => n * 4096,
        8..16 => (1 << 20) + n * 4096,
        _ => (4 << 20) + n * 48 * 1024,
    });
    let begin =
        |at: usize| (at, Request::read(at as u64 / 512, 4096).submit(ring).expect("room on the ring"));
    let mut pending: Vec<_> = places.map(begin).collect();
    ring.kick_if_wanted();
    wait_for("all of them wait", || match said(&rig, "c")["waiting"].as_u64() {
        Some(30) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    away.back();
    let ring = &mut session.rings[0];
    while !pending.is_empty() {
        let used = ring.wait_used().expect("a read goes on");
        let n = pending.iter().position(|(_, it)| u32::from(it.head) == used.id).expect("it waits");
        let (at, read) = pending.remove(n);
        let outcome = read.finish(ring, used).expect("it is whole");
        assert!(outcome.status == block::OK && outcome.data == rig.data[at..at + 4096], "at {at}");
    }
    drop(session);
    host.end();
}

#[test]
fn reads_that_have_waited_too_long_fail_and_those_that_follow_do_not() {
    let (rig, _outside, away, host, socket) = attached("1", &["--source-patience", "1"]);
    let mut session = open(&socket);
    fails(&mut session.rings[0], (4 << 20) / 512);
    fails(&mut session.rings[0], (4 << 20) / 512);
    // Nothing is to come there.
    assert!(read(&mut session.rings[0], (3 << 20) / 512, 4096) == [0; 4096]);
    write(&mut session.rings[0], (4 << 20) / 512, &pattern(1, 4096));
    assert!(read(&mut session.rings[0], (4 << 20) / 512, 4096) == pattern(1, 4096));
    assert_eq!(said(&rig, "c")["failed"], json!(2));
    away.back();
    let found = wait_for("reads go on", || {
        let outcome = Request::read((5 << 20) / 512, 4096).run(&mut session.rings[0]).expect("it completes");
        match outcome.status {
            block::OK => Ok(outcome.data),
            other => Err(other),
        }
    });
    assert!(found == rig.data[5 << 20..][..4096]);
    drop(session);
    host.end();
}

/// A volume with a read that waits for a place that is away.
#[track_caller]
fn waiting(options: &Options) -> (Rig, Outside, Away, Host, Session, Pending) {
    let (rig, outside, away, host, socket) = attached("1", &FOR_EVER);
    let mut session = Session::open(&socket, options).expect("the back-end serves a front-end");
    let pending = begin_read(&mut session.rings[0], (4 << 20) / 512);
    wait_until_waiting(&rig, 1);
    (rig, outside, away, host, session, pending)
}

fn with_inflight() -> Options {
    let protocol = Options::default().protocol | Protocol::INFLIGHT_SHMFD;
    Options { protocol, ..Options::default() }
}

#[test]
fn a_detach_does_not_wait_for_a_place_that_is_away() {
    let (rig, _outside, away, host, mut session, pending) = waiting(&Options::default());
    rig.place.store.ok(&["detach", "c"]);
    host.ends_well();
    assert_eq!(end(&mut session.rings[0], pending).status, block::IOERR);
    away.back();
    super::assert_holds(&rig, "c", &rig.data);
}

#[test]
fn a_vmm_that_stops_its_rings_is_not_kept_by_a_place_that_is_away() {
    let (rig, _outside, away, host, mut session, pending) = waiting(&with_inflight());
    let base = session.stop().expect("the rings stop")[0];
    assert_eq!(base, session.rings[0].used_idx(), "nothing is in flight");
    assert_eq!(end(&mut session.rings[0], pending).status, block::IOERR);
    session.start_at(&[base]).expect("they start again");
    let pending = begin_read(&mut session.rings[0], (4 << 20) / 512);
    wait_until_waiting(&rig, 1);
    away.back();
    let outcome = end(&mut session.rings[0], pending);
    assert!(outcome.status == block::OK && outcome.data == rig.data[4 << 20..][..4096]);
    drop(session);
    host.end();
}

#[test]
fn a_copy_that_waits_for_a_place_is_stopped_at_once() {
    let (rig, _outside, away, host, socket) = attached("1", &FOR_EVER);
    rig.place.store.ok(&["volume", "flatten", "c"]);
    wait_until_waiting(&rig, 1);
    // A guest that writes where the copy stands waits for nobody.
    let mut session = open(&socket);
    write(&mut session.rings[0], 8, &pattern(4, 4096));
    let mut expected = rig.data.clone();
    expected[4096..8192].copy_from_slice(&pattern(4, 4096));
    rig.id(&["snapshot", "create", "c", "--name", "between"]);
    wait_until_waiting(&rig, 1);
    rig.place.store.ok(&["detach", "c"]);
    host.ends_well();
    drop(session);
    away.back();
    super::assert_holds(&rig, "c", &expected);
    rig.place.store.ok(&["snapshot", "complete", "s"]);
    assert!(content(&rig, "between") == expected);
}

#[test]
fn an_upgrade_takes_reads_along_that_wait() {
    let (rig, _outside, away, mut host, mut session, pending) = waiting(&with_inflight());
    let successor = Successor::of(&rig.json(&["upgrade", "c"]));
    assert!(host.wait().success());
    wait_until_waiting(&rig, 1);
    away.back();
    let outcome = end(&mut session.rings[0], pending);
    assert!(outcome.status == block::OK && outcome.data == rig.data[4 << 20..][..4096]);
    assert!(read_all(&mut session.rings[0], rig.data.len()) == rig.data);
    drop(session);
    rig.place.store.ok(&["detach", "c"]);
    successor.ends();
}

#[test]
fn an_upgrade_that_would_lose_reads_that_wait_is_refused() {
    let (rig, _outside, away, mut host, mut session, pending) = waiting(&Options::default());
    let refused = rig.refuse(4, &["upgrade", "c"]);
    assert!(refused.contains("reads of the guest's wait for a place that is away"), "{refused}");
    wait_until_waiting(&rig, 1);
    away.back();
    let outcome = end(&mut session.rings[0], pending);
    assert!(outcome.status == block::OK && outcome.data == rig.data[4 << 20..][..4096]);
    drop(session);
    let successor = Successor::of(&rig.json(&["upgrade", "c"]));
    assert!(host.wait().success());
    rig.place.store.ok(&["detach", "c"]);
    successor.ends();
}

/// Connects a VMM of one queue.
fn connect(socket: &Path) -> Vmm {
    let mut vmm = Vmm::connect(socket, Kind::Qemu10, 1, 256, Protocol::empty()).expect("it is served");
    vmm.start().and_then(|()| vmm.sync()).expect("the device starts");
    vmm
}

#[test]
fn a_volume_that_is_still_coming_moves_with_its_guest() {
    let (rig, outside) = coming("1");
    let (source, socket) = attach(&rig, "c", &FOR_EVER);
    let mut from = connect(&socket);
    assert!(read(&mut from.rings[0], 0, 4096) == rig.data[..4096]);
    write(&mut from.rings[0], 8, &pattern(8, 4096));
    let other = rig.place.folder().join("other.socket");
    let mut command = rig.place.store.command();
    command.args(["attach", "c", "--incoming", "--socket-path"]).arg(&other).args(FOR_EVER);
    let destination = rig.place.start(command, vec![]);
    let mut to = from.incoming(&other).expect("the other process serves it");
    // What waits does not keep the guest here.
    let away = Away::of(&outside);
    let pending = begin_read(&mut from.rings[0], (4 << 20) / 512);
    wait_until_waiting(&rig, 1);
    from.enable(false).expect("the rings are disabled");
    assert_eq!(from.base(0).expect("the ring stops"), from.rings[0].used_idx());
    assert_eq!(end(&mut from.rings[0], pending).status, block::IOERR);
    to.rings = std::mem::take(&mut from.rings);
    to.start().and_then(|()| to.sync()).expect("the device goes on there");
    drop(from);
    source.ends_well();
    let pending = begin_read(&mut to.rings[0], (4 << 20) / 512);
    wait_until_waiting(&rig, 1);
    away.back();
    let outcome = end(&mut to.rings[0], pending);
    assert!(outcome.status == block::OK && outcome.data == rig.data[4 << 20..][..4096]);
    let mut expected = rig.data.clone();
    expected[4096..8192].copy_from_slice(&pattern(8, 4096));
    assert!(read_all(&mut to.rings[0], expected.len()) == expected);
    wait_until_complete(&rig, "s");
    drop(to);
    destination.end();
    super::assert_holds(&rig, "c", &expected);
}

#[test]
fn another_place_at_the_same_url_is_no_source() {
    let (rig, outside) = coming("1");
    let elsewhere = outside.path().with_extension("elsewhere");
    fs::rename(outside.path(), &elsewhere).unwrap();
    begin_another(&elsewhere, outside.path());
    let (host, socket) = attach(&rig, "c", &["--source-patience", "1"]);
    let mut session = open(&socket);
    fails(&mut session.rings[0], 0);
    assert!(said(&rig, "c")["away"].as_str().unwrap().contains("another place is there"));
    drop(session);
    host.end();
    fs::remove_dir_all(outside.path()).unwrap();
    fs::rename(&elsewhere, outside.path()).unwrap();
}

/// Makes a place that is empty, and another one.
fn begin_another(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    let place = fs::read_to_string(from.join("place.json")).unwrap();
    let id = serde_json::from_str::<Value>(&place).unwrap()["id"].as_str().unwrap().to_owned();
    let other = format!("{}{}", &id[..24], "0".repeat(12));
    fs::write(to.join("place.json"), place.replace(&id, &other)).unwrap();
}
