//! Another process takes the place of the one that serves a volume, and neither guest nor VMM notices: so the
//! installed binary comes into use without a detach. No KMS is asked.
//!
//! Two processes take turns, over a connection to the control socket that the command `upgrade` has made and
//! the [`successor`] has got from it:
//!
//! | successor | predecessor |
//! |---|---|
//! | `upgrade`, with the version of what follows, and secret memory | looks who asks; puts the data keys there; answers `offer`: how the volume is attached, with the lock, the top layer's file, sockets |
//! | opens the volume's record, proves it by the keys, makes its rings, confines itself, starts its threads; `ready` | between two messages of the VMM: stops changing layers, and sends the VMM's connection, the session as messages (`said`), QEMU's locks on the layers, then `that-is-all` |
//! | hears the session, maps the guest's memory; `prepared` | **stops the rings, drained**; lends RBD images; sends where they stand, then `halted` |
//! | opens the layers; **`taken`**; starts the rings | ends, and lets go of nothing |
//!
//! **The commit is the sending of `taken`.** Until then the successor changes nothing, and whatever goes
//! wrong on either side, or takes too long, leaves the volume with the predecessor, whose rings go on where
//! they stopped. A predecessor that waits no longer shuts its end of the connection down, and then looks
//! once more what had come: the kernel has either delivered `taken` by then, or refuses to send it. So at
//! every moment exactly one process is to serve the volume. One that is killed before the commit leaves the
//! volume to the other, or, if it is the predecessor, to whoever attaches it again: as if it had been
//! killed without an upgrade.
//!
//! The volume's lock and QEMU's locks belong to open files, which both processes have for a while: so nobody
//! else gets them at any moment. Who is not to have them in the end closes its copies without unlocking.
//!
//! An RBD image has one writer, by a lock of Ceph's. The predecessor has its client let go of the lock when
//! everything is written and flushed, but stays whose the image is (its tenure, `helper::rbd`): the successor
//! takes the lock under the tenure that it was told of, and, should it not come to the commit, lets go of it
//! in the same way. The predecessor takes the lock back then, also from a successor that hangs: the cluster
//! refuses that one's client from that moment on.
//!
//! What the predecessor says are claims: it may have been broken into by its guest. It gains nothing by
//! them. Who it is, and whether it is confined, the kernel says; that it may write the layer is seen from
//! the file that it has open; record and keys prove each other, and the record is held against the ledger;
//! the VMM's session passes the gate as if the VMM said it. The data keys go to root, or to the user that
//! started the predecessor.

mod incumbent;
mod predecessor;
mod successor;

pub(super) use predecessor::Predecessor;
pub(super) use successor::Taking;
pub(crate) use successor::{COMMAND, Outcome, take_over};

use crate::backing::coming;
use crate::base::space::Reserve;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, printable};
use crate::host::control::{Answer, MAX_LINE};
use crate::host::{Endpoint, NBD_RECONNECT, Options};
use crate::kms::KmsKey;
use crate::sandbox::{Identity, Mode};
use crate::vhost::gate::Said;
use crate::vhost::queue::qos::Limits;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use uuid::Uuid;

/// The version of what the two processes say to each other. It changes with every change of it.
pub(super) const PROTOCOL: u32 = 1;

/// How long the successor may take to get ready: helpers, rings and confinement; the
/// volume is served meanwhile.
const PREPARING: Duration = Duration::from_secs(60);
/// How long one step may take after that: the VMM waits, and in the last one the guest.
const STEP: Duration = Duration::from_secs(10);
/// Lines that a transcript has at most: a VMM has up to 509 memory regions and 64 rings.
const MAX_PARTS: usize = 4096;

/// How a volume is attached, for a process that is to take over.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// The predecessor's version, for people.
    pub(super) version: String,
    queues: u16,
    queue_size: u16,
    memory_regions: u16,
    read_only: bool,
    serial: Option<String>,
    engine: String,
    poll_us: u64,
    in_order: bool,
    iops: u64,
    throughput: u64,
    burst_ms: u64,
    hydrate_rate: u64,
    space_reserve: Option<u64>,
    cpus: Vec<usize>,
    sandbox: String,
    log_level: String,
    /// Where VMMs connect, where that is known.
    path: Option<PathBuf>,
    /// Whether the socket's name is removed when the volume is detached.
    is_name_ours: bool,
    /// How many data keys are in the secret memory.
    data_keys: usize,
    /// Which KMS keys have given them, in their order, where that is not the first one of each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    unwrapped_by: Vec<KmsKey>,
    /// How many seconds requests wait for an NBD server that is gone, where that is not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nbd_reconnect: Option<u64>,
    /// How many milliseconds reads wait for what is still to come from a place, where that
    /// is not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source_patience_ms: Option<u64>,
    /// The RBD images that are written, and under which tenures, where there are any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    images: Vec<(String, Uuid)>,
    /// Which descriptors come with this, after those that always do.
    passes: Passes,
}

