//! The seal of a volume's metadata: a check value for each data key and a MAC under the top layer's.
//!
//! Whoever makes a volume never sees its data keys, so a new volume has no seal. The first attach, which has
//! them, seals it before the guest can write anything. Hence a volume without a seal holds no data, and an
//! attach may go on without one only where that is so: or else taking the seal away would undo it.

use super::metadata::{FORMAT, Metadata};
use crate::crypt::Dek;
use crate::error::{Error, Kind, Result};
use subtle::ConstantTimeEq;

/// What the metadata of a volume turned out to be worth. Nothing here tells of the data itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an unsealed volume may be attached only if its layers hold no data"]
pub enum Seal {
    /// It is as the last process that had the data keys wrote it.
    Sealed,
    /// Nobody has had its data keys yet. **The caller must see to it that no layer holds a single byte other
    /// than zero**, and refuse the volume otherwise; then [`Metadata::seal`] it before anything is written.
    Unsealed,
    /// It is not encrypted, so there is no key to seal it with.
    NotEncrypted,
}

impl Metadata {
    /// Compares the metadata with the data keys; `deks` has one for each of [`Metadata::keys`], in that order.
    ///
    /// # Errors
    /// `Corrupt` for a data key that is not the volume's, and for metadata that was edited.
    pub fn verify(&self, deks: &[Dek]) -> Result<Seal> {
        self.assert_all_keys(deks);
        let Some(top) = self.top().key else { return Ok(Seal::NotEncrypted) };
        let Some(mac) = &self.mac else { return Ok(Seal::Unsealed) };
        for (n, (key, dek)) in self.keys.iter().zip(deks).enumerate() {
            if key.check.is_none_or(|check| bool::from(check.ct_ne(&dek.check_value()))) {
                return Err(self.refusal(format!(
                    "wrapped data key {n} unwraps to another key than the one the volume was written with; it \
                     belongs to another volume or was replaced"
                )));
            }
        }
        match bool::from(mac.ct_eq(&self.compute_mac(&deks[top]))) {
            true => Ok(Seal::Sealed),
            false => Err(self.refusal("the MAC does not fit the rest; volume.json was edited".into())),
        }
    }

    /// Notes the data keys' check values and the MAC; `deks` as for [`Metadata::verify`]. For an unencrypted
    /// volume there is nothing to note. It counts once it is stored.
    pub fn seal(&mut self, deks: &[Dek]) {
        self.assert_all_keys(deks);
        let Some(top) = self.top().key else { return };
        for (key, dek) in self.keys.iter_mut().zip(deks) {
            key.check = Some(dek.check_value());
        }
        self.mac = Some(self.compute_mac(&deks[top]));
    }

    /// Whether it has a seal, right or wrong.
    pub fn is_sealed(&self) -> bool {
        self.mac.is_some()
    }

    fn assert_all_keys(&self, deks: &[Dek]) {
        assert_eq!(deks.len(), self.keys.len(), "one data key for each of the volume's keys");
    }

    fn refusal(&self, problem: String) -> Error {
        let message = format!("{}: {problem}; restore volume.json from a backup", self.id);
        Error::new(Kind::Corrupt, message)
    }

    fn compute_mac(&self, dek: &Dek) -> [u8; 32] {
        dek.metadata_mac(&self.id.to_string(), &self.sealed_bytes())
    }

    /// What the MAC covers, as docs/format.md has it: what the data means, and nothing of how a data key is
    /// wrapped or what the volume is called. Every part has a fixed length or its length before it, so that no
    /// two volumes have the same bytes.
    fn sealed_bytes(&self) -> Vec<u8> {
        let count = |n: usize| u32::try_from(n).expect("MAX_FILE_LEN allows no such number").to_le_bytes();
        let id = self.id.to_string();
        let mut bytes = Vec::new();
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(count(id.len()));
        bytes.extend(id.as_bytes());
        bytes.extend(self.size().to_le_bytes());
        bytes.extend(self.sector_size().bytes().to_le_bytes());
        bytes.push(u8::from(self.is_encrypted()));
        bytes.extend(count(self.layers.len()));
        for layer in &self.layers {
            bytes.extend(layer.id.as_bytes());
            bytes.extend(layer.key.map_or(u32::MAX.to_le_bytes(), count));
        }
        bytes.extend(count(self.keys.len()));
        for key in &self.keys {
            bytes.extend(key.check.expect("verify and seal have looked, or noted it"));
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::WrappedKey;
    use crate::volume::VolumeId;
    use crate::volume::id::LayerId;
    use crate::volume::metadata::{Geometry, KeyRecord, LayerRecord, SectorSize};

    fn dek(first: u8) -> Dek {
        let bytes: Vec<u8> = (0..64).map(|n| first.wrapping_add(n)).collect();
        Dek::from_bytes(&bytes).unwrap()
    }

    fn key() -> KeyRecord {
        let wrapped = WrappedKey { key_id: "arn:aws:kms:us-east-1:0:key/1".into(), blob: vec![1; 141] };
        KeyRecord { provider: "embedded".into(), wrapped, check: None }
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
        m.seal(&[]);
        assert!(!m.is_sealed());
        assert_eq!(m.verify(&[]).unwrap(), Seal::NotEncrypted);
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
        let edits: [(&str, Edit); 8] = [
            ("id", |m| m.id = VolumeId::random()),
            ("size", |m| m.geometry = Geometry::new(2 << 20, SectorSize::B512).unwrap()),
            ("sector size", |m| m.geometry = Geometry::new(1 << 20, SectorSize::B4096).unwrap()),
            ("layer", |m| m.layers[0].id = LayerId::random()),
            ("layer below", |m| m.layers.push(LayerRecord { id: LayerId::random(), key: None })),
            ("layer below with key", |m| m.layers.push(LayerRecord { id: LayerId::random(), key: Some(0) })),
            ("mac", |m| m.mac.as_mut().unwrap()[31] ^= 1),
            ("check", |m| m.keys[0].check.as_mut().unwrap()[0] ^= 0x80),
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
        m.keys[0].wrapped.blob = vec![9; 200];
        m.keys[0].wrapped.key_id = "arn:aws:kms:us-east-1:0:key/2".into();
        m.keys[0].provider = "aws".into();
        m.name = Some("db".parse().unwrap());
        m.generation += 7;
        m.attached_before = true;
        assert_eq!(m.verify(&[dek(0)]).unwrap(), Seal::Sealed);
    }

    #[test]
    fn the_sealed_bytes_are_those_of_the_format() {
        let mut m = sealed();
        m.layers[0].id = "67e55044-10b1-426f-9247-bb680e5fe0c8".parse().unwrap();
        m.keys[0].check = Some([0xcc; 16]);
        let expected = [
            "01000000",
            "15000000",
            &hex::encode("vol-0123456789abcdef0"),
            "0000100000000000",
            "00020000",
            "01",
            "01000000",
            "67e5504410b1426f9247bb680e5fe0c8",
            "00000000",
            "01000000",
            "cccccccccccccccccccccccccccccccc",
        ];
        assert_eq!(hex::encode(m.sealed_bytes()), expected.concat());
    }
}
