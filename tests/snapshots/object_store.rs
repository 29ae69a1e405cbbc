//! Snapshots in an object store: moto's S3 server, a real process of its own, which fails as it is told to.
//! What a folder does as well is tested there.

use crate::common::disk::pattern;
use crate::common::kms_server::{Variables, environment, set};
use crate::common::leaks::{Needles, look_through};
use crate::common::patience::wait_for;
use crate::common::process::tie_to_test;
use crate::common::rig::{Rig, files};
use crate::common::store::{Store, said};
use crate::outside::{content, write_to};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sealblk::crypt::secret_mem::SecretMem;
use sealblk::crypt::{BackupKeys, Dek};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A server, ended when dropped.
struct S3 {
    child: Child,
    address: String,
}

impl S3 {
    fn start() -> Self {
        let cache = std::env::var_os("SEALBLK_CACHE").map(PathBuf::from);
        let cache = cache.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/ci"));
        let python = cache.join("python/bin/python");
        assert!(python.exists(), "there is no {}; run ./ci/setup first", python.display());
        let mut command = Command::new(python);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/s3.py"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        tie_to_test(&mut command, vec![]);
        let mut child = command.spawn().expect("start the server");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("read a line");
        let address = line.trim_end().strip_prefix("listening on http://").expect("it says where").to_owned();
        S3 { child, address }
    }

    /// A volume with data, whose store is led to the server.
    fn rig(&self) -> Rig {
        let rig = Rig::new(&[]);
        rig.place.store.set_environment(self.variables());
        rig
    }

    /// What leads a store to the server.
    fn variables(&self) -> Variables {
        let mut variables = environment("");
        set(&mut variables, "AWS_ACCESS_KEY_ID", "a");
        set(&mut variables, "AWS_SECRET_ACCESS_KEY", "b");
        set(&mut variables, "AWS_ENDPOINT_URL_S3", &format!("http://{}", self.address));
        variables
    }

