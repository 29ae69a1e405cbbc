//! Sockets by their names, which are no symbolic links'.

use super::{kind_of, open_guarded, strange, words};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::sys::socket::{self as net, AddressFamily, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat};
use nix::unistd::{Gid, Uid, fchownat};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Gives the socket that this process has just made at `path` to this user and group, and these permissions,
/// each as far as it is given.
///
/// # Errors
/// [`Strange`] for what is no socket: another user may have put a file in its place.
pub(crate) fn give_socket(
    path: &Path,
    user: Option<Uid>,
    group: Option<Gid>,
    mode: Option<Mode>,
) -> io::Result<()> {
    let socket = open_socket(path)?;
    fchownat(&socket, c"", user, group, AtFlags::AT_EMPTY_PATH)?;
    match mode {
        // A descriptor that was opened as a path alone has no other way to this.
        Some(mode) => Ok(fchmodat(AT_FDCWD, &*by_descriptor(&socket), mode, FchmodatFlags::FollowSymlink)?),
        None => Ok(()),
    }
}

/// Connects to the socket of that name, which is no symbolic link's: else somebody could have one process
/// talked to in place of another. Where so many wait already that there is no room for one more, that is
/// waited for as long as `patience`.
pub fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = open_socket(path)?;
    // The path of a socket is at most 107 bytes long, and the store's may be longer.
    let address = UnixAddr::new(by_descriptor(&socket).as_str())?;
    let client = net::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let client = UnixStream::from(client);
    // The kernel waits so long in connect(2) as well.
    client.set_write_timeout(Some(patience))?;
    match net::connect(client.as_raw_fd(), &address) {
        Ok(()) => client.set_write_timeout(None)?,
        Err(Errno::EAGAIN) => {
            let message = "so many clients wait there already that there is no room for one more";
            return Err(io::Error::new(ErrorKind::TimedOut, message));
        }
        Err(e) => return Err(e.into()),
    }
    Ok(client)
}

fn by_descriptor(file: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn open_socket(path: &Path) -> io::Result<OwnedFd> {
    let socket = open_guarded(AT_FDCWD, path, OFlag::O_PATH)?;
    // With these flags a symbolic link is opened itself.
    let kind = kind_of(&fstat(&socket)?);
    if kind != SFlag::S_IFSOCK {
        return Err(strange(format!("it is {}, not a socket", words(kind))));
    }
    Ok(socket)
}
