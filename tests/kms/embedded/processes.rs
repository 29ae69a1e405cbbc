//! Several users of one store at once: threads, processes, and processes that are killed.

use crate::common::patience::AtEnd;
use crate::embedded::{Place, corrupt, volume};
use crate::suite::Admin;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::SystemClock;
use sealblk::kms::key_ref::DEFAULT_KEY_ALIAS;
use sealblk::kms::{KeyProvider, KmsError, WrappedKey};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[test]
fn a_log_of_outdated_records_is_compacted_and_who_had_it_open_follows() {
    let place = Place::new();
    let kms = place.open();
    let reader = place.open();
    let key = kms.create_key("", Some("alias/x")).unwrap().arn;
    let wrapped = kms.generate_wrapped(&key, 64, &volume("vol-1")).unwrap();
    assert!(reader.decrypt(&wrapped, &volume("vol-1")).is_ok());
    let mut longest = 0;
    loop {
        kms.disable(&key).unwrap();
        kms.enable(&key).unwrap();
        let len = fs::metadata(place.log()).unwrap().len();
        if len < longest {
            break;
        }
        longest = len;
        assert!(longest < 4 << 20, "never compacted");
    }
    for kms in [&kms, &reader, &place.open()] {
        assert!(kms.decrypt(&wrapped, &volume("vol-1")).is_ok());
        assert_eq!(kms.key("alias/x").unwrap().arn, key);
    }
    reader.disable(&key).unwrap();
    assert!(matches!(kms.decrypt(&wrapped, &volume("vol-1")), Err(KmsError::Disabled(_))));
    let old = fs::read(place.log()).unwrap();
    kms.enable(&key).unwrap();
    fs::write(place.log(), old).unwrap();
    corrupt(place.open().keys());
}

#[test]
fn no_decrypt_that_begins_after_disable_has_answered_succeeds() {
    let place = Place::new();
    let kms = place.open();
    let key = Admin::create_key(&kms);
    let wrapped = kms.generate_wrapped(&key, 64, &volume("vol-1")).unwrap();
    // Odd: disabled, and that was answered.
    let epoch = AtomicU64::new(0);
    let attempts: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = AtEnd(&stop);
        let decrypting: Vec<_> = attempts
            .iter()
            .map(|attempts| {
                let (epoch, stop, wrapped, place) = (&epoch, &stop, &wrapped, &place);
                scope.spawn(move || {
                    let kms = place.open();
                    while !stop.load(Ordering::SeqCst) {
                        let before = epoch.load(Ordering::SeqCst);
                        let opened = kms.decrypt(wrapped, &volume("vol-1"));
                        if before % 2 == 1 && before == epoch.load(Ordering::SeqCst) {
                            assert!(matches!(opened, Err(KmsError::Disabled(_))), "epoch {before}");
                        }
                        attempts.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let all_run = || !decrypting.iter().any(|thread| thread.is_finished());
        for _ in 0..20 {
            kms.disable(&key).unwrap();
            epoch.fetch_add(1, Ordering::SeqCst);
            let seen: Vec<u64> = attempts.iter().map(|a| a.load(Ordering::SeqCst)).collect();
            // Two more: the second one began after the epoch.
            while all_run() && attempts.iter().zip(&seen).any(|(a, s)| a.load(Ordering::SeqCst) < s + 2) {
                std::thread::yield_now();
            }
            epoch.fetch_add(1, Ordering::SeqCst);
            kms.enable(&key).unwrap();
        }
        // A thread whose assertion failed has ended; the scope passes its panic on.
        stop.store(true, Ordering::SeqCst);
    });
}

/// Another process at the same store: this test binary again, obeying lines on its standard input.
struct Other {
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Other {
    fn new(place: &Place) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "embedded::processes::other_process",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("SEALBLK_TEST_STORE", place.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        Other { child, orders, answers }
    }

    fn order(&mut self, line: &str) {
        writeln!(self.orders, "{line}").unwrap();
    }

    /// The next answer; `None` if the process is gone. The test harness's own lines are skipped.
    fn answer(&mut self) -> Option<String> {
        let mut lines = self.answers.by_ref().map_while(Result::ok);
        lines.find_map(|line| line.split_once("answer:").map(|(_, answer)| answer.to_owned()))
    }

    fn ask(&mut self, line: &str) -> String {
        self.order(line);
        self.answer().expect("an answer")
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test of its own: what [`Other`] runs.
#[test]
#[ignore = "run by other tests as another process"]
fn other_process() {
    let place = PathBuf::from(std::env::var_os("SEALBLK_TEST_STORE").expect("run by another test"));
    let kms = Embedded::at(
        place.join("kms"),
        place.join("config"),
        Box::new(SystemClock),
        sealblk::base::hardened::harden().unwrap(),
    );
    let answer = |text: &str| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "answer:{text}").and_then(|()| out.flush()).unwrap();
    };
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("default", _) => {
                answer(&kms.generate_wrapped(DEFAULT_KEY_ALIAS, 64, &volume("v")).unwrap().key_id)
            }
            ("decrypt", hex) => {
                let (key_id, blob) = hex.split_once(' ').unwrap();
                let wrapped = WrappedKey { key_id: key_id.into(), blob: hex::decode(blob).unwrap() };
                match kms.decrypt(&wrapped, &volume("v")) {
                    Ok(_) => answer("ok"),
                    Err(e) => answer(&e.to_string()),
                }
            }
            ("disable", key) => answer(&format!("{:?}", kms.disable(key).unwrap().state)),
            ("enable", key) => answer(&format!("{:?}", kms.enable(key).unwrap().state)),
            ("stream", _) => loop {
                answer(&kms.create_key("streamed", None).unwrap().arn);
            },
            (other, _) => panic!("unknown order {other}"),
        }
    }
}

#[test]
fn concurrent_creators_of_the_default_key_get_one_key() {
    let place = Place::new();
    let mut others: Vec<Other> = (0..4).map(|_| Other::new(&place)).collect();
    others.iter_mut().for_each(|other| other.order("default"));
    let keys: BTreeSet<String> = others.iter_mut().map(|other| other.answer().unwrap()).collect();
    assert_eq!(keys.len(), 1);
    let listed = place.open().keys().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].aliases, [DEFAULT_KEY_ALIAS]);
}

