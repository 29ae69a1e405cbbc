//! Several writers at once: threads, processes, and processes that are killed.

use super::{Folders, attach, decrypt, key};
use crate::common::patience::limit;
use crate::common::process::{tie_to_test, wait_within};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

#[test]
fn records_of_many_threads_are_one_chain() {
    let folders = Folders::new();
    let shared = folders.open();
    std::thread::scope(|threads| {
        for n in 0..6 {
            let (folders, shared) = (&folders, &shared);
            threads.spawn(move || {
                let own = folders.open();
                for _ in 0..15 {
                    match n % 3 {
                        0 => own.append(&decrypt(), Some(&key(1))).unwrap(),
                        1 => own.append(&attach(), None).unwrap(),
                        _ => shared.append(&attach(), None).unwrap(),
                    }
                }
            });
        }
    });
    let report = folders.verify();
    assert_eq!((report.problem, report.records, report.authenticated), (None, 90, 30));
    assert_eq!(report.marked, Some(90));
}

/// Another process that appends without end, and says so after each record: this test binary again.
fn writer(folders: &Folders, with_key: bool) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "writers::other_process", "--nocapture", "--test-threads=1"]);
    command.env("SEALBLK_TEST_STORE", folders.dir.path()).env("SEALBLK_TEST_KEY", with_key.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    tie_to_test(&mut command, vec![]);
    command.spawn().unwrap()
}

/// Not a test of its own: what [`writer`] runs.
#[test]
#[ignore = "run by other tests as another process"]
fn other_process() {
    let place = PathBuf::from(std::env::var_os("SEALBLK_TEST_STORE").expect("run by another test"));
    let with_key = std::env::var("SEALBLK_TEST_KEY").is_ok_and(|value| value == "true");
    let log = sealblk::audit::AuditLog::at(&place.join("root"), &place.join("config"));
    loop {
        match with_key {
            true => log.append(&decrypt(), Some(&key(1))).unwrap(),
            false => log.append(&attach(), None).unwrap(),
        }
        let mut out = std::io::stdout().lock();
        writeln!(out, "appended:").and_then(|()| out.flush()).unwrap();
    }
}

#[test]
fn processes_that_are_killed_while_they_write_lose_nothing_that_was_answered() {
    let folders = Folders::new();
    let mut answered = 0;
    for round in 0..6 {
        let mut writers = [writer(&folders, true), writer(&folders, false)];
        let mut readers: Vec<_> = Vec::new();
        for child in &mut writers {
            readers.push(BufReader::new(child.stdout.take().unwrap()).lines());
        }
        let mut next = |reader: usize| {
            let mut lines = readers[reader].by_ref().map_while(Result::ok);
            lines.any(|line| line.contains("appended:"))
        };
        for _ in 0..=3 * round {
            assert!(next(0) && next(1));
            answered += 2;
        }
        for child in &mut writers {
            child.kill().unwrap();
            wait_within(child, limit()).unwrap();
        }
        // What they had answered before they died, though nobody had read it yet.
        for reader in [0, 1] {
            while next(reader) {
                answered += 1;
            }
        }
        let report = folders.verify();
        assert_eq!(report.problem, None);
        let most = answered + 2 * (round + 1);
        assert!((answered..=most).contains(&report.records), "{} of {answered}", report.records);
    }
}
