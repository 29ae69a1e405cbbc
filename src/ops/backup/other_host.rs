//! A volume goes to another host, or comes from one, by a connection to that host: the user's own ssh, or
//! what somebody has made of standard input and output. The host that receives has a place of its own for it,
//! a folder of its store; otherwise the volume goes as by any place ([`super::send`], [`super::receive`]).

use super::receive::{self, Received, WantedReceive};
use super::{Session, Target};
use crate::backup::marks::{Marks, lock_file};
use crate::backup::moved;
use crate::backup::{self as place, BLOCKS, PAGES, PlaceId};
use crate::base::root::{Root, create_dir_durable, files, replace_file};
use crate::base::{Context, Error, Kind, Result};
use crate::disk::transfer::Watch;
use crate::helper::carry::Carrier;
use crate::helper::other_host::relay::Relay;
use crate::helper::other_host::server::Server;
use crate::kms::embedded::root_key::passphrase;
use crate::ops::Store;
use crate::place::{Access, PlaceUrl, Put};
use nix::fcntl::{FcntlArg, FdFlag, Flock, fcntl};
use std::cell::RefCell;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How often it is looked whether the other host has ended.
const LOOK: Duration = Duration::from_millis(50);
/// How long whoever has sent a volume may take to end the connection.
const TIME_TO_END: Duration = Duration::from_secs(60);
/// How long the other host may take to give up what was called off.
const TIME_TO_GIVE_UP: Duration = Duration::from_secs(5);

/// How the other host is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the user's ssh, which starts a command there.
    Ssh {
        /// Where: a host, or user@host, or what the user's settings of ssh call so.
        destination: String,
        /// The command, for the shell there.
        command: String,
    },
    /// By standard input and output.
    Standard,
}

/// A connection to a host that receives. When this is dropped, the connection ends.
pub(super) struct Connection {
    /// Goes first: with it goes what holds the streams.
    relay: Relay,
    ssh: Option<Ssh>,
    place: PlaceId,
}

/// The user's ssh, which ends with its streams.
struct Ssh(Child);

impl Drop for Ssh {
    fn drop(&mut self) {
        // The next command can begin there when this one is over.
        let begun = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) && begun.elapsed() < TIME_TO_GIVE_UP {
            std::thread::sleep(LOOK);
        }
    }
}

impl Connection {
    /// Makes one. The `secrets` are descriptors that programs of others have no use for. An error of `watch`
    /// ends the wait for the other host.
    ///
    /// # Errors
    /// `Other` if no sealblk receives there; `NotFound` without ssh.
    pub(super) fn open(root: &Root, way: &Way, secrets: &[OwnedFd], watch: Watch<'_>) -> Result<Self> {
        let (ssh, from, to) = match way {
            Way::Standard => {
                let (from, to) = standard()?;
                (None, from, to)
            }
            Way::Ssh { destination, command } => {
                let (ssh, from, to) = start_ssh(destination, command, secrets)?;
                (Some(Ssh(ssh)), from, to)
            }
        };
        let relay = Relay::start(root, from, to, &mut || watch(0, 0))?;
        let mut connection = Connection { relay, ssh, place: PlaceId(Uuid::nil()) };
        let mut carrier = Carrier::start(root, &connection.url(), &Access::default(), true)?;
        let file = place::place_file();
        // That host has one before it answers; whoever stands for it may have none.
        carrier.put(&file, &PlaceId::random().to_json(), Put::IfNew)?;
        let found = carrier.get(&file, place::PLACE_MAX)?.unwrap_or_default();
        connection.place = PlaceId::from_json(&found)?;
        Ok(connection)
    }

    /// The place there, for this process and those that it starts.
    pub(super) fn url(&self) -> PlaceUrl {
        PlaceUrl::Connection { socket: self.relay.socket(), place: self.place.0 }
    }

    /// Ends the connection, and waits until the other host has done what is left for it to do.
    pub(super) fn end(self) {
        let Connection { relay, ssh, .. } = self;
        drop(relay);
        let Some(mut ssh) = ssh else { return };
        match ssh.0.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => log::warn!(
                "the other host has the volume, and has not made it ready to be attached ({status}): look \
                 there"
            ),
            Err(e) => log::warn!("wait for ssh: {e}"),
        }
    }
}

/// Standard input and output, as a connection.
fn standard() -> Result<(OwnedFd, OwnedFd)> {
    use std::io::{IsTerminal, stdin, stdout};
    if stdin().is_terminal() || stdout().is_terminal() {
        let message = "standard input and output are to be a connection to the other host, both ways, and \
                       not a terminal; \"volume send --to ssh:HOST\" makes one";
        return Err(Error::new(Kind::Usage, message));
    }
    let copy = |fd: std::os::fd::BorrowedFd<'_>| {
        fd.try_clone_to_owned().context(|| "use standard input and output as a connection")
    };
    Ok((copy(stdin().as_fd())?, copy(stdout().as_fd())?))
}

