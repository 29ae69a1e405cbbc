//! `volume.json`: what is written, and its way to what is meant.
//!
//! Every field is required and no other is taken, so that a file which a newer sealblk wrote, or a hand
//! edited, is refused rather than half understood. The version is looked at first, on its own.

use super::{Geometry, KeyRecord, LayerRecord, Metadata, SectorSize, VolumeName, encryption_context};
use crate::error::{Error, Kind, Result};
use crate::kms::WrappedKey;
use crate::observe::Timestamp;
use crate::volume::id::{LayerId, VolumeId};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::{BTreeMap, HashSet};

/// The format version that is written, and the only one that is read.
pub const FORMAT: u32 = 1;

/// Longer files are refused unread, in bytes: a thousand layers with their keys fit in.
pub const MAX_FILE_LEN: u64 = 16 << 20;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    id: VolumeId,
    #[serde(deserialize_with = "required")]
    name: Option<VolumeName>,
    size: u64,
    sector_size: SectorSize,
    encrypted: bool,
    created: Timestamp,
    keys: Vec<WrittenKey>,
    layers: Vec<WrittenLayer>,
    generation: u64,
    attached_before: bool,
    #[serde(deserialize_with = "required")]
    mac: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenKey {
    provider: String,
    key_id: String,
    wrapped: String,
    context: BTreeMap<String, String>,
    #[serde(deserialize_with = "required")]
    check: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLayer {
    id: LayerId,
    #[serde(deserialize_with = "required")]
    key: Option<usize>,
}

/// The one field that every version has.
#[derive(Deserialize)]
struct Version {
    format: u64,
}

/// An optional value that must be written all the same, as `null`.
fn required<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(d)
}

impl Metadata {
    /// Reads `volume.json`.
    ///
    /// # Errors
    /// `Corrupt` for anything but a complete, consistent file of version 1. The caller adds which file it was.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        let Version { format } = serde_json::from_slice(bytes).map_err(not_readable)?;
        if format != u64::from(FORMAT) {
            return Err(corrupt(format!(
                "it has format version {format}, and this sealblk knows only version {FORMAT}; use the \
                 sealblk that wrote it, or a newer one"
            )));
        }
        let written: Written = serde_json::from_slice(bytes).map_err(not_readable)?;
        written.try_into().map_err(corrupt)
    }

    /// The bytes of `volume.json`.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes =
            serde_json::to_vec_pretty(&Written::from(self)).expect("strings, numbers and maps of strings");
        bytes.push(b'\n');
        bytes
    }
}

fn corrupt(problem: String) -> Error {
    Error::new(Kind::Corrupt, problem)
}

fn not_readable(e: serde_json::Error) -> Error {
    let what = if e.is_eof() { "it is cut short" } else { "it is not what sealblk writes" };
    corrupt(format!("{what}: {e}; restore it from a backup"))
}

impl From<&Metadata> for Written {
    fn from(m: &Metadata) -> Self {
        let context = m.encryption_context().pairs().clone();
        let key = |key: &KeyRecord| WrittenKey {
            provider: key.provider.clone(),
            key_id: key.wrapped.key_id.clone(),
            wrapped: BASE64.encode(&key.wrapped.blob),
            context: context.clone(),
            check: key.check.map(hex::encode),
        };
        Written {
            format: FORMAT,
            id: m.id,
            name: m.name.clone(),
            size: m.size(),
            sector_size: m.sector_size(),
            encrypted: m.is_encrypted(),
            created: m.created,
            keys: m.keys.iter().map(key).collect(),
            layers: m.layers.iter().map(|l| WrittenLayer { id: l.id, key: l.key }).collect(),
            generation: m.generation,
            attached_before: m.attached_before,
            mac: m.mac.map(hex::encode),
        }
    }
}

impl TryFrom<Written> for Metadata {
    type Error = String;

    fn try_from(w: Written) -> Result<Self, String> {
        let keys = w
            .keys
            .into_iter()
            .enumerate()
            .map(|(n, key)| key.parse(w.id).map_err(|problem| format!("key {n}: {problem}")))
            .collect::<Result<Vec<_>, _>>()?;
        let layers: Vec<_> = w.layers.iter().map(|l| LayerRecord { id: l.id, key: l.key }).collect();
        check_layers(&layers, keys.len(), w.encrypted)?;
        let mac = w.mac.map(|mac| fixed_hex("mac", &mac)).transpose()?;
        check_seal(&keys, mac.is_some())?;
        Ok(Metadata {
            id: w.id,
            name: w.name,
            geometry: Geometry::new(w.size, w.sector_size).map_err(|e| e.to_string())?,
            created: w.created,
            keys,
            layers,
            generation: w.generation,
            attached_before: w.attached_before,
            mac,
        })
    }
}

