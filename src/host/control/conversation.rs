//! A snapshot of an attached volume is made by two processes in turns, over one connection:
//!
//! | client | host process |
//! |---|---|
//! | `snapshot`, with description, tags, the snapshot's id and the new layer's | makes that layer in its volume's folder, and answers `layer-made` |
//! | links it to where layers lie; `pause` | pauses the queues; if it was told to hold them, answers `held` |
//! | `commit`, if it held them | freezes the old top, lets the queues go on with the new one, answers `frozen` |
//! | compares the snapshot's record with what it knew before, and writes it | |
//!
//! The client chooses every name: the host process reads what its guest and its VMM say, and may be anybody's
//! by now. What it says afterwards is a proposal that is compared with what was asked for, and what the
//! client clears away is what the client has made.
//!
//! Until the freeze, whatever fails on either side, or is not said in time, undoes everything.
//!
//! Another data key is given to a volume in the same way: with `rekey` come the wrapped key, and the data key
//! itself in secret memory, as a descriptor; the host process takes it, and the rest is as above, but that
//! the answer is `rekeyed` and no record is written.

use crate::base::{Context, Error, Kind, Result, wire};
use crate::catalog::rekey::NewKey;
use crate::catalog::snapshot::{Label, Wanted};
use crate::catalog::{Catalog, Expected, LayerId, Metadata, OwnLayer, Snapshot, SnapshotId, VolumeId};
use crate::crypt::secret_mem::SecretFd;
use crate::host::control::{Answer, MAX_LINE, Request, connect, exchange, receive};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the host process may take for a step: longer than it waits itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the client says in its turns.
#[derive(Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Step {
    /// The new layer is where it belongs: pause, and then go on, or hold until `Commit`.
    Pause {
        /// Whether to wait.
        hold: bool,
    },
    /// Freeze.
    Commit {},
    /// The data is where it was to be moved ([`crate::host::control::moved`]).
    Moved {},
}

/// How the freeze went.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frozen {
    /// What is to become the snapshot's record.
    record: String,
    /// How long the queues stood still, in microseconds.
    pause_us: u64,
}

impl Frozen {
    /// What is to be recorded, and how long the guest may have noticed.
    pub fn new(snapshot: &Snapshot, pause: Duration) -> Self {
        let record = String::from_utf8(snapshot.to_json()).expect("JSON is UTF-8");
        Frozen { record, pause_us: pause.as_micros() as u64 }
    }
}

/// The host process's side, after the request.
pub struct Conversation<'a> {
    client: &'a UnixStream,
}

impl<'a> Conversation<'a> {
    /// With a client that has made its request.
    pub(super) fn with(client: &'a UnixStream) -> Result<Self> {
        client.set_nonblocking(false)?;
        Ok(Conversation { client })
    }

    /// Has the client bring the new layer, which is made, to where it belongs, and returns whether
    /// it wants the queues held.
    ///
    /// # Errors
    /// If it says anything else, or nothing in time.
    pub fn have_layer_linked(&mut self, patience: Duration) -> Result<bool> {
        match self.ask(&Answer::LayerMade, patience)? {
            Step::Pause { hold } => Ok(hold),
            _ => Err(Error::new(Kind::Usage, "nothing is paused yet")),
        }
    }

    /// Tells the client that the queues are held, and waits for its word.
    ///
    /// # Errors
    /// If it says anything else, or nothing in time.
    pub fn hold(&mut self, patience: Duration) -> Result<()> {
        match self.ask(&Answer::Held, patience)? {
            Step::Commit {} => Ok(()),
            _ => Err(Error::new(Kind::Usage, "it is paused already")),
        }
    }

    /// Tells the client that data may be moved now, and waits until it is.
    ///
    /// # Errors
    /// If it says anything else, or nothing in time.
    pub fn have_moved(&mut self, patience: Duration) -> Result<()> {
        match self.ask(&Answer::Moving, patience)? {
            Step::Moved {} => Ok(()),
            _ => Err(Error::new(Kind::Usage, "data is being moved")),
        }
    }

    fn ask(&mut self, answer: &Answer, patience: Duration) -> Result<Step> {
        self.client.set_read_timeout(Some(patience))?;
        wire::say(self.client, answer)?;
        let heard = wire::hear(self.client, MAX_LINE).context(|| "wait for the client's next step")?;
        let line = heard.ok_or_else(|| Error::new(Kind::Other, "whoever was changing the volume is gone"))?;
        serde_json::from_slice(&line).map_err(|e| Error::of(Kind::Usage, e))
    }
}

