//! What the KMS of another region says of a multi-Region key: the message, its token and its ciphertexts.

use super::input::Input;
use sealblk::base::Locality;
use sealblk::base::hardened::harden;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::blob::Material;
use sealblk::kms::embedded::clock::{Clock, Moment};
use sealblk::kms::embedded::synchronization::{Message, Wrapping, seal};
use sealblk::kms::key_ref::{id_text, multi_region_id};
use sealblk::kms::{EncryptionContext, Exception, KeyState, KmsError};
use serde_json::Value;
use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use uuid::Uuid;

const HOME: &str = "us-east-1";
const HERE: &str = "eu-west-1";
const STRANGER: &str = "ap-south-1";
/// The keys of the inputs: one that is known here, one that is known and waits for its
/// material, and a new one.
const KEYS: [u8; 3] = [0x11, 0x22, 0x33];
/// Of the first key, and of both external ones: the id of the version, and that of a fingerprint.
const VERSION: Uuid = Uuid::from_u128(0x4444_4444_4444_4444_8444_4444_4444_4444);
const FINGERPRINT: Uuid = Uuid::from_u128(0x5555_5555_5555_4555_8555_5555_5555_5555);

/// A clock that stands still: tokens stay good.
struct Still;

impl Clock for Still {
    fn now(&self) -> Moment {
        Moment { wall: 1_800_000_000_000, boot: Some(Uuid::from_u128(1)), up: 1_000_000 }
    }
}

/// A KMS with the first two keys.
struct Site {
    folder: PathBuf,
    kms: Embedded,
    wrappings: Vec<Wrapping>,
    /// What the first key has encrypted.
    blob: Vec<u8>,
    /// All files as they are before an input.
    files: Vec<(PathBuf, Vec<u8>)>,
}

fn key(which: u8) -> Uuid {
    multi_region_id([which; 16])
}

fn open(folder: &Path) -> Embedded {
    let place = Locality { region: HERE.into(), account: "000000000000".into() };
    let (data, config) = (folder.join("kms"), folder.join("config"));
    Embedded::in_place(data, config, Box::new(Still), place, harden().expect("a hardened process"))
}

fn context() -> EncryptionContext {
    EncryptionContext::pair("aws:ebs:id", "vol-1")
}

fn material(which: u8) -> Material {
    Material::copy_of(&[which; 32]).expect("memory")
}

impl Site {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = base.join(format!("sealblk-fuzz-{}", Uuid::new_v4()));
        let kms = open(&folder);
        let wrapping = |which: u8| {
            let given = kms.synchronization_parameters(HOME, &id_text(key(which)), u64::MAX, true);
            given.expect("parameters").wrapping.expect("a key to wrap with")
        };
        let wrappings: Vec<Wrapping> = KEYS.into_iter().map(wrapping).collect();
        let made = [(0, first(key(KEYS[0])), material(1)), (1, first_external(key(KEYS[1])), material(2))];
        for (at, text, secret) in made {
            let message = seal(&wrappings[at], text, [Ok(secret)].into_iter()).expect("a message");
            let id = id_text(key(KEYS[at]));
            kms.receive(HOME, &id, &wrappings[at].token, &message).expect("a replica");
        }
        let blob = kms.encrypt(&id_text(key(KEYS[0])), b"before", &context()).expect("encrypts").blob;
        let folders = [folder.join("kms"), folder.join("config")];
        let listed = folders.iter().flat_map(|it| fs::read_dir(it).expect("list a folder"));
        let paths = listed.map(|it| it.expect("list").path()).filter(|path| path.is_file());
        let files = paths.map(|path| (path.clone(), fs::read(path).expect("read a file"))).collect();
        Site { folder, kms, wrappings, blob, files }
    }

    fn put_back(&mut self) {
        for (path, bytes) in &self.files {
            fs::write(path, bytes).expect("write a file");
        }
        self.kms = open(&self.folder);
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn first(key: Uuid) -> String {
    format!(
        r#"{{"key":"{key}","account":"000000000000","from":"{HOME}","to":"{HERE}","primary":"{HOME}","replicas":["{HERE}"],"generation":5,"rotation":null,"versions":[{{"id":"{VERSION}","created":1700000000000,"rotation":null,"waits":false}}],"new":{{"description":"","tags":[],"policy":null}}}}"#
    )
}

fn first_external(key: Uuid) -> String {
    format!(
        r#"{{"key":"{key}","account":"000000000000","from":"{HOME}","to":"{HERE}","primary":"{HOME}","replicas":["{HERE}"],"generation":5,"rotation":null,"versions":[],"external":{{"version":"{VERSION}","fingerprint":"{FINGERPRINT}"}},"new":{{"description":"","tags":[],"policy":null}}}}"#
    )
}

/// The secrets that go with a message: those that are known here of the ids that are known.
fn secrets(said: &Value, is_wrong: bool) -> Vec<Material> {
    let of = |id: &Value, known: Uuid, which: u8| {
        let is_known = id.as_str().is_some_and(|id| id.parse() == Ok(known)) && !is_wrong;
        material(if is_known { which } else { 9 })
    };
    if let Some(external) = said.get("external").filter(|it| !it.is_null()) {
        let fingerprint = external.get("fingerprint").filter(|it| !it.is_null());
        return fingerprint.map(|id| of(id, FINGERPRINT, 2)).into_iter().collect();
    }
    let versions = said.get("versions").and_then(Value::as_array);
    let versions = versions.into_iter().flatten().take(600);
    versions.map(|version| of(version.get("id").unwrap_or(&Value::Null), VERSION, 1)).collect()
}

thread_local! {
    static SITE: RefCell<Option<Site>> = const { RefCell::new(None) };
}

/// What is changed about the message, and what it says, JSON.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (change, at) = (input.u8(), usize::from(input.u8()));
    let Ok(text) = std::str::from_utf8(input.rest()) else { return };
    let said: Value = serde_json::from_str(text).unwrap_or_default();
    let id = said.get("key").and_then(Value::as_str).and_then(|id| id.parse::<Uuid>().ok());
    let id = id.unwrap_or_else(|| key(KEYS[0]));
    SITE.with_borrow_mut(|site| {
        let site = site.get_or_insert_with(Site::new);
        let which = KEYS.iter().position(|it| key(*it) == id).unwrap_or(0);
        let wrapping = site.wrappings[which].clone();
        let secrets = secrets(&said, change & 1 != 0);
        let message = seal(&wrapping, text.to_owned(), secrets.into_iter().map(Ok)).expect("a message");
        deliver(site, change, at, (id, wrapping.token, message));
    });
}

