//! A manifest: what a snapshot is, and which pages have the names of its blocks.
//!
//! Bytes: one line of JSON, and a line with its MAC under a key that follows from the data key of the
//! snapshot's top layer. In it stands the snapshot's record as a snapshot's own file has it, with one layer
//! for each data key: what of the snapshot is under that key, wherever in the chain at home it lies.
//!
//! What was read is a [`Claim`]; with the keys at hand it becomes a [`Manifest`].

use super::block::BLOCK;
use super::page::RUN;
use super::{ContentName, PlaceId, check_version, corrupt};
use crate::base::{Result, Timestamp};
use crate::catalog::layout::{KeyRecord, LayerRecord, Layout};
use crate::catalog::snapshot::Label;
use crate::catalog::{LayerId, Snapshot, SnapshotId};
use crate::crypt::BackupKeys;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use subtle::ConstantTimeEq;
use uuid::Uuid;

/// Longer manifests are refused unread, in bytes: those of the largest volume that a file
/// system of today has.
pub(crate) const MAX: usize = 16 << 20;
/// What the MAC is over begins so, so that it is no MAC of anything else.
const DOMAIN: &[u8] = b"sealblk backup manifest 1\0";
const FORMAT: u32 = 1;

/// A snapshot in a place, proved by whoever has its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// The place that it was written for.
    pub(crate) place: PlaceId,
    /// How often it was written there: 1, and one more each time that it is replaced.
    pub(crate) number: u64,
    /// The snapshot, with one layer for each of its data keys, the top one's first.
    pub(crate) snapshot: Snapshot,
    /// The layers that it had at home, the top one first.
    pub(crate) chain: Vec<LayerId>,
    /// For each layer of the snapshot, in their order.
    pub(crate) planes: Vec<Plane>,
}

/// What of a snapshot is under one data key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plane {
    /// The pages, by the number of the run that each is about.
    pub(crate) pages: BTreeMap<u32, PageEntry>,
}

/// A page, as a manifest has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageEntry {
    /// Its name.
    pub(crate) name: ContentName,
    /// How many blocks it has: one at least.
    pub(crate) blocks: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    place: Uuid,
    number: u64,
    record: serde_json::Value,
    chain: Vec<LayerId>,
    planes: Vec<WrittenPlane>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPlane {
    /// Number, name, and how many blocks it has.
    pages: Vec<(u32, String, u32)>,
}

/// A manifest as it was read, whoever wrote it. It fits together.
pub(crate) struct Claim {
    manifest: Manifest,
    line: Vec<u8>,
    mac: [u8; 32],
    digest: [u8; 32],
}

/// How many blocks a snapshot of so many bytes can have.
pub(crate) fn blocks_of(size: u64) -> u64 {
    size.div_ceil(BLOCK as u64)
}

impl Manifest {
    /// The bytes of the manifest; `keys` are those of the snapshot's top layer.
    pub(crate) fn to_bytes(&self, keys: &BackupKeys) -> Vec<u8> {
        let page = |(number, page): (&u32, &PageEntry)| (*number, page.name.to_string(), page.blocks);
        let plane = |plane: &Plane| WrittenPlane { pages: plane.pages.iter().map(page).collect() };
        let record = serde_json::from_slice(&self.snapshot.to_json()).expect("a record is JSON");
        let written = Written {
            format: FORMAT,
            place: self.place.0,
            number: self.number,
            record,
            chain: self.chain.clone(),
            planes: self.planes.iter().map(plane).collect(),
        };
        let mut bytes = serde_json::to_vec(&written).expect("strings, numbers and maps of strings");
        let mac = hex::encode(keys.manifest_mac(&message(&bytes)));
        bytes.extend(format!("\n{mac}\n").bytes());
        bytes
    }

    /// How many blocks it has.
    pub(crate) fn blocks(&self) -> u64 {
        let pages = self.planes.iter().flat_map(|plane| plane.pages.values());
        pages.map(|page| u64::from(page.blocks)).fold(0, u64::saturating_add)
    }
}

fn message(line: &[u8]) -> Vec<u8> {
    [DOMAIN, line].concat()
}

