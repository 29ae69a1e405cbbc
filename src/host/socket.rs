//! The vhost-user socket of an attached volume: made, taken over, or found already there.

use crate::base::root::{files, parent_of};
use crate::base::{Context, Error, Kind, Result, spare};
use crate::host::notify::KEPT;
use crate::sandbox::Identity;
use crate::vhost::listener::Socket;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, UnixAddr, getpeername, getsockname, getsockopt,
    sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Gid;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The first descriptor that a service manager passes (sd_listen_fds(3)).
const FIRST_PASSED: RawFd = 3;

/// A socket's name in the file system, removed at drop if it is still ours.
pub struct SocketName {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketName {
    /// The name of a socket that another process has made.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn of_another(path: &Path) -> std::io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(SocketName { path: path.into(), inode: (metadata.dev(), metadata.ino()) })
    }

    /// This name, seen from elsewhere: it was made while `folder` was the working folder.
    pub fn moved_to(mut self, folder: &Path) -> Self {
        self.path = folder.join(&self.path);
        self
    }

    /// Whether this is the socket's name in its folder.
    pub(super) fn is_called(&self, name: &str) -> bool {
        self.path.file_name() == Some(name.as_ref())
    }

    /// Leaves the name where it is, for whoever replaces it.
    pub fn leave(self) {
        std::mem::forget(self);
    }

    /// Gives the socket another name in its folder, instead of whoever has that.
    pub fn rename(&mut self, name: &str) -> std::io::Result<()> {
        let path = self.path.with_file_name(name);
        std::fs::rename(&self.path, &path)?;
        self.path = path;
        Ok(())
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode);
        if ours && let Err(e) = std::fs::remove_file(&self.path) {
            log::warn!("remove {}: {e}", self.path.display());
        }
    }
}

/// Listens at `path`. A socket that a dead process left there is replaced; one that
/// somebody listens on is not.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketName)> {
    let attempt = || format!("listen on {}", path.display());
    if UnixAddr::new(path) == Err(Errno::ENAMETOOLONG) {
        let message = "the path of a socket can have at most 107 bytes; give a shorter one, or one relative \
                       to the working folder";
        return Err(Error::new(Kind::Usage, message).context(attempt()));
    }
    let bind = || spare::with(|| UnixListener::bind(path));
    let listener = match bind() {
        Err(e) if e.kind() == ErrorKind::AddrInUse => {
            remove_stale(path).map_err(|e| e.context(attempt()))?;
            bind().context(attempt)?
        }
        bound => bound.context(attempt)?,
    };
    let metadata = std::fs::symlink_metadata(path).context(attempt)?;
    Ok((listener, SocketName { path: path.into(), inode: (metadata.dev(), metadata.ino()) }))
}

/// Who may connect to a socket that is made at a path.
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketAccess {
    /// The group that it belongs to; without one, the group of the user that the process becomes, or its own.
    pub group: Option<Gid>,
    /// Its permissions; without them, what the umask leaves, or, where there is a group, 0660.
    pub mode: Option<Mode>,
}

/// For the owner and the group alone.
const FOR_GROUP: Mode = Mode::from_bits_truncate(0o660);

impl SocketAccess {
    /// Listens at `path`, as [`listen`] does, for a process that is going to be `user`. Only while the
    /// process has one thread.
    pub(crate) fn listen(&self, path: &Path, user: Option<&Identity>) -> Result<(UnixListener, SocketName)> {
        let mode = self.mode.or(self.group.map(|_| FOR_GROUP));
        // Nobody can connect before the socket is whose it shall be.
        let before = mode.map(|_| umask(Mode::from_bits_truncate(0o177)));
        let listening = listen(path);
        before.map(umask);
        let (listener, name) = listening?;
        let user = user.map(Identity::ids);
        let group = self.group.or(user.map(|(_, group)| group));
        if user.is_some() || group.is_some() || mode.is_some() {
            // The folder is the operator's to choose, by whatever links lead there.
            let folder = parent_of(path).canonicalize()?;
            let path = folder.join(path.file_name().unwrap_or_default());
            files::give_socket(&path, user.map(|(user, _)| user), group, mode).map_err(|e| {
                let hint = match e.raw_os_error() {
                    Some(libc::EPERM) => "; this user can give it to a group only that the user is in",
                    _ => "",
                };
                let e = Error::from(e);
                let message = format!("let others connect to {}: {e}{hint}", path.display());
                e.reworded(message)
            })?;
        }
        Ok((listener, name))
    }
}

