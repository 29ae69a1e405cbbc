//! The key of a store's ledger: made with the first record, and, of a store in a pool, the same on all hosts.
#![forbid(unsafe_code)]

use super::{Ledger, MAX_SMALL, entry};
use crate::base::root::{create_dir_durable, files, replace_file};
use crate::base::{Context, Error, Kind, Result};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use zeroize::Zeroizing;

pub(super) type Key = Zeroizing<[u8; entry::KEY_LEN]>;

impl Ledger {
    /// Whether this host has made a record in this store, or has accepted one.
    pub(crate) fn knows_the_store(&self) -> Result<bool> {
        Ok(self.key()?.is_some())
    }

    /// Makes the store's key; one that is there stays.
    pub(crate) fn begin(&self) -> Result<()> {
        let config = self.config()?;
        create_dir_durable(&config.join("marks"))?;
        replace_file(&config.join("root"), self.root.as_os_str().as_bytes())?;
        let mut key: Key = Zeroizing::new([0; entry::KEY_LEN]);
        getrandom::fill(&mut *key).map_err(|e| Error::new(Kind::Other, format!("get random bytes: {e}")))?;
        let path = config.join("key");
        let is_there = files::exists(&path);
        if !is_there && self.pool().is_some() && files::exists(&self.check_path()) {
            return Err(self.lacks_key());
        }
        let made = if is_there { Ok(()) } else { files::create_file(&path, &*key) };
        match self.key()? {
            Some(key) => self.check_key(&key).inspect_err(|_| {
                if !is_there {
                    // Another host was first.
                    let _ = files::remove(&path);
                }
            }),
            // The first error is why.
            None => made,
        }
    }

    /// Looks whether this key is the one that all hosts of a store in a pool have; the first host says so.
    ///
    /// # Errors
    /// `Corrupt` if it is another store's; those of the pool.
    fn check_key(&self, key: &Key) -> Result<()> {
        let Some(pooled) = self.pool() else { return Ok(()) };
        let ours = entry::signed(b"{\"format\":1}".to_vec(), "store", key);
        let path = self.check_path();
        let made = match files::exists(&path) {
            true => Ok(()),
            false => files::create_file(&path, &ours),
        };
        let attempt = || format!("read {}", path.display());
        match files::read(&path, MAX_SMALL) {
            Ok(there) if there == ours => Ok(()),
            Ok(_) => {
                let message = format!(
                    "{} is not the key of the store in {}: bring the one of a host that uses the store",
                    self.config()?.join("key").display(),
                    pooled.shown
                );
                Err(Error::new(Kind::Corrupt, message))
            }
            Err(e) if e.kind() == ErrorKind::NotFound => made,
            Err(e) => Err(e).context(attempt),
        }
    }

    /// What tells, in a pool, whether a host has the store's key.
    fn check_path(&self) -> PathBuf {
        self.root.join("store").join("key.json")
    }

    /// Why nothing is believed in a store in a pool whose key this host has not got.
    pub(super) fn lacks_key(&self) -> Error {
        let (store, key) =
            (self.pool().map_or("", |it| &it.shown), self.config.as_ref().map(|it| it.join("key")));
        let message = format!(
            "this host has no key of the store in {store}, so that it can believe nothing there: bring {} \
             from a host that uses the store, as a secret (docs/ceph.md)",
            key.unwrap_or_default().display()
        );
        Error::new(Kind::Corrupt, message)
    }

    /// The store's key; none in a store that this host does not know.
    pub(super) fn key(&self) -> Result<Option<Key>> {
        let path = self.config()?.join("key");
        let attempt = || format!("read the store's key {}", path.display());
        let bytes = match files::read(&path, MAX_SMALL) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            bytes => Zeroizing::new(bytes.context(attempt)?),
        };
        let key = bytes.as_slice().try_into().map(Zeroizing::new);
        let damaged = |_| Error::new(Kind::Corrupt, "it is damaged; put it back from a backup");
        key.map(Some).map_err(damaged).context(attempt)
    }

    pub(super) fn known_key(&self) -> Result<Key> {
        let unknown = || Error::new(Kind::Corrupt, "this host does not know the store");
        self.key()?.ok_or_else(unknown)
    }
}