impl WrittenKey {
    fn parse(self, volume: VolumeId) -> Result<KeyRecord, String> {
        if self.context != *encryption_context(volume).pairs() {
            return Err(format!("its context is {:?}, which is not that of {volume}", self.context));
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

/// Printable ASCII without spaces, at least one character.
fn plain(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

fn fixed_hex<const N: usize>(field: &str, text: &str) -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes)
        .map_err(|_| format!("\"{field}\" is not {} hexadecimal digits", 2 * N))?;
    Ok(bytes)
}

fn check_layers(layers: &[LayerRecord], keys: usize, encrypted: bool) -> Result<(), String> {
    let top = layers.first().ok_or("it has no layer")?;
    let mut ids = HashSet::new();
    for layer in layers {
        if !ids.insert(layer.id) {
            return Err(format!("layer {} is there twice", layer.id));
        }
        if let Some(n) = layer.key.filter(|&n| n >= keys) {
            return Err(format!("layer {} has key {n}, but there are {keys} keys", layer.id));
        }
    }
    if let Some(n) = (0..keys).find(|&n| layers.iter().all(|l| l.key != Some(n))) {
        return Err(format!("key {n} belongs to no layer"));
    }
    match (encrypted, top.key) {
        (true, None) => Err("it is encrypted, but its top layer has no key".into()),
        (false, _) if keys > 0 => Err("it is not encrypted, but has keys".into()),
        _ => Ok(()),
    }
}

/// The check values and the MAC are written together, at the first attach.
fn check_seal(keys: &[KeyRecord], mac: bool) -> Result<(), String> {
    match (mac, keys.is_empty(), keys.iter().all(|k| k.check.is_some() == mac)) {
        (true, true, _) => Err("it has a MAC, but no key".into()),
        (_, _, false) => Err("the MAC and the keys' check values are not all there".into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn encrypted() -> Metadata {
        let wrapped =
            WrappedKey { key_id: "arn:aws:kms:local:000000000000:key/1".into(), blob: vec![7; 141] };
        let key = KeyRecord { provider: "embedded".into(), wrapped, check: None };
        let name = Some("db".parse().unwrap());
        let geometry = Geometry::new(1 << 20, SectorSize::B4096).unwrap();
        Metadata::new(VolumeId::random(), name, geometry, Some(key))
    }

    fn sealed() -> Metadata {
        let mut m = encrypted();
        m.keys[0].check = Some([1; 16]);
        m.mac = Some([2; 32]);
        m
    }

    fn refusal(m: &Metadata, edit: impl FnOnce(&mut Value)) -> String {
        let mut value: Value = serde_json::from_slice(&m.to_json()).unwrap();
        edit(&mut value);
        let e = Metadata::from_json(&serde_json::to_vec(&value).unwrap()).expect_err("refused");
        assert_eq!(e.kind(), Kind::Corrupt);
        e.to_string()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let plain =
            Metadata::new(VolumeId::random(), None, Geometry::new(512, SectorSize::B512).unwrap(), None);
        for m in [encrypted(), sealed(), plain] {
            assert_eq!(Metadata::from_json(&m.to_json()).unwrap(), m);
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let whole = sealed().to_json();
        // The last byte is the newline after the closing brace: without it the file is still complete.
        for len in 0..whole.len() - 1 {
            let e = Metadata::from_json(&whole[..len]).expect_err("refused");
            assert!(e.kind() == Kind::Corrupt && e.to_string().contains("cut short"), "{len}: {e}");
        }
    }

    #[test]
    fn every_field_is_required_and_no_other_taken() {
        let m = sealed();
        let value: Value = serde_json::from_slice(&m.to_json()).unwrap();
        for field in value.as_object().unwrap().keys() {
            refusal(&m, |v| drop(v.as_object_mut().unwrap().remove(field)));
        }
        for field in value["keys"][0].as_object().unwrap().keys() {
            refusal(&m, |v| drop(v["keys"][0].as_object_mut().unwrap().remove(field)));
        }
        assert!(refusal(&m, |v| v["colour"] = json!("red")).contains("colour"));
        assert!(refusal(&m, |v| v["layers"][0]["colour"] = json!("red")).contains("colour"));
        assert!(refusal(&m, |v| v["keys"][0]["colour"] = json!("red")).contains("colour"));
    }

    #[test]
    fn other_versions_are_named_before_their_fields_are_looked_at() {
        for version in [0, 2, 4294967297_u64] {
            let words = refusal(&encrypted(), |v| {
                v["format"] = json!(version);
                v["news"] = json!([]);
            });
            assert!(words.contains(&format!("format version {version}")), "{words}");
        }
    }

    #[test]
    fn inconsistent_metadata_is_refused() {
        let other = json!({"aws:ebs:id": VolumeId::random().to_string()});
        let cases: Vec<(&str, &str, Value)> = vec![
            ("/id", "not an id", json!("vol-1")),
            ("/size", "cannot be empty", json!(0)),
            ("/size", "not whole sectors", json!(512)),
            ("/sector_size", "512 or 4096", json!(1024)),
            ("/encrypted", "not encrypted, but has keys", json!(false)),
            ("/created", "not a time", json!("yesterday")),
            ("/name", "begins like an id", json!("vol-x")),
            ("/keys", "there are 0 keys", json!([])),
            ("/layers", "no layer", json!([])),
            ("/layers/0/key", "key 0 belongs to no layer", json!(null)),
            ("/layers/0/key", "there are 1 keys", json!(1)),
            ("/layers/0/id", "not a layer's id", json!("../x")),
            ("/keys/0/context", "is not that of", other),
            ("/keys/0/context", "is not that of", json!({})),
            ("/keys/0/wrapped", "not base64", json!("?")),
            ("/keys/0/wrapped", "0 bytes", json!("")),
            ("/keys/0/wrapped", "6145 bytes", json!(BASE64.encode([0; 6145]))),
            ("/keys/0/provider", "provider's name", json!("a b")),
            ("/keys/0/key_id", "KMS key's id", json!("")),
            ("/keys/0/check", "32 hexadecimal", json!("00")),
            ("/keys/0/check", "not all there", json!(null)),
            ("/mac", "64 hexadecimal", json!("zz")),
            ("/mac", "not all there", json!(null)),
            ("/generation", "invalid", json!(-1)),
        ];
        for (place, words, value) in cases {
            let got = refusal(&sealed(), |v| *v.pointer_mut(place).unwrap() = value);
            assert!(got.contains(words), "{place}: {got}");
        }
        let twice = refusal(&sealed(), |v| {
            let layer = v["layers"][0].clone();
            v["layers"].as_array_mut().unwrap().push(layer);
        });
        assert!(twice.contains("there twice"), "{twice}");
    }
}
