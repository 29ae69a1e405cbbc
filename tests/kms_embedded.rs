//! The embedded KMS from outside: the provider suite, crashes, damage, and several processes at one store.

mod kms_suite;

use kms_suite::{Admin, Subject};
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::{Clock, Moment, SystemClock};
use sealblk::kms::embedded::keys::StoreKeys;
use sealblk::kms::embedded::log::{HEADER_LEN, Header, encode_record};
use sealblk::kms::embedded::root_key;
use sealblk::kms::key_ref::DEFAULT_KEY_ALIAS;
use sealblk::kms::{EncryptionContext, KeyProvider, KeyState, KmsError, WrappedKey};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const DAY: i64 = 24 * 3_600_000;

/// A store's two folders.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("kms")
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("config")
    }

    fn log(&self) -> PathBuf {
        self.data().join("log")
    }

    fn open(&self) -> Embedded {
        self.open_at(SystemClock)
    }

    fn open_at(&self, clock: impl Clock + 'static) -> Embedded {
        Embedded::at(self.data(), self.config(), Box::new(clock))
    }

    fn config_file(&self, extension: &str) -> PathBuf {
        let mut files = fs::read_dir(self.config()).unwrap().map(|e| e.unwrap().path());
        files.find(|p| p.extension().is_some_and(|e| e == extension)).unwrap()
    }

    fn root_key(&self) -> PathBuf {
        self.config_file("key")
    }

    fn anchor(&self) -> PathBuf {
        self.config_file("head")
    }
}

fn volume(id: &str) -> EncryptionContext {
    EncryptionContext::pair("aws:ebs:id", id)
}

fn corrupt(result: Result<impl std::fmt::Debug, KmsError>) -> String {
    match result.unwrap_err() {
        KmsError::Corrupt(message) => message,
        other => panic!("not Corrupt: {other:?}"),
    }
}

impl Admin for Embedded {
    fn create_key(&self) -> String {
        Embedded::create_key(self, "", None).unwrap().arn
    }
    fn absent_key(&self) -> String {
        self.locality().key_arn(uuid::Uuid::new_v4())
    }
    fn create_alias(&self, name: &str, key: &str) -> Result<(), KmsError> {
        Embedded::create_alias(self, name, key)
    }
    fn enable(&self, key: &str) -> Result<(), KmsError> {
        Embedded::enable(self, key).map(drop)
    }
    fn disable(&self, key: &str) -> Result<(), KmsError> {
        Embedded::disable(self, key).map(drop)
    }
    fn schedule_deletion(&self, key: &str) -> Result<(), KmsError> {
        Embedded::schedule_deletion(self, key, 7).map(drop)
    }
    fn cancel_deletion(&self, key: &str) -> Result<(), KmsError> {
        Embedded::cancel_deletion(self, key).map(drop)
    }
}

#[test]
fn the_embedded_kms_passes_the_provider_suite() {
    let place = Place::new();
    let kms = place.open();
    kms_suite::run(&Subject { provider: &kms, admin: &kms }, "");
}

#[test]
fn keys_and_aliases_have_awss_rules() {
    let place = Place::new();
    let kms = place.open();
    assert_eq!(kms.keys().unwrap(), vec![]);
    assert!(!place.data().exists(), "looking makes nothing");
    let key = kms.create_key("d", Some("alias/one")).unwrap();
    let other = Admin::create_key(&kms);
    let arn = "arn:aws:kms:us-east-1:000000000000:alias/one";
    let taken = KmsError::AlreadyExists(format!("An alias with the name {arn} already exists"));
    assert_eq!(kms.create_alias("alias/one", &other), Err(taken.clone()));
    assert_eq!(kms.create_key("", Some("alias/one")), Err(taken));
    assert_eq!(kms.keys().unwrap().len(), 2, "neither key nor alias");
    for name in ["one", "alias/", "alias/a b", "alias/aws/x", "alias/aws/ebs"] {
        assert!(matches!(kms.create_alias(name, &other), Err(KmsError::Validation(_))), "{name}");
        assert!(matches!(kms.delete_alias(name), Err(KmsError::Validation(_))), "{name}");
    }
    assert!(matches!(kms.create_key(&"x".repeat(8193), None), Err(KmsError::Validation(_))));
    for days in [6, 31] {
        assert!(matches!(kms.schedule_deletion(&other, days), Err(KmsError::Validation(_))));
    }
    // Away from a dying key an alias may move, towards one it may not.
    kms.schedule_deletion(&key.arn, 30).unwrap();
    kms.update_alias("alias/one", &other).unwrap();
    assert!(matches!(kms.update_alias("alias/one", &key.arn), Err(KmsError::PendingDeletion(_))));
    kms.delete_alias("alias/one").unwrap();
    assert_eq!(kms.aliases().unwrap(), vec![]);
    let again = place.open().key(&key.arn).unwrap();
    assert_eq!((again.state, again.description.as_str()), (KeyState::PendingDeletion, "d"));
}

