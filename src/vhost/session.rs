//! One VMM's connection, from its first message to its last: a fresh daemon of the crate behind a fresh gate.

use super::backend::{Backend, Device};
use super::dirty::GuestMemory;
use super::gate::{Gate, Limits};
use std::io;
use std::net::Shutdown;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryAtomic;

/// Serves the VMM on `vmm` until it leaves (`Ok`), is refused, or the socket is shut down by somebody else.
/// When this returns, every request is drained, and nothing of the guest's is mapped any more.
pub fn serve(device: &Arc<Device>, vmm: UnixStream) -> io::Result<()> {
    let backend = Backend::new(device.clone());
    let rings = backend.rings().clone();
    let memory = GuestMemoryAtomic::new(GuestMemory::new());
    let daemon = rings.while_current(|| VhostUserDaemon::new("vhost-user".into(), backend, memory));
    let mut daemon = daemon.map_err(|e| io::Error::other(e.to_string()))?;
    let inner = connect(|listener| daemon.start(listener).map_err(|e| io::Error::other(e.to_string())))?;
    let limits = Limits { queues: device.workers.len() as u64, queue_size: u32::from(device.queue_size) };
    let result = Gate::new(vmm, inner.try_clone()?, limits, rings.clone()).and_then(|mut gate| gate.run());
    // The crate's thread ends with its socket; how it puts that does not matter.
    let _ = inner.shutdown(Shutdown::Both);
    if let Err(e) = daemon.wait() {
        log::debug!("the session's thread ended: {e}");
    }
    rings.end();
    result
}

/// A connected pair of sockets, one end of which goes to `accept` by way of a listener: the crate takes nothing
/// else. The listener's name lives for a moment in a folder that only we can enter.
fn connect(accept: impl FnOnce(&mut Listener) -> io::Result<()>) -> io::Result<UnixStream> {
    let folder = std::env::temp_dir().join(format!("sealblk-{}", uuid::Uuid::new_v4().simple()));
    std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
    let name = folder.join("s");
    let both = UnixListener::bind(&name).and_then(|listener| Ok((UnixStream::connect(&name)?, listener)));
    let _ = std::fs::remove_file(&name);
    std::fs::remove_dir(&folder)?;
    let (ours, listener) = both?;
    accept(&mut Listener::from(listener))?;
    Ok(ours)
}
