//! Snapshots that are there before their data: pulled lazily, attached at once, filled behind that; sources
//! that are away, and that lie; processes that are killed.

use crate::common::attach::{Host, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::{Request, Session, SplitRing, block};
use crate::common::killed::{End, killed_before};
use crate::common::leaks::{Needles, look_through};
use crate::common::patience::wait_for;
use crate::common::process::ended;
use crate::common::rig::Rig;
use crate::outside::{Outside, content, write_to};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sealblk::crypt::secret_mem::SecretMem;
use sealblk::crypt::{BackupKeys, Dek};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

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

/// The process below `parent`, or below one of those, that was started with this word.
#[track_caller]
fn helper(parent: Pid, word: &str) -> Pid {
    wait_for(&format!("a process \"{word}\""), || find_helper(parent, word).ok_or("none"))
}

fn find_helper(parent: Pid, word: &str) -> Option<Pid> {
    let mut below = vec![parent];
    while let Some(parent) = below.pop() {
        for process in fs::read_dir("/proc").expect("list processes").flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let path = process.path();
            let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
            let fields: Vec<&str> =
                stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect()).unwrap_or_default();
            // One that has ended, and was not waited for, is none.
            if fields.len() < 2 || fields[0] == "Z" || fields[1] != parent.to_string() {
                continue;
            }
            let line = fs::read(path.join("cmdline")).unwrap_or_default();
            if line.split(|&byte| byte == 0).any(|it| it == word.as_bytes()) {
                return Some(Pid::from_raw(pid));
            }
            below.push(Pid::from_raw(pid));
        }
    }
    None
}

fn kill_and_wait(pid: Pid) {
    let process = ended(pid);
    kill(pid, Signal::SIGKILL).expect("it is there");
    process.wait();
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
    let (host, socket) = attach(&rig, "c", &[]);
    assert!(read_all(&mut open(&socket).rings[0], expected.len()) == expected);
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
    for volume in ["c", "d", "e"] {
        let (host, socket) = attach(&rig, volume, &[]);
        let first = read(&mut open(&socket).rings[0], (4 << 20) / 512, 4096);
        assert!(first == rig.data[4 << 20..][..4096]);
        host.end();
    }
    assert!(content(&rig, "s") == rig.data);
    rig.assert_layers_are_named();
}

/// Submits a read that waits.
fn begin_read(session: &mut Session, sector: u64) -> crate::common::frontend::block::Pending {
    let ring = &mut session.rings[0];
    let pending = Request::read(sector, 4096).submit(ring).expect("room on the ring");
    ring.kick_if_wanted();
    pending
}

#[test]
fn a_source_that_is_away_makes_reads_wait_until_it_is_back() {
    let (rig, outside) = coming("0");
    let elsewhere = outside.path().with_extension("elsewhere");
    fs::rename(outside.path(), &elsewhere).unwrap();
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    let pending = begin_read(&mut session, (4 << 20) / 512);
    wait_for("the read waits, and why is said", || match said(&rig, "c") {
        it if it["away"].is_string() && it["waiting"] == json!(1) => Ok(()),
        it => Err(it),
    });
    assert!(rig.place.store.ok(&["volume", "show", "c"]).contains("nothing comes at the moment"));
    let metrics = rig.place.store.ok(&["metrics"]);
    let away = metrics.lines().find(|line| line.starts_with("sealblk_volume_source_away{")).unwrap();
    assert!(away.ends_with(" 1"), "{away}");
    // What is written, and where nothing is to come, does not wait.
    fs::rename(&elsewhere, outside.path()).unwrap();
    let used = session.rings[0].wait_used().expect("the read goes on");
    let outcome = pending.finish(&mut session.rings[0], used).expect("it is whole");
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
    let (rig, outside) = coming("1");
    let elsewhere = outside.path().with_extension("elsewhere");
    fs::rename(outside.path(), &elsewhere).unwrap();
    let (host, socket) = attach(&rig, "c", &[]);
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
    fs::rename(&elsewhere, outside.path()).unwrap();
    let used = session.rings[0].wait_used().expect("the read goes on");
    let outcome = pending.finish(&mut session.rings[0], used).expect("it is whole");
    assert_eq!(outcome.status, block::OK, "{made}");
    let at = sector as usize * 512;
    assert!(outcome.data == [&rig.data[at..at + 4096], &pattern(3, 4096)[..]].concat());
    assert_eq!(said(&rig, "c")["failed"], json!(0));
    drop(session);
    host.end();
}

