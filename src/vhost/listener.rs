//! The listening socket of an attached volume: one VMM at a time, as often as they like.

use crate::base::log_fields;
use crate::base::sync::Locked;
use crate::base::wait::{has_event, until_readable};
use crate::vhost::boundary::Next;
use crate::vhost::device::Device;
use crate::vhost::session::{self, End, Resume};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long to wait where the machine, or this process's limits, have no room for one more connection.
pub(crate) const SHORTAGE: Duration = Duration::from_millis(200);

/// Where VMMs come from.
pub enum Socket {
    /// VMMs connect to this socket, one after the other.
    Listening(UnixListener),
    /// One VMM is connected; when it leaves, serving is over.
    Connected(UnixStream),
}

impl Socket {
    /// The socket that VMMs connect to, once more.
    pub(crate) fn listener(&self) -> Option<io::Result<UnixListener>> {
        match self {
            Socket::Listening(listener) => Some(listener.try_clone()),
            Socket::Connected(_) => None,
        }
    }
}

/// The session that another process leaves to this one.
pub struct Inherited {
    /// Its VMM.
    pub vmm: UnixStream,
    /// What brings the session to where it was left.
    pub resume: Resume,
}

/// Ends serving from another thread.
pub struct Stop {
    event: EventFd,
    /// The connection being served.
    current: Mutex<Option<UnixStream>>,
    stopped: std::sync::atomic::AtomicBool,
}

impl Stop {
    /// Not stopped yet.
    pub fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Arc::new(Stop { event, current: Mutex::default(), stopped: false.into() }))
    }

    /// Takes no new connection and ends the one there is; [`serve`] returns once its requests are drained.
    pub fn stop(&self) {
        self.stopped.store(true, std::sync::atomic::Ordering::SeqCst);
        if let Err(e) = self.event.write(1) {
            log::error!("stopping the listener: {e}");
        }
        if let Some(vmm) = &*self.current.locked() {
            let _ = vmm.shutdown(Shutdown::Both);
        }
    }

    /// Whether it was.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// Waits so long, or until it is stopped.
    fn wait(&self, time: Duration) -> io::Result<()> {
        let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.event.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes `vmm` the connection that [`Stop::stop`] ends.
    pub(crate) fn serving(&self, vmm: Option<UnixStream>) {
        let mut current = self.current.locked();
        *current = vmm;
        if self.is_stopped()
            && let Some(vmm) = &*current
        {
            let _ = vmm.shutdown(Shutdown::Both);
        }
    }
}

