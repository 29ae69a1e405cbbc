//! The control socket of an attached volume, in the volume's folder, which only its owner can enter.
//!
//! A client sends one line of JSON and gets one back. The connection of a `detach` is answered when
//! everything is over, so that whoever asked knows. Here is what is said, and the clients' side;
//! [`Control`] is the host process's.

pub mod conversation;
pub mod moved;
mod orders;
pub(crate) mod peer;
mod server;

pub use orders::{AtOnce, InTurns, Orders};
pub use server::{Bound, Control, Name, Waiting};

use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result, printable, wire};
use crate::catalog::Metadata;
use crate::catalog::lock::{Held, Purpose};
use crate::catalog::metadata::VolumeName;
use crate::catalog::rekey::WrittenNewKey;
use crate::catalog::rewrap::{Rewrapped, SlotChange};
use crate::catalog::tags::Tags;
use crate::catalog::{Catalog, LayerId, SnapshotId, VolumeId};
use crate::host::stats::Stats;
use crate::host::status::Status;
use crate::host::upgrade::Offer;
use crate::vhost::gate::Told;
use crate::vhost::queue::qos::Limits;
use conversation::Frozen;
use moved::MoveDown;
use serde::{Deserialize, Serialize};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The socket's name in the volume's folder.
const FILE: &str = "control.sock";
/// Its name while another process has the volume, and this one waits for it.
const INCOMING_FILE: &str = "incoming.sock";
/// The longest line in bytes: a snapshot's record, with 64 layers, a few wrapped keys and
/// 50 tags in any script.
pub(super) const MAX_LINE: usize = 1 << 20;
/// How long a client may take to say what it wants, and a host process to answer what needs no waiting.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a host process may hear nobody, since it does for another client what takes its time.
const BUSY: Duration = Duration::from_secs(60);

#[derive(Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    // With braces: serde would take unknown fields otherwise.
    Detach {},
    /// Show the open file by which the process has the volume, to root. Another request may come after it.
    ShowLock {},
    Status {},
    Stats {},
    Throttle {
        iops: u64,
        throughput: u64,
        burst_ms: u64,
    },
    HydrateRate {
        rate: u64,
    },
    SpaceReserve {
        reserve: u64,
    },
    Rewrap(Box<Rewrapped>),
    ChangeSlot(Box<SlotChange>),
    Resize {
        size: u64,
    },
    /// The beginning of a [`conversation`].
    Snapshot {
        id: SnapshotId,
        layer: LayerId,
        description: String,
        tags: Box<Tags>,
    },
    /// The beginning of another one. The data key itself comes with it as a descriptor.
    Rekey {
        layer: LayerId,
        key: Box<WrittenNewKey>,
    },
    Flatten {},
    /// The record of this snapshot is written.
    Noted {
        snapshot: SnapshotId,
    },
    /// The beginning of a third conversation: see [`moved`].
    MoveDown(MoveDown),
    /// Take these layers out of the chain, which hold nothing.
    LetGo {
        layers: Vec<LayerId>,
    },
    CancelFlatten {},
    /// The beginning of another process's taking over ([`crate::host::upgrade`]), in this version of what is
    /// said then. With it comes secret memory for the data keys.
    Upgrade {
        protocol: u32,
    },
    /// Note the volume's name, or that it has none.
    Rename {
        name: Option<VolumeName>,
    },
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    Detached,
    /// With it comes the open file.
    Lock,
    Status(Status),
    Stats(Box<Stats>),
    Throttled,
    Rewrapped,
    SlotChanged,
    Resized(Told),
    LayerMade,
    Held,
    Frozen(Frozen),
    Rekeyed {
        pause_us: u64,
    },
    /// Whether there is anything to be copied up, or was.
    Flattening {
        is_any: bool,
    },
    Noted,
    /// Data may be moved now.
    Moving,
    /// It was.
    Moved,
    /// The layers are out of the chain.
    LetGone,
    /// What another process needs to take over; descriptors come with it.
    Offer(Box<Offer>),
    /// Another process has taken over.
    Left,
    Renamed,
    Failed {
        kind: String,
        message: String,
    },
}

impl Answer {
    pub(super) fn failed(e: &Error) -> Self {
        Answer::Failed { kind: e.kind().name().into(), message: e.to_string() }
    }
}

/// Asks the process that has `volume` attached to let it go, and waits until it has.
pub fn detach(catalog: &Catalog, volume: VolumeId) -> Result<()> {
    ask(catalog, volume, &Request::Detach {}, None).map(drop).context(|| format!("detach {volume}"))
}

