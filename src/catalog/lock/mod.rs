//! Who has a volume: an open-file-description (OFD) lock on the `lock` file in the volume's folder; and who
//! is to have it next, in a live migration: another such lock, beside the first.
//!
//! The lock is the kernel's and ends with the process, however that ends. What is written in the file only
//! says who has the lock, for the reader of an error. Without the lock it means nothing, except for what the
//! guest wants of whoever serves it next. The file is never replaced: a lock on a file that a path no longer
//! leads to would protect nothing.

mod holder;
mod turn;

pub use holder::{Holder, Purpose};
pub use turn::{Announcements, Turn};

use crate::base::locks::{self, Bytes};
use crate::base::root::files;
use crate::base::root::owners::Owners;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::VolumeId;
use nix::fcntl::OFlag;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The file's name in the volume's folder.
pub const FILE: &str = "lock";
/// Bytes of the file, from its beginning, whose lock says who has the volume.
const HELD: Bytes = Bytes::range(0, 1 << 62);
/// The most bytes of the file that are read.
const MAX_HOLDER: usize = 64 << 10;

/// Whether somebody has a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nobody.
    Free,
    /// This process.
    By(Holder),
    /// A process that has not said who it is, or not yet.
    Unknown,
}

/// A volume's lock file, open. By itself it holds nothing.
#[derive(Clone, Debug)]
pub struct LockFile {
    file: Arc<File>,
    path: PathBuf,
    volume: VolumeId,
}

impl LockFile {
    /// Opens that of the volume whose folder is `folder`.
    pub fn open(folder: &Path, volume: VolumeId) -> Result<Self> {
        Owners::configured()?.check_folder(folder)?;
        let path = folder.join(FILE);
        // Create: the folder of a volume that was copied by hand may lack the file.
        let file = files::open_with(&path, OFlag::O_RDWR | OFlag::O_CREAT);
        let file = file.context(|| format!("lock {}", path.display()))?;
        Ok(LockFile { file: Arc::new(file), path, volume })
    }

    /// Takes the volume.
    ///
    /// # Errors
    /// `Busy`, naming the process that has it, or because another is to have it next; `NotFound` if the
    /// volume was deleted meanwhile.
    pub fn acquire(&self, holder: &Holder) -> Result<VolumeLock> {
        let lock = self.acquire_awaited(holder)?;
        if self.is_awaited()? {
            let hint = "detach it where \"sealblk attach --incoming\" waits for it, or let its VMM start";
            return Err(Error::new(
                Kind::Busy,
                format!("{} is about to be handed over; {hint}", self.volume),
            ));
        }
        Ok(lock)
    }

    /// Takes the volume for the process that is to have it next, or for one that has let go
    /// of it and wants it back.
    ///
    /// # Errors
    /// As [`LockFile::acquire`], except that it does not matter who is to have it next.
    pub fn acquire_awaited(&self, holder: &Holder) -> Result<VolumeLock> {
        let attempt = || format!("lock {}", self.path.display());
        if !self.lock(HELD).context(attempt)? {
            return Err(busy(self.volume, &query_file(&self.file).context(attempt)?));
        }
        let before = read_holder(&self.file).context(attempt)?;
        let write_through = before.is_some_and(|holder| holder.write_through);
        let lock = VolumeLock { file: self.clone(), holder: Holder { write_through, ..holder.clone() } };
        if !files::is_at(&self.file, &self.path).context(attempt)? {
            return Err(Error::new(Kind::NotFound, format!("{} was deleted just now", self.volume)));
        }
        lock.write_holder();
        Ok(lock)
    }

    /// Locks these bytes of the file; `false` if somebody has them.
    fn lock(&self, bytes: Bytes) -> Result<bool> {
        Ok(locks::try_lock(&self.file, locks::Kind::Exclusive, bytes)?)
    }
}

/// A volume that this process has. Proof, for whoever wants it, that no other process has it.
#[derive(Debug)]
pub struct VolumeLock {
    file: LockFile,
    holder: Holder,
}

impl VolumeLock {
    /// Takes the volume whose folder is `folder`.
    ///
    /// # Errors
    /// As [`LockFile::acquire`].
    pub fn acquire(folder: &Path, volume: VolumeId, holder: &Holder) -> Result<Self> {
        LockFile::open(folder, volume)?.acquire(holder)
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.file.volume
    }

