//! Keys in HSMs, from outside: SoftHSM's tokens, the real program, and its wire by boto3.

use crate::common::attach::{Place, open, read};
use crate::common::disk::pattern;
use crate::common::helpers::children;
use crate::common::kms_server::{KmsServer, Principal};
use crate::common::leaks::Needles;
use crate::common::patience::{limit, wait_for};
use crate::common::softhsm::{SoftHsm, give_pin};
use crate::common::store::{Store, said};
use crate::embedded::hands::{DAY, Hands};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sealblk::kms::embedded::Embedded;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

/// A store with key stores in tokens.
struct Site {
    hsm: SoftHsm,
    place: Place,
}

impl Site {
    /// Key stores in the tokens `one` and `two`, whose PINs are kept; a key in each, `alias/one` and
    /// `alias/two`; and a volume `t` under the first, with data.
    fn new(settings: &str) -> Self {
        let hsm = SoftHsm::with_tokens(&["one", "two"]);
        let store = Store::new();
        store.configure(settings);
        store.set_environment(hsm.environment());
        for label in ["one", "two"] {
            let output = add(&store, label, &SoftHsm::pin(label), &["--keep-pin"]);
            assert!(output.status.success(), "{}", said(&output));
            store.ok(&["key", "create", "--key-store", label, "--alias", label]);
        }
        let place = Place::of(store, &["--key", "alias/one"]);
        place.put(128, &data());
        Site { hsm, place }
    }

    fn store(&self) -> &Store {
        &self.place.store
    }

    #[track_caller]
    fn opens(&self) {
        let host = self.place.attach(&[]);
        assert!(read(&mut open(&self.place.socket()).rings[0], 128, data().len()) == data());
        host.end();
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.store().ok(&[&["--json"], arguments].concat())).expect("JSON")
    }

    fn arn(&self, key: &str) -> String {
        text(&self.json(&["key", "show", key])["arn"]).to_owned()
    }

    #[track_caller]
    fn key_of_volume(&self, alias: &str) {
        assert_eq!(self.place.key(), self.arn(alias));
    }
}

