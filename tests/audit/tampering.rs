//! What somebody who can write the store's folder, and has no audit key, can do to the log.

use super::{Folders, attach, decrypt, key};
use sealblk::audit::line;
use sealblk::audit::verify::Damage;
use sha2::{Digest, Sha256};
use std::fs;

/// Five records of the KMS's and of others: who has no key has written the third, and the last one.
fn written() -> (Folders, Vec<Vec<u8>>) {
    let folders = Folders::new();
    let log = folders.open();
    for n in 1..=5 {
        match n {
            3 | 5 => log.append(&attach(), None).unwrap(),
            _ => log.append(&decrypt(), Some(&key(1))).unwrap(),
        }
    }
    let lines = folders.read().split_inclusive(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    (folders, lines)
}

/// The first bad record that is named, by who has the key and by who has not, if the file holds these lines.
#[track_caller]
fn found(folders: &Folders, lines: &[Vec<u8>], damage: Damage, record: u64) {
    fs::write(folders.file(), lines.concat()).unwrap();
    for report in [folders.verify(), folders.verify_without_key()] {
        let problem = report.problem.expect("tampering is found");
        assert_eq!((problem.damage, problem.record), (damage, Some(record)), "{}", problem.message);
        assert_eq!(report.records, record - 1);
    }
}

#[test]
fn a_log_that_nobody_touched_is_whole() {
    let (folders, _) = written();
    let report = folders.verify();
    assert_eq!((report.problem, report.records, report.marked), (None, 5, Some(5)));
    assert_eq!((report.authenticated, report.unchecked), (3, 0));
    let report = folders.verify_without_key();
    assert_eq!((report.problem, report.authenticated, report.unchecked), (None, 0, 3));
    // Another store's key cannot judge these MACs.
    let empty = Folders::new();
    assert_eq!((empty.verify().problem, empty.verify().records), (None, 0));
}

#[test]
fn a_changed_byte_anywhere_is_found_and_its_record_named() {
    let (folders, lines) = written();
    for n in 0..lines.len() {
        // Some of them: each takes a walk over the file.
        for at in (0..lines[n].len() - 1).step_by(7).chain([0, lines[n].len() - 2]) {
            let mut changed = lines.clone();
            changed[n][at] ^= 1;
            fs::write(folders.file(), changed.concat()).unwrap();
            for report in [folders.verify(), folders.verify_without_key()] {
                let problem = report.problem.unwrap_or_else(|| panic!("byte {at} of record {}", n + 1));
                let first = problem.record.unwrap();
                assert_eq!(first, n as u64 + 1, "byte {at}: {problem:?}");
            }
        }
    }
}

#[test]
fn a_removed_record_is_missed() {
    let (folders, lines) = written();
    for n in 0..4 {
        let mut without = lines.clone();
        without.remove(n);
        found(&folders, &without, Damage::Missing, n as u64 + 1);
    }
}

#[test]
fn records_that_changed_places_are_found() {
    let (folders, lines) = written();
    for n in 0..4 {
        let mut swapped = lines.clone();
        swapped.swap(n, n + 1);
        found(&folders, &swapped, Damage::Misplaced, n as u64 + 1);
    }
    let mut repeated = lines.clone();
    repeated.insert(2, lines[1].clone());
    found(&folders, &repeated, Damage::Misplaced, 3);
}

#[test]
fn an_end_that_was_cut_off_is_missed() {
    let (folders, lines) = written();
    for left in 0..5 {
        found(&folders, &lines[..left], Damage::CutOff, left as u64 + 1);
    }
    fs::remove_file(folders.file()).unwrap();
    let problem = folders.verify().problem.unwrap();
    assert_eq!((problem.damage, problem.record), (Damage::CutOff, Some(1)));
    // In the middle of a record, as a crash would: but the record was finished.
    let cut = lines[4][..lines[4].len() / 2].to_vec();
    found(&folders, &[&lines[..4], &[cut]].concat(), Damage::Changed, 5);
}

#[test]
fn what_is_written_on_after_a_cut_does_not_hide_it() {
    let (folders, lines) = written();
    for left in 0..5 {
        fs::write(folders.file(), lines[..left].concat()).unwrap();
        folders.open().append(&decrypt(), Some(&key(1))).unwrap();
        folders.open().append(&attach(), None).unwrap();
        let problem = folders.verify().problem.unwrap();
        assert_eq!((problem.damage, problem.record), (Damage::Missing, Some(left as u64 + 1)));
    }
}

#[test]
fn an_older_copy_in_its_place_is_found_also_when_it_was_written_on() {
    let (folders, _) = written();
    let older = folders.read();
    folders.open().append(&decrypt(), Some(&key(1))).unwrap();
    fs::write(folders.file(), older).unwrap();
    let problem = folders.verify().problem.unwrap();
    assert_eq!((problem.damage, problem.record), (Damage::CutOff, Some(6)));
    folders.open().append(&attach(), None).unwrap();
    let problem = folders.verify().problem.unwrap();
    assert_eq!((problem.damage, problem.record), (Damage::Missing, Some(6)));
}

/// Makes the chain right again from the second record on, as far as hashes go.
fn chained_anew(lines: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut lines = lines.to_vec();
    for n in 1..lines.len() {
        let before = lines[n - 1].strip_suffix(b"\n").unwrap();
        let prev = hex::encode(Sha256::digest(before));
        let text = String::from_utf8(lines[n].clone()).unwrap();
        let at = text.find("\"prev\":\"").unwrap() + 8;
        lines[n] = format!("{}{prev}{}", &text[..at], &text[at + 64..]).into_bytes();
    }
    lines
}

#[test]
fn a_chain_that_was_made_right_again_is_found_by_the_macs_and_by_the_marks() {
    let (folders, mut lines) = written();
    let text = String::from_utf8(lines[2].clone()).unwrap();
    lines[2] = text.replace("AttachVolume", "DetachVolume").into_bytes();
    let lines = chained_anew(&lines);
    fs::write(folders.file(), lines.concat()).unwrap();
    let problem = folders.verify().problem.unwrap();
    assert_eq!((problem.damage, problem.record), (Damage::Changed, Some(4)), "{}", problem.message);
    let problem = folders.verify_without_key().problem.unwrap();
    assert_eq!((problem.damage, problem.record), (Damage::Changed, Some(4)), "{}", problem.message);
}

#[test]
fn the_last_record_is_held_by_a_mark_also_without_a_mac() {
    let (folders, mut lines) = written();
    let text = String::from_utf8(lines[4].clone()).unwrap();
    lines[4] = text.replace("AttachVolume", "DetachVolume").into_bytes();
    found(&folders, &lines, Damage::Changed, 5);
}

#[test]
fn a_record_in_the_kms_s_name_needs_a_mac() {
    let (folders, mut lines) = written();
    let last = line::parse(lines[4].strip_suffix(b"\n").unwrap()).unwrap();
    let forged = |key| line::encode(last.log, &last.position, &decrypt(), key).expect("a next number").0;
    let (without_mac, with_another) = (forged(None), forged(Some(&key(2))));
    lines.push(without_mac);
    found(&folders, &lines, Damage::Changed, 6);
    lines[5] = with_another;
    fs::write(folders.file(), lines.concat()).unwrap();
    let problem = folders.verify().problem.unwrap();
    assert_eq!((problem.damage, problem.record), (Damage::Changed, Some(6)));
}

#[test]
fn a_log_that_was_begun_anew_is_not_taken_for_the_old_one() {
    let (folders, _) = written();
    let other = Folders::new();
    other.open().append(&decrypt(), Some(&key(1))).unwrap();
    fs::copy(other.file(), folders.file()).unwrap();
    for report in [folders.verify(), folders.verify_without_key()] {
        let problem = report.problem.unwrap();
        assert_eq!((problem.damage, problem.record), (Damage::Misplaced, Some(1)));
    }
}

#[test]
fn a_mark_that_was_changed_is_found() {
    let (folders, _) = written();
    for extension in ["signed", "plain"] {
        let path = folders.mark(extension);
        let good = fs::read(&path).unwrap();
        let mut changed = good.clone();
        changed[60] ^= 1;
        fs::write(&path, changed).unwrap();
        assert!(folders.verify().problem.is_some(), "{extension}");
        fs::write(&path, good).unwrap();
    }
    // A mark that was set back to an earlier record has another MAC.
    let path = folders.mark("signed");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace(" 4 ", " 2 ")).unwrap();
    assert_eq!(folders.verify().problem.unwrap().damage, Damage::Mark);
}

#[test]
fn a_store_that_was_moved_keeps_its_marks() {
    let (folders, lines) = written();
    let moved = Folders::new();
    fs::create_dir(moved.root()).unwrap();
    fs::rename(folders.config(), moved.config()).unwrap();
    fs::write(moved.file(), lines.concat()).unwrap();
    assert_eq!((moved.verify().problem, moved.verify().marked), (None, Some(5)));
    found(&moved, &lines[..4], Damage::CutOff, 5);
}