    /// Whether the guest wants writes to be durable when they complete, as far as this or
    /// an earlier process knows.
    pub fn write_through(&self) -> bool {
        self.holder.write_through
    }

    /// Notes what the guest wants, for whoever serves it after this process.
    pub fn note_write_through(&mut self, write_through: bool) {
        self.holder.write_through = write_through;
        self.write_holder();
    }

    fn write_holder(&self) {
        let text = serde_json::to_vec(&self.holder).expect("strings and numbers");
        let file = &self.file.file;
        if let Err(e) = file.set_len(0).and_then(|()| file.write_all_at(&text, 0)) {
            // The lock holds all the same, and on a full disk a volume must still be deleted.
            log::warn!("{}: {e}", self.file.path.display());
        }
    }
}

impl Drop for VolumeLock {
    fn drop(&mut self) {
        // For whoever looks at the file by hand; but what the guest wants must not be lost.
        if !self.holder.write_through {
            let _ = self.file.file.set_len(0);
        }
        locks::unlock(&self.file.file, HELD);
    }
}

/// Who has the volume whose folder is `folder`; asking takes nothing.
pub fn query(folder: &Path) -> Result<Held> {
    let path = folder.join(FILE);
    let attempt = || format!("look at {}", path.display());
    let file = match files::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Held::Free),
        Err(e) => return Err(Error::from(e).context(attempt())),
    };
    query_file(&file).context(attempt)
}

fn query_file(file: &File) -> Result<Held> {
    // A read lock suffices to ask: a holder has a write lock.
    if !locks::is_locked_against(file, locks::Kind::Shared, HELD)? {
        return Ok(Held::Free);
    }
    // Between taking the lock and writing, the file says who had it before.
    let holder = read_holder(file)?.filter(Holder::is_alive);
    Ok(holder.map_or(Held::Unknown, Held::By))
}

/// What the file says, if that can be read.
fn read_holder(file: &File) -> std::io::Result<Option<Holder>> {
    let mut text = vec![0; MAX_HOLDER];
    let len = file.read_at(&mut text, 0)?;
    Ok(serde_json::from_slice(&text[..len]).ok())
}

