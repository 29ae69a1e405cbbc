//! Crashes, power cuts, changed bytes, older copies and newer versions.

use crate::embedded::{Place, corrupt};
use crate::suite::Admin;
use sealblk::kms::KeyState;
use sealblk::kms::embedded::keys::LogKeys;
use sealblk::kms::embedded::log::{HEADER_LEN, Header, encode_record};
use sealblk::kms::embedded::{Embedded, anchor, root_key};
use std::fs;

/// A store that has seen some changes, and what log and anchor were after each.
struct History {
    place: Place,
    log: Vec<u8>,
    /// Length of the log, the anchor, and what the store told, after each change.
    steps: Vec<(usize, Vec<u8>, String)>,
}

fn told(kms: &Embedded) -> String {
    format!("{:?} {:?}", kms.keys().unwrap(), kms.aliases().unwrap())
}

impl History {
    fn new() -> Self {
        let place = Place::new();
        let kms = place.open();
        let mut steps = Vec::new();
        let mut step = || {
            let log = fs::read(place.log()).unwrap();
            steps.push((log.len(), fs::read(place.anchor()).unwrap(), told(&place.open())));
        };
        let key = kms.create_key("first", Some("alias/a")).unwrap().arn;
        step();
        kms.disable(&key).unwrap();
        step();
        kms.enable(&key).unwrap();
        step();
        kms.create_alias("alias/b", &key).unwrap();
        step();
        kms.schedule_deletion(&key, 7).unwrap();
        step();
        let log = fs::read(place.log()).unwrap();
        History { place, log, steps }
    }

    fn restore(&self, log: &[u8], anchor: &[u8]) -> Embedded {
        fs::write(self.place.log(), log).unwrap();
        fs::write(self.place.anchor(), anchor).unwrap();
        self.place.open()
    }
}

#[test]
fn a_changed_byte_anywhere_in_the_log_is_found() {
    let history = History::new();
    let anchor = &history.steps.last().unwrap().1;
    for at in 0..history.log.len() {
        let mut changed = history.log.clone();
        changed[at] ^= 1 << (at % 8);
        let kms = history.restore(&changed, anchor);
        let error = kms.keys().unwrap_err().to_string();
        let record = 1 + history.steps.iter().filter(|(end, ..)| *end <= at).count();
        // A changed store id asks for a root key that is not there.
        let in_header = at < HEADER_LEN && (error.contains("header") || error.contains("the root key of"));
        assert!(in_header || error.contains(&format!("record {record} ")), "byte {at}: {error}");
        assert!(kms.create_key("", None).is_err(), "and nothing is written to it");
        assert_eq!(fs::read(history.place.log()).unwrap(), changed);
    }
}

#[test]
fn a_changed_byte_anywhere_in_the_anchor_is_found() {
    let history = History::new();
    let anchor = &history.steps.last().unwrap().1;
    for at in 0..anchor.len() {
        let mut changed = anchor.clone();
        changed[at] ^= 1 << (at % 8);
        corrupt(history.restore(&history.log, &changed).keys());
    }
}

#[test]
fn a_crash_at_any_byte_of_a_write_keeps_all_that_was_answered() {
    let history = History::new();
    for pair in history.steps.windows(2) {
        let [(start, anchor, before), (end, _, after)] = pair else { unreachable!() };
        for cut in *start..=*end {
            let kms = history.restore(&history.log[..cut], anchor);
            let expected = if cut == *end { after } else { before };
            assert_eq!(&told(&kms), expected, "cut at {cut}");
            // The next change mends it; each costs several syncs of the disk, so not at every byte.
            if cut % 16 != 0 && cut != *end {
                continue;
            }
            let key = kms.create_key("", None).unwrap();
            assert_eq!(history.place.open().key(&key.arn).unwrap().state, KeyState::Enabled);
        }
    }
}

#[test]
fn a_change_that_was_durable_but_not_answered_is_anchored_by_the_next_writer() {
    let history = History::new();
    let (_, anchor, _) = &history.steps[2];
    let (end, anchor_after, after) = &history.steps[3];
    let kms = history.restore(&history.log[..*end], anchor);
    assert_eq!(&told(&kms), after);
    assert_eq!(&fs::read(history.place.anchor()).unwrap(), anchor, "who only reads writes nothing");
    // Nothing to change: the key is enabled.
    kms.enable("alias/a").unwrap();
    assert_eq!(&fs::read(history.place.anchor()).unwrap(), anchor_after);
}

#[test]
fn a_write_whose_data_never_reached_the_disk_is_cut_off() {
    let history = History::new();
    let (start, anchor, before) = &history.steps[3];
    let mut zeros = history.log[..*start].to_vec();
    zeros.resize(history.log.len(), 0);
    let kms = history.restore(&zeros, anchor);
    assert_eq!(&told(&kms), before);
    kms.create_key("", None).unwrap();
    assert_ne!(told(&history.place.open()), *before);
}

#[test]
fn cutting_off_what_was_answered_is_found() {
    let history = History::new();
    let (_, anchor, _) = history.steps.last().unwrap();
    for cut in 0..history.log.len() {
        let kms = history.restore(&history.log[..cut], anchor);
        let message = corrupt(kms.keys());
        if cut >= HEADER_LEN {
            assert!(
                message.contains("was cut short") && message.contains("record 5 was answered"),
                "{message}"
            );
        }
        assert!(kms.create_key("", None).is_err());
    }
}

#[test]
fn an_older_copy_of_the_store_is_refused_until_its_anchor_is_removed() {
    let place = Place::new();
    let kms = place.open();
    let key = Admin::create_key(&kms);
    let old = fs::read(place.log()).unwrap();
    kms.disable(&key).unwrap();
    fs::write(place.log(), &old).unwrap();
    let message = corrupt(place.open().key(&key));
    assert!(message.contains(place.anchor().to_str().unwrap()), "{message}");
    corrupt(kms.key(&key).map(|k| k.state));
    // Another record in its place does not help.
    let anchor = fs::read(place.anchor()).unwrap();
    fs::remove_file(place.anchor()).unwrap();
    assert_eq!(place.open().key(&key).unwrap().state, KeyState::Enabled);
    place.open().create_alias("alias/x", &key).unwrap();
    fs::write(place.anchor(), anchor).unwrap();
    corrupt(place.open().key(&key));
}

#[test]
fn records_of_a_newer_version_are_refused_by_name() {
    let place = Place::new();
    Admin::create_key(&place.open());
    let mut log = fs::read(place.log()).unwrap();
    let header = Header::parse(&log).unwrap();
    let keys = LogKeys::derive(
        &root_key::load(&place.config(), header.store, sealblk::base::hardened::harden().unwrap()).unwrap(),
        header.store,
    )
    .unwrap();
    let last = anchor::parse(&fs::read(place.anchor()).unwrap(), &keys).unwrap();
    let body = br#"{"time":1,"changes":[{"type":"grant","id":"x"}]}"#;
    log.extend(encode_record(&last, body, &keys).0);
    fs::write(place.log(), &log).unwrap();
    let message = corrupt(place.open().keys());
    assert!(message.contains("record 2 ") && message.contains("newer version"), "{message}");
}
