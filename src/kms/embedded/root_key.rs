//! The root key's file: `<config>/kms-<store id>.key`, mode 0600, never in the store's own folder.
//!
//! Its one line is `sealblk-kms-root-key-1:` and 64 hex digits.

use super::blob::random;
use super::keys::RootKey;
use super::plain::failed;
use crate::kms::KmsError;
use crate::root::{create_dir_durable, sync_dir};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use zeroize::Zeroizing;

const PREFIX: &str = "sealblk-kms-root-key-1:";
/// Longer than any good file: what is longer is not a root key.
const FILE_MAX: u64 = 256;

/// Where the root key of `store` lies.
pub fn path(config: &Path, store: Uuid) -> PathBuf {
    config.join(format!("kms-{store}.key"))
}

/// Makes a new root key for `store`, in a file that did not exist, durable when this returns.
pub fn create(config: &Path, store: Uuid) -> Result<RootKey, KmsError> {
    create_dir_durable(config).map_err(|e| KmsError::Internal(e.to_string()))?;
    let mut key = Zeroizing::new([0; 32]);
    random(&mut key[..])?;
    let path = path(config, store);
    write(&path, &key).map_err(|e| failed("create the KMS root key", &path, &e))?;
    sync_dir(config).map_err(|e| KmsError::Internal(e.to_string()))?;
    Ok(RootKey(key))
}

fn write(path: &Path, key: &[u8; 32]) -> std::io::Result<()> {
    let mut line = Zeroizing::new(vec![b'\n'; PREFIX.len() + 65]);
    line[..PREFIX.len()].copy_from_slice(PREFIX.as_bytes());
    hex::encode_to_slice(key, &mut line[PREFIX.len()..PREFIX.len() + 64]).expect("two digits a byte");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&line)?;
    file.sync_all()
}

/// Reads the root key of `store`; refuses a file that others than its owner may read or write.
pub fn load(config: &Path, store: Uuid) -> Result<RootKey, KmsError> {
    let path = path(config, store);
    let file = File::open(&path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => missing(&path, store),
        _ => failed("read the KMS root key", &path, &e),
    })?;
    let metadata = file.metadata().map_err(|e| failed("read the KMS root key", &path, &e))?;
    let mode = metadata.permissions().mode() & 0o7777;
    if !metadata.is_file() || mode & 0o077 != 0 {
        return Err(KmsError::Internal(format!(
            "the KMS root key {} may be read or changed by others (mode {mode:04o}): if nobody has copied it, run \
             \"chmod 600\" on it and try again",
            path.display()
        )));
    }
    let mut text = Zeroizing::new(Vec::with_capacity(FILE_MAX as usize));
    file.take(FILE_MAX).read_to_end(&mut text).map_err(|e| failed("read the KMS root key", &path, &e))?;
    parse(&text).ok_or_else(|| {
        KmsError::Corrupt(format!("{} is not a KMS root key; put it back from a backup", path.display()))
    })
}

fn missing(path: &Path, store: Uuid) -> KmsError {
    KmsError::Internal(format!(
        "the root key of the KMS store {store} is missing: put {} back from a backup (the store's folder is \
         worthless without it; if the key lies in another folder, set SEALBLK_CONFIG_DIR)",
        path.display()
    ))
}

/// Parses the root key's file.
pub fn parse(text: &[u8]) -> Option<RootKey> {
    let digits = text.trim_ascii_end().strip_prefix(PREFIX.as_bytes())?;
    let mut key = Zeroizing::new([0; 32]);
    hex::decode_to_slice(digits, &mut key[..]).ok()?;
    Some(RootKey(key))
}