/// The error for a volume that somebody else has.
pub fn busy(volume: VolumeId, held: &Held) -> Error {
    let message = match held {
        Held::By(holder) => format!("{volume} {holder}"),
        Held::Unknown | Held::Free => format!("{volume} is in use by another process"),
    };
    let hint = match held {
        Held::By(Holder { purpose: Purpose::Attach, .. }) => {
            format!("; \"sealblk detach {volume}\" ends that")
        }
        _ => "; try again".to_string(),
    };
    Error::new(Kind::Busy, message + &hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attach(socket: Option<&Path>) -> Holder {
        Holder::this_process(Purpose::Attach, socket).unwrap()
    }

    #[test]
    fn a_second_holder_is_refused_and_told_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let id = VolumeId::random();
        let holder = attach(Some(Path::new("/run/vm.sock")));
        let lock = VolumeLock::acquire(dir.path(), id, &holder).unwrap();
        assert_eq!(query(dir.path()).unwrap(), Held::By(holder));
        let e = VolumeLock::acquire(dir.path(), id, &attach(None)).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy);
        let expected = format!("{id} is attached by process {} (since ", std::process::id());
        assert!(e.to_string().starts_with(&expected), "{e}");
        assert!(e.to_string().contains("socket /run/vm.sock)"), "{e}");
        drop(lock);
        assert_eq!(query(dir.path()).unwrap(), Held::Free);
        assert!(VolumeLock::acquire(dir.path(), id, &attach(None)).is_ok());
    }

    #[test]
    fn what_the_file_says_without_the_lock_means_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let id = VolumeId::random();
        std::fs::write(dir.path().join(FILE), serde_json::to_vec(&attach(None)).unwrap()).unwrap();
        assert_eq!(query(dir.path()).unwrap(), Held::Free);
        assert!(VolumeLock::acquire(dir.path(), id, &attach(None)).is_ok());
    }

    #[test]
    fn a_holder_that_has_not_said_who_it_is_still_holds() {
        let dir = tempfile::tempdir().unwrap();
        let id = VolumeId::random();
        let lock = VolumeLock::acquire(dir.path(), id, &attach(None)).unwrap();
        let mut gone = attach(None);
        gone.start_time += 1;
        for text in [serde_json::to_vec(&gone).unwrap(), b"{\"pid\"".to_vec(), Vec::new()] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            assert_eq!(query(dir.path()).unwrap(), Held::Unknown);
            let e = VolumeLock::acquire(dir.path(), id, &attach(None)).unwrap_err();
            assert!(e.kind() == Kind::Busy && e.to_string().contains("another process"), "{e}");
        }
        drop(lock);
    }

    #[test]
    fn who_waits_for_a_volume_takes_nothing_and_is_alone() {
        let dir = tempfile::tempdir().unwrap();
        let id = VolumeId::random();
        let open = || LockFile::open(dir.path(), id).unwrap();
        let (source, next) = (open(), open());
        let lock = source.acquire(&attach(None)).unwrap();
        assert!(!source.is_awaited().unwrap());
        let turn = next.announce().unwrap();
        assert!(source.is_awaited().unwrap() && !next.is_awaited().unwrap());
        assert_eq!(open().announce().unwrap_err().kind(), Kind::Busy);
        assert_eq!(next.acquire(&attach(None)).unwrap_err().kind(), Kind::Busy);
        drop(lock);
        assert_eq!(query(dir.path()).unwrap(), Held::Free, "who waits does not hold");
        let e = open().acquire(&attach(None)).unwrap_err();
        assert!(e.kind() == Kind::Busy && e.to_string().contains("about to be handed over"), "{e}");
        assert_eq!(query(dir.path()).unwrap(), Held::Free, "a refused attempt leaves nothing");
        drop(source.acquire_awaited(&attach(None)).unwrap());
        let lock = next.acquire(&attach(None)).unwrap();
        drop(turn);
        assert!(
            matches!(query(dir.path()).unwrap(), Held::By(_)),
            "the one lock does not take the other along"
        );
        assert!(!source.is_awaited().unwrap());
        assert_eq!(source.acquire(&attach(None)).unwrap_err().kind(), Kind::Busy);
        let _again = source.announce().unwrap();
        drop(lock);
        assert!(next.is_awaited().unwrap());
        assert!(source.acquire(&attach(None)).is_ok());
    }

    #[test]
    fn what_the_guest_chose_outlives_its_host_process() {
        let dir = tempfile::tempdir().unwrap();
        let acquire = || VolumeLock::acquire(dir.path(), VolumeId::random(), &attach(None)).unwrap();
        let mut lock = acquire();
        assert!(!lock.write_through());
        lock.note_write_through(true);
        drop(lock);
        assert_eq!(query(dir.path()).unwrap(), Held::Free);
        // However often it changes hands, and however they end.
        let lock = acquire();
        assert!(lock.write_through());
        drop(lock);
        let mut lock = acquire();
        assert!(lock.write_through());
        lock.note_write_through(false);
        drop(lock);
        assert_eq!(std::fs::metadata(dir.path().join(FILE)).unwrap().len(), 0);
        assert!(!acquire().write_through());
    }

    #[test]
    fn a_lock_of_the_whole_file_excludes_everybody() {
        // As versions before this one took it.
        let dir = tempfile::tempdir().unwrap();
        let id = VolumeId::random();
        let (old, new) = (LockFile::open(dir.path(), id).unwrap(), LockFile::open(dir.path(), id).unwrap());
        assert!(old.lock(Bytes::ALL).unwrap());
        assert_eq!(new.acquire(&attach(None)).unwrap_err().kind(), Kind::Busy);
        assert_eq!(query(dir.path()).unwrap(), Held::Unknown);
        locks::unlock(&old.file, Bytes::ALL);
        let _lock = new.acquire(&attach(None)).unwrap();
        assert!(!old.lock(Bytes::ALL).unwrap());
    }

    #[test]
    fn a_lock_on_a_deleted_file_is_not_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let file = File::create(&path).unwrap();
        assert!(files::is_at(&file, &path).unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(!files::is_at(&file, &path).unwrap());
        let _other = File::create(&path).unwrap();
        assert!(!files::is_at(&file, &path).unwrap());
    }
}