fn data() -> Vec<u8> {
    pattern(3, 1 << 16)
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

/// Makes the token of this label a key store of the same name.
fn add(store: &Store, label: &str, pin: &str, arguments: &[&str]) -> Output {
    let mut command = store.command();
    let module = SoftHsm::module();
    command.args(["kms", "store", "add", "--pkcs11", module.to_str().expect("UTF-8"), "--token", label]);
    give_pin(command.args(arguments), pin);
    command.output().expect("start sealblk")
}

#[test]
fn a_volume_under_a_key_in_a_token_goes_through_its_life() {
    let site = Site::new("");
    let store = site.store();
    assert_eq!(site.hsm.keys(), 2);
    site.opens();
    // Anew by the same key, by one in another token, by one of the KMS's own, and back.
    let before = site.place.metadata().keys()[0].first().wrapped.blob.clone();
    store.ok(&["volume", "rewrap", "t"]);
    assert_ne!(site.place.metadata().keys()[0].first().wrapped.blob, before);
    store.ok(&["key", "create", "--alias", "soft"]);
    for alias in ["alias/two", "alias/soft", "alias/one"] {
        store.ok(&["volume", "rewrap", "t", "--key", alias]);
        site.key_of_volume(alias);
        site.opens();
    }
    store.ok(&["snapshot", "create", "t", "--name", "s"]);
    store.ok(&["volume", "create", "--snapshot", "s", "--name", "clone", "--key", "alias/two"]);
    store.ok(&["volume", "rekey", "t", "--key", "alias/two"]);
    store.ok(&["volume", "flatten", "t", "--follow"]);
    site.key_of_volume("alias/two");
    site.opens();
    assert_eq!(site.hsm.keys(), 2, "a token has keys of a KMS and no others");
}

#[test]
fn a_key_store_that_is_not_connected_stops_no_attach_by_another_key() {
    let site = Site::new("kms-patience = 1");
    let store = site.store();
    store.ok(&["key", "create", "--alias", "soft"]);
    store.ok(&["kms", "store", "disconnect", "one"]);
    let arn = site.arn("alias/one");
    assert_eq!(site.json(&["key", "show", "alias/one"])["state"], "Unavailable");
    let said = site.place.refuse(5, &[]);
    assert!(
        said.contains(&format!("{arn} is unavailable")) && said.contains("sealblk kms store connect"),
        "{said}"
    );
    assert_eq!(
        site.place.events().pop().expect("an event")["detail"]["cause"],
        format!("{arn} is unavailable.")
    );
    store.ok(&["kms", "store", "connect", "one"]);
    for alias in ["alias/two", "alias/soft"] {
        store.ok(&["volume", "key", "add", "t", "--key", alias]);
    }
    let slots = site.place.metadata().keys()[0].slots().len();
    assert_eq!(slots, 3);
    site.opens();
    store.ok(&["kms", "store", "disconnect", "one"]);
    site.opens();
    // The token itself is gone.
    fs::rename(site.hsm.tokens(), site.hsm.tokens().with_extension("away")).expect("rename a folder");
    fs::create_dir(site.hsm.tokens()).expect("make a folder");
    site.opens();
    store.ok(&["key", "disable", "alias/soft"]);
    let said = site.place.refuse(6, &[]);
    for words in ["is unavailable", "there is no such token: the token \"two\"", "is disabled"] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn a_token_that_cannot_be_used_makes_no_key_store() {
    let hsm = SoftHsm::with_tokens(&["one"]);
    let store = Store::new();
    store.set_environment(hsm.environment());
    let refused = |module: &Path, token: &str, pin: &str, code: i32, words: &str| {
        let mut command = store.command();
        command.args(["kms", "store", "add", "--token", token, "--pkcs11"]).arg(module);
        give_pin(&mut command, pin);
        let output = command.output().expect("start sealblk");
        assert!(said(&output).contains(words), "{}", said(&output));
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
    };
    let (module, pin) = (SoftHsm::module(), SoftHsm::pin("one"));
    refused(Path::new("/nowhere/module.so"), "one", &pin, 1, "there is no PKCS#11 module /nowhere/module.so");
    let not_one = std::env::current_exe().expect("this program");
    refused(&not_one, "one", &pin, 1, "load the PKCS#11 module");
    refused(&module, "other", &pin, 6, "there is no such token: the token \"other\"");
    refused(&module, "one", "not-the-pin", 5, "CKR_PIN_INCORRECT");
    let listed: Value = serde_json::from_str(&store.ok(&["--json", "kms", "store", "list"])).expect("JSON");
    assert_eq!(listed["key_stores"], serde_json::json!([]));
    // Without a PIN from anywhere, and without a terminal.
    let mut command = store.command();
    command.args(["kms", "store", "add", "--token", "one", "--pkcs11"]).arg(&module);
    // SAFETY: between fork and exec the closure makes one system call.
    unsafe { command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(Into::into)) };
    let output = command.output().expect("start sealblk");
    assert!(!output.status.success() && said(&output).contains("SEALBLK_PIN_FD=N"), "{}", said(&output));
}

/// A module that tries everything, in the process that loads it.
#[test]
fn a_hostile_module_reaches_nothing_of_the_kms() {
    let store = Store::new();
    store.ok(&["key", "create"]);
    let folder = tempfile::tempdir().expect("make a temporary folder");
    let module = folder.path().join("hostile.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kms/hostile_module.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&module).arg(source).status();
    assert!(built.expect("start the C compiler that links Rust").success());
    let (allowed, log) = (folder.path().join("allowed"), store.root().join("kms/log"));
    fs::create_dir(&allowed).expect("make a folder");
    let in_config = fs::read_dir(store.config()).expect("list a folder").map(|it| it.expect("list").path());
    let key = { in_config }.find(|path| path.extension().is_some_and(|it| it == "key")).expect("a root key");
    let mut command = store.command();
    command
        .args(["kms", "store", "add", "--token", "x", "--pkcs11"])
        .arg(&module)
        .arg("--path")
        .arg(&allowed);
    command.env("HOSTILE_OUT", allowed.join("said")).env("HOSTILE_KEY", &key).env("HOSTILE_LOG", &log);
    command.env("AWS_SECRET_ACCESS_KEY", "x").env("CREDENTIALS_DIRECTORY", folder.path());
    give_pin(&mut command, "its-pin");
    let output = command.output().expect("start sealblk");
    assert!(said(&output).contains("load the PKCS#11 module"), "{}", said(&output));
    let done = fs::read_to_string(allowed.join("said")).expect("it may write there");
    let can: Vec<&str> = done.lines().filter_map(|line| line.strip_suffix(" yes")).collect();
    assert_eq!(can, ["begins", "ends"], "{done}");
    assert!(done.lines().count() > 12, "{done}");
    assert!(log.exists());
}

#[test]
fn a_pin_that_is_not_kept_comes_by_a_descriptor_or_a_credential() {
    let hsm = SoftHsm::with_tokens(&["one"]);
    let store = Store::new();
    store.set_environment(hsm.environment());
    let output = add(&store, "one", &SoftHsm::pin("one"), &[]);
    assert!(output.status.success(), "{}", said(&output));
    let with_pin = |arguments: &[&str]| {
        let mut command = store.command();
        give_pin(command.args(arguments), &SoftHsm::pin("one"));
        let output = command.output().expect("start sealblk");
        assert!(output.status.success(), "{}", said(&output));
    };
    with_pin(&["key", "create", "--key-store", "one", "--alias", "one"]);
    with_pin(&["volume", "create", "--size", "8MiB", "--name", "v", "--key", "alias/one"]);
    let listed: Value = serde_json::from_str(&store.ok(&["--json", "kms", "store", "list"])).expect("JSON");
    let id = text(&listed["key_stores"][0]["id"]).to_owned();
    assert_eq!(listed["key_stores"][0]["keeps_pin"], false);
    // As systemd gives it; the helper inherits it.
    let credentials = tempfile::tempdir().expect("make a temporary folder");
    fs::write(credentials.path().join(format!("sealblk-pin-{id}")), SoftHsm::pin("one"))
        .expect("write a file");
    let credential = |pin: &str| {
        fs::write(credentials.path().join(format!("sealblk-pin-{id}")), pin).expect("write a file");
        let mut command = store.command();
        command.args(["volume", "rewrap", "v"]).env("CREDENTIALS_DIRECTORY", credentials.path());
        command.output().expect("start sealblk")
    };
    let good = credential(&SoftHsm::pin("one"));
    assert!(good.status.success(), "{}", said(&good));
    let bad = credential("another-pin");
    assert_eq!(bad.status.code(), Some(5), "{}", said(&bad));
    assert!(
        credential(&SoftHsm::pin("one")).status.success(),
        "a wrong one that is not kept changes nothing"
    );
}

#[test]
fn a_kept_pin_that_is_wrong_by_now_is_tried_once() {
    let site = Site::new("kms-patience = 1");
    let mut change =
        Command::new(SoftHsm::module().ancestors().nth(5).expect("a tree").join("usr/bin/softhsm2-util"));
    // Somebody has made the token anew.
    fs::remove_dir_all(site.hsm.tokens()).expect("remove the tokens");
    fs::create_dir(site.hsm.tokens()).expect("make a folder");
    change.arg("--module").arg(SoftHsm::module()).args(["--init-token", "--free", "--label", "one"]);
    change.args(["--so-pin", "5678-5678", "--pin", "a-new-pin-of-one"]).envs(site.hsm.environment());
    assert!(change.output().expect("start softhsm2-util").status.success());
    let said = site.place.refuse(5, &[]);
    assert!(said.contains("CKR_PIN_INCORRECT"), "{said}");
    let shown = site.json(&["kms", "store", "list"]);
    let one = shown["key_stores"].as_array().expect("a list").iter().find(|it| it["name"] == "one");
    let one = one.expect("it is there");
    assert_eq!((&one["state"], &one["error"]), (&"FAILED".into(), &"INVALID_CREDENTIALS".into()));
    assert!(site.place.refuse(5, &[]).contains("is unavailable"), "the token is not asked again");
    // With the right PIN it can be connected; the key is in no token any more, and that is said.
    site.store().ok(&["kms", "store", "disconnect", "one"]);
    let mut update = site.store().command();
    give_pin(update.args(["kms", "store", "update", "one", "--keep-pin"]), "a-new-pin-of-one");
    assert!(update.status().expect("start sealblk").success());
    site.store().ok(&["kms", "store", "connect", "one"]);
    let said = site.place.refuse(5, &[]);
    assert!(said.contains("is unavailable: the token has no key of the id"), "{said}");
}

#[test]
fn a_root_key_that_a_token_wraps_opens_the_kms_with_the_token_alone() {
    let site = Site::new("kms-patience = 1");
    let store = site.store();
    let with_pin = |arguments: &[&str], pin: &str| {
        let mut command = store.command();
        give_pin(command.args(arguments), pin);
        command.output().expect("start sealblk")
    };
    let module = SoftHsm::module();
    let wrap = ["kms", "root-key", "wrap", "--token", "two", "--pkcs11", module.to_str().expect("UTF-8")];
    assert!(!with_pin(&wrap, "not-the-pin").status.success());
    site.opens();
    let (pin, keys) = (SoftHsm::pin("two"), site.hsm.keys());
    let output = with_pin(&wrap, &pin);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(site.hsm.keys(), keys + 1);
    let shown = with_pin(&["--json", "kms", "show"], &pin);
    let shown: Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    assert_eq!(shown["root_key"]["kept"], "hsm");
    // What opens the KMS is in no file, and nobody without the PIN opens it.
    let credentials = tempfile::tempdir().expect("make a temporary folder");
    let file = credentials.path().join("sealblk-pin-root-key");
    let attach = |pin: &str| {
        fs::write(&file, pin).expect("write a file");
        let mut command = site.place.attach_command(&[]);
        command.env("CREDENTIALS_DIRECTORY", credentials.path());
        command
    };
    let said_of = |command: Command| site.place.run(command, vec![]);
    let refused = said_of(attach("another-pin"));
    assert!(refused.code == 5 && refused.err.contains("CKR_PIN_INCORRECT"), "{}", refused.err);
    site.place.start(attach(&pin), vec![]).end();
    let away = site.hsm.tokens().with_extension("away");
    fs::rename(site.hsm.tokens(), &away).expect("rename a folder");
    fs::create_dir(site.hsm.tokens()).expect("make a folder");
    let refused = said_of(attach(&pin));
    assert!(refused.code == 6 && refused.err.contains("there is no such token"), "{}", refused.err);
    fs::remove_dir(site.hsm.tokens()).expect("remove a folder");
    fs::rename(&away, site.hsm.tokens()).expect("rename a folder");
    // The line of another store's root key is of no use.
    let output = with_pin(&["kms", "root-key", "unwrap"], &pin);
    assert!(output.status.success(), "{}", said(&output));
    assert!(!with_pin(&["kms", "root-key", "unwrap"], &pin).status.success(), "it is not wrapped");
    site.opens();
}

#[test]
fn a_key_that_was_deleted_is_destroyed_in_its_token() {
    let site = Site::new("");
    let (root, config) = (site.store().root(), site.store().config());
    let hands = Hands::new();
    let hardened = sealblk::base::hardened::harden().unwrap();
    let kms = || Embedded::at(root.join("kms"), config.clone(), Box::new(hands.clone()), hardened);
    let arn = site.arn("alias/two");
    // The window begins now, which the log knows, and ends by the hands of a clock that is far ahead.
    hands.pass(20_000 * DAY);
    kms().schedule_deletion(&arn, 7).expect("schedule its deletion");
    assert_eq!(site.json(&["key", "show", &arn])["state"], "PendingDeletion");
    let remove = || site.store().run(&["kms", "store", "remove", "two"]);
    assert_eq!(remove().status.code(), Some(4), "it has a key");
    hands.pass(8 * DAY);
    kms().purge().expect("delete it");
    assert_eq!(site.store().run(&["key", "show", &arn]).status.code(), Some(3));
    assert_eq!(site.hsm.keys(), 2);
    site.store().ok(&["kms", "store", "connect", "two"]);
    assert_eq!(site.hsm.keys(), 1);
    assert_eq!(remove().status.code(), Some(5), "it is connected");
    site.store().ok(&["kms", "store", "disconnect", "two"]);
    site.store().ok(&["kms", "store", "remove", "two"]);
    site.opens();
}

/// A server whose wire may use the tokens `one` and `two`, and its root principal.
struct Served {
    hsm: SoftHsm,
    kms: KmsServer,
    root: Principal,
}

impl Served {
    fn new(settings: &str) -> Self {
        let hsm = SoftHsm::with_tokens(&["one", "two"]);
        let settings = format!("{settings}\n{}", SoftHsm::for_the_wire(&["one", "two"]));
        let variables = hsm.environment();
        let kms = KmsServer::start_prepared(&settings, |command| {
            command.envs(variables).env("AWS_SESSION_TOKEN", "x").env("CREDENTIALS_DIRECTORY", "/nowhere");
        });
        let root = kms.principal("root");
        Served { hsm, kms, root }
    }

    fn python(&self, script: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(crate::server::python());
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kms").join(script)).args(arguments);
        let (id, secret) = self.root.keys();
        command.env("KMS_URL", &self.kms.url).env("ROOT_KEY", id).env("ROOT_SECRET", secret);
        command.env("PIN_ONE", SoftHsm::pin("one")).env("PIN_TWO", SoftHsm::pin("two"));
        command.env("PYTHONDONTWRITEBYTECODE", "1").env("SEALBLK_TEST_LIMIT", limit().as_secs().to_string());
        command
    }

    /// The process that has the module.
    fn module(&self) -> Option<(Pid, PathBuf)> {
        let module = children(self.kms.pid()).pop()?;
        Some((module, Path::new("/proc").join(module.to_string())))
    }
}

#[test]
fn boto3_finds_custom_key_stores_as_aws_has_them() {
    let served = Served::new("kms-patience = 1");
    let host = served.kms.principal("host");
    let (id, secret) = host.keys();
    let mut command = served.python("hsm.py", &[]);
    let output = command.env("HOST_KEY", id).env("HOST_SECRET", secret).output().expect("Python runs");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && words.contains("\nOK\n"), "{words}");
    let log = fs::read_to_string(served.kms.folders().0.join("audit.jsonl")).expect("read the log");
    assert!(log.contains("\"ConnectCustomKeyStore\"") && log.contains("\"customKeyStoreName\""));
    for label in ["one", "two"] {
        assert!(!log.contains(&SoftHsm::pin(label)), "a PIN is in the audit log");
    }
}

/// The key of one slot is in a token that another machine's KMS has, the other in one of this host's own.
#[test]
#[cfg(feature = "aws")]
fn a_host_hears_of_a_key_store_that_its_kms_has_disconnected() {
    let served = Served::new("kms-patience = 1");
    let of_kms = |arguments: &[&str], pin: Option<&str>| {
        let mut command = served.kms.command();
        command.args(arguments).envs(served.hsm.environment());
        if let Some(label) = pin {
            give_pin(&mut command, &SoftHsm::pin(label));
        }
        let output = command.output().expect("start sealblk");
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let module = SoftHsm::module();
    let module = module.to_str().expect("UTF-8");
    let one = ["kms", "store", "add", "--pkcs11", module, "--token", "one", "--keep-pin"];
    of_kms(&one, Some("one"));
    let made = of_kms(&["--json", "key", "create", "--key-store", "one"], None);
    let made: Value = serde_json::from_str(&made).expect("JSON");
    let arn = text(&made["arn"]);

    let store = Store::new();
    store.configure("kms-patience = 1");
    let url = served.kms.url.clone();
    store.set_environment([served.root.environment(&url), served.hsm.environment()].concat());
    let place = Place::of(store, &["--key", &format!("aws:{arn}")]);
    place.attach(&[]).end();
    of_kms(&["kms", "store", "disconnect", "one"], None);
    let said_of_host = place.refuse(5, &[]);
    let unavailable = format!("{arn} is unavailable");
    for words in [unavailable.as_str(), "aws kms connect-custom-key-store"] {
        assert!(said_of_host.contains(words), "{words}: {said_of_host}");
    }
    of_kms(&["kms", "store", "connect", "one"], None);
    let output = add(&place.store, "two", &SoftHsm::pin("two"), &["--keep-pin"]);
    assert!(output.status.success(), "{}", said(&output));
    place.store.ok(&["key", "create", "--key-store", "two", "--alias", "two"]);
    place.store.ok(&["volume", "key", "add", "t", "--key", "alias/two"]);
    of_kms(&["kms", "store", "disconnect", "one"], None);
    place.attach(&[]).end();
    // Of two slots, it is the other one's turn.
    place.store.ok(&["kms", "store", "disconnect", "two"]);
    of_kms(&["kms", "store", "connect", "one"], None);
    place.attach(&[]).end();
    place.store.ok(&["kms", "store", "connect", "two"]);
    place.store.ok(&["volume", "rewrap", "t", "--from", &format!("aws:{arn}"), "--key", "alias/aws/ebs"]);
    place.attach(&[]).end();
}

/// A client that decrypts whenever it is told to.
struct Decrypting {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Decrypting {
    fn new(served: &Served) -> Self {
        let mut child = served.python("clients.py", &["decrypt_in_token"]);
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("Python runs");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        assert_eq!(lines.next().expect("a line").expect("UTF-8"), "ready");
        Decrypting { child, lines }
    }

    fn answer(&mut self) -> String {
        writeln!(self.child.stdin.as_mut().expect("piped"), "now").expect("write a line");
        self.lines.next().expect("a line").expect("UTF-8")
    }
}

impl Drop for Decrypting {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[test]
fn the_process_that_has_the_module_may_end_and_may_be_slow() {
    let served = Served::new("kms-patience = 1");
    let mut client = Decrypting::new(&served);
    assert_eq!(client.answer(), "opened");
    for _ in 0..2 {
        let (module, _) = served.module().expect("it runs");
        kill(module, Signal::SIGKILL).expect("end it");
        assert_eq!(client.answer(), "opened", "a new session is begun");
        assert_ne!(served.module().expect("it runs").0, module);
    }
    // A token that does not answer is not waited for without end, and a new session is begun after it.
    let (module, _) = served.module().expect("it runs");
    kill(module, Signal::SIGSTOP).expect("stop it");
    let said = client.answer();
    assert!(
        said.starts_with("refused KeyUnavailableException") && said.contains("did not answer within"),
        "{said}"
    );
    assert_eq!(client.answer(), "opened");
    // The HSM is restarted: its tokens are away for a moment.
    let away = served.hsm.tokens().with_extension("away");
    fs::rename(served.hsm.tokens(), &away).expect("rename a folder");
    fs::create_dir(served.hsm.tokens()).expect("make a folder");
    kill(served.module().expect("it runs").0, Signal::SIGKILL).expect("end it");
    let said = client.answer();
    assert!(said.starts_with("refused KeyUnavailableException"), "{said}");
    fs::remove_dir(served.hsm.tokens()).expect("remove a folder");
    fs::rename(&away, served.hsm.tokens()).expect("rename a folder");
    assert_eq!(client.answer(), "opened");
}

#[test]
fn the_process_that_has_the_module_is_confined_and_shows_no_secret() {
    let served = Served::new("");
    let mut client = Decrypting::new(&served);
    assert_eq!(client.answer(), "opened");
    let (module, process) = served.module().expect("it runs");
    let status = fs::read_to_string(process.join("status")).expect("read its state");
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim().to_owned()
    };
    assert_eq!(
        (line("Seccomp:"), line("NoNewPrivs:"), line("CapEff:")),
        ("2".into(), "1".into(), "0".repeat(16))
    );
    let open: Vec<String> = fs::read_dir(process.join("fd"))
        .expect("list its descriptors")
        .map(|fd| fs::read_link(fd.expect("list").path()).unwrap_or_default().display().to_string())
        .collect();
    // The socket and its copy for the thread that watches it; what the module has opened is in its folder.
    let tokens = served.hsm.tokens().display().to_string();
    for path in open.iter().filter(|path| *path != "/dev/null" && !path.starts_with("socket:")) {
        assert!(path.starts_with(&tokens) || path == "/dev/urandom", "{open:?}");
    }
    let pins = [SoftHsm::pin("one"), SoftHsm::pin("two")];
    let needles: Vec<Needles> = pins.iter().map(|pin| Needles::words(pin)).collect();
    for name in ["cmdline", "environ", "maps", "status"] {
        let bytes = fs::read(process.join(name)).expect("read a file of /proc");
        assert!(!bytes.is_empty(), "{name}");
        for needles in &needles {
            assert_eq!(needles.find(&bytes), [], "{name}");
        }
    }
    let environment = fs::read(process.join("environ")).expect("read its environment");
    for name in ["AWS_", "SEALBLK_PIN_FD", "CREDENTIALS_DIRECTORY"] {
        assert_eq!(Needles::words(name).find(&environment), [], "{name}");
    }
    let (root, config) = served.kms.folders();
    for needles in &needles {
        for folder in [&root, &config, &served.hsm.tokens()] {
            assert_eq!(needles.find_in_files(folder), [""; 0], "{}", folder.display());
        }
    }
    // It ends with the server, whatever it is doing.
    kill(module, Signal::SIGCONT).expect("it runs");
    drop(client);
    drop(served);
    wait_for("the end of the module's process", || match fs::read_to_string(process.join("status")) {
        Ok(status) if !status.contains("State:\tZ") => Err("it is there"),
        _ => Ok(()),
    });
}
