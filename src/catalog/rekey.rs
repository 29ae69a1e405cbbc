//! Another data key for a volume, and a chain of layers made one: what `volume.json` says of it. The copying
//! is [`crate::disk::hydrate`]'s, and what follows it [`crate::catalog::leaving`]'s.
//!
//! A volume is re-keyed by freezing its top and giving it a new one under the new data key. To be flattened
//! it needs no new layer: what is below its top is marked to be copied up.

use crate::base::{Context, Error, Kind, Result};
use crate::catalog::layout::Layout;
use crate::catalog::layout::written::WrittenSlot;
use crate::catalog::lock::VolumeLock;
use crate::catalog::metadata::{KeyRecord, LayerRecord, Metadata};
use crate::catalog::slots::KeySlot;
use crate::catalog::{Catalog, LayerId, VolumeId};
use crate::crypt::Dek;
use crate::kms::WrappedKey;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a new data key is for, that is [passed](crate::crypt::PassKey::pass) to the process that has
/// `volume`: this volume, the layer that it makes for it, and the wrapped copies that are going to be noted.
/// Each part has its length before it.
pub fn passed_for(volume: VolumeId, layer: LayerId, slots: &[KeySlot]) -> Vec<u8> {
    let (volume, layer) = (volume.to_string(), layer.to_string());
    let of_slot = |slot: &KeySlot| {
        let KeySlot { provider, wrapped } = slot;
        [provider.as_bytes().to_vec(), wrapped.key_id.as_bytes().to_vec(), wrapped.blob.clone()]
    };
    let parts = [volume.into_bytes(), layer.into_bytes()].into_iter().chain(slots.iter().flat_map(of_slot));
    parts.flat_map(|part| [&(part.len() as u64).to_le_bytes()[..], &part].concat()).collect()
}

/// A data key that a volume is going to have, wrapped for it by a KMS. Nobody may have seen it yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewKey(pub(crate) KeyRecord);

impl NewKey {
    /// A data key that a KMS has made and wrapped.
    pub fn new(record: KeyRecord) -> Self {
        NewKey(record)
    }

    /// As it is noted of a volume.
    pub fn record(&self) -> &KeyRecord {
        &self.0
    }

    /// Notes what tells the data key from others.
    pub fn checked(self, dek: &Dek) -> Self {
        NewKey(self.0.checked(dek))
    }
}

impl NewKey {
    /// What will be known of the keys of `volume` when it has this one, too.
    pub fn also_of(&self, volume: &Metadata) -> Metadata {
        let mut next = volume.clone();
        next.layout.keys.push(self.0.clone());
        next
    }
}

impl fmt::Display for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<String> = self.0.slots().iter().map(|slot| slot.kms_key().to_string()).collect();
        f.write_str(&keys.join(" and by "))
    }
}

/// A [`NewKey`] as one process tells another of it. Says nothing that `volume.json` would not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenNewKey {
    provider: String,
    key_id: String,
    /// Base64.
    wrapped: String,
    /// Its other slots. A host process of an earlier version knows of none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    also: Vec<WrittenSlot>,
}

impl From<&NewKey> for WrittenNewKey {
    fn from(key: &NewKey) -> Self {
        let KeySlot { provider, wrapped } = key.0.first();
        WrittenNewKey {
            provider: provider.clone(),
            key_id: wrapped.key_id.clone(),
            wrapped: BASE64.encode(&wrapped.blob),
            also: key.0.slots()[1..].iter().map(WrittenSlot::from).collect(),
        }
    }
}

impl WrittenNewKey {
    /// What it means, if it could stand in the `volume.json` of `volume`.
    ///
    /// # Errors
    /// `Usage` for what could not.
    pub fn parse(self, volume: &Metadata) -> Result<NewKey> {
        let attempt = || "the new data key";
        let blob = BASE64.decode(&self.wrapped).map_err(|e| Error::of(Kind::Usage, e)).context(attempt)?;
        let wrapped = WrappedKey { key_id: self.key_id, blob };
        let mut record = KeyRecord::new(KeySlot { provider: self.provider, wrapped });
        for slot in self.also {
            let slot = KeySlot::try_from(slot).map_err(|problem| Error::new(Kind::Usage, problem));
            record = record.and(slot.context(attempt)?);
        }
        let alone = Metadata::new(volume.id(), None, volume.geometry(), Some(record));
        let read =
            Metadata::from_json(&alone.to_json()).map_err(|e| Error::of(Kind::Usage, e)).context(attempt)?;
        let key = read.keys().first().cloned();
        key.map(NewKey).ok_or_else(|| Error::new(Kind::Usage, "it is not one")).context(attempt)
    }
}