/// Descriptors that come with an [`Offer`], in this order, after the volume's lock, the top layer's file and
/// standard error.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Passes {
    /// The socket that VMMs connect to.
    listener: bool,
    /// The socket of the keeper of grants.
    keeper: bool,
    /// The service manager's socket.
    manager: bool,
}

/// What the predecessor sends of the session and the layers.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Part {
    /// The VMM's connection comes with this.
    Vmm,
    /// A message for the gate, with so many descriptors.
    Said { request: u32, body: String, descriptors: usize },
    /// The open file of QEMU's locks on a layer comes with this.
    ImageLock,
    /// Everything is said that can be said while rings run.
    ThatIsAll,
    /// The rings stand still, and have for so many microseconds.
    Halted { drained_us: u64 },
}

/// What the successor says in its turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Step {
    /// It could serve the volume.
    Ready,
    /// It has the session.
    Prepared,
    /// The volume is its own; this is its process id.
    Taken { pid: u32 },
}

impl Offer {
    /// These options, for a process that is `user`, where that is not the one it is already.
    ///
    /// # Errors
    /// `Unsupported` for what this version does not know.
    fn options(&self, endpoint: Endpoint, sandbox: Mode, user: Option<Identity>) -> Result<Options> {
        let bad = |e: Error| Error::new(Kind::Unsupported, e.to_string());
        if !(1..=64).contains(&self.queues)
            || !self.queue_size.is_power_of_two()
            || !(4..=1024).contains(&self.queue_size)
        {
            let message = format!("{} queues of {} entries", self.queues, self.queue_size);
            return Err(Error::new(Kind::Unsupported, message));
        }
        Ok(Options {
            endpoint,
            access: Default::default(),
            queues: self.queues,
            queue_size: self.queue_size,
            read_only: self.read_only,
            serial: self.serial.clone(),
            engine: self.engine.parse().map_err(bad)?,
            poll: Duration::from_micros(self.poll_us),
            in_order: self.in_order,
            limits: Limits {
                iops: self.iops,
                throughput: self.throughput,
                burst: Duration::from_millis(self.burst_ms),
            },
            hydrate_rate: self.hydrate_rate,
            space_reserve: self.space_reserve.map_or(Reserve::default(), Reserve::of),
            cpus: self.cpus.clone(),
            incoming: true,
            sandbox,
            user,
            nbd_reconnect: self.nbd_reconnect.map_or(NBD_RECONNECT, Duration::from_secs),
            source_patience: self.source_patience_ms.map_or(coming::PATIENCE, Duration::from_millis),
        })
    }
}

/// One side's end of the connection.
struct Link {
    stream: UnixStream,
    lines: Lines,
}

impl Link {
    fn new(stream: UnixStream) -> Self {
        Link { stream, lines: Lines::of_at_most(MAX_LINE).with_descriptors() }
    }

    fn say(&self, what: &impl Serialize) -> Result<()> {
        Ok(wire::say(&self.stream, what)?)
    }

    fn say_with(&self, what: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        Ok(wire::say_with_all(&self.stream, what, descriptors)?)
    }

    fn said(&self, message: &Said) -> Result<()> {
        let Said { request, body, fds } = message;
        let part = Part::Said { request: *request, body: hex::encode(body), descriptors: fds.len() };
        self.say_with(&part, &fds.iter().map(AsFd::as_fd).collect::<Vec<_>>())
    }

    /// The next that the other side says, within `patience`.
    ///
    /// # Errors
    /// What the other side says went wrong, with its kind; that it is gone, or silent.
    fn hear<T: for<'de> Deserialize<'de>>(&mut self, patience: Duration) -> Result<T> {
        self.stream.set_read_timeout(Some(patience))?;
        let line = self.lines.next(&self.stream).context(|| "wait for the other process")?;
        let gone = || Error::new(Kind::Other, "the other process is gone; look at its log");
        let line = line.ok_or_else(gone)?;
        if let Ok(Answer::Failed { kind, message }) = serde_json::from_slice(&line) {
            return Err(Error::new(Kind::from_name(&kind), printable::line(&message)));
        }
        let strange = |_| Error::new(Kind::Unsupported, "the other process says what is not understood here");
        serde_json::from_slice(&line).map_err(strange)
    }

    fn descriptor(&mut self) -> Result<OwnedFd> {
        let missing = || Error::new(Kind::Other, "the other process has not passed what it said");
        self.lines.take_descriptor().ok_or_else(missing)
    }

    /// A message for the gate, of which a [`Part::Said`] was heard.
    fn message(&mut self, request: u32, body: &str, descriptors: usize) -> Result<Said> {
        let odd = |_| Error::new(Kind::Unsupported, "the other process passes what is no message");
        let body = hex::decode(body).map_err(odd)?;
        let fds = (0..descriptors).map(|_| self.descriptor()).collect::<Result<_>>()?;
        Ok(Said { request, body, fds })
    }
}
