//! One VMM's connection, from its first message to its last: a fresh daemon of the crate behind a fresh gate.

use crate::base::spare;
use crate::vhost::boundary::Next;
use crate::vhost::device::{Backend, Device};
use crate::vhost::dirty::GuestMemory;
use crate::vhost::gate::{Gate, Limits};
use std::cell::RefCell;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryAtomic;

/// What brings a fresh session to where another process has left it, before the VMM is heard.
pub type Resume = Box<dyn FnOnce(&mut Gate) -> Resumed>;

/// How that went.
pub enum Resumed {
    /// The session is this process's, whether it goes on (`Ok`) or is over.
    Here(io::Result<()>),
    /// It is not: the other process has it still.
    NotHere(io::Error),
}

/// How a session ended.
pub enum End {
    /// The VMM has left.
    Left,
    /// Another process has the session, and the VMM's connection.
    Successor,
    /// It was to be resumed, and is another process's still.
    NotResumed(io::Error),
}

/// Serves the VMM on `vmm`, from the beginning or from where another process has left it, until the VMM
/// leaves, is refused (an error), or the socket is shut down by somebody else. When this returns, every
/// request is drained, and nothing of the guest's is mapped any more.
pub fn serve(device: &Arc<Device>, vmm: UnixStream, mut resume: Option<Resume>) -> io::Result<End> {
    match serve_or_resume(device, vmm, &mut resume) {
        // It was not begun to resume it.
        Err(e) if resume.is_some() => Ok(End::NotResumed(e)),
        ended => ended,
    }
}

/// As [`serve`]; what is to be done to resume the session is taken when it is done.
fn serve_or_resume(device: &Arc<Device>, vmm: UnixStream, resume: &mut Option<Resume>) -> io::Result<End> {
    let inner = device.inlet.connect()?;
    let backend = Backend::new(device.clone(), Farewell(inner.try_clone()?));
    let rings = backend.rings().clone();
    let result = converse(device, backend, vmm, &inner, resume);
    device.channel.close();
    // Rings and what they belong to hold one another: also after an error this is what lets go of them.
    rings.end();
    result
}

fn converse(
    device: &Device,
    backend: Backend,
    vmm: UnixStream,
    inner: &UnixStream,
    resume: &mut Option<Resume>,
) -> io::Result<End> {
    let rings = backend.rings().clone();
    let memory = GuestMemoryAtomic::new(GuestMemory::new());
    let daemon = rings.while_current(|| VhostUserDaemon::new("vhost-user".into(), backend, memory));
    let mut daemon = daemon.map_err(|e| io::Error::other(e.to_string()))?;
    daemon.start(&mut device.inlet.listener()?).map_err(|e| io::Error::other(e.to_string()))?;
    let limits = Limits {
        queues: device.queues.into(),
        queue_size: device.queue_size.into(),
        memory_regions: device.memory_regions,
    };
    let gate =
        inner.try_clone().and_then(|inner| Gate::new(vmm, inner, limits, rings, device.channel.clone()));
    let result = gate.and_then(|mut gate| match resume.take().map(|resume| resume(&mut gate)) {
        None => run(&mut gate, device),
        Some(Resumed::Here(begun)) => begun.and_then(|()| run(&mut gate, device)),
        Some(Resumed::NotHere(e)) => Ok(End::NotResumed(e)),
    });
    // The crate's thread ends with its socket; how it puts that does not matter.
    let _ = inner.shutdown(Shutdown::Both);
    if let Err(e) = daemon.wait() {
        log::debug!("the session's thread ended: {e}");
    }
    result
}

fn run(gate: &mut Gate, device: &Device) -> io::Result<End> {
    Ok(match gate.run(&device.boundary)? {
        Next::ThisProcess => End::Left,
        Next::Successor => End::Successor,
    })
}

/// Ends the gate's connection to the crate together with the crate's thread. A thread that panics leaves its
/// own end of it open, and the gate would wait for an answer for ever.
pub struct Farewell(UnixStream);

thread_local! {
    static FAREWELL: RefCell<Option<Farewell>> = const { RefCell::new(None) };
}

impl Farewell {
    /// This is the thread.
    pub fn at_the_end_of_this_thread(&self) {
        FAREWELL.with_borrow_mut(|farewell| {
            if farewell.is_none() {
                *farewell = self.0.try_clone().ok().map(Farewell);
            }
        });
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Where connected pairs of sockets come from, one end of which the crate gets out of a listener:
/// it takes nothing else. The listener's name is gone before this is made, so that nobody but
/// this process can connect.
pub struct Inlet {
    listener: UnixListener,
    /// The socket's file, which lives on without a name.
    file: File,
    /// How the file is named to connect.
    name: String,
}

impl Inlet {
    /// A listener that had the name `name` in `folder`, which must be nobody else's, for a moment.
    pub fn new(folder: &Path, name: &str) -> io::Result<Self> {
        let open = |flags, path: &Path| {
            OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW | flags).open(path)
        };
        // By way of the folder's descriptor, since the name of a socket is at most 107 bytes long.
        let folder = open(libc::O_DIRECTORY, folder)?;
        let name = format!("{}/{name}", by_descriptor(&folder));
        let _ = std::fs::remove_file(&name);
        let listener = spare::with(|| UnixListener::bind(&name))?;
        let file = open(0, name.as_ref());
        // This process may become another user; nobody else finds what has no name.
        let permitted = std::fs::set_permissions(&name, Permissions::from_mode(0o666));
        std::fs::remove_file(&name)?;
        permitted?;
        listener.set_nonblocking(true)?;
        let file = file?;
        Ok(Inlet { listener, name: by_descriptor(&file), file })
    }

    /// This inlet for a process whose working folder is the one of its descriptors, where the name is short.
    pub fn seen_from_descriptors(self) -> Self {
        Inlet { name: self.file.as_raw_fd().to_string(), ..self }
    }

    /// Connects; the other end is the only one that [`Inlet::listener`] has to give.
    fn connect(&self) -> io::Result<UnixStream> {
        // Left by a session that could not begin.
        while self.listener.accept().is_ok() {}
        UnixStream::connect(&self.name)
    }

    fn listener(&self) -> io::Result<Listener> {
        Ok(Listener::from(self.listener.try_clone()?))
    }
}

fn by_descriptor(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_thread_that_panics_ends_the_connection_that_it_was_to_serve() {
        let (mut gate, crates) = UnixStream::pair().unwrap();
        // Kept open all the time, as the crate does.
        let farewell = Farewell(gate.try_clone().unwrap());
        let served = |crash: bool| {
            farewell.at_the_end_of_this_thread();
            assert!(!crash, "on purpose");
        };
        assert!(std::thread::scope(|scope| scope.spawn(|| served(true)).join()).is_err());
        assert_eq!(gate.read(&mut [0]).unwrap(), 0);
        drop(crates);
    }

    #[test]
    fn pairs_come_without_a_name_however_long_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("x".repeat(200));
        std::fs::create_dir(&folder).unwrap();
        // A process that was killed between the two steps left its name.
        drop(UnixListener::bind(dir.path().join("inner.sock")).unwrap());
        std::fs::rename(dir.path().join("inner.sock"), folder.join("inner.sock")).unwrap();
        let inlet = Inlet::new(&folder, "inner.sock").unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        drop(inlet.connect().unwrap());
        for n in 0..3 {
            let mut ours = inlet.connect().unwrap();
            let mut theirs = inlet.listener.accept().unwrap().0;
            theirs.write_all(&[n]).unwrap();
            let mut byte = [9];
            ours.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [n]);
        }
    }
}
