//! What the service manager is told (sd_notify(3)): over a socket that is connected before the process is
//! confined and can make no more.

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// How long the manager may take to have room for what it is told.
const PATIENCE: Duration = Duration::from_secs(5);
/// What a socket is called that the manager keeps.
pub(crate) const KEPT: &str = "sealblk-vhost-user";

/// Where the service manager listens, if there is one.
pub(crate) struct Notifier(Option<UnixDatagram>);

impl Notifier {
    /// Connects to the socket that `NOTIFY_SOCKET` names. Without it, or if nobody is there, nobody is told.
    pub(crate) fn connect() -> Self {
        let socket = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()).map(|name| to(&name));
        Notifier(socket.and_then(|socket| match socket {
            Ok(socket) => Some(socket),
            Err(e) => {
                log::warn!(
                    "the service manager's socket: {e}; it will not be told that this process is ready"
                );
                None
            }
        }))
    }

    /// The service manager by a socket that is connected to it, if there is one.
    pub(crate) fn of(socket: Option<UnixDatagram>) -> Self {
        Notifier(socket)
    }

    /// The socket, where there is a service manager.
    pub(crate) fn socket(&self) -> Option<&UnixDatagram> {
        self.0.as_ref()
    }

    /// Another process is the service from now on.
    pub(crate) fn main_process(&self, pid: u32) {
        self.tell(&format!("MAINPID={pid}\n"));
    }

    /// Whoever is served can connect.
    pub(crate) fn ready(&self) {
        self.tell("READY=1\n");
    }

    /// Gives the manager the socket that VMMs connect to, to keep it, and to pass it to the process that is
    /// started should this one crash (`FDSTORE=1`): so no VMM that comes in between is turned away. A manager
    /// that keeps nothing (`FileDescriptorStoreMax=` is not set) passes over it.
    pub(crate) fn keep(&self, listener: BorrowedFd<'_>) {
        let text = format!("FDSTORE=1\nFDNAME={KEPT}\n");
        let fds = [listener.as_raw_fd()];
        let (data, control) = ([IoSlice::new(text.as_bytes())], [ControlMessage::ScmRights(&fds)]);
        if let Some(manager) = &self.0
            && let Err(e) = sendmsg::<()>(manager.as_raw_fd(), &data, &control, MsgFlags::MSG_NOSIGNAL, None)
        {
            log::warn!("giving the service manager the socket to keep: {e}");
        }
    }

    /// The end has begun. What the manager keeps of this process's is to go as well.
    pub(crate) fn stopping(&self, is_kept: bool) {
        if is_kept {
            self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={KEPT}\n"));
        }
        self.tell("STOPPING=1\n");
    }

    fn tell(&self, what: &str) {
        if let Some(socket) = &self.0
            && let Err(e) = socket.send(what.as_bytes())
        {
            log::warn!("telling the service manager {}: {e}", what.trim_end());
        }
    }
}

fn to(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(name)?,
        _ => return Err(Errno::EAFNOSUPPORT.into()),
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // A manager that does not listen holds up neither a detach nor a hand-over.
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_that_does_not_listen_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let _manager = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier(Some(to(path.as_os_str()).unwrap()));
        notifier.0.as_ref().unwrap().set_nonblocking(true).unwrap();
        while notifier.0.as_ref().unwrap().send(b"x").is_ok() {}
        notifier.0.as_ref().unwrap().set_nonblocking(false).unwrap();
        notifier.0.as_ref().unwrap().set_write_timeout(Some(Duration::from_millis(1))).unwrap();
        notifier.stopping(false);
    }

    #[test]
    fn a_manager_is_told_wherever_it_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("sealblk-test-{}", std::process::id());
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        let managers = [UnixDatagram::bind(&path).unwrap(), UnixDatagram::bind_addr(&by_name).unwrap()];
        for (manager, at) in managers.iter().zip([path.to_str().unwrap(), &format!("@{name}")]) {
            Notifier(Some(to(OsStr::new(at)).unwrap())).ready();
            let mut said = [0; 64];
            let len = manager.recv(&mut said).unwrap();
            assert_eq!(&said[..len], b"READY=1\n");
        }
        assert!(to(OsStr::new("vsock:2:1")).is_err());
    }
}