/// # Errors
/// `Usage` for a volume that has no data key.
pub fn check_encrypted(volume: &Metadata) -> Result<()> {
    if volume.is_encrypted() {
        return Ok(());
    }
    let message = "it is not encrypted, and stays so; a snapshot of it can be made an encrypted volume: \
                   \"sealblk volume create --snapshot … --key …\"";
    Err(Error::new(Kind::Usage, message))
}

/// Marks all layers below the top to be copied up, durably; the caller has the volume.
/// Returns whether there are any.
///
/// # Errors
/// Those of the file system; the volume is as it was then.
pub fn mark_to_flatten(catalog: &Catalog, lock: &VolumeLock, metadata: &mut Metadata) -> Result<bool> {
    let Some(mut next) = metadata.to_flatten() else { return Ok(false) };
    if next.layout() != metadata.layout() {
        // The seal is not over it.
        catalog.save(lock, &mut next)?;
        *metadata = next;
    }
    Ok(true)
}

/// Takes the mark away, durably, by which lower layers are to be copied up; the caller has the volume. What
/// was copied stays in the top. Returns whether there was one.
///
/// # Errors
/// `Usage` for layers that cannot stay ([`check_may_stay`]); those of the file system. The
/// volume is as it was then.
pub fn unmark(catalog: &Catalog, lock: &VolumeLock, metadata: &mut Metadata) -> Result<bool> {
    if metadata.layout().leaving() == 0 {
        return Ok(false);
    }
    check_may_stay(metadata)?;
    let mut next = metadata.not_to_flatten();
    // The seal is not over it.
    catalog.save(lock, &mut next)?;
    *metadata = next;
    Ok(true)
}

/// Whether the layers that are marked to be copied up could as well stay for good: all of them are under the
/// data key of the top. The mark of others is the only thing that says of an old data key that it is to go,
/// or of data in the clear that it is going to be encrypted.
///
/// # Errors
/// `Usage`, with what can be done instead.
pub fn check_may_stay(volume: &Metadata) -> Result<()> {
    let (leaving, top, id) = (volume.layout().leaving_layers(), volume.top(), volume.id());
    let is_as_top = |layer: &LayerRecord| (layer.key, layer.masked) == (top.key, top.masked);
    let Some(other) = leaving.iter().find(|layer| top.key.is_some() && !is_as_top(layer)) else {
        return Ok(());
    };
    let what = match other.key {
        Some(_) => "what was written before is under another data key, which it would need for ever, and",
        None => "what was there before is not encrypted yet, would never be, and",
    };
    Err(Error::new(
        Kind::Usage,
        format!(
            "{id} cannot do without this copy: {what} nothing would say so. It can be made to stand still: \
             \"sealblk throttle {id} --hydrate-rate 1\", a byte a second, for as long as it is attached, \
             and \"sealblk attach --hydrate-rate 1\"; or to wait, by a larger --space-reserve. A command \
             with --follow can be interrupted; whatever comes next goes on"
        ),
    ))
}

impl Metadata {
    /// What becomes of the volume when nothing is to be copied up any more.
    pub(crate) fn not_to_flatten(&self) -> Self {
        let layout = Layout { hydrate: None, ..self.layout().clone() };
        Metadata { layout, ..self.clone() }
    }

    /// What becomes of the volume when everything below its top is marked to be copied up;
    /// none if there is nothing.
    pub(crate) fn to_flatten(&self) -> Option<Self> {
        let layout = self.layout().with_all_leaving()?;
        Some(Metadata { layout, ..self.clone() })
    }
}
