//! The KMS server from outside: boto3 drives every operation of a real server process over TCP and TLS, while
//! it is killed, while keys are switched, and while its memory is looked through.

use crate::common::leaks::{Needles, look_through};
use crate::common::patience::limit;
use base64::Engine;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

/// A store with two principals.
struct Store {
    dir: tempfile::TempDir,
}

/// A server process; ended when dropped.
struct Server {
    child: Child,
    url: String,
}

impl Store {
    fn new() -> Self {
        Store { dir: tempfile::tempdir().expect("a folder") }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
        command.arg("--root").arg(self.dir.path().join("root")).arg("--json").args(arguments);
        command.env("SEALBLK_CONFIG_DIR", self.dir.path().join("config")).env_remove("SEALBLK_ROOT");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("sealblk runs")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn serve(&self, arguments: &[&str]) -> Server {
        let mut command = self.command(&["kms", "serve"]);
        let verbose = arguments.contains(&"-v");
        if verbose {
            command.stderr(Stdio::piped());
        }
        let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().expect("sealblk runs");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready: String = lines.by_ref().map_while(Result::ok).take_while(|line| line != "}").collect();
        let ready: Value = serde_json::from_str(&(ready + "}")).expect("the server says where it listens");
        let url = ready["url"].as_str().expect("a URL").to_owned();
        Server { child, url }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The Python that ci/setup has put boto3 into.
pub(crate) fn python() -> PathBuf {
    let cache = std::env::var_os("SEALBLK_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/ci"));
    let python = cache.join("python/bin/python");
    assert!(python.exists(), "there is no {}; run ./ci/setup first", python.display());
    python
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

#[test]
fn boto3_finds_every_operation_with_awss_answers() {
    let store = Store::new();
    let root = store.json(&["kms", "principal", "create", "root"]);
    let host = store.json(&["kms", "principal", "create", "host"]);
    let server = store.serve(&["--listen", "127.0.0.1:0"]);
    let output = Command::new(python())
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kms/server.py"))
        .env("KMS_URL", &server.url)
        .env("ROOT_KEY", text(&root["access_key_id"]))
        .env("ROOT_SECRET", text(&root["secret_access_key"]))
        .env("HOST_KEY", text(&host["access_key_id"]))
        .env("HOST_SECRET", text(&host["secret_access_key"]))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("SEALBLK_TEST_LIMIT", limit().as_secs().to_string())
        .output()
        .expect("Python runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("\nOK\n"), "{said}");
}

#[test]
fn principals_are_made_listed_and_deleted() {
    let store = Store::new();
    let made = store.json(&["kms", "principal", "create", "host"]);
    assert_eq!(text(&made["arn"]), "arn:aws:iam::000000000000:user/host");
    assert_eq!((made["admin"].as_bool(), text(&made["secret_access_key"]).len()), (Some(false), 40));
    let listed = store.json(&["kms", "principal", "list"]);
    assert_eq!(listed["principals"][0]["access_key_id"], made["access_key_id"]);
    assert_eq!(listed["principals"][0].get("secret_access_key"), None);
    assert!(!store.run(&["kms", "principal", "create", "host"]).status.success(), "there is one");
    store.json(&["kms", "principal", "delete", "host"]);
    assert_eq!(store.json(&["kms", "principal", "list"])["principals"], serde_json::json!([]));
    assert!(!store.run(&["kms", "principal", "delete", "host"]).status.success(), "there is none");
}

#[test]
fn only_loopback_addresses_are_served() {
    let output = Store::new().run(&["kms", "serve", "--listen", "0.0.0.0:0"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("is not a loopback address"), "{said}");
}

/// A Python client of the server's, with the root principal's access key.
fn client(server: &Server, root: &Value, what: &str) -> Command {
    let mut command = Command::new(python());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kms/clients.py")).arg(what);
    command.env("KMS_URL", &server.url).env("PYTHONDONTWRITEBYTECODE", "1");
    command.env("SEALBLK_TEST_LIMIT", limit().as_secs().to_string());
    command
        .env("ROOT_KEY", text(&root["access_key_id"]))
        .env("ROOT_SECRET", text(&root["secret_access_key"]));
    command
}

fn words(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
}

#[test]
fn every_change_that_was_answered_survives_a_kill_of_the_server() {
    let store = Store::new();
    let root = store.json(&["kms", "principal", "create", "root"]);
    let mut answered: BTreeMap<String, String> = BTreeMap::new();
    for round in 1..=3 {
        let mut server = store.serve(&["--listen", "127.0.0.1:0"]);
        let mut mutating =
            client(&server, &root, "mutate").stdout(Stdio::piped()).spawn().expect("Python runs");
        let mut lines = BufReader::new(mutating.stdout.take().expect("piped")).lines();
        let mut take = |line: String| {
            let (what, key) = line.split_once(' ').expect("two words");
            if what != "ended" {
                answered.insert(key.to_owned(), what.to_owned());
            }
            what == "ended"
        };
        for line in lines.by_ref().take(40 * round) {
            assert!(!take(line.expect("UTF-8")), "it goes on until it is killed");
        }
        server.child.kill().expect("kill the server");
        server.child.wait().expect("it ends");
        assert!(lines.map(|line| take(line.expect("UTF-8"))).last().expect("it says how it ended"));
        mutating.wait().expect("it ends");
        for (key, last) in &answered {
            let shown = store.json(&["key", "show", key]);
            let enabled = shown["enabled"].as_bool().expect("yes or no");
            assert!(last != "disabled" || !enabled, "{key}: {shown}");
            if last != "key" {
                store.json(&["key", "show", &format!("alias/{key}")]);
            }
        }
    }
    assert!(answered.len() > 60);
}

#[test]
fn nothing_is_decrypted_after_disable_was_answered() {
    let store = Store::new();
    let root = store.json(&["kms", "principal", "create", "root"]);
    let server = store.serve(&["--listen", "127.0.0.1:0"]);
    let said = words(client(&server, &root, "race").output().expect("Python runs"));
    let tried: Vec<u32> = said.split(' ').skip(1).map(|n| n.parse().expect("a number")).collect();
    assert!(tried.len() == 2 && tried.iter().all(|&n| n >= 45), "{said}");
}

#[test]
fn a_data_key_that_was_sent_is_not_kept() {
    let store = Store::new();
    let root = store.json(&["kms", "principal", "create", "root"]);
    let server = store.serve(&["--listen", "127.0.0.1:0"]);
    let mut holding = client(&server, &root, "hold");
    let mut holding = holding.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("Python runs");
    let mut line = String::new();
    BufReader::new(holding.stdout.take().expect("piped")).read_line(&mut line).expect("read");
    let key = base64::engine::general_purpose::STANDARD.decode(line.trim()).expect("base64");
    let server_id = Pid::from_raw(server.child.id() as i32);
    kill(server_id, Signal::SIGSTOP).expect("stop the server");
    let seen = look_through(server_id, &Needles::of_key(&key));
    let control = look_through(server_id, &Needles::words(text(&root["access_key_id"])));
    kill(server_id, Signal::SIGCONT).expect("let the server go on");
    assert!(!control.found.is_empty(), "the search does not find the access key either");
    assert!(seen.found.is_empty(), "{:#?}", seen.found);
    drop(holding.stdin.take());
    assert!(holding.wait().expect("it ends").success());
}

/// A certificate authority, and a certificate of its for 127.0.0.1, in files.
fn certify(folder: &Path, name: &str) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new([]).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, format!("{name} authority"));
    let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate");
    std::fs::write(folder.join(format!("{name}-ca.pem")), issuer.pem()).expect("write");
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("parameters");
    params.distinguished_name.push(DnType::CommonName, "a KMS");
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).expect("a certificate");
    std::fs::write(folder.join("cert.pem"), certificate.pem()).expect("write");
    write_key(&folder.join("key.pem"), &key.serialize_pem(), 0o640);
}

fn write_key(path: &Path, pem: &str, mode: u32) {
    std::fs::write(path, pem).expect("write");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("set the mode");
}

/// Waits until the server says this.
fn hear(log: &mut Lines<BufReader<ChildStderr>>, words: &str) {
    assert!(log.map_while(Result::ok).any(|line| line.contains(words)), "it ended without saying: {words}");
}

#[test]
fn by_tls_any_address_is_served_and_certificates_are_replaced_at_hangup() {
    let store = Store::new();
    let root = store.json(&["kms", "principal", "create", "root"]);
    let file = |name: &str| store.dir.path().join(name);
    let (cert, key) = (file("cert.pem"), file("key.pem"));
    certify(store.dir.path(), "first");
    let arguments = [
        "-v",
        "--listen",
        "0.0.0.0:0",
        "--tls-cert",
        cert.to_str().unwrap(),
        "--tls-key",
        key.to_str().unwrap(),
    ];
    let mut server = store.serve(&arguments);
    let mut log = BufReader::new(server.child.stderr.take().expect("piped")).lines();
    assert!(server.url.starts_with("https://0.0.0.0:"), "{}", server.url);
    server.url = server.url.replace("0.0.0.0", "127.0.0.1");
    let ask =
        |ca: &str| words(client(&server, &root, "once").env("KMS_CA", file(ca)).output().expect("runs"));
    // Somebody who says nothing, and somebody who does not speak TLS.
    let address = server.url.trim_start_matches("https://");
    let silent = TcpStream::connect(address).expect("connect");
    let mut plain = TcpStream::connect(address).expect("connect");
    plain.write_all(b"POST / HTTP/1.1\r\nHost: kms\r\n\r\n").expect("write");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    assert_eq!(ask("first-ca.pem"), "answered");

    certify(store.dir.path(), "second");
    let hang_up = || kill(Pid::from_raw(server.child.id() as i32), Signal::SIGHUP).expect("it runs");
    hang_up();
    hear(&mut log, "is in use");
    assert_eq!(ask("second-ca.pem"), "answered");
    assert_eq!(ask("first-ca.pem"), "refused SSLError");
    std::fs::write(&cert, "nothing").expect("write");
    hang_up();
    hear(&mut log, "the earlier certificate stays in use");
    assert_eq!(ask("second-ca.pem"), "answered");
    drop(silent);
}

#[test]
fn files_that_are_no_good_for_tls_are_refused() {
    let store = Store::new();
    certify(store.dir.path(), "a");
    let (cert, key) = (store.dir.path().join("cert.pem"), store.dir.path().join("key.pem"));
    let serve = |cert: &Path, key: &Path| {
        let mut command = store.command(&["kms", "serve", "--listen", "127.0.0.1:0", "--tls-cert"]);
        let output = command.arg(cert).arg("--tls-key").arg(key).output().expect("sealblk runs");
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    let pem = std::fs::read_to_string(&key).expect("read");
    write_key(&key, &pem, 0o644);
    assert!(serve(&cert, &key).contains("everybody may use it"));
    let other = KeyPair::generate().expect("a key").serialize_pem();
    write_key(&key, &other, 0o600);
    assert!(serve(&cert, &key).contains("cert.pem"), "another key");
    assert!(serve(&key, &key).contains("no certificate in it"));
    assert!(serve(&cert, Path::new("/nowhere")).contains("use /nowhere for TLS"));
    let half = store.run(&["kms", "serve", "--listen", "127.0.0.1:0", "--tls-cert", "x"]);
    assert_eq!(half.status.code(), Some(2));
}

#[test]
fn either_of_two_access_keys_signs_until_it_is_deleted() {
    let store = Store::new();
    let mut first = store.json(&["kms", "principal", "create", "root"]);
    let second = store.json(&["kms", "principal", "create-key", "root"]);
    let server = store.serve(&["--listen", "127.0.0.1:0"]);
    let ask = |key: &Value| client(&server, key, "once").output().expect("Python runs");
    assert_eq!((words(ask(&first)), words(ask(&second))), ("answered".into(), "answered".into()));
    store.json(&["kms", "principal", "delete-key", "root", text(&first["access_key_id"])]);
    assert!(!ask(&first).status.success());
    assert_eq!(words(ask(&second)), "answered");
    // Neither key's secret is the other's.
    first["access_key_id"] = second["access_key_id"].clone();
    assert!(!ask(&first).status.success());
    let listed = store.json(&["kms", "principal", "list"]);
    assert_eq!(listed["principals"][0]["access_key_ids"], serde_json::json!([second["access_key_id"]]));
}

/// What is in the audit log of a store.
fn audit_records(store: &Store) -> Vec<Value> {
    let log = std::fs::read_to_string(store.dir.path().join("root/audit.jsonl")).expect("read the log");
    log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn whoever_is_refused_fills_the_audit_log_neither_with_words_nor_with_trying() {
    let store = Store::new();
    let host = store.json(&["kms", "principal", "create", "host"]);
    let key = store.json(&["key", "create"]);
    let mut server = store.serve(&["--listen", "127.0.0.1:0"]);
    let before = audit_records(&store).len();
    let mut denied = client(&server, &host, "denied");
    let said = words(denied.env("KEY", text(&key["arn"])).output().expect("Python runs"));
    assert_eq!(said, "denied NotFoundException");
    // What is not yet told is told at the end.
    kill(Pid::from_raw(server.child.id() as i32), Signal::SIGTERM).expect("it runs");
    server.child.wait().expect("it ends");
    let records = audit_records(&store);
    let of_host: Vec<&Value> = records[before..]
        .iter()
        .filter(|r| r["userIdentity"]["userName"] == "host" || r["eventName"] == "RefusedCalls")
        .collect();
    let bytes: usize = of_host.iter().map(|record| record.to_string().len()).sum();
    assert!(bytes < 32 << 10, "{bytes} bytes of 301 refusals");
    assert!(!of_host.iter().any(|record| record.to_string().contains("needle")), "{of_host:#?}");
    let one_by_one = of_host.iter().filter(|record| record["errorCode"].is_string()).count() as u64;
    let counted = of_host.iter().filter(|record| record["eventName"] == "RefusedCalls");
    let counted: u64 = counted
        .flat_map(|record| record["requestParameters"]["refused"].as_array().expect("a list"))
        .map(|refused| refused["times"].as_u64().expect("a number"))
        .sum();
    assert!((1..=20).contains(&one_by_one) && one_by_one + counted == 301, "{one_by_one} and {counted}");
    assert!(of_host.iter().all(|record| record["mac"].is_string()));
    assert!(store.run(&["audit", "verify"]).status.success());
}

#[test]
fn a_unix_socket_is_private_and_a_dead_servers_socket_is_replaced() {
    let store = Store::new();
    let path = store.dir.path().join("kms.sock");
    let listen = ["--socket-path", path.to_str().expect("UTF-8")];
    std::fs::write(&path, "somebody's file").expect("write");
    assert!(!store.run(&[&["kms", "serve"], &listen[..]].concat()).status.success(), "a file is no socket");
    std::fs::remove_file(&path).expect("the file is still there");
    for _ in 0..2 {
        let server = store.serve(&listen);
        assert_eq!(std::fs::metadata(&path).expect("a socket").permissions().mode() & 0o777, 0o600);
        let second = store.run(&[&["kms", "serve"], &listen[..]].concat());
        assert!(!second.status.success(), "two servers at one socket");
        let mut stream = UnixStream::connect(&path).expect("connect");
        let request = "POST / HTTP/1.1\r\nHost: kms\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}";
        stream.write_all(request.as_bytes()).expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("read");
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains("MissingAuthenticationTokenException"), "{answer}");
        drop(server);
    }
}
