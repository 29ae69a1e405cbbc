//! The KMS server from outside: boto3 drives every operation of a real server process over TCP, and botocore's
//! signatures are answered over a Unix socket.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

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
        let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().expect("sealblk runs");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready: String = lines.by_ref().map_while(Result::ok).take_while(|line| line != "}").collect();
        let ready: Value = serde_json::from_str(&(ready + "}")).expect("the server says where it listens");
        let url = ready["Url"].as_str().expect("a URL").to_owned();
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
fn python() -> PathBuf {
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
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kms_wire.py"))
        .env("KMS_URL", &server.url)
        .env("ROOT_KEY", text(&root["AccessKeyId"]))
        .env("ROOT_SECRET", text(&root["SecretAccessKey"]))
        .env("HOST_KEY", text(&host["AccessKeyId"]))
        .env("HOST_SECRET", text(&host["SecretAccessKey"]))
        .env("PYTHONDONTWRITEBYTECODE", "1")
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
    assert_eq!(text(&made["Arn"]), "arn:aws:iam::000000000000:user/host");
    assert_eq!((made["Admin"].as_bool(), text(&made["SecretAccessKey"]).len()), (Some(false), 40));
    let listed = store.json(&["kms", "principal", "list"]);
    assert_eq!(listed["Principals"][0]["AccessKeyId"], made["AccessKeyId"]);
    assert_eq!(listed["Principals"][0].get("SecretAccessKey"), None);
    assert!(!store.run(&["kms", "principal", "create", "host"]).status.success(), "there is one");
    store.json(&["kms", "principal", "delete", "host"]);
    assert_eq!(store.json(&["kms", "principal", "list"])["Principals"], serde_json::json!([]));
    assert!(!store.run(&["kms", "principal", "delete", "host"]).status.success(), "there is none");
}

#[test]
fn only_loopback_addresses_are_served() {
    let output = Store::new().run(&["kms", "serve", "--listen", "0.0.0.0:0"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("is not a loopback address"), "{said}");
}

#[test]
fn a_unix_socket_is_private_and_a_dead_servers_socket_is_replaced() {
    use std::os::unix::fs::PermissionsExt;
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