impl Claim {
    /// Reads a manifest, which lies there as that of the snapshot `id`.
    ///
    /// # Errors
    /// `Corrupt` for what is none, for that of another snapshot, and for numbers that cannot be.
    pub(crate) fn parse(bytes: &[u8], id: SnapshotId) -> Result<Self> {
        let body = bytes.strip_suffix(b"\n").ok_or_else(|| corrupt("the manifest is cut short".into()))?;
        let end = body.iter().rposition(|&byte| byte == b'\n');
        let (line, tag) = body.split_at(end.ok_or_else(|| corrupt("the manifest has no MAC".into()))?);
        let mut mac = [0; 32];
        hex::decode_to_slice(&tag[1..], &mut mac).map_err(|_| corrupt("the manifest has no MAC".into()))?;
        check_version(line, "the manifest")?;
        let written: Written = serde_json::from_slice(line)
            .map_err(|e| corrupt(format!("the manifest is not what sealblk writes: {e}")))?;
        let manifest = written.parse()?;
        if manifest.snapshot.id() != id {
            let other = manifest.snapshot.id();
            return Err(corrupt(format!("it is the manifest of {other}; somebody has put it there")));
        }
        Ok(Claim { manifest, line: line.to_vec(), mac, digest: digest(bytes) })
    }

    /// What it says, whoever wrote it.
    pub(crate) fn claimed(&self) -> &Manifest {
        &self.manifest
    }

    /// The SHA-256 of its bytes.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The manifest, if whoever wrote it had the data keys; `keys` are those of its top layer.
    ///
    /// # Errors
    /// `Corrupt` for one that was edited, or whose record was.
    pub(crate) fn prove(self, keys: &BackupKeys) -> Result<Manifest> {
        let mac = keys.manifest_mac(&message(&self.line));
        if !bool::from(self.mac.ct_eq(&mac)) {
            return Err(corrupt(
                "its MAC does not fit: it was edited, or written by somebody who had not its data key".into(),
            ));
        }
        check_seal(&self.manifest.snapshot, keys)?;
        Ok(self.manifest)
    }
}

/// Looks whether a record's seal was made by somebody who had the data key of its top layer, whose `keys`
/// these are. The check values of its data keys are those that it has.
///
/// # Errors
/// `Corrupt` for one that was edited.
pub(crate) fn check_seal(snapshot: &Snapshot, keys: &BackupKeys) -> Result<()> {
    let checks: Option<Vec<_>> = snapshot.keys().iter().map(KeyRecord::check).collect();
    let mac = checks.map(|checks| keys.seal(&snapshot.sealed_bytes(&checks)));
    let is_it = snapshot.mac.zip(mac).is_some_and(|(said, mac)| bool::from(said.ct_eq(&mac)));
    match is_it {
        true => Ok(()),
        false => Err(corrupt(format!(
            "{}: its record is not what it was sealed with; it was edited or replaced",
            snapshot.id()
        ))),
    }
}

/// The SHA-256 of a manifest's bytes.
pub(crate) fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

impl Written {
    fn parse(self) -> Result<Manifest> {
        let record = serde_json::to_vec(&self.record).map_err(|e| corrupt(e.to_string()))?;
        let snapshot = Snapshot::from_json(&record).map_err(|e| e.context("the record in the manifest"))?;
        if snapshot.layers().iter().any(|layer| layer.key.is_none()) {
            return Err(corrupt("the manifest is of something that is not encrypted".into()));
        }
        if snapshot.layers().iter().enumerate().any(|(n, layer)| layer.key != Some(n)) {
            return Err(corrupt("the manifest has not one layer for each data key".into()));
        }
        if self.planes.len() != snapshot.layers().len() || self.number == 0 {
            return Err(corrupt("the manifest does not fit together".into()));
        }
        let blocks = blocks_of(snapshot.geometry().size());
        let plane = |plane: WrittenPlane| {
            let mut pages = BTreeMap::new();
            for (number, digits, count) in plane.pages {
                let mut name = [0; 32];
                hex::decode_to_slice(&digits, &mut name)
                    .map_err(|_| corrupt(format!("{digits:?} is no page's name")))?;
                let page = PageEntry { name: ContentName::of(name), blocks: count };
                // The last run may be shorter.
                let most = blocks.saturating_sub(u64::from(number) * RUN).min(RUN);
                if count == 0 || u64::from(count) > most || pages.insert(number, page).is_some() {
                    return Err(corrupt(format!("the manifest has a page {number} of {count} blocks")));
                }
            }
            Ok(Plane { pages })
        };
        Ok(Manifest {
            place: PlaceId(self.place),
            number: self.number,
            snapshot,
            chain: self.chain,
            planes: self.planes.into_iter().map(plane).collect::<Result<_>>()?,
        })
    }
}

