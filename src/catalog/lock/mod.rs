//! Who has a volume: an open-file-description (OFD) lock on the `lock` file in the volume's folder; and who
//! is to have it next, in a live migration: another such lock, beside the first.
//!
//! The lock is the kernel's and ends with the process, however that ends. What is written in the file only
//! says who has the lock, for the reader of an error. Without the lock it means nothing, except for what the
//! guest wants of whoever serves it next. The file is never replaced: a lock on a file that a path no longer
//! leads to would protect nothing.
//!
//! Another lock says that the text is the present holder's, and not one that is left of somebody before. It
//! is the kernel's as well, so that it is good in every PID namespace, and where /proc hides processes.

mod holder;
mod in_turn;
pub(crate) mod pool;
mod turn;

pub use holder::{Holder, Host, Purpose};
pub use turn::{Announcements, Turn};

use crate::base::locks::{self, Bytes};
use crate::base::root::files;
use crate::base::root::owners::Owners;
use crate::base::root::records::{Claim, pool_above};
use crate::base::{Context, Error, Kind, Result, spare};
use crate::catalog::VolumeId;
use nix::fcntl::OFlag;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The file's name in the volume's folder.
pub const FILE: &str = "lock";
/// Bytes of the file, from its beginning, whose lock says who has the volume.
const HELD: Bytes = Bytes::range(0, 1 << 62);
/// The byte of the lock file whose lock says that the file's text is of who has the volume. It is taken when
/// the text is written, and let go of before the volume is; where a process ends, both go at once.
const SAID: Bytes = Bytes::one((1 << 62) + 1);
/// How often, and how many times, to look what a holder says of itself that is just writing it.
const LOOK: Duration = Duration::from_millis(5);
const LOOKS: u32 = 20;
/// The most bytes of the file that are read.
const MAX_HOLDER: usize = 64 << 10;

/// Whether somebody has a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nobody.
    Free,
    /// This process.
    By(Holder),
    /// This process, of another host, or by another folder of this one: the store lies in a pool.
    Elsewhere(Holder),
    /// A process that has not said who it is, or not yet.
    Unknown,
}

impl Held {
    /// The process that has the volume attached, if that is what it is had for.
    pub fn attached(self) -> Option<Holder> {
        match self {
            Held::By(holder) if holder.purpose == Purpose::Attach => Some(holder),
            _ => None,
        }
    }
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
        if pool_above(folder).is_some() {
            if !files::exists(folder) {
                return Err(Error::new(Kind::NotFound, format!("there is no volume {volume}")));
            }
            files::create_local_folder(folder)?;
        }
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
        let mut lock = self.held_by(holder, false).context(attempt)?;
        if !files::is_at(&self.file, &self.path).context(attempt)? {
            return Err(Error::new(Kind::NotFound, format!("{} was deleted just now", self.volume)));
        }
        match pool::claim(self.folder(), &lock.holder)? {
            Some(Ok(claim)) => lock.claim = Some(claim),
            Some(Err(held)) => return Err(busy(self.volume, &held)),
            None => {}
        }
        lock.write_holder();
        Ok(lock)
    }

    fn folder(&self) -> &Path {
        self.path.parent().expect("the file lies in the volume's folder")
    }

    /// Who has the volume at this moment.
    fn held(&self) -> Result<Held> {
        match query_file(&self.file).context(|| format!("look at {}", self.path.display()))? {
            Held::Free => pool::holder(self.folder()),
            held => Ok(held),
        }
    }

    /// The lock file of the volume whose folder is `folder`, by the open `file` of a process that has the
    /// volume, and has passed the file.
    ///
    /// # Errors
    /// `Busy` if nobody has the volume by that open file.
    pub fn of_holder(folder: &Path, volume: VolumeId, file: File) -> Result<Self> {
        if !is_holders(folder, &file)? {
            let message = "what was passed as its lock is not the lock by which a process has it";
            return Err(Error::new(Kind::Busy, message));
        }
        Ok(LockFile { file: Arc::new(file), path: folder.join(FILE), volume })
    }

    /// The volume as another process has it by this open file, which [`LockFile::of_holder`] is of; it is
    /// that process's until [`VolumeLock::keep`].
    pub fn of_another(&self, holder: &Holder) -> Result<VolumeLock> {
        self.held_by(holder, true).context(|| format!("look at {}", self.path.display()))
    }

    /// The volume as `holder` has it. What the guest wanted of whoever had it before, it still wants.
    fn held_by(&self, holder: &Holder, is_others: bool) -> std::io::Result<VolumeLock> {
        let write_through = read_holder(&self.file)?.is_some_and(|before| before.write_through);
        let holder = Holder { write_through, ..holder.clone() };
        Ok(VolumeLock { file: self.clone(), holder, is_others, claim: None })
    }

    /// The open file. Who has the volume proves by it that it does: [`is_holders`].
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
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
    /// Whether another process has the open file as well, and what becomes of the lock is its affair.
    is_others: bool,
    /// Of a store in a pool: what keeps other hosts away.
    claim: Option<Claim>,
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

    /// This process has the volume from now on, and no other.
    pub fn keep(&mut self) {
        self.is_others = false;
        self.write_holder();
    }

    /// Another process, to which the open file was passed, has the volume from now on.
    pub fn leave(&mut self) {
        self.is_others = true;
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
        if self.is_others {
            return;
        }
        let text = serde_json::to_vec(&self.holder).expect("strings and numbers");
        let file = &self.file.file;
        locks::unlock(file, SAID);
        let write = || {
            file.set_len(0)?;
            file.write_all_at(&text, 0)?;
            // Nobody else takes it: that is for who has the volume.
            locks::try_lock(file, locks::Kind::Exclusive, SAID).map(drop)
        };
        if let Err(e) = spare::with(write) {
            // The lock holds all the same, and on a full disk a volume must still be deleted.
            log::warn!("{}: {e}", self.file.path.display());
        }
    }
}