/// The client's side: a snapshot that is being made of an attached volume. Dropped before
/// the commit, it is none.
pub struct Freezing<'a> {
    client: UnixStream,
    /// The volume as it was known before its host process was asked for anything.
    before: Metadata,
    wanted: Wanted,
    held: bool,
    /// The new layer as this process has linked it, until the host process may have given it to the volume.
    made: Option<OwnLayer>,
    /// What becomes of the volume's record; none once it was settled.
    expected: Option<Expected<'a>>,
}

impl<'a> Freezing<'a> {
    /// Has the new layer made. The volume goes on meanwhile.
    ///
    /// # Errors
    /// `NotFound` if the volume is not attached (any more); the host process's; those of the file system.
    pub fn begin(catalog: &'a Catalog, volume: VolumeId, label: &Label) -> Result<Self> {
        let client = connect(catalog, volume, PATIENCE)?;
        client.set_read_timeout(Some(PATIENCE))?;
        let wanted = Wanted { id: SnapshotId::random(), layer: LayerId::random(), label: label.clone() };
        let expected = catalog.expect(volume, |now| now.frozen(wanted.layer))?;
        let before = catalog.load(volume)?;
        let request = Request::Snapshot {
            id: wanted.id,
            layer: wanted.layer,
            description: label.description.clone(),
            tags: Box::new(label.tags.clone()),
        };
        let Answer::LayerMade = exchange(&client, &request)? else { return Err(strange()) };
        let made = Some(catalog.link_own_layer(volume, wanted.layer, before.size())?);
        Ok(Freezing { client, before, wanted, held: false, made, expected: Some(expected) })
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.before.id()
    }

    /// Pauses the volume, for as long as the host process allows: a few seconds.
    pub fn hold(&mut self) -> Result<()> {
        match exchange(&self.client, &Step::Pause { hold: true })? {
            Answer::Held => self.held = true,
            _ => return Err(strange()),
        }
        Ok(())
    }

    /// Tells the host process to freeze; [`Freezing::frozen`] hears how it went.
    pub fn commit(&mut self) -> Result<()> {
        self.made = None;
        let step = if self.held { Step::Commit {} } else { Step::Pause { hold: false } };
        Ok(wire::say(&self.client, &step)?)
    }

    /// The snapshot, whose record is still to be [written](crate::catalog::freeze::note), and how long the
    /// volume's queues stood still.
    ///
    /// # Errors
    /// `Corrupt` for a record that is not the one that was asked for, naming what differs.
    pub fn frozen(&mut self) -> Result<(Snapshot, Duration)> {
        match receive(&self.client)? {
            Answer::Frozen(Frozen { record, pause_us }) => {
                let proposed = Snapshot::from_json(record.as_bytes())?;
                let snapshot = proposed.accept(&self.before, &self.wanted)?;
                self.expected.take().map(Expected::settle).transpose()?;
                Ok((snapshot, Duration::from_micros(pause_us)))
            }
            _ => Err(strange()),
        }
    }
}

/// The client's side of giving an attached volume another data key, which lies in `dek`,
/// [passed](crate::crypt::PassKey::pass) to whoever has the present one: gone from there afterwards, whoever
/// has it. `layer` is what the new top is called. Returns how long its queues stood still.
///
/// # Errors
/// `NotFound` if the volume is not attached (any more); the host process's; those of the file system.
pub fn rekey(
    catalog: &Catalog,
    volume: VolumeId,
    (key, layer): (&NewKey, LayerId),
    dek: SecretFd,
) -> Result<Duration> {
    let client = connect(catalog, volume, PATIENCE)?;
    client.set_read_timeout(Some(PATIENCE))?;
    let expected = catalog.expect(volume, |now| now.rekeyed(layer, key))?;
    let before = catalog.load(volume)?;
    let request = Request::Rekey { layer, key: Box::new(key.into()) };
    wire::say_with(&client, &request, dek.as_fd()).context(|| "hand the new data key over")?;
    let Answer::LayerMade = receive(&client)? else { return Err(strange()) };
    // It has taken it.
    dek.give_away();
    let made = catalog.link_own_layer(volume, layer, before.size())?;
    wire::say(&client, &Step::Pause { hold: false }).inspect_err(|_| made.remove())?;
    match receive(&client)? {
        Answer::Rekeyed { pause_us } => expected.settle().map(|_| Duration::from_micros(pause_us)),
        _ => Err(strange()),
    }
}

impl Drop for Freezing<'_> {
    fn drop(&mut self) {
        if let Some(made) = &self.made {
            made.remove();
        }
    }
}

fn strange() -> Error {
    Error::new(Kind::Other, "the host process's answer is to another question")
}
