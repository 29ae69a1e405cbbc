//! `volume.json`: what is written, and its way to what is meant.
//!
//! Every field is required and no other is taken, so that a file which a newer sealblk wrote, or a hand
//! edited, is refused rather than half understood. The version is looked at first, on its own.

use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::layout::written::{
    WrittenKey, WrittenLayer, WrittenLayout, check_seal, fixed_hex, required,
};
use crate::catalog::layout::{Layout, SealVersion};
use crate::catalog::metadata::{Metadata, Origin, Proof, VolumeName, encryption_context};
use crate::catalog::{LayerId, SnapshotId, VolumeId};
use crate::crypt::SectorSize;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The format version that is written where no data key has several slots. Version 1, which sealblk wrote
/// before there were snapshots, is read as well.
const FORMAT: u32 = 2;

/// The format version that is written where a data key has several slots.
const FORMAT_WITH_SLOTS: u32 = 3;

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
    #[serde(deserialize_with = "required")]
    hydrate: Option<LayerId>,
    #[serde(deserialize_with = "required")]
    origin: Option<WrittenOrigin>,
    generation: u64,
    attached_before: bool,
    seal: u32,
    #[serde(deserialize_with = "required")]
    mac: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WrittenOrigin {
    snapshot: SnapshotId,
    #[serde(deserialize_with = "required")]
    proof: Option<WrittenProof>,
}

/// As it stands in a clone's origin.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenProof {
    snapshot: SnapshotId,
    volume: VolumeId,
    size: u64,
    mac: String,
}

/// The file as version 1 had it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenV1 {
    #[serde(rename = "format")]
    _format: u32,
    id: VolumeId,
    #[serde(deserialize_with = "required")]
    name: Option<VolumeName>,
    size: u64,
    sector_size: SectorSize,
    encrypted: bool,
    created: Timestamp,
    keys: Vec<WrittenKey>,
    layers: Vec<WrittenLayerV1>,
    generation: u64,
    attached_before: bool,
    #[serde(deserialize_with = "required")]
    mac: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLayerV1 {
    id: LayerId,
    #[serde(deserialize_with = "required")]
    key: Option<usize>,
}

/// The one field that every version has.
#[derive(Deserialize)]
struct Version {
    format: u64,
}

impl Metadata {
    /// Reads `volume.json`.
    ///
    /// # Errors
    /// `Corrupt` for anything but a complete, consistent file of version 1 to 3. The
    /// caller adds which file it was.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        let written: Written = match version(bytes)? {
            1 => read::<WrittenV1>(bytes)?.into(),
            2 | 3 => read(bytes)?,
            other => return Err(unknown_version(other, "versions 1 to 3")),
        };
        written.try_into().map_err(corrupt)
    }

    /// The bytes of `volume.json`.
    pub fn to_json(&self) -> Vec<u8> {
        to_json(&Written::from(self))
    }
}

/// The version of a record, which is looked at first and alone.
pub(crate) fn version(bytes: &[u8]) -> Result<u64> {
    read::<Version>(bytes).map(|v| v.format)
}

/// A record's JSON, taken apart.
pub(crate) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| {
        let what = if e.is_eof() { "it is cut short" } else { "it is not what sealblk writes" };
        let message = format!("{what}: {e}; restore it from a backup");
        Error::of(Kind::Corrupt, e).reworded(message)
    })
}

/// A record's bytes.
pub(crate) fn to_json(written: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(written).expect("strings, numbers and maps of strings");
    bytes.push(b'\n');
    bytes
}

/// The error for a record of a version that is not known.
pub(crate) fn unknown_version(version: u64, known: &str) -> Error {
    corrupt(format!(
        "it has format version {version}, and this sealblk knows only {known}; use the sealblk that wrote \
         it, or a newer one"
    ))
}

/// The error for a record that is damaged, for this reason.
pub(crate) fn corrupt(problem: String) -> Error {
    Error::new(Kind::Corrupt, problem)
}

/// The format version that says all of this layout.
fn format_of(layout: &Layout) -> u32 {
    if layout.has_slots() { FORMAT_WITH_SLOTS } else { FORMAT }
}

/// # Errors
/// A sentence, for a record of another version than sealblk writes for what it says.
pub(crate) fn check_format(written: u32, expected: u32) -> Result<(), String> {
    match written == expected {
        true => Ok(()),
        false => Err(format!(
            "it has format version {written}, and its data keys are such that version {expected} says all"
        )),
    }
}

