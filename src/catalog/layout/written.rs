//! Layers and keys as `volume.json` and a snapshot's record have them: what is written, and
//! its way to what is meant.

use crate::catalog::LayerId;
use crate::catalog::layout::{KeyRecord, LayerRecord, Layout};
use crate::catalog::metadata::Geometry;
use crate::catalog::slots::{KeySlot, MAX_SLOTS};
use crate::crypt::SectorSize;
use crate::kms::{EncryptionContext, KmsKey, WrappedKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// A data key: with `provider`, `key_id` and `wrapped` if it has one slot, with `slots` if it has several.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WrittenKey {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    provider: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    wrapped: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    slots: Option<Vec<WrittenSlot>>,
    context: BTreeMap<String, String>,
    #[serde(deserialize_with = "required")]
    check: Option<String>,
}

/// One wrapped copy of a data key that has several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WrittenSlot {
    provider: String,
    key_id: String,
    /// Base64.
    wrapped: String,
}

/// A layer.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WrittenLayer {
    pub(crate) id: LayerId,
    #[serde(deserialize_with = "required")]
    pub(crate) key: Option<usize>,
    pub(crate) masked: bool,
    pub(crate) size: u64,
}

/// Everything of a layout, from wherever in its file it stands.
pub(crate) struct WrittenLayout {
    pub(crate) size: u64,
    pub(crate) sector_size: SectorSize,
    pub(crate) encrypted: bool,
    pub(crate) keys: Vec<WrittenKey>,
    pub(crate) layers: Vec<WrittenLayer>,
    pub(crate) hydrate: Option<LayerId>,
}

impl WrittenLayout {
    /// As it is written where the keys are bound to `context`.
    pub(crate) fn of(layout: &Layout, context: &EncryptionContext) -> Self {
        let key = |key: &KeyRecord| WrittenKey::of(key, context);
        let layer = |l: &LayerRecord| WrittenLayer { id: l.id, key: l.key, masked: l.masked, size: l.size };
        WrittenLayout {
            size: layout.geometry.size(),
            sector_size: layout.geometry.sector_size(),
            encrypted: layout.is_encrypted(),
            keys: layout.keys.iter().map(key).collect(),
            layers: layout.layers.iter().map(layer).collect(),
            hydrate: layout.hydrate,
        }
    }

    /// What it means, if it fits together and its keys are bound to `context`.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub(crate) fn parse(self, context: &EncryptionContext) -> Result<Layout, String> {
        let key = |(n, key): (usize, WrittenKey)| {
            key.parse(context).map_err(|problem| format!("key {n}: {problem}"))
        };
        let layer = |l: &WrittenLayer| LayerRecord { id: l.id, key: l.key, masked: l.masked, size: l.size };
        let layout = Layout {
            keys: self.keys.into_iter().enumerate().map(key).collect::<Result<_, _>>()?,
            layers: self.layers.iter().map(layer).collect(),
            geometry: Geometry::new(self.size, self.sector_size).map_err(|e| e.to_string())?,
            hydrate: self.hydrate,
        };
        layout.check()?;
        match (self.encrypted, layout.top().key) {
            (true, None) => Err("it is encrypted, but its top layer has no key".into()),
            (false, _) if !layout.keys.is_empty() => Err("it is not encrypted, but has keys".into()),
            _ => Ok(layout),
        }
    }
}

impl WrittenKey {
    fn of(key: &KeyRecord, context: &EncryptionContext) -> Self {
        let several = key.slots().len() > 1;
        let WrittenSlot { provider, key_id, wrapped } = key.first().into();
        let alone = |text: String| (!several).then_some(text);
        WrittenKey {
            provider: alone(provider),
            key_id: alone(key_id),
            wrapped: alone(wrapped),
            slots: several.then(|| key.slots().iter().map(WrittenSlot::from).collect()),
            context: context.pairs().clone(),
            check: key.check.map(hex::encode),
        }
    }

    fn parse(self, context: &EncryptionContext) -> Result<KeyRecord, String> {
        if self.context != *context.pairs() {
            let ours: Vec<&str> = context.pairs().values().map(String::as_str).collect();
            return Err(format!("its context is {:?}, which is not that of {}", self.context, ours.concat()));
        }
        let written = match (self.provider, self.key_id, self.wrapped, self.slots) {
            (Some(provider), Some(key_id), Some(wrapped), None) => {
                vec![WrittenSlot { provider, key_id, wrapped }]
            }
            (None, None, None, Some(slots)) if (2..=MAX_SLOTS).contains(&slots.len()) => slots,
            (None, None, None, Some(slots)) => {
                let have = slots.len();
                return Err(format!(
                    "it has {have} wrapped copies in \"slots\"; 2 to {MAX_SLOTS} are possible"
                ));
            }
            _ => return Err("it needs \"provider\", \"key_id\" and \"wrapped\", or \"slots\"".into()),
        };
        let slots = written.into_iter().map(KeySlot::try_from).collect::<Result<Vec<_>, _>>()?;
        check_slots(&slots)?;
        let check = self.check.map(|check| fixed_hex("check", &check)).transpose()?;
        Ok(KeyRecord { slots, check })
    }
}

/// # Errors
/// A sentence, for two slots that one KMS key wraps.
pub(crate) fn check_slots(slots: &[KeySlot]) -> Result<(), String> {
    let twice = |(n, slot): &(usize, &KeySlot)| slots[..*n].iter().any(|other| other.is_by(&slot.kms_key()));
    match slots.iter().enumerate().find(twice) {
        None => Ok(()),
        Some((_, slot)) => Err(format!("the KMS key {} wraps it twice", slot.kms_key())),
    }
}

impl From<&KeySlot> for WrittenSlot {
    fn from(slot: &KeySlot) -> Self {
        let KmsKey { provider, key_id } = slot.kms_key();
        WrittenSlot { provider, key_id, wrapped: BASE64.encode(&slot.wrapped.blob) }
    }
}

impl TryFrom<WrittenSlot> for KeySlot {
    type Error = String;

    fn try_from(w: WrittenSlot) -> Result<Self, String> {
        if !plain(&w.provider, 32) {
            return Err("the provider's name is not one".into());
        }
        if !plain(&w.key_id, 2048) {
            return Err("the KMS key's id is not one".into());
        }
        let blob = BASE64.decode(&w.wrapped).map_err(|e| format!("the wrapped key is not base64: {e}"))?;
        if !(1..=6144).contains(&blob.len()) {
            return Err(format!("the wrapped key has {} bytes; 1 to 6144 are possible", blob.len()));
        }
        Ok(KeySlot { provider: w.provider, wrapped: WrappedKey { key_id: w.key_id, blob } })
    }
}

/// An optional value that must be written all the same, as `null`.
pub(crate) fn required<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(d)
}

/// Exactly `N` bytes in hexadecimal.
pub(crate) fn fixed_hex<const N: usize>(field: &str, text: &str) -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes)
        .map_err(|_| format!("\"{field}\" is not {} hexadecimal digits", 2 * N))?;
    Ok(bytes)
}

/// The check values and the MAC are written together.
pub(crate) fn check_seal(layout: &Layout, mac: bool) -> Result<(), String> {
    let keys = layout.keys();
    match (mac, keys.is_empty(), keys.iter().all(|k| k.check.is_some() == mac)) {
        (true, true, _) => Err("it has a MAC, but no key".into()),
        (_, _, false) => Err("the MAC and the keys' check values are not all there".into()),
        _ => Ok(()),
    }
}

/// Printable ASCII without spaces, at least one character.
fn plain(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}
