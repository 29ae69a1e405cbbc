//! Where the root key comes from: the systemd credential `sealblk-kms-root-key`, if this service was given
//! one, else the file `<config>/kms-<store id>.key`, mode 0600, never in the store's own folder.
//!
//! Credential and file have one line: the key itself, `sealblk-kms-root-key-1:` and 64 hex digits, or in the
//! file the key under a passphrase ([`wrapped`]) or wrapped by an HSM ([`in_hsm`]).

pub mod in_hsm;
pub mod named;
pub mod passphrase;
pub mod pinentry;
pub mod wrapped;

use crate::base::hardened::Hardened;
use crate::base::root::{create_dir_durable, files, replace_file, sync_dir};
use crate::base::sync::Locked;
use crate::hsm::Pin;
use crate::kms::KmsError;
use crate::kms::embedded::blob::random;
use crate::kms::embedded::keys::{RootKey, same};
use crate::kms::embedded::plain::failed;
use in_hsm::InHsm;
use passphrase::Passphrase;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use uuid::Uuid;
use wrapped::Wrapped;
use zeroize::Zeroizing;

const PREFIX: &str = "sealblk-kms-root-key-1:";
/// What a copy of a root key begins with; the store's id follows.
const BACKUP: &str = "sealblk-kms-root-key-backup-1:";
/// Longer than any good file: what is longer is not a root key.
const FILE_MAX: u64 = 8192;
/// The credential's name.
const CREDENTIAL: &str = "sealblk-kms-root-key";

/// What names the credential with the PIN of the token that a root key is wrapped by.
const PIN_OF: &str = "root-key";

/// The line of a file. Has no Debug.
type Line = Zeroizing<Vec<u8>>;

/// What a process has unwrapped: nobody is asked twice, and the costly function is computed once.
static UNWRAPPED: Mutex<Option<(Vec<u8>, RootKey)>> = Mutex::new(None);

/// Where the root key of `store` lies.
pub fn path(config: &Path, store: Uuid) -> PathBuf {
    config.join(format!("kms-{store}.key"))
}

/// Makes a new root key for `store`, in a file that did not exist, under a passphrase if there is one;
/// durable when this returns.
pub fn create(
    config: &Path,
    store: Uuid,
    passphrase: Option<&Passphrase>,
    _: Hardened,
) -> Result<RootKey, KmsError> {
    create_dir_durable(config).map_err(|e| KmsError::Internal(e.to_string()))?;
    let key = RootKey::filled(|bytes| random(bytes))?;
    let path = path(config, store);
    write(&path, &line(&key, store, passphrase)?)
        .map_err(|e| failed("create the KMS root key", &path, &e))?;
    sync_dir(config).map_err(|e| KmsError::Internal(e.to_string()))?;
    Ok(key)
}

/// How a root key is kept in its file.
pub enum Kept<'a> {
    /// As it is.
    Plain,
    /// Under a passphrase.
    Under(&'a Passphrase),
    /// Wrapped by a key that the token there makes for it.
    InHsm(crate::hsm::Place, Pin),
}

/// Has the root key of `store` kept so from now on. The key stays the same, and with it
/// everything that it opens. Durable when this returns.
pub fn protect(config: &Path, store: Uuid, kept: Kept<'_>, hardened: Hardened) -> Result<(), KmsError> {
    let path = path(config, store);
    if !path.try_exists().map_err(|e| failed("look for the KMS root key", &path, &e))? {
        return Err(KmsError::Unsupported(format!(
            "there is no {}: the root key comes from a credential, and is kept as that says",
            path.display()
        )));
    }
    let key = from_file(&path, store, hardened)?;
    let line = match kept {
        Kept::Plain => line(&key, store, None)?,
        Kept::Under(passphrase) => line(&key, store, Some(passphrase))?,
        Kept::InHsm(place, pin) => {
            let sealed = InHsm::seal(&key, store, place, pin.clone())?;
            // Nothing is replaced by what does not open.
            if !same(sealed.open(store, pin)?.bytes(), key.bytes()) {
                return Err(KmsError::Internal("the token has not given back what it was given".into()));
            }
            Zeroizing::new(sealed.line().into_bytes())
        }
    };
    replace_file(&path, &line).map_err(|e| KmsError::Internal(e.to_string()))
}

