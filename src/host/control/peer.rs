//! Who answers on a volume's control socket: the process that has the volume, or somebody
//! who has put a socket there.
//!
//! What the kernel says of the peer is compared with what can be known: its user is one of those whose a
//! store may be, and it holds the volume's lock, as far as this process may look (`/proc/PID/fdinfo`, which
//! is root's for a process that is not dumpable). Who passes is believed nothing for it: a process that holds
//! the lock may have been broken into. A data key goes to nobody on the strength of this; that takes the data
//! key that the volume has ([`crate::crypt::Dek::pass`]).

use crate::base::root::owners::Owners;
use crate::base::{Error, Kind, Result};
use crate::catalog::lock::{self, Held};
use crate::catalog::{Catalog, VolumeId};
use nix::sys::socket::{getsockopt, sockopt};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// # Errors
/// `Busy`, naming the process and what is wrong with it.
pub(super) fn check(client: &UnixStream, catalog: &Catalog, volume: VolumeId) -> Result<()> {
    let peer = getsockopt(client, sockopt::PeerCredentials)?;
    let refused = |why: &str| {
        let message = format!(
            "process {} of user {} answers on the control socket of {volume}, and {why}: it is told nothing; \
             look what it is, and remove the socket {}",
            peer.pid(),
            peer.uid(),
            socket(catalog, volume).display()
        );
        Err(Error::new(Kind::Busy, message))
    };
    if !Owners::configured()?.contain(peer.uid()) {
        return refused("is not a user whose the store may be");
    }
    match holds_lock(peer.pid(), &catalog.folder(volume).join(lock::FILE)) {
        // It has let go of the volume just now, and nobody else has it.
        Some(false) if catalog.held(volume)? == Held::Free => Ok(()),
        Some(false) => refused("does not have the volume"),
        Some(true) | None => Ok(()),
    }
}

fn socket(catalog: &Catalog, volume: VolumeId) -> PathBuf {
    catalog.folder(volume).join(crate::host::control::FILE)
}

/// Whether the process of this id has the lock that says who has a volume; `None` if this process may not
/// know: the peer is another user's, or in a namespace where it has no id.
fn holds_lock(pid: i32, file: &std::path::Path) -> Option<bool> {
    if pid <= 0 {
        return None;
    }
    let inode = file.symlink_metadata().ok()?.ino();
    let folder = format!("/proc/{pid}/fdinfo");
    for entry in std::fs::read_dir(folder).ok()? {
        match std::fs::read_to_string(entry.ok()?.path()) {
            Ok(text) if text.lines().any(|line| is_holders(line, inode)) => return Some(true),
            // It was closed meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(_) => return None,
            Ok(_) => {}
        }
    }
    Some(false)
}

/// Whether a line of `fdinfo` is of the lock on the file with this inode that says who has the volume, and
/// not of the one that says who is to have it next (proc_pid_fdinfo(5), proc_locks(5)).
fn is_holders(line: &str, inode: u64) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["lock:", _, "OFDLCK", _, "WRITE", _, file, "0", _] = words[..] else { return false };
    file.rsplit(':').next() == Some(&*inode.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::lock::{Holder, LockFile, Purpose};

    #[test]
    fn a_holder_is_told_from_who_waits_and_from_who_has_another_volume() {
        let dir = tempfile::tempdir().unwrap();
        let id = VolumeId::random();
        let path = dir.path().join(lock::FILE);
        let (file, next) = (LockFile::open(dir.path(), id).unwrap(), LockFile::open(dir.path(), id).unwrap());
        let ours = std::process::id() as i32;
        assert_eq!(holds_lock(ours, &path), Some(false));
        let turn = next.announce().unwrap();
        assert_eq!(holds_lock(ours, &path), Some(false), "who waits has nothing yet");
        let lock = file.acquire_awaited(&Holder::this_process(Purpose::Attach, None).unwrap()).unwrap();
        assert_eq!(holds_lock(ours, &path), Some(true));
        let other = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(holds_lock(ours, other.path()), Some(false));
        drop((lock, turn));
        assert_eq!(holds_lock(ours, &path), Some(false));
        assert_eq!(holds_lock(0, &path), None);
    }
}