impl Drop for VolumeLock {
    fn drop(&mut self) {
        if self.is_others {
            return;
        }
        // Whoever takes the volume here next is to find it free everywhere.
        drop(self.claim.take());
        locks::unlock(&self.file.file, SAID);
        // For whoever looks at the file by hand; but what the guest wants must not be lost.
        if !self.holder.write_through {
            let _ = self.file.file.set_len(0);
        }
        locks::unlock(&self.file.file, HELD);
    }
}

/// Who has the volume whose folder is `folder`; asking takes nothing.
pub fn query(folder: &Path) -> Result<Held> {
    match query_here(folder)? {
        Held::Free => pool::holder(folder),
        held => Ok(held),
    }
}

fn query_here(folder: &Path) -> Result<Held> {
    let path = folder.join(FILE);
    let attempt = || format!("look at {}", path.display());
    let file = match files::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Held::Free),
        Err(e) => return Err(Error::from(e).context(attempt())),
    };
    for _ in 0..LOOKS {
        match query_file(&file).context(attempt)? {
            Held::Unknown => std::thread::sleep(LOOK),
            held => return Ok(held),
        }
    }
    Ok(Held::Unknown)
}

/// Whether the open file `passed` is the one by which somebody has the volume whose folder is `folder`. Who
/// has passed it is then that process, or one that it has given the open file. The kernel tells in every
/// namespace.
pub fn is_holders(folder: &Path, passed: &File) -> Result<bool> {
    let path = folder.join(FILE);
    let attempt = || format!("look at {}", path.display());
    let ours = files::open(&path).context(attempt)?;
    let is_locked = |file| locks::is_locked_against(file, locks::Kind::Shared, HELD);
    let look = || {
        let is_lock_file = files::is_same(&ours.metadata()?, &passed.metadata()?);
        // A lock is in the way of every open file but its own. Twice, in case that one lets go in between.
        Ok::<_, std::io::Error>(is_lock_file && is_locked(&ours)? && !is_locked(passed)? && is_locked(&ours)?)
    };
    look().context(attempt)
}

fn query_file(file: &File) -> Result<Held> {
    // A read lock suffices to ask: a holder has a write lock.
    if !locks::is_locked_against(file, locks::Kind::Shared, HELD)? {
        return Ok(Held::Free);
    }
    // Between taking the lock and writing, the file says who had it before. An earlier version leaves it at
    // that; then the process itself is looked for.
    let is_said = locks::is_locked_against(file, locks::Kind::Shared, SAID)?;
    let holder = read_holder(file)?.filter(|holder| is_said || holder.is_seen_alive());
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
        Held::Elsewhere(holder) => format!("{volume} {}", holder.doing_anywhere()),
        Held::Unknown | Held::Free => {
            format!("{volume} is in use by another process, which cannot be seen from here")
        }
    };
    let hint = match held {
        Held::By(Holder { purpose: Purpose::Attach, .. }) => {
            format!("; \"sealblk detach {volume}\" ends that")
        }
        Held::Elsewhere(Holder { purpose: Purpose::Attach, .. }) => {
            format!("; \"sealblk detach {volume}\" there ends that")
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
        // As in the moment before it does, or as earlier versions leave it.
        locks::unlock(&lock.file.file, SAID);
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
    fn a_holder_that_cannot_be_seen_is_known_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let id = VolumeId::random();
        let mut elsewhere = attach(None);
        // No process has this id.
        elsewhere.pid = u32::MAX;
        let lock = VolumeLock::acquire(dir.path(), id, &elsewhere).unwrap();
        assert_eq!(query(dir.path()).unwrap(), Held::By(elsewhere.clone()));
        let mut lock = lock;
        lock.note_write_through(true);
        assert!(matches!(query(dir.path()).unwrap(), Held::By(holder) if holder.pid == u32::MAX));
        // What it has left says nothing of the next one.
        drop(lock);
        let next = LockFile::open(dir.path(), id).unwrap();
        assert!(next.lock(HELD).unwrap());
        assert_eq!(query(dir.path()).unwrap(), Held::Unknown);
    }

    #[test]
    fn who_has_the_volume_is_told_by_the_open_file() {
        let dir = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let id = VolumeId::random();
        let (file, next) = (LockFile::open(dir.path(), id).unwrap(), LockFile::open(dir.path(), id).unwrap());
        let passed = |file: &LockFile| File::from(file.descriptor().try_clone_to_owned().unwrap());
        let proves = |file: &LockFile| is_holders(dir.path(), &passed(file)).unwrap();
        assert!(!proves(&file), "nobody has it");
        let lock = file.acquire(&attach(None)).unwrap();
        assert!(proves(&file) && !proves(&next));
        let turn = next.announce().unwrap();
        assert!(proves(&file) && !proves(&next), "who waits has nothing yet");
        // Who has another volume.
        let others = LockFile::open(other.path(), id).unwrap();
        let _others = others.acquire(&attach(None)).unwrap();
        assert!(!proves(&others));
        drop(lock);
        assert!(!proves(&file));
        let _lock = next.acquire(&attach(None)).unwrap();
        drop(turn);
        assert!(proves(&next) && !proves(&file));
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
