//! Rotation: new material for a key, by its period or on demand. Old versions stay, so that what they
//! have encrypted can be read.

use crate::kms::embedded::Embedded;
use crate::kms::embedded::audit::Call;
use crate::kms::embedded::blob::Material;
use crate::kms::embedded::open_log::OpenLog;
use crate::kms::embedded::records::{Change, KeyEntry, Rotation, RotationType, VersionEntry, material_id};
use crate::kms::errors::out_of_range;
use crate::kms::{Exception, KeyState, KmsError};
use std::ops::RangeInclusive;
use uuid::Uuid;

/// How often a key may be rotated by itself, days.
pub const PERIOD_DAYS: RangeInclusive<u32> = 90..=2560;
/// The period of those who do not name one, days.
pub const DEFAULT_PERIOD: u32 = 365;
/// How often a key may be rotated on demand.
pub const ON_DEMAND_MAX: usize = 25;

const DAY: i64 = 24 * 3_600_000;

/// The times that a key can be made or rotated at: milliseconds since 1970, to the end of the year 9999.
pub(super) const TIMES: RangeInclusive<i64> = 0..=253_402_300_799_999;

/// What GetKeyRotationStatus tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RotationStatus {
    /// The key's ARN.
    pub key: String,
    /// Period in days and when next (milliseconds since 1970), while the key is rotated by itself.
    pub automatic: Option<(u32, i64)>,
}

/// One version of a key, as ListKeyRotations tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyVersion {
    /// KeyMaterialId.
    pub material: String,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// What made it; `None` for the first.
    pub rotation: Option<RotationType>,
    /// Whether it is the one that encrypts.
    pub current: bool,
}

impl Rotation {
    /// From now on every `days`.
    pub fn begin(days: u32, now: i64) -> Self {
        Rotation { days, next: now.saturating_add(i64::from(days) * DAY) }
    }

    /// Whether a rotation can be like this: a period of [`PERIOD_DAYS`], and a next time that people can have
    /// meant.
    pub(super) fn is_sound(&self) -> bool {
        PERIOD_DAYS.contains(&self.days) && TIMES.contains(&self.next)
    }

    /// The period in milliseconds. A log may have taken another one from another region, before such messages
    /// were refused: whatever stands there, the KMS goes on.
    fn period(&self) -> i64 {
        i64::from(self.days.clamp(*PERIOD_DAYS.start(), *PERIOD_DAYS.end())) * DAY
    }

    /// Whether the day has come. A next time that lies further away than a period was set
    /// by a clock that was wrong.
    pub fn is_due(&self, now: i64) -> bool {
        now >= self.next || self.next.saturating_sub(now) > 2 * self.period()
    }

    /// The rotation after one that was done at `now`.
    pub fn after(self, now: i64) -> Self {
        let period = self.period();
        let missed = now.saturating_sub(self.next).max(0) / period;
        let next = self.next.saturating_add((missed + 1).saturating_mul(period));
        let keeps_the_rhythm = next > now && next.saturating_sub(now) <= period;
        Rotation { next: if keeps_the_rhythm { next } else { now.saturating_add(period) }, ..self }
    }
}

impl Embedded {
    /// EnableKeyRotation: every `days` of [`PERIOD_DAYS`], counted from now.
    pub fn enable_rotation(&self, key: &str, days: u32) -> Result<(), KmsError> {
        if !PERIOD_DAYS.contains(&days) {
            return Err(out_of_range(days, "rotationPeriodInDays", &PERIOD_DAYS));
        }
        let enabled = self.change_key(key, |entry, now| {
            self.check_rotatable(entry)?;
            if entry.rotation.as_ref().is_some_and(|rotation| rotation.days == days) {
                return Ok(entry.clone());
            }
            let rotation = Some(Rotation::begin(days, now.moment.wall));
            Ok(KeyEntry { rotation, ..entry.clone() }.shared_anew())
        });
        let call = Call::new("EnableKeyRotation").on(key).with("rotationPeriodInDays", days);
        self.record(call, enabled.map(drop))
    }

    /// DisableKeyRotation.
    pub fn disable_rotation(&self, key: &str) -> Result<(), KmsError> {
        let disabled = self.change_key(key, |entry, _| {
            self.check_rotatable(entry)?;
            if entry.rotation.is_none() {
                return Ok(entry.clone());
            }
            Ok(KeyEntry { rotation: None, ..entry.clone() }.shared_anew())
        });
        self.record(Call::new("DisableKeyRotation").on(key), disabled.map(drop))
    }

