//! A snapshot's record: what is written, and its way to what is meant. As strict as `volume.json`.

use crate::base::{Result, Timestamp};
use crate::catalog::layout::Layout;
use crate::catalog::layout::written::{
    WrittenKey, WrittenLayer, WrittenLayout, check_seal, fixed_hex, required,
};
use crate::catalog::metadata::{KeyOwner, encryption_context, written};
use crate::catalog::snapshot::{Label, Snapshot};
use crate::catalog::tags::Tags;
use crate::catalog::{LayerId, SnapshotId, VolumeId};
use crate::crypt::SectorSize;
use serde::{Deserialize, Serialize};

const FORMAT: u32 = 1;

/// The version where a data key has several slots.
const FORMAT_WITH_SLOTS: u32 = 2;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    id: SnapshotId,
    volume: VolumeId,
    #[serde(deserialize_with = "required")]
    copy_of: Option<SnapshotId>,
    created: Timestamp,
    description: String,
    tags: Tags,
    size: u64,
    sector_size: SectorSize,
    encrypted: bool,
    keys: Vec<WrittenKey>,
    layers: Vec<WrittenLayer>,
    #[serde(deserialize_with = "required")]
    hydrate: Option<LayerId>,
    sealed_as: SnapshotId,
    #[serde(deserialize_with = "required")]
    mac: Option<String>,
}

impl Snapshot {
    /// Reads a snapshot's record.
    ///
    /// # Errors
    /// `Corrupt` for anything but a complete, consistent record of version 1 or 2. The caller
    /// adds which file it was.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        match written::version(bytes)? {
            1 | 2 => written::read::<Written>(bytes)?.try_into().map_err(written::corrupt),
            other => Err(written::unknown_version(other, "versions 1 and 2")),
        }
    }

    /// The bytes of its record.
    pub fn to_json(&self) -> Vec<u8> {
        written::to_json(&Written::from(self))
    }
}

/// The version that says all of this layout.
fn format_of(layout: &Layout) -> u32 {
    if layout.has_slots() { FORMAT_WITH_SLOTS } else { FORMAT }
}

impl From<&Snapshot> for Written {
    fn from(s: &Snapshot) -> Self {
        let layout = WrittenLayout::of(&s.layout, &s.encryption_context());
        Written {
            format: format_of(&s.layout),
            id: s.id,
            volume: s.volume,
            copy_of: s.copy_of,
            created: s.created,
            description: s.label.description.clone(),
            tags: s.label.tags.clone(),
            size: layout.size,
            sector_size: layout.sector_size,
            encrypted: layout.encrypted,
            keys: layout.keys,
            layers: layout.layers,
            hydrate: layout.hydrate,
            sealed_as: s.sealed_as,
            mac: s.mac.map(hex::encode),
        }
    }
}

impl TryFrom<Written> for Snapshot {
    type Error = String;

    fn try_from(w: Written) -> Result<Self, String> {
        let owner = match w.copy_of {
            None => KeyOwner::Volume(w.volume),
            Some(_) => KeyOwner::Snapshot(w.id),
        };
        if w.copy_of.is_none() && w.sealed_as != w.id {
            return Err(format!("it is no copy, and sealed as {}", w.sealed_as));
        }
        let layout = WrittenLayout {
            size: w.size,
            sector_size: w.sector_size,
            encrypted: w.encrypted,
            keys: w.keys,
            layers: w.layers,
            hydrate: w.hydrate,
        };
        let layout = layout.parse(&encryption_context(owner))?;
        written::check_format(w.format, format_of(&layout))?;
        let mac = w.mac.map(|mac| fixed_hex("mac", &mac)).transpose()?;
        check_seal(&layout, mac.is_some())?;
        if layout.is_encrypted() && mac.is_none() {
            return Err("it is encrypted, but has no MAC".into());
        }
        Ok(Snapshot {
            id: w.id,
            volume: w.volume,
            copy_of: w.copy_of,
            layout,
            created: w.created,
            label: Label::new(w.description, w.tags).map_err(|e| e.to_string())?,
            sealed_as: w.sealed_as,
            mac,
        })
    }
}
