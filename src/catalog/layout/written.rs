//! Layers and keys as `volume.json` and a snapshot's record have them: what is written, and
//! its way to what is meant.

use crate::catalog::LayerId;
use crate::catalog::layout::{KeyRecord, LayerRecord, Layout};
use crate::catalog::metadata::Geometry;
use crate::crypt::SectorSize;
use crate::kms::{EncryptionContext, WrappedKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// A data key.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WrittenKey {
    provider: String,
    key_id: String,
    wrapped: String,
    context: BTreeMap<String, String>,
    #[serde(deserialize_with = "required")]
    check: Option<String>,
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
        let key = |key: &KeyRecord| WrittenKey {
            provider: key.provider.clone(),
            key_id: key.wrapped.key_id.clone(),
            wrapped: BASE64.encode(&key.wrapped.blob),
            context: context.pairs().clone(),
            check: key.check.map(hex::encode),
        };
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
    fn parse(self, context: &EncryptionContext) -> Result<KeyRecord, String> {
        if self.context != *context.pairs() {
            let ours: Vec<&str> = context.pairs().values().map(String::as_str).collect();
            return Err(format!("its context is {:?}, which is not that of {}", self.context, ours.concat()));
        }
        if !plain(&self.provider, 32) {
            return Err("the provider's name is not one".into());
        }
        if !plain(&self.key_id, 2048) {
            return Err("the KMS key's id is not one".into());
        }
        let blob = BASE64.decode(&self.wrapped).map_err(|e| format!("the wrapped key is not base64: {e}"))?;
        if !(1..=6144).contains(&blob.len()) {
            return Err(format!("the wrapped key has {} bytes; 1 to 6144 are possible", blob.len()));
        }
        let check = self.check.map(|check| fixed_hex("check", &check)).transpose()?;
        Ok(KeyRecord { provider: self.provider, wrapped: WrappedKey { key_id: self.key_id, blob }, check })
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
