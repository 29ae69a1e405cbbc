//! Multi-Region keys between the KMS servers of two regions, which speak TLS, and hosts that use them.

use crate::common::attach::{Place, open, read};
use crate::common::disk::pattern;
use crate::common::kms_server::{KmsServer, Principal, set};
use crate::common::leaks::{Needles, look_through};
use crate::common::patience::{limit, wait_for};
use crate::common::store::Store;
use crate::server::python;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sealblk::base::Locality;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::SystemClock;
use sealblk::kms::embedded::keys::{LogKeys, RootKey};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use uuid::Uuid;

const HOME: &str = "us-east-1";
const FAR: &str = "eu-west-1";
const PARAMETERS: &str = "GetParametersForSynchronization";

/// The KMSs of two regions, each of which may bring the other keys.
struct Two {
    home: KmsServer,
    far: KmsServer,
    files: tempfile::TempDir,
}

impl Two {
    /// They speak TLS with each other.
    fn new() -> Self {
        let files = folders_of_regions();
        let start = |region: &str| KmsServer::start_in(region, Some(&files.path().join(region)));
        let (home, far) = (start(HOME), start(FAR));
        let two = Two { home, far, files };
        two.introduce(HOME, FAR, &two.far.url);
        two.introduce(FAR, HOME, &two.home.url);
        two
    }

    /// They speak with each other, and with everybody, by a wire without TLS that keeps all that passes. Both
    /// have one root principal, as the regions of AWS have.
    fn overheard() -> (Self, Wire, Principal) {
        let home = KmsServer::start_in(HOME, None);
        let root = home.principal("root");
        let far = home.start_copy(FAR);
        let two = Two { home, far, files: folders_of_regions() };
        let wire = Wire::new(&two);
        two.introduce(HOME, FAR, &wire.url);
        two.introduce(FAR, HOME, &wire.url);
        (two, wire, root)
    }

    fn of(&self, region: &str) -> &KmsServer {
        if region == HOME { &self.home } else { &self.far }
    }

    /// Tells the KMS of `from` where that of `to` is, and gives it an access key there.
    fn introduce(&self, from: &str, to: &str, url: &str) {
        let mut create = self.of(to).command();
        create.args(["kms", "principal", "create", &format!("from-{from}"), "--peer", from]);
        let made = said(create.output().expect("start sealblk"));
        let credentials = self.files.path().join(from).join("credentials");
        fs::write(&credentials, made).expect("write a file");
        fs::set_permissions(&credentials, fs::Permissions::from_mode(0o600)).expect("make it private");
        let ca = match url.starts_with("https:") {
            true => format!("ca = '{}'\n", self.ca(to).display()),
            false => String::new(),
        };
        self.of(from).add_settings(&format!(
            "[[kms-region]]\nregion = '{to}'\nurl = '{url}'\n{ca}credentials = '{}'\n",
            credentials.display()
        ));
    }

    fn ca(&self, region: &str) -> PathBuf {
        self.files.path().join(region).join("kms.pem")
    }

    /// A command at the KMS of `region`.
    fn run(&self, region: &str, arguments: &[&str]) -> Output {
        self.of(region).command().arg("--json").args(arguments).output().expect("start sealblk")
    }

    #[track_caller]
    fn json(&self, region: &str, arguments: &[&str]) -> Value {
        serde_json::from_str(&said(self.run(region, arguments))).expect("JSON")
    }

