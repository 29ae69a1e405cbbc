//! Crashes and full disks: nothing that was acted on is lost, and a crash is not taken for tampering.

use super::{Folders, attach, decrypt, key};
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// A log of two records, and of a third, of which the marks do not know: its bytes.
fn one_more() -> (Folders, Vec<u8>, Vec<u8>) {
    let folders = Folders::new();
    folders.open().append(&decrypt(), Some(&key(1))).unwrap();
    folders.open().append(&attach(), None).unwrap();
    let before = folders.read();
    let marks = ["signed", "plain"].map(|extension| {
        let path = folders.mark(extension);
        (fs::read(&path).unwrap(), path)
    });
    folders.open().append(&decrypt(), Some(&key(1))).unwrap();
    let third = folders.read()[before.len()..].to_vec();
    for (bytes, path) in marks {
        fs::write(path, bytes).unwrap();
    }
    (folders, before, third)
}

#[test]
fn a_crash_at_any_byte_of_a_record_is_survived_and_told_from_tampering() {
    let (folders, before, third) = one_more();
    for cut in (1..third.len()).step_by(13).chain([third.len() - 1]) {
        fs::write(folders.file(), [&before[..], &third[..cut]].concat()).unwrap();
        let report = folders.verify();
        assert_eq!((report.problem, report.records, &report.unfinished[..]), (None, 2, &[3][..]), "{cut}");
    }
    // What comes then begins a line of its own, twice.
    let crashed = [&before[..], &third[..third.len() / 2]].concat();
    fs::write(folders.file(), &crashed).unwrap();
    folders.open().append(&decrypt(), Some(&key(1))).unwrap();
    let crashed = [&folders.read()[..], &third[..100]].concat();
    fs::write(folders.file(), &crashed).unwrap();
    folders.open().append(&attach(), None).unwrap();
    let report = folders.verify();
    assert_eq!((report.problem, report.records, &report.unfinished[..]), (None, 4, &[3, 5][..]));
}

#[test]
fn zeros_that_a_power_cut_left_are_passed_over() {
    let (folders, before, _) = one_more();
    fs::write(folders.file(), [&before[..], &[0; 700]].concat()).unwrap();
    folders.open().append(&attach(), None).unwrap();
    let report = folders.verify();
    assert_eq!((report.problem, report.records, &report.unfinished[..]), (None, 3, &[3][..]));
}

#[test]
fn a_crash_between_record_and_mark_loses_nothing() {
    let (folders, before, third) = one_more();
    fs::write(folders.file(), [before, third].concat()).unwrap();
    let report = folders.verify();
    assert_eq!((report.problem, report.records, report.marked), (None, 3, Some(2)));
    folders.open().append(&attach(), None).unwrap();
    let report = folders.verify();
    assert_eq!((report.problem, report.records, report.marked), (None, 4, Some(4)));
}

#[test]
fn files_are_for_their_owner_alone() {
    let (folders, ..) = one_more();
    for path in [folders.file(), folders.mark("signed"), folders.mark("plain")] {
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
    }
}
