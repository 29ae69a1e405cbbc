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
mod hsm_keys;
pub mod import;
mod kbkdf;
pub mod key_stores;
pub mod keys;
mod lock;
pub mod log;
pub mod multi_region;
mod open_log;
pub mod page;
mod plain;
pub mod principals;
pub mod records;
pub mod root_key;
pub mod rotation;
mod shared_log;
mod state;
pub mod synchronization;
pub mod tags;

use crate::audit::AuditLog;
use crate::base::Timestamp;
use crate::base::hardened::Hardened;
use crate::base::root::{Root, files};
use crate::config::Settings;
use crate::crypt::secret_mem::on_scrubbed_stack;
use crate::hsm::{Pin, Place};
use crate::kms::KmsError;
use crate::kms::key_ref::Locality;
use crate::kms::patience::Patience;
use clock::{Clock, SystemClock};
use hsm_keys::{Tokens, Waiting};
use open_log::OpenLog;
use root_key::passphrase::Passphrase;
use shared_log::SharedLog;
use std::path::PathBuf;
use uuid::Uuid;

/// A KMS in a folder.
pub struct Embedded {
    root: Root,
    log: SharedLog,
    /// Those that this process has sessions with.
    tokens: Tokens,
    waiting: Waiting,
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
        kms.waiting = Waiting::of(Patience(settings.kms_patience));
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

