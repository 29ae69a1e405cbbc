//! The server of a place: the process that has the connection to the other host, and the folder into which
//! that host brings a volume. It knows no more of what the objects mean than a carrier does: but it knows
//! their names, and does what somebody asks who brings a volume, and nothing else. So what comes lies where
//! it is cleared away, and nobody takes away what the place says of other volumes.

use super::{Running, Wait, begin, greet, say};
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::space::{Reserve, Shortage, Space};
use crate::base::{Context, Error, Kind, Result, size};
use crate::catalog::SnapshotId;
use crate::helper::carry::{Answer, Outcome, Request, What, answer, failed, receive, send};
use crate::place::{Access, ObjectName, Place, PlaceUrl, Put};
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
    /// What the other host may say in `moves/`, and nothing else.
    called_off: Vec<u8>,
}

/// A server, for the process that started it. It ends with the connection, or when this is dropped.
pub(crate) struct Server(Running);

impl Server {
    /// Has the other host, at the end of these two streams, use `folder` as a place that is begun. It may say
    /// there that a volume is `called_off`, by these bytes. Returns when that host has answered.
    ///
    /// # Errors
    /// `Other` if no sealblk answers there; those of the system, and of `wait`.
    pub(crate) fn start(
        root: &Root,
        folder: &Path,
        reserve: Reserve,
        called_off: &[u8],
        (from, to): (OwnedFd, OwnedFd),
        wait: Wait<'_>,
    ) -> Result<Self> {
        let begin = Begin { folder: folder.to_owned(), reserve, called_off: called_off.to_owned() };
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
    let (socket, Begin { folder, reserve, called_off }, [from, to]) = begin()?;
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
        let done = check_what(&what, &bytes, &called_off)
            .and_then(|()| check_space(&folder, reserve, &what, &bytes))
            .and_then(|()| answer(&mut *way, what, bytes));
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

/// Whether it is something that whoever brings a volume asks.
fn check_what(what: &What, bytes: &[u8], called_off: &[u8]) -> Result<()> {
    let (is_good, name) = match what {
        What::Get { name, .. } | What::Exists { name } => (Object::of(name).is_some(), name),
        What::List { folder } => (matches!(folder.as_str(), "snapshots" | "leases"), folder),
        What::Put { name, put } => {
            let is_good = match Object::of(name) {
                Some(Object::Brought | Object::OfThisConnection) => true,
                // It is there, and stays.
                Some(Object::Place) => *put == Put::IfNew,
                Some(Object::Move) => *put == Put::IfNew && bytes == called_off,
                None => false,
            };
            (is_good, name)
        }
        What::Remove { name } => (matches!(Object::of(name), Some(Object::OfThisConnection)), name),
        What::Sync => return Ok(()),
    };
    match is_good {
        true => Ok(()),
        false => {
            let message = format!("the host that receives it lets nobody do that with the object {name}");
            Err(Error::new(Kind::Refused, message))
        }
    }
}

/// What an object is, by its name.
enum Object {
    /// What tells this place from another.
    Place,
    /// Ciphertext, which goes when the volume has come.
    Brought,
    /// What is only of use during a connection, and may be taken back.
    OfThisConnection,
    /// Whether a volume has come: of this connection, or of an earlier one.
    Move,
}

impl Object {
    /// None for a name that nothing has which belongs to a volume.
    fn of(name: &ObjectName) -> Option<Self> {
        let parts: Vec<&str> = name.as_str().split('/').collect();
        match parts[..] {
            ["place.json"] => Some(Object::Place),
            ["blocks" | "pages", first, digits] => {
                let is_it = first.len() == 2 && digits.len() == 64 && digits.starts_with(first);
                is_it.then_some(Object::Brought)
            }
            ["snapshots", file] => {
                let id = file.strip_suffix(".json")?.parse::<SnapshotId>();
                id.ok().map(|_| Object::OfThisConnection)
            }
            ["leases", _] => Some(Object::OfThisConnection),
            ["moves", id] => id.parse::<SnapshotId>().ok().map(|_| Object::Move),
            _ => None,
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_brings_a_volume_does_that_and_nothing_else() {
        let (id, digits) = (SnapshotId::random(), "0a".repeat(32));
        let name = |text: String| ObjectName::new(text).unwrap();
        let block = || name(format!("blocks/0a/{digits}"));
        let (manifest, moves) = (|| name(format!("snapshots/{id}.json")), || name(format!("moves/{id}")));
        let lease = || name("leases/push-x".into());
        let place = || name("place.json".into());
        let is_done = |what: What, bytes: &[u8]| check_what(&what, bytes, b"called off").is_ok();
        let put = |name, put, bytes: &[u8]| is_done(What::Put { name, put }, bytes);
        for name in [block(), manifest(), lease()] {
            assert!(put(name, Put::Replace, b"any"));
        }
        assert!(put(place(), Put::IfNew, b"any") && put(moves(), Put::IfNew, b"called off"));
        assert!(is_done(What::Get { name: moves(), max: 9 }, b"") && is_done(What::Sync, b""));
        assert!(
            is_done(What::Remove { name: lease() }, b"") && is_done(What::Remove { name: manifest() }, b"")
        );
        assert!(is_done(What::List { folder: name("leases".into()) }, b""));
        assert!(!put(place(), Put::Replace, b"any") && !put(moves(), Put::Replace, b"called off"));
        assert!(!put(moves(), Put::IfNew, b"received"));
        for kept in [place(), moves(), block()] {
            assert!(!is_done(What::Remove { name: kept }, b""));
        }
        for other in
            ["a", "blocks/0b/00", "blocks/a", "place.json/a", "moves/a", "snapshots/a.json", "kms/a.log"]
        {
            assert!(!put(name(other.into()), Put::IfNew, b"called off"), "{other}");
            assert!(!is_done(What::Exists { name: name(other.into()) }, b""), "{other}");
            assert!(!is_done(What::List { folder: name(other.into()) }, b""), "{other}");
        }
    }
}
