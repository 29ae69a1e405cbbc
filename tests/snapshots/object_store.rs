//! Snapshots in an object store, a real process of its own, which fails as it is told to: moto's
//! S3 server, and stand-ins for Azure's and Google's, or Azurite (ci/clouds). What a folder does
//! as well is tested there.

use crate::common::attach::open;
use crate::common::disk::pattern;
use crate::common::frontend::{Request, block};
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

/// Whose protocol a server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    S3,
    Azure,
    Gcs,
}

impl Protocol {
    /// A place in the bucket that there is.
    pub fn place(self, prefix: &str) -> String {
        let scheme = match self {
            Protocol::S3 => "s3",
            Protocol::Azure => "az",
            Protocol::Gcs => "gs",
        };
        format!("{scheme}://bucket/{prefix}")
    }
}

/// A server, ended when dropped.
pub struct Server {
    child: Child,
    address: String,
    protocol: Protocol,
}

impl Server {
    pub fn start(protocol: Protocol) -> Self {
        let cache = std::env::var_os("SEALBLK_CACHE").map(PathBuf::from);
        let cache = cache.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/ci"));
        let python = cache.join("python/bin/python");
        assert!(python.exists(), "there is no {}; run ./ci/setup first", python.display());
        let mut command = Command::new(python);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/object_store.py"));
        command.arg(format!("{protocol:?}").to_lowercase());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        tie_to_test(&mut command, vec![]);
        let mut child = command.spawn().expect("start the server");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("read a line");
        let address = line.trim_end().strip_prefix("listening on http://").expect("it says where").to_owned();
        Server { child, address, protocol }
    }

    /// A volume with data, whose store is led to the server.
    pub fn rig(&self) -> Rig {
        let rig = Rig::new(&[]);
        rig.place.store.set_environment(self.variables());
        rig
    }

