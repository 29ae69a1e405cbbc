//! The fetcher, as the process sees it that it brings blocks for: the host process of a volume of which some
//! layers are still coming.
//!
//! The fetcher is a process of its own, one an attach. It has the keys by which blocks are proved, which open
//! no data and come from the host process at the beginning, and no network; below it is a carrier
//! ([`super::carry`]), which has a network and no key. It writes what it has proved into the layers' files,
//! and says what is there. So nothing that a place, or the way to it, can say reaches the host process. The
//! two share a socket, the fetcher's standard input; messages are lines of JSON.
//!
//! A host process is confined, and can start nothing. So there is one process more, which has neither key nor
//! data and starts fetchers for it ([`starter`]): one that is killed is followed by another
//! ([`following`]).

mod following;
pub(crate) mod starter;

pub use following::Fetcher;

use crate::base::{Error, Kind, Result};
use crate::catalog::layout::LayerRecord;
use crate::catalog::{Catalog, LayerId, Metadata, VolumeId};
use crate::crypt::secret_mem::{SecretFd, SecretMem, on_scrubbed_stack};
use crate::crypt::{BackupKeys, Dek};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;

/// The hidden subcommand.
pub const COMMAND: &str = "fetch";
/// The longest line in bytes: a volume has up to 256 layers.
pub(crate) const MAX_LINE: usize = 64 << 10;

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
    /// The volume has no such layer any more.
    Gone { layer: usize },
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
    secret: SecretMem,
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
        let mut secret = SecretMem::new(layers.len() * BackupKeys::LEN)?;
        for (layer, room) in layers.iter().zip(secret.as_mut_slice().chunks_mut(BackupKeys::LEN)) {
            let head = catalog.wanted_head(layer.id)?;
            let unencrypted = || {
                let message =
                    format!("layer {} is still coming, and has no data key that proves it", layer.id);
                Error::new(Kind::Corrupt, message)
            };
            let dek = layer.key.and_then(&dek).ok_or_else(unencrypted)?;
            dek.write_backup_keys(&head.volume.to_string(), room);
        }
        Ok(Some(Keys { layers, secret }))
    }

    /// A copy for a fetcher, which wipes it.
    fn copy(&self) -> Result<SecretFd> {
        let secret = SecretFd::create(self.secret.len())?;
        let passed = SecretFd::from_fd(secret.as_fd().try_clone_to_owned()?)?;
        let mut memory = secret.map()?;
        on_scrubbed_stack(|| memory.as_mut_slice().copy_from_slice(self.secret.as_slice()));
        memory.hand_over();
        Ok(passed)
    }
}
