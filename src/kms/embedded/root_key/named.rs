//! Which KMS store a root key is of: `kms-<store id>.store` beside the key names the store's folder and when
//! it was made. It is for people, who find a key there and wonder: nothing is decided by it. And
//! `kms-<store id>.copied`: when a copy of the root key was made last, without which "sealblk backup" asks
//! whether there is one.
#![forbid(unsafe_code)]

use crate::base::root::{files, replace_file};
use crate::base::{Result, Timestamp};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Longer files are not ours, in bytes.
const MAX_LEN: u64 = 16 << 10;

/// A root key's file.
pub struct KeyFile {
    /// The KMS store whose root key it is.
    pub store: Uuid,
    /// The file.
    pub path: PathBuf,
    /// The folder in which the KMS store was made, and when, where that was noted.
    pub made: Option<(PathBuf, Timestamp)>,
}

#[derive(Serialize, Deserialize)]
struct Written {
    folder: PathBuf,
    made: Timestamp,
}

/// Notes beside the root key of `store`, which is just being made in `folder`, that it is of that. Where that
/// cannot be noted, the key has no name.
pub(crate) fn note(config: &Path, store: Uuid, folder: &Path) {
    let written = Written { folder: folder.to_owned(), made: Timestamp::now() };
    // A path that is no text cannot be in JSON.
    let Ok(mut bytes) = serde_json::to_vec(&written) else { return };
    bytes.push(b'\n');
    if let Err(e) = replace_file(&note_path(config, store), &bytes) {
        log::info!("the root key is not named after its store: {e}");
    }
}

/// Notes that a copy of the root key of `store` was made now.
///
/// # Errors
/// Those of the file system.
pub(crate) fn note_copied(config: &Path, store: Uuid) -> Result<()> {
    replace_file(&copied_path(config, store), format!("{}\n", Timestamp::now()).as_bytes())
}

/// When a copy of the root key of `store` was made last, where that was noted.
pub(crate) fn copied(config: &Path, store: Uuid) -> Option<Timestamp> {
    let bytes = files::read(&copied_path(config, store), MAX_LEN).ok()?;
    String::from_utf8(bytes).ok()?.trim_end().to_owned().try_into().ok()
}

fn copied_path(config: &Path, store: Uuid) -> PathBuf {
    config.join(format!("kms-{store}.copied"))
}

fn note_path(config: &Path, store: Uuid) -> PathBuf {
    config.join(format!("kms-{store}.store"))
}

/// The files of root keys in the configuration folder, sorted.
///
/// # Errors
/// Those of listing the folder.
pub fn key_files(config: &Path) -> Result<Vec<KeyFile>> {
    let mut found = Vec::new();
    for name in files::names_if_there(config)? {
        let id = name.to_str().and_then(|it| it.strip_prefix("kms-")?.strip_suffix(".key"));
        let Some(store) = id.and_then(|id| id.parse::<Uuid>().ok()) else { continue };
        let bytes = files::read(&note_path(config, store), MAX_LEN).unwrap_or_default();
        let written = serde_json::from_slice::<Written>(&bytes).ok();
        let made = written.map(|it| (it.folder, it.made));
        found.push(KeyFile { store, path: super::path(config, store), made });
    }
    found.sort_by_key(|it| it.store);
    Ok(found)
}

/// Removes the root key of `store`, what names it, and what tells how far its log had come.
///
/// # Errors
/// Those of the file system.
pub(crate) fn remove(config: &Path, store: Uuid) -> Result<()> {
    let head = config.join(format!("kms-{store}.head"));
    for path in [note_path(config, store), copied_path(config, store), head, super::path(config, store)] {
        files::remove_if_there(&path)?;
    }
    Ok(())
}