/// Puts other limits on `volume` in force, which is attached.
pub fn throttle(catalog: &Catalog, volume: VolumeId, limits: Limits) -> Result<()> {
    let burst_ms = limits.burst.as_millis() as u64;
    let request = Request::Throttle { iops: limits.iops, throughput: limits.throughput, burst_ms };
    ask(catalog, volume, &request, None).map(drop).context(|| format!("throttle {volume}"))
}

/// Has what the process copies up that has `volume` attached limited to `rate` bytes a second; 0: not at all.
pub fn set_hydrate_rate(catalog: &Catalog, volume: VolumeId, rate: u64) -> Result<()> {
    let request = Request::HydrateRate { rate };
    ask(catalog, volume, &request, None).map(drop).context(|| format!("throttle {volume}"))
}

/// Has what the process copies up that has `volume` attached leave so many bytes of the file system free.
pub fn set_space_reserve(catalog: &Catalog, volume: VolumeId, reserve: u64) -> Result<()> {
    let request = Request::SpaceReserve { reserve };
    ask(catalog, volume, &request, None).map(drop).context(|| format!("throttle {volume}"))
}

/// Has the process that has `volume` attached copy up everything below the top. Returns
/// whether there is anything.
pub fn flatten(catalog: &Catalog, volume: VolumeId) -> Result<bool> {
    let expected = catalog.expect(volume, |now| now.to_flatten().unwrap_or_else(|| now.clone()))?;
    match ask(catalog, volume, &Request::Flatten {}, None)? {
        Answer::Flattening { is_any } => expected.settle().map(|_| is_any),
        _ => Err(Error::new(Kind::Other, "its answer is to another question")),
    }
}

/// Has the process that has `volume` attached copy nothing up any more. Returns whether anything was to be.
pub fn cancel_flatten(catalog: &Catalog, volume: VolumeId) -> Result<bool> {
    let expected = catalog.expect(volume, Metadata::not_to_flatten)?;
    match ask(catalog, volume, &Request::CancelFlatten {}, None)? {
        Answer::Flattening { is_any } => expected.settle().map(|_| is_any),
        _ => Err(Error::new(Kind::Other, "its answer is to another question")),
    }
}

/// Has the process that has `volume` attached note how a data key is wrapped now. When this returns,
/// `volume.json` says so, durably.
pub fn rewrap(catalog: &Catalog, volume: VolumeId, new: Rewrapped) -> Result<()> {
    let rewrapped = |now: &Metadata| {
        let mut next = now.clone();
        // One of another key is refused by the host process.
        next.rewrap(&new).map_or_else(|_| now.clone(), |()| next)
    };
    let expected = catalog.expect(volume, rewrapped)?;
    ask(catalog, volume, &Request::Rewrap(Box::new(new)), None)?;
    expected.settle().map(drop)
}

/// Has the process that has `volume` attached note that a data key has one slot more, or less. When this
/// returns, `volume.json` says so, durably.
///
/// # Errors
/// `Unsupported` for a process of an earlier version, which knows one slot alone; those of the process.
pub fn change_slot(catalog: &Catalog, volume: VolumeId, change: SlotChange) -> Result<()> {
    let changed = |now: &Metadata| {
        let mut next = now.clone();
        next.change_slot(&change).map_or_else(|_| now.clone(), |()| next)
    };
    let expected = catalog.expect(volume, changed)?;
    match ask(catalog, volume, &Request::ChangeSlot(Box::new(change)), None) {
        Ok(Answer::SlotChanged) => expected.settle().map(drop),
        Ok(_) => Err(Error::new(Kind::Other, "its answer is to another question")),
        Err(e) if e.kind() == Kind::Usage && e.to_string().contains("unknown variant") => {
            let message = "the process that has it attached is of an earlier version, which knows one KMS \
                           key for each data key; \"sealblk upgrade\" puts this version in its place";
            Err(Error::new(Kind::Unsupported, message))
        }
        Err(e) => Err(e),
    }
}

/// Has the process that has `volume` attached note its name, or that it has none. When this returns,
/// `volume.json` says so, durably.
///
/// # Errors
/// As [`status`]; those of the process.
pub fn rename(catalog: &Catalog, volume: VolumeId, name: Option<&VolumeName>) -> Result<()> {
    let expected = catalog.expect(volume, |now| now.renamed(name.cloned()))?;
    match ask(catalog, volume, &Request::Rename { name: name.cloned() }, Some(BUSY))? {
        Answer::Renamed => expected.settle().map(drop),
        _ => Err(Error::new(Kind::Other, "its answer is to another question")),
    }
}