    #[track_caller]
    fn refused(&self, region: &str, code: i32, arguments: &[&str]) -> String {
        let output = self.run(region, arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        said
    }

    /// A multi-Region key in both regions; its id.
    fn key(&self) -> String {
        let made = self.json(HOME, &["key", "create", "--multi-region"]);
        let id = text(&made["key_id"]).to_owned();
        self.json(HOME, &["key", "replicate", &id, "--region", FAR]);
        id
    }

    /// The names of the calls in the audit log of `region` that were about the key, and who made them.
    fn calls(&self, region: &str, id: &str) -> Vec<(String, String)> {
        let log = said(self.run(region, &["audit", "show"]));
        let lines = log.lines().filter(|line| line.contains(id)).map(|line| {
            let entry: Value = serde_json::from_str(line).expect("JSON");
            let by = entry["userIdentity"]["arn"].as_str().unwrap_or_default().to_owned();
            (text(&entry["eventName"]).to_owned(), by)
        });
        lines.collect()
    }
}

fn folders_of_regions() -> tempfile::TempDir {
    let files = tempfile::tempdir().expect("a folder");
    for region in [HOME, FAR] {
        fs::create_dir(files.path().join(region)).expect("make a folder");
    }
    files
}

fn arn(region: &str, id: &str) -> String {
    format!("arn:aws:kms:{region}:000000000000:key/{id}")
}

#[track_caller]
fn said(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

#[test]
fn boto3_finds_multi_region_keys_with_awss_answers() {
    let two = Two::new();
    let mut command = Command::new(python());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kms/regions.py"));
    for (which, region) in [("HOME", HOME), ("FAR", FAR)] {
        let root = two.of(region).principal("root");
        command.env(format!("{which}_URL"), &two.of(region).url).env(format!("{which}_CA"), two.ca(region));
        command.env(format!("{which}_KEY"), root.keys().0).env(format!("{which}_SECRET"), root.keys().1);
    }
    command.env("PYTHONDONTWRITEBYTECODE", "1").env("SEALBLK_TEST_LIMIT", limit().as_secs().to_string());
    let output = command.output().expect("Python runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("\nOK\n"), "{said}");
}

#[test]
fn commands_replicate_a_key_show_its_relatives_and_both_regions_have_it_on_record() {
    let two = Two::new();
    let id = two.key();
    let shown = two.json(HOME, &["key", "show", &id]);
    assert_eq!(shown["multi_region"]["replicas"], json!([arn(FAR, &id)]));
    assert_eq!(shown["multi_region"]["is_primary"], true);
    assert_eq!(two.json(FAR, &["key", "show", &id[..12]])["multi_region"]["is_primary"], false);
    two.json(HOME, &["key", "primary", &id, "--region", FAR]);
    assert_eq!(two.json(FAR, &["key", "show", &id])["multi_region"]["is_primary"], true);
    let said = two.refused(HOME, 2, &["key", "replicate", &id, "--region", "ap-south-1"]);
    assert!(said.contains("[[kms-region]]"), "{said}");
    let (home, far) = (two.calls(HOME, &id), two.calls(FAR, &id));
    for name in ["CreateKey", "ReplicateKey", "UpdatePrimaryRegion", "SynchronizeMultiRegionKey"] {
        assert!(home.iter().any(|(called, _)| called == name), "{name}: {home:?}");
    }
    let peer = "arn:aws:iam::000000000000:user/from-us-east-1";
    let told = far.iter().filter(|(name, by)| name == "SynchronizeMultiRegionKey" && by == peer);
    assert_eq!(told.count(), 2, "{far:?}");
}

#[test]
fn commands_import_the_same_material_into_the_key_of_each_region() {
    let two = Two::new();
    let made = two.json(HOME, &["key", "create", "--multi-region", "--external"]);
    let id = text(&made["key_id"]).to_owned();
    assert_eq!((text(&made["state"]), &made["imported_until"]), ("PendingImport", &Value::Null));
    two.json(HOME, &["key", "replicate", &id, "--region", FAR]);
    let file = |name: &str, bytes: &[u8]| {
        let path = two.files.path().join(name);
        fs::write(&path, bytes).expect("write a file");
        path.to_string_lossy().into_owned()
    };
    let (right, wrong) = (file("right", &[7; 32]), file("wrong", &[8; 32]));
    let import = |from: &'_ str| ["key", "import", &id, "--from", from].map(str::to_owned);
    let import = |region: &str, code: i32, from: &str| {
        two.refused(region, code, &import(from).each_ref().map(String::as_str))
    };
    for (name, bytes, words) in [("short", 31, "less than 32 bytes"), ("long", 33, "more than 32 bytes")] {
        let said = import(HOME, 2, &file(name, &vec![1; bytes]));
        assert!(said.contains(words), "{said}");
    }
    let said = import(FAR, 5, &right);
    assert!(said.contains("import it there first"), "{said}");
    two.json(HOME, &["key", "import", &id, "--from", &right]);
    let said = import(FAR, 5, &wrong);
    assert!(said.contains("is not the material"), "{said}");
    let there = two.json(FAR, &["key", "import", &id, "--from", &right, "--days", "3"]);
    assert_eq!(text(&there["state"]), "Enabled");
    assert!(text(&there["imported_until"]).ends_with('Z'), "{there}");
    assert_eq!(two.json(HOME, &["key", "show", &id])["imported_until"], "for good");
    assert_eq!(two.json(FAR, &["key", "delete-material", &id])["state"], "PendingImport");
    assert_eq!(two.json(HOME, &["key", "show", &id])["state"], "Enabled");
    for region in [HOME, FAR] {
        let calls = two.calls(region, &id);
        assert!(calls.iter().any(|(called, _)| called == "ImportKeyMaterial"), "{calls:?}");
    }
}

/// A record may name a multi-Region key by its ARN in another region: the one here is asked.
#[test]
fn the_audit_log_says_in_which_region_a_key_was_used() {
    let store = Store::new();
    store.ok(&["key", "create", "--multi-region", "--alias", "both"]);
    let place = Place::of(store, &["--key", "alias/both"]);
    let record = fs::read_to_string(place.volume_json()).expect("read a file");
    let (here, there) = (format!(":kms:{HOME}:"), format!(":kms:{FAR}:"));
    assert!(record.contains(&here));
    fs::write(place.volume_json(), record.replace(&here, &there)).expect("write a file");
    place.store.accept();
    place.attach(&[]).end();
    let audit = place.store.ok(&["audit", "show", "--json"]);
    let records = audit.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let of = |name: &str| records.clone().rfind(|it| it["eventName"] == name).expect("it is on record");
    let unwrapped = of("UnwrapDek");
    assert_eq!(unwrapped["awsRegion"], HOME);
    assert!(unwrapped["resources"].to_string().contains(&there), "{unwrapped}");
    let decrypted = of("Decrypt");
    assert_eq!(decrypted["awsRegion"], HOME);
    assert!(decrypted["resources"].to_string().contains(&here), "{decrypted}");
}

#[test]
fn a_region_that_is_away_is_gone_on_with_when_it_is_back() {
    let mut two = Two::new();
    let id = text(&two.json(HOME, &["key", "create", "--multi-region"])["key_id"]).to_owned();
    two.far.stop();
    let said = two.refused(HOME, 6, &["key", "replicate", &id, "--region", FAR]);
    assert!(said.contains("could not reach the KMS of eu-west-1"), "{said}");
    assert_eq!(two.json(HOME, &["key", "show", &id])["multi_region"]["creating"], json!([FAR]));
    two.far.start_again();
    two.json(HOME, &["key", "replicate", &id, "--region", FAR]);
    let shown = two.json(HOME, &["key", "show", &id])["multi_region"].clone();
    assert_eq!((&shown["creating"], &shown["behind"]), (&json!([]), &json!([])));

    // The settings have another region than the key: whoever synchronizes is told.
    let settings = two.home.folders().1.join("sealblk.toml");
    let good = fs::read_to_string(&settings).expect("read a file");
    let own = format!("region = '{HOME}'");
    assert!(good.starts_with(&own));
    fs::write(&settings, good.replacen(&own, "region = 'ap-south-1'", 1)).expect("write a file");
    let said = two.refused(HOME, 5, &["key", "synchronize"]);
    assert!(said.contains("in the settings is ap-south-1"), "{said}");
    fs::write(&settings, &good).expect("write a file");
    two.json(HOME, &["key", "synchronize"]);

    // The primary key is on its way, and cannot be asked for by anybody else meanwhile.
    two.far.stop();
    two.refused(HOME, 6, &["key", "primary", &id, "--region", FAR]);
    let shown = two.json(HOME, &["key", "show", &id]);
    assert_eq!((text(&shown["state"]), shown["enabled"].as_bool()), ("Updating", Some(true)));
    two.far.start_again();
    // The server that has the key may have been quicker.
    two.run(HOME, &["key", "primary", &id, "--region", FAR]);
    assert_eq!(text(&two.json(HOME, &["key", "show", &id])["state"]), "Enabled");
    assert_eq!(two.json(FAR, &["key", "show", &id])["multi_region"]["is_primary"], true);
}

#[test]
fn only_the_kms_that_the_settings_name_and_its_own_principal_are_believed() {
    let two = Two::new();
    let id = text(&two.json(HOME, &["key", "create", "--multi-region"])["key_id"]).to_owned();
    let settings = two.home.folders().1.join("sealblk.toml");
    let good = fs::read_to_string(&settings).expect("read a file");
    let credentials = two.files.path().join(HOME).join("credentials");
    let replicate = ["key", "replicate", &id, "--region", FAR];
    // Somebody between the two has no certificate of the other's.
    let change = |from: &Path, to: &Path| {
        fs::write(&settings, good.replace(&*from.to_string_lossy(), &to.to_string_lossy())).expect("write");
    };
    change(&two.ca(FAR), &two.ca(HOME));
    let said = two.refused(HOME, 6, &replicate);
    assert!(said.contains("TLS"), "{said}");
    // An administrator is no KMS, and has nothing to say of keys' material; nor has a host.
    for name in ["root", "host"] {
        let who = two.far.principal(name);
        let other = two.files.path().join(name);
        let lines = format!("AWS_ACCESS_KEY_ID={}\nAWS_SECRET_ACCESS_KEY={}\n", who.keys().0, who.keys().1);
        fs::write(&other, lines).expect("write a file");
        change(&credentials, &other);
        let said = two.refused(HOME, 2, &replicate);
        assert!(said.contains("others may read"), "{said}");
        fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).expect("make it private");
        let said = two.refused(HOME, 5, &replicate);
        assert!(said.contains("not authorized to perform: kms:SynchronizeMultiRegionKey"), "{said}");
    }
    fs::write(&settings, &good).expect("write a file");
    two.json(HOME, &replicate);
    // A peer may do nothing else.
    let text = fs::read_to_string(&credentials).expect("read a file");
    let value =
        |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).expect("a line").to_owned();
    let store = Store::new();
    let mut variables = two.home.principal("nobody").environment(&two.far.url);
    set(&mut variables, "AWS_ACCESS_KEY_ID", &value("AWS_ACCESS_KEY_ID="));
    set(&mut variables, "AWS_SECRET_ACCESS_KEY", &value("AWS_SECRET_ACCESS_KEY="));
    set(&mut variables, "AWS_CA_BUNDLE", &two.ca(FAR).to_string_lossy());
    store.set_environment(variables);
    let key = format!("aws:{}", arn(FAR, &id));
    let output = store.run(&["volume", "create", "--size", "1MiB", "--key", &key]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("not authorized to perform: kms:GenerateDataKeyWithoutPlaintext"), "{said}");
}

/// Stands before the KMSs of two regions: each request goes to the one whose region it is signed for.
/// Everything that passes is kept.
struct Wire {
    url: String,
    passed: Arc<Mutex<Vec<u8>>>,
    /// The region that is out of reach.
    lost: Arc<Mutex<Option<&'static str>>>,
    /// The status and the body that are answered to GetParametersForSynchronization, which goes nowhere then.
    forged: Arc<Mutex<Option<(u16, String)>>>,
}

impl Wire {
    fn new(two: &Two) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let wire = Wire { url, passed: Arc::default(), lost: Arc::default(), forged: Arc::default() };
        let (passed, lost, forged) = (wire.passed.clone(), wire.lost.clone(), wire.forged.clone());
        let of = |kms: &KmsServer| kms.url.strip_prefix("http://").expect("a URL").to_owned();
        let (home, far) = (of(&two.home), of(&two.far));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (passed, lost, home, far) = (passed.clone(), lost.clone(), home.clone(), far.clone());
                let forged = forged.clone();
                std::thread::spawn(move || pass(&stream, &passed, &lost, &forged, (&home, &far)));
            }
        });
        wire
    }
}

