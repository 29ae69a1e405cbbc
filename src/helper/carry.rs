//! The carrier: a process of its own that brings ciphertext to a place outside and back ([`crate::place`]).
//!
//! The carrier has no key: no store's, no data key, no root key, and nothing that follows from one. It
//! handles bytes and opaque names. Once it knows how the place is reached it is confined: to the folder of
//! the place, or to the network and the files that names and credentials are looked up in. Whoever started
//! it, and knows what the bytes are, has no network by then.
//!
//! The two sides share a socket, the carrier's standard input. A message is two numbers, four bytes
//! each, least significant first: how long its JSON is, and how many bytes follow that. Requests have a
//! number, by which their answers are known: several can be under way. Answers to what is put are short,
//! and requests for what is got: so neither side waits for the other to read, as long as the two kinds
//! are not under way together.

use crate::base::child;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::place::{Access, Listed, MAX_LEN, ObjectName, Objects, Place, PlaceUrl, Put};
#[cfg(feature = "object-store")]
use crate::sandbox::stranger;
use crate::sandbox::{self, Rule};
use nix::unistd::{AccessFlags, access};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::{Read, Write};
#[cfg(feature = "object-store")]
use std::net::ToSocketAddrs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
#[cfg(feature = "object-store")]
use std::path::PathBuf;
use std::process::Child;
use std::sync::Mutex;
use std::time::Duration;

/// The hidden subcommand.
pub const COMMAND: &str = "carry";
/// The hidden subcommand of the process that starts carriers for one that could not any more.
pub const STARTER: &str = "start-carriers";
/// The longest JSON of a message, in bytes.
const MAX_HEADER: usize = 64 << 10;
/// How long an answer is waited for. The place's own patience is shorter.
const TIME: Duration = Duration::from_secs(600);
/// Requests under way at a time, at most.
const WINDOW: usize = 16;

/// What a carrier is told first.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Begin {
    url: PlaceUrl,
    access: Access,
    writes: bool,
}

/// What is asked of a place.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Request {
    /// By which its answer is known.
    pub(super) number: u64,
    pub(super) what: What,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum What {
    Get {
        name: ObjectName,
        max: usize,
    },
    Exists {
        name: ObjectName,
    },
    /// The object comes with it.
    Put {
        name: ObjectName,
        put: Put,
    },
    List {
        folder: ObjectName,
    },
    Remove {
        name: ObjectName,
    },
    Sync,
}

/// The answer to a request.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Answer {
    pub(super) number: u64,
    pub(super) outcome: Outcome,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    /// It was done; and whether there was such an object, or whether it was put.
    Done(bool),
    /// The name of the error's kind, and its words.
    Failed(String, String),
}

/// The carrier, for the process that started it.
pub struct Carrier {
    socket: UnixStream,
    /// None where a process that others use as well has the way to the place ([`super::relay`]), or where
    /// another one has started the carrier ([`Carriers`]).
    child: Option<Child>,
    /// What is at the other end of the socket.
    who: &'static str,
    next: u64,
    /// Requests whose answers have not come.
    under_way: usize,
    /// Answers that nobody has waited for yet.
    come: HashMap<u64, (Outcome, Vec<u8>)>,
}

/// A request whose answer is still to be waited for.
#[must_use = "whether it was done shows when it is waited for"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnderWay(u64);

impl Carrier {
    /// Starts a carrier to the place at `url`, which puts and removes objects there if it `writes`.
    ///
    /// # Errors
    /// Those of reaching the place; `NotFound` for a folder that is not there.
    pub fn start(root: &Root, url: &PlaceUrl, access: &Access, writes: bool) -> Result<Self> {
        if let PlaceUrl::Connection { socket, .. } = url {
            let attempt = || "reach the process that has the connection to the other host";
            let socket = UnixStream::connect(socket).context(attempt)?;
            socket.set_read_timeout(Some(TIME))?;
            let who = "the connection to the other host";
            return Ok(Carrier { socket, child: None, who, next: 1, under_way: 0, come: HashMap::new() });
        }
        let (socket, child) = child::spawn(root, COMMAND)?;
        let (child, who, come) = (Some(child), "the carrier", HashMap::new());
        let mut carrier = Carrier { socket, child, who, next: 0, under_way: 0, come };
        carrier.socket.set_read_timeout(Some(TIME))?;
        let begin = Begin { url: url.clone(), access: access.clone(), writes };
        send(&carrier.socket, &begin, &[]).context(|| "tell the carrier where to go")?;
        carrier.under_way = 1;
        carrier.next = 1;
        carrier.wait(UnderWay(0)).context(|| format!("reach {url}"))?;
        Ok(carrier)
    }

