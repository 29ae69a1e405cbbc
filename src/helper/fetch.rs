//! The fetcher, as the process sees it that it brings blocks for: the host process of a volume of which some
//! layers are still coming.
//!
//! The fetcher is a process of its own, one an attach. It has the keys by which blocks are proved, which open
//! no data and come from the host process at the beginning, and no network; below it is a carrier
//! ([`super::carry`]), which has a network and no key. It writes what it has proved into the layers' files,
//! and says what is there. So nothing that a place, or the way to it, can say reaches the host process. The
//! two share a socket, the fetcher's standard input; messages are lines of JSON.

use crate::backing::coming::{self, Coming};
use crate::base::child;
use crate::base::root::Root;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, printable};
use crate::catalog::layout::LayerRecord;
use crate::catalog::{Catalog, LayerId, Metadata, VolumeId};
use crate::crypt::secret_mem::SecretFd;
use crate::crypt::{BackupKeys, Dek};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// The hidden subcommand.
pub const COMMAND: &str = "fetch";
/// The longest line in bytes: a volume has up to 256 layers.
pub(crate) const MAX_LINE: usize = 64 << 10;
/// How long the fetcher may take to prove what is to come, and to look for holes.
const TIME: Duration = Duration::from_secs(300);
/// How often it is looked whether reads have waited for too long, while any wait.
const LOOK: Duration = Duration::from_millis(200);

/// What a fetcher is told first. The keys come with it, those of each layer in this order.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Begin {
    /// For whom.
    pub(crate) volume: VolumeId,
    /// Layers that are still coming.
    pub(crate) layers: Vec<LayerId>,
}

/// What is asked of a fetcher.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Ask {
    /// Somebody waits for a block.
    Block { layer: usize, block: u64 },
}

/// What a fetcher says. Layers are told by their places in [`Begin`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Said {
    /// Nothing more is to come of so many blocks.
    Here { layer: usize, first: u64, count: u64 },
    /// All of a layer is there.
    Whole { layer: usize },
    /// Everything that was not said to be here is to come.
    Ready,
    /// A block is not as it should be, or is missing.
    Refused { layer: usize, block: u64, why: String },
    /// Nothing comes at the moment.
    Away { why: String },
    /// It goes on.
    Back,
    /// It cannot begin.
    Failed { kind: String, message: String },
}

/// The keys of a volume's layers that are still coming.
pub struct Keys {
    layers: Vec<LayerRecord>,
    secret: OwnedFd,
}

impl Keys {
    /// Those of the volume `metadata`, whose data keys are told by their numbers; none if
    /// nothing of it is still coming.
    ///
    /// # Errors
    /// `Corrupt` if it is not known what is to come.
    pub fn of<'a>(
        catalog: &Catalog,
        metadata: &Metadata,
        dek: impl Fn(usize) -> Option<&'a Dek>,
    ) -> Result<Option<Self>> {
        let layers = catalog.coming_of(metadata.layers());
        if layers.is_empty() {
            return Ok(None);
        }
        let secret = SecretFd::create(layers.len() * BackupKeys::LEN)?;
        let passed = secret.as_fd().try_clone_to_owned()?;
        let mut memory = secret.map()?;
        for (layer, room) in layers.iter().zip(memory.as_mut_slice().chunks_mut(BackupKeys::LEN)) {
            let head = catalog.wanted_head(layer.id)?;
            let unencrypted = || {
                let message =
                    format!("layer {} is still coming, and has no data key that proves it", layer.id);
                Error::new(Kind::Corrupt, message)
            };
            let dek = layer.key.and_then(&dek).ok_or_else(unencrypted)?;
            dek.write_backup_keys(&head.volume.to_string(), room);
        }
        // They are the fetcher's to wipe.
        memory.hand_over();
        Ok(Some(Keys { layers, secret: passed }))
    }
}

/// A fetcher that is ready.
pub struct Fetcher {
    socket: UnixStream,
    lines: Lines,
    /// It ends when everything is there, or with this process.
    _child: Child,
    hearing: Hearing,
}

/// What hears what a fetcher says.
struct Hearing(Vec<Arc<Coming>>);