    /// As [`Embedded::at`], in the region and account of `place`.
    pub fn in_place(
        dir: PathBuf,
        config: PathBuf,
        clock: Box<dyn Clock>,
        place: Locality,
        hardened: Hardened,
    ) -> Self {
        let audit = AuditLog::at(dir.parent().unwrap_or(&dir), &config);
        let root = Root::new(dir.parent().unwrap_or(&dir));
        let log = SharedLog::new(dir, config, clock, hardened);
        let (tokens, waiting) = (Tokens::default(), Waiting::default().once());
        let kms = Embedded { root, log, tokens, waiting, place, audit, caller_records: false, grantee: None };
        // Nobody is asked for a passphrase before anything is wanted; then it is done as well. Where the root
        // key is missing, whoever wants anything is told.
        if kms.log.is_out_of_reach() {
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

    /// This KMS, with another patience for its HSMs than that of the settings, if one is given.
    pub(in crate::kms) fn patient(self, patience: Option<Patience>) -> Self {
        Embedded { waiting: patience.map_or(self.waiting, Waiting::of), ..self }
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
        self.log.protect_root_key(passphrase.map_or(root_key::Kept::Plain, root_key::Kept::Under))
    }

    /// Has the token there wrap the root key; returns where its file lies, which is of no use without the
    /// token from now on. Nothing that it opens changes.
    pub fn wrap_root_key(&self, place: Place, pin: Pin) -> Result<PathBuf, KmsError> {
        self.log.protect_root_key(root_key::Kept::InHsm(place, pin))
    }

    /// Whether the store at `root` has such a KMS.
    pub fn is_at(root: &Root) -> bool {
        files::exists(&root.kms().join(shared_log::FILE))
    }

    /// Whether the root key of the store at `root` is where it should be, for a process that does not read
    /// it; none where there is no such KMS.
    ///
    /// # Errors
    /// `Corrupt` if its header cannot be read; those of the file system.
    pub fn has_root_key(root: &Root, hardened: Hardened) -> Result<Option<bool>, KmsError> {
        if !Self::is_at(root) {
            return Ok(None);
        }
        let config = Root::config_dir().map_err(|e| KmsError::Internal(e.to_string()))?;
        let log = SharedLog::new(root.kms(), config.clone(), Box::new(SystemClock), hardened);
        let damaged = || KmsError::Corrupt(format!("the log in {} is damaged", log.dir().display()));
        root_key::is_there(&config, log.id().ok_or_else(damaged)?).map(Some)
    }

    /// The id that the KMS of the store at `root` has, if there is one; nothing vouches for it.
    pub fn store_id_at(root: &Root) -> Option<Uuid> {
        OpenLog::id_at(&root.kms().join(shared_log::FILE))
    }

    /// The store's id, and where its root key is. Nobody is asked for a passphrase.
    ///
    /// # Errors
    /// `NotFound` if there is no store; `Corrupt` if its header cannot be read.
    pub fn root_key_place(&self) -> Result<(Uuid, root_key::Place), KmsError> {
        let store = self.id()?;
        Ok((store, root_key::place(self.log.config(), store)?))
    }

    /// The root key, which is proved to open this store, as a copy under a passphrase: two lines of text.
    pub fn back_up_root_key(&self, passphrase: &Passphrase) -> Result<String, KmsError> {
        self.unlock()?;
        let store = self.id()?;
        on_scrubbed_stack(|| root_key::backup(self.log.config(), store, passphrase, self.log.hardened()))
    }

    /// Puts a copy of the root key, which is missing, in its place, once it is proved to open this store;
    /// returns the file. It stays under the copy's passphrase.
    ///
    /// # Errors
    /// `Validation` for what is no copy, or another store's; `AccessDenied` for a wrong passphrase;
    /// `AlreadyExists` if there is a root key.
    pub fn restore_root_key(&self, copy: &[u8]) -> Result<PathBuf, KmsError> {
        let store = self.id()?;
        let restore = || root_key::restore(self.log.config(), store, copy, self.log.hardened());
        let path = on_scrubbed_stack(restore)?;
        // A store whose header names another one's id could have led here.
        self.unlock().inspect_err(|_| {
            let _ = std::fs::remove_file(&path);
        })?;
        Ok(path)
    }

    /// Notes that a copy of the root key was made and given to somebody, for [`Embedded::root_key_copied`].
    ///
    /// # Errors
    /// Those of the file system.
    pub fn note_root_key_copied(&self) -> Result<(), KmsError> {
        let noted = root_key::named::note_copied(self.log.config(), self.id()?);
        noted.map_err(|e| KmsError::Internal(e.to_string()))
    }

    /// When a copy of the root key of the KMS `store` was made last, as far as this host knows.
    ///
    /// # Errors
    /// Where nothing says where the configuration folder is.
    pub fn root_key_copied(store: Uuid) -> Result<Option<Timestamp>, crate::Error> {
        Ok(root_key::named::copied(&Root::config_dir()?, store))
    }

    /// The log of the KMS of the store at `root`, of at most `max` bytes, to be kept elsewhere; none if there
    /// is no such KMS. What it says of keys' names can be read; keys cannot, without the root key.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn copy_of_log(root: &Root, max: u64, hardened: Hardened) -> Result<Option<Vec<u8>>, KmsError> {
        let config = Root::config_dir().map_err(|e| KmsError::Internal(e.to_string()))?;
        SharedLog::new(root.kms(), config, Box::new(SystemClock), hardened).bytes(max)
    }

    /// Makes the KMS `store` of the store at `root` out of a copy of its log, where there is none. Its root
    /// key is in its place, or comes out of `root_key`, a copy that [`Embedded::back_up_root_key`] made.
    /// Nothing is left of it if the two do not go together.
    ///
    /// # Errors
    /// `AlreadyExists` if there is a KMS; `NotFound` if there is no root key for it; `Corrupt` for a log that
    /// is none, or whose root key is another one; `AccessDenied` for a wrong passphrase.
    pub fn put_back(
        root: &Root,
        store: Uuid,
        log: &[u8],
        root_key: Option<&[u8]>,
        hardened: Hardened,
    ) -> Result<(), KmsError> {
        let config = Root::config_dir().map_err(|e| KmsError::Internal(e.to_string()))?;
        let found = log::Header::parse(log)?.store;
        if found != store {
            let message = format!("what is said to be the log of the KMS {store} is that of {found}");
            return Err(KmsError::Corrupt(message));
        }
        if root_key.is_none() && !root_key::is_there(&config, store)? {
            let message = format!(
                "the root key of the KMS {store} is not here: put {} back (mode 0600), or name a copy that \
                 \"sealblk kms backup\" has made",
                root_key::path(&config, store).display()
            );
            return Err(KmsError::NotFound(message));
        }
        let kms = Self::in_place(root.kms(), config, Box::new(SystemClock), Locality::default(), hardened);
        kms.log.put_back(log)?;
        let opened = match root_key {
            Some(copy) => kms.restore_root_key(copy).map(drop),
            None => kms.unlock(),
        };
        if let Err(e) = opened {
            if let Err(left) = kms.log.take_back() {
                ::log::warn!("{left}");
            }
            return Err(e);
        }
        Ok(())
    }

    fn id(&self) -> Result<Uuid, KmsError> {
        if !self.log.exists()? {
            return Err(self.log.absent());
        }
        let damaged = || KmsError::Corrupt(format!("the log in {} is damaged", self.log.dir().display()));
        self.log.id().ok_or_else(damaged)
    }

    /// The store's folder.
    #[cfg(feature = "kms-server")]
    pub(in crate::kms) fn root(&self) -> &Root {
        &self.root
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
        let answer = self.log.read(|log| {
            if due::is_due(log, &now, &self.place.region) { Ok(None) } else { f(log).map(Some) }
        })?;
        if let Some(answer) = answer {
            return Ok(answer);
        }
        if let Err(e) = self.purge() {
            ::log::warn!("what is due in {} could not be done: {e}", self.log.dir().display());
        }
        self.log.read(f)
    }
}