    fn ask(&self, method: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("connect");
        let head = format!("{method} /_fault HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all(head.as_bytes()).expect("ask");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer.rsplit("\r\n\r\n").next().expect("a body").to_owned()
    }

    /// From now on this goes wrong; requests are counted anew.
    fn fail(&self, fault: &serde_json::Value) {
        self.ask("PUT", &fault.to_string());
    }

    /// Requests since.
    fn count(&self) -> u64 {
        self.ask("GET", "").parse().expect("a number")
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PLACE: &str = "s3://bucket/some/prefix";

#[test]
fn a_bucket_takes_snapshots_and_gives_them_back() {
    let s3 = S3::start();
    let mut rig = s3.rig();
    let first = rig.id(&["snapshot", "create", "t", "--name", "first"]);
    let pushed = rig.json(&["snapshot", "push", "first", PLACE]);
    assert_eq!((&pushed["url"], &pushed["put_blocks"]), (&json!(format!("{PLACE}/{first}")), &json!(3)));
    write_to(&mut rig, 4 << 20, &pattern(8, 1 << 20));
    let second = rig.id(&["snapshot", "create", "t"]);
    let pushed = rig.json(&["snapshot", "push", &second, PLACE]);
    assert_eq!(
        (&pushed["base"], &pushed["put_blocks"], &pushed["blocks"]),
        (&json!(first), &json!(2), &json!(5))
    );
    assert_eq!(rig.json(&["snapshot", "push", &second, PLACE])["was_there"], true);
    // Another prefix is another place.
    rig.json(&["snapshot", "push", "first", "s3://bucket/another"]);
    let listed = rig.json(&["snapshot", "list", PLACE]);
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 2);
    let verified = rig.json(&["snapshot", "verify", PLACE]);
    assert!(verified["snapshots"].as_array().unwrap().iter().all(|it| it["problem"].is_null()), "{verified}");
    let back = rig.id(&["snapshot", "pull", &format!("{PLACE}/{second}")]);
    assert!(content(&rig, &back) == rig.data);
    let removed = rig.json(&["snapshot", "remove", PLACE, &second]);
    // Two blocks and a page.
    assert_eq!(removed["swept_objects"], json!(3));
    rig.json(&["snapshot", "verify", PLACE]);
    rig.json(&["snapshot", "verify", "s3://bucket/another"]);
    let said = rig.refuse(3, &["snapshot", "pull", "s3://bucket/nothing"]);
    assert!(said.contains("no snapshots of sealblk's"), "{said}");
}

#[test]
fn a_store_that_is_busy_or_cuts_connections_at_any_request_is_asked_again() {
    let s3 = S3::start();
    let rig = s3.rig();
    let id = rig.id(&["snapshot", "create", "t"]);
    for kind in ["busy", "cut"] {
        for at in 0.. {
            assert!(at < 100, "it never ends");
            // Each time in a place of its own, which has nothing yet.
            let place = format!("s3://bucket/{kind}/{at}");
            s3.fail(&json!({"kind": kind, "at": at}));
            let pushed = rig.json(&["snapshot", "push", &id, &place]);
            assert_eq!((&pushed["blocks"], &pushed["was_there"]), (&json!(3), &json!(false)), "{kind} {at}");
            let count = s3.count();
            s3.fail(&json!({}));
            rig.json(&["snapshot", "verify", &place]);
            if count <= at {
                break;
            }
        }
    }
    rig.json(&["snapshot", "push", &id, PLACE]);
    for at in 0..30 {
        s3.fail(&json!({"kind": "busy", "at": at}));
        let back = rig.id(&["snapshot", "pull", PLACE]);
        assert!(content(&rig, &back) == rig.data, "{at}");
        rig.place.store.ok(&["snapshot", "delete", &back]);
        if s3.count() <= at {
            break;
        }
    }
}

/// A whole store, in a bucket that is busy, cuts connections, and once has other credentials; and back on an
/// empty host.
#[test]
fn a_store_is_backed_up_to_a_bucket_and_comes_back_on_an_empty_host() {
    let s3 = S3::start();
    let mut rig = s3.rig();
    const KEPT: &str = "--root-key-is-kept";
    rig.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "two"]);
    let done = rig.json(&["backup", PLACE, KEPT]);
    assert_eq!(done["volumes"].as_array().unwrap().len(), 2, "{done}");
    for (n, kind) in ["busy", "cut"].into_iter().enumerate() {
        write_to(&mut rig, n << 20, &pattern(8 + n as u64, 1 << 20));
        s3.fail(&json!({"kind": kind, "at": 5 + 3 * n}));
        let done = rig.json(&["backup", PLACE, KEPT, "--keep-last", "1"]);
        assert!(done["volumes"].as_array().unwrap().iter().all(|it| it["error"].is_null()), "{kind}: {done}");
        assert_eq!(done["removed"].as_array().unwrap().len(), 2, "{kind}: {done}");
    }
    // One that does not get through says so of each volume, and is ended by the next.
    write_to(&mut rig, 4 << 20, &pattern(12, 1 << 20));
    s3.fail(&json!({"kind": "expired", "at": 12}));
    let told = rig.place.store.run(&["backup", PLACE, KEPT]);
    assert_eq!(told.status.code(), Some(5), "{}", said(&told));
    s3.fail(&json!({}));
    rig.json(&["backup", PLACE, KEPT, "--keep-last", "1"]);
    rig.json(&["snapshot", "verify", PLACE]);
    let drill = rig.json(&["restore", PLACE, "--drill"]);
    assert!(drill["volumes"].as_array().unwrap().iter().all(|it| it["error"].is_null()), "{drill}");
    let empty = Store::new();
    empty.set_environment(s3.variables());
    let key =
        files(&rig.place.store.config()).into_iter().find(|it| it.extension().is_some_and(|e| e == "key"));
    let key = key.expect("a root key");
    std::fs::create_dir_all(empty.config()).expect("make the configuration folder");
    std::fs::copy(&key, empty.config().join(key.file_name().unwrap())).expect("copy the root key");
    s3.fail(&json!({"kind": "cut", "at": 7}));
    empty.ok(&["restore", PLACE]);
    let file = rig.place.folder().join("exported");
    empty.ok(&["volume", "export", "t", file.to_str().unwrap()]);
    assert!(std::fs::read(file).unwrap() == rig.data);
}

#[test]
fn credentials_that_expire_end_a_push_in_words_and_the_next_one_goes_on() {
    let s3 = S3::start();
    let mut rig = s3.rig();
    write_to(&mut rig, 0, &pattern(8, 8 << 20));
    let id = rig.id(&["snapshot", "create", "t"]);
    let mut put = Vec::new();
    for at in [0, 1, 3, 6, 9, 12, 16, 20] {
        let place = format!("s3://bucket/expired/{at}");
        s3.fail(&json!({"kind": "expired", "at": at}));
        let said = rig.refuse(5, &["snapshot", "push", &id, &place]);
        assert!(said.contains("have expired") && said.contains("ExpiredToken"), "{at}: {said}");
        s3.fail(&json!({}));
        let pushed = rig.json(&["snapshot", "push", &id, &place]);
        assert_eq!(pushed["blocks"], json!(16), "{at}");
        put.push(pushed["put_blocks"].as_u64().unwrap());
        rig.json(&["snapshot", "verify", &place]);
    }
    assert!(put[0] == 16 && put[7] < 16, "what was there is not brought again: {put:?}");
    s3.fail(&json!({"kind": "denied", "at": 0}));
    let said = rig.refuse(5, &["snapshot", "push", &id, PLACE]);
    assert!(said.contains("may not do this"), "{said}");
}