#[test]
fn many_reads_wait_at_a_time_and_each_gets_what_is_its_own() {
    let (rig, outside) = coming("1");
    let elsewhere = outside.path().with_extension("elsewhere");
    fs::rename(outside.path(), &elsewhere).unwrap();
    let (host, socket) = attach(&rig, "c", &[]);
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
    fs::rename(&elsewhere, outside.path()).unwrap();
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
    let (rig, outside) = coming("1");
    let elsewhere = outside.path().with_extension("elsewhere");
    fs::rename(outside.path(), &elsewhere).unwrap();
    let (host, socket) = attach(&rig, "c", &["--source-patience", "1"]);
    let mut session = open(&socket);
    fails(&mut session.rings[0], (4 << 20) / 512);
    fails(&mut session.rings[0], (4 << 20) / 512);
    // Nothing is to come there.
    assert!(read(&mut session.rings[0], (3 << 20) / 512, 4096) == [0; 4096]);
    write(&mut session.rings[0], (4 << 20) / 512, &pattern(1, 4096));
    assert!(read(&mut session.rings[0], (4 << 20) / 512, 4096) == pattern(1, 4096));
    assert_eq!(said(&rig, "c")["failed"], json!(2));
    fs::rename(&elsewhere, outside.path()).unwrap();
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

#[test]
fn whoever_is_killed_what_has_come_is_right_and_the_rest_comes_after_the_next_attach() {
    let (rig, _outside) = coming("1");
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    let part = 4 << 20..(4 << 20) + 4096;
    // The block that comes last behind that.
    let last = (8 << 20) - 4096;
    assert!(read(&mut session.rings[0], part.start as u64 / 512, 4096) == rig.data[part.clone()]);
    // Another carrier is started.
    kill_and_wait(helper(host.pid(), "carry"));
    if let Some(carrier) = find_helper(host.pid(), "carry") {
        kill_and_wait(carrier);
    }
    assert!(read(&mut session.rings[0], 5 << 11, 4096) == rig.data[5 << 20..][..4096]);
    // Without a fetcher nothing comes, and nobody waits.
    kill_and_wait(helper(host.pid(), "fetch"));
    fails(&mut session.rings[0], last as u64 / 512);
    assert!(read(&mut session.rings[0], part.start as u64 / 512, 4096) == rig.data[part]);
    assert!(said(&rig, "c")["away"].as_str().unwrap().contains("attach it again"));
    drop(session);
    host.end();
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    assert!(read(&mut session.rings[0], last as u64 / 512, 4096) == rig.data[last..]);
    let fetcher = ended(helper(host.pid(), "fetch"));
    drop(session);
    host.crash();
    fetcher.wait();
    let (host, socket) = attach(&rig, "c", &[]);
    assert!(read_all(&mut open(&socket).rings[0], rig.data.len()) == rig.data);
    wait_until_complete(&rig, "s");
    host.end();
    assert!(content(&rig, "s") == rig.data);
}

#[test]
fn the_data_key_is_in_no_process_beside_the_host_and_no_key_where_a_network_is() {
    let (rig, outside) = coming("1");
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    assert!(read(&mut session.rings[0], 0, 4096) == rig.data[..4096]);
    let volume = rig.reader().volume("c");
    let dek = rig.reader().deks(volume.layout(), &volume.encryption_context()).remove(0);
    let mut derived = SecretMem::new(BackupKeys::LEN).expect("locked memory");
    let of = rig.reader().snapshot(volume.origin().expect("a clone").snapshot.to_string().as_str()).volume();
    Dek::from_bytes(&dek).expect("a key").write_backup_keys(&of.to_string(), derived.as_mut_slice());
    let fetcher = helper(host.pid(), "fetch");
    let (starter, carrier) = (helper(fetcher, "start-carriers"), helper(fetcher, "carry"));
    // What is looked at must stand still.
    let all = [fetcher, starter, carrier];
    all.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).expect("it runs"));
    let status = |pid: Pid| fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    for pid in [fetcher, carrier] {
        assert!(
            status(pid).contains("Seccomp:\t2") && status(pid).contains("NoNewPrivs:\t1"),
            "{}",
            status(pid)
        );
    }
    let of_all =
        Needles::of_secrets(&[("the data key", &dek[..]), ("what follows from it", derived.as_slice())]);
    for pid in [starter, carrier] {
        let found = look_through(pid, &of_all);
        assert!(found.found.is_empty(), "{:?}", found.found);
    }
    // Whoever does not find what is there is not looking.
    let path = outside.path().to_str().expect("UTF-8");
    assert!(!look_through(carrier, &Needles::words(path)).found.is_empty());
    let found = look_through(fetcher, &Needles::of_key(&dek));
    assert!(found.found.is_empty(), "{:?}", found.found);
    all.iter().for_each(|pid| kill(*pid, Signal::SIGCONT).expect("it is there"));
    drop(session);
    host.end();
}

