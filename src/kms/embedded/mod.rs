//! The embedded KMS: keys, aliases and data keys in a folder of the store's, with AWS KMS's rules and words.
//!
//! It knows nothing of volumes but an encryption context, and no network. Any number of processes use one store at
//! once; each operation sees every change that was answered before it began. docs/kms-store.md describes the
//! files byte by byte.

pub mod admin;
pub mod anchor;
pub mod audit;
pub mod blob;
pub mod clock;
pub mod data;
mod deletion;
mod due;
pub mod grant_records;
pub mod grants;
pub mod import;
mod kbkdf;
pub mod keys;
mod lock;
pub mod log;
mod open_log;
pub mod page;
mod plain;
pub mod principals;
pub mod records;
pub mod root_key;
pub mod rotation;
mod state;
mod store;
pub mod tags;

use super::KmsError;
use super::key_ref::Locality;
use crate::config::Settings;
use crate::observe::audit::AuditLog;
use crate::root::Root;
use clock::{Clock, SystemClock};
use open_log::OpenLog;
use std::path::PathBuf;
use store::Store;

/// A KMS in a folder.
pub struct Embedded {
    store: Store,
    place: Locality,
    audit: AuditLog,
    /// Whether whoever calls writes the audit record of the call himself, since he knows more of it.
    caller_records: bool,
}

impl Embedded {
    /// The KMS of the store at `root`, in the region and account of its settings. The first key makes its folder, and its root key in [`Root::config_dir`].
    ///
    /// Keys whose waiting window is over are deleted now; if that cannot be done, it is logged and left to the next.
    pub fn open(root: &Root) -> Result<Self, KmsError> {
        let config = Root::config_dir().map_err(|e| KmsError::Internal(e.to_string()))?;
        let settings = Settings::load(root).map_err(|e| KmsError::Validation(e.to_string()))?;
        let place = Locality { region: settings.region, account: settings.account };
        Ok(Self::in_place(root.kms(), config, Box::new(SystemClock), place))
    }

    /// The KMS in the folder `dir`, with its root key in `config`, which must not lie with the data. Its audit log lies
    /// beside `dir`.
    pub fn at(dir: PathBuf, config: PathBuf, clock: Box<dyn Clock>) -> Self {
        Self::in_place(dir, config, clock, Locality::default())
    }

    fn in_place(dir: PathBuf, config: PathBuf, clock: Box<dyn Clock>, place: Locality) -> Self {
        let audit = AuditLog::at(dir.parent().unwrap_or(&dir), &config);
        let store = Store::new(dir, config, clock);
        let kms = Embedded { store, place, audit, caller_records: false };
        if let Err(e) = kms.purge() {
            ::log::warn!(
                "keys that may be due for deletion in {} were not looked at: {e}",
                kms.store.dir().display()
            );
        }
        kms
    }

    /// The region and account of its ARNs.
    pub fn locality(&self) -> &Locality {
        &self.place
    }

    /// Asks the store, after what the passing of time asks for has been done.
    ///
    /// Where that cannot be written down (a read-only disk), the answer is still the one of now: what must not
    /// be used any more is refused by its state.
    fn current<T>(&self, f: impl Fn(&OpenLog) -> Result<T, KmsError>) -> Result<T, KmsError> {
        let now = self.store.now();
        let answer =
            self.store.read(|log| if due::is_due(log, &now) { Ok(None) } else { f(log).map(Some) })?;
        if let Some(answer) = answer {
            return Ok(answer);
        }
        if let Err(e) = self.purge() {
            ::log::warn!("what is due in {} could not be done: {e}", self.store.dir().display());
        }
        self.store.read(f)
    }
}
