//! Who has a volume: an open-file-description (OFD) lock on the `lock` file in the volume's folder.
//!
//! The lock is the kernel's and ends with the process, however that ends. What is written in the file only
//! says who it is, for the reader of an error; without the lock it means nothing. The file is never replaced:
//! a lock on a file that a path no longer leads to would protect nothing.

use super::id::VolumeId;
use crate::error::{Context, Error, Kind, Result};
use crate::observe::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The file's name in the volume's folder.
pub const FILE: &str = "lock";

/// What a volume is held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// It is attached.
    Attach,
    /// It is being made.
    Create,
    /// It is being deleted.
    Delete,
    /// A snapshot of it is being made.
    Snapshot,
    /// It is being made larger.
    Resize,
    /// What an interrupted command left of it is being cleared up.
    Recover,
    /// Its data keys are being wrapped anew.
    Rewrap,
}

/// The process that holds a volume, as it says itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// What it does with the volume.
    pub purpose: Purpose,
    /// Its process id, in the pid namespace that it ran in.
    pub pid: u32,
    /// When the process began, in clock ticks since boot: tells it from a later one with the same id.
    pub start_time: u64,
    /// Since when it has the volume.
    pub since: Timestamp,
    /// The vhost-user socket's path, where it has one, as text for people.
    pub socket: Option<String>,
}

impl Holder {
    /// This process, from now on.
    pub fn this_process(purpose: Purpose, socket: Option<&Path>) -> Result<Self> {
        let pid = std::process::id();
        let start_time = start_time(pid)?;
        let socket = socket.map(|path| path.display().to_string());
        Ok(Holder { purpose, pid, start_time, since: Timestamp::now(), socket })
    }

    /// Whether that very process still runs.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid).is_ok_and(|t| t == self.start_time)
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let doing = match self.purpose {
            Purpose::Attach => "is attached",
            Purpose::Create => "is being made",
            Purpose::Delete => "is being deleted",
            Purpose::Snapshot => "is being made a snapshot of",
            Purpose::Resize => "is being made larger",
            Purpose::Recover => "is being tidied up",
            Purpose::Rewrap => "is being rewrapped",
        };
        write!(f, "{doing} by process {} (since {}", self.pid, self.since)?;
        if let Some(socket) = &self.socket {
            write!(f, ", socket {socket}")?;
        }
        f.write_str(")")
    }
}

/// Whether somebody has a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nobody.
    Free,
    /// This process.
    By(Holder),
    /// Somebody who has not said who he is, or not yet.
    Unknown,
}

/// A volume that this process has. Proof, for whoever wants it, that no other process has it.
#[derive(Debug)]
pub struct VolumeLock {
    file: File,
    volume: VolumeId,
}

impl VolumeLock {
    /// Takes the volume whose folder is `folder`.
    ///
    /// # Errors
    /// `Busy`, naming the process that has it; `NotFound` if the volume was deleted meanwhile.
    pub fn acquire(folder: &Path, volume: VolumeId, holder: &Holder) -> Result<Self> {
        let path = folder.join(FILE);
        let attempt = || format!("lock {}", path.display());
        // Create: the folder of a volume that was copied by hand may lack the file.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .context(attempt)?;
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(busy(volume, &query(folder)?)),
            Err(e) => return Err(Error::from(e).context(attempt())),
        }
        if !same_file(&file, &path).context(attempt)? {
            return Err(Error::new(Kind::NotFound, format!("{volume} was deleted just now")));
        }
        let text = serde_json::to_vec(holder).expect("strings and numbers");
        if let Err(e) = file.set_len(0).and_then(|()| file.write_all(&text)) {
            // The lock holds all the same, and on a full disk a volume must still be deleted.
            log::warn!("{}: {e}", path.display());
        }
        Ok(VolumeLock { file, volume })
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }
}

impl Drop for VolumeLock {
    fn drop(&mut self) {
        // For whoever looks at the file by hand.
        let _ = self.file.set_len(0);
        unlock(&self.file);
    }
}

/// Who has the volume whose folder is `folder`; asking takes nothing.
pub fn query(folder: &Path) -> Result<Held> {
    let path = folder.join(FILE);
    let attempt = || format!("look at {}", path.display());
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Held::Free),
        Err(e) => return Err(Error::from(e).context(attempt())),
    };
    // A read lock suffices to ask: a holder has a write lock.
    let mut lock = whole_file(libc::F_RDLCK);
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).context(attempt)?;
    if i32::from(lock.l_type) == libc::F_UNLCK {
        return Ok(Held::Free);
    }
    let mut text = Vec::new();
    file.take(64 << 10).read_to_end(&mut text).context(attempt)?;
    // Between taking the lock and writing, the file says who had it before.
    let holder = serde_json::from_slice(&text).ok().filter(Holder::is_alive);
    Ok(holder.map_or(Held::Unknown, Held::By))
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

/// A lock of `kind` on all bytes that a file has or will have.
fn whole_file(kind: i32) -> libc::flock {
    byte_range(kind, 0, 0)
}

/// A lock of `kind` on `len` bytes from `start`; a `len` of 0 is to the end, wherever that will be.
pub(super) fn byte_range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        // The kernel insists on 0 for OFD locks.
        l_pid: 0,
    }
}

/// Gives up the OFD locks of `file`. Closing it alone would not while a child process that is just being
/// started still has a copy of the descriptor.
pub(super) fn unlock(file: &File) {
    // Unlocking fails for no reason that closing, which follows, would not see to.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_UNLCK)));
}

fn same_file(file: &File, path: &Path) -> std::io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Field 22 of `/proc/<pid>/stat` (proc_pid_stat(5)).
fn start_time(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).context(|| format!("read {path}"))?;
    // The name, field 2, is in parentheses and may hold anything, parentheses too.
    stat.rsplit_once(')')
        .and_then(|(_, after)| after.split_whitespace().nth(19))
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(|| Error::new(Kind::Other, format!("{path} does not read as expected")))
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
    fn a_lock_on_a_deleted_file_is_not_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let file = File::create(&path).unwrap();
        assert!(same_file(&file, &path).unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(!same_file(&file, &path).unwrap());
        let _other = File::create(&path).unwrap();
        assert!(!same_file(&file, &path).unwrap());
    }
}