#[test]
fn processes_see_each_others_changes_at_once() {
    let place = Place::new();
    let kms = place.open();
    let key = Admin::create_key(&kms);
    let wrapped = kms.generate_wrapped(&key, 64, &volume("v")).unwrap();
    let decrypt = format!("decrypt {key} {}", hex::encode(&wrapped.blob));
    let (mut one, mut two) = (Other::new(&place), Other::new(&place));
    for _ in 0..10 {
        assert_eq!(one.ask(&decrypt), "ok");
        assert_eq!(two.ask(&format!("disable {key}")), "Disabled");
        assert_eq!(one.ask(&decrypt), format!("{key} is disabled."));
        assert_eq!(kms.decrypt(&wrapped, &volume("v")).err(), Some(KmsError::Disabled(one.ask(&decrypt))));
        assert_eq!(one.ask(&format!("enable {key}")), "Enabled");
        assert_eq!(two.ask(&decrypt), "ok");
    }
}

#[test]
fn sigkill_during_a_stream_of_changes_loses_nothing_that_was_answered() {
    let place = Place::new();
    let mut answered = BTreeSet::new();
    for round in 1..=8 {
        let mut other = Other::new(&place);
        other.order("stream");
        for _ in 0..3 * round {
            answered.insert(other.answer().expect("a key"));
        }
        other.child.kill().unwrap();
        other.child.wait().unwrap();
        // What it had answered before it died, though nobody had read it yet.
        while let Some(arn) = other.answer() {
            answered.insert(arn);
        }
        let there: BTreeSet<String> = place.open().keys().unwrap().into_iter().map(|k| k.arn).collect();
        assert!(answered.is_subset(&there), "round {round}");
        assert!(there.len() <= answered.len() + round, "at most one unanswered key a round");
    }
}