/// A socket that the service manager passes.
pub(super) struct Passed {
    pub(super) socket: Socket,
    /// Whether an earlier process of this service has made it, and given it to the manager to keep: the name
    /// is this service's to remove.
    pub(super) is_kept: bool,
}

/// The socket at `path` that the service manager passes, whoever has made it; none if it passes none to this
/// process.
///
/// # Errors
/// `Usage` if it passes others only.
pub(super) fn of_service_manager(path: &Path) -> Result<Option<Passed>> {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    let count = match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        (Some(pid), Some(count)) if pid == std::process::id() && count > 0 => count,
        _ => return Ok(None),
    };
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut found = None;
    for fd in (FIRST_PASSED..).take(count as usize) {
        let is_kept = names.next() == Some(KEPT);
        // Those that are not wanted are closed.
        match inherited(fd)? {
            Socket::Listening(listener) if is_at(&listener, path) => {
                found = Some(Passed { socket: Socket::Listening(listener), is_kept });
            }
            _ => {}
        }
    }
    let none = || {
        let message = format!(
            "none of the sockets that the service manager passes listens at {}: name the same path here and \
             in ListenStream= of the .socket unit",
            path.display()
        );
        Error::new(Kind::Usage, message)
    };
    found.ok_or_else(none).map(Some)
}

/// Whether a listener was made at `path`, by whatever links that leads there.
pub(super) fn is_at(listener: &UnixListener, path: &Path) -> bool {
    let place = |path: &Path| Some((parent_of(path).canonicalize().ok()?, path.file_name()?.to_owned()));
    let address = listener.local_addr().ok();
    let made_at = address.as_ref().and_then(|address| address.as_pathname());
    made_at.and_then(place).is_some_and(|made_at| place(path) == Some(made_at))
}

fn remove_stale(path: &Path) -> Result<()> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(Error::new(Kind::Busy, "there is a file of that name, and it is not a socket"));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => Ok(std::fs::remove_file(path)?),
        Err(e) if e.raw_os_error() == Some(libc::EPROTOTYPE) => {
            Err(Error::new(Kind::Busy, "somebody has a socket of another type there"))
        }
        Err(e) => Err(e.into()),
        Ok(_) => Err(Error::new(Kind::Busy, "somebody listens there already")),
    }
}

/// The socket that was passed as descriptor `fd`: listening, or connected to a VMM.
///
/// # Errors
/// `Usage` for anything else.
pub fn inherited(fd: RawFd) -> Result<Socket> {
    take(fd).map_err(|problem| {
        let attempt = format!("use descriptor {fd} as the vhost-user socket");
        Error::new(Kind::Usage, problem).context(attempt)
    })
}

fn take(fd: RawFd) -> Result<Socket, String> {
    if (0..=libc::STDERR_FILENO).contains(&fd) {
        return Err("it is a standard stream".into());
    }
    // SAFETY: F_GETFD only asks whether the descriptor is open.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err("this process was not started with it".into());
    }
    // SAFETY: it is open, and whoever started us gave it to us by its number, for this use alone; this is
    // called before any descriptor of our own could have that number (the caller sees to it).
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let failed = |e: Errno| e.desc().to_string();
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).map_err(failed)?;
    of_descriptor(fd)
}

/// The vhost-user socket that a descriptor is: listening, or connected to a VMM.
///
/// # Errors
/// What it is instead.
pub(super) fn of_descriptor(fd: OwnedFd) -> Result<Socket, String> {
    let failed = |e: Errno| e.desc().to_string();
    let kind = getsockopt(&fd, sockopt::SockType).map_err(|_| "it is not a socket")?;
    let address = getsockname::<SockaddrStorage>(fd.as_raw_fd()).map_err(failed)?;
    if kind != SockType::Stream || address.family() != Some(AddressFamily::Unix) {
        return Err("it is not a Unix stream socket".into());
    }
    if getsockopt(&fd, sockopt::AcceptConn).map_err(failed)? {
        return Ok(Socket::Listening(UnixListener::from(fd)));
    }
    // A peer that has left again is found when it is served.
    match getpeername::<UnixAddr>(fd.as_raw_fd()) {
        Err(Errno::ENOTCONN) => Err("it neither listens nor is it connected".into()),
        _ => Ok(Socket::Connected(UnixStream::from(fd))),
    }
}
