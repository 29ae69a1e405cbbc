//! The audit log's mark without a MAC, and the log's end: any host process can write there.

use crate::common::attach::Place;
use crate::run;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

fn mark(place: &Place) -> PathBuf {
    let names = crate::names(&place.store.config());
    let name =
        names.iter().find(|name| name.starts_with("audit-") && name.ends_with(".plain")).expect("a mark");
    place.store.config().join(name)
}

/// Overwrites the mark as a host process can, which has it open: all but its name.
fn forge(place: &Place, change: impl FnOnce(&mut Vec<String>)) {
    let path = mark(place);
    let text = fs::read_to_string(&path).unwrap();
    let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    change(&mut words);
    let mut bytes = words.join(" ").into_bytes();
    bytes.resize(511, b' ');
    bytes.push(b'\n');
    fs::write(&path, bytes).unwrap();
}

fn last_record(place: &Place) -> Value {
    let text = fs::read_to_string(place.store.root().join("audit.jsonl")).unwrap();
    serde_json::from_str(text.lines().last().expect("a record")).unwrap()
}

fn attach_once(place: &Place) {
    place.attach(&[]).end();
}

#[test]
fn a_mark_that_is_far_beyond_the_log_moves_nothing() {
    let place = Place::new(&[]);
    attach_once(&place);
    for seq in [1_000_000_000_000, u64::MAX, u64::MAX - 1] {
        let before = last_record(&place)["seq"].as_u64().unwrap();
        forge(&place, |words| {
            words[2] = seq.to_string();
            words[3] = "ab".repeat(32);
        });
        let (code, said) = run(&place, &["audit", "verify"]);
        assert!(code != 0 && said.contains("far beyond"), "{seq}: {code}: {said}");
        attach_once(&place);
        let after = last_record(&place)["seq"].as_u64().unwrap();
        assert!(after > before && after < before + 100, "{seq}: {before} is followed by {after}");
        place.store.ok(&["audit", "verify"]);
    }
    // A mark that says that it is another log's is none.
    forge(&place, |words| words[1] = uuid::Uuid::new_v4().to_string());
    attach_once(&place);
    place.store.ok(&["audit", "verify"]);
    // The end of a log that was cut off is still missed.
    let path = place.store.root().join("audit.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    let cut = whole.trim_end().rfind('\n').unwrap() + 1;
    fs::write(&path, &whole[..cut]).unwrap();
    let (code, said) = run(&place, &["audit", "verify"]);
    assert!(code != 0 && said.contains("cut off"), "{said}");
}

#[test]
fn a_record_whose_number_leaps_is_not_counted_on() {
    for seq in [1_000_000_000_000, u64::MAX] {
        let place = Place::new(&[]);
        attach_once(&place);
        let last = last_record(&place);
        let path = place.store.root().join("audit.jsonl");
        let text = fs::read_to_string(&path).unwrap();
        let mut forged = last.clone();
        forged["seq"] = json!(seq);
        forged["prev"] = hex::encode(Sha256::digest(text.lines().last().unwrap())).into();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        writeln!(file, "{forged}").unwrap();
        attach_once(&place);
        let (before, after) = (last["seq"].as_u64().unwrap(), last_record(&place)["seq"].as_u64().unwrap());
        assert!(after > before && after < before + 100, "{before} is followed by {after}");
        // What was written there stays found out.
        let (code, said) = run(&place, &["audit", "verify"]);
        assert!(code != 0 && said.contains(&format!("record {} ", before + 1)), "{said}");
    }
}
