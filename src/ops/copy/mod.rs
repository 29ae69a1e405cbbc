//! Copies of snapshots: under the same data keys, wrapped anew by the KMS for the copy's id, so that nobody sees them.
//!
//! The copy names the same layers. What proves them is still the original's MAC (docs/format.md). Copies under other data
//! keys are in [`full`].

pub mod full;

use crate::base::{Result, Timestamp};
use crate::catalog::metadata::encryption_context;
use crate::catalog::references::StoreLock;
use crate::catalog::snapshot::{Label, Snapshot};
use crate::catalog::{Catalog, SnapshotId};
use crate::events::{Event, EventLog};
use crate::kms::Failure;
use crate::ops::clone::{Keys, rewrap_all};

/// Copies a snapshot under the KMS keys that it has, and reports a `copySnapshot` event.
///
/// # Errors
/// The KMS's; `NotFound` if the snapshot was deleted meanwhile; those of the file system.
pub fn copy(
    catalog: &Catalog,
    events: &EventLog,
    source: &Snapshot,
    label: Label,
    keys: Keys<'_>,
) -> Result<Snapshot> {
    let started = Timestamp::now();
    let made = make(catalog, source, label, keys);
    let result = made.as_ref().map(Snapshot::id).map_err(|failure| failure.cause.clone());
    events.record(&Event::copy_snapshot(source.id(), source.volume(), result, started, true));
    made.map_err(|failure| failure.error.context(format!("copy {}", source.id())))
}

fn make(catalog: &Catalog, source: &Snapshot, label: Label, keys: Keys<'_>) -> Result<Snapshot, Failure> {
    let id = SnapshotId::random();
    let mut rewrapped = rewrap_all(source, &encryption_context(id), keys)?;
    for (new, old) in rewrapped.iter_mut().zip(source.keys()) {
        new.check = old.check;
    }
    let mut copy = source.clone();
    copy.id = id;
    copy.copy_of = Some(source.id());
    copy.layout.keys = rewrapped;
    copy.created = Timestamp::now();
    copy.label = label;
    let _store = StoreLock::acquire(catalog)?;
    // From here on the copy names the layers, and before, the original did.
    catalog.load_snapshot(source.id())?;
    catalog.store_snapshot(&copy)?;
    Ok(copy)
}
