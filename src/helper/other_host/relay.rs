//! The relay: the process that has the connection to the other host, and passes on what processes of this
//! host ask of the place there. Each of them connects to a socket in a folder that its user alone can enter,
//! and is to them what a carrier is.
//!
//! Requests of all of them go over the one connection, under numbers of the relay's own. Answers
//! are read by one thread, which waits for nobody but the process that an answer is for: that one
//! reads what it asked for.

use super::{Running, Wait, begin, greet, say};
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::{Context, Error, Kind, Result};
use crate::helper::carry::{Answer, Request, failed, receive, send};
use crate::sandbox;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use uuid::Uuid;

/// The hidden subcommand.
pub const COMMAND: &str = "relay";

/// What a relay is told first. The connection comes with it, and the socket that others connect to.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Begin {}

/// A relay, for the process that started it. It ends, and with it the connection, when this is dropped.
pub(crate) struct Relay {
    _running: Running,
    folder: Folder,
}

/// The folder of the socket, which is removed in the end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            log::warn!("{} is left: {e}", self.0.display());
        }
    }
}

impl Relay {
    /// Starts a relay over the connection of these two streams. Returns when the other host has answered.
    ///
    /// # Errors
    /// `Other` if no sealblk answers there; those of the system, and of `wait`.
    pub(crate) fn start(root: &Root, from: OwnedFd, to: OwnedFd, wait: Wait<'_>) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("sealblk-{}", Uuid::new_v4().simple()));
        // It fails if there is anything of that name, whoever made it.
        DirBuilder::new().mode(0o700).create(&path).context(|| format!("make {}", path.display()))?;
        let folder = Folder(path);
        let socket = folder.0.join(SOCKET);
        let listener = UnixListener::bind(&socket).context(|| format!("make {}", socket.display()))?;
        let descriptors = [from.as_fd(), to.as_fd(), listener.as_fd()];
        let running = Running::start(root, COMMAND, &Begin {}, &descriptors, wait)?;
        Ok(Relay { _running: running, folder })
    }

    /// The socket that others connect to.
    pub(crate) fn socket(&self) -> PathBuf {
        Path::join(&self.folder.0, SOCKET)
    }
}

/// The socket's name in its folder.
const SOCKET: &str = "relay.sock";

/// The relay's side: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(_: Hardened, _: &Root) -> Result<()> {
    let (socket, Begin {}, [from, to, listener]) = begin()?;
    let (from, to) = (File::from(from), File::from(to));
    let ready = sandbox::confine_carrier(&[], false).and_then(|_| greet(&from, &to));
    if !say(&socket, &ready)? {
        return Ok(());
    }
    let shared = Arc::new(Shared { to: Mutex::new(to), waiting: Mutex::default() });
    let (listener, accepting) = (UnixListener::from(listener), shared.clone());
    let accept = move || {
        for client in listener.incoming() {
            let shared = accepting.clone();
            let serve = move || client.map_err(Error::from).and_then(|client| shared.pass_on(&client));
            let started = std::thread::Builder::new().name("client".into()).spawn(move || {
                if let Err(e) = serve() {
                    log::warn!("a process that asked the other host: {e}");
                }
            });
            if let Err(e) = started {
                log::warn!("start a thread: {e}");
            }
        }
    };
    std::thread::Builder::new().name("clients".into()).spawn(accept)?;
    let why = shared.hear_all(&from);
    // Who has the volume ends this process first; so this is too soon.
    log::warn!("{why}");
    shared.end(&why);
    Ok(())
}

/// Whose answer it is: that of a request of this number of a process that listens there.
type Asked = (Arc<Mutex<UnixStream>>, u64);

/// What the relay's threads share.
struct Shared {
    to: Mutex<File>,
    waiting: Mutex<Waiting>,
}

/// Requests whose answers have not come, by the relay's own numbers.
#[derive(Default)]
struct Waiting {
    next: u64,
    asked: HashMap<u64, Asked>,
    /// Nothing comes any more.
    is_over: bool,
}

impl Shared {
    /// Passes on what one process asks, until it asks no more.
    fn pass_on(&self, client: &UnixStream) -> Result<()> {
        let answers = Arc::new(Mutex::new(client.try_clone()?));
        while let Some((Request { number, what }, bytes)) = receive(client)? {
            let ours = {
                let mut waiting = self.waiting.locked();
                if waiting.is_over {
                    return Ok(());
                }
                let ours = waiting.next;
                waiting.next += 1;
                waiting.asked.insert(ours, (answers.clone(), number));
                ours
            };
            // One message after the other, each whole.
            send(&*self.to.locked(), &Request { number: ours, what }, &bytes)?;
        }
        Ok(())
    }

    /// Gives each answer to whoever waits for it. Returns why there are no more.
    fn hear_all(&self, from: &File) -> Error {
        loop {
            let (Answer { number, outcome }, bytes) = match receive::<Answer>(from) {
                Ok(Some(answer)) => answer,
                Ok(None) => return Error::new(Kind::Other, "the other host has ended the connection"),
                Err(e) => return e.context("what the other host says"),
            };
            let asked = self.waiting.locked().asked.remove(&number);
            let Some((client, number)) = asked else {
                return Error::new(Kind::Other, "the other host answers what nobody has asked");
            };
            // Whoever has asked may be gone.
            let _ = send(&*client.locked(), &Answer { number, outcome }, &bytes);
        }
    }

    /// Tells all who wait that nothing comes any more, and why.
    fn end(&self, why: &Error) {
        let left = {
            let mut waiting = self.waiting.locked();
            waiting.is_over = true;
            std::mem::take(&mut waiting.asked)
        };
        for (client, number) in left.into_values() {
            let _ = send(&*client.locked(), &Answer { number, outcome: failed(why) }, &[]);
        }
    }
}
