//! The dialler: a helper process that connects to NBD servers for the host process, which is confined and
//! cannot.
//!
//! It has no key and sees no data. The host process names the exports of its volume at the beginning, and
//! then one of them at a time, by its number. It gets what was agreed on with the server, and the connection.
//! So what a server says before it serves an export is read by this process alone, which is confined as well:
//! to sockets of this machine. It ends with the host process.

use crate::backing::nbd::{Address, Server, Terms, dial, handshake};
use crate::base::child;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::sandbox::{self, Access, Rule};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::Mutex;
use std::time::Duration;

/// The hidden subcommand.
pub const COMMAND: &str = "dial-nbd";
/// The longest line in bytes: addresses have up to 13 KiB, and a volume has up to 256 layers.
const MAX_LINE: usize = 4 << 20;
/// What the dialler may take beside the server's time.
const MARGIN: Duration = Duration::from_secs(20);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Answer {
    /// The connection comes with this.
    Connected(Terms),
    /// There is none, and why.
    Failed(String),
}

/// Starts a dialler for these exports. From now on, and for good, it makes this process's connections. What
/// it has to say goes to `log`, if that is not this process's standard error, which somebody may wait for.
///
/// # Errors
/// What keeps it from being started.
pub fn start(root: &Root, addresses: Vec<Address>, log: Option<BorrowedFd<'_>>) -> Result<()> {
    let log = log.map(|log| log.try_clone_to_owned()).transpose()?;
    let (socket, child) = child::spawn_lasting(root, COMMAND, |program| {
        if let Some(log) = log {
            program.stderr(log);
        }
    })?;
    socket.set_read_timeout(Some(dial::TIME + MARGIN))?;
    let attempt = || format!("tell the {COMMAND} helper which exports there are");
    wire::say(&socket, &addresses).context(attempt)?;
    // It is confined when it answers.
    let ready = wire::hear(&socket, MAX_LINE).context(attempt)?;
    if ready.is_none() {
        return Err(Error::new(Kind::Other, "it has ended").context(attempt()));
    }
    let dialler = Mutex::new(Dialler { socket, _child: child });
    dial::make_by(Box::new(move |server| {
        let number = addresses.iter().position(|known| known.server() == Some(server));
        let unknown = || io::Error::new(io::ErrorKind::PermissionDenied, "it is no export of this volume");
        dialler.locked().connect(number.ok_or_else(unknown)?)
    }));
    Ok(())
}

struct Dialler {
    socket: UnixStream,
    /// It ends by itself, with this process.
    _child: Child,
}

impl Dialler {
    fn connect(&self, number: usize) -> io::Result<(UnixStream, Terms)> {
        let answer = self.ask(number);
        if answer.is_err() {
            // What it says from now on could be the answer to this.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
        match answer? {
            (Answer::Connected(terms), Some(connection)) => Ok((UnixStream::from(connection), terms)),
            (Answer::Connected(_), None) => Err(io::Error::other("no connection came with the answer")),
            (Answer::Failed(why), _) => Err(io::Error::other(why)),
        }
    }

    fn ask(&self, number: usize) -> io::Result<(Answer, Option<OwnedFd>)> {
        wire::say(&self.socket, &number)?;
        let mut lines = Lines::of_at_most(MAX_LINE);
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, format!("the {COMMAND} helper has ended"));
        let line = lines.next(&self.socket)?.ok_or_else(gone)?;
        Ok((serde_json::from_slice(&line)?, lines.take_descriptor()))
    }
}

/// The dialler's side: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(_: Hardened) -> Result<()> {
    let socket = child::begin()?;
    let mut lines = Lines::of_at_most(MAX_LINE);
    let alone = || "take a request: this command is started by \"sealblk attach\" alone";
    let none = || Error::new(Kind::Usage, "there is none");
    let addresses = lines.next(&socket).context(alone)?.ok_or_else(none)?;
    let addresses: Vec<Address> =
        serde_json::from_slice(&addresses).map_err(io::Error::from).context(alone)?;
    // Where there is none yet, it is going to be made for whoever this process is.
    let sockets = addresses.iter().filter_map(Address::server).map(Server::socket);
    let sockets = sockets.filter(|socket| socket.exists());
    let sockets: Vec<Rule> = sockets.map(|socket| Rule::new(socket, Access::Write)).collect();
    let confinement = sandbox::confine_dialler(&sockets)?;
    log::debug!("the process that connects to NBD servers is confined: {confinement}");
    wire::say(&socket, &"ready")?;
    while let Some(line) = lines.next(&socket)? {
        let number: usize = serde_json::from_slice(&line).map_err(io::Error::from).context(alone)?;
        let server = addresses.get(number).and_then(Address::server).ok_or_else(none)?;
        match handshake::connect_to(server, dial::TIME) {
            Ok((connection, terms)) => {
                wire::say_with(&socket, &Answer::Connected(terms), connection.as_fd())?;
            }
            Err(e) => wire::say(&socket, &Answer::Failed(e.to_string()))?,
        }
    }
    Ok(())
}