#[test]
fn files_are_closed_to_others_and_the_root_key_lies_elsewhere() {
    let place = Place::new();
    Admin::create_key(&place.open());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    for dir in [place.data(), place.config()] {
        assert_eq!(mode(&dir), 0o700);
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
    }
    let names: BTreeSet<_> = fs::read_dir(place.data()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["lock", "log"].map(Into::into).into());
}

#[test]
fn without_its_own_private_root_key_a_store_is_worthless() {
    let place = Place::new();
    let arn = Admin::create_key(&place.open());
    let (path, good) = (place.root_key(), fs::read(place.root_key()).unwrap());
    let refused = |words: &str| {
        let error = place.open().key(&arn).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(path.to_str().unwrap()), "{error}");
    };
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    refused("may be read or changed by others (mode 0640)");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, "sealblk-kms-root-key-1:00").unwrap();
    refused("is not a KMS root key");
    let mut wrong = good.clone();
    let digit = wrong.len() - 2;
    wrong[digit] = if wrong[digit] == b'0' { b'1' } else { b'0' };
    fs::write(&path, &wrong).unwrap();
    refused("is not the one this store was made with");
    fs::remove_file(&path).unwrap();
    refused("is missing");
    assert!(place.open().create_key("", None).is_err(), "no new root key for an old store");
    fs::write(&path, &good).unwrap();
    assert!(place.open().key(&arn).is_err(), "written with the umask's mode");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(place.open().key(&arn).unwrap().state, KeyState::Enabled);
}

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
    let keys = StoreKeys::derive(&root_key::load(&place.config(), header.store).unwrap(), header.store);
    let last = sealblk::kms::embedded::anchor::parse(&fs::read(place.anchor()).unwrap(), &keys).unwrap();
    let body = br#"{"time":1,"changes":[{"type":"grant","id":"x"}]}"#;
    log.extend(encode_record(&last, body, &keys).0);
    fs::write(place.log(), &log).unwrap();
    let message = corrupt(place.open().keys());
    assert!(message.contains("record 2 ") && message.contains("newer version"), "{message}");
}

/// A clock that a test sets.
#[derive(Clone)]
struct Hands(Arc<Mutex<Moment>>);

impl Hands {
    fn new() -> Self {
        Hands(Arc::new(Mutex::new(Moment {
            wall: 20_000 * DAY,
            boot: Some(uuid::Uuid::from_u128(1)),
            up: DAY,
        })))
    }

    fn pass(&self, ms: i64) {
        let mut now = self.0.lock().unwrap();
        now.wall += ms;
        now.up += ms;
    }

    fn jump(&self, ms: i64) {
        self.0.lock().unwrap().wall += ms;
    }

    fn reboot(&self) {
        let mut now = self.0.lock().unwrap();
        now.boot = Some(uuid::Uuid::new_v4());
        now.up = 0;
    }
}

impl Clock for Hands {
    fn now(&self) -> Moment {
        self.0.lock().unwrap().clone()
    }
}

