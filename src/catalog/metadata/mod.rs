//! What a volume's `volume.json` means: size, keys, layers. The file format is in [`written`], the MAC over
//! it in [`crate::catalog::seal`].
//!
//! A [`Metadata`] has been checked: its size is whole sectors, its [`Layout`] fits together. It holds no key
//! in the clear, and touches no file.

pub(crate) mod written;

pub use written::MAX_FILE_LEN;

pub use crate::catalog::layout::{KeyRecord, LayerRecord};

use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::layout::{Layout, SealVersion};
use crate::catalog::{SnapshotId, VolumeId};
use crate::crypt::SectorSize;
use crate::kms::EncryptionContext;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A volume's size: at least one sector, whole sectors, at most 2⁶³ − 4096 bytes (what a
/// file offset can say).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
    sector_size: SectorSize,
}

impl Geometry {
    /// The largest size in bytes.
    pub const MAX_SIZE: u64 = crate::base::MAX_DISK_SIZE;

    /// A size in bytes and the sector size that it must be a multiple of.
    ///
    /// # Errors
    /// `Usage`, with the nearest sizes that are possible.
    pub fn new(size: u64, sector_size: SectorSize) -> Result<Self> {
        let unit = u64::from(sector_size.bytes());
        let problem = if size == 0 {
            format!("a volume cannot be empty; the smallest is {unit} bytes")
        } else if size > Self::MAX_SIZE {
            format!("{size} bytes are too large; the largest volume is {} bytes", Self::MAX_SIZE)
        } else if !size.is_multiple_of(unit) {
            let below = size - size % unit;
            let above = below + unit;
            let near = if below == 0 { format!("{above}") } else { format!("{below} or {above}") };
            format!("{size} bytes are not whole sectors of {unit} bytes; use {near}")
        } else {
            return Ok(Geometry { size, sector_size });
        };
        Err(Error::new(Kind::Usage, problem))
    }

    /// In bytes.
    pub fn size(self) -> u64 {
        self.size
    }

    /// The size of a sector.
    pub fn sector_size(self) -> SectorSize {
        self.sector_size
    }
}

/// A volume's name: 1 to 255 printable characters, no space at either end, not like an id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

impl VolumeName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> String {
        name.0
    }
}

impl FromStr for VolumeName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let problem = match name.chars().count() {
            0 => "is empty",
            256.. => "is longer than 255 characters",
            _ if name.chars().any(char::is_control) => "has control characters",
            _ if name.trim() != name => "begins or ends with a space",
            _ if name.starts_with(VolumeId::PREFIX) || name.starts_with("snap-") => "begins like an id",
            _ => return Ok(VolumeName(name.to_string())),
        };
        Err(format!("the name {name:?} {problem}; a name is 1 to 255 printable characters"))
    }
}

impl TryFrom<String> for VolumeName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

/// What shows that a snapshot's layers were put together by somebody who had its data keys: the snapshot's
/// own MAC, and what else was in the message under it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The snapshot that was sealed; a copy of it under the same data keys has another id.
    pub snapshot: SnapshotId,
    /// The volume that it was made of, under whose id the MAC's key was derived.
    pub volume: VolumeId,
    /// The snapshot's size in bytes.
    pub size: u64,
    /// HMAC-SHA256, as docs/format.md has it.
    pub mac: [u8; 32],
}

/// Where the lower layers of a clone are from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The snapshot that the volume was made of.
    pub snapshot: SnapshotId,
    /// What proves its layers at the first attach; none for an unencrypted snapshot.
    pub proof: Option<Proof>,
}

/// What is known of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    pub(crate) id: VolumeId,
    pub(crate) name: Option<VolumeName>,
    pub(crate) layout: Layout,
    pub(crate) origin: Option<Origin>,
    pub(crate) created: Timestamp,
    pub(crate) generation: u64,
    pub(crate) attached_before: bool,
    pub(crate) seal_version: SealVersion,
    pub(crate) mac: Option<[u8; 32]>,
}

impl Metadata {
    /// A new volume with one layer that holds nothing yet, encrypted with `key` or, without one, not at all.
    pub fn new(id: VolumeId, name: Option<VolumeName>, geometry: Geometry, key: Option<KeyRecord>) -> Self {
        Self::with_layout(id, name, Layout::new(geometry, key), None)
    }

    /// A new volume that is laid out so.
    pub(crate) fn with_layout(
        id: VolumeId,
        name: Option<VolumeName>,
        layout: Layout,
        origin: Option<Origin>,
    ) -> Self {
        Metadata {
            id,
            name,
            layout,
            origin,
            created: Timestamp::now(),
            generation: 0,
            attached_before: false,
            seal_version: SealVersion::V2,
            mac: None,
        }
    }