fn start_ssh(destination: &str, command: &str, secrets: &[OwnedFd]) -> Result<(Child, OwnedFd, OwnedFd)> {
    let inherited_by_programs = |is: bool| {
        let flags = if is { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
        secrets.iter().try_for_each(|secret| fcntl(secret, FcntlArg::F_SETFD(flags)).map(drop))
    };
    let mut ssh = Command::new("ssh");
    // No terminal there: what is typed here is none of its business, and the streams carry bytes.
    ssh.args(["-T", "--", destination, command]).stdin(Stdio::piped()).stdout(Stdio::piped());
    inherited_by_programs(false).context(|| "keep secrets from ssh")?;
    let started = ssh.spawn();
    inherited_by_programs(true).context(|| "leave secrets to helpers")?;
    let mut child = started.map_err(|e| match e.kind() {
        ErrorKind::NotFound => Error::new(Kind::NotFound, "there is no program \"ssh\" on the search path"),
        _ => Error::from(e).context("start ssh"),
    })?;
    match (child.stdout.take(), child.stdin.take()) {
        (Some(from), Some(to)) => Ok((child, from.into(), to.into())),
        _ => Err(Error::new(Kind::Other, "ssh has no streams")),
    }
}

/// The folder in a store that volumes come to.
pub(crate) struct Arrivals(PathBuf);

impl Arrivals {
    /// That of the store at `root`.
    pub(crate) fn of(root: &Root) -> Self {
        Arrivals(root.path().join("arrivals"))
    }

    /// Its folder, which is a place.
    fn place(&self) -> PathBuf {
        self.0.join("place")
    }

    fn url(&self) -> PlaceUrl {
        PlaceUrl::Folder(self.place())
    }

    /// Makes the folder, and keeps others from it.
    ///
    /// # Errors
    /// `Busy` if another volume comes at this moment.
    fn take(&self) -> Result<Flock<File>> {
        create_dir_durable(&self.place())?;
        lock_file(&self.0.join("lock"), || {
            Error::new(Kind::Busy, "another volume is received by a connection at this moment")
        })
    }

    /// What came and is of no use any more: folders of objects. Nobody may be receiving.
    fn left(&self) -> Vec<PathBuf> {
        let all = [BLOCKS, PAGES, "snapshots", "leases"].map(|name| self.place().join(name));
        all.into_iter().filter(|path| files::exists(path)).collect()
    }

    /// What an interrupted command has left there, unless somebody is receiving.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn left_over(&self) -> Result<Vec<PathBuf>> {
        if !files::exists(&self.0) {
            return Ok(Vec::new());
        }
        match self.take() {
            Ok(_lock) => Ok(self.left()),
            Err(e) if e.kind() == Kind::Busy => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }

    /// Removes that. What is said there of volumes that have come stays: whoever has sent one may not have
    /// heard of it yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn clear(&self) -> Result<()> {
        if !files::exists(&self.0) {
            return Ok(());
        }
        match self.take() {
            Ok(_lock) => self.clear_taken(),
            Err(e) if e.kind() == Kind::Busy => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn clear_taken(&self) -> Result<()> {
        // The names first: without them the rest is nothing.
        let mut left = self.left();
        left.sort_by_key(|path| !path.ends_with("snapshots"));
        for path in left {
            // It follows no link.
            std::fs::remove_dir_all(&path).context(|| format!("remove {}", path.display()))?;
        }
        let marks = Marks::of(&self.url())?;
        marks.all()?.into_iter().try_for_each(|id| marks.forget(id).map(drop))
    }

    /// Begins the place, or puts its id right: no other host may do so.
    fn begin(&self) -> Result<()> {
        let path = self.place().join(place::place_file().as_str());
        let known = Marks::of(&self.url())?.place()?;
        let found = files::read(&path, place::PLACE_MAX as u64).ok();
        match found.and_then(|bytes| PlaceId::from_json(&bytes).ok()) {
            Some(id) if known.is_none_or(|known| known == id) => Ok(()),
            _ => replace_file(&path, &known.unwrap_or_else(PlaceId::random).to_json()),
        }
    }
}

/// Receives a volume by standard input and output. Otherwise as [`receive::receive`].
///
/// # Errors
/// As for that; `Busy` if another volume is received so; `Other` if the connection ends too soon.
pub fn receive(store: &Store, wanted: &WantedReceive, watch: Watch<'_>) -> Result<Received> {
    let _passphrase = passphrase::inherited_descriptors().map_err(Error::from)?;
    let arrivals = Arrivals::of(store.root());
    let lock = arrivals.take()?;
    let streams = standard()?;
    let target = Target { url: arrivals.url(), access: Access::default(), rate: 0 };
    arrivals.begin()?;
    receive::call_off_all(store, &target)?;
    let (folder, reserve) = (arrivals.place(), wanted.budget.reserve);
    let (root, called_off) = (store.root(), moved::WITHDRAWN);
    let server = Server::start(root, &folder, reserve, called_off, streams, &mut || watch(0, 0))?;
    let server = RefCell::new(server);
    let is_there = || match server.borrow_mut().is_there() {
        true => Ok(()),
        false => Err(Error::new(Kind::Other, "the other host has ended the connection; the volume is there")),
    };
    let received = receive::receive_by(store, &target, wanted, &is_there, watch)?;
    // The other host ends it, when it knows that the volume is here.
    let begun = Instant::now();
    while server.borrow_mut().is_there() && begun.elapsed() < TIME_TO_END {
        watch(0, 0)?;
        std::thread::sleep(LOOK);
    }
    drop(server);
    if let Err(e) = arrivals.clear_taken() {
        log::warn!("{e}; \"sealblk gc\" tries again");
    }
    drop(lock);
    Ok(received)
}

/// What this host noted of the snapshots of a volume that another host has now: they are of no use any more.
pub(super) fn forget(session: &Session, snapshots: &[crate::catalog::SnapshotId]) {
    for id in snapshots {
        if let Err(e) = session.marks.forget(*id) {
            log::warn!("{e}");
        }
    }
}
