//! The log of one embedded KMS, which any number of processes share: who may read or change it when, and
//! what makes a change durable.
//!
//! A change is answered only after its record is on disk and the anchor names it. docs/kms-store.md
//! argues each crash point.

use crate::base::hardened::Hardened;
use crate::base::root::{create_dir_durable, files, replace_file, sync_dir};
use crate::crypt::secret_mem::on_scrubbed_stack;
use crate::kms::KmsError;
use crate::kms::embedded::clock::{Clock, Moment};
use crate::kms::embedded::lock::Lock;
use crate::kms::embedded::log::{Header, Position};
use crate::kms::embedded::open_log::OpenLog;
use crate::kms::embedded::plain::failed;
use crate::kms::embedded::records::{Change, Transaction};
use crate::kms::embedded::root_key;
use crate::kms::embedded::root_key::passphrase::Passphrase;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// The log's name in its folder.
pub(super) const FILE: &str = "log";

/// The log of one embedded KMS, in its folder; any number of processes may have it open.
pub(super) struct SharedLog {
    dir: PathBuf,
    config: PathBuf,
    clock: Box<dyn Clock>,
    hardened: Hardened,
    /// The log as it was last read, so that only what was appended since must be read.
    cached: Mutex<Option<OpenLog>>,
}

/// When a change is made.
pub(super) struct Now {
    /// By the machine's clocks.
    pub moment: Moment,
    /// The time of its record, milliseconds since 1970: never before the record that precedes it.
    pub time: i64,
}

impl SharedLog {
    /// The log in the folder `dir`, with root key and anchor in `config`. Touches nothing yet.
    pub(super) fn new(dir: PathBuf, config: PathBuf, clock: Box<dyn Clock>, hardened: Hardened) -> Self {
        SharedLog { dir, config, clock, hardened, cached: Mutex::new(None) }
    }

    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether there is a log in the folder.
    pub(super) fn exists(&self) -> Result<bool, KmsError> {
        let path = self.log_path();
        path.try_exists().map_err(|e| failed("look for the KMS store", &path, &e))
    }

    /// The moment by the store's clock.
    pub(super) fn now(&self) -> Moment {
        self.clock.now()
    }

    /// Whether a passphrase, or the root key itself, is needed before the store can be read.
    pub(super) fn is_out_of_reach(&self) -> bool {
        self.cached().is_none()
            && OpenLog::id_at(&self.log_path())
                .is_some_and(|store| root_key::is_out_of_reach(&self.config, store))
    }

    /// Asks the store: `f` sees every change that was answered before this call, and none is made meanwhile.
    pub(super) fn read<T>(&self, f: impl FnOnce(&OpenLog) -> Result<T, KmsError>) -> Result<T, KmsError> {
        on_scrubbed_stack(|| {
            let mut cached = self.cached();
            let _lock = Lock::shared(&self.lock_path())?.ok_or_else(|| self.absent())?;
            f(self.refresh(&mut cached)?.0)
        })
    }

    /// Changes the store: `f` sees its state, while nobody else uses it, and returns what
    /// changes. Durable when this returns. After an error nothing has changed, or the change was
    /// made and could not be answered.
    pub(super) fn write<T>(
        &self,
        f: impl FnOnce(&OpenLog, &Now) -> Result<(Vec<Change>, T), KmsError>,
    ) -> Result<T, KmsError> {
        on_scrubbed_stack(|| self.change(f))
    }

    fn change<T>(
        &self,
        f: impl FnOnce(&OpenLog, &Now) -> Result<(Vec<Change>, T), KmsError>,
    ) -> Result<T, KmsError> {
        let mut cached = self.cached();
        if !self.exists()? {
            return Err(self.absent());
        }
        let _lock = Lock::exclusive(&self.lock_path())?;
        let (log, ahead) = self.refresh(&mut cached)?;
        log.cut_torn_end()?;
        if ahead {
            log.anchor(&self.config)?;
        }
        let moment = self.clock.now();
        let now = Now { time: moment.wall.max(log.state().time()), moment };
        let (changes, answer) = f(log, &now)?;
        let outcome = if changes.is_empty() {
            Ok(())
        } else {
            log.append(Transaction { time: now.time, changes }).and_then(|()| {
                log.anchor(&self.config).map_err(|e| {
                    KmsError::Internal(format!(
                        "the change was made, but not recorded as answered; look again: {e}"
                    ))
                })
            })
        };
        if log.wants_rewriting()
            && outcome.is_ok()
            && let Err(e) = self.rewrite(&mut cached)
        {
            log::warn!("the KMS store could not be compacted, the next change will try again: {e}");
        }
        if outcome.is_err() {
            *cached = None;
        }
        outcome.map(|()| answer)
    }

    /// Makes the store, with a new root key, if there is none.
    pub(super) fn create_if_absent(&self) -> Result<(), KmsError> {
        self.create(None).map(drop)
    }

    /// Makes the store, if there is none, with a new root key under a passphrase. Returns
    /// whether there was none.
    pub(super) fn create(&self, passphrase: Option<&Passphrase>) -> Result<bool, KmsError> {
        if self.exists()? {
            return Ok(false);
        }
        create_dir_durable(&self.dir).map_err(internal)?;
        let _lock = Lock::exclusive(&self.lock_path())?;
        if self.exists()? {
            return Ok(false);
        }
        let header = Header { store: Uuid::new_v4(), base: Position { seq: 0, chain: [0; 32] } };
        // The root key first: a root key without a store is litter, a store without its root key is lost.
        let first = on_scrubbed_stack(|| {
            let root = root_key::create(&self.config, header.store, passphrase, self.hardened)?;
            OpenLog::first_bytes(&header, &root)
        })?;
        root_key::named::note(&self.config, header.store, &self.dir);
        replace_file(&self.log_path(), &first).map_err(internal)?;
        log::warn!(
            "made a KMS for this store, in {}. Its root key is {}: without that file nobody can ever read \
             what is encrypted here. Keep a copy elsewhere; \"sealblk kms backup FILE\" makes one under a \
             passphrase",
            self.dir.display(),
            root_key::path(&self.config, header.store).display()
        );
        Ok(true)
    }

