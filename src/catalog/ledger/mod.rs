//! The ledger of a store: which states of its records the commands of this host have made.
//!
//! The records of volumes and snapshots lie with the ciphertext, and a volume's record is written by its host
//! process while the volume is attached. Both are claims: whoever can write the disk, or breaks into a host
//! process, can claim another name, another size, no encryption, another tenant's layers, or put an old
//! record back. So each record has an entry in the ledger, `ledger/<id>.json` in the store, which says what
//! the record may say. An entry is written by commands alone, carries a MAC under the store's key, and is
//! numbered. The key, and for each entry its highest number so far (its *mark*), lie beside the root key, in
//! the configuration folder: whoever can write the store has neither.
//!
//! | file | |
//! |---|---|
//! | `<store>/ledger/<id>.json` | the entry: one line of JSON, and a line with its MAC |
//! | `<config>/stores/<store>/key` | 32 random bytes, made with the first record of the store |
//! | `<config>/stores/<store>/root` | the store's path, of which `<store>` is a digest |
//! | `<config>/stores/<store>/marks/<id>` | the number of the entry, 20 digits; locked while an entry is changed |
//!
//! A change is noted before it is made: the entry lists the state that is there and the one that
//! comes, the record is replaced, the entry lists the new one alone. So a power cut at any moment
//! leaves a record that the entry lists. The entry is written before its mark: a mark is behind by one
//! change at most, and never ahead.
//!
//! A store in a pool has one key, which all of its hosts have; `<store>/store/key.json` there tells a host
//! whether it has the right one. What another host has entered has no mark here before this host has seen it.
//! So what is put back from before is noticed by those hosts that have seen what came later.

mod change;
pub mod entry;
mod facts;
mod key;
mod marks;
mod stores;
#[cfg(test)]
mod tests;

pub(crate) use change::Change;
pub(crate) use facts::{SnapshotFacts, VolumeFacts};
pub use stores::{forget_store, is_of_pool, stores};

use crate::base::root::records::{Pooled, pool_of};
use crate::base::root::{Root, create_dir_durable, files, sync_dir};
use crate::base::{Context, Error, Kind, Result, locks};
use crate::catalog::lock::pool::await_claim;
use entry::Entry;
use key::Key;
use marks::{read_mark, write_mark};
use nix::fcntl::OFlag;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use stores::folder_name;

/// Longer entries are refused unread, in bytes: a few states of the longest record that there is.
const MAX_LEN: u64 = 64 << 20;
/// More than a key, a mark or a path has, in bytes.
const MAX_SMALL: u64 = 8 << 10;

/// What an entry says of a record.
pub(crate) trait Facts: Sized + PartialEq {
    /// As it stands in an entry.
    type Written: Serialize + DeserializeOwned;

    /// As it stands in an entry.
    fn to_written(&self) -> Self::Written;

    /// What an entry of this id says.
    ///
    /// # Errors
    /// A sentence, for what does not fit together.
    fn from_written(written: Self::Written, id: &str) -> Result<Self, String>;

    /// The format version of an entry that says this.
    fn format(&self) -> u32 {
        1
    }

    /// What is different in `found`, in words for the operator; none if `found` is this, or what may become
    /// of this without a command.
    fn difference(&self, found: &Self) -> Option<String>;
}

/// Why a record is not believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// This host has never made, nor accepted, a record of this id, or has deleted it since.
    Unknown,
    /// The entry is not one that commands of this host wrote.
    Forged,
    /// The entry is older than one that this host has seen.
    Older,
    /// The record says something else than the entry: what.
    Differs(String),
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doubt::Unknown => f.write_str(
                "this host does not know it: it is of another host or of an earlier version of sealblk, was \
                 deleted here, or somebody has put it there",
            ),
            Doubt::Forged => f.write_str(
                "its entry in the store's ledger is not one that this host has \
                 written",
            ),
            Doubt::Older => f.write_str("its entry in the store's ledger is an older one, put back"),
            Doubt::Differs(what) => f.write_str(what),
        }
    }
}

impl Doubt {
    /// The error of a command that needs the record of `id`.
    pub(crate) fn refuse(&self, id: &dyn fmt::Display) -> Error {
        let message = format!(
            "{id}: {self}; nothing is done with it. If it is as it should be (a backup that was restored, a \
             store that was brought here), \"sealblk store accept {id}\" says so"
        );
        Error::new(Kind::Corrupt, message)
    }
}

/// The ledger of one store, as a command of this host sees it. It holds no key: that is read when
/// it is needed, and wiped.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    /// The store's root folder.
    root: PathBuf,
    /// Where the entries lie, in the store.
    entries: PathBuf,
    /// Where the key and the marks lie, in the configuration folder; none where nothing says where that is.
    config: Option<PathBuf>,
}

