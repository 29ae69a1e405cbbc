//! What an entry of the ledger says of a record, and what may become of that without a command.

use super::Facts;
use crate::base::Timestamp;
use crate::catalog::layout::Layout;
use crate::catalog::layout::written::{WrittenKey, WrittenLayer, WrittenLayout, required};
use crate::catalog::metadata::written::WrittenOrigin;
use crate::catalog::metadata::{KeyRecord, Metadata, Origin, VolumeName, encryption_context};
use crate::catalog::{LayerId, Snapshot, VolumeId};
use crate::crypt::SectorSize;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What commands have made of a volume: everything of its record, except what its host process alone changes
/// (the generation, whether it was ever attached, its seal).
///
/// The wrapped data keys are there by their SHA-256.
///
/// A host process may do two things by itself: seal a volume that had no seal, and take those layers out of
/// the chain that a command has marked to be hydrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumeFacts {
    id: VolumeId,
    name: Option<VolumeName>,
    created: Timestamp,
    layout: Layout,
    origin: Option<Origin>,
    sealed: bool,
}

/// The facts as they are written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WrittenVolume {
    #[serde(deserialize_with = "required")]
    name: Option<VolumeName>,
    created: Timestamp,
    size: u64,
    sector_size: SectorSize,
    encrypted: bool,
    keys: Vec<WrittenKey>,
    layers: Vec<WrittenLayer>,
    #[serde(deserialize_with = "required")]
    hydrate: Option<LayerId>,
    #[serde(deserialize_with = "required")]
    origin: Option<WrittenOrigin>,
    sealed: bool,
}

impl VolumeFacts {
    /// What this record says.
    pub(crate) fn of(volume: &Metadata) -> Self {
        let mut layout = volume.layout().clone();
        for key in &mut layout.keys {
            // A digest stands for the wrapped key: of that, no copy stays behind when the volume is shredded.
            for slot in &mut key.slots {
                slot.wrapped.blob = Sha256::digest(&slot.wrapped.blob).to_vec();
            }
        }
        VolumeFacts {
            id: volume.id(),
            name: volume.name().cloned(),
            created: volume.created(),
            layout,
            origin: volume.origin().cloned(),
            sealed: volume.is_sealed(),
        }
    }
}

impl VolumeFacts {
    /// The layers that it names.
    pub(crate) fn layers(&self) -> impl Iterator<Item = LayerId> + '_ {
        self.layout.layers().iter().map(|layer| layer.id)
    }
}

/// Whether these may be the keys of whatever had `known`: whoever seals a volume notes their check values.
fn are_keys_of(known: &[KeyRecord], found: &[KeyRecord]) -> bool {
    let same = |(known, found): (&KeyRecord, &KeyRecord)| {
        let is_check = known.check.is_none() || known.check == found.check;
        is_check && known.slots() == found.slots()
    };
    known.len() == found.len() && known.iter().zip(found).all(same)
}

impl Facts for VolumeFacts {
    type Written = WrittenVolume;

    fn format(&self) -> u32 {
        if self.layout.has_slots() { 2 } else { 1 }
    }

    fn to_written(&self) -> WrittenVolume {
        let layout = WrittenLayout::of(&self.layout, &encryption_context(self.id));
        WrittenVolume {
            name: self.name.clone(),
            created: self.created,
            size: layout.size,
            sector_size: layout.sector_size,
            encrypted: layout.encrypted,
            keys: layout.keys,
            layers: layout.layers,
            hydrate: layout.hydrate,
            origin: self.origin.as_ref().map(WrittenOrigin::from),
            sealed: self.sealed,
        }
    }

    fn from_written(w: WrittenVolume, id: &str) -> Result<Self, String> {
        let id: VolumeId = id.parse()?;
        let layout = WrittenLayout {
            size: w.size,
            sector_size: w.sector_size,
            encrypted: w.encrypted,
            keys: w.keys,
            layers: w.layers,
            hydrate: w.hydrate,
        };
        Ok(VolumeFacts {
            id,
            name: w.name,
            created: w.created,
            layout: layout.parse(&encryption_context(id))?,
            origin: w.origin.map(Origin::try_from).transpose()?,
            sealed: w.sealed,
        })
    }

    fn difference(&self, found: &Self) -> Option<String> {
        let name = |facts: &Self| match &facts.name {
            Some(name) => format!("\"{name}\""),
            None => "none".into(),
        };
        let encrypted = |is: bool| if is { "encrypted" } else { "not encrypted" };
        let (ours, theirs) = (&self.layout, &found.layout);
        if self.name != found.name {
            return Some(format!("its name is {} and was {}", name(found), name(self)));
        }
        if ours.is_encrypted() != theirs.is_encrypted() {
            let (is, was) = (encrypted(theirs.is_encrypted()), encrypted(ours.is_encrypted()));
            return Some(format!("it is {is} and was {was}"));
        }
        if ours.geometry != theirs.geometry {
            let bytes = |layout: &Layout| (layout.geometry.size(), layout.geometry.sector_size().bytes());
            let ((is, sectors), (was, sectors_before)) = (bytes(theirs), bytes(ours));
            return Some(format!(
                "it has {is} bytes in sectors of {sectors}, and had {was} in sectors of {sectors_before}"
            ));
        }
        if self.sealed && !found.sealed {
            return Some("it has no seal any more".into());
        }
        let is_laid_out_so = |may: &Layout| may.layers == theirs.layers && may.hydrate == theirs.hydrate;
        let Some(may) = [ours.clone(), ours.hydrated()].into_iter().find(is_laid_out_so) else {
            return Some("its layers are not those that it had".into());
        };
        if !are_keys_of(&may.keys, &theirs.keys) {
            return Some("its wrapped data keys are not those that it had".into());
        }
        if self.origin != found.origin {
            return Some("the snapshot that it was made of is another one".into());
        }
        (self.created != found.created || self.id != found.id).then(|| "it was made at another time".into())
    }
}

