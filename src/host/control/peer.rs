//! Who answers on a volume's control socket: the process that has the volume, or somebody
//! who has put a socket there.
//!
//! What the kernel says of the peer is compared with what can be known: its user is one of those whose a
//! store may be, and it holds the volume's lock. Of a process that can be seen, /proc tells the latter
//! (`/proc/PID/fdinfo`, which is root's for a process that is not dumpable). One that cannot be seen, in
//! another PID namespace, or by a root user without the capability to look, shows root the open file by
//! which it holds the lock: the kernel knows of each open file whether a lock is its own. The process shows
//! that to root alone. Whoever else had it could pass for the host process.
//!
//! Who passes is believed nothing for it: a process that holds the lock may have been broken into. A data key
//! goes to nobody on the strength of this; that takes the data key that the volume has
//! ([`crate::crypt::Dek::pass`]).

use crate::base::root::owners::Owners;
use crate::base::wire::{self, Lines};
use crate::base::{Error, Kind, Result, printable};
use crate::catalog::lock::{self, Held};
use crate::catalog::{Catalog, VolumeId};
use crate::host::control::{Answer, MAX_LINE, Request, not_reached};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Looks who answers, which may take as long as `patience`.
///
/// # Errors
/// `Busy`, naming the process and what is wrong with it.
pub(super) fn check(
    client: &UnixStream,
    catalog: &Catalog,
    volume: VolumeId,
    patience: Duration,
) -> Result<()> {
    let peer = getsockopt(client, sockopt::PeerCredentials)?;
    let refused = |why: &str| {
        let message = format!(
            "{} of user {} answers on the control socket of {volume}, and {why}: it is told nothing; look \
             what it is, and remove the socket {}",
            name(client),
            peer.uid(),
            socket(catalog, volume).display()
        );
        Err(Error::new(Kind::Busy, message))
    };
    if !Owners::configured()?.contain(peer.uid()) {
        return refused("is not a user whose the store may be");
    }
    let folder = catalog.folder(volume);
    let holds = match holds_lock(peer.pid(), &folder.join(lock::FILE)) {
        // To other users, that it holds the lock is shown neither by /proc nor by the process.
        None if !geteuid().is_root() => return Ok(()),
        None => shown_lock(client, patience)?
            .is_some_and(|file| lock::is_holders(&folder, &file).unwrap_or(false)),
        Some(holds) => holds,
    };
    match holds {
        true => Ok(()),
        // It has let go of the volume just now, and nobody else has it.
        false if catalog.held(volume)? == Held::Free => Ok(()),
        false => refused("does not have the volume"),
    }
}

/// The id of the process at the other end, which has the volume whose folder is `folder`, as far as this user
/// may know: see the table in docs/threat-model.md.
///
/// # Errors
/// `Busy` if it does not have the volume, or cannot be seen from here.
pub(crate) fn holder_at(client: &UnixStream, folder: &std::path::Path) -> Result<u32> {
    let pid = getsockopt(client, sockopt::PeerCredentials)?.pid();
    match holds_lock(pid, &folder.join(lock::FILE)) {
        Some(true) => Ok(pid as u32),
        // To other users than root it is not shown which locks a process has.
        None if !geteuid().is_root() && pid > 0 && proc_is_ours() => Ok(pid as u32),
        _ => {
            let message =
                format!("{} cannot be looked at from here: run this where that process runs", name(client));
            Err(Error::new(Kind::Busy, message))
        }
    }
}

/// The process at the other end, in words.
pub(super) fn name(client: &UnixStream) -> String {
    match getsockopt(client, sockopt::PeerCredentials).map(|peer| peer.pid()) {
        Ok(pid) if pid > 0 => format!("process {pid}"),
        // A process has no id in a namespace that it is not in, nor in one below.
        Ok(_) => "a process of another PID namespace".into(),
        Err(_) => "a process".into(),
    }
}

/// The open file by which the peer has the volume, as it says; none if it shows nothing.
fn shown_lock(client: &UnixStream, patience: Duration) -> Result<Option<File>> {
    client.set_read_timeout(Some(patience))?;
    wire::say(client, &Request::ShowLock {})?;
    let mut lines = Lines::of_at_most(MAX_LINE);
    let line = lines.next(client).map_err(|e| not_reached(&name(client), &e.into()))?;
    client.set_read_timeout(None)?;
    match serde_json::from_slice(&line.unwrap_or_default()) {
        Ok(Answer::Lock) => Ok(lines.take_descriptor().map(File::from)),
        Ok(Answer::Failed { kind, message }) if Kind::from_name(&kind) == Kind::NotFound => {
            Err(Error::new(Kind::NotFound, printable::line(&message)))
        }
        // An earlier version has no such request; and to another user namespace's root nothing is shown.
        Ok(Answer::Failed { message, .. }) => {
            let message = format!(
                "{} cannot be looked at from here, and does not show that it has the volume ({}): run this \
                 where that process runs",
                name(client),
                printable::line(&message)
            );
            Err(Error::new(Kind::Busy, message))
        }
        _ => Ok(None),
    }
}

fn socket(catalog: &Catalog, volume: VolumeId) -> PathBuf {
    catalog.folder(volume).join(crate::host::control::FILE)
}

/// Whether the process of this id has the lock that says who has a volume; `None` if this process may not
/// know: the peer is another user's, or has no id here.
fn holds_lock(pid: i32, file: &std::path::Path) -> Option<bool> {
    if pid <= 0 || !proc_is_ours() {
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

/// Whether an id means the same process in /proc as to this process: /proc is mounted for one PID namespace,
/// and may have been for another one than this process is in.
fn proc_is_ours() -> bool {
    let ours = std::fs::read_link("/proc/self");
    ours.is_ok_and(|id| id.as_os_str() == &*std::process::id().to_string())
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
        // At both ends is this process.
        let (socket, _other_end) = UnixStream::pair().unwrap();
        assert_eq!(holds_lock(ours, &path), Some(false));
        assert_eq!(holder_at(&socket, dir.path()).unwrap_err().kind(), Kind::Busy);
        let turn = next.announce().unwrap();
        assert_eq!(holds_lock(ours, &path), Some(false), "who waits has nothing yet");
        let lock = file.acquire_awaited(&Holder::this_process(Purpose::Attach, None).unwrap()).unwrap();
        assert_eq!(holds_lock(ours, &path), Some(true));
        assert_eq!(holder_at(&socket, dir.path()).unwrap(), ours as u32);
        let other = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(holds_lock(ours, other.path()), Some(false));
        drop((lock, turn));
        assert_eq!(holds_lock(ours, &path), Some(false));
        assert_eq!(holder_at(&socket, dir.path()).unwrap_err().kind(), Kind::Busy);
        assert_eq!(holds_lock(0, &path), None);
    }
}
