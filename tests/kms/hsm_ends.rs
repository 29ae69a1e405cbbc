//! The process that has an HSM's module ends at each of its calls, whatever needs a key at that moment: that
//! succeeds by another session, or is refused in words; nothing half made is left, and a second try succeeds.

use crate::common::attach::{Place, open, read};
use crate::common::disk::pattern;
use crate::common::softhsm::{SoftHsm, give_pin};
use crate::common::store::{Store, said};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The volume `t` with data, under a key in a token whose module ends when it is told to.
struct Site {
    place: Place,
    at: PathBuf,
    hsm: SoftHsm,
    _folder: tempfile::TempDir,
}

/// A module that is SoftHSM's until its process ends. By its name it may have what SoftHSM needs.
fn dying_module(folder: &Path) -> PathBuf {
    let module = folder.join("libsofthsm-dying.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kms/dying_module.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&module).arg(source).status();
    assert!(built.expect("start the C compiler that links Rust").success());
    module
}

impl Site {
    fn new() -> Self {
        let hsm = SoftHsm::with_tokens(&["one"]);
        let folder = tempfile::tempdir().expect("make a temporary folder");
        let (module, at) = (dying_module(folder.path()), folder.path().join("at"));
        fs::write(&at, "never").expect("write a file");
        let real = SoftHsm::module();
        let store = Store::new();
        store.configure("kms-patience = 1");
        let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        let own = [("DYING_MODULE".to_owned(), text(&real)), ("DYING_AT".to_owned(), text(&at))];
        store.set_environment([hsm.environment(), own.into()].concat());
        let mut add = store.command();
        add.args(["kms", "store", "add", "--token", "one", "--keep-pin", "--pkcs11"]).arg(&module);
        let libraries = real.ancestors().nth(4).expect("a tree");
        for path in [&at, &real.parent().expect("a folder").to_owned(), &libraries.to_owned()] {
            add.arg("--path").arg(path);
        }
        give_pin(&mut add, &SoftHsm::pin("one"));
        let output = add.output().expect("start sealblk");
        assert!(output.status.success(), "{}", said(&output));
        store.ok(&["key", "create", "--key-store", "one", "--alias", "one"]);
        let place = Place::of(store, &["--key", "alias/one"]);
        place.put(128, &data());
        Site { place, at, hsm, _folder: folder }
    }

    fn store(&self) -> &Store {
        &self.place.store
    }

    fn ends(&self, when: &str) {
        fs::write(&self.at, when).expect("write a file");
    }

    /// Whether the module has come as far as it was told.
    fn has_ended(&self) -> bool {
        let now = fs::read_to_string(&self.at).expect("read a file");
        now.starts_with("once -1") || now.ends_with("reached\n")
    }

    /// Does `act` again and again, with the module's process ended at one call after the other. What it makes
    /// `undo` takes back; `made` says what there is.
    fn at_every_call(
        &self,
        mode: &str,
        act: impl Fn() -> Output,
        made: impl Fn() -> Vec<String>,
        undo: impl Fn(&[String]),
    ) {
        let before = made();
        let (mut refused, mut step) = (0, 0);
        loop {
            self.ends(&format!("{mode} {step}"));
            let output = act();
            let has_ended = self.has_ended();
            self.ends("never");
            let words = said(&output);
            let now = made();
            if output.status.success() {
                let new: Vec<String> = now.iter().filter(|it| !before.contains(it)).cloned().collect();
                undo(&new);
                assert_eq!(made(), before, "{mode} {step}");
            } else {
                refused += 1;
                assert!(matches!(output.status.code(), Some(5 | 6)), "{mode} {step}: {words}");
                let names_it = words.contains("the token \"one\"") || words.contains("PKCS#11 module");
                assert!(names_it && !words.contains("panicked"), "{mode} {step}: {words}");
                assert_eq!(now, before, "{mode} {step}: nothing half made: {words}");
                let again = act();
                assert!(again.status.success(), "{mode} {step}, again: {}", said(&again));
                let new: Vec<String> = made().into_iter().filter(|it| !before.contains(it)).collect();
                undo(&new);
            }
            if !has_ended {
                assert!(output.status.success(), "{mode} {step}: {words}");
                break;
            }
            step += 1;
            assert!(step < 300, "it never ends");
        }
        assert!(step > 5, "the module is asked more than {step} times");
        assert!(refused > 0 || mode == "once", "some of them are refused");
        self.store().ok(&["store", "check"]);
        self.opens();
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.store().run(arguments)
    }

    fn opens(&self) {
        let host = self.place.attach(&[]);
        assert!(read(&mut open(&self.place.socket()).rings[0], 128, data().len()) == data());
        host.end();
    }

    /// The ids of all volumes and snapshots, and which files there are of them.
    fn things(&self) -> Vec<String> {
        let mut found = Vec::new();
        for folder in ["volumes", "snapshots", "layers"] {
            let Ok(entries) = fs::read_dir(self.store().root().join(folder)) else { continue };
            let names = entries.map(|it| it.expect("list").file_name().into_string().expect("UTF-8"));
            found.extend(names.map(|name| format!("{folder}/{name}")));
        }
        found.sort();
        found
    }
}

fn data() -> Vec<u8> {
    pattern(5, 1 << 16)
}

/// An attach that says so and is detached again.
fn attach_once(site: &Site) -> Output {
    let mut command = site.place.attach_command(&[]);
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("start sealblk");
    let mut line = String::new();
    let mut reader = std::io::BufReader::new(child.stdout.take().expect("piped"));
    std::io::BufRead::read_line(&mut reader, &mut line).expect("read a line");
    if line.is_empty() {
        return child.wait_with_output().expect("wait");
    }
    site.store().ok(&["detach", "t"]);
    drop(reader);
    child.wait_with_output().expect("wait")
}

#[test]
fn an_attach_succeeds_or_is_refused_in_words_wherever_the_hsm_ends() {
    let site = Site::new();
    site.at_every_call("once", || attach_once(&site), || site.things(), |_| {});
    site.at_every_call("each", || attach_once(&site), || site.things(), |_| {});
}

#[test]
fn a_snapshot_and_its_copy_are_whole_or_not_there_wherever_the_hsm_ends() {
    let site = Site::new();
    let delete = |of: &[String]| {
        let ids = of.iter().filter_map(|it| it.strip_prefix("snapshots/")?.strip_suffix(".json"));
        for id in ids {
            site.store().ok(&["snapshot", "delete", id]);
        }
    };
    // A snapshot leaves a layer of the volume's behind, and a copy none.
    let records = || site.things().into_iter().filter(|it| it.starts_with("snapshots/")).collect::<Vec<_>>();
    site.at_every_call("once", || site.run(&["snapshot", "create", "t"]), records, delete);
    let snapshot = site.store().ok(&["snapshot", "create", "t"]).trim().to_owned();
    for mode in ["once", "each"] {
        site.at_every_call(mode, || site.run(&["snapshot", "copy", &snapshot]), || site.things(), delete);
    }
}

#[test]
fn a_clone_is_whole_or_not_there_wherever_the_hsm_ends() {
    let site = Site::new();
    let snapshot = site.store().ok(&["snapshot", "create", "t"]).trim().to_owned();
    let create = || site.run(&["volume", "create", "--snapshot", &snapshot, "--name", "c"]);
    let delete = |of: &[String]| {
        if of.iter().any(|it| it.starts_with("volumes/")) {
            site.store().ok(&["volume", "delete", "c"]);
        }
    };
    for mode in ["once", "each"] {
        site.at_every_call(mode, create, || site.things(), delete);
    }
}

#[test]
fn a_new_data_key_is_whole_or_not_there_wherever_the_hsm_ends() {
    let site = Site::new();
    let rekey = || site.run(&["volume", "rekey", "t"]);
    // What a re-key leaves is a layer under the old data key.
    let flatten = |_: &[String]| drop(site.store().ok(&["volume", "flatten", "t", "--follow"]));
    let wrapped =
        || site.place.metadata().keys().iter().map(|key| key.first().wrapped.key_id.clone()).collect();
    for mode in ["once", "each"] {
        site.at_every_call(mode, rekey, wrapped, flatten);
    }
}

/// The key store, and then the token itself, is away in the middle of what needs it.
#[test]
fn whatever_needs_a_key_store_that_is_away_is_refused_in_words_and_succeeds_afterwards() {
    let site = Site::new();
    let snapshot = site.store().ok(&["snapshot", "create", "t"]).trim().to_owned();
    let acts: [&[&str]; 5] = [
        &["snapshot", "create", "t"],
        &["snapshot", "copy", &snapshot],
        &["volume", "create", "--snapshot", &snapshot, "--name", "c"],
        &["volume", "rekey", "t"],
        &["volume", "rewrap", "t"],
    ];
    let refused = |code: i32, words: &str| {
        let before = site.things();
        for act in acts {
            let output = site.run(act);
            assert_eq!(output.status.code(), Some(code), "{act:?}: {}", said(&output));
            assert!(said(&output).contains(words), "{act:?}: {}", said(&output));
            assert_eq!(site.things(), before, "{act:?}");
        }
        assert!(site.place.refuse(code, &[]).contains(words));
    };
    site.store().ok(&["kms", "store", "disconnect", "one"]);
    refused(5, "is unavailable");
    site.store().ok(&["kms", "store", "connect", "one"]);
    let away = site.hsm.tokens().with_extension("away");
    fs::rename(site.hsm.tokens(), &away).expect("rename a folder");
    fs::create_dir(site.hsm.tokens()).expect("make a folder");
    refused(6, "there is no such token");
    fs::remove_dir(site.hsm.tokens()).expect("remove a folder");
    fs::rename(&away, site.hsm.tokens()).expect("rename a folder");
    for act in acts {
        site.store().ok(act);
    }
    site.store().ok(&["volume", "flatten", "t", "--follow"]);
    site.store().ok(&["store", "check"]);
    site.opens();
}
