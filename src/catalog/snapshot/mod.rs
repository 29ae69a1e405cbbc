//! Snapshots: layers that are not written any more, and what is needed to read them.
//!
//! A snapshot is a record, `snapshots/snap-….json`; it is there if and only if the record is. The record's
//! keys are wrapped for the volume that it was made of, or, of a copy, for the snapshot itself. Its MAC is
//! under the data key of its top layer, and is what proves the layers of a clone at the clone's first attach
//! ([`crate::catalog::seal`]).

mod records;
mod written;

use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::layout::{Layout, SealVersion, sealed_bytes};
use crate::catalog::metadata::{Geometry, KeyOwner, KeyRecord, LayerRecord, Metadata, Proof};
use crate::catalog::tags::Tags;
use crate::catalog::{LayerId, SnapshotId, VolumeId};
use crate::crypt::SealKey;
use crate::kms::EncryptionContext;

pub use records::Entry;

/// What an operator says of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label {
    /// A description, at most 255 characters, perhaps none.
    pub description: String,
    /// Its tags.
    pub tags: Tags,
}

impl Label {
    /// # Errors
    /// `Usage` for a description that is too long or would move a terminal's cursor.
    pub fn new(description: String, tags: Tags) -> Result<Self> {
        if description.chars().count() > 255 || description.chars().any(char::is_control) {
            return Err(Error::new(Kind::Usage, "a description has at most 255 printable characters"));
        }
        Ok(Label { description, tags })
    }
}

/// What is known of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub(crate) id: SnapshotId,
    pub(crate) volume: VolumeId,
    pub(crate) copy_of: Option<SnapshotId>,
    pub(crate) layout: Layout,
    pub(crate) created: Timestamp,
    pub(crate) label: Label,
    /// Under which id the MAC was made: a copy under the same data keys keeps that of its original.
    pub(crate) sealed_as: SnapshotId,
    pub(crate) mac: Option<[u8; 32]>,
}

/// A snapshot that is to be made of an attached volume, as the command that asks for it has chosen it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// The id of the layer that takes the volume's writes from then on.
    pub layer: LayerId,
    /// What the operator says of it.
    pub label: Label,
}

impl Snapshot {
    /// This, if it is the snapshot that was `wanted` of the volume `before`. A host process that is not
    /// what it was proposes the record, and could name another snapshot's id, another volume, or layers
    /// that are not the volume's.
    ///
    /// The layers may be fewer than they were: those that were being copied up may have
    /// left the chain meanwhile.
    ///
    /// # Errors
    /// `Corrupt`, naming the first thing that is another one.
    pub fn accept(self, before: &Metadata, wanted: &Wanted) -> Result<Self> {
        let layout = before.layout();
        let Layout { geometry, keys, layers, hydrate } = &self.layout;
        let all = (layout.keys(), layout.layers(), layout.hydrate());
        let hydrated = layout.hydrated();
        let fewer = (hydrated.keys(), hydrated.layers(), hydrated.hydrate());
        let proposed = (&keys[..], &layers[..], *hydrate);
        let differs = [
            ("id", self.id != wanted.id || self.sealed_as != wanted.id),
            ("volume", self.volume != before.id()),
            ("origin", self.copy_of.is_some()),
            ("label", self.label != wanted.label),
            ("size", *geometry != layout.geometry()),
            ("keys or layers", proposed != all && proposed != fewer),
        ];
        match differs.iter().find(|(_, differs)| *differs) {
            // Its time is this process's, and no part of what is sealed.
            None => Ok(Snapshot { created: Timestamp::now(), ..self }),
            Some((what, _)) => Err(Error::new(
                Kind::Corrupt,
                format!(
                    "the process that has {} attached proposes a snapshot of which the {what} is not what \
                     was asked for; nothing is recorded. If no other command has changed the volume just \
                     now, detach it and look at that process's log",
                    before.id()
                ),
            )),
        }
    }

    /// The volume as it is now, sealed with the `key` of the volume's seal; none for an unencrypted volume.
    pub(crate) fn of(volume: &Metadata, id: SnapshotId, label: Label, key: Option<&SealKey>) -> Self {
        assert_eq!(key.is_some(), volume.is_encrypted(), "an encrypted volume has a seal, and no other");
        let (layout, created) = (volume.layout().clone(), Timestamp::now());
        let unsealed = Snapshot {
            id,
            volume: volume.id(),
            copy_of: None,
            layout,
            created,
            label,
            sealed_as: id,
            mac: None,
        };
        let mac = key.map(|key| key.mac(&unsealed.sealed_bytes(&unsealed.layout.checks())));
        Snapshot { mac, ..unsealed }
    }

    /// What its MAC is over, with the check values of its data keys.
    pub(crate) fn sealed_bytes(&self, checks: &[[u8; 16]]) -> Vec<u8> {
        let Layout { geometry, layers, .. } = &self.layout;
        sealed_bytes(SealVersion::V2, &self.sealed_as.to_string(), *geometry, layers, checks)
    }

    /// Its id.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// The volume that it, or what it is a copy of, was made of.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// The snapshot that it is a copy of.
    pub fn copy_of(&self) -> Option<SnapshotId> {
        self.copy_of
    }

    /// Its layers and keys.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Size and sector size of the volume that it was made of.
    pub fn geometry(&self) -> Geometry {
        self.layout.geometry
    }

    /// Whether it is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.layout.is_encrypted()
    }

    /// The data key of its top layer; none if it is not encrypted.
    pub fn top_key(&self) -> Option<&KeyRecord> {
        self.layout.top().key.map(|n| &self.layout.keys[n])
    }

    /// Its data keys.
    pub fn keys(&self) -> &[KeyRecord] {
        self.layout.keys()
    }

    /// Its layers, the top one first.
    pub fn layers(&self) -> &[LayerRecord] {
        self.layout.layers()
    }

    /// When it was made.
    pub fn created(&self) -> Timestamp {
        self.created
    }

    /// Description and tags.
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// What proves its layers to a clone; none if it is not encrypted.
    pub fn proof(&self) -> Option<Proof> {
        let proof =
            |mac| Proof { snapshot: self.sealed_as, volume: self.volume, size: self.geometry().size(), mac };
        self.mac.map(proof)
    }

    /// Whose wrapped keys it has.
    pub fn key_owner(&self) -> KeyOwner {
        match self.copy_of {
            None => KeyOwner::Volume(self.volume),
            Some(_) => KeyOwner::Snapshot(self.id),
        }
    }

    /// The context to which its wrapped keys are bound: EBS keeps the volume's for a snapshot,
    /// and gives a copy its own.
    pub fn encryption_context(&self) -> EncryptionContext {
        crate::catalog::metadata::encryption_context(self.key_owner())
    }
}