/// Which layer of a manifest's record each layer of a chain goes into: one for each data key, in the order in
/// which they come in the chain.
pub(crate) struct Planes {
    /// For each layer of the chain, the number of its plane.
    pub(crate) of_layers: Vec<usize>,
    /// For each plane, the number of its key at home.
    pub(crate) keys: Vec<usize>,
}

impl Planes {
    /// Those of this layout; none if a layer of it has no data key.
    pub(crate) fn of(layout: &Layout) -> Option<Self> {
        let mut keys: Vec<usize> = Vec::new();
        let mut of_layers = Vec::new();
        for layer in layout.layers() {
            let key = layer.key?;
            let plane = keys.iter().position(|known| *known == key).unwrap_or_else(|| {
                keys.push(key);
                keys.len() - 1
            });
            of_layers.push(plane);
        }
        Some(Planes { of_layers, keys })
    }
}

/// The record of `snapshot` as a manifest has it, sealed with the `keys` of its top layer.
pub(crate) fn record(snapshot: &Snapshot, planes: &Planes, keys: &BackupKeys) -> Snapshot {
    let layout = snapshot.layout();
    let size = layout.geometry().size();
    let layers: Vec<LayerRecord> = (0..planes.keys.len())
        .map(|n| LayerRecord { masked: false, ..LayerRecord::new_top(Some(n), size) })
        .collect();
    // What is to be copied up is what alone is under a key that is to go.
    let staying = layout.layers().len() - layout.leaving();
    let first_leaving = (0..planes.keys.len())
        .find(|n| !planes.of_layers[..staying].contains(n) && planes.of_layers[staying..].contains(n));
    let layout = Layout {
        geometry: layout.geometry(),
        keys: planes.keys.iter().map(|&n| layout.keys()[n].clone()).collect(),
        hydrate: first_leaving.map(|n| layers[n].id),
        layers,
    };
    sealed(Snapshot { layout, sealed_as: snapshot.id(), mac: None, ..snapshot.clone() }, keys)
}

/// What the snapshot of a manifest becomes in a store: another snapshot, `id`, with layers of its
/// own and the data keys as the KMS has wrapped them for it, sealed with the `keys` of its top
/// layer. It says that it is a copy.
pub(crate) fn pulled(
    from: &Snapshot,
    id: SnapshotId,
    wrapped: Vec<KeyRecord>,
    label: Label,
    keys: &BackupKeys,
) -> Snapshot {
    let mut layout = from.layout().clone();
    let leaving = layout.hydrate().and_then(|id| layout.layers().iter().position(|layer| layer.id == id));
    for layer in &mut layout.layers {
        layer.id = LayerId::random();
    }
    layout.hydrate = leaving.map(|n| layout.layers[n].id);
    layout.keys = wrapped;
    for (new, old) in layout.keys.iter_mut().zip(from.keys()) {
        new.check = old.check();
    }
    let copy = Snapshot {
        id,
        volume: from.volume(),
        copy_of: Some(from.id()),
        layout,
        created: Timestamp::now(),
        label,
        sealed_as: id,
        mac: None,
    };
    sealed(copy, keys)
}

/// What an earlier snapshot of the same volume that was [pulled] becomes with what has changed since: the
/// snapshot `from`, in the layers and under the data keys of the earlier one, whose id it keeps.
pub(crate) fn pulled_as(from: &Snapshot, earlier: &Snapshot, label: Label, keys: &BackupKeys) -> Snapshot {
    let mut copy = pulled(from, earlier.id(), earlier.keys().to_vec(), label, keys);
    let leaving =
        copy.layout.hydrate.and_then(|id| copy.layout.layers.iter().position(|layer| layer.id == id));
    for (layer, its) in copy.layout.layers.iter_mut().zip(earlier.layers()) {
        layer.id = its.id;
    }
    copy.layout.hydrate = leaving.map(|n| copy.layout.layers[n].id);
    sealed(copy, keys)
}

