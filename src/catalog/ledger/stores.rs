//! The stores that the configuration folder knows.
#![forbid(unsafe_code)]

use super::MAX_SMALL;
use crate::base::root::{Root, files};
use crate::base::{Context, Result};
use sha2::{Digest, Sha256};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// What the folder of a store in a pool begins with, in the configuration folder.
const POOLED: &str = "ceph-";

/// The stores that the configuration folder `config` has a ledger's key of: the path of each, and how many
/// volumes and snapshots it has a mark of.
///
/// # Errors
/// Those of listing the folder.
pub fn stores(config: &Path) -> Result<Vec<(PathBuf, usize)>> {
    let folder = config.join("stores");
    let mut stores = Vec::new();
    for name in files::names_if_there(&folder)? {
        let of_store = folder.join(name);
        let Ok(path) = files::read(&of_store.join("root"), MAX_SMALL) else { continue };
        let is_record = |name: &std::ffi::OsString| !name.to_string_lossy().contains('.');
        let marks = files::names_if_there(&of_store.join("marks"))?;
        stores.push((
            PathBuf::from(std::ffi::OsString::from_vec(path)),
            marks.iter().filter(|it| is_record(it)).count(),
        ));
    }
    Ok(stores)
}

/// Whether `config` says of the folder `root` that it is what this host has of a store in a pool.
///
/// # Errors
/// Those of listing the folder.
pub fn is_of_pool(config: &Path, root: &Root) -> Result<bool> {
    let folder = config.join("stores");
    let is_it = |name: &std::ffi::OsString| {
        let path = files::read(&folder.join(name).join("root"), MAX_SMALL);
        name.as_bytes().starts_with(POOLED.as_bytes())
            && path.is_ok_and(|path| path == root.path().as_os_str().as_bytes())
    };
    Ok(files::names_if_there(&folder)?.iter().any(is_it))
}

/// Removes what `config` has of the ledger of the store at `root`. Returns whether there was anything.
///
/// # Errors
/// Those of the file system.
pub fn forget_store(config: &Path, root: &Root) -> Result<bool> {
    let folder = config.join("stores").join(folder_name(root));
    if !files::exists(&folder) {
        return Ok(false);
    }
    let attempt = || format!("remove {}", folder.display());
    for folder in [folder.join("marks"), folder.clone()] {
        if files::exists(&folder) {
            files::remove_folder(&folder).context(attempt)?;
        }
    }
    Ok(true)
}

/// The name of a store's folder: a digest of its path; of one in a pool, which that is.
pub(super) fn folder_name(root: &Root) -> String {
    if let Some(pooled) = root.pool() {
        // The same on all hosts: the key is brought from one to the other.
        return format!("{POOLED}{}", pooled.id);
    }
    let digest = hex::encode(Sha256::digest(root.path().as_os_str().as_bytes()));
    digest[..16].to_owned()
}