impl Ledger {
    /// The ledger of the store at `root`, which need not exist yet.
    pub(crate) fn of(root: &Root) -> Self {
        let config = Root::config_dir().ok().map(|config| config.join("stores").join(folder_name(root)));
        Ledger { root: root.path().to_owned(), entries: root.ledger(), config }
    }

    /// The folder of this store in the configuration folder.
    ///
    /// # Errors
    /// `Usage` where nothing says where the configuration folder is.
    fn config(&self) -> Result<&Path> {
        match &self.config {
            Some(config) => Ok(config),
            None => Err(Error::new(
                Kind::Usage,
                "neither --config-dir, SEALBLK_CONFIG_DIR, XDG_CONFIG_HOME nor HOME is set",
            )),
        }
    }

    /// The pool that the store lies in, if it lies in one.
    fn pool(&self) -> Option<&'static Pooled> {
        pool_of(&self.root)
    }

    /// Opens the mark of a record. In a pool the record may be of another host, and no mark of it be here
    /// yet: then one is made, if `make` says so.
    fn open_mark(&self, id: &str, make: bool) -> Result<Option<File>> {
        let path = self.mark_path(id)?;
        let mut flags = OFlag::O_RDWR;
        if make && self.pool().is_some() {
            create_dir_durable(&self.config()?.join("marks"))?;
            flags |= OFlag::O_CREAT;
        }
        match files::open_with(&path, flags) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            mark => mark.map(Some).context(|| format!("open {}", path.display())),
        }
    }

    /// This host has seen an entry of this number, which another host has written: an older one is not
    /// believed here any more.
    fn note_seen(&self, id: &str, number: u64) -> Result<()> {
        let Some(mark) = self.open_mark(id, true)? else { return Ok(()) };
        // Whoever has it locked writes a higher number.
        if locks::try_lock(&mark, locks::Kind::Exclusive, locks::Bytes::ALL)? && read_mark(&mark)? < number {
            write_mark(&mark, number)?;
        }
        Ok(())
    }

    /// Enters a new record.
    ///
    /// # Errors
    /// `Busy` if there is an entry of this id already; `Corrupt` in a store that this host does not know.
    pub(crate) fn enter<F: Facts>(&self, id: &str, facts: F) -> Result<()> {
        if self.key()?.is_none() {
            if self.pool().is_some() {
                return Err(self.lacks_key());
            }
            let message = format!(
                "this host does not know the store {}, which has volumes or snapshots: they are of another \
                 host or of an earlier version of sealblk. If they are as they should be, \"sealblk store \
                 accept --all\" says so",
                self.root.display()
            );
            return Err(Error::new(Kind::Corrupt, message));
        }
        let path = self.mark_path(id)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        let mark = match files::open_with(&path, flags) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                return Err(Error::new(Kind::Busy, format!("{id} is in the store's ledger already")));
            }
            mark => mark.context(|| format!("make {}", path.display()))?,
        };
        create_dir_durable(&self.entries)?;
        let mut change = self.lock(id, mark)?;
        change.replace(vec![facts])?;
        sync_dir(&self.config()?.join("marks"))
    }

    /// Enters what is found, whatever there was: the operator says that it is right.
    pub(crate) fn accept<F: Facts>(&self, id: &str, facts: F) -> Result<()> {
        self.begin()?;
        create_dir_durable(&self.entries)?;
        let path = self.mark_path(id)?;
        let mark = files::open_with(&path, OFlag::O_RDWR | OFlag::O_CREAT)
            .context(|| format!("open {}", path.display()))?;
        // Before the entry: one without a mark is not believed.
        sync_dir(&self.config()?.join("marks"))?;
        let mut change = self.lock(id, mark)?;
        let entry = self.read_entry::<F>(id, &self.known_key()?)?.ok();
        change.number = read_mark(&change.mark)?.max(entry.map_or(0, |entry| entry.number));
        change.replace(vec![facts])
    }

    /// Begins to change the record of `id`: nobody else does until the answer is dropped.
    ///
    /// # Errors
    /// `Corrupt` for an entry that is not believed; `Busy` if another command is changing it for long.
    pub(crate) fn change<F: Facts>(&self, id: &str) -> Result<Change<'_, F>> {
        let mark = self.open_mark(id, true)?.ok_or_else(|| Doubt::Unknown.refuse(&id))?;
        let mut change = self.lock(id, mark)?;
        let entry = self.entry(id)?.map_err(|doubt| doubt.refuse(&id))?;
        (change.number, change.accepted) = (entry.number, entry.accepted);
        Ok(change)
    }

    /// Why a record of `id` that says `found` is not believed; none: it is.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn judge<F: Facts>(&self, id: &str, found: &F) -> Result<Option<Doubt>> {
        let entry = match self.entry::<F>(id)? {
            Ok(entry) => entry,
            Err(doubt) => return Ok(Some(doubt)),
        };
        let differences: Option<Vec<String>> =
            entry.accepted.iter().map(|accepted| accepted.difference(found)).collect();
        // None of them: one of the states is this one. The first is what the record was before any change.
        let what = |mut all: Vec<String>| if all.is_empty() { String::new() } else { all.swap_remove(0) };
        Ok(differences.map(|all| Doubt::Differs(what(all))))
    }

    /// What the record of `id` may say; none for an entry that is not believed.
    pub(crate) fn accepted<F: Facts>(&self, id: &str) -> Result<Option<Vec<F>>> {
        Ok(self.entry::<F>(id)?.ok().map(|entry| entry.accepted))
    }

    /// What commands have set as `id`, which no record beside the entry says; none if they never have.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn setting<F: Facts>(&self, id: &str) -> Result<Result<Option<F>, Doubt>> {
        match self.entry::<F>(id)? {
            Ok(mut entry) => Ok(Ok(entry.accepted.pop())),
            Err(Doubt::Unknown) if self.was_never_set(id)? => Ok(Ok(None)),
            Err(doubt) => Ok(Err(doubt)),
        }
    }

    /// Whether there is neither an entry of this id nor a mark. An empty mark is of the moment before the
    /// first entry.
    fn was_never_set(&self, id: &str) -> Result<bool> {
        let path = self.mark_path(id)?;
        let number = match files::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => 0,
            mark => read_mark(&mark.context(|| format!("open {}", path.display()))?)?,
        };
        Ok(number == 0 && !files::exists(&self.entry_path(id)))
    }

    /// What an entry says, whoever wrote it; none if there is no such thing.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn claim<F: Facts>(&self, id: &str) -> Result<Option<F>> {
        let path = self.entry_path(id);
        match files::read(&path, MAX_LEN) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            bytes => {
                let bytes = bytes.context(|| format!("read {}", path.display()))?;
                Ok(Entry::claim(&bytes, id).and_then(|mut entry| entry.accepted.pop()))
            }
        }
    }

    /// Takes the entry of a record out that is not there any more; without one, does nothing.
    pub(crate) fn forget(&self, id: &str) -> Result<()> {
        for path in [self.entry_path(id), self.mark_path(id)?] {
            files::remove_if_there(&path).context(|| format!("remove {}", path.display()))?;
        }
        Ok(())
    }

    /// The ids that have an entry or a mark, in no order.
    pub(crate) fn ids(&self) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        for name in files::names_if_there(&self.entries)? {
            ids.extend(name.to_str().and_then(|name| name.strip_suffix(".json")).map(str::to_owned));
        }
        for name in files::names_if_there(&self.config()?.join("marks"))? {
            ids.extend(name.to_str().map(str::to_owned));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Locks the entry of `id` by its mark. What it says is not known yet.
    fn lock<F: Facts>(&self, id: &str, mark: File) -> Result<Change<'_, F>> {
        let mut change =
            Change { ledger: self, id: id.to_owned(), claim: None, mark, number: 0, accepted: Vec::new() };
        change.take_lock()?;
        change.claim = await_claim(&self.entries.join(id))?;
        Ok(change)
    }

    fn entry_path(&self, id: &str) -> PathBuf {
        self.entries.join(format!("{id}.json"))
    }

    fn mark_path(&self, id: &str) -> Result<PathBuf> {
        Ok(self.config()?.join("marks").join(id))
    }

    /// The entry of `id`, held against its MAC and its mark.
    fn entry<F: Facts>(&self, id: &str) -> Result<Result<Entry<F>, Doubt>> {
        let is_pooled = self.pool().is_some();
        let mark = match self.open_mark(id, false)? {
            Some(mark) => read_mark(&mark)?,
            None if is_pooled => 0,
            None => return Ok(Err(Doubt::Unknown)),
        };
        let key = match self.key()? {
            Some(key) => key,
            None if is_pooled => return Err(self.lacks_key()),
            None => return Ok(Err(Doubt::Unknown)),
        };
        let entry: Result<Entry<F>, Doubt> = match self.read_entry(id, &key)? {
            Ok(entry) if entry.number < mark => Err(Doubt::Older),
            entry => entry,
        };
        if let Ok(entry) = &entry
            && is_pooled
            && entry.number > mark
        {
            self.note_seen(id, entry.number)?;
        }
        Ok(entry)
    }

    fn read_entry<F: Facts>(&self, id: &str, key: &Key) -> Result<Result<Entry<F>, Doubt>> {
        let path = self.entry_path(id);
        let bytes = match files::read(&path, MAX_LEN) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Err(Doubt::Unknown)),
            bytes => bytes.context(|| format!("read {}", path.display()))?,
        };
        Ok(Entry::parse(&bytes, id, key).ok_or(Doubt::Forged))
    }
}