#[test]
fn a_store_that_lies_is_found_and_nothing_of_it_is_kept() {
    let s3 = S3::start();
    let rig = s3.rig();
    let id = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &id, PLACE]);
    let before = (rig.files("snapshots"), rig.files("layers"), rig.files("ledger"));
    for path in ["/blocks/", "/pages/", "/snapshots/", "/place.json"] {
        s3.fail(&json!({"kind": "lying", "path": path}));
        let said = rig.refuse(7, &["snapshot", "pull", PLACE]);
        assert!(!said.is_empty());
        assert_eq!(
            (rig.files("snapshots"), rig.files("layers"), rig.files("ledger")),
            before,
            "{path}: {said}"
        );
    }
    s3.fail(&json!({}));
    let back = rig.id(&["snapshot", "pull", PLACE]);
    assert!(content(&rig, &back) == rig.data);
}

#[test]
fn a_store_that_is_not_there_or_has_no_such_bucket_is_told_so() {
    let s3 = S3::start();
    let rig = s3.rig();
    let id = rig.id(&["snapshot", "create", "t"]);
    let said = rig.refuse(3, &["snapshot", "push", &id, "s3://no-such-bucket"]);
    assert!(said.contains("no-such-bucket"), "{said}");
    let said = rig.refuse(2, &["snapshot", "push", &id, PLACE, "--endpoint", "nowhere"]);
    assert!(said.contains("is no endpoint"), "{said}");
    let nowhere = format!("http://{}", s3.address);
    drop(s3);
    let said = rig.refuse(1, &["snapshot", "push", &id, PLACE, "--endpoint", &nowhere]);
    assert!(said.contains("goes on where it came to"), "{said}");
    rig.place.store.set_environment(environment(""));
    let said = rig.refuse(2, &["snapshot", "push", &id, PLACE, "--endpoint", &nowhere]);
    assert!(said.contains("there are no credentials"), "{said}");
}

/// While a push goes slowly: its own process has no data key and no network, and the one that has a
/// network has no key at all.
#[test]
fn no_key_is_in_the_process_with_a_network_and_no_network_where_a_key_is() {
    let s3 = S3::start();
    let mut rig = s3.rig();
    write_to(&mut rig, 0, &pattern(8, 8 << 20));
    let id = rig.id(&["snapshot", "create", "t"]);
    let dek = rig.place.dek();
    let volume = rig.place.id();
    let mut keys = SecretMem::new(BackupKeys::LEN).expect("locked memory");
    Dek::from_bytes(&dek).expect("a key").write_backup_keys(&volume, keys.as_mut_slice());
    let derived = keys.as_slice().to_vec();
    s3.fail(&json!({}));
    let mut command = rig.place.store.command();
    command
        .args(["snapshot", "push", &id, PLACE, "--limit", "512KiB"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    tie_to_test(&mut command, vec![]);
    let mut push = command.spawn().expect("start sealblk");
    let pid = Pid::from_raw(push.id() as i32);
    // A block a second: most of the time both of them wait.
    let carrier = wait_for("the carrier", || {
        let children =
            std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let mut children = children.split_whitespace().map(|it| it.parse::<i32>().expect("a number"));
        let has_begun = s3.count() > 8;
        children.find(|_| has_begun).map(Pid::from_raw).ok_or_else(|| format!("{} requests", s3.count()))
    });
    // What is looked at must stand still.
    [pid, carrier].iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).expect("it runs"));
    let status = |pid: Pid| std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    for pid in [pid, carrier] {
        let status = status(pid);
        assert!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "{status}");
    }
    assert!(status(carrier).contains("CapEff:\t0000000000000000"), "{}", status(carrier));
    let of_dek = Needles::of_key(&dek);
    let of_all = Needles::of_secrets(&[("the data key", &dek), ("what follows from it", &derived)]);
    let found = look_through(carrier, &of_all);
    assert!(found.found.is_empty(), "{:?}", found.found);
    // Whoever does not find what is there is not looking.
    let prefix = look_through(carrier, &Needles::words("some/prefix"));
    assert!(!prefix.found.is_empty());
    let found = look_through(pid, &of_dek);
    assert!(found.found.is_empty(), "{:?}", found.found);
    push.kill().expect("end it");
    push.wait().expect("it is a child");
    wait_for("the end of the carrier with whoever started it", || {
        match std::fs::read(format!("/proc/{carrier}/environ")) {
            Ok(bytes) if !bytes.is_empty() => Err("it runs"),
            _ => Ok(()),
        }
    });
}
