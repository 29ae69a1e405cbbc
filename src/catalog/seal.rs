//! The seal of a volume's metadata: a check value for each data key and a MAC under the top layer's.
//!
//! Whoever makes a volume never sees its data keys, so a new volume has no seal. The first attach, which
//! has them, seals it before the guest can write anything. Hence a volume without a seal holds no data
//! in its top layer, and an attach may go on without one only where that is so: or else taking the seal
//! away would undo it. What an unsealed clone has below its top layer is proved by the seal of the
//! snapshot that it was made of.

use crate::base::{Error, Kind, Result};
use crate::catalog::layout::{LayerRecord, SealVersion, sealed_bytes};
use crate::catalog::metadata::{Geometry, Metadata, Proof};
use crate::catalog::snapshot::Snapshot;
use crate::crypt::{Dek, SealKey, SectorSize};
use std::borrow::Borrow;
use std::io;
use subtle::ConstantTimeEq;

/// What the metadata of a volume turned out to be worth. Nothing here tells of the data itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an unsealed volume may be attached only if its top layer holds no data"]
pub enum Seal {
    /// The metadata is as the last process that had the data keys wrote it.
    Sealed,
    /// Nobody has had the volume's data keys yet. **The caller must see to it that the top layer
    /// holds not a single byte other than zero**, and refuse the volume otherwise; then
    /// [`Metadata::seal`] it before anything is written. The layers below, if there are any, are
    /// those of a snapshot, as its own seal says.
    Unsealed,
    /// The volume is not encrypted, so there is no key to seal its metadata with.
    NotEncrypted,
}

impl Metadata {
    /// Compares the metadata with the data keys; `deks` has one for each of
    /// [`Metadata::keys`], in that order.
    ///
    /// # Errors
    /// `Corrupt` for a data key that is not the volume's, and for metadata that was edited.
    pub fn verify(&self, deks: &[impl Borrow<Dek>]) -> Result<Seal> {
        self.assert_all_keys(deks);
        let Some(top) = self.top().key else { return Ok(Seal::NotEncrypted) };
        let Some(mac) = &self.mac else {
            self.verify_origin(deks)?;
            return Ok(Seal::Unsealed);
        };
        for (n, (key, dek)) in self.keys().iter().zip(deks).enumerate() {
            if key.check.is_none_or(|check| bool::from(check.ct_ne(&dek.borrow().check_value()))) {
                return Err(self.refusal(format!(
                    "wrapped data key {n} unwraps to another key than the one the volume was written with; \
                     it belongs to another volume or was replaced"
                )));
            }
        }
        match bool::from(mac.ct_eq(&self.compute_mac(deks[top].borrow()))) {
            true => Ok(Seal::Sealed),
            false => Err(self.refusal("the MAC does not fit the rest; volume.json was edited".into())),
        }
    }

    /// An unsealed volume: are the layers below its top those that the snapshot's seal is over?
    fn verify_origin(&self, deks: &[impl Borrow<Dek>]) -> Result<()> {
        let below = &self.layers()[1..];
        let Some(first) = below.first() else { return Ok(()) };
        let proof = self.origin.as_ref().and_then(|origin| origin.proof.as_ref());
        let (Some(proof), Some(key)) = (proof, first.key) else {
            let problem = "it has no seal, and nothing says where the layers below its top are from; \
                           volume.json was edited or replaced";
            return Err(self.refusal(problem.into()));
        };
        if below.iter().any(|l| l.size > proof.size) {
            return Err(self.refusal("a layer is longer than the snapshot that it is from".into()));
        }
        // The snapshot's keys come first, and it has none that no layer of it uses.
        let keys = below.iter().filter_map(|l| l.key).max().map_or(0, |n| n + 1);
        let checks: Vec<_> = deks[..keys].iter().map(|dek| dek.borrow().check_value()).collect();
        let message = proof.message(self.sector_size(), below, &checks)?;
        let mac = deks[key].borrow().metadata_mac(&proof.volume.to_string(), &message);
        match bool::from(proof.mac.ct_eq(&mac)) {
            true => Ok(()),
            false => Err(self.refusal(format!(
                "the layers below its top, or their data keys, are not those that {} was sealed with; the \
                 snapshot's record or volume.json was edited",
                proof.snapshot
            ))),
        }
    }

    /// Looks whether the volume is what its record says, and seals the record if nobody has had the data keys
    /// before. `deks` are as for [`Metadata::verify`]; `has_data` tells whether anything was ever written to
    /// the top layer. A new seal counts once it is stored.
    ///
    /// # Errors
    /// As [`Metadata::verify`]; `Corrupt` for a volume with data and without a seal; what `has_data` says.
    pub fn prove(
        &mut self,
        deks: &[impl Borrow<Dek>],
        has_data: impl FnOnce() -> io::Result<bool>,
    ) -> Result<()> {
        if self.verify(deks)? == Seal::Unsealed {
            self.check_no_data(has_data)?;
            self.seal(deks);
        }
        Ok(())
    }

