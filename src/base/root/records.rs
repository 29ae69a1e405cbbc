//! The records of a store that does not lie in a folder: what is asked of them, and which paths mean them.
//!
//! A store in a pool of Ceph's has a folder on each host all the same, for what is this host's alone: control
//! sockets, events, the audit log. Its records have the paths in it that they would have in a folder, and are
//! nowhere there: [`files`](super::files) asks whoever reaches the pool ([`Records`]) in place of the kernel.
//! So what a record means, and in which order records change, is written down once for both.
//!
//! | path below the root | means |
//! |---|---|
//! | `volumes/<id>/*.json`, `snapshots/*`, `ledger/*`, `store/*`, `layers/*.device` | a record |
//! | `volumes`, `volumes/<id>`, `snapshots`, `ledger`, `store`, `layers` | a folder of records |
//! | everything else | a file of this host |
//!
//! What the pool says is a claim, as what lies in a folder is.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

/// A record: a name in a folder of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// The folder, relative to the store's root.
    pub folder: &'a str,
    /// The name in it.
    pub file: &'a str,
}

/// Whether a lock of the store's was had for the asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Locking {
    /// It is this process's.
    Taken,
    /// Another process has it, on this host or another; and what that has said of itself.
    Anothers(Option<String>),
}

/// The records of a store, wherever they lie. Each function is one step: it is done, durably, or it is not.
///
/// A record that was read is replaced or removed only if it still says what it said then.
pub trait Records: Send + Sync {
    /// What a record says, if it has at most `max` bytes.
    ///
    /// # Errors
    /// `NotFound`; those of whoever has it.
    fn read(&self, record: Record<'_>, max: u64) -> io::Result<Vec<u8>>;

    /// The names in a folder, in no order.
    ///
    /// # Errors
    /// As [`Records::read`].
    fn names(&self, folder: &str) -> io::Result<Vec<String>>;

    /// Makes a record that is not there yet.
    ///
    /// # Errors
    /// `AlreadyExists`; as [`Records::read`].
    fn create(&self, record: Record<'_>, bytes: &[u8]) -> io::Result<()>;

    /// Makes a record say this.
    ///
    /// # Errors
    /// As [`Records::read`]; and if it says something else by now than this process has read.
    fn replace(&self, record: Record<'_>, bytes: &[u8]) -> io::Result<()>;

    /// Removes a record.
    ///
    /// # Errors
    /// As [`Records::replace`].
    fn remove(&self, record: Record<'_>) -> io::Result<()>;

    /// Gives a record another name in its folder; one that has it loses it.
    ///
    /// # Errors
    /// As [`Records::replace`].
    fn rename(&self, record: Record<'_>, to: &str) -> io::Result<()>;

    /// Makes a folder, if it is not there.
    ///
    /// # Errors
    /// Those of whoever has it.
    fn make_folder(&self, folder: &str) -> io::Result<()>;

    /// Removes a folder and all records in it.
    ///
    /// # Errors
    /// As [`Records::read`].
    fn remove_folder(&self, folder: &str) -> io::Result<()>;

    /// Takes the lock of this name, if nobody has it; `text` says who this process is.
    ///
    /// # Errors
    /// Those of whoever has it.
    fn lock(&self, name: &str, text: &str) -> io::Result<Locking>;

    /// Lets go of a lock.
    ///
    /// # Errors
    /// As [`Records::lock`].
    fn unlock(&self, name: &str) -> io::Result<()>;

    /// Who has the lock of this name, in its own words; none: nobody.
    ///
    /// # Errors
    /// As [`Records::lock`].
    fn holder(&self, name: &str) -> io::Result<Option<String>>;

    /// Takes the lock from a process that is known to have ended, and had said `text`.
    ///
    /// # Errors
    /// As [`Records::lock`].
    fn break_lock(&self, name: &str, text: &str) -> io::Result<()>;

    /// Removes the image of a layer; one that is not there is as good.
    ///
    /// # Errors
    /// `ResourceBusy` if somebody has it open.
    fn remove_image(&self, name: &str) -> io::Result<()>;

    /// Makes the image of a layer so many bytes long, if it is shorter.
    ///
    /// # Errors
    /// As [`Records::lock`].
    fn make_image_longer(&self, name: &str, len: u64) -> io::Result<()>;

    /// From now on, this process reads and changes the records of this folder alone, and reads these of what
    /// leads to layers.
    ///
    /// # Errors
    /// As [`Records::lock`].
    fn narrow(&self, folder: &str, layers: &[String]) -> io::Result<()>;
}

/// A store whose records lie in a pool.
pub struct Pooled {
    /// The folder of this host.
    pub root: PathBuf,
    /// What the pool is, among all pools of all clusters, as a name of a file.
    pub id: String,
    /// The pool in words, as `ceph:POOL/NAMESPACE`.
    pub shown: String,
    /// What stands before and after the name of an image there in its address.
    pub image: (String, String),
    /// Whoever reaches it.
    pub records: Box<dyn Records>,
}

/// The one that this process uses.
static POOLED: OnceLock<Pooled> = OnceLock::new();

/// From now on the records of the store at this root lie there.
pub(crate) fn use_pool(pooled: Pooled) {
    assert!(POOLED.set(pooled).is_ok(), "a process uses one store");
}

/// The pool in which the records of the store at `root` lie; none if they are files.
pub fn pool_of(root: &Path) -> Option<&'static Pooled> {
    POOLED.get().filter(|pooled| pooled.root == root)
}

/// The store in a pool that `path` is in.
pub(crate) fn pool_above(path: &Path) -> Option<&'static Pooled> {
    POOLED.get().filter(|pooled| path.starts_with(&pooled.root))
}

/// What a path in the folder of a store in a pool means.
pub(super) enum Meant<'a> {
    Record(Record<'a>),
    Folder(&'a str),
    /// A file of this host.
    Local,
}

impl Pooled {
    /// The address of an image in the pool.
    pub fn image_address(&self, name: &str) -> String {
        format!("{}{name}{}", self.image.0, self.image.1)
    }

    pub(super) fn meant<'a>(&self, path: &'a Path) -> Meant<'a> {
        path.strip_prefix(&self.root).ok().map_or(Meant::Local, meant)
    }
}

fn meant(relative: &Path) -> Meant<'_> {
    let Some(text) = relative.to_str() else { return Meant::Local };
    if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Meant::Local;
    }
    let parts: Vec<&str> = text.split('/').collect();
    let record = |folder, file| Meant::Record(Record { folder, file });
    match parts[..] {
        ["volumes" | "snapshots" | "ledger" | "store" | "layers"] => Meant::Folder(text),
        ["volumes", _] => Meant::Folder(text),
        ["volumes", _, file] if file.ends_with(".json") => record(&text[..text.len() - file.len() - 1], file),
        ["layers", file] if file.ends_with(".device") => record("layers", file),
        [folder @ ("snapshots" | "ledger" | "store"), file] => record(folder, file),
        _ => Meant::Local,
    }
}

