//! An embedded KMS served as AWS KMS is, by a process of its own with a store of its own, and the environment
//! that leads an AWS SDK to it. Nothing here leaves the machine.

use super::process::{INHERITED, inherit, tie_to_test};
use nix::unistd::Pid;
use sealblk::base::Locality;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::SystemClock;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Variables of an environment; an empty one is to be taken away.
pub type Variables = Vec<(String, String)>;

/// A KMS and its server, ended when dropped.
pub struct KmsServer {
    folder: tempfile::TempDir,
    child: Child,
    passphrase: Option<String>,
    place: Locality,
    tls: Vec<String>,
    /// Where it listens: `http://127.0.0.1:PORT`.
    pub url: String,
}

/// Somebody who may ask the KMS.
pub struct Principal {
    pub arn: String,
    access_key: String,
    secret: String,
}

impl KmsServer {
    /// An empty KMS.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a server of a new KMS, with these arguments besides.
    pub fn start_with(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("make a temporary folder");
        let mut command = command(&folder);
        command.args(["kms", "serve", "--listen", "127.0.0.1:0"]).args(arguments);
        Self::spawn(folder, command)
    }

    /// Starts a server of a new KMS with these settings, after `prepare` had its say on its process.
    pub fn start_prepared(settings: &str, prepare: impl FnOnce(&mut Command)) -> Self {
        let folder = tempfile::tempdir().expect("make a temporary folder");
        fs::create_dir(folders(&folder).1).expect("make a folder");
        fs::write(folders(&folder).1.join("sealblk.toml"), settings).expect("write the settings");
        let mut command = command(&folder);
        command.args(["kms", "serve", "--listen", "127.0.0.1:0"]);
        prepare(&mut command);
        Self::spawn(folder, command)
    }

    fn spawn(folder: tempfile::TempDir, mut command: Command) -> Self {
        command.stdout(Stdio::piped());
        tie_to_test(&mut command, vec![]);
        let mut child = command.spawn().expect("start sealblk");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("read a line");
        let url = line.trim_end().strip_prefix("listening on ").expect("it says where").to_owned();
        KmsServer { folder, child, url, passphrase: None, place: Locality::default(), tls: Vec::new() }
    }

    /// Starts a server of a new KMS whose root key is under a passphrase, which the server
    /// is given by a descriptor.
    pub fn start_under(passphrase: &str) -> Self {
        let folder = tempfile::tempdir().expect("make a temporary folder");
        let mut init = command(&folder);
        init.args(["kms", "init", "--new-passphrase-fd", &INHERITED.to_string()]).stdout(Stdio::null());
        give_passphrase(&mut init, passphrase);
        assert!(init.status().expect("start sealblk").success());
        let mut serve = command(&folder);
        serve.args(["kms", "serve", "--listen", "127.0.0.1:0"]);
        give_passphrase(&mut serve, passphrase);
        let mut kms = Self::spawn(folder, serve);
        kms.passphrase = Some(passphrase.to_owned());
        kms
    }

    /// Starts a server that speaks TLS; its certificate is beside the private key in `files`, as `kms.pem`.
    pub fn start_tls(files: &Path) -> Self {
        let (certificate, key) = certify(files);
        Self::start_with(&["--tls-cert", &certificate, "--tls-key", &key])
    }

    /// As [`KmsServer::start_tls`], and the file that it writes its log to, which tells
    /// who makes way for whom.
    pub fn start_tls_with_log(files: &Path) -> (Self, PathBuf) {
        let (certificate, key) = certify(files);
        let folder = tempfile::tempdir().expect("make a temporary folder");
        let path = files.join("log");
        let mut command = command(&folder);
        command.args(["-v", "kms", "serve", "--listen", "127.0.0.1:0"]);
        command.args(["--tls-cert", &certificate, "--tls-key", &key]).env_remove("RUST_LOG");
        command.stderr(fs::File::create(&path).expect("make a file"));
        (Self::spawn(folder, command), path)
    }