/// Serves the VMMs that come by `socket`, first the one of the session that was `inherited`,
/// until [`Stop::stop`], until the only one has left, or until another process has the volume.
/// Returns who serves them then.
///
/// # Errors
/// Those of listening; why the session that was to be inherited is another process's still.
pub fn serve(
    device: &Arc<Device>,
    socket: Option<Socket>,
    inherited: Option<Inherited>,
    stop: &Stop,
) -> io::Result<Next> {
    let (listener, first) = match socket {
        Some(Socket::Connected(vmm)) => (None, Some((vmm, None))),
        Some(Socket::Listening(listener)) => (Some(listener), None),
        None => (None, None),
    };
    let first = inherited.map(|Inherited { vmm, resume }| (vmm, Some(resume))).or(first);
    if let Some(listener) = &listener {
        listener.set_nonblocking(true)?;
    }
    if let Some((vmm, resume)) = first
        && let Some(next) = one(device, vmm, resume, listener.as_ref(), stop)?
    {
        return Ok(next);
    }
    let Some(listener) = listener else { return Ok(Next::ThisProcess) };
    while !stop.is_stopped() {
        until_readable([listener.as_fd(), stop.event.as_fd(), device.boundary.event()])?;
        if device.boundary.reach(None) == Next::Successor {
            return Ok(Next::Successor);
        }
        match listener.accept() {
            Ok((vmm, _)) => {
                if let Some(next) = one(device, vmm, None, Some(&listener), stop)? {
                    return Ok(next);
                }
            }
            Err(e) if is_passing(&e) => {}
            Err(e) if is_shortage(&e) => {
                log::error!("a VMM cannot be served yet: {e}");
                stop.wait(SHORTAGE)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(Next::ThisProcess)
}

/// Serves one VMM. What goes wrong between it and us is its own affair, and the next may have more luck.
/// Returns who serves VMMs from now on, if it is over for this process.
fn one(
    device: &Arc<Device>,
    vmm: UnixStream,
    resume: Option<Resume>,
    listener: Option<&UnixListener>,
    stop: &Stop,
) -> io::Result<Option<Next>> {
    device.tenure.vmm_came();
    log_fields::vmm_came();
    let peer = peer(&vmm);
    match resume {
        None => log::info!("a VMM has connected: {peer}"),
        Some(_) => log::info!("going on with the session of a VMM: {peer}"),
    }
    let ended = session(device, vmm, resume, listener, &peer, stop);
    match ended {
        Ok(End::Successor) => return Ok(Some(Next::Successor)),
        Ok(End::NotResumed(e)) => return Err(e),
        Ok(End::Left) => log::info!("the VMM has disconnected"),
        Err(_) if stop.is_stopped() => log::info!("the VMM was disconnected"),
        Err(e) => log::error!("the VMM was disconnected: {e}"),
    }
    log_fields::vmm_left();
    stop.serving(None);
    let is_over = !stop.is_stopped() && !device.tenure.vmm_left();
    Ok(is_over.then_some(Next::ThisProcess))
}

/// The VMM's session, while others that come are looked at and have to wait.
fn session(
    device: &Arc<Device>,
    vmm: UnixStream,
    resume: Option<Resume>,
    listener: Option<&UnixListener>,
    peer: &str,
    stop: &Stop,
) -> io::Result<End> {
    // An open file's flag, which the process that leaves the session has set.
    if resume.is_none() {
        vmm.set_nonblocking(false)?;
        stop.serving(Some(vmm.try_clone()?));
    }
    let Some(listener) = listener else { return session::serve(device, vmm, resume) };
    let over = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
    let connected = vmm.try_clone()?;
    std::thread::scope(|scope| {
        let watch = std::thread::Builder::new().name("waiting-vmms".into());
        let watching = watch.spawn_scoped(scope, || tell_of_waiting(listener, &connected, &over, peer));
        if let Err(e) = watching {
            log::warn!("nobody will tell of VMMs that wait while another is connected: {e}");
        }
        let _at_the_end = Over(&over);
        session::serve(device, vmm, resume)
    })
}

/// Signalled when it is dropped, however that comes: somebody is waited for who waits for it.
struct Over<'a>(&'a EventFd);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        // The counter has room for one.
        let _ = self.0.write(1);
    }
}

/// Says once that a VMM waits for the one that is `connected`, until that leaves or its session is `over`.
fn tell_of_waiting(listener: &UnixListener, connected: &UnixStream, over: &EventFd, peer: &str) {
    let mut fds = [
        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        PollFd::new(connected.as_fd(), PollFlags::from_bits_retain(libc::POLLRDHUP)),
        PollFd::new(over.as_fd(), PollFlags::POLLIN),
    ];
    while matches!(poll(&mut fds, PollTimeout::NONE), Err(nix::Error::EINTR)) {}
    let [waits, left, is_over] = fds.map(|fd| has_event(&fd));
    if waits && !left && !is_over {
        log::warn!("a VMM has connected, and waits: a volume has one VMM at a time, and {peer} is connected");
    }
}

/// Who is at the other end, as far as the kernel tells.
fn peer(vmm: &UnixStream) -> String {
    match getsockopt(vmm, sockopt::PeerCredentials) {
        // A process in a namespace that this one does not see has no id here.
        Ok(peer) if peer.pid() > 0 => format!("process {} of user {}", peer.pid(), peer.uid()),
        Ok(peer) => format!("a process of user {}", peer.uid()),
        Err(_) => "a process".into(),
    }
}

/// Errors of `accept` that say nothing about the listener.
fn is_passing(e: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(e.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// Errors of `accept` that say that there is no room now; there may be later.
pub(crate) fn is_shortage(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