/// Reads the root key of `store`, asking for a passphrase if it is under one; refuses a file that others than
/// its owner may read or write.
pub fn load(config: &Path, store: Uuid, hardened: Hardened) -> Result<RootKey, KmsError> {
    match passphrase::credential(CREDENTIAL, FILE_MAX)? {
        Some((path, text)) => parse(&text)?.ok_or_else(|| damaged(&path)),
        None => from_file(&path(config, store), store, hardened),
    }
}

/// Whether [`load`] would have to get a passphrase from somewhere, or would find no root key.
pub fn is_out_of_reach(config: &Path, store: Uuid) -> bool {
    match place(config, store) {
        Ok(Place::Missing(_)) => true,
        Ok(Place::UnderPassphrase(path) | Place::InHsm(path)) => {
            let unwrapped = UNWRAPPED.locked();
            let known = |text: Line| unwrapped.as_ref().is_some_and(|(line, _)| line[..] == text[..]);
            read(&path, store).is_ok_and(|text| !known(text))
        }
        Ok(Place::Credential(_) | Place::File(_)) | Err(_) => false,
    }
}

fn from_file(path: &Path, store: Uuid, hardened: Hardened) -> Result<RootKey, KmsError> {
    let text = read(path, store)?;
    if let Some(key) = parse(&text)? {
        return Ok(key);
    }
    let mut unwrapped = UNWRAPPED.locked();
    if let Some((line, key)) = &*unwrapped
        && line[..] == text[..]
    {
        return Ok(key.clone());
    }
    let key = if let Some(in_hsm) = InHsm::parse(&text) {
        in_hsm.open(store, passphrase::pin(Some(PIN_OF), "the KMS root key", hardened)?)?
    } else {
        let wrapped = Wrapped::parse(&text).ok_or_else(|| damaged(path))?;
        let prompt = format!("Passphrase of the KMS root key {}: ", path.display());
        passphrase::ask_until(&prompt, hardened, |given| wrapped.open(store, given))?
    };
    *unwrapped = Some((text.to_vec(), key.clone()));
    Ok(key)
}

fn line(key: &RootKey, store: Uuid, passphrase: Option<&Passphrase>) -> Result<Line, KmsError> {
    if let Some(passphrase) = passphrase {
        return Ok(Zeroizing::new(Wrapped::seal(key, store, passphrase)?.line().into_bytes()));
    }
    let mut line = Zeroizing::new(vec![b'\n'; PREFIX.len() + 65]);
    line[..PREFIX.len()].copy_from_slice(PREFIX.as_bytes());
    hex::encode_to_slice(key.bytes(), &mut line[PREFIX.len()..PREFIX.len() + 64]).expect("two digits a byte");
    Ok(line)
}

/// Where a root key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The systemd credential at this path.
    Credential(PathBuf),
    /// This file, for whoever may read it.
    File(PathBuf),
    /// This file, under a passphrase.
    UnderPassphrase(PathBuf),
    /// This file, wrapped by an HSM.
    InHsm(PathBuf),
    /// It should be this file, which is not there.
    Missing(PathBuf),
}

/// Whether there is a root key for `store`, in a file or as this process's credential. It is not read.
pub(super) fn is_there(config: &Path, store: Uuid) -> Result<bool, KmsError> {
    let path = path(config, store);
    Ok(passphrase::credential(CREDENTIAL, FILE_MAX)?.is_some()
        || path.try_exists().map_err(|e| failed("look for the KMS root key", &path, &e))?)
}

/// Where the root key of `store` is. Nobody is asked for a passphrase.
pub fn place(config: &Path, store: Uuid) -> Result<Place, KmsError> {
    if let Some((path, _)) = passphrase::credential(CREDENTIAL, FILE_MAX)? {
        return Ok(Place::Credential(path));
    }
    let path = path(config, store);
    if !path.try_exists().map_err(|e| failed("look for the KMS root key", &path, &e))? {
        return Ok(Place::Missing(path));
    }
    let text = read(&path, store)?;
    Ok(match Wrapped::parse(&text) {
        Some(_) => Place::UnderPassphrase(path),
        None if InHsm::parse(&text).is_some() => Place::InHsm(path),
        None => Place::File(path),
    })
}

