//! Copies of snapshots.
//!
//! Under the KMS keys that a snapshot has, its copy has the same data keys, wrapped anew by the KMS for the
//! copy's id, so that nobody sees them: it names the same layers, and what proves them is still the
//! original's MAC (docs/format.md). Under another KMS key, and of a snapshot that is not encrypted,
//! everything is copied under a data key of its own ([`full`]).

pub mod full;
pub mod region;

use super::Store;
use super::also_keys::{Also, AlsoKeys};
use super::clone::{Keys, Which, is_key_of, rewrap_all};
use super::flatten::{Pace, hydrate};
use super::keys::NamedKey;
use super::need::Budget;
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::snapshot::{Label, Snapshot};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, SnapshotId};
use crate::crypt::xts::Engine;
use crate::disk::Disk;
use crate::events::Event;
use crate::host::status::Progress;
use crate::image::lock::Access;
use crate::kms::Failure;
use crate::volume::layers;
use crate::volume::open::shape;
use full::Copying;

/// How a copy is made.
pub enum Way {
    /// The copy has the data keys of the original, and its layers.
    Shared {
        /// The KMS keys that wrap them.
        which: Which,
        /// Those that wrap them besides.
        also: Also,
    },
    /// Everything is copied under a data key that this KMS key wraps.
    Full(NamedKey),
}

/// How a copy of `source` is made under the KMS key that `key` names; without one, under those of the source;
/// and in either case under those besides that `also` means.
///
/// # Errors
/// `Usage` for what names no key; those of the KMS.
pub fn way(store: &Store, source: &Snapshot, key: Option<&str>, also: &AlsoKeys) -> Result<Way> {
    let shared = |which: Which| Ok(Way::Shared { which, also: Also::named(store, also)? });
    let Some(key) = key else {
        if matches!(also, AlsoKeys::These(keys) if !keys.is_empty()) && !source.is_encrypted() {
            let message = format!("{} is not encrypted; name a KMS key for its copy with --key", source.id());
            return Err(Error::new(Kind::Usage, message));
        }
        return shared(Which::All);
    };
    let key = store.keys(Some(key), also)?;
    match is_key_of(&key.wrapping(), source).map_err(|failure| failure.error)? {
        Some(only) => shared(Which::Only(only)),
        None => Ok(Way::Full(key)),
    }
}

/// Copies a snapshot, and reports a `copySnapshot` event. Where everything is copied, that is done at this
/// `pace`, and `tell` is told now and then how far it has come; an interrupted copy is gone on with.
///
/// # Errors
/// `NotFound` if the snapshot was deleted meanwhile; `NoSpace` if the file system has too little; `Corrupt`
/// if it is not what whoever has its data keys made; those of the KMS and of the file system.
pub fn copy(
    store: &Store,
    source: &Snapshot,
    label: Label,
    way: &Way,
    (pace, budget): (Pace, Budget),
    tell: &mut dyn FnMut(&Progress),
) -> Result<Snapshot> {
    let (catalog, started) = (store.catalog(), Timestamp::now());
    let open_provider = |name: &str| store.provider(name);
    let unwrap = |owner, key: &_| store.unwrap(owner, key);
    let (made, is_incremental) = match way {
        Way::Shared { which, also } => {
            let keys = Keys { open_provider: &open_provider, unwrap: &unwrap, also };
            (make(&catalog, source, label, which, keys), true)
        }
        Way::Full(key) => {
            let begun = Copying::begin(&catalog, source, label, &key.wrapping(), &unwrap, budget);
            (begun.and_then(|begun| finish(&catalog, source, begun, pace, tell)), false)
        }
    };
    let result = made.as_ref().map(Snapshot::id).map_err(|failure| failure.cause.clone());
    let event = Event::copy_snapshot(source.id(), source.volume(), result, started, is_incremental);
    store.events().record(&event);
    made.map_err(|failure| failure.error.context(format!("copy {}", source.id())))
}

fn finish(
    catalog: &Catalog,
    source: &Snapshot,
    copying: Copying,
    pace: Pace,
    tell: &mut dyn FnMut(&Progress),
) -> Result<Snapshot, Failure> {
    fill(catalog, source, &copying, pace, tell)?;
    // Of one that was deleted meanwhile, a part may have been given back before it was read.
    catalog.load_snapshot(source.id())?;
    Ok(copying.commit(catalog)?)
}

/// Brings everything that the layers of `source` have into the one layer of its copy, durably.
fn fill(
    catalog: &Catalog,
    source: &Snapshot,
    copying: &Copying,
    pace: Pace,
    tell: &mut dyn FnMut(&Progress),
) -> Result<()> {
    let (dek, source_deks) = copying.deks();
    let top = layers::ciphers(std::slice::from_ref(dek), copying.copy().layout(), Engine::Auto)?;
    let below = layers::ciphers(source_deks, source.layout(), Engine::Auto)?;
    let block_size = source.geometry().sector_size().bytes();
    let records: Vec<_> = copying.copy().layers().iter().chain(source.layers()).collect();
    let ciphers: Vec<_> = top.into_iter().chain(below).collect();
    let opened = layers::open_stack(records.len(), |n, near| {
        let access = if n == 0 { Access::ReadWrite } else { Access::Read };
        layers::open_one(catalog, records[n], access, block_size, ciphers[n].clone(), near)
    })?;
    let disk = Disk::layered(shape(source.geometry(), false), "", layers::chain(&opened));
    let disk = disk.context(|| "open the layers")?.hydrating();
    drop(opened);
    hydrate(disk, pace, tell, &|_| ())
}

fn make(
    catalog: &Catalog,
    source: &Snapshot,
    label: Label,
    which: &Which,
    keys: Keys<'_>,
) -> Result<Snapshot, Failure> {
    let id = SnapshotId::random();
    let mut rewrapped = rewrap_all(source, id.into(), which, keys)?;
    for (new, old) in rewrapped.iter_mut().zip(source.keys()) {
        new.check = old.check;
    }
    let mut copy = source.clone();
    copy.id = id;
    copy.copy_of = Some(source.id());
    copy.layout.keys = rewrapped;
    copy.created = Timestamp::now();
    copy.label = label;
    let _records = RecordsLock::acquire(catalog)?;
    // From here on the copy names the layers, and before, the original did.
    catalog.load_snapshot(source.id())?;
    catalog.save_new_snapshot(&copy)?;
    Ok(copy)
}