    /// The object of that name, of at most `max` bytes; none if there is none.
    pub(crate) fn get(&mut self, name: &ObjectName, max: usize) -> Result<Option<Vec<u8>>> {
        let under_way = self.begin_get(name, max)?;
        self.got(under_way)
    }

    /// Begins to get an object; [`Carrier::got`] has it.
    pub(crate) fn begin_get(&mut self, name: &ObjectName, max: usize) -> Result<UnderWay> {
        self.begin(What::Get { name: name.clone(), max: max.min(MAX_LEN) }, &[])
    }

    /// Waits for an object.
    pub(crate) fn got(&mut self, under_way: UnderWay) -> Result<Option<Vec<u8>>> {
        let (found, bytes) = self.wait(under_way)?;
        Ok(found.then_some(bytes))
    }

    /// Whether there is an object of that name.
    pub(crate) fn exists(&mut self, name: &ObjectName) -> Result<bool> {
        let under_way = self.begin(What::Exists { name: name.clone() }, &[])?;
        Ok(self.wait(under_way)?.0)
    }

    /// Puts an object. Returns whether it was put: one that is there may be in the way.
    pub(crate) fn put(&mut self, name: &ObjectName, bytes: &[u8], put: Put) -> Result<bool> {
        let under_way = self.begin_put(name, bytes, put)?;
        Ok(self.wait(under_way)?.0)
    }

    /// Begins to put an object.
    pub(crate) fn begin_put(&mut self, name: &ObjectName, bytes: &[u8], put: Put) -> Result<UnderWay> {
        self.begin(What::Put { name: name.clone(), put }, bytes)
    }

    /// The objects right in a folder, sorted by name.
    pub(crate) fn list(&mut self, folder: &ObjectName) -> Result<Vec<Listed>> {
        let under_way = self.begin(What::List { folder: folder.clone() }, &[])?;
        let (_, bytes) = self.wait(under_way)?;
        let mut listed: Vec<Listed> = parse(&bytes)?;
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(listed)
    }

    /// Removes an object.
    pub(crate) fn remove(&mut self, name: &ObjectName) -> Result<()> {
        let under_way = self.begin(What::Remove { name: name.clone() }, &[])?;
        self.wait(under_way).map(drop)
    }

    /// Begins to remove an object.
    pub(crate) fn begin_remove(&mut self, name: &ObjectName) -> Result<UnderWay> {
        self.begin(What::Remove { name: name.clone() }, &[])
    }

    /// Makes durable what was put.
    pub(crate) fn sync(&mut self) -> Result<()> {
        let under_way = self.begin(What::Sync, &[])?;
        self.wait(under_way).map(drop)
    }

    /// Waits until a request was done; for a put, returns whether it was put.
    pub(crate) fn done(&mut self, under_way: UnderWay) -> Result<bool> {
        Ok(self.wait(under_way)?.0)
    }

    fn begin(&mut self, what: What, bytes: &[u8]) -> Result<UnderWay> {
        while self.under_way >= WINDOW {
            self.receive()?;
        }
        let number = self.next;
        send(&self.socket, &Request { number, what }, bytes).map_err(|e| self.broken(e))?;
        self.next += 1;
        self.under_way += 1;
        Ok(UnderWay(number))
    }

    fn wait(&mut self, UnderWay(number): UnderWay) -> Result<(bool, Vec<u8>)> {
        loop {
            match self.come.remove(&number) {
                Some((Outcome::Done(found), bytes)) => return Ok((found, bytes)),
                Some((Outcome::Failed(kind, message), _)) => {
                    return Err(Error::new(Kind::from_name(&kind), message));
                }
                None => self.receive()?,
            }
        }
    }

