//! A snapshot of an attached volume is made by two processes in turns, over one connection:
//!
//! | client | host process |
//! |---|---|
//! | `snapshot`, with description and tags | makes a layer in its volume's folder, and answers `new-layer` |
//! | links it to where layers lie; `pause` | pauses the queues; if it was told to hold them, answers `held` |
//! | `commit`, if it held them | freezes the old top, lets the queues go on with the new one, answers `frozen` |
//! | writes the snapshot's record | |
//!
//! Until the freeze, whatever fails on either side, or is not said in time, undoes everything.
//!
//! Another data key is given to a volume in the same way: with `rekey` come the wrapped key, and the data key itself in secret
//! memory, as a descriptor; the host process takes it, and the rest is as above, but that the answer is `rekeyed` and no record is
//! written.

use crate::base::{Context, Error, Kind, Result};
use crate::catalog::rekey::NewKey;
use crate::catalog::snapshot::Label;
use crate::catalog::{Catalog, LayerId, Snapshot, VolumeId};
use crate::crypt::secret_mem::SecretFd;
use crate::host::control::{Answer, MAX_LINE, Request, connect, exchange, line, passing, receive, say};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
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

    /// Has the client bring a new layer to where it belongs, and answers whether it wants the queues held.
    ///
    /// # Errors
    /// If it says anything else, or nothing in time.
    pub fn have_layer_linked(&mut self, id: LayerId, patience: Duration) -> Result<bool> {
        match self.ask(&Answer::NewLayer { id }, patience)? {
            Step::Pause { hold } => Ok(hold),
            Step::Commit {} => Err(Error::new(Kind::Usage, "nothing is paused yet")),
        }
    }

    /// Tells the client that the queues are held, and waits for its word.
    ///
    /// # Errors
    /// If it says anything else, or nothing in time.
    pub fn hold(&mut self, patience: Duration) -> Result<()> {
        match self.ask(&Answer::Held, patience)? {
            Step::Commit {} => Ok(()),
            Step::Pause { .. } => Err(Error::new(Kind::Usage, "it is paused already")),
        }
    }

    fn ask(&mut self, answer: &Answer, patience: Duration) -> Result<Step> {
        self.client.set_read_timeout(Some(patience))?;
        say(self.client, answer)?;
        let mut line = String::new();
        let heard = BufReader::new(self.client).take(MAX_LINE).read_line(&mut line);
        heard.context(|| "wait for whoever makes the snapshot")?;
        if line.is_empty() {
            return Err(Error::new(Kind::Other, "whoever was making the snapshot is gone"));
        }
        serde_json::from_str(&line).map_err(|e| Error::new(Kind::Usage, e.to_string()))
    }
}

/// The client's side: a snapshot that is being made of an attached volume. Dropped before the commit, it is none.
pub struct Freezing {
    client: UnixStream,
    volume: VolumeId,
    held: bool,
    /// The new layer, until the host process may have given it to the volume.
    made: Option<PathBuf>,
}

impl Freezing {
    /// Has the new layer made. The volume goes on meanwhile.
    ///
    /// # Errors
    /// `NotFound` if the volume is not attached (any more); the host process's; those of the file system.
    pub fn begin(catalog: &Catalog, volume: VolumeId, label: &Label) -> Result<Self> {
        let client = connect(catalog, volume)?;
        client.set_read_timeout(Some(PATIENCE))?;
        let request =
            Request::Snapshot { description: label.description.clone(), tags: Box::new(label.tags.clone()) };
        let Answer::NewLayer { id } = exchange(&client, &request)? else { return Err(strange()) };
        let made = Some(catalog.layer_path(id));
        let freezing = Freezing { client, volume, held: false, made };
        catalog.link_own_layer(volume, id)?;
        Ok(freezing)
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
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
        match self.held {
            true => say(&self.client, &Step::Commit {}),
            false => say(&self.client, &Step::Pause { hold: false }),
        }
    }

    /// The snapshot, whose record is still to be [written](crate::catalog::freeze::note), and how long the volume's queues
    /// stood still.
    pub fn frozen(&mut self) -> Result<(Snapshot, Duration)> {
        match receive(&self.client)? {
            Answer::Frozen(Frozen { record, pause_us }) => {
                Ok((Snapshot::from_json(record.as_bytes())?, Duration::from_micros(pause_us)))
            }
            _ => Err(strange()),
        }
    }
}

/// The client's side of giving an attached volume another data key, which lies in `dek`: gone from there afterwards, whoever
/// has it. Answers how long its queues stood still.
///
/// # Errors
/// `NotFound` if the volume is not attached (any more); the host process's; those of the file system.
pub fn rekey(catalog: &Catalog, volume: VolumeId, key: &NewKey, dek: SecretFd) -> Result<Duration> {
    let client = connect(catalog, volume)?;
    client.set_read_timeout(Some(PATIENCE))?;
    let line = line(&Request::Rekey(Box::new(key.into())))?;
    passing::send(&client, &line, dek.as_fd()).context(|| "hand the new data key over")?;
    let Answer::NewLayer { id } = receive(&client)? else { return Err(strange()) };
    // It has taken it.
    dek.give_away();
    let mut freezing = Freezing { client, volume, held: false, made: Some(catalog.layer_path(id)) };
    catalog.link_own_layer(volume, id)?;
    freezing.commit()?;
    match receive(&freezing.client)? {
        Answer::Rekeyed { pause_us } => Ok(Duration::from_micros(pause_us)),
        _ => Err(strange()),
    }
}

impl Drop for Freezing {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            // Where it cannot be removed, or was not made: "sealblk gc" looks.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn strange() -> Error {
    Error::new(Kind::Other, "the host process's answer is to another question")
}