/// The root key of `store` as a copy for bad days: a line that names the store, and the
/// key under a passphrase.
pub fn backup(
    config: &Path,
    store: Uuid,
    passphrase: &Passphrase,
    hardened: Hardened,
) -> Result<String, KmsError> {
    let key = load(config, store, hardened)?;
    Ok(format!("{BACKUP}{store}\n{}", Wrapped::seal(&key, store, passphrase)?.line()))
}

/// Puts a copy that [`backup`] made in the place of the root key of `store`, which is missing: under the
/// copy's passphrase, which is asked for. Durable when this returns; returns the file.
pub fn restore(config: &Path, store: Uuid, copy: &[u8], hardened: Hardened) -> Result<PathBuf, KmsError> {
    let path = path(config, store);
    let no_copy = || KmsError::Validation("that is no backup of a KMS root key".into());
    let text = std::str::from_utf8(copy).map_err(|_| no_copy())?;
    let (of, line) = text.strip_prefix(BACKUP).and_then(|text| text.split_once('\n')).ok_or_else(no_copy)?;
    let wrapped = Wrapped::parse(line.as_bytes()).ok_or_else(no_copy)?;
    if of.parse() != Ok(store) {
        return Err(KmsError::Validation(format!(
            "it is the root key of the KMS store {of}, and this is the KMS store {store}"
        )));
    }
    if files::exists(&path) {
        return Err(KmsError::AlreadyExists(format!("there is a root key already: {}", path.display())));
    }
    let prompt = "Passphrase of the backup: ";
    let key = passphrase::ask_until(prompt, hardened, |given| wrapped.open(store, given))?;
    create_dir_durable(config).map_err(|e| KmsError::Internal(e.to_string()))?;
    files::create_file(&path, wrapped.line().as_bytes()).map_err(|e| KmsError::Internal(e.to_string()))?;
    // Nobody is asked twice.
    *UNWRAPPED.locked() = Some((wrapped.line().into_bytes(), key));
    Ok(path)
}

/// Makes a file that only its owner can read. The file is durable, and its name once its folder is.
pub(crate) fn write(path: &Path, line: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(line)?;
    file.sync_all()
}

fn read(path: &Path, store: Uuid) -> Result<Line, KmsError> {
    let file = File::open(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => missing(path, store),
        _ => failed("read the KMS root key", path, &e),
    })?;
    let metadata = file.metadata().map_err(|e| failed("read the KMS root key", path, &e))?;
    let mode = metadata.permissions().mode() & 0o7777;
    if !metadata.is_file() || mode & 0o077 != 0 {
        return Err(KmsError::Internal(format!(
            "the KMS root key {} may be read or changed by others (mode {mode:04o}): if nobody has copied \
             it, run \"chmod 600\" on it and try again",
            path.display()
        )));
    }
    let mut text = Zeroizing::new(Vec::with_capacity(FILE_MAX as usize));
    file.take(FILE_MAX).read_to_end(&mut text).map_err(|e| failed("read the KMS root key", path, &e))?;
    Ok(text)
}

fn damaged(path: &Path) -> KmsError {
    KmsError::Corrupt(format!("{} is not a KMS root key; put it back from a backup", path.display()))
}

fn missing(path: &Path, store: Uuid) -> KmsError {
    KmsError::Unsupported(format!(
        "the root key of the KMS store {store} is missing: put {} back from a backup, or have \"sealblk kms \
         restore\" do so (the store's folder is worthless without it; if the key lies in another folder, \
         name that by --config-dir; if it is a systemd credential, this was not started with it)",
        path.display()
    ))
}

/// Parses a line that is the key itself; `None` if it is another sort of line.
pub fn parse(text: &[u8]) -> Result<Option<RootKey>, KmsError> {
    let Some(digits) = text.trim_ascii_end().strip_prefix(PREFIX.as_bytes()) else { return Ok(None) };
    let mut is_key = false;
    let key = RootKey::filled(|key| {
        is_key = hex::decode_to_slice(digits, key).is_ok();
        Ok(())
    })?;
    Ok(is_key.then_some(key))
}