#[test]
fn a_place_that_lies_is_not_believed() {
    let (rig, outside) = coming("1");
    let blocks = outside.objects("blocks");
    let whole: Vec<PathBuf> =
        blocks.into_iter().filter(|path| fs::metadata(path).unwrap().len() > BLOCK as u64).collect();
    assert_eq!(whole.len(), 3, "three of the blocks are full");
    let right: Vec<Vec<u8>> = whole.iter().map(|path| fs::read(path).unwrap()).collect();
    // One has other bytes, one is another one's, and one is missing.
    let mut wrong = right[0].clone();
    wrong[BLOCK / 2] ^= 1;
    fs::write(&whole[0], &wrong).unwrap();
    fs::write(&whole[1], &right[0]).unwrap();
    fs::remove_file(&whole[2]).unwrap();
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    for block in 8..11 {
        fails(&mut session.rings[0], block * 1024 + 8);
    }
    // All others are as they were.
    assert!(read(&mut session.rings[0], 0, 4096) == rig.data[..4096]);
    let said = rig.refuse(7, &["snapshot", "complete", "s"]);
    assert!(said.contains("3 of its blocks are not as they should be"), "{said}");
    for (path, bytes) in whole.iter().zip(&right) {
        fs::write(path, bytes).unwrap();
    }
    assert!(read_all(&mut session.rings[0], rig.data.len()) == rig.data);
    drop(session);
    host.end();
    rig.place.store.ok(&["snapshot", "complete", "s"]);
    assert!(content(&rig, "s") == rig.data);
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
    let (_, again) = (rig.place.store.ok(&["snapshot", "complete", "c"]), attach(&rig, "c", &[]));
    assert!(read_all(&mut open(&again.1).rings[0], rig.data.len()) == rig.data);
    again.0.end();
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

fn file(rig: &Rig, ending: &str) -> PathBuf {
    let all = rig.files("layers");
    all.into_iter().find(|path| path.extension().is_some_and(|it| it == ending)).expect("it is there")
}

#[test]
fn what_lies_in_the_store_is_proved_before_it_is_used() {
    let (rig, outside) = coming("1");
    // Another hand has written into the layer: where a block is to come, and where none is.
    let layer = fs::OpenOptions::new().write(true).open(file(&rig, "coming")).unwrap();
    for at in [4 << 20, (4 << 20) + BLOCK as u64 + 512, 2 << 20] {
        layer.write_all_at(&[7; 4096], at).unwrap();
    }
    let (host, socket) = attach(&rig, "c", &[]);
    assert!(read_all(&mut open(&socket).rings[0], rig.data.len()) == rig.data);
    host.end();
    rig.place.store.ok(&["snapshot", "complete", "s"]);
    assert!(content(&rig, "s") == rig.data);
    // What is to come, and from where, cannot be edited.
    rig.id(&["snapshot", "pull", &outside.url(), "--name", "again", "--lazy"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", "again", "--name", "d"]);
    let wanted = file(&rig, "wanted");
    let right = fs::read(&wanted).unwrap();
    let socket = rig.place.folder().join("d.socket");
    let refused = || {
        let mut command = rig.place.store.command();
        command.args(["attach", "d", "--socket-path"]).arg(&socket);
        let said = rig.place.run(command, vec![]);
        assert_eq!(said.code, 7, "{}", said.err);
        said.err
    };
    let mut edited = right.clone();
    let at = edited.len() - 100;
    edited[at] ^= 1;
    fs::write(&wanted, &edited).unwrap();
    assert!(refused().contains("MAC does not fit"));
    rig.refuse(7, &["snapshot", "complete", "again"]);
    let url = right.windows(8).position(|bytes| bytes == b"file:///").expect("where from");
    fs::write(&wanted, [&right[..url + 8], b"x/", &right[url + 8..]].concat()).unwrap();
    refused();
    fs::remove_file(&wanted).unwrap();
    let mut command = rig.place.store.command();
    command.args(["attach", "d", "--socket-path"]).arg(&socket);
    assert_ne!(rig.place.run(command, vec![]).code, 0);
    fs::write(&wanted, &right).unwrap();
    let (host, socket) = attach(&rig, "d", &[]);
    assert!(read_all(&mut open(&socket).rings[0], rig.data.len()) == rig.data);
    host.end();
}

#[test]
fn another_process_takes_over_in_the_middle() {
    let (rig, _outside) = coming("1");
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    assert!(read(&mut session.rings[0], 0, 4096) == rig.data[..4096]);
    let said = rig.json(&["upgrade", "c"]);
    let pid = ended(Pid::from_raw(
        rig.json(&["volume", "show", "c"])["attachment"]["pid"].as_i64().unwrap() as i32
    ));
    assert!(read_all(&mut session.rings[0], rig.data.len()) == rig.data, "{said}");
    wait_until_complete(&rig, "s");
    drop(session);
    rig.place.store.ok(&["detach", "c"]);
    pid.wait();
    drop(host);
    assert!(content(&rig, "s") == rig.data);
}

/// Kills a command before each of its steps, and has the next one end it; what is left then is right.
fn killed_at_each_step(rig: &Rig, arguments: &[&str], at_end: &mut dyn FnMut(&Rig, usize)) {
    for step in 0.. {
        let mut command = rig.place.store.command();
        command.args(arguments);
        let End::Exited(code) = killed_before(&mut command, step) else {
            at_end(rig, step);
            continue;
        };
        assert_eq!(code, 0, "step {step}");
        return at_end(rig, step);
    }
}

#[test]
fn a_lazy_pull_that_is_killed_leaves_nothing_or_all_and_either_way_of_pulling_goes_on() {
    let (rig, outside) = pushed();
    let url = outside.url();
    let lazy = ["snapshot", "pull", &url, "--name", "s", "--lazy", "--limit", "1"];
    killed_at_each_step(&rig, &lazy, &mut |rig, step| {
        let is_there = rig.json(&["snapshot", "list"]).as_array().unwrap().len() == 1;
        // The other way goes on with it every second time.
        let how: &[&str] = if step % 2 == 0 { &lazy } else { &lazy[..5] };
        if !is_there {
            rig.id(how);
        }
        if rig.json(&["snapshot", "show", "s"])["state"] == json!("coming") {
            rig.place.store.ok(&["snapshot", "complete", "s"]);
        }
        assert!(content(rig, "s") == rig.data, "step {step}");
        rig.assert_layers_are_named();
        rig.place.store.ok(&["snapshot", "delete", "s"]);
        rig.place.store.ok(&["gc"]);
        assert!(rig.files("layers").is_empty(), "step {step}");
    });
}

#[test]
fn a_completion_that_is_killed_goes_on() {
    let (rig, outside) = coming("1");
    killed_at_each_step(&rig, &["snapshot", "complete", "s"], &mut |rig, step| {
        rig.place.store.ok(&["gc"]);
        rig.place.store.ok(&["snapshot", "complete", "s"]);
        assert!(content(rig, "s") == rig.data, "step {step}");
        rig.place.store.ok(&["gc"]);
        rig.assert_layers_are_named();
        rig.place.store.ok(&["volume", "delete", "c"]);
        rig.place.store.ok(&["snapshot", "delete", "s"]);
        rig.id(&["snapshot", "pull", &outside.url(), "--name", "s", "--lazy"]);
        rig.place.store.ok(&["volume", "create", "--snapshot", "s", "--name", "c"]);
    });
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
