//! What the passing of time asks of a store: keys whose waiting window is over, rotations whose day has
//! come, imported material that has expired.

use crate::kms::embedded::clock::Moment;
use crate::kms::embedded::deletion::Verdict;
use crate::kms::embedded::import::without_material;
use crate::kms::embedded::open_log::OpenLog;
use crate::kms::embedded::records::{AliasName, Change, Deletion, KeyEntry, KeyId, RotationType};
use crate::kms::embedded::rotation::new_version;
use crate::kms::{KeyState, KmsError};

/// Whether anything is due in the store of this region.
pub(super) fn is_due(log: &OpenLog, now: &Moment, region: &str) -> bool {
    log.state().keys().any(|key| {
        rotation_is_due(key, now, region) || material_is_due(key, now) || verdict(key, now) != Verdict::Wait
    })
}

/// The changes that are due.
pub(super) fn changes(log: &OpenLog, now: &Moment, region: &str) -> Result<Vec<Change>, KmsError> {
    let mut changes = Vec::new();
    for key in log.state().keys() {
        let mut key = key.clone();
        if material_is_due(&key, now) {
            key = without_material(&key);
            changes.push(Change::Key(key.clone()));
        } else if rotation_is_due(&key, now, region) {
            key = rotated(log, key, now)?;
            changes.push(Change::Key(key.clone()));
        }
        changes.extend(deletion(log, &key, now));
    }
    Ok(changes)
}

fn verdict(key: &KeyEntry, now: &Moment) -> Verdict {
    key.deletion.as_ref().map_or(Verdict::Wait, |deletion| deletion.judge(now))
}

fn deletion(log: &OpenLog, key: &KeyEntry, now: &Moment) -> Vec<Change> {
    let seen = match verdict(key, now) {
        Verdict::Wait => return Vec::new(),
        Verdict::Delete => {
            let names = log.state().aliases_of(key.id).map(|a| AliasName { name: a.name.clone() });
            let mut changes: Vec<Change> = names.map(Change::AliasDeleted).collect();
            changes.push(Change::KeyDeleted(KeyId { id: key.id }));
            return changes;
        }
        Verdict::Saw => Some(now.clone()),
        Verdict::Unsaw => None,
    };
    let deletion = key.deletion.clone().map(|deletion| Deletion { seen, ..deletion });
    vec![Change::Key(KeyEntry { deletion, ..key.clone() })]
}

/// Whether imported material is to be forgotten.
pub(super) fn material_is_due(key: &KeyEntry, now: &Moment) -> bool {
    let expires = key.external.as_ref().and_then(|external| external.expires);
    !key.versions.is_empty() && expires.is_some_and(|at| now.wall >= at)
}

/// A key that is switched off or dying is not rotated; when it is switched on again, what is overdue is done.
/// A replica gets what its primary key gets, which rotates once all have the version before.
fn rotation_is_due(key: &KeyEntry, now: &Moment, region: &str) -> bool {
    let not_now = key.is_replica_in(region) || key.versions.iter().any(|version| version.waits);
    key.state() == KeyState::Enabled && !not_now && key.rotation.as_ref().is_some_and(|r| r.is_due(now.wall))
}

/// However many periods were missed, there is one rotation, and the next keeps the rhythm.
fn rotated(log: &OpenLog, mut key: KeyEntry, now: &Moment) -> Result<KeyEntry, KmsError> {
    let version = new_version(log, &key, now.wall.max(log.state().time()), RotationType::Automatic)?;
    key.rotation = key.rotation.map(|rotation| rotation.after(now.wall));
    Ok(key.with_version(version))
}