fn deliver(site: &mut Site, change: u8, at: usize, (id, mut token, mut message): (Uuid, Vec<u8>, Message)) {
    let changed = |bytes: &mut Vec<u8>| {
        let len = bytes.len();
        bytes[at % len] ^= 1;
    };
    match change >> 1 & 7 {
        1 => changed(&mut token),
        2 => changed(&mut message.wrapped_key),
        3 => changed(&mut message.material),
        4 => message.material.truncate(at),
        5 => message.wrapped_key.truncate(at),
        6 => token.truncate(at),
        7 => message.shared.push(' '),
        _ => {}
    }
    let from = if change & 16 != 0 { STRANGER } else { HOME };
    let log = site.folder.join("kms/log");
    let before = fs::read(&log).expect("the log");
    let received = site.kms.receive(from, &id_text(id), &token, &message);
    let is_whole = change >> 1 & 7 == 0;
    match received {
        Ok(metadata) => {
            assert!(is_whole && from == HOME, "what was changed on the way is not taken");
            assert_eq!(metadata.id, id);
            let now = site.kms.key(&id_text(id)).expect("it is there");
            assert_eq!((now.state, &now.material), (metadata.state, &metadata.material));
            assert!(now.state != KeyState::Enabled || site.kms.encrypt(&now.arn, b"x", &context()).is_ok());
            // The same again is no news.
            let between = fs::read(&log).expect("the log");
            site.kms.receive(from, &id_text(id), &token, &message).expect("the same again");
            assert!(fs::read(&log).expect("the log") == between);
            let first = site.kms.key(&id_text(key(KEYS[0]))).expect("it is there");
            if first.state == KeyState::Enabled {
                let opened = site.kms.open_blob(None, &site.blob, &context()).expect("no version is lost");
                assert_eq!(&opened.plaintext[..], b"before");
            }
            if between != before {
                site.put_back();
            }
        }
        Err(e) => {
            let is_told = match &e {
                KmsError::Other(exception, _) => matches!(
                    exception,
                    Exception::Conflict
                        | Exception::LimitExceeded
                        | Exception::Tag
                        | Exception::MalformedPolicyDocument
                ),
                KmsError::Corrupt(_) | KmsError::Internal(_) | KmsError::Transport(_) => false,
                _ => true,
            };
            assert!(is_told, "{e}");
            assert!(fs::read(&log).expect("the log") == before, "what is refused changes nothing");
        }
    }
}