/// What commands have made of a snapshot, whose record nobody else writes: the SHA-256 of the record, and the
/// layers that it names, so that these are known where the record cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotFacts {
    record: String,
    /// None in an entry of a version that did not note them.
    layers: Option<Vec<LayerId>>,
}

/// The facts as they are written.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum WrittenSnapshot {
    /// Of a version that did not note the layers.
    Record(String),
    Whole(WrittenWhole),
}

/// The facts as this version writes them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WrittenWhole {
    record: String,
    layers: Vec<LayerId>,
}

impl SnapshotFacts {
    /// What this record says.
    pub(crate) fn of(snapshot: &Snapshot) -> Self {
        let layers = snapshot.layers().iter().map(|layer| layer.id).collect();
        SnapshotFacts { record: hex::encode(Sha256::digest(snapshot.to_json())), layers: Some(layers) }
    }

    /// The layers that the record names, if that is known.
    pub(crate) fn layers(&self) -> Option<Vec<LayerId>> {
        self.layers.clone()
    }
}

impl Facts for SnapshotFacts {
    type Written = WrittenSnapshot;

    fn to_written(&self) -> WrittenSnapshot {
        let record = self.record.clone();
        match self.layers.clone() {
            None => WrittenSnapshot::Record(record),
            Some(layers) => WrittenSnapshot::Whole(WrittenWhole { record, layers }),
        }
    }

    fn from_written(written: WrittenSnapshot, _id: &str) -> Result<Self, String> {
        Ok(match written {
            WrittenSnapshot::Record(record) => SnapshotFacts { record, layers: None },
            WrittenSnapshot::Whole(WrittenWhole { record, layers }) => {
                SnapshotFacts { record, layers: Some(layers) }
            }
        })
    }

    fn difference(&self, found: &Self) -> Option<String> {
        (self.record != found.record).then(|| "its record is not the one that it had".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::metadata::Geometry;
    use crate::kms::WrappedKey;

    fn volume() -> Metadata {
        let wrapped = WrappedKey { key_id: "arn:aws:kms:us-east-1:0:key/1".into(), blob: vec![1; 141] };
        let key = KeyRecord::new(crate::catalog::slots::KeySlot::new("embedded", wrapped));
        Metadata::new(VolumeId::random(), None, Geometry::new(1 << 20, SectorSize::B512).unwrap(), Some(key))
    }

    #[test]
    fn which_layers_are_to_leave_is_what_a_command_has_said() {
        let two = volume().frozen(LayerId::random());
        let marked = two.to_flatten().unwrap();
        let (two, marked) = (VolumeFacts::of(&two), VolumeFacts::of(&marked));
        assert_eq!(two.layout.layers, marked.layout.layers);
        for (known, found) in [(&two, &marked), (&marked, &two)] {
            assert_eq!(known.difference(found).as_deref(), Some("its layers are not those that it had"));
        }
        assert_eq!((two.difference(&two), marked.difference(&marked)), (None, None));
    }

    #[test]
    fn a_check_value_is_noted_once_by_whoever_seals_and_stays() {
        let unknown = VolumeFacts::of(&volume());
        let with = |check| {
            let mut facts = unknown.clone();
            facts.layout.keys[0].check = Some(check);
            facts
        };
        let (one, other) = (with([1; 16]), with([2; 16]));
        assert_eq!(unknown.difference(&one), None);
        for (known, found) in [(&one, &other), (&one, &unknown)] {
            let what = known.difference(found);
            assert_eq!(what.as_deref(), Some("its wrapped data keys are not those that it had"));
        }
    }

    #[test]
    fn a_snapshot_s_entry_of_an_earlier_version_is_understood_and_knows_no_layers() {
        let written: WrittenSnapshot = serde_json::from_str("\"0123\"").unwrap();
        let before = SnapshotFacts::from_written(written, "").unwrap();
        assert_eq!(before, SnapshotFacts { record: "0123".into(), layers: None });
        assert_eq!(serde_json::to_string(&before.to_written()).unwrap(), "\"0123\"");
        let now = SnapshotFacts { layers: Some(vec![LayerId::random()]), ..before.clone() };
        assert_eq!((before.difference(&now), now.difference(&before)), (None, None));
        let text = serde_json::to_string(&now.to_written()).unwrap();
        let read = SnapshotFacts::from_written(serde_json::from_str(&text).unwrap(), "").unwrap();
        assert_eq!(read, now);
        let other = SnapshotFacts { record: "4567".into(), ..now };
        assert!(before.difference(&other).is_some());
        for wrong in ["{}", "7", "{\"record\":\"\",\"layers\":[],\"x\":1}", "{\"record\":\"\"}"] {
            assert!(serde_json::from_str::<WrittenSnapshot>(wrong).is_err(), "{wrong}");
        }
    }
}
