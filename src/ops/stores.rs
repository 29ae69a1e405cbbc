//! The stores that have something in a configuration folder: the key of their ledger, their marks, the root
//! key of their KMS.
//!
//! A command with `--root DIR` makes these for DIR, and removing DIR leaves them behind.
#![forbid(unsafe_code)]

use crate::base::root::{Root, files, sync_dir};
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::ledger;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::root_key::named::{self, KeyFile};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// What is at a store's path now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Volumes or snapshots.
    Used,
    /// A folder, in which there are none.
    Empty,
    /// Nothing.
    Gone,
}

impl Presence {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Presence::Used => "used",
            Presence::Empty => "empty",
            Presence::Gone => "gone",
        }
    }
}

/// A store that this configuration folder has something of.
pub struct KnownStore {
    /// Its path.
    pub root: PathBuf,
    /// What is there now.
    pub presence: Presence,
    /// How many volumes and snapshots it has, or had when it was there.
    pub records: usize,
    /// The root key of its KMS, where it has one here.
    pub root_key: Option<PathBuf>,
    /// When the root key was made, where that was noted.
    pub made: Option<Timestamp>,
}

/// The stores, by path, and then the root keys of which nothing says what store they are of.
///
/// # Errors
/// Those of listing the configuration folder.
pub fn list() -> Result<(Vec<KnownStore>, Vec<PathBuf>)> {
    let config = Root::config_dir()?;
    let mut keys = named::key_files(&config)?;
    let mut stores = Vec::new();
    for (root, records) in ledger::stores(&config)? {
        stores.push(known(root, records, &mut keys)?);
    }
    // A store whose first record was never made has a root key alone.
    for n in (0..keys.len()).rev() {
        if let Some(root) = keys[n].made.as_ref().and_then(|(folder, _)| folder.parent()) {
            let root = root.to_owned();
            stores.push(known(root, 0, &mut keys)?);
        }
    }
    stores.sort_by(|one, other| one.root.cmp(&other.root));
    Ok((stores, keys.into_iter().map(|it| it.path).collect()))
}

/// The store at `root`; its root key is taken out of `keys`.
fn known(root: PathBuf, records: usize, keys: &mut Vec<KeyFile>) -> Result<KnownStore> {
    let place = Root::new(&root);
    let now = kms_of(&place, keys);
    let key = now.and_then(|id| keys.iter().position(|it| it.store == id)).map(|n| keys.swap_remove(n));
    let (root_key, made) = match key {
        Some(key) => (Some(key.path), key.made.map(|(_, made)| made)),
        None => (None, None),
    };
    Ok(KnownStore { presence: presence(&place)?, root, records, root_key, made })
}

/// The KMS of the store at `root`: the one that is there, else the last one that was made there.
fn kms_of(root: &Root, keys: &[KeyFile]) -> Option<Uuid> {
    let was_here = |it: &&KeyFile| it.made.as_ref().is_some_and(|(folder, _)| *folder == root.kms());
    let last = || keys.iter().filter(was_here).max_by_key(|it| it.made.as_ref().map(|(_, made)| *made));
    Embedded::store_id_at(root).or_else(|| last().map(|it| it.store))
}

fn presence(root: &Root) -> Result<Presence> {
    let has_any = |folder: &Path| Ok::<_, Error>(!files::names_if_there(folder)?.is_empty());
    // Of a store in a pool, what it has is not here to be seen.
    let is_elsewhere = ledger::is_of_pool(&Root::config_dir()?, root)?;
    if is_elsewhere || has_any(&root.volumes())? || has_any(&root.snapshots())? {
        return Ok(Presence::Used);
    }
    Ok(if root.path().symlink_metadata().is_ok() { Presence::Empty } else { Presence::Gone })
}

/// Removes what the configuration folder has of the store at `root`, the root key of its KMS only if that is
/// asked for. Returns whether there was a root key.
///
/// # Errors
/// `Busy` if there are volumes or snapshots; `NotFound` if there is nothing of that store here; those of the
/// file system.
pub fn forget(root: &Root, root_key: bool) -> Result<bool> {
    let config = Root::config_dir()?;
    let path = root.path().display();
    if presence(root)? == Presence::Used {
        let message =
            format!("{path} has volumes or snapshots, which could not be used any more; delete them");
        return Err(Error::new(Kind::Busy, message));
    }
    let keys = named::key_files(&config)?;
    let kms = kms_of(root, &keys).filter(|id| keys.iter().any(|it| it.store == *id));
    let was_known = ledger::forget_store(&config, root)?;
    if !was_known && kms.is_none() {
        let message = format!("{} has nothing of the store {path}", config.display());
        return Err(Error::new(Kind::NotFound, message));
    }
    if let Some(id) = kms.filter(|_| root_key) {
        named::remove(&config, id).context(|| format!("remove the root key of {path}"))?;
    }
    sync_dir(&config)?;
    Ok(kms.is_some())
}
