//! A restore that is only tried: in a store of its own, beside the one that asks, with a configuration folder
//! of its own, which has nothing of this host's but the settings and, if no copy of it is given, the root
//! key. So what comes back does so by what the place has.

use super::step::Site;
use crate::backup::marks::lock_file;
use crate::base::root::{Root, create_dir_durable, files};
use crate::base::{Context, Error, Kind, Result};
use crate::kms::embedded::root_key;
use crate::ops::Store;
use nix::fcntl::Flock;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// What the folders' names begin with.
const NAME: &str = "drill-";
/// Longer settings are none, in bytes.
const MAX: u64 = 1 << 20;

/// The folders of a drill, which are removed in the end.
pub(super) struct Scratch {
    root: PathBuf,
    config: PathBuf,
    _lock: Flock<File>,
}

impl Scratch {
    /// Makes them, for a store whose embedded KMS is `kms`. Its root key is there, unless that is to come out
    /// of a copy.
    ///
    /// # Errors
    /// `Busy` if there is another drill; those of the file system.
    pub(super) fn make(store: &Store, kms: Option<Uuid>, has_copy: bool) -> Result<Self> {
        let home = Root::config_dir()?;
        create_dir_durable(&home)?;
        create_dir_durable(store.root().path())?;
        let busy = || Error::new(Kind::Busy, "another drill is under way");
        let lock = lock_file(&home.join("drill.lock"), busy)?;
        for folder in [&home, store.root().path()] {
            clear(folder);
        }
        let name = format!("{NAME}{}", Uuid::new_v4().simple());
        let scratch =
            Scratch { root: store.root().path().join(&name), config: home.join(&name), _lock: lock };
        create_dir_durable(&scratch.root)?;
        create_dir_durable(&scratch.config)?;
        for name in ["sealblk.toml", "store-users"] {
            match files::read(&home.join(name), MAX) {
                Ok(bytes) => files::create_file(&scratch.config.join(name), &bytes)?,
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e).context(|| format!("read {name}")),
            }
        }
        if let Some(kms) = kms.filter(|_| !has_copy) {
            let (from, to) = (root_key::path(&home, kms), root_key::path(&scratch.config, kms));
            // Another name of the same file: the key lies nowhere else than before.
            match std::fs::hard_link(&from, &to) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(e).context(|| format!("link {}", from.display()));
                }
                _ => {}
            }
        }
        Ok(scratch)
    }

    /// Where the steps are done.
    pub(super) fn site(&self) -> Site {
        Site { root: Root::new(&self.root), config: Some(self.config.clone()) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for folder in [&self.root, &self.config] {
            remove(folder);
        }
    }
}

/// Removes what drills have left in a folder that were killed; there is no other one now.
fn clear(folder: &Path) {
    for name in files::names_if_there(folder).unwrap_or_default() {
        let is_ours = |it: &str| it.strip_prefix(NAME).is_some_and(|id| id.parse::<Uuid>().is_ok());
        if name.to_str().is_some_and(is_ours) {
            remove(&folder.join(name));
        }
    }
}

fn remove(folder: &Path) {
    // It follows no link.
    if let Err(e) = std::fs::remove_dir_all(folder) {
        log::warn!("{} is left: {e}; the next drill removes it", folder.display());
    }
}