impl Fetcher {
    /// Starts a fetcher for the volume. What it has to say for people goes to `log`, if that is not this
    /// process's standard error. Its source need not be there.
    ///
    /// # Errors
    /// What keeps it from being started; `Corrupt` if what is said to be to come is not what whoever has the
    /// data keys wrote.
    pub fn start(root: &Root, volume: VolumeId, keys: Keys, log: Option<BorrowedFd<'_>>) -> Result<Self> {
        let log = log.map(|log| log.try_clone_to_owned()).transpose()?;
        let (socket, child) = child::spawn_with(root, None, COMMAND, |program| {
            if let Some(log) = log {
                program.stderr(log);
            }
        })?;
        socket.set_read_timeout(Some(TIME))?;
        let attempt = || format!("tell the {COMMAND} helper what is to come");
        let begin = Begin { volume, layers: keys.layers.iter().map(|layer| layer.id).collect() };
        wire::say_with(&socket, &begin, keys.secret.as_fd()).context(attempt)?;
        let coming = keys.layers.iter().map(|layer| coming::of(layer.id.as_bytes(), layer.size)).collect();
        let (hearing, mut lines) = (Hearing(coming), Lines::of_at_most(MAX_LINE));
        loop {
            match next(&mut lines, &socket).context(attempt)? {
                None => return Err(Error::new(Kind::Other, "it has ended").context(attempt())),
                Some(Said::Ready) => break,
                Some(Said::Failed { kind, message }) => {
                    return Err(Error::new(Kind::from_name(&kind), printable::line(&message)));
                }
                Some(said) => hearing.hear(said),
            }
        }
        socket.set_read_timeout(None)?;
        Ok(Fetcher { socket, lines, _child: child, hearing })
    }

    /// Goes on by threads of their own: this process may be confined by now.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn go_on(self) -> io::Result<()> {
        let Fetcher { socket, mut lines, _child, hearing } = self;
        let (asks, to_ask) = channel();
        for (layer, coming) in hearing.0.iter().enumerate() {
            let asks = asks.clone();
            // Where nobody takes it, it is known soon that the fetcher has ended.
            coming.begin(Box::new(move |block| {
                drop(asks.send(block.map(|block| Ask::Block { layer, block })));
            }));
        }
        let (asking, awaited) = (socket.try_clone()?, hearing.0.clone());
        let ask = move || {
            let mut is_awaited = false;
            loop {
                // A volume for which nobody waits has nobody woken.
                let ask = match is_awaited {
                    true => to_ask.recv_timeout(LOOK),
                    false => to_ask.recv().map_err(RecvTimeoutError::from),
                };
                match ask {
                    Ok(Some(ask)) if wire::say(&asking, &ask).is_err() => return,
                    Ok(Some(_)) => {}
                    Ok(None) => is_awaited = true,
                    Err(RecvTimeoutError::Timeout) => {
                        is_awaited = awaited.iter().filter(|it| it.tick()).count() > 0;
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        };
        std::thread::Builder::new().name("coming-asks".into()).spawn(ask)?;
        let hear = move || {
            let why = loop {
                match next(&mut lines, &socket) {
                    Ok(Some(said)) => hearing.hear(said),
                    Ok(None) => break "it has ended".to_owned(),
                    Err(e) => break e.to_string(),
                }
            };
            hearing.end(&why);
        };
        std::thread::Builder::new().name("coming".into()).spawn(hear)?;
        Ok(())
    }
}

fn next(lines: &mut Lines, socket: &UnixStream) -> io::Result<Option<Said>> {
    let Some(line) = lines.next(socket)? else { return Ok(None) };
    Ok(Some(serde_json::from_slice(&line)?))
}

impl Hearing {
    fn hear(&self, said: Said) {
        match said {
            Said::Here { layer, first, count } => {
                self.of(layer).for_each(|it| it.note_here(first..first.saturating_add(count)));
            }
            Said::Whole { layer } => self.of(layer).for_each(|it| it.note_whole()),
            Said::Refused { layer, block, why } => {
                self.of(layer).for_each(|it| it.refuse(block, printable::line(&why).into_owned()));
            }
            Said::Away { why } => coming::set_away(Some(printable::line(&why).into_owned())),
            Said::Back => coming::set_away(None),
            Said::Ready | Said::Failed { .. } => {}
        }
    }

    fn of(&self, layer: usize) -> impl Iterator<Item = &Arc<Coming>> {
        self.0.get(layer).into_iter()
    }

    fn end(&self, why: &str) {
        if self.0.iter().all(|it| it.is_all_here()) {
            return coming::set_away(None);
        }
        let message = format!(
            "the process that brings what is still to come of the volume's layers is gone ({why}); have \
             \"sealblk upgrade\" start another one, or detach the volume and attach it again"
        );
        log::error!("{message}");
        coming::set_away(Some(message.clone()));
        self.0.iter().for_each(|it| it.end(&message));
    }
}