    fn receive(&mut self) -> Result<()> {
        let received = receive::<Answer>(&self.socket);
        match received {
            Ok(Some((Answer { number, outcome }, bytes))) => {
                self.under_way = self.under_way.saturating_sub(1);
                self.come.insert(number, (outcome, bytes));
                Ok(())
            }
            Ok(None) => Err(self.broken(Error::new(Kind::Other, "it is gone"))),
            Err(e) => Err(self.broken(e)),
        }
    }

    /// The carrier cannot be used any more: the error, with what became of it.
    fn broken(&mut self, e: Error) -> Error {
        let Some(child) = &mut self.child else { return e.context(self.who) };
        let _ = child.kill();
        let became = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
        e.context(format!("{} ({became})", self.who))
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        // It ends when nobody asks any more; whatever it is doing then is of no use.
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A process that starts carriers for this one, also when this one has given up the network, and with it all
/// that it could start. It has no key, and does nothing else.
pub(crate) struct Carriers {
    socket: UnixStream,
    _child: Child,
}

impl Carriers {
    /// Starts it.
    ///
    /// # Errors
    /// What keeps it from being started.
    pub(crate) fn start(root: &Root) -> Result<Self> {
        let (socket, _child) = child::spawn_lasting(root, STARTER, |_| {})?;
        socket.set_read_timeout(Some(TIME))?;
        Ok(Carriers { socket, _child })
    }

    /// A new carrier to the place at `url`, which is only read.
    ///
    /// # Errors
    /// As [`Carrier::start`].
    pub(crate) fn next(&self, url: &PlaceUrl, access: &Access) -> Result<Carrier> {
        let attempt = || format!("start the {COMMAND} helper");
        let begin = Begin { url: url.clone(), access: access.clone(), writes: false };
        wire::say(&self.socket, &begin).context(attempt)?;
        let mut lines = Lines::of_at_most(MAX_HEADER);
        let gone = || Error::new(Kind::Other, format!("the {STARTER} helper has ended"));
        let line = lines.next(&self.socket).context(attempt)?.ok_or_else(gone)?;
        match parse(&line)? {
            Outcome::Failed(kind, message) => {
                Err(Error::new(Kind::from_name(&kind), message).context(attempt()))
            }
            Outcome::Done(_) => {
                let none = || Error::new(Kind::Other, "no connection came with the answer");
                let socket = UnixStream::from(lines.take_descriptor().ok_or_else(none)?);
                socket.set_read_timeout(Some(TIME))?;
                let mut carrier = Carrier {
                    socket,
                    child: None,
                    who: "the carrier",
                    next: 1,
                    under_way: 1,
                    come: HashMap::new(),
                };
                carrier.wait(UnderWay(0)).context(|| format!("reach {url}"))?;
                Ok(carrier)
            }
        }
    }
}

/// The starter's side: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help_starting(_: Hardened, root: &Root) -> Result<()> {
    let socket = child::begin()?;
    let mut lines = Lines::of_at_most(MAX_HEADER);
    let mut started: Vec<Child> = Vec::new();
    while let Some(line) = lines.next(&socket)? {
        let begin: Begin = parse(&line)?;
        let carrier = child::spawn(root, COMMAND).and_then(|(carrier, child)| {
            started.push(child);
            send(&carrier, &begin, &[]).map(|()| carrier)
        });
        match carrier {
            Ok(carrier) => wire::say_with(&socket, &Outcome::Done(true), carrier.as_fd())?,
            Err(e) => wire::say(&socket, &failed(&e))?,
        }
        // Each ends when whoever has its connection lets go of that.
        started.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }
    Ok(())
}

/// The carrier's side: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(_: Hardened, _: &Root) -> Result<()> {
    let socket = child::begin()?;
    let begun = begin(&socket);
    let (outcome, place) = match begun {
        Ok(place) => (Outcome::Done(true), Some(place)),
        Err(e) => (failed(&e), None),
    };
    send(&socket, &Answer { number: 0, outcome }, &[])?;
    let Some(place) = place else { return Ok(()) };
    let (input, output) = (Mutex::new(&socket), Mutex::new(&socket));
    std::thread::scope(|scope| {
        let work = || place.open().and_then(|mut way| serve(&mut *way, &input, &output));
        let workers: Vec<_> = (0..place.width()).map(|_| scope.spawn(work)).collect();
        let ended = workers.into_iter().map(|worker| match worker.join() {
            Ok(ended) => ended,
            Err(_) => Err(Error::new(Kind::Other, "a thread of the carrier failed")),
        });
        ended.collect::<Result<Vec<()>>>().map(drop)
    })
}