    /// What leads a store to the server.
    fn variables(&self) -> Variables {
        let mut variables = environment("");
        let address = format!("http://{}", self.address);
        let known: &[(&str, &str)] = match self.protocol {
            Protocol::S3 => &[
                ("AWS_ACCESS_KEY_ID", "a"),
                ("AWS_SECRET_ACCESS_KEY", "b"),
                ("AWS_ENDPOINT_URL_S3", &address),
            ],
            Protocol::Azure => &[
                ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
                ("AZURE_STORAGE_ACCOUNT_KEY", "b2YgdGhlIHRlc3Q="),
                ("AZURE_STORAGE_ENDPOINT", &address),
            ],
            Protocol::Gcs => &[("GOOGLE_BEARER_TOKEN", "of-the-test"), ("GOOGLE_BASE_URL", &address)],
        };
        known.iter().for_each(|(name, value)| set(&mut variables, name, value));
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
    pub fn fail(&self, fault: &serde_json::Value) {
        self.ask("PUT", &fault.to_string());
    }

    /// Kills it.
    pub fn kill(mut self) {
        self.child.kill().expect("it runs");
    }

    /// Requests since.
    pub fn count(&self) -> u64 {
        self.ask("GET", "").parse().expect("a number")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A place in a bucket of S3's.
pub const PLACE: &str = "s3://bucket/some/prefix";

/// What every store does.
fn takes_snapshots_and_gives_them_back(server: &Server) {
    let place = server.protocol.place("some/prefix");
    let mut rig = server.rig();
    let first = rig.id(&["snapshot", "create", "t", "--name", "first"]);
    let pushed = rig.json(&["snapshot", "push", "first", &place]);
    assert_eq!((&pushed["url"], &pushed["put_blocks"]), (&json!(format!("{place}/{first}")), &json!(3)));
    write_to(&mut rig, 4 << 20, &pattern(8, 1 << 20));
    let second = rig.id(&["snapshot", "create", "t"]);
    let pushed = rig.json(&["snapshot", "push", &second, &place]);
    assert_eq!(
        (&pushed["base"], &pushed["put_blocks"], &pushed["blocks"]),
        (&json!(first), &json!(2), &json!(5))
    );
    assert_eq!(rig.json(&["snapshot", "push", &second, &place])["was_there"], true);
    // Another prefix is another place.
    let another = server.protocol.place("another");
    rig.json(&["snapshot", "push", "first", &another]);
    let listed = rig.json(&["snapshot", "list", &place]);
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 2);
    let verified = rig.json(&["snapshot", "verify", &place]);
    assert!(verified["snapshots"].as_array().unwrap().iter().all(|it| it["problem"].is_null()), "{verified}");
    let back = rig.id(&["snapshot", "pull", &format!("{place}/{second}")]);
    assert!(content(&rig, &back) == rig.data);
    let removed = rig.json(&["snapshot", "remove", &place, &second]);
    // Two blocks and a page.
    assert_eq!(removed["swept_objects"], json!(3));
    rig.json(&["snapshot", "verify", &place]);
    rig.json(&["snapshot", "verify", &another]);
    let said = rig.refuse(3, &["snapshot", "pull", &server.protocol.place("nothing")]);
    assert!(said.contains("no snapshots of sealblk's"), "{said}");
}

#[test]
fn a_bucket_takes_snapshots_and_gives_them_back() {
    takes_snapshots_and_gives_them_back(&Server::start(Protocol::S3));
}

#[test]
fn a_bucket_of_googles_takes_snapshots_and_gives_them_back() {
    takes_snapshots_and_gives_them_back(&Server::start(Protocol::Gcs));
}

/// Azurite, Microsoft's own stand-in for its store, takes the place of ours where ci/clouds has started it.
#[test]
fn a_container_of_azures_takes_snapshots_and_gives_them_back() {
    let mut server = Server::start(Protocol::Azure);
    if let Ok(azurite) = std::env::var("SEALBLK_TEST_AZURITE") {
        server.address = azurite;
    }
    takes_snapshots_and_gives_them_back(&server);
}

#[test]
fn other_stores_that_are_busy_cut_connections_or_lie_do_no_harm_either() {
    for protocol in [Protocol::Azure, Protocol::Gcs] {
        let server = Server::start(protocol);
        let rig = server.rig();
        let id = rig.id(&["snapshot", "create", "t"]);
        for kind in ["busy", "cut"] {
            for at in 0.. {
                assert!(at < 100, "it never ends");
                let place = protocol.place(&format!("{kind}/{at}"));
                server.fail(&json!({"kind": kind, "at": at}));
                let pushed = rig.json(&["snapshot", "push", &id, &place]);
                assert_eq!(pushed["blocks"], json!(3), "{protocol:?} {kind} {at}");
                if server.count() <= at {
                    break;
                }
            }
        }
        let place = protocol.place("last");
        server.fail(&json!({}));
        rig.json(&["snapshot", "push", &id, &place]);
        for path in ["/blocks/", "/pages/", "/snapshots/", "/place.json"] {
            server.fail(&json!({"kind": "lying", "path": path}));
            rig.refuse(7, &["snapshot", "pull", &place]);
        }
        server.fail(&json!({"kind": "denied", "at": 0}));
        let said = rig.refuse(5, &["snapshot", "push", &id, &protocol.place("denied")]);
        assert!(said.contains("may not do this"), "{protocol:?}: {said}");
        server.fail(&json!({}));
        let back = rig.id(&["snapshot", "pull", &place]);
        assert!(content(&rig, &back) == rig.data, "{protocol:?}");
        let elsewhere = place.replace("bucket", "no-such-bucket");
        let said = rig.refuse(3, &["snapshot", "push", &id, &elsewhere]);
        assert!(said.contains("no-such-bucket"), "{said}");
    }
}

#[test]
fn what_no_store_can_be_reached_without_is_named() {
    let rig = Rig::new(&[]);
    let id = rig.id(&["snapshot", "create", "t"]);
    let said = rig.refuse(2, &["snapshot", "push", &id, "az://container/prefix"]);
    assert!(said.contains("AZURE_STORAGE_ACCOUNT_NAME"), "{said}");
    for place in ["az://container", "gs://bucket"] {
        let said = rig.refuse(2, &["snapshot", "push", &id, place, "--region", "here"]);
        assert!(said.contains("leave out --region"), "{said}");
    }
}

#[test]
fn a_store_that_is_busy_or_cuts_connections_at_any_request_is_asked_again() {
    let s3 = Server::start(Protocol::S3);
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
    let s3 = Server::start(Protocol::S3);
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
    let s3 = Server::start(Protocol::S3);
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
    let s3 = Server::start(Protocol::S3);
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
fn a_store_that_is_down_is_waited_for_by_whoever_reads_what_is_still_to_come() {
    let s3 = Server::start(Protocol::S3);
    let rig = s3.rig();
    let place = Protocol::S3.place("some/prefix");
    let id = rig.id(&["snapshot", "create", "t"]);
    rig.json(&["snapshot", "push", &id, &place]);
    rig.id(&["snapshot", "pull", &place, "--name", "s", "--lazy", "--limit", "1"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", "s", "--name", "c"]);
    // One does not answer for long, and one refuses at once.
    for (sector, kind) in [(0, "down"), (2048, "denied")] {
        s3.fail(&json!({"kind": kind}));
        let (host, socket) = rig.attach("c");
        let mut session = open(&socket);
        let pending = Request::read(sector, 4096).submit(&mut session.rings[0]).expect("room on the ring");
        session.rings[0].kick_if_wanted();
        wait_for("it is said that nothing comes", || {
            match rig.json(&["volume", "show", "c"])["attachment"]["coming"]["away"].clone() {
                away if away.is_string() => Ok(()),
                other => Err(other),
            }
        });
        assert_eq!(rig.last_event()["detail"]["result"], json!("waiting"));
        s3.fail(&json!({}));
        let used = session.rings[0].wait_used().expect("the read goes on");
        let outcome = pending.finish(&mut session.rings[0], used).expect("it is whole");
        assert_eq!(outcome.status, block::OK);
        assert!(outcome.data == rig.data[sector as usize * 512..][..4096]);
        drop(session);
        host.end();
    }
    rig.place.store.ok(&["snapshot", "complete", "s"]);
    drop(s3);
    assert!(content(&rig, "s") == rig.data);
}

#[test]
fn a_store_that_is_not_there_or_has_no_such_bucket_is_told_so() {
    let s3 = Server::start(Protocol::S3);
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
    let s3 = Server::start(Protocol::S3);
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