    /// Starts a server of a new KMS in this region. With a folder it speaks TLS, and its
    /// certificate is there, as `kms.pem`.
    pub fn start_in(region: &str, files: Option<&Path>) -> Self {
        let tls = files.map_or(Vec::new(), |files| {
            let (certificate, key) = certify(files);
            ["--tls-cert".into(), certificate, "--tls-key".into(), key].to_vec()
        });
        let settings = format!("region = '{region}'\n");
        let mut kms = Self::start_prepared(&settings, |command| {
            command.args(&tls);
        });
        kms.place = Locality::default().in_region(region);
        kms.tls = tls;
        kms
    }

    /// Starts a server, in this region, of a copy of this KMS: it has the principals that this one has.
    pub fn start_copy(&self, region: &str) -> Self {
        let folder = tempfile::tempdir().expect("make a temporary folder");
        let copied =
            Command::new("cp").arg("-a").arg(self.folder.path().join(".")).arg(folder.path()).status();
        assert!(copied.expect("start cp").success());
        let settings = format!("region = '{region}'\n");
        fs::write(folders(&folder).1.join("sealblk.toml"), settings).expect("write the settings");
        let mut command = command(&folder);
        command.args(["kms", "serve", "--listen", "127.0.0.1:0"]);
        let mut kms = Self::spawn(folder, command);
        kms.place = Locality::default().in_region(region);
        kms
    }

    /// Ends the server's process.
    pub fn stop(&mut self) {
        self.child.kill().expect("end the server");
        self.child.wait().expect("it ends");
    }

    /// Starts a server again, of the same KMS, where the one that was stopped has listened.
    pub fn start_again(&mut self) {
        let address = self.url.split_once("://").expect("a URL").1.to_owned();
        let mut command = self.command();
        command.args(["kms", "serve", "--listen", &address]).args(&self.tls).stdout(Stdio::piped());
        tie_to_test(&mut command, vec![]);
        self.child = command.spawn().expect("start sealblk");
        let mut line = String::new();
        let said = self.child.stdout.take().expect("piped");
        BufReader::new(said).read_line(&mut line).expect("it says that it listens");
    }

    /// Adds to its settings, which a server reads when it needs them.
    pub fn add_settings(&self, more: &str) {
        let path = self.folders().1.join("sealblk.toml");
        let settings = fs::read_to_string(&path).unwrap_or_default();
        fs::write(path, settings + more).expect("write the settings");
    }

    /// The program, pointed at the store of this KMS, with its passphrase if there is one.
    pub fn command(&self) -> Command {
        let mut command = command(&self.folder);
        if let Some(passphrase) = &self.passphrase {
            give_passphrase(&mut command, passphrase);
        }
        command
    }

    /// Makes a key by the command line; its ARN.
    pub fn create_key(&self) -> String {
        let made = self.command().args(["--json", "key", "create"]).output().expect("start sealblk").stdout;
        let made: Value = serde_json::from_slice(&made).expect("JSON");
        made["arn"].as_str().expect("a text").to_owned()
    }

    /// The root key.
    pub fn root_key(&self) -> [u8; 32] {
        // Of a copy the passphrase can be taken away.
        let copy = tempfile::tempdir().expect("make a temporary folder");
        let is_key = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "key");
        for entry in fs::read_dir(self.folders().1).expect("list a folder") {
            let path = entry.expect("list a folder").path();
            fs::copy(&path, copy.path().join(path.file_name().expect("a name"))).expect("copy a file");
        }
        if self.passphrase.is_some() {
            let mut remove = self.command();
            remove.args(["kms", "passphrase", "remove"]).env("SEALBLK_CONFIG_DIR", copy.path());
            assert!(remove.stdout(Stdio::null()).status().expect("start sealblk").success());
        }
        let mut files = fs::read_dir(copy.path()).expect("list a folder").map(|e| e.expect("list").path());
        let line = fs::read_to_string(files.find(is_key).expect("a root key")).expect("read a file");
        let digits =
            line.trim_end().strip_prefix("sealblk-kms-root-key-1:").expect("a root key in the clear");
        let mut key = [0; 32];
        hex::decode_to_slice(digits, &mut key).expect("digits");
        key
    }

    /// The KMS itself, as its operator has it.
    pub fn admin(&self) -> Embedded {
        let (root, config) = folders(&self.folder);
        let hardened = sealblk::base::hardened::harden().unwrap();
        let place = self.place.clone();
        Embedded::in_place(root.join("kms"), config, Box::new(SystemClock), place, hardened)
    }

    /// The server's process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Its root folder and its configuration folder.
    pub fn folders(&self) -> (PathBuf, PathBuf) {
        folders(&self.folder)
    }

    /// Makes a principal; "root" may do everything.
    pub fn principal(&self, name: &str) -> Principal {
        let made = self.command().args(["--json", "kms", "principal", "create", name]).output();
        let made: Value = serde_json::from_slice(&made.expect("start sealblk").stdout).expect("JSON");
        let text = |name: &str| made[name].as_str().expect("a text").to_owned();
        Principal { arn: text("arn"), access_key: text("access_key_id"), secret: text("secret_access_key") }
    }
}

