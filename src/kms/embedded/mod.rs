//! The embedded KMS: keys, aliases and data keys in a folder of the store's, with AWS KMS's rules and words.
//!
//! It knows nothing of volumes but an encryption context, and no network. Any number of processes use one
//! store at once; each operation sees every change that was answered before it began. docs/kms-store.md
//! describes the files byte by byte.

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
mod shared_log;
mod state;
pub mod tags;

use crate::audit::AuditLog;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::config::Settings;
use crate::kms::KmsError;
use crate::kms::key_ref::Locality;
use clock::{Clock, SystemClock};
use open_log::OpenLog;
use root_key::passphrase::Passphrase;
use shared_log::SharedLog;
use std::path::PathBuf;

/// A KMS in a folder.
pub struct Embedded {
    log: SharedLog,
    place: Locality,
    audit: AuditLog,
    /// Whether the caller writes the audit record of a call by itself, since it knows more of the call.
    caller_records: bool,
    /// The principal whose grants attaches make, if they make any.
    grantee: Option<String>,
}

impl Embedded {
    /// The KMS of the store at `root`, in the region and account of its settings. The first key makes its
    /// folder, and its root key in [`Root::config_dir`].
    ///
    /// Keys whose waiting window is over are deleted now; if that cannot be done, it is
    /// logged and left to the next.
    pub fn open(root: &Root, hardened: Hardened) -> Result<Self, KmsError> {
        let config = Root::config_dir().map_err(|e| KmsError::Internal(e.to_string()))?;
        let settings = Settings::load(root).map_err(|e| KmsError::Validation(e.to_string()))?;
        let place = settings.locality;
        let mut kms = Self::in_place(root.kms(), config, Box::new(SystemClock), place, hardened);
        // Another account's is for keys of AWS KMS.
        kms.grantee =
            settings.grantee_principal.filter(|arn| arn.split(':').nth(4) == Some(&kms.place.account));
        Ok(kms)
    }

    /// The KMS in the folder `dir`, with its root key in `config`, which must not lie with the data. Its
    /// audit log lies beside `dir`.
    pub fn at(dir: PathBuf, config: PathBuf, clock: Box<dyn Clock>, hardened: Hardened) -> Self {
        Self::in_place(dir, config, clock, Locality::default(), hardened)
    }

    fn in_place(
        dir: PathBuf,
        config: PathBuf,
        clock: Box<dyn Clock>,
        place: Locality,
        hardened: Hardened,
    ) -> Self {
        let audit = AuditLog::at(dir.parent().unwrap_or(&dir), &config);
        let log = SharedLog::new(dir, config, clock, hardened);
        let kms = Embedded { log, place, audit, caller_records: false, grantee: None };
        // Nobody is asked for a passphrase before anything is wanted; then it is done as well.
        if kms.log.asks_for_passphrase() {
            return kms;
        }
        if let Err(e) = kms.purge() {
            ::log::warn!(
                "keys that may be due for deletion in {} were not looked at: {e}",
                kms.log.dir().display()
            );
        }
        kms
    }

    /// Makes the store now, with its root key under a passphrase if there is one. The
    /// first key makes it otherwise.
    ///
    /// # Errors
    /// `AlreadyExists` if there is one.
    pub fn init(&self, passphrase: Option<&Passphrase>) -> Result<(), KmsError> {
        match self.log.create(passphrase)? {
            true => Ok(()),
            false => Err(KmsError::AlreadyExists(format!(
                "there is a KMS store in {} already; \"sealblk kms passphrase\" changes how its root key is \
                 kept",
                self.log.dir().display()
            ))),
        }
    }

    /// Opens the store, if there is one, so that whoever has to give a passphrase is asked now.
    pub fn unlock(&self) -> Result<(), KmsError> {
        if self.log.exists()? { self.log.read(|_| Ok(())) } else { Ok(()) }
    }

    /// Puts the root key under another passphrase, or under none; returns where it lies.
    /// Nothing that it opens changes.
    pub fn protect_root_key(&self, passphrase: Option<&Passphrase>) -> Result<PathBuf, KmsError> {
        self.log.protect_root_key(passphrase)
    }

    /// The region and account of its ARNs.
    pub fn locality(&self) -> &Locality {
        &self.place
    }

    /// Asks the store, after what the passing of time asks for has been done.
    ///
    /// Where that cannot be written down (a read-only disk), the answer is still the one of now: what must
    /// not be used any more is refused by its state.
    fn current<T>(&self, f: impl Fn(&OpenLog) -> Result<T, KmsError>) -> Result<T, KmsError> {
        let now = self.log.now();
        let answer = self.log.read(|log| if due::is_due(log, &now) { Ok(None) } else { f(log).map(Some) })?;
        if let Some(answer) = answer {
            return Ok(answer);
        }
        if let Err(e) = self.purge() {
            ::log::warn!("what is due in {} could not be done: {e}", self.log.dir().display());
        }
        self.log.read(f)
    }
}
