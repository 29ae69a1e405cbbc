//! The server of a place: the process that has the connection to the other host, and the folder into which
//! that host brings a volume. It knows no more of what the objects mean than a carrier does.

use super::{Running, Wait, begin, greet, say};
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::space::{Reserve, Shortage, Space};
use crate::base::{Context, Error, Kind, Result, size};
use crate::helper::carry::{Answer, Outcome, Request, What, answer, failed, receive, send};
use crate::place::{Access, Place, PlaceUrl};
use crate::sandbox::{self, Rule};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The hidden subcommand.
pub const COMMAND: &str = "serve-place";

/// What a server is told first. The connection comes with it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Begin {
    folder: PathBuf,
    /// What is left free of the file system.
    reserve: Reserve,
}

/// A server, for the process that started it. It ends with the connection, or when this is dropped.
pub(crate) struct Server(Running);

impl Server {
    /// Has the other host, at the end of these two streams, use `folder` as a place. Returns when that host
    /// has answered.
    ///
    /// # Errors
    /// `Other` if no sealblk answers there; those of the system, and of `wait`.
    pub(crate) fn start(
        root: &Root,
        folder: &Path,
        reserve: Reserve,
        (from, to): (OwnedFd, OwnedFd),
        wait: Wait<'_>,
    ) -> Result<Self> {
        let begin = Begin { folder: folder.to_owned(), reserve };
        Running::start(root, COMMAND, &begin, &[from.as_fd(), to.as_fd()], wait).map(Server)
    }

    /// Whether the connection is still there.
    pub(crate) fn is_there(&mut self) -> bool {
        self.0.is_there()
    }
}

/// The server's side: the whole life of the process.
///
/// # Errors
/// Those of the connection, in the middle of a message; when the other side could not even be told.
pub fn help(_: Hardened, _: &Root) -> Result<()> {
    let (socket, Begin { folder, reserve }, [from, to]) = begin()?;
    let (from, to) = (File::from(from), File::from(to));
    let mut way = None;
    let ready = open(&folder).and_then(|place| {
        way = Some(place.open()?);
        greet(&from, &to)
    });
    if !say(&socket, &ready)? {
        return Ok(());
    }
    let Some(mut way) = way else { return Ok(()) };
    while let Some((Request { number, what }, bytes)) = receive(&from).context(|| "hear the other host")? {
        let done = check_space(&folder, reserve, &what, &bytes).and_then(|()| answer(&mut *way, what, bytes));
        let (outcome, bytes) = match done {
            Ok((found, bytes)) => (Outcome::Done(found), bytes),
            Err(e) => (failed(&e), Vec::new()),
        };
        send(&to, &Answer { number, outcome }, &bytes).context(|| "answer the other host")?;
    }
    Ok(())
}

/// The place in a folder, for a process that reaches nothing else from now on.
fn open(folder: &Path) -> Result<Place> {
    let place = Place::prepare(&PlaceUrl::Folder(folder.to_owned()), &Access::default())?;
    let confinement = sandbox::confine_carrier(&[Rule::new(folder, sandbox::Access::Tree)], false)?;
    log::debug!("the server of {} is confined: {confinement}", folder.display());
    Ok(place)
}

/// Whether there is space for what is to be put, with what is to be left free.
fn check_space(folder: &Path, reserve: Reserve, what: &What, bytes: &[u8]) -> Result<()> {
    if !matches!(what, What::Put { .. }) {
        return Ok(());
    }
    let space = Space::at(folder)?;
    match space.and_then(|space| Shortage::of(&space, reserve, bytes.len() as u64)) {
        None => Ok(()),
        Some(Shortage { free, reserve }) => Err(Error::new(
            Kind::NoSpace,
            format!(
                "the host that receives it has {} free, and leaves {} free (space-reserve)",
                size::about(free),
                size::about(reserve)
            ),
        )),
    }
}
