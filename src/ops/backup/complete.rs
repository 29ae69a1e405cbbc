//! The rest of a snapshot that was pulled lazily comes at once, while one waits.

use super::fetch::{Fetching, Layer, Problem, Report};
use crate::backing::coming::BLOCK;
use crate::base::{Error, Kind, Result};
use crate::catalog::layout::{KeyRecord, LayerRecord};
use crate::catalog::{SnapshotId, VolumeId};
use crate::disk::transfer::Watch;
use crate::helper::carry::Carriers;
use crate::helper::unwrap;
use crate::kms::Failure;
use crate::ops::Store;
use crate::sandbox;

/// Whose layers are to be completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// A snapshot's.
    Snapshot(SnapshotId),
    /// A volume's, those below its top.
    Volume(VolumeId),
}

/// Brings all that is still to come of these layers, at most `rate` bytes a second (0: no limit). `watch` is
/// told how far it has come; an error of it ends it, and the next one goes on. Returns whether anything was
/// still to come. This process, and what it starts, has no network afterwards.
///
/// # Errors
/// Those of the place, which is not waited for, and of the KMS; `Corrupt` for blocks that are missing, or not
/// what they are named for: all others have come then.
pub fn complete(store: &Store, of: Of, rate: u64, watch: Watch<'_>) -> Result<bool> {
    let attempt = |e: Error| match of {
        Of::Snapshot(id) => e.context(format!("complete {id}")),
        Of::Volume(id) => e.context(format!("complete {id}")),
    };
    bring(store, of, rate, watch).map_err(|failure| attempt(failure.error))
}

fn bring(store: &Store, of: Of, rate: u64, watch: Watch<'_>) -> Result<bool, Failure> {
    let catalog = store.catalog();
    let (owner, layers, keys): (_, Vec<LayerRecord>, Vec<KeyRecord>) = match of {
        Of::Snapshot(id) => {
            let it = catalog.load_snapshot(id)?;
            (it.key_owner(), it.layers().to_vec(), it.keys().to_vec())
        }
        Of::Volume(id) => {
            let it = catalog.load(id)?;
            (id.into(), it.layers().to_vec(), it.keys().to_vec())
        }
    };
    let coming = catalog.coming_of(&layers);
    if coming.is_empty() {
        return Ok(false);
    }
    let mut known = Vec::new();
    let mut volume = None;
    for layer in &coming {
        let head = catalog.wanted_head(layer.id)?;
        let unencrypted =
            || Error::new(Kind::Corrupt, format!("layer {} has no data key that proves it", layer.id));
        let key = layer.key.and_then(|n| keys.get(n)).ok_or_else(unencrypted)?;
        known.push(unwrap::backup_keys(store.hardened(), store.root(), owner, key, head.volume)?);
        volume = volume.or(Some(head.volume));
    }
    let carriers = Carriers::start(store.root())?;
    sandbox::give_up_network()?;
    let opened = coming.iter().zip(known).map(|(layer, keys)| {
        Layer::open(&catalog, layer, keys).map(|opened| opened.map(|layer| layer.at_rate(rate)))
    });
    let opened = opened.collect::<Result<Vec<_>>>()?;
    let events = store.events();
    let volume = match (of, volume) {
        (Of::Volume(id), _) => id,
        (Of::Snapshot(_), Some(id)) => id,
        (Of::Snapshot(_), None) => return Ok(false),
    };
    let fetching = Fetching::new(&catalog, &carriers, opened, Report { events: &events, volume });
    fetching.bring_all(&mut |come, all, problem| match problem {
        Some(Problem::Away(e)) => Err(e),
        Some(Problem::Refused(count, first)) => {
            Err(first.context(format!("{count} of its blocks are not as they should be, the first")))
        }
        None => watch(come.saturating_mul(BLOCK), all.saturating_mul(BLOCK)),
    })?;
    Ok(true)
}