#[test]
fn a_key_dies_when_its_window_is_over_and_its_material_leaves_the_disk() {
    let (place, clock) = (Place::new(), Hands::new());
    let kms = place.open_at(clock.clone());
    let key = kms.create_key("dying words", Some("alias/dying")).unwrap();
    let other = kms.create_key("staying", None).unwrap();
    let (context, other_key) = (volume("vol-1"), other.arn.as_str());
    let wrapped = kms.generate_wrapped("alias/dying", 64, &context).unwrap();
    let kept = kms.generate_wrapped(other_key, 64, &context).unwrap();
    let deletion = kms.schedule_deletion(&key.arn, 7).unwrap().deletion;
    assert_eq!(deletion, Some(20_007 * DAY));
    let leftover = place.data().join("log.0000.tmp");
    fs::copy(place.log(), &leftover).unwrap();

    clock.jump(100 * DAY);
    assert_eq!(place.open_at(clock.clone()).key(&key.arn).unwrap().state, KeyState::PendingDeletion);
    clock.jump(-100 * DAY);
    clock.pass(7 * DAY - 1);
    assert_eq!(place.open_at(clock.clone()).key(&key.arn).unwrap().state, KeyState::PendingDeletion);
    clock.pass(1);
    let fresh = place.open_at(clock.clone());
    let gone = KmsError::NotFound(format!("Key '{}' does not exist", key.arn));
    assert_eq!(fresh.key(&key.arn), Err(gone.clone()));
    assert!(matches!(fresh.key("alias/dying"), Err(KmsError::NotFound(_))));
    assert_eq!(fresh.decrypt(&wrapped, &context).unwrap_err(), gone);
    assert_eq!(kms.key(&key.arn), Err(gone), "also for who had it open");
    let blob = WrappedKey { key_id: other.arn.clone(), blob: wrapped.blob };
    assert!(matches!(fresh.decrypt(&blob, &context), Err(KmsError::AccessDenied(_))));
    assert!(fresh.decrypt(&kept, &context).is_ok());
    let log = fs::read(place.log()).unwrap();
    let holds = |words: &[u8]| log.windows(words.len()).any(|w| w == words);
    assert!(!holds(b"dying words") && holds(b"staying") && !leftover.exists());
    assert!(fresh.create_key("", None).is_ok() && place.open().key(other_key).is_ok());
}

#[test]
fn after_a_reboot_a_key_dies_only_when_the_clock_has_said_so_for_a_day() {
    let (place, clock) = (Place::new(), Hands::new());
    let kms = place.open_at(clock.clone());
    let key = Admin::create_key(&kms);
    kms.schedule_deletion(&key, 7).unwrap();
    let open = || place.open_at(clock.clone());
    clock.reboot();
    clock.jump(3650 * DAY);
    assert!(open().key(&key).is_ok());
    clock.jump(-3650 * DAY);
    assert!(open().key(&key).is_ok(), "the wrong clock was forgotten");
    clock.pass(8 * DAY);
    assert!(open().key(&key).is_ok(), "first seen now");
    clock.pass(DAY - 1);
    assert!(open().key(&key).is_ok());
    clock.pass(1);
    assert!(matches!(open().key(&key), Err(KmsError::NotFound(_))));
}

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
        for attempts in &attempts {
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
            });
        }
        for _ in 0..20 {
            kms.disable(&key).unwrap();
            epoch.fetch_add(1, Ordering::SeqCst);
            let seen: Vec<u64> = attempts.iter().map(|a| a.load(Ordering::SeqCst)).collect();
            // Two more: the second one began after the epoch.
            while attempts.iter().zip(&seen).any(|(a, s)| a.load(Ordering::SeqCst) < s + 2) {
                std::thread::yield_now();
            }
            epoch.fetch_add(1, Ordering::SeqCst);
            kms.enable(&key).unwrap();
        }
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
            .args(["--ignored", "--exact", "other_process", "--nocapture", "--test-threads=1"])
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
    let kms = Embedded::at(place.join("kms"), place.join("config"), Box::new(SystemClock));
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
