//! What a backup says of the volume that a snapshot is of, so that a restore can make it again: its name, its
//! tags, what is kept with it, and which snapshots are of one moment with this one.
//!
//! It stands in the snapshot's tags, whose keys begin with `sealblk:`, beside the volume's own tags. In a
//! place it is proved with the manifest. What nobody has proved yet serves to choose by, and no more.

use crate::base::Result;
use crate::catalog::VolumeId;
use crate::catalog::attach_settings::AttachSettings;
use crate::catalog::snapshot::{Label, Snapshot};
use crate::catalog::tags::Tags;
use uuid::Uuid;

/// What the keys begin with that are of this.
const OURS: &str = "sealblk:";
/// The place that the backup went to.
const PLACE: &str = "sealblk:place";
/// The store that was backed up.
const STORE: &str = "sealblk:store";
/// A moment, and of how many volumes it is.
const MOMENT: &str = "sealblk:moment";
/// The volume's name.
const NAME: &str = "sealblk:name";
/// What is kept with the volume for its attaches, in JSON.
const ATTACH: &str = "sealblk:attach";
/// The embedded KMS of the store.
const KMS: &str = "sealblk:kms";
/// That it is being sent, and which snapshot of it this is.
const SENT: &str = "sealblk:sent";
/// On a snapshot that was pulled to be made a volume of, and on that volume: the snapshot in the place.
pub(crate) const RESTORED: &str = "sealblk:restored";
/// So many tags of a volume go with it: the others make room for those of this.
const MOST: usize = Tags::MAX - 8;

/// What is said of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedVolume {
    /// The place that the backup is for.
    pub(crate) place: Uuid,
    /// The store, by the id that this place knows it by.
    pub(crate) store: Uuid,
    /// The moment that the snapshot is of. Of version 7, so that of two in one second the later one is known.
    pub(crate) moment: Uuid,
    /// How many volumes have a snapshot of that moment.
    pub(crate) of_moment: usize,
    /// The volume's name.
    pub(crate) name: Option<String>,
    /// What is kept with it.
    pub(crate) attach: AttachSettings,
    /// The embedded KMS of the store.
    pub(crate) kms: Option<Uuid>,
    /// That it is no backup: the volume is being sent to another host.
    pub(crate) sent: Option<Sent>,
}

/// Which snapshot of a volume that is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// One of a volume that is still used.
    First,
    /// That of which the other host makes the volume.
    Last,
}

impl SavedVolume {
    /// The label of the snapshot, with the volume's own `tags`; and how many of these found no room.
    pub(crate) fn label(&self, tags: &Tags) -> Result<(Label, usize)> {
        let own: Vec<_> = tags.iter().filter(|(key, _)| !key.starts_with(OURS)).collect();
        let mut all = Tags::default();
        for (key, value) in own.iter().take(MOST) {
            all.set(key, value)?;
        }
        all.set(PLACE, &self.place.to_string())?;
        all.set(STORE, &self.store.to_string())?;
        all.set(MOMENT, &format!("{} {}", self.moment, self.of_moment))?;
        if let Some(name) = &self.name {
            all.set(NAME, name)?;
        }
        if !self.attach.is_empty() {
            all.set(ATTACH, &serde_json::to_string(&self.attach).expect("numbers and a text"))?;
        }
        if let Some(kms) = self.kms {
            all.set(KMS, &kms.to_string())?;
        }
        let description = match self.sent {
            None => "made by sealblk backup",
            Some(sent) => {
                all.set(SENT, if sent == Sent::Last { "last" } else { "first" })?;
                "made by sealblk volume send"
            }
        };
        Ok((Label::new(description.into(), all)?, own.len().saturating_sub(MOST)))
    }

    /// What a snapshot's label says; none if neither a backup nor a sending has made it.
    pub(crate) fn of(label: &Label) -> Option<Self> {
        let id = |key| label.tags.get(key)?.parse().ok();
        let (moment, of_moment) = label.tags.get(MOMENT)?.split_once(' ')?;
        let attach = label.tags.get(ATTACH).map(serde_json::from_str::<AttachSettings>);
        Some(SavedVolume {
            place: id(PLACE)?,
            store: id(STORE)?,
            moment: moment.parse().ok()?,
            of_moment: of_moment.parse().ok()?,
            name: label.tags.get(NAME).map(str::to_owned),
            attach: attach.and_then(Result::ok).filter(|it| it.check().is_ok()).unwrap_or_default(),
            kms: id(KMS),
            sent: match label.tags.get(SENT) {
                None => None,
                Some("last") => Some(Sent::Last),
                Some(_) => Some(Sent::First),
            },
        })
    }

    /// What tells snapshots of one second apart: the later one of a host has the greater. Nil of those that
    /// neither a backup nor a sending has made.
    pub(crate) fn moment_of(label: &Label) -> Uuid {
        Self::of(label).map_or(Uuid::nil(), |saved| saved.moment)
    }

    /// As [`SavedVolume::of`], of a backup's snapshot alone.
    pub(crate) fn of_backup(label: &Label) -> Option<Self> {
        Self::of(label).filter(|saved| saved.sent.is_none())
    }

    /// The volume's own tags, in the label of a snapshot of it.
    pub(crate) fn tags(label: &Label) -> Result<Tags> {
        let mut tags = Tags::default();
        for (key, value) in label.tags.iter().filter(|(key, _)| !key.starts_with(OURS)) {
            tags.set(key, value)?;
        }
        Ok(tags)
    }

    /// Whether a backup of this store to this place has made the snapshot here, of this volume if one is
    /// named. One that came back from the place says the same, and is none.
    pub(crate) fn is_own(snapshot: &Snapshot, place: Uuid, store: Uuid, volume: Option<VolumeId>) -> bool {
        let saved = Self::of_backup(snapshot.label());
        saved.is_some_and(|saved| (saved.place, saved.store) == (place, store))
            && snapshot.copy_of().is_none()
            && volume.is_none_or(|id| id == snapshot.volume())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_says_what_the_volume_was() {
        let attach = AttachSettings {
            iops: Some(u64::MAX),
            throughput: Some(u64::MAX),
            burst_ms: Some(u64::MAX),
            serial: Some("\"".repeat(20)),
            queues: Some(64),
        };
        let saved = SavedVolume {
            place: Uuid::new_v4(),
            store: Uuid::new_v4(),
            moment: Uuid::new_v4(),
            of_moment: 3,
            name: Some("db".into()),
            attach,
            kms: Some(Uuid::new_v4()),
            sent: Some(Sent::Last),
        };
        let mut tags = Tags::default();
        (0..Tags::MAX - 1).for_each(|n| tags.set(&format!("{n:02}"), "x").unwrap());
        tags.set("sealblk:name", "another").unwrap();
        let (mut label, left_out) = saved.label(&tags).unwrap();
        assert_eq!(left_out, Tags::MAX - 1 - MOST);
        assert_eq!((SavedVolume::of(&label), SavedVolume::of_backup(&label)), (Some(saved.clone()), None));
        assert_eq!(SavedVolume::tags(&label).unwrap().iter().count(), MOST);
        // There is room for what a restore adds.
        label.tags.set(RESTORED, "snap-0123456789abcdef0").unwrap();
        let attach = AttachSettings::default();
        let bare = SavedVolume { name: None, attach, kms: None, sent: None, ..saved };
        let (label, _) = bare.label(&Tags::default()).unwrap();
        assert_eq!((SavedVolume::of_backup(&label), label.tags.iter().count()), (Some(bare), 3));
        assert_eq!(SavedVolume::of(&Label::default()), None);
    }
}