/// Has the process that has `volume` attached make it `size` bytes large, and returns whether the guest's VMM
/// knows. When this returns, `volume.json` says so, durably.
pub fn resize(catalog: &Catalog, volume: VolumeId, size: u64) -> Result<Told> {
    let expected = catalog.expect(volume, |now| now.resized(size))?;
    match ask(catalog, volume, &Request::Resize { size }, None)? {
        Answer::Resized(told) => expected.settle().map(|_| told),
        _ => Err(Error::new(Kind::Other, "its answer is to another question")),
    }
}

/// Tells the process that has `volume` attached that the record of a snapshot is written. Where it does not
/// hear, it waits a moment longer.
pub fn tell_noted(catalog: &Catalog, volume: VolumeId, snapshot: SnapshotId) {
    if let Err(e) = ask(catalog, volume, &Request::Noted { snapshot }, Some(PATIENCE)) {
        log::debug!("{volume} is not told of {snapshot}: {e}");
    }
}

/// Has the process that has `volume` attached take layers that hold nothing out of its chain. When this
/// returns, `volume.json` names them no more, durably.
///
/// # Errors
/// `Busy` if they are needed for a moment longer.
pub fn let_go(catalog: &Catalog, volume: VolumeId, layers: &[LayerId]) -> Result<()> {
    let expected = catalog.expect(volume, |now| now.without(layers))?;
    match ask(catalog, volume, &Request::LetGo { layers: layers.to_vec() }, None)? {
        Answer::LetGone => expected.settle().map(drop),
        _ => Err(Error::new(Kind::Other, "its answer is to another question")),
    }
}

/// What the process that has `volume` attached says of itself.
///
/// # Errors
/// `NotFound` if it is not attached; if the process does not answer within a few seconds, that.
pub fn status(catalog: &Catalog, volume: VolumeId) -> Result<Status> {
    match ask(catalog, volume, &Request::Status {}, Some(PATIENCE))? {
        Answer::Status(status) => Ok(status),
        _ => Err(Error::new(Kind::Other, "its answer is to another question")),
    }
}

/// What the process that has `volume` attached has counted.
///
/// # Errors
/// `NotFound` if it is not attached; if the process does not answer within `patience`, that.
pub fn stats(catalog: &Catalog, volume: VolumeId, patience: Duration) -> Result<Stats> {
    match ask(catalog, volume, &Request::Stats {}, Some(patience))? {
        Answer::Stats(stats) => Ok(*stats),
        _ => Err(Error::new(Kind::Other, "its answer is to another question")),
    }
}

/// Sends a request and waits for the answer, as long as `patience` says; without one, as long as it takes.
fn ask(catalog: &Catalog, volume: VolumeId, request: &Request, patience: Option<Duration>) -> Result<Answer> {
    let client = connect(catalog, volume, patience.unwrap_or(BUSY))?;
    client.set_read_timeout(patience)?;
    exchange(&client, request)
}

/// Finds the process that has `volume` attached, which may take as long as `patience` to show that it has it.
///
/// # Errors
/// `NotFound` if `volume` is not attached; if the process that has it does not listen, that.
pub(crate) fn connect(catalog: &Catalog, volume: VolumeId, patience: Duration) -> Result<UnixStream> {
    let holder = match catalog.held(volume)? {
        Held::By(holder) if holder.purpose == Purpose::Attach => holder,
        Held::Free => return Err(Error::new(Kind::NotFound, "it is not attached")),
        other => return Err(crate::catalog::lock::busy(volume, &other)),
    };
    let client = files::connect(&catalog.folder(volume).join(FILE), patience);
    let client = client.map_err(|e| not_reached(&holder.process(), &e.into()))?;
    peer::check(&client, catalog, volume, patience)?;
    Ok(client)
}

pub(super) fn exchange(client: &UnixStream, what: &impl Serialize) -> Result<Answer> {
    wire::say(client, what)?;
    receive(client)
}

fn receive(client: &UnixStream) -> Result<Answer> {
    // Who listens is not changed by anybody but the process that does.
    let process = peer::name(client);
    let line = wire::hear(client, MAX_LINE).map_err(|e| not_reached(&process, &e.into()))?;
    let Some(line) = line else {
        let message = format!("{process} ended without a word; look at its log");
        return Err(Error::new(Kind::Other, message));
    };
    match serde_json::from_slice(&line) {
        Ok(Answer::Failed { kind, message }) => {
            Err(Error::new(Kind::from_name(&kind), printable::line(&message)))
        }
        Ok(answer) => Ok(answer),
        Err(_) => {
            let message = format!("the answer of {process} is of another version of sealblk");
            Err(Error::new(Kind::Unsupported, message))
        }
    }
}

fn not_reached(process: &str, e: &Error) -> Error {
    let message =
        format!("{process} has it, but its control socket does not answer ({e}); SIGTERM ends it too");
    Error::new(Kind::Other, message)
}