fn sealed(snapshot: Snapshot, keys: &BackupKeys) -> Snapshot {
    let checks = snapshot.layout.checks();
    Snapshot { mac: Some(keys.seal(&snapshot.sealed_bytes(&checks))), ..snapshot }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Kind;
    use crate::catalog::VolumeId;
    use crate::catalog::metadata::Geometry;
    use crate::catalog::slots::KeySlot;
    use crate::crypt::secret_mem::SecretMem;
    use crate::crypt::{Dek, SectorSize};
    use crate::kms::WrappedKey;
    use serde_json::{Value, json};

    fn dek(first: u8) -> Dek {
        Dek::from_bytes(&(0..64).map(|n| first.wrapping_add(n)).collect::<Vec<u8>>()).unwrap()
    }

    fn keys(dek: &Dek, volume: VolumeId) -> BackupKeys {
        let mut mem = SecretMem::new(BackupKeys::LEN).unwrap();
        dek.write_backup_keys(&volume.to_string(), mem.as_mut_slice());
        BackupKeys::from_secret(mem).unwrap()
    }

    fn key(dek: &Dek) -> KeyRecord {
        let wrapped = WrappedKey { key_id: "arn:aws:kms:us-east-1:0:key/1".into(), blob: vec![1; 141] };
        KeyRecord::new(KeySlot::new("aws", wrapped)).checked(dek)
    }

    /// Three layers, the two upper ones under a new data key, the lowest leaving; and the keys of the top.
    fn snapshot() -> (Snapshot, BackupKeys) {
        let (new, old, volume) = (dek(1), dek(2), VolumeId::random());
        let geometry = Geometry::new(5 << 30, SectorSize::B4096).unwrap();
        let layer = |key| LayerRecord { masked: false, ..LayerRecord::new_top(Some(key), geometry.size()) };
        let layers = vec![layer(1), layer(1), layer(0)];
        let hydrate = Some(layers[2].id);
        let layout = Layout { geometry, keys: vec![key(&old), key(&new)], layers, hydrate };
        let id = SnapshotId::random();
        let keys = keys(&new, volume);
        let unsealed = Snapshot {
            id,
            volume,
            copy_of: None,
            layout,
            created: Timestamp::now(),
            label: Label::default(),
            sealed_as: id,
            mac: None,
        };
        (sealed(unsealed, &keys), keys)
    }

    fn manifest() -> (Manifest, BackupKeys) {
        let (snapshot, keys) = snapshot();
        let planes = Planes::of(snapshot.layout()).unwrap();
        let record = record(&snapshot, &planes, &keys);
        let page = |byte, blocks| PageEntry { name: ContentName::of([byte; 32]), blocks };
        let planes = vec![Plane { pages: [(0, page(7, 8192)), (1, page(8, 808))].into() }, Plane::default()];
        let chain = snapshot.layers().iter().map(|layer| layer.id).collect();
        (Manifest { place: PlaceId::random(), number: 3, snapshot: record, chain, planes }, keys)
    }

    #[test]
    fn a_record_has_one_layer_for_each_data_key_and_is_sealed() {
        let (snapshot, keys) = snapshot();
        check_seal(&snapshot, &keys).unwrap();
        let planes = Planes::of(snapshot.layout()).unwrap();
        assert_eq!((&planes.of_layers[..], &planes.keys[..]), (&[0, 0, 1][..], &[1, 0][..]));
        let record = record(&snapshot, &planes, &keys);
        check_seal(&record, &keys).unwrap();
        let layers: Vec<_> = record.layers().iter().map(|layer| layer.key).collect();
        assert_eq!(layers, [Some(0), Some(1)]);
        assert_eq!(record.layout().hydrate(), Some(record.layers()[1].id));
        assert_eq!(record.keys()[0], snapshot.keys()[1]);
        let pulled = pulled(&record, SnapshotId::random(), record.keys().to_vec(), Label::default(), &keys);
        check_seal(&pulled, &keys).unwrap();
        assert_eq!((pulled.copy_of(), pulled.volume()), (Some(record.id()), record.volume()));
        assert!(pulled.layers().iter().all(|layer| record.layers().iter().all(|other| other.id != layer.id)));
        assert_eq!(pulled.layout().hydrate(), Some(pulled.layers()[1].id));
        assert_eq!(Snapshot::from_json(&pulled.to_json()).unwrap(), pulled);
        // What comes after it gets its id, layers and keys.
        let later = Snapshot { id: SnapshotId::random(), ..record.clone() };
        let next = pulled_as(&later, &pulled, Label::default(), &keys);
        check_seal(&next, &keys).unwrap();
        assert_eq!((next.id(), next.copy_of()), (pulled.id(), Some(later.id())));
        assert_eq!((next.layers(), next.keys()), (pulled.layers(), pulled.keys()));
        assert_eq!(next.layout().hydrate(), pulled.layout().hydrate());
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_by_who_has_the_keys() {
        let (manifest, keys) = manifest();
        let (bytes, id) = (manifest.to_bytes(&keys), manifest.snapshot.id());
        let claim = Claim::parse(&bytes, id).unwrap();
        assert_eq!((claim.claimed(), claim.digest()), (&manifest, digest(&bytes)));
        assert_eq!(claim.prove(&keys).unwrap(), manifest);
        assert_eq!(manifest.blocks(), 9000);
        let other = super::tests::keys(&dek(9), manifest.snapshot.volume());
        assert!(Claim::parse(&bytes, id).unwrap().prove(&other).is_err());
        let e = Claim::parse(&bytes, SnapshotId::random()).err().unwrap();
        assert!(e.to_string().contains("the manifest of"), "{e}");
        for len in 0..bytes.len() {
            assert_eq!(Claim::parse(&bytes[..len], id).err().unwrap().kind(), Kind::Corrupt, "{len}");
        }
    }

    #[test]
    fn what_was_edited_is_refused() {
        let (manifest, keys) = manifest();
        let (bytes, id) = (manifest.to_bytes(&keys), manifest.snapshot.id());
        let line = bytes.split(|&byte| byte == b'\n').next().unwrap();
        let mac = String::from_utf8(bytes[line.len()..].to_vec()).unwrap();
        let value: Value = serde_json::from_slice(line).unwrap();
        let edited = |edit: &dyn Fn(&mut Value)| {
            let mut value = value.clone();
            edit(&mut value);
            let bytes = [value.to_string().as_bytes(), mac.as_bytes()].concat();
            let e = Claim::parse(&bytes, id).and_then(|claim| claim.prove(&keys)).expect_err("edited");
            assert_eq!(e.kind(), Kind::Corrupt);
            e.to_string()
        };
        assert!(edited(&|v| v["number"] = json!(2)).contains("MAC"));
        assert!(edited(&|v| v["place"] = json!(Uuid::new_v4())).contains("MAC"));
        assert!(edited(&|v| v["record"]["description"] = json!("x")).contains("MAC"));
        assert!(edited(&|v| v["planes"][0]["pages"][0][1] = json!("00".repeat(32))).contains("MAC"));
        assert!(edited(&|v| v["format"] = json!(2)).contains("version 2"));
        assert!(edited(&|v| v["record"]["size"] = json!(1u64 << 40)).contains("its size"));
        for (place, value) in
            [("0/2", json!(8193)), ("1/2", json!(2049)), ("0/2", json!(0)), ("0/0", json!(u32::MAX))]
        {
            let edit =
                |v: &mut Value| *v.pointer_mut(&format!("/planes/0/pages/{place}")).unwrap() = value.clone();
            assert!(edited(&edit).contains("a page"), "{place} {value}");
        }
        assert!(
            edited(&|v| v["planes"][0]["pages"][1] = v["planes"][0]["pages"][0].clone()).contains("a page 0")
        );
        assert!(edited(&|v| drop(v["planes"].as_array_mut().unwrap().pop())).contains("fit together"));
        assert!(edited(&|v| v["more"] = json!(1)).contains("more"));
        assert!(edited(&|v| v["number"] = json!(0)).contains("fit together"));
    }
}
