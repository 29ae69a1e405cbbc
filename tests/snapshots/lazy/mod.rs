//! Snapshots that are there before their data: pulled lazily, attached at once, filled behind that.

mod away;
mod claims;
mod processes;

use crate::common::attach::{Host, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::{Request, SplitRing, block};
use crate::common::patience::wait_for;
use crate::common::rig::Rig;
use crate::outside::{Outside, content, write_to};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;

const BLOCK: usize = 512 << 10;
/// Blocks that have something in what [`pushed`] makes.
const BLOCKS: u64 = 6;

/// A volume of which a snapshot lies outside alone, six of its sixteen blocks with data.
fn pushed() -> (Rig, Outside) {
    let mut rig = Rig::new(&[]);
    write_to(&mut rig, 4 << 20, &pattern(9, 3 * BLOCK));
    let outside = Outside::new();
    rig.id(&["snapshot", "create", "t", "--name", "first"]);
    rig.place.store.ok(&["snapshot", "push", "first", &outside.url()]);
    rig.place.store.ok(&["snapshot", "delete", "first"]);
    rig.place.store.ok(&["volume", "delete", "t"]);
    (rig, outside)
}

/// As [`pushed`], pulled lazily as `s` at so many bytes a second, with the volume `c` made of it.
fn coming(rate: &str) -> (Rig, Outside) {
    let (rig, outside) = pushed();
    rig.id(&["snapshot", "pull", &outside.url(), "--name", "s", "--lazy", "--limit", rate]);
    rig.place.store.ok(&["volume", "create", "--snapshot", "s", "--name", "c"]);
    (rig, outside)
}

/// Attaches a volume, with these arguments besides.
#[track_caller]
fn attach(rig: &Rig, volume: &str, arguments: &[&str]) -> (Host, PathBuf) {
    let socket = rig.place.folder().join(format!("{volume}.socket"));
    let mut command = rig.place.store.command();
    command.args(["attach", volume, "--socket-path"]).arg(&socket).args(arguments);
    (rig.place.start(command, vec![]), socket)
}

/// What all of a ring's disk holds.
#[track_caller]
fn read_all(ring: &mut SplitRing, len: usize) -> Vec<u8> {
    (0..len).step_by(64 << 10).flat_map(|at| read(ring, at as u64 / 512, 64 << 10)).collect()
}

/// Attaches a volume, checks that it holds this, and detaches it.
#[track_caller]
fn assert_holds(rig: &Rig, volume: &str, expected: &[u8]) {
    let (host, socket) = attach(rig, volume, &[]);
    assert!(read_all(&mut open(&socket).rings[0], expected.len()) == expected, "{volume}");
    host.end();
}

#[track_caller]
fn fails(ring: &mut SplitRing, sector: u64) {
    assert_eq!(Request::read(sector, 4096).run(ring).expect("a read completes").status, block::IOERR);
}

fn endings(rig: &Rig) -> Vec<String> {
    let ending = |path: &PathBuf| path.extension().unwrap().to_string_lossy().into_owned();
    let mut all: Vec<String> = rig.files("layers").iter().map(ending).collect();
    all.sort();
    all
}

/// Waits until all of the snapshot has come.
#[track_caller]
fn wait_until_complete(rig: &Rig, snapshot: &str) {
    wait_for("all of it has come", || match rig.json(&["snapshot", "show", snapshot]) {
        it if it["state"] == json!("completed") => Ok(()),
        it => Err(it["coming"].to_string()),
    });
}

/// What the host process says of what is to come.
fn said(rig: &Rig, volume: &str) -> Value {
    rig.json(&["volume", "show", volume])["attachment"]["coming"].clone()
}

/// Results of the events about what is to come, in their order.
fn results(rig: &Rig) -> Vec<String> {
    let events = rig.place.events().into_iter().map(|event| event["detail"].clone());
    let pulls = events.filter(|it| it["event"] == json!("pullSnapshot"));
    pulls.map(|it| it["result"].as_str().expect("a result").to_owned()).collect()
}

#[test]
fn a_snapshot_that_is_pulled_lazily_is_there_at_once_and_comes_as_it_is_read() {
    let (rig, outside) = pushed();
    let pulled = rig.json(&["snapshot", "pull", &outside.url(), "--name", "s", "--lazy", "--limit", "1"]);
    let all = BLOCKS * BLOCK as u64;
    assert_eq!(pulled["state"], json!("coming"));
    assert_eq!(pulled["coming"], json!({"come": 0, "all": all, "from": outside.url()}));
    assert_eq!(results(&rig), ["succeeded"]);
    assert_eq!(endings(&rig), ["coming", "wanted"]);
    assert!(rig.place.store.ok(&["snapshot", "list"]).contains("coming"));
    let made = rig.json(&["volume", "create", "--snapshot", "s", "--name", "c"]);
    assert_eq!(made["coming"]["all"], json!(all));
    assert!(rig.place.store.ok(&["volume", "list"]).contains("to come"));
    let (host, socket) = attach(&rig, "c", &[]);
    let shown = said(&rig, "c");
    assert_eq!((&shown["all"], &shown["away"], &shown["failed"]), (&json!(all), &Value::Null, &json!(0)));
    let mut session = open(&socket);
    // What is written is there, over what has not come.
    write(&mut session.rings[0], (4 << 20) / 512 + 8, &pattern(77, 4096));
    let mut expected = rig.data.clone();
    expected[(4 << 20) + 4096..][..4096].copy_from_slice(&pattern(77, 4096));
    assert!(read_all(&mut session.rings[0], expected.len()) == expected);
    wait_until_complete(&rig, "s");
    let metrics = rig.place.store.ok(&["metrics"]);
    assert!(
        metrics.contains("sealblk_volume_coming_left_bytes{")
            && metrics.contains("sealblk_volume_source_away{")
    );
    assert_eq!(results(&rig), ["succeeded", "completed"]);
    assert_eq!(endings(&rig), ["img", "img"]);
    // The place is not needed any more.
    fs::remove_dir_all(outside.path()).unwrap();
    assert!(read_all(&mut session.rings[0], expected.len()) == expected);
    drop(session);
    host.end();
    assert_holds(&rig, "c", &expected);
    let (host, _) = attach(&rig, "c", &[]);
    assert_eq!(said(&rig, "c"), Value::Null);
    host.end();
    assert!(content(&rig, "s") == rig.data);
    rig.assert_layers_are_named();
}

#[test]
fn the_rest_comes_behind_that_and_no_faster_than_it_may() {
    let (rig, _outside) = coming("0");
    let (host, _) = attach(&rig, "c", &[]);
    // Nobody reads.
    wait_until_complete(&rig, "s");
    host.end();
    assert!(content(&rig, "s") == rig.data);
    let (rig, _outside) = coming("1");
    let (host, socket) = attach(&rig, "c", &[]);
    // A second block would be there in six days.
    let last = (8 << 20) - (64 << 10);
    let mut session = open(&socket);
    assert!(read(&mut session.rings[0], last as u64 / 512, 64 << 10) == rig.data[last..]);
    let come = said(&rig, "c")["come"].as_u64().unwrap();
    assert!(come <= 2 * BLOCK as u64, "{come}");
    drop(session);
    host.end();
}

#[test]
fn clones_and_snapshots_of_what_is_still_coming_work() {
    let (rig, outside) = coming("1");
    // Of a volume that nobody has attached, and of one that is.
    let detached = rig.id(&["snapshot", "create", "c"]);
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    write(&mut session.rings[0], 0, &pattern(5, 4096));
    let attached = rig.id(&["snapshot", "create", "c"]);
    write(&mut session.rings[0], 8, &pattern(6, 4096));
    rig.place.store.ok(&["volume", "create", "--snapshot", &detached, "--name", "d"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", &attached, "--name", "e"]);
    let (other, other_socket) = attach(&rig, "d", &[]);
    let (third, third_socket) = attach(&rig, "e", &[]);
    let mut expected = rig.data.clone();
    assert!(read_all(&mut open(&other_socket).rings[0], expected.len()) == expected);
    expected[..4096].copy_from_slice(&pattern(5, 4096));
    assert!(read_all(&mut open(&third_socket).rings[0], expected.len()) == expected);
    expected[4096..8192].copy_from_slice(&pattern(6, 4096));
    assert!(read_all(&mut session.rings[0], expected.len()) == expected);
    wait_until_complete(&rig, "s");
    drop(session);
    fs::remove_dir_all(outside.path()).unwrap();
    [host, other, third].into_iter().for_each(Host::end);
    assert_holds(&rig, "c", &expected);
    assert_holds(&rig, "d", &rig.data);
    expected[4096..8192].copy_from_slice(&rig.data[4096..8192]);
    assert_holds(&rig, "e", &expected);
    assert!(content(&rig, "s") == rig.data);
    rig.assert_layers_are_named();
}

#[test]
fn what_reads_all_of_it_refuses_until_it_is_complete() {
    let (rig, outside) = coming("1");
    let out = rig.place.folder().join("out");
    let to = out.to_str().unwrap();
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    for command in [
        &["snapshot", "push", "s", &outside.url()][..],
        &["snapshot", "copy", "s", "--key", "alias/other"],
        &["snapshot", "export", "s", to],
        &["volume", "export", "c", to],
        &["volume", "flatten", "c"],
        &["volume", "rekey", "c"],
    ] {
        let said = rig.refuse(4, command);
        assert!(
            said.contains("is still coming from file://") && said.contains("snapshot complete snap-"),
            "{said}"
        );
    }
    assert!(!out.exists());
    // What makes no use of what is to come is done.
    rig.place.store.ok(&["volume", "resize", "c", "12MiB"]);
    rig.place.store.ok(&["snapshot", "tag", "s", "a=b"]);
    let elsewhere = outside.path().with_extension("elsewhere");
    fs::rename(outside.path(), &elsewhere).unwrap();
    rig.refuse(3, &["snapshot", "complete", "s"]);
    fs::rename(&elsewhere, outside.path()).unwrap();
    assert_eq!(rig.json(&["snapshot", "complete", "s"])["was_complete"], json!(false));
    assert_eq!(rig.json(&["snapshot", "complete", "c"])["was_complete"], json!(true));
    assert_eq!(endings(&rig), ["img", "img"]);
    rig.place.store.ok(&["snapshot", "copy", "s", "--key", "alias/other"]);
    rig.place.store.ok(&["snapshot", "export", "s", to]);
    assert!(fs::read(&out).unwrap() == rig.data);
    rig.place.store.ok(&["volume", "flatten", "c"]);
}

#[test]
fn what_something_is_still_coming_from_stays_in_the_place() {
    let (rig, outside) = coming("1");
    let id =
        rig.json(&["snapshot", "list", &outside.url()])["snapshots"][0]["id"].as_str().unwrap().to_owned();
    let refused = rig.refuse(4, &["snapshot", "remove", &outside.of(&id)]);
    assert!(refused.contains("snapshot complete snap-"), "{refused}");
    rig.place.store.ok(&["snapshot", "complete", "s"]);
    assert_eq!(rig.json(&["snapshot", "remove", &outside.of(&id)])["removed"], json!([id]));
    assert!(outside.objects("blocks").is_empty());
    assert!(content(&rig, "s") == rig.data);
}

#[test]
fn an_attached_volume_is_flattened_while_it_comes() {
    let (rig, _outside) = coming("1");
    let (host, socket) = attach(&rig, "c", &[]);
    rig.place.store.ok(&["volume", "flatten", "c"]);
    wait_for("it has one layer", || {
        match rig.json(&["volume", "show", "c"])["layers"].as_array().unwrap().len() {
            1 => Ok(()),
            n => Err(n),
        }
    });
    assert!(read_all(&mut open(&socket).rings[0], rig.data.len()) == rig.data);
    host.end();
}

#[test]
fn what_is_coming_is_deleted_and_collected_as_anything_else() {
    let (rig, _outside) = coming("1");
    rig.place.store.ok(&["gc"]);
    assert_eq!(endings(&rig), ["coming", "img", "wanted"]);
    // The volume needs it still.
    let (host, socket) = attach(&rig, "c", &[]);
    rig.place.store.ok(&["snapshot", "delete", "s"]);
    rig.place.store.ok(&["gc"]);
    assert!(read(&mut open(&socket).rings[0], 0, 4096) == rig.data[..4096]);
    host.end();
    let said = rig.refuse(4, &["volume", "flatten", "c"]);
    assert!(said.contains("snapshot complete VOLUME"), "{said}");
    rig.place.store.ok(&["snapshot", "complete", "c"]);
    assert_holds(&rig, "c", &rig.data);
    rig.place.store.ok(&["volume", "delete", "c"]);
    assert!(rig.files("layers").is_empty());
    let (rig, outside) = coming("1");
    rig.place.store.ok(&["volume", "delete", "c"]);
    rig.place.store.ok(&["snapshot", "delete", "s"]);
    assert!(rig.files("layers").is_empty());
    // What a hand has left.
    rig.id(&["snapshot", "pull", &outside.url(), "--name", "s", "--lazy"]);
    rig.files("snapshots").iter().for_each(|path| fs::remove_file(path).unwrap());
    rig.place.store.ok(&["gc"]);
    assert!(rig.files("layers").is_empty());
}