    /// Compares the record of a volume that was proved before with its seal; `key` is that of the top layer's
    /// data key, and none for an unencrypted volume.
    ///
    /// # Errors
    /// `Corrupt` for a record that was edited, and for an encrypted volume without a seal.
    pub fn verify_again(&self, key: Option<&SealKey>) -> Result<()> {
        assert_eq!(key.is_some(), self.is_encrypted(), "an encrypted volume has a seal, and no other");
        let Some(key) = key else { return Ok(()) };
        let expected = key.mac(&self.sealed_bytes());
        match self.mac.as_ref().is_some_and(|mac| mac.ct_eq(&expected).into()) {
            true => Ok(()),
            false => Err(self.refusal("the MAC does not fit the rest; volume.json was edited".into())),
        }
    }

    /// Seals a volume that had no seal when [`Metadata::verify`] looked at it, and has not changed since:
    /// `checks` are the check values of its data keys, in their order, and `key` is what the top layer's data
    /// key seals with. `has_data` is as for [`Metadata::prove`].
    ///
    /// # Errors
    /// `Corrupt` for a volume with data; what `has_data` says.
    pub fn seal_later(
        &mut self,
        checks: &[[u8; 16]],
        key: &SealKey,
        has_data: impl FnOnce() -> io::Result<bool>,
    ) -> Result<()> {
        assert_eq!(checks.len(), self.keys().len(), "one check value for each of the volume's keys");
        self.check_no_data(has_data)?;
        self.layout.keys.iter_mut().zip(checks).for_each(|(key, check)| key.check = Some(*check));
        self.reseal(Some(key));
        Ok(())
    }

    /// A volume without a seal must not have data in its top layer.
    fn check_no_data(&self, has_data: impl FnOnce() -> io::Result<bool>) -> Result<()> {
        if !has_data()? {
            return Ok(());
        }
        let message = format!(
            "{}: there is data in its layer, but no seal in volume.json, which was edited or replaced; \
             restore it from a backup",
            self.id
        );
        Err(Error::new(Kind::Corrupt, message))
    }

    /// Notes the data keys' check values and the MAC; `deks` as for [`Metadata::verify`]. For an unencrypted
    /// volume there is nothing to note. It counts once it is stored.
    pub fn seal(&mut self, deks: &[impl Borrow<Dek>]) {
        self.assert_all_keys(deks);
        let Some(top) = self.top().key else { return };
        for (key, dek) in self.layout.keys.iter_mut().zip(deks) {
            key.check = Some(dek.borrow().check_value());
        }
        self.seal_version = SealVersion::V2;
        self.mac = Some(self.compute_mac(deks[top].borrow()));
    }

    /// Seals anew what was sealed and has another layout now; `key` is that of the top layer's data key and
    /// none for an unencrypted volume. It counts once it is stored.
    pub(crate) fn reseal(&mut self, key: Option<&SealKey>) {
        assert_eq!(key.is_some(), self.is_encrypted(), "an encrypted volume has a seal, and no other");
        let Some(key) = key else { return };
        self.seal_version = SealVersion::V2;
        self.mac = Some(key.mac(&self.sealed_bytes()));
    }

    /// What seals the volume when its data keys are gone; none for an unencrypted one. `deks` as for
    /// [`Metadata::verify`].
    pub fn seal_key(&self, deks: &[impl Borrow<Dek>]) -> Result<Option<SealKey>> {
        self.assert_all_keys(deks);
        self.top().key.map(|top| deks[top].borrow().seal_key(&self.id.to_string())).transpose()
    }

    /// Whether it has a seal, right or wrong.
    pub fn is_sealed(&self) -> bool {
        self.mac.is_some()
    }

    fn assert_all_keys(&self, deks: &[impl Borrow<Dek>]) {
        assert_eq!(deks.len(), self.keys().len(), "one data key for each of the volume's keys");
    }

    fn refusal(&self, problem: String) -> Error {
        let message = format!("{}: {problem}; restore volume.json from a backup", self.id);
        Error::new(Kind::Corrupt, message)
    }

    fn compute_mac(&self, dek: &Dek) -> [u8; 32] {
        dek.metadata_mac(&self.id.to_string(), &self.sealed_bytes())
    }

    fn sealed_bytes(&self) -> Vec<u8> {
        let checks = self.layout.checks();
        sealed_bytes(self.seal_version, &self.id.to_string(), self.geometry(), self.layers(), &checks)
    }
}