    /// The log's bytes, of at most `max`, as they are between two changes; none if there is no log. It takes
    /// no root key: what they are worth shows when they are opened.
    pub(super) fn bytes(&self, max: u64) -> Result<Option<Vec<u8>>, KmsError> {
        let Some(_lock) = Lock::shared(&self.lock_path())? else { return Ok(None) };
        if !self.exists()? {
            return Ok(None);
        }
        let path = self.log_path();
        files::read(&path, max).map(Some).map_err(|e| failed("read the KMS store", &path, &e))
    }

    /// Makes the store out of the log of another time, `bytes`, where there is none.
    pub(super) fn put_back(&self, bytes: &[u8]) -> Result<(), KmsError> {
        create_dir_durable(&self.dir).map_err(internal)?;
        let _lock = Lock::exclusive(&self.lock_path())?;
        if self.exists()? {
            let message = format!("there is a KMS store in {} already", self.dir.display());
            return Err(KmsError::AlreadyExists(message));
        }
        replace_file(&self.log_path(), bytes).map_err(internal)
    }

    /// Takes back what [`SharedLog::put_back`] has made.
    pub(super) fn take_back(&self) -> Result<(), KmsError> {
        let _lock = Lock::exclusive(&self.lock_path())?;
        *self.cached() = None;
        let path = self.log_path();
        files::remove_if_there(&path).map_err(|e| failed("remove", &path, &e))?;
        sync_dir(&self.dir).map_err(internal)
    }

    /// The store's id, if there is one and its header can be read; nothing vouches for it.
    pub(super) fn id(&self) -> Option<Uuid> {
        OpenLog::id_at(&self.log_path())
    }

    /// Where root key and anchor lie.
    pub(super) fn config(&self) -> &Path {
        &self.config
    }

    /// For whoever may see keys.
    pub(super) fn hardened(&self) -> Hardened {
        self.hardened
    }

    /// Has the root key kept so from now on; returns where it lies. The store stays as it is.
    pub(super) fn protect_root_key(&self, kept: root_key::Kept<'_>) -> Result<PathBuf, KmsError> {
        let mut cached = self.cached();
        if !self.exists()? {
            return Err(self.absent());
        }
        let _lock = Lock::exclusive(&self.lock_path())?;
        on_scrubbed_stack(|| {
            // Opened with the root key that there is, which is therefore the right one.
            let store = self.refresh(&mut cached)?.0.id();
            root_key::protect(&self.config, store, kept, self.hardened)?;
            Ok(root_key::path(&self.config, store))
        })
    }

    /// The log, up to date and checked against the anchor, and whether it is ahead of the anchor.
    fn refresh<'a>(&self, cached: &'a mut Option<OpenLog>) -> Result<(&'a mut OpenLog, bool), KmsError> {
        let log = match cached.take() {
            Some(mut log) if log.is_current() => {
                log.catch_up()?;
                log
            }
            _ => {
                OpenLog::load(&self.log_path(), &self.config, self.hardened)?.ok_or_else(|| self.absent())?
            }
        };
        let ahead = log.is_ahead_of_anchor(&self.config)?;
        if ahead {
            // Written by somebody who was killed before it was durable. Nothing may build on what a power cut
            // could take back: a data key wrapped under a key that then never existed.
            log.sync()?;
            sync_dir(&self.dir).map_err(internal)?;
        }
        Ok((cached.insert(log), ahead))
    }

    /// Replaces the log by one with only what lives. Needs the exclusive lock.
    fn rewrite(&self, cached: &mut Option<OpenLog>) -> Result<(), KmsError> {
        let bytes = cached.take().ok_or_else(|| self.absent())?.rewritten()?;
        self.remove_leftovers()?;
        replace_file(&self.log_path(), &bytes).map_err(internal)?;
        self.refresh(cached)?.0.anchor(&self.config)
    }

    /// Removes what a rewriting that was killed has left, since it may hold material that is to be deleted.
    fn remove_leftovers(&self) -> Result<(), KmsError> {
        let fail = |e: std::io::Error| failed("tidy", &self.dir, &e);
        for entry in files::names(&self.dir).map_err(fail)? {
            let path = self.dir.join(entry);
            if path.extension().is_some_and(|e| e == "tmp") {
                files::remove(&path).map_err(|e| failed("remove", &path, &e))?;
            }
        }
        Ok(())
    }

    fn cached(&self) -> MutexGuard<'_, Option<OpenLog>> {
        self.cached.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
            // A thread panicked half-way: what it has read is not to be trusted, the file is.
            let mut guard = poisoned.into_inner();
            *guard = None;
            guard
        })
    }

    pub(super) fn absent(&self) -> KmsError {
        KmsError::NotFound(format!(
            "there is no KMS store in {}: the first key makes one; if there was one, restore the folder from \
             a backup",
            self.dir.display()
        ))
    }

    /// Waits until nobody else tells another region of this key.
    pub(super) fn telling_of(&self, key: Uuid) -> Result<Lock, KmsError> {
        Lock::telling_of(&self.lock_path(), key)
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join(FILE)
    }

    fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }
}

fn internal(e: crate::base::Error) -> KmsError {
    KmsError::Internal(e.to_string())
}