/// A record, with whoever has it; none for a file of this host.
pub(super) fn record(path: &Path) -> Option<(&'static dyn Records, Record<'_>)> {
    let pooled = POOLED.get()?;
    match pooled.meant(path) {
        Meant::Record(record) => Some((&*pooled.records, record)),
        Meant::Folder(_) | Meant::Local => None,
    }
}

/// A folder of records, with whoever has it; none for one of this host.
pub(super) fn folder(path: &Path) -> Option<(&'static dyn Records, &str)> {
    let pooled = POOLED.get()?;
    match pooled.meant(path) {
        Meant::Folder(folder) => Some((&*pooled.records, folder)),
        Meant::Record(_) | Meant::Local => None,
    }
}

/// # Errors
/// `Unsupported` for a file that would have to be made where layers of a store in a folder are: nobody else
/// would find it.
pub(super) fn check_may_be_made(path: &Path) -> io::Result<()> {
    let Some(pooled) = pool_above(path) else { return Ok(()) };
    // Of a layer's record, this host has a file for its locks.
    let is_lock = path.extension().is_some_and(|it| it == "device");
    let is_of_layer = path.starts_with(pooled.root.join("layers"));
    if !is_lock && (is_of_layer || record(path).is_some()) {
        let message = format!(
            "the store lies in {}, where layers are images; what would make a file of this host in their \
             place is not there yet for such a store",
            pooled.shown
        );
        return Err(io::Error::new(ErrorKind::Unsupported, message));
    }
    Ok(())
}

/// A lock of a store in a pool, which this process has until this is dropped.
#[derive(Debug)]
#[must_use = "it is let go of when this is dropped"]
pub struct Claim {
    name: String,
}

impl Claim {
    /// Takes the lock `name`, once; `text` says who this process is.
    ///
    /// # Errors
    /// Those of the pool.
    pub(crate) fn take(pooled: &Pooled, name: &str, text: &str) -> io::Result<Result<Claim, Option<String>>> {
        Ok(match pooled.records.lock(name, text)? {
            Locking::Taken => Ok(Claim { name: name.to_owned() }),
            Locking::Anothers(who) => Err(who),
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // What cannot be let go of is free after its time.
        let pooled = POOLED.get().expect("the lock is one of the pool's");
        if let Err(e) = pooled.records.unlock(&self.name) {
            log::warn!("let go of the lock {} of {}: {e}", self.name, pooled.shown);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_told_from_files_of_this_host_by_their_paths() {
        let is_record = |path: &str| matches!(meant(Path::new(path)), Meant::Record(_));
        for path in [
            "volumes/vol-1/volume.json",
            "snapshots/snap-1.json",
            "snapshots/snap-1.copying",
            "ledger/vol-1.json",
            "store/key.json",
            "layers/1.device",
        ] {
            assert!(is_record(path), "{path}");
        }
        for path in [
            "volumes/vol-1/lock",
            "volumes/vol-1/control.sock",
            "layers/1.img",
            "events.jsonl",
            "kms/log",
            "volumes/../ledger/x",
            "",
            "volumes/vol-1/inner/volume.json",
        ] {
            assert!(!is_record(path), "{path}");
        }
        match meant(Path::new("volumes/vol-1/volume.json")) {
            Meant::Record(record) => {
                assert_eq!(record, Record { folder: "volumes/vol-1", file: "volume.json" });
            }
            _ => panic!("it is a record"),
        }
        assert!(matches!(meant(Path::new("volumes/vol-1")), Meant::Folder("volumes/vol-1")));
    }
}