impl Drop for KmsServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Principal {
    /// What leads an SDK to the KMS at `url` as this principal.
    pub fn environment(&self, url: &str) -> Variables {
        let mut variables = environment(url);
        set(&mut variables, "AWS_ACCESS_KEY_ID", &self.access_key);
        set(&mut variables, "AWS_SECRET_ACCESS_KEY", &self.secret);
        variables
    }

    /// Its access key in the words of a configuration file, or of JSON.
    pub fn keys(&self) -> (&str, &str) {
        (&self.access_key, &self.secret)
    }
}

/// Sets a variable in place of what was said of it before.
pub fn set(variables: &mut Variables, name: &str, value: &str) {
    variables.retain(|(known, _)| known != name);
    variables.push((name.to_owned(), value.to_owned()));
}

/// What leads an SDK to the KMS at `url` as nobody.
pub fn environment(url: &str) -> Variables {
    // Whatever the one who runs the tests has set.
    let pairs = [
        ("AWS_ACCESS_KEY_ID", ""),
        ("AWS_SECRET_ACCESS_KEY", ""),
        ("AWS_SESSION_TOKEN", ""),
        ("AWS_PROFILE", ""),
        ("AWS_DEFAULT_REGION", ""),
        ("AWS_ENDPOINT_URL", ""),
        ("AWS_CA_BUNDLE", ""),
        ("SSL_CERT_FILE", ""),
        ("SSL_CERT_DIR", ""),
        ("AWS_USE_FIPS_ENDPOINT", ""),
        ("AWS_USE_DUALSTACK_ENDPOINT", ""),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", ""),
        ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", ""),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", ""),
        ("AWS_ENDPOINT_URL_KMS", url),
        ("AWS_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
        ("NO_PROXY", "*"),
        ("no_proxy", "*"),
    ];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
}

/// Makes a certificate for this machine, `kms.pem` in `files`, and its private key; where both are.
fn certify(files: &Path) -> (String, String) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).expect("make a certificate");
    let file = |name: &str, text: &str| {
        let path = files.join(name);
        fs::write(&path, text).expect("write a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("make it private");
        path.display().to_string()
    };
    (file("kms.pem", &made.cert.pem()), file("kms.key", &made.signing_key.serialize_pem()))
}

/// Gives it by a descriptor, which a file is behind: whoever needs it reads it from its beginning.
fn give_passphrase(command: &mut Command, passphrase: &str) {
    let mut file = tempfile::tempfile().expect("make a file");
    file.write_all(passphrase.as_bytes()).expect("write a file");
    command.env("SEALBLK_PASSPHRASE_FD", INHERITED.to_string());
    inherit(command, file.into(), INHERITED);
}

fn folders(folder: &tempfile::TempDir) -> (PathBuf, PathBuf) {
    (folder.path().join("root"), folder.path().join("config"))
}

fn command(folder: &tempfile::TempDir) -> Command {
    let (root, config) = folders(folder);
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
    command.env("SEALBLK_CONFIG_DIR", config).env_remove("SEALBLK_ROOT").arg("--root").arg(root);
    command.stdin(Stdio::null());
    command
}
