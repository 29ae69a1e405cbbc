//! The listening socket of an attached volume: one VMM at a time, as often as they like.

use crate::base::sync::Locked;
use crate::vhost::device::Device;
use crate::vhost::session;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

/// Where VMMs come from.
pub enum Socket {
    /// VMMs connect to this socket, one after the other.
    Listening(UnixListener),
    /// One VMM is connected; when it leaves, serving is over.
    Connected(UnixStream),
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

    /// Makes `vmm` the connection that [`Stop::stop`] ends.
    fn serving(&self, vmm: Option<UnixStream>) {
        let mut current = self.current.locked();
        *current = vmm;
        if self.is_stopped()
            && let Some(vmm) = &*current
        {
            let _ = vmm.shutdown(Shutdown::Both);
        }
    }
}

/// Serves VMMs until [`Stop::stop`], until the only one has left, or until another process has the volume.
pub fn serve(device: &Arc<Device>, socket: Socket, stop: &Stop) -> io::Result<()> {
    match socket {
        Socket::Connected(vmm) => {
            one(device, vmm, stop)?;
            if !stop.is_stopped() {
                device.tenure.vmm_left();
            }
            Ok(())
        }
        Socket::Listening(listener) => {
            listener.set_nonblocking(true)?;
            while !stop.is_stopped() {
                wait_readable([listener.as_fd(), stop.event.as_fd()])?;
                match listener.accept() {
                    Ok((vmm, _)) => {
                        one(device, vmm, stop)?;
                        if !stop.is_stopped() && !device.tenure.vmm_left() {
                            return Ok(());
                        }
                    }
                    Err(e) if is_passing(&e) => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        }
    }
}

/// Serves one VMM. What goes wrong between it and us is its own affair; only what would hit the next as well is
/// an error.
fn one(device: &Arc<Device>, vmm: UnixStream, stop: &Stop) -> io::Result<()> {
    vmm.set_nonblocking(false)?;
    stop.serving(Some(vmm.try_clone()?));
    log::info!("a VMM has connected");
    match session::serve(device, vmm) {
        Ok(()) => log::info!("the VMM has disconnected"),
        Err(_) if stop.is_stopped() => log::info!("the VMM was disconnected"),
        Err(e) => log::error!("the VMM was disconnected: {e}"),
    }
    stop.serving(None);
    Ok(())
}

fn wait_readable<const N: usize>(fds: [BorrowedFd<'_>; N]) -> io::Result<()> {
    let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Errors of `accept` that say nothing about the listener.
fn is_passing(e: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(e.kind(), ConnectionAborted | Interrupted | WouldBlock)
}