/// Looks how the place is reached, and gives up everything else.
fn begin(socket: &UnixStream) -> Result<Place> {
    let attempt = || "take a request: this command is started by \"sealblk snapshot push\" and its kin alone";
    let begun = receive::<Begin>(socket).context(attempt)?;
    let (Begin { url, access: how, writes }, _) =
        begun.ok_or_else(|| Error::new(Kind::Usage, "there is none"))?;
    let place = Place::prepare(&url, &how)?;
    if let (Place::Folder(path), true) = (&place, writes) {
        let flags = AccessFlags::W_OK | AccessFlags::X_OK;
        access(path, flags)
            .map_err(|e| Error::new(Kind::Usage, format!("nothing can be written there: {}", e.desc())))?;
    }
    let (rules, network) = match &place {
        // A medium that cannot be written is good enough for whoever reads.
        Place::Folder(path) if !writes => (vec![Rule::new(path, sandbox::Access::ReadTree)], false),
        Place::Folder(path) => (vec![Rule::new(path, sandbox::Access::Tree)], false),
        #[cfg(feature = "object-store")]
        Place::Bucket(bucket) => {
            // What looks names up loads its own libraries the first time, which is not possible later.
            // Whether the name is known shows when the place is asked.
            let _ = bucket.host().to_socket_addrs();
            (lookup_files().into_iter().map(|path| Rule::new(path, sandbox::Access::Read)).collect(), true)
        }
    };
    let confinement = sandbox::confine_carrier(&rules, network)?;
    log::debug!("the carrier to {url} is confined: {confinement}");
    Ok(place)
}

/// The files, of those that there are, in which the names of hosts, and credentials that
/// have changed, are looked up.
#[cfg(feature = "object-store")]
fn lookup_files() -> Vec<PathBuf> {
    let named = [
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_CONFIG_FILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AZURE_FEDERATED_TOKEN_FILE",
    ];
    let named = named.iter().filter_map(std::env::var_os).map(PathBuf::from);
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let of_home =
        home.iter().flat_map(|home| [".aws/credentials", ".aws/config"].map(|name| home.join(name)));
    let of_network = stranger::OF_THE_NETWORK.into_iter().map(PathBuf::from);
    let all = of_network.chain(named).chain(of_home);
    all.filter(|path| path.is_file()).collect()
}

/// Does what is asked, one request after the other, until nobody asks any more.
fn serve(way: &mut dyn Objects, input: &Mutex<&UnixStream>, output: &Mutex<&UnixStream>) -> Result<()> {
    loop {
        let received = {
            let socket = input.locked();
            receive::<Request>(*socket)?
        };
        let Some((Request { number, what }, bytes)) = received else { return Ok(()) };
        let (outcome, bytes) = match answer(way, what, bytes) {
            Ok((found, bytes)) => (Outcome::Done(found), bytes),
            Err(e) => (failed(&e), Vec::new()),
        };
        let socket = output.locked();
        send(*socket, &Answer { number, outcome }, &bytes)?;
    }
}

/// Does what is asked of a place; returns whether it was done, and what was found.
pub(super) fn answer(way: &mut dyn Objects, what: What, bytes: Vec<u8>) -> Result<(bool, Vec<u8>)> {
    Ok(match what {
        What::Get { name, max } => match way.get(&name, max)? {
            Some(bytes) => (true, bytes),
            None => (false, Vec::new()),
        },
        What::Exists { name } => (way.exists(&name)?, Vec::new()),
        What::Put { name, put } => (way.put(&name, bytes, put)?, Vec::new()),
        What::List { folder } => {
            let listed = serde_json::to_vec(&way.list(&folder)?).map_err(|e| Error::of(Kind::Other, e))?;
            if listed.len() > MAX_LEN {
                let message = format!("there are too many objects in {folder} for one list");
                return Err(Error::new(Kind::Unsupported, message));
            }
            (true, listed)
        }
        What::Remove { name } => (way.remove(&name).map(|()| true)?, Vec::new()),
        What::Sync => (way.sync().map(|()| true)?, Vec::new()),
    })
}