impl Snapshot {
    /// Compares the record with the data keys; `deks` has one for each of [`Snapshot::keys`], in that order.
    ///
    /// # Errors
    /// `Corrupt` for a data key that is not the snapshot's, and for a record that was edited.
    pub fn verify(&self, deks: &[impl Borrow<Dek>]) -> Result<()> {
        assert_eq!(deks.len(), self.keys().len(), "one data key for each of the snapshot's keys");
        let Some(top) = self.layout().top().key else { return Ok(()) };
        let checks: Vec<_> = deks.iter().map(|dek| dek.borrow().check_value()).collect();
        let mac = |proof: &Proof| -> Result<[u8; 32]> {
            let message = proof.message(self.geometry().sector_size(), self.layers(), &checks)?;
            Ok(deks[top].borrow().metadata_mac(&proof.volume.to_string(), &message))
        };
        match self.proof() {
            Some(proof) if bool::from(proof.mac.ct_eq(&mac(&proof)?)) => Ok(()),
            _ => {
                let message = format!(
                    "{}: its record, or a data key of it, is not what it was sealed with; it was edited or \
                     replaced",
                    self.id()
                );
                Err(Error::new(Kind::Corrupt, message))
            }
        }
    }
}

impl Proof {
    /// What the snapshot's MAC is over, with these layers and the check values of their keys.
    fn message(&self, unit: SectorSize, layers: &[LayerRecord], checks: &[[u8; 16]]) -> Result<Vec<u8>> {
        let geometry = Geometry::new(self.size, unit).map_err(|e| Error::of(Kind::Corrupt, e))?;
        Ok(sealed_bytes(SealVersion::V2, &self.snapshot.to_string(), geometry, layers, checks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::id::LayerId;
    use crate::catalog::metadata::KeyRecord;
    use crate::catalog::slots::KeySlot;
    use crate::catalog::snapshot::Label;
    use crate::catalog::tags::Tags;
    use crate::catalog::{SnapshotId, VolumeId};
    use crate::kms::WrappedKey;

    fn dek(first: u8) -> Dek {
        let bytes: Vec<u8> = (0..64).map(|n| first.wrapping_add(n)).collect();
        Dek::from_bytes(&bytes).unwrap()
    }

    fn key() -> KeyRecord {
        let wrapped = WrappedKey { key_id: "arn:aws:kms:us-east-1:0:key/1".into(), blob: vec![1; 141] };
        KeyRecord::new(KeySlot::new("embedded", wrapped))
    }

    fn new(key: Option<KeyRecord>) -> Metadata {
        let id = "vol-0123456789abcdef0".parse().unwrap();
        Metadata::new(id, None, Geometry::new(1 << 20, SectorSize::B512).unwrap(), key)
    }

    fn sealed() -> Metadata {
        let mut m = new(Some(key()));
        m.seal(&[dek(0)]);
        m
    }

    #[test]
    fn a_seal_holds_through_writing_and_reading() {
        let m = new(Some(key()));
        assert!(!m.is_sealed());
        assert_eq!(m.verify(&[dek(0)]).unwrap(), Seal::Unsealed);
        let read = Metadata::from_json(&sealed().to_json()).unwrap();
        assert!(read.is_sealed());
        assert_eq!(read.verify(&[dek(0)]).unwrap(), Seal::Sealed);
    }

    #[test]
    fn an_unencrypted_volume_has_none() {
        let mut m = new(None);
        m.seal(&[] as &[Dek]);
        assert!(!m.is_sealed());
        assert_eq!(m.verify(&[] as &[Dek]).unwrap(), Seal::NotEncrypted);
    }

    #[test]
    fn another_data_key_is_refused() {
        let e = sealed().verify(&[dek(1)]).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt);
        assert!(e.to_string().contains("belongs to another volume or was replaced"), "{e}");
    }

    #[test]
    fn every_edit_of_what_the_data_means_is_refused() {
        type Edit = fn(&mut Metadata);
        let edits: [(&str, Edit); 11] = [
            ("id", |m| m.id = VolumeId::random()),
            ("size", |m| m.layout.geometry = Geometry::new(2 << 20, SectorSize::B512).unwrap()),
            ("sector size", |m| m.layout.geometry = Geometry::new(1 << 20, SectorSize::B4096).unwrap()),
            ("layer", |m| m.layout.layers[0].id = LayerId::random()),
            ("layer below", |m| {
                m.layout.layers.push(LayerRecord {
                    id: LayerId::random(),
                    key: None,
                    masked: false,
                    size: 512,
                })
            }),
            ("masked layer below", |m| {
                let layer = LayerRecord { id: m.top().id, key: None, masked: true, size: 512 };
                m.layout.layers.push(layer)
            }),
            ("layer below with key", |m| {
                m.layout.layers.push(LayerRecord {
                    id: LayerId::random(),
                    key: Some(0),
                    masked: false,
                    size: 512,
                })
            }),
            ("length of a layer", |m| m.layout.layers[0].size -= 512),
            ("version", |m| m.seal_version = SealVersion::V1),
            ("mac", |m| m.mac.as_mut().unwrap()[31] ^= 1),
            ("check", |m| m.layout.keys[0].check.as_mut().unwrap()[0] ^= 0x80),
        ];
        for (what, edit) in edits {
            let mut m = sealed();
            edit(&mut m);
            let e = m.verify(&[dek(0)]).expect_err(what);
            assert_eq!(e.kind(), Kind::Corrupt, "{what}");
        }
    }

    #[test]
    fn rewrapping_and_renaming_need_no_new_seal() {
        let mut m = sealed();
        let key_id = "arn:aws:kms:us-east-1:0:key/2".into();
        m.layout.keys[0].slots[0] = KeySlot::new("aws", WrappedKey { key_id, blob: vec![9; 200] });
        m.name = Some("db".parse().unwrap());
        m.generation += 7;
        m.attached_before = true;
        assert_eq!(m.verify(&[dek(0)]).unwrap(), Seal::Sealed);
    }

    #[test]
    fn the_sealed_bytes_are_those_of_the_format() {
        let mut m = sealed();
        m.layout.layers[0].id = "67e55044-10b1-426f-9247-bb680e5fe0c8".parse().unwrap();
        m.layout.keys[0].check = Some([0xcc; 16]);
        for (version, first, length) in
            [(SealVersion::V1, "01000000", ""), (SealVersion::V2, "02000000", "0000100000000000")]
        {
            m.seal_version = version;
            let expected = [
                first,
                "15000000",
                &hex::encode("vol-0123456789abcdef0"),
                "0000100000000000",
                "00020000",
                "01",
                "01000000",
                "67e5504410b1426f9247bb680e5fe0c8",
                "00000000",
                length,
                "01000000",
                "cccccccccccccccccccccccccccccccc",
            ];
            assert_eq!(hex::encode(m.sealed_bytes()), expected.concat());
        }
    }

    /// What the first version wrote is sealed as it was until it is sealed anew.
    #[test]
    fn a_seal_of_version_1_holds_and_is_replaced_by_the_next() {
        let mut m = sealed();
        m.seal_version = SealVersion::V1;
        m.mac = Some(m.compute_mac(&dek(0)));
        let mut read = Metadata::from_json(&m.to_json()).unwrap();
        assert_eq!(read.verify(&[dek(0)]).unwrap(), Seal::Sealed);
        read.layout.layers[0].id = LayerId::random();
        let key = read.seal_key(&[dek(0)]).unwrap();
        read.reseal(key.as_ref());
        assert_eq!(read.seal_version, SealVersion::V2);
        assert_eq!(read.verify(&[dek(0)]).unwrap(), Seal::Sealed);
    }

    #[test]
    fn what_is_sealed_later_must_have_no_data_either() {
        let mut m = new(Some(key()));
        let seal_key = m.seal_key(&[dek(0)]).unwrap().unwrap();
        let checks = [dek(0).check_value()];
        let refused = m.seal_later(&checks, &seal_key, || Ok(true)).unwrap_err();
        assert_eq!((refused.kind(), m.is_sealed()), (Kind::Corrupt, false));
        m.seal_later(&checks, &seal_key, || Ok(false)).unwrap();
        m.verify_again(Some(&seal_key)).unwrap();
        assert_eq!(m.verify(&[dek(0)]).unwrap(), Seal::Sealed);
    }

    #[test]
    fn a_snapshot_s_record_that_was_edited_or_unwraps_to_another_key_is_refused() {
        let volume = sealed();
        let seal_key = volume.seal_key(&[dek(0)]).unwrap();
        let label = Label::new(String::new(), Tags::default()).unwrap();
        let snapshot = Snapshot::of(&volume, SnapshotId::random(), label, seal_key.as_ref());
        snapshot.verify(&[dek(0)]).unwrap();
        assert_eq!(snapshot.verify(&[dek(1)]).unwrap_err().kind(), Kind::Corrupt);
        let text = String::from_utf8(snapshot.to_json()).unwrap();
        let edited = text.replace(&volume.top().id.to_string(), &LayerId::random().to_string());
        let edited = Snapshot::from_json(edited.as_bytes()).unwrap();
        assert_eq!(edited.verify(&[dek(0)]).unwrap_err().kind(), Kind::Corrupt);
    }
}
