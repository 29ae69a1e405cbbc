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

pub mod entry;
mod facts;

pub(crate) use facts::{SnapshotFacts, VolumeFacts};

use crate::base::root::records::{Claim, Pooled, pool_of};
use crate::base::root::{Root, create_dir_durable, files, replace_file, sync_dir};
use crate::base::{Context, Error, Kind, Result, locks, spare};
use crate::catalog::lock::pool::await_claim;
use entry::Entry;
use nix::fcntl::OFlag;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// Longer entries are refused unread, in bytes: a few states of the longest record that there is.
const MAX_LEN: u64 = 64 << 20;
/// More than a key, a mark or a path has, in bytes.
const MAX_SMALL: u64 = 8 << 10;
/// How long another command is waited for that is changing the same record.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the folder of a store in a pool begins with, in the configuration folder.
const POOLED: &str = "ceph-";
/// How often to look whether it is done: nothing tells.
const LOOK: Duration = Duration::from_millis(5);

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

type Key = Zeroizing<[u8; entry::KEY_LEN]>;

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
    fn lacks_key(&self) -> Error {
        let (store, key) =
            (self.pool().map_or("", |it| &it.shown), self.config.as_ref().map(|it| it.join("key")));
        let message = format!(
            "this host has no key of the store in {store}, so that it can believe nothing there: bring {} \
             from a host that uses the store, as a secret (docs/ceph.md)",
            key.unwrap_or_default().display()
        );
        Error::new(Kind::Corrupt, message)
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

    /// The store's key; none in a store that this host does not know.
    fn key(&self) -> Result<Option<Key>> {
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

    fn known_key(&self) -> Result<Key> {
        let unknown = || Error::new(Kind::Corrupt, "this host does not know the store");
        self.key()?.ok_or_else(unknown)
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
fn folder_name(root: &Root) -> String {
    if let Some(pooled) = root.pool() {
        // The same on all hosts: the key is brought from one to the other.
        return format!("{POOLED}{}", pooled.id);
    }
    let digest = hex::encode(Sha256::digest(root.path().as_os_str().as_bytes()));
    digest[..16].to_owned()
}

/// A record whose state is being changed: its entry is locked.
#[must_use = "the entry is locked until this is dropped"]
pub(crate) struct Change<'a, F> {
    ledger: &'a Ledger,
    id: String,
    /// Of a store in a pool: what keeps other hosts away.
    claim: Option<Claim>,
    mark: File,
    number: u64,
    accepted: Vec<F>,
}

impl<F: Facts> Change<'_, F> {
    /// Lists, durably, a state that the record may have from now on besides those that it may have.
    pub(crate) fn expect(&mut self, next: F) -> Result<()> {
        if self.accepted.contains(&next) {
            return Ok(());
        }
        let mut accepted = std::mem::take(&mut self.accepted);
        accepted.push(next);
        self.replace(accepted)
    }

    /// Lists, durably, what the record says now, and nothing else.
    ///
    /// # Errors
    /// `Corrupt` for what was not listed before.
    pub(crate) fn settle(&mut self, now: F) -> Result<()> {
        if self.accepted.as_slice() == std::slice::from_ref(&now) {
            return Ok(());
        }
        if self.accepted.iter().all(|accepted| accepted.difference(&now).is_some()) {
            let what = self.accepted.first().and_then(|accepted| accepted.difference(&now));
            return Err(Doubt::Differs(what.unwrap_or_default()).refuse(&self.id));
        }
        self.replace(vec![now])
    }

    fn replace(&mut self, accepted: Vec<F>) -> Result<()> {
        let key = self.ledger.known_key()?;
        let number = self.number.checked_add(1).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("{}: the number {} has no next", self.id, self.number))
        })?;
        let next = Entry { number, accepted };
        let bytes = next.to_bytes(&self.id, &key);
        replace_file(&self.ledger.entry_path(&self.id), &bytes)?;
        (self.number, self.accepted) = (number, next.accepted);
        write_mark(&self.mark, number).context(|| format!("write the mark of {}", self.id))
    }

    fn take_lock(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !locks::try_lock(&self.mark, locks::Kind::Exclusive, locks::Bytes::ALL)
            .context(|| format!("lock the mark of {}", self.id))?
        {
            if Instant::now() >= until {
                return Err(Error::new(Kind::Busy, format!("another command is changing {}", self.id)));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

fn write_mark(mark: &File, number: u64) -> std::io::Result<()> {
    spare::with(|| mark.write_all_at(format!("{number:020}\n").as_bytes(), 0)).and_then(|()| mark.sync_all())
}

/// The number in a mark; an empty one is of an entry that is being made.
fn read_mark(mark: &File) -> Result<u64> {
    let mut bytes = [0; 32];
    let len = mark.read_at(&mut bytes, 0).context(|| "read the mark")?;
    let text = std::str::from_utf8(&bytes[..len]).unwrap_or("?").trim_end();
    if text.is_empty() {
        return Ok(0);
    }
    let damaged = |_| Error::new(Kind::Corrupt, "a mark in the configuration folder is damaged");
    text.parse().map_err(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record that is one text; `a` may become `A` without a command.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Text(String);

    impl Facts for Text {
        type Written = String;

        fn to_written(&self) -> String {
            self.0.clone()
        }

        fn from_written(written: String, _id: &str) -> Result<Self, String> {
            Ok(Text(written))
        }

        fn difference(&self, found: &Self) -> Option<String> {
            let is_ours = self.0 == found.0 || self.0.to_uppercase() == found.0;
            (!is_ours).then(|| format!("{} and not {}", found.0, self.0))
        }
    }

    fn text(text: &str) -> Text {
        Text(text.into())
    }

    struct Place {
        dir: tempfile::TempDir,
        ledger: Ledger,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let top = dir.path().canonicalize().unwrap();
            let ledger =
                Ledger { root: top.clone(), entries: top.join("ledger"), config: Some(top.join("config")) };
            ledger.begin().unwrap();
            Place { dir, ledger }
        }

        fn entry(&self) -> PathBuf {
            self.dir.path().join("ledger/a.json")
        }

        fn mark(&self) -> PathBuf {
            self.dir.path().join("config/marks/a")
        }

        fn doubt(&self, found: &str) -> Option<Doubt> {
            self.ledger.judge("a", &text(found)).unwrap()
        }
    }

    #[test]
    fn a_change_may_have_been_made_or_not_until_it_is_settled() {
        let place = Place::new();
        assert_eq!(place.doubt("one"), Some(Doubt::Unknown));
        place.ledger.enter("a", text("one")).unwrap();
        assert_eq!(place.ledger.enter("a", text("two")).unwrap_err().kind(), Kind::Busy);
        assert_eq!(place.doubt("one"), None);
        assert_eq!(place.doubt("ONE"), None, "without a command");
        assert_eq!(place.doubt("two"), Some(Doubt::Differs("two and not one".into())));
        let mut change = place.ledger.change::<Text>("a").unwrap();
        change.expect(text("two")).unwrap();
        assert_eq!((place.doubt("one"), place.doubt("two")), (None, None));
        assert!(change.settle(text("three")).is_err());
        change.settle(text("TWO")).unwrap();
        assert_eq!(place.doubt("one"), Some(Doubt::Differs("one and not TWO".into())));
        assert_eq!(place.doubt("two"), Some(Doubt::Differs("two and not TWO".into())), "it does not go back");
        drop(change);
        place.ledger.forget("a").unwrap();
        place.ledger.forget("a").unwrap();
        assert_eq!(place.doubt("TWO"), Some(Doubt::Unknown));
        assert_eq!(place.ledger.ids().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn an_entry_is_one_behind_its_mark_never() {
        let place = Place::new();
        place.ledger.enter("a", text("one")).unwrap();
        let (entry, mark) = (std::fs::read(place.entry()).unwrap(), std::fs::read(place.mark()).unwrap());
        place.ledger.change("a").unwrap().expect(text("two")).unwrap();
        assert_ne!(std::fs::read(place.mark()).unwrap(), mark);
        let later = std::fs::read(place.entry()).unwrap();
        std::fs::write(place.entry(), &entry).unwrap();
        assert_eq!(place.doubt("one"), Some(Doubt::Older));
        assert!(place.ledger.change::<Text>("a").is_err());
        // A cut came before the mark.
        std::fs::write(place.entry(), &later).unwrap();
        std::fs::write(place.mark(), &mark).unwrap();
        assert_eq!((place.doubt("one"), place.doubt("two")), (None, None));
        place.ledger.change("a").unwrap().settle(text("two")).unwrap();
        std::fs::write(place.entry(), &later).unwrap();
        assert_eq!(place.doubt("one"), Some(Doubt::Older));
        // What an operator accepts is above whatever there was.
        place.ledger.accept("a", text("three")).unwrap();
        assert_eq!((place.doubt("three"), place.doubt("two").is_some()), (None, true));
        std::fs::write(place.mark(), "x\n").unwrap();
        assert_eq!(place.ledger.judge("a", &text("three")).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn an_entry_is_bound_to_its_key_and_its_id() {
        let (place, other) = (Place::new(), Place::new());
        for id in ["a", "b"] {
            place.ledger.enter(id, text(id)).unwrap();
        }
        std::fs::copy(place.dir.path().join("ledger/b.json"), place.entry()).unwrap();
        assert_eq!(place.doubt("b"), Some(Doubt::Forged));
        other.ledger.enter("a", text("a")).unwrap();
        std::fs::copy(other.entry(), place.entry()).unwrap();
        assert_eq!(place.doubt("a"), Some(Doubt::Forged));
        // A key that was there is the one that stays.
        let key = std::fs::read(place.dir.path().join("config/key")).unwrap();
        place.ledger.begin().unwrap();
        assert_eq!(std::fs::read(place.dir.path().join("config/key")).unwrap(), key);
        assert_eq!(place.ledger.judge("b", &text("b")).unwrap(), None);
    }

    #[test]
    fn two_commands_change_one_after_the_other() {
        let place = Place::new();
        place.ledger.enter("a", text("0")).unwrap();
        std::thread::scope(|scope| {
            for n in 1..=8 {
                let ledger = &place.ledger;
                scope.spawn(move || {
                    let mut change = ledger.change("a").unwrap();
                    change.expect(text(&n.to_string())).unwrap();
                    assert_eq!(change.accepted.len(), 2, "the other one's was settled");
                    change.settle(text(&n.to_string())).unwrap();
                });
            }
        });
        assert_eq!(read_mark(&File::open(place.mark()).unwrap()).unwrap(), 1 + 2 * 8);
    }
}