    /// GetKeyRotationStatus. A key that waits for deletion is not rotated.
    pub fn rotation_status(&self, key: &str) -> Result<RotationStatus, KmsError> {
        self.current(|log| {
            let entry = log.state().key(key, &self.place)?;
            entry.check_origin(false, &self.place)?;
            let rotation = entry.rotation.as_ref().filter(|_| entry.state() != KeyState::PendingDeletion);
            let automatic = rotation.map(|rotation| (rotation.days, rotation.next));
            Ok(RotationStatus { key: self.place.key_arn(entry.id), automatic })
        })
    }

    /// RotateKeyOnDemand; returns the key's ARN. The rhythm of the automatic rotation stays. A multi-Region
    /// key that has replicas encrypts by the new version once all of them have it.
    pub fn rotate_on_demand(&self, key: &str) -> Result<String, KmsError> {
        let rotated = self.log.write(|log, now| {
            let entry = log.state().key(key, &self.place)?.clone();
            self.check_rotatable(&entry)?;
            let arn = self.place.key_arn(entry.id);
            let on_demand = entry.versions.iter().filter(|v| v.rotation == Some(RotationType::OnDemand));
            if on_demand.count() >= ON_DEMAND_MAX {
                return Err(KmsError::Other(
                    Exception::LimitExceeded,
                    format!("{arn} has been rotated on demand {ON_DEMAND_MAX} times, which is the limit."),
                ));
            }
            if entry.versions.iter().any(|version| version.waits) {
                let message =
                    format!("{arn} is being rotated: not all of its replicas have the new material.");
                return Err(KmsError::Other(Exception::Conflict, message));
            }
            let version = new_version(log, &entry, now.time, RotationType::OnDemand)?;
            Ok((vec![Change::Key(entry.with_version(version))], arn))
        });
        self.record(Call::new("RotateKeyOnDemand").on(key), rotated)
    }

    /// The versions of a key, oldest first.
    pub fn versions(&self, key: &str) -> Result<Vec<KeyVersion>, KmsError> {
        self.current(|log| {
            let entry = log.state().key(key, &self.place)?;
            let current = entry.current().map(|v| v.id);
            let version = |v: &VersionEntry| KeyVersion {
                material: material_id(entry.id, v.id),
                created: v.created,
                rotation: v.rotation,
                current: Some(v.id) == current,
            };
            Ok(entry.versions.iter().map(version).collect())
        })
    }

    fn check_rotatable(&self, key: &KeyEntry) -> Result<(), KmsError> {
        key.check_alive(&self.place)?;
        key.check_origin(false, &self.place)?;
        key.check_usable(&self.place)?;
        self.check_primary(key)?;
        self.check_not_updating(key)
    }
}

/// A new version of `key`, with new material.
pub fn new_version(
    log: &OpenLog,
    key: &KeyEntry,
    time: i64,
    rotation: RotationType,
) -> Result<VersionEntry, KmsError> {
    Ok(VersionEntry { rotation: Some(rotation), ..first_version(log, key.id, time)? })
}

/// The first version of a key.
pub fn first_version(log: &OpenLog, key: Uuid, time: i64) -> Result<VersionEntry, KmsError> {
    let id = Uuid::new_v4();
    let sealed = log.keys().seal(key, id, &Material::random()?)?;
    Ok(VersionEntry { id, created: time, rotation: None, waits: false, sealed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_periods_are_one_rotation_and_the_rhythm_stays() {
        let rotation = Rotation::begin(90, 0);
        assert!(!rotation.is_due(90 * DAY - 1) && rotation.is_due(90 * DAY));
        assert_eq!(rotation.clone().after(90 * DAY).next, 180 * DAY);
        assert_eq!(rotation.clone().after(400 * DAY).next, 450 * DAY);
        assert_eq!(rotation.after(449 * DAY).next, 450 * DAY);
    }

    #[test]
    fn a_clock_that_was_far_ahead_does_not_end_rotation() {
        let rotation = Rotation::begin(90, 9_000 * DAY);
        assert!(rotation.is_due(100 * DAY), "the clock is right again");
        assert_eq!(rotation.after(100 * DAY).next, 190 * DAY);
    }

    #[test]
    fn a_rotation_that_cannot_be_does_not_end_the_kms() {
        for days in [0, 1, 90, 2560, u32::MAX] {
            for next in [i64::MIN, -1, 0, 90 * DAY, i64::MAX] {
                let rotation = Rotation { days, next };
                for now in [i64::MIN, 0, 1_000 * DAY, i64::MAX] {
                    let _ = rotation.is_due(now);
                    assert!(rotation.clone().after(now).next >= next.min(now));
                }
                assert_eq!(rotation.is_sound(), [90, 2560].contains(&days) && [0, 90 * DAY].contains(&next));
                // What was wrong is right after one rotation.
                assert!(!rotation.after(1_000 * DAY).is_due(1_000 * DAY));
            }
        }
    }
}
