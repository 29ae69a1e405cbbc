//! The control socket of an attached volume, in the volume's folder, which only its owner can enter.
//!
//! A client sends one line of JSON and gets one back. The connection of a `detach` is answered when everything is
//! over, so that whoever asked knows.

use super::socket::{self, SocketName};
use crate::error::{Context, Error, Kind, Result};
use crate::vhost::qos::Limits;
use crate::volume::VolumeId;
use crate::volume::catalog::Catalog;
use crate::volume::lock::{Held, Holder, Purpose};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The socket's name in the volume's folder.
const FILE: &str = "control.sock";
/// The longest line in bytes.
const MAX_LINE: u64 = 4096;
/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    // With braces: serde would take unknown fields otherwise.
    Detach {},
    Throttle { iops: u64, throughput: u64, burst_ms: u64 },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Detached,
    Throttled,
    Failed { kind: String, message: String },
}

/// What clients can ask for. Neither may block.
pub struct Orders {
    /// End the attachment.
    pub detach: Box<dyn Fn() + Send>,
    /// Put other limits in force.
    pub throttle: Box<dyn Fn(Limits) + Send>,
}

/// The host process's end.
pub struct Control {
    name: SocketName,
    waiting: Waiting,
}

/// The clients that wait for the detach.
#[derive(Clone, Default)]
pub struct Waiting(Arc<Mutex<Vec<UnixStream>>>);

/// A control socket that nobody answers yet.
pub struct Bound {
    listener: UnixListener,
    name: SocketName,
}

impl Bound {
    /// Passes on what clients ask for.
    pub fn serve(self, orders: Orders) -> Result<Control> {
        let waiting = Waiting::default();
        let (listener, register) = (self.listener, waiting.clone());
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || serve(&listener, &register, &orders))
            .context(|| "start the control thread")?;
        Ok(Control { name: self.name, waiting })
    }
}

impl Control {
    /// Listens in `folder`. Only while the process has one thread.
    pub fn bind(folder: &Path) -> Result<Bound> {
        // The path of a socket is at most 107 bytes long; the store's may be longer. Seen from the folder it is
        // short.
        let (listener, name) = in_folder(folder, || socket::listen(Path::new(FILE)))?;
        Ok(Bound { listener, name: name.moved_to(folder) })
    }

    /// Removes the socket's name, so that the next attach can have it, and answers who is to be told.
    pub fn close(self) -> Waiting {
        drop(self.name);
        self.waiting
    }
}

impl Waiting {
    fn add(&self, client: UnixStream) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(client);
    }

    /// Tells those who asked for the detach how it went.
    pub fn tell(self, result: &Result<()>) {
        let answer = match result {
            Ok(()) => Answer::Detached,
            Err(e) => Answer::Failed { kind: e.kind().name().into(), message: e.to_string() },
        };
        for client in self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A client that has gone does not want to know.
            let _ = say(&client, &answer);
        }
    }
}

fn serve(listener: &UnixListener, waiting: &Waiting, orders: &Orders) {
    loop {
        match listener.accept() {
            Ok((client, _)) => match hear::<Request>(&client) {
                Ok(Request::Detach {}) => {
                    log::info!("a client asks for the detach");
                    waiting.add(client);
                    (orders.detach)();
                }
                Ok(Request::Throttle { iops, throughput, burst_ms }) => {
                    let limits = Limits { iops, throughput, burst: Duration::from_millis(burst_ms) };
                    log::info!("a client sets {limits:?}");
                    (orders.throttle)(limits);
                    let _ = say(&client, &Answer::Throttled);
                }
                Err(e) => {
                    let answer = Answer::Failed { kind: e.kind().name().into(), message: e.to_string() };
                    let _ = say(&client, &answer);
                }
            },
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
            Err(e) => return log::error!("the control socket: {e}; signals still work"),
        }
    }
}

/// Asks the process that has `volume` attached to let it go, and waits until it has.
pub fn detach(catalog: &Catalog, volume: VolumeId) -> Result<()> {
    ask(catalog, volume, &Request::Detach {}).context(|| format!("detach {volume}"))
}

/// Puts other limits on `volume` in force, which is attached.
pub fn throttle(catalog: &Catalog, volume: VolumeId, limits: Limits) -> Result<()> {
    let burst_ms = limits.burst.as_millis() as u64;
    let request = Request::Throttle { iops: limits.iops, throughput: limits.throughput, burst_ms };
    ask(catalog, volume, &request).context(|| format!("throttle {volume}"))
}

fn ask(catalog: &Catalog, volume: VolumeId, request: &Request) -> Result<()> {
    let holder = match catalog.held(volume)? {
        Held::By(holder) if holder.purpose == Purpose::Attach => holder,
        Held::Free => return Err(Error::new(Kind::NotFound, "it is not attached")),
        other => return Err(crate::volume::lock::busy(volume, &other)),
    };
    let client = in_folder(&catalog.folder(volume), || Ok(UnixStream::connect(FILE)?));
    let client = client.map_err(|e| not_reached(&holder, &e))?;
    say(&client, request)?;
    let mut line = String::new();
    BufReader::new(&client).take(MAX_LINE).read_line(&mut line)?;
    match serde_json::from_str(&line) {
        Ok(Answer::Detached | Answer::Throttled) => Ok(()),
        Ok(Answer::Failed { kind, message }) => Err(Error::new(Kind::from_name(&kind), message)),
        Err(_) => {
            let message = format!("process {} ended without a word; look at its log", holder.pid);
            Err(Error::new(Kind::Other, message))
        }
    }
}

fn not_reached(holder: &Holder, e: &Error) -> Error {
    let message = format!(
        "process {} has it, but its control socket does not answer ({e}); SIGTERM ends it too",
        holder.pid
    );
    Error::new(Kind::Other, message)
}

fn hear<T: for<'de> Deserialize<'de>>(client: &UnixStream) -> Result<T> {
    client.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(client).take(MAX_LINE).read_line(&mut line)?;
    serde_json::from_str(&line).map_err(|e| Error::new(Kind::Usage, e.to_string()))
}

fn say(mut client: &UnixStream, what: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(what).map_err(|e| Error::new(Kind::Other, e.to_string()))?;
    line.push(b'\n');
    Ok(client.write_all(&line)?)
}

/// Runs `f` with `folder` as the working folder. Only while the process has one thread.
fn in_folder<T>(folder: &Path, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = std::env::current_dir().context(|| "find the working folder")?;
    std::env::set_current_dir(folder).context(|| format!("enter {}", folder.display()))?;
    let result = f();
    std::env::set_current_dir(&before).context(|| format!("go back to {}", before.display()))?;
    result
}