    /// The volume's id.
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// Its name, where it has one.
    pub fn name(&self) -> Option<&VolumeName> {
        self.name.as_ref()
    }

    /// Its size and sector size.
    pub fn geometry(&self) -> Geometry {
        self.layout.geometry
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.layout.geometry.size
    }

    /// The size of a sector.
    pub fn sector_size(&self) -> SectorSize {
        self.layout.geometry.sector_size
    }

    /// Its layers and keys.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The snapshot that it was made of, if it is a clone.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// When it was made.
    pub fn created(&self) -> Timestamp {
        self.created
    }

    /// Whether what the guest writes is encrypted. It never changes in a volume's life.
    pub fn is_encrypted(&self) -> bool {
        self.layout.is_encrypted()
    }

    /// The data keys of its layers, none for an unencrypted volume.
    pub fn keys(&self) -> &[KeyRecord] {
        &self.layout.keys
    }

    /// Its layers, the top one, which takes the writes, first.
    pub fn layers(&self) -> &[LayerRecord] {
        &self.layout.layers
    }

    /// The layer that takes the writes.
    pub fn top(&self) -> &LayerRecord {
        self.layout.top()
    }

    /// How often the metadata has been written.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// This volume with this name, or with none.
    pub(crate) fn renamed(&self, name: Option<VolumeName>) -> Self {
        Metadata { name, ..self.clone() }
    }

    /// This metadata as the next generation, to be written.
    ///
    /// # Errors
    /// `Corrupt` if there is no next number: nobody writes 2⁶⁴ times, so somebody wrote that number.
    pub(crate) fn next_generation(&self) -> Result<Self> {
        let generation = self.generation.checked_add(1).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("{}: the generation {} has no next", self.id, self.generation))
        })?;
        Ok(Metadata { generation, ..self.clone() })
    }

    /// Whether the volume has ever been attached: a failed attach is then a failed *re*attach.
    pub fn attached_before(&self) -> bool {
        self.attached_before
    }

    /// Notes that the volume is being attached; true if that is news, and so worth writing.
    pub fn mark_attached(&mut self) -> bool {
        !std::mem::replace(&mut self.attached_before, true)
    }

    /// The context to which the volume's wrapped keys are bound. It follows from the id alone: what the file
    /// says is never used.
    pub fn encryption_context(&self) -> EncryptionContext {
        encryption_context(self.id)
    }
}

/// The encryption context of a volume's or a snapshot's keys, as EBS has it: `{"aws:ebs:id": "vol-…"}`.
pub fn encryption_context(id: impl Into<KeyOwner>) -> EncryptionContext {
    EncryptionContext::pair("aws:ebs:id", id.into().to_string())
}

/// Whose wrapped keys they are: what their encryption context names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyOwner {
    /// A volume, and the snapshots that were made of it.
    Volume(VolumeId),
    /// A snapshot that was copied.
    Snapshot(SnapshotId),
}

impl From<VolumeId> for KeyOwner {
    fn from(id: VolumeId) -> Self {
        KeyOwner::Volume(id)
    }
}

impl From<SnapshotId> for KeyOwner {
    fn from(id: SnapshotId) -> Self {
        KeyOwner::Snapshot(id)
    }
}

impl fmt::Display for KeyOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyOwner::Volume(id) => id.fmt(f),
            KeyOwner::Snapshot(id) => id.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_sectors() {
        for (size, sector_size, words) in [
            (0, SectorSize::B512, "cannot be empty"),
            (511, SectorSize::B512, "use 512"),
            (4608, SectorSize::B4096, "use 4096 or 8192"),
            (Geometry::MAX_SIZE + 4096, SectorSize::B512, "too large"),
            (u64::MAX, SectorSize::B512, "too large"),
        ] {
            let e = Geometry::new(size, sector_size).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage);
            assert!(e.to_string().contains(words), "{e}");
        }
        assert!(Geometry::new(4608, SectorSize::B512).is_ok());
        assert!(Geometry::new(Geometry::MAX_SIZE, SectorSize::B4096).is_ok());
    }

    #[test]
    fn names_are_printable_and_no_ids() {
        for bad in ["", " a", "a\t", "a\nb", "\u{1b}[31m", "vol-1", "snap-x", &"x".repeat(256)] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
        for good in ["db", "Größe 7", "数据", &"x".repeat(255)] {
            assert!(good.parse::<VolumeName>().is_ok(), "{good:?}");
        }
    }
}