impl From<WrittenV1> for Written {
    fn from(w: WrittenV1) -> Self {
        // The layers were as long as the volume, and the MAC is over a message that did not say so.
        let layer = |l: WrittenLayerV1| WrittenLayer { id: l.id, key: l.key, masked: false, size: w.size };
        Written {
            format: FORMAT,
            id: w.id,
            name: w.name,
            size: w.size,
            sector_size: w.sector_size,
            encrypted: w.encrypted,
            created: w.created,
            keys: w.keys,
            layers: w.layers.into_iter().map(layer).collect(),
            hydrate: None,
            origin: None,
            generation: w.generation,
            attached_before: w.attached_before,
            seal: if w.mac.is_some() { 1 } else { 2 },
            mac: w.mac,
        }
    }
}

impl From<&Metadata> for Written {
    fn from(m: &Metadata) -> Self {
        let layout = WrittenLayout::of(&m.layout, &m.encryption_context());
        Written {
            format: format_of(&m.layout),
            id: m.id,
            name: m.name.clone(),
            size: layout.size,
            sector_size: layout.sector_size,
            encrypted: layout.encrypted,
            created: m.created,
            keys: layout.keys,
            layers: layout.layers,
            hydrate: layout.hydrate,
            origin: m.origin.as_ref().map(WrittenOrigin::from),
            generation: m.generation,
            attached_before: m.attached_before,
            seal: m.seal_version.number(),
            mac: m.mac.map(hex::encode),
        }
    }
}

impl TryFrom<Written> for Metadata {
    type Error = String;

    fn try_from(w: Written) -> Result<Self, String> {
        let layout = WrittenLayout {
            size: w.size,
            sector_size: w.sector_size,
            encrypted: w.encrypted,
            keys: w.keys,
            layers: w.layers,
            hydrate: w.hydrate,
        };
        let layout = layout.parse(&encryption_context(w.id))?;
        check_format(w.format, format_of(&layout))?;
        let mac = w.mac.map(|mac| fixed_hex("mac", &mac)).transpose()?;
        check_seal(&layout, mac.is_some())?;
        let seal_version = match w.seal {
            2 => SealVersion::V2,
            1 if mac.is_none() => return Err("a seal of version 1 without a MAC".into()),
            1 if layout.layers.iter().any(|l| l.size != layout.geometry.size()) => {
                return Err("a seal of version 1, and layers of several lengths".into());
            }
            1 => SealVersion::V1,
            other => return Err(format!("a seal of version {other}")),
        };
        Ok(Metadata {
            id: w.id,
            name: w.name,
            layout,
            origin: w.origin.map(Origin::try_from).transpose()?,
            created: w.created,
            generation: w.generation,
            attached_before: w.attached_before,
            seal_version,
            mac,
        })
    }
}

impl From<&Origin> for WrittenOrigin {
    fn from(origin: &Origin) -> Self {
        let proof = |p: &Proof| WrittenProof {
            snapshot: p.snapshot,
            volume: p.volume,
            size: p.size,
            mac: hex::encode(p.mac),
        };
        WrittenOrigin { snapshot: origin.snapshot, proof: origin.proof.as_ref().map(proof) }
    }
}

impl TryFrom<WrittenOrigin> for Origin {
    type Error = String;

    fn try_from(w: WrittenOrigin) -> Result<Self, String> {
        let proof = |p: WrittenProof| -> Result<Proof, String> {
            let mac = fixed_hex("mac", &p.mac)?;
            Ok(Proof { snapshot: p.snapshot, volume: p.volume, size: p.size, mac })
        };
        Ok(Origin { snapshot: w.snapshot, proof: w.proof.map(proof).transpose()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::metadata::{Geometry, KeyRecord};
    use crate::catalog::slots::KeySlot;
    use crate::kms::WrappedKey;
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD as BASE64;
    use serde_json::{Value, json};

    fn encrypted() -> Metadata {
        let wrapped =
            WrappedKey { key_id: "arn:aws:kms:local:000000000000:key/1".into(), blob: vec![7; 141] };
        let key = KeyRecord::new(KeySlot::new("embedded", wrapped));
        let name = Some("db".parse().unwrap());
        let geometry = Geometry::new(1 << 20, SectorSize::B4096).unwrap();
        Metadata::new(VolumeId::random(), name, geometry, Some(key))
    }

    fn sealed() -> Metadata {
        let mut m = encrypted();
        m.layout.keys[0].check = Some([1; 16]);
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
        for version in [0, 4, 4294967297_u64] {
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