/// Passes one request on, and its answer back; nothing where somebody hangs up.
fn pass(
    mut client: &TcpStream,
    passed: &Mutex<Vec<u8>>,
    lost: &Mutex<Option<&'static str>>,
    forged: &Mutex<Option<(u16, String)>>,
    (home, far): (&str, &str),
) -> Option<()> {
    let mut reader = BufReader::new(client);
    let (mut head, mut length) = (String::new(), 0);
    while !head.ends_with("\r\n\r\n") {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        match &*lower {
            // One request a connection: the end of the answer is that of its connection.
            "\r\n" => head.push_str("connection: close\r\n\r\n"),
            lower if lower.starts_with("connection:") => {}
            _ => head.push_str(&line),
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let is_far = head.contains(&format!("/{FAR}/kms/aws4_request"));
    if *lost.lock().ok()? == Some(if is_far { FAR } else { HOME }) {
        return None;
    }
    if let Some((status, body)) = forged.lock().ok()?.as_ref().filter(|_| head.contains(PARAMETERS)) {
        passed.lock().ok()?.extend([head.as_bytes(), body.as_bytes()].concat());
        let head = format!("HTTP/1.1 {status} Forged\r\ncontent-length: {}\r\n\r\n", body.len());
        return client.write_all(&[head.as_bytes(), body.as_bytes()].concat()).ok();
    }
    let mut server = TcpStream::connect(if is_far { far } else { home }).ok()?;
    server.write_all(&[head.as_bytes(), &body].concat()).ok()?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).ok()?;
    passed.lock().ok()?.extend([head.as_bytes(), &body, &answer].concat());
    client.write_all(&answer).ok()
}

/// The material of all versions of the key in the KMS's store, as whoever has its root key can read it.
fn material(kms: &KmsServer, id: &str) -> Vec<Vec<u8>> {
    let log = fs::read(kms.folders().0.join("kms/log")).expect("read the log");
    let store = Uuid::from_slice(&log[12..28]).expect("an id");
    let keys = LogKeys::derive(&RootKey::copy_of(&kms.root_key()).unwrap(), store).unwrap();
    let key = Uuid::parse_str(id.strip_prefix("mrk-").expect("a multi-Region key")).expect("an id");
    let mut last = Value::Null;
    for at in (0..log.len()).filter(|at| log[*at..].starts_with(b"{\"time\":")) {
        let mut values = serde_json::Deserializer::from_slice(&log[at..]).into_iter::<Value>();
        // The last one may be on its way.
        let Some(Ok(body)) = values.next() else { break };
        let is_it = |change: &&Value| change["type"] == "key" && change["id"] == key.to_string();
        let found = body["changes"].as_array().expect("a list").iter().rev().find(is_it).cloned();
        last = found.unwrap_or(last);
    }
    let opened = last["versions"].as_array().expect("a list").iter().map(|version| {
        let sealed = STANDARD.decode(text(&version["sealed"])).expect("base64");
        let version = text(&version["id"]).parse().expect("an id");
        keys.open(key, version, &sealed.try_into().expect("60 bytes")).unwrap().bytes().to_vec()
    });
    opened.collect()
}

#[test]
fn material_is_nowhere_but_in_the_two_kmss() {
    let (two, wire, root) = Two::overheard();
    let id = two.key();
    // By a server as well, which goes on living.
    let mut rotate = Command::new(python());
    rotate.arg("-c").arg(format!(
        "import boto3, os\n\
         kms = boto3.client('kms', endpoint_url=os.environ['AWS_ENDPOINT_URL_KMS'], region_name='{HOME}')\n\
         kms.rotate_key_on_demand(KeyId='{id}')\n"
    ));
    rotate.envs(root.environment(&two.home.url).into_iter().filter(|(_, value)| !value.is_empty()));
    said(rotate.output().expect("Python runs"));
    wait_for("the new version is in the other region", || {
        let there = material(&two.far, &id);
        if there.len() == 2 { Ok(()) } else { Err(format!("{} versions", there.len())) }
    });
    let secrets = material(&two.far, &id);
    assert_eq!(secrets, material(&two.home, &id));
    assert_ne!(secrets[0], secrets[1]);
    two.json(HOME, &["key", "synchronize"]);
    let needles =
        Needles::of_secrets(&[("the first material", &secrets[0]), ("the second material", &secrets[1])]);
    let passed = wire.passed.lock().expect("not poisoned").clone();
    let words = Needles::words("SharedMaterial");
    assert!(!words.find(&passed).is_empty(), "the wire was not listened to");
    assert!(needles.find(&passed).is_empty(), "{:?}", needles.find(&passed));
    for region in [HOME, FAR] {
        let (root, config) = two.of(region).folders();
        for folder in [root, config] {
            assert_eq!(needles.find_in_files(&folder), <[String; 0]>::default());
        }
        let pid = two.of(region).pid();
        assert!(!look_through(pid, &Needles::words(region)).found.is_empty(), "it was not looked at");
        let seen = look_through(pid, &needles);
        assert_eq!(seen.found, <[String; 0]>::default(), "in the memory of the server of {region}");
    }
}

#[test]
fn a_copy_for_another_region_is_by_the_related_key_there_and_needs_no_other_region() {
    let (two, wire, root) = Two::overheard();
    let id = two.key();
    let store = Store::new();
    store.configure("kms-patience = 1\n");
    store.set_environment(root.environment(&wire.url));
    let place = Place::of(store, &["--key", &format!("aws:{}", arn(HOME, &id))]);
    let data = pattern(1, 1 << 16);
    place.put(128, &data);
    let snapshot = place.store.ok(&["snapshot", "create", "t"]).trim().to_owned();
    let before = wire.passed.lock().expect("not poisoned").len();
    let copy = place.store.ok(&["snapshot", "copy", &snapshot, "--region", FAR]).trim().to_owned();
    // The data key was wrapped anew there by one request, and shown to nobody.
    let passed = wire.passed.lock().expect("not poisoned")[before..].to_vec();
    let asked = |what: &str| Needles::words(&format!("TrentService.{what}\r")).find(&passed).len();
    assert_eq!((asked("ReEncrypt"), asked("Encrypt")), (1, 0));
    let shown: Value =
        serde_json::from_str(&place.store.ok(&["snapshot", "show", &copy, "--json"])).expect("JSON");
    assert_eq!(kms_keys(&shown), [arn(FAR, &id)]);

    *wire.lost.lock().expect("not poisoned") = Some(HOME);
    place.refuse(6, &[]);
    place.store.ok(&["volume", "delete", "t"]);
    place.store.ok(&["volume", "create", "--snapshot", &copy, "--name", "t"]);
    let host = place.attach(&[]);
    assert!(read(&mut open(&place.socket()).rings[0], 128, data.len()) == data);
    host.end();
    *wire.lost.lock().expect("not poisoned") = None;

    // A key of another region is none for that copy; the default key is looked for in the region.
    let refuse = |arguments: &[&str]| {
        let output = place.store.run(&[&["snapshot", "copy", &snapshot], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let other = text(&two.json(HOME, &["key", "create"])["arn"]).to_owned();
    let said = refuse(&["--region", FAR, "--key", &format!("aws:{other}")]);
    assert!(said.contains("is no key in eu-west-1"), "{said}");
    refuse(&["--region", "EU"]);
    // Of a key that is in one region alone there is no related one: everything is copied.
    let far = text(&two.json(FAR, &["key", "create", "--alias", "alias/far"])["arn"]).to_owned();
    place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "u", "--key", &format!("aws:{other}")]);
    let single = place.store.ok(&["snapshot", "create", "u"]).trim().to_owned();
    let copied = |arguments: &[&str]| {
        let copy = place.store.ok(&[&["snapshot", "copy", &single, "--region", FAR], arguments].concat());
        let shown = place.store.ok(&["snapshot", "show", copy.trim(), "--json"]);
        kms_keys(&serde_json::from_str(&shown).expect("JSON"))
    };
    assert_eq!(copied(&["--key", "aws:alias/far"]), [&*far]);
    assert_eq!(copied(&["--key", &format!("aws:{}", arn(FAR, &id))]), [arn(FAR, &id)]);
    let output = place.store.run(&["snapshot", "copy", &single, "--region", FAR]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("the default key"), "{said}");
    place.store.configure("default-key = 'aws:alias/far'\n");
    assert_eq!(copied(&[]), [far]);
}

/// The ARNs of the KMS keys that wrap the data keys of a snapshot.
fn kms_keys(shown: &Value) -> Vec<String> {
    let keys = shown["keys"].as_array().expect("a list").iter();
    let slots = keys.flat_map(|key| key["slots"].as_array().expect("a list"));
    slots.map(|slot| text(&slot["key_id"]).to_owned()).collect()
}

#[test]
fn whoever_is_between_two_kmss_is_told_nothing_and_believed_nothing() {
    let (two, wire, _) = Two::overheard();
    let id = two.key();
    let forge = |status, answer: Value| {
        *wire.forged.lock().expect("not poisoned") = Some((status, answer.to_string()));
    };
    let count = |what: &str| {
        Needles::words(&format!("TrentService.{what}\r"))
            .find(&wire.passed.lock().expect("not poisoned"))
            .len()
    };
    let told = count("SynchronizeMultiRegionKey");
    let single = text(&two.json(HOME, &["key", "create", "--multi-region"])["key_id"]).to_owned();
    // A good key to wrap with, of a KMS that says to be the other one.
    let folder = tempfile::tempdir().expect("a folder");
    let thief = Embedded::in_place(
        folder.path().join("kms"),
        folder.path().join("config"),
        Box::new(SystemClock),
        Locality { region: FAR.into(), account: "000000000000".into() },
        sealblk::base::hardened::harden().expect("hardened"),
    );
    let wrapping = thief.synchronization_parameters(HOME, &single, 1, true).expect("parameters").wrapping;
    let wrapping = wrapping.expect("it has no such key");
    let (public_key, token) = (STANDARD.encode(&wrapping.public_key), STANDARD.encode(&wrapping.token));
    forge(200, json!({ "Generation": 0, "PublicKey": public_key, "ImportToken": token }));
    let replicate = ["key", "replicate", &single, "--region", FAR];
    let said = two.refused(HOME, 6, &replicate);
    assert!(said.contains("the answer is not signed"), "{said}");
    // It has the key already, it is done with it, or has never had it: the primary key stays what it is.
    let before = two.json(HOME, &["key", "show", &id])["multi_region"].clone();
    let refusal = |kind: &str| json!({ "__type": kind, "message": "forged" });
    for (status, answer) in [
        (200, json!({ "Generation": 2 })),
        (400, refusal("NotFoundException")),
        (400, refusal("AccessDeniedException")),
    ] {
        forge(status, answer);
        two.refused(HOME, 6, &["key", "primary", &id, "--region", FAR]);
        let shown = two.json(HOME, &["key", "show", &id]);
        assert_eq!(text(&shown["state"]), "Updating");
        assert_eq!(shown["multi_region"]["replicas"], before["replicas"]);
        assert_eq!(shown["multi_region"]["is_primary"], true);
    }
    assert_eq!(count("SynchronizeMultiRegionKey"), told, "nothing was told");
    *wire.forged.lock().expect("not poisoned") = None;
    two.run(HOME, &["key", "primary", &id, "--region", FAR]);
    assert_eq!(two.json(FAR, &["key", "show", &id])["multi_region"]["is_primary"], true);
    two.json(HOME, &replicate);
}