/// An error, as an answer says it.
pub(super) fn failed(e: &Error) -> Outcome {
    // The beginning of what a place says is enough.
    let words: String = e.to_string().chars().take(4000).collect();
    Outcome::Failed(e.kind().name().to_owned(), words)
}

/// Sends one message.
pub(super) fn send(mut to: impl Write, header: &impl Serialize, bytes: &[u8]) -> Result<()> {
    let header = serde_json::to_vec(header).map_err(|e| Error::of(Kind::Other, e))?;
    let len = |len: usize| u32::try_from(len).map_err(|e| Error::of(Kind::Other, e));
    let mut lengths = [0; 8];
    lengths[..4].copy_from_slice(&len(header.len())?.to_le_bytes());
    lengths[4..].copy_from_slice(&len(bytes.len())?.to_le_bytes());
    to.write_all(&[&lengths[..], &header].concat())?;
    Ok(to.write_all(bytes)?)
}

/// Receives one message; none where the other side has ended.
pub(super) fn receive<T: DeserializeOwned>(mut from: impl Read) -> Result<Option<(T, Vec<u8>)>> {
    let mut lengths = [0; 8];
    match from.read(&mut lengths[..1])? {
        0 => return Ok(None),
        _ => from.read_exact(&mut lengths[1..])?,
    }
    let (header, bytes) = lengths.split_at(4);
    let len = |bytes: &[u8]| bytes.iter().rev().fold(0usize, |len, &byte| len << 8 | usize::from(byte));
    let (header, bytes) = (len(header), len(bytes));
    if header > MAX_HEADER || bytes > MAX_LEN {
        return Err(Error::new(Kind::Other, format!("a message of {header} and {bytes} bytes")));
    }
    let mut room = vec![0; header];
    from.read_exact(&mut room)?;
    let header = parse(&room)?;
    let mut room = vec![0; bytes];
    from.read_exact(&mut room)?;
    Ok(Some((header, room)))
}

/// Reads the requests of which `bytes` is a stream, whoever wrote them, and writes them again. Like
/// [`answers_again`], for whoever tries what another host could send.
///
/// # Errors
/// `Other` for what is none, or ends within one.
pub fn requests_again(bytes: &[u8]) -> Result<Vec<u8>> {
    again::<Request>(bytes)
}

/// As [`requests_again`], of answers.
///
/// # Errors
/// As for that.
pub fn answers_again(bytes: &[u8]) -> Result<Vec<u8>> {
    again::<Answer>(bytes)
}

fn again<T: DeserializeOwned + Serialize>(mut bytes: &[u8]) -> Result<Vec<u8>> {
    let mut written = Vec::new();
    while let Some((header, object)) = receive::<T>(&mut bytes)? {
        send(&mut written, &header, &object)?;
    }
    Ok(written)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| Error::of(Kind::Other, e).context("a message that is none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded_and_come_whole_or_not_at_all() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let what = What::Put { name: ObjectName::new("a/b").unwrap(), put: Put::IfNew };
        send(&ours, &Request { number: 7, what }, b"bytes").unwrap();
        let (request, bytes) = receive::<Request>(&theirs).unwrap().unwrap();
        assert_eq!((request.number, &bytes[..]), (7, &b"bytes"[..]));
        (&ours).write_all(&[1, 0, 0, 0, 0, 0, 0, 5, b'x']).unwrap();
        assert!(receive::<Request>(&theirs).is_err(), "80 MiB");
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&ours).write_all(&[2, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
        drop(ours);
        assert!(receive::<Request>(&theirs).is_err(), "cut off");
        assert!(receive::<Request>(&theirs).is_err() || receive::<Request>(&theirs).unwrap().is_none());
    }
}
