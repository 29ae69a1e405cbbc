//! Wrapping the data keys of a volume anew.

use crate::base::{Kind, Result};
use crate::catalog::lock::{Held, Holder, Purpose, VolumeLock};
use crate::catalog::metadata::KeyRecord;
use crate::catalog::rewrap::Rewrapped;
use crate::catalog::{Catalog, Metadata, VolumeId};
use crate::helper::rewrap::by_helper;
use crate::host::control;
use crate::kms::KeyRef;
use serde::Serialize;

/// A data key that was wrapped anew.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// Which of the volume's keys.
    #[serde(rename = "key")]
    pub slot: usize,
    /// The KMS key that it was wrapped by, as `provider:arn`.
    pub from: String,
    /// The KMS key that it is wrapped by now.
    pub to: String,
}

/// Wraps those data keys of `volume` anew for which `target` names a KMS key, and answers what was done.
///
/// # Errors
/// What the KMS says; `Busy` if the volume is held for something else. Keys before the one that failed are done.
pub fn rewrap(
    catalog: &Catalog,
    volume: VolumeId,
    target: impl Fn(&KeyRecord) -> Option<KeyRef>,
) -> Result<Vec<Change>> {
    let lock = take(catalog, volume)?;
    let metadata = catalog.load(volume)?;
    let mut changes = Vec::new();
    for (slot, old) in metadata.keys().iter().enumerate() {
        let Some(to) = target(old) else { continue };
        let new = by_helper(catalog.root(), volume, old, &to)?;
        let note = Rewrapped::new(slot, old, to.provider.as_str(), &new);
        match &lock {
            Some(lock) => store(catalog, lock, &note)?,
            None => control::rewrap(catalog, volume, note)?,
        }
        let name = |provider: &str, key: &str| format!("{provider}:{key}");
        changes.push(Change {
            slot,
            from: name(&old.provider, &old.wrapped.key_id),
            to: name(to.provider.as_str(), &new.key_id),
        });
    }
    Ok(changes)
}

/// Takes the volume; `None` if it is attached, so that its host process has it.
fn take(catalog: &Catalog, volume: VolumeId) -> Result<Option<VolumeLock>> {
    let holder = Holder::this_process(Purpose::Rewrap, None)?;
    let taken = VolumeLock::acquire(&catalog.folder(volume), volume, &holder);
    let Err(e) = taken else { return taken.map(Some) };
    match catalog.held(volume)? {
        Held::By(Holder { purpose: Purpose::Attach, .. }) if e.kind() == Kind::Busy => Ok(None),
        _ => Err(e),
    }
}

fn store(catalog: &Catalog, lock: &VolumeLock, note: &Rewrapped) -> Result<()> {
    // As it is on disk now: an earlier key of this volume has been replaced there.
    let mut metadata: Metadata = catalog.load(lock.volume())?;
    metadata.rewrap(note)?;
    catalog.store(lock, &mut metadata)
}
