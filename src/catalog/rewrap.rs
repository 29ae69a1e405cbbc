//! A data key that is wrapped anew: the same key, so the data and the seal stay as they are.

use crate::base::{Context, Error, Kind, Result};
use crate::catalog::Snapshot;
use crate::catalog::metadata::{KeyRecord, Metadata};
use crate::kms::WrappedKey;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;

/// How one of the data keys of a volume or a snapshot is wrapped from now on. Says nothing
/// that its record would not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rewrapped {
    /// Which of its keys.
    slot: usize,
    /// SHA-256 of the wrapped key that this replaces, hexadecimal.
    replaces: String,
    provider: String,
    key_id: String,
    /// Base64.
    wrapped: String,
}

impl Rewrapped {
    /// `new`, by `provider`, in place of `old`, which is key `slot` of its record. Whoever makes this has
    /// seen that both unwrap to the same data key.
    pub fn new(slot: usize, old: &KeyRecord, provider: &str, new: &WrappedKey) -> Self {
        Rewrapped {
            slot,
            replaces: digest(&old.wrapped.blob),
            provider: provider.into(),
            key_id: new.key_id.clone(),
            wrapped: BASE64.encode(&new.blob),
        }
    }
}

impl fmt::Display for Rewrapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}: {}", self.slot, self.provider, self.key_id)
    }
}

impl Metadata {
    /// Takes note of it. It counts once it is stored.
    ///
    /// # Errors
    /// `Busy` if the volume's key is not the one that was rewrapped, any more; `Usage` for what could
    /// not stand in `volume.json`.
    pub fn rewrap(&mut self, new: &Rewrapped) -> Result<()> {
        let mut changed = self.clone();
        new.replace_in(&mut changed.layout.keys, &format!("volume show {}", self.id))?;
        *self = readable(Metadata::from_json(&changed.to_json()))?;
        Ok(())
    }
}

impl Snapshot {
    /// Takes note of it. It counts once it is stored. What proves the snapshot's layers does not depend on
    /// how its data keys are wrapped.
    ///
    /// # Errors
    /// As for [`Metadata::rewrap`].
    pub fn rewrap(&mut self, new: &Rewrapped) -> Result<()> {
        let mut changed = self.clone();
        new.replace_in(&mut changed.layout.keys, &format!("snapshot show {}", self.id))?;
        *self = readable(Snapshot::from_json(&changed.to_json()))?;
        Ok(())
    }
}

impl Rewrapped {
    /// Replaces the wrapped key among those of a record; `show` is the command that shows that.
    fn replace_in(&self, keys: &mut [KeyRecord], show: &str) -> Result<()> {
        let key = keys.get_mut(self.slot);
        let key = key.ok_or_else(|| Error::new(Kind::Usage, format!("it has no data key {}", self.slot)))?;
        if digest(&key.wrapped.blob) != self.replaces {
            let message = format!(
                "data key {} was wrapped anew by somebody else meanwhile; look at \"sealblk {show}\" and try \
                 again",
                self.slot
            );
            return Err(Error::new(Kind::Busy, message));
        }
        let blob = BASE64.decode(&self.wrapped).map_err(|e| Error::of(Kind::Usage, e).context("wrapped"))?;
        key.wrapped = WrappedKey { key_id: self.key_id.clone(), blob };
        key.provider = self.provider.clone();
        Ok(())
    }
}

/// What is written must be readable, whoever it came from.
fn readable<T>(read: Result<T>) -> Result<T> {
    let read = read.context(|| "the new wrapped key");
    read.map_err(|e| Error::new(Kind::Usage, e.to_string()))
}

fn digest(blob: &[u8]) -> String {
    hex::encode(Sha256::digest(blob))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::VolumeId;
    use crate::catalog::metadata::Geometry;
    use crate::catalog::seal::Seal;
    use crate::crypt::{Dek, SectorSize};

    fn record(key_id: &str, blob: &[u8]) -> KeyRecord {
        let wrapped = WrappedKey { key_id: key_id.into(), blob: blob.into() };
        KeyRecord { provider: "embedded".into(), wrapped, check: None }
    }

    fn sealed() -> (Metadata, Dek) {
        let dek = Dek::from_bytes(&(0..64).collect::<Vec<u8>>()).unwrap();
        let geometry = Geometry::new(1 << 20, SectorSize::B512).unwrap();
        let mut m = Metadata::new(VolumeId::random(), None, geometry, Some(record("arn:1", &[1; 141])));
        m.seal(std::slice::from_ref(&dek));
        (m, dek)
    }

    #[test]
    fn the_seal_and_the_check_value_stay() {
        let (mut m, dek) = sealed();
        let new = record("arn:2", &[2; 200]);
        let rewrapped = Rewrapped::new(0, &m.keys()[0], "aws", &new.wrapped);
        m.rewrap(&rewrapped).unwrap();
        assert_eq!((m.keys()[0].provider.as_str(), &m.keys()[0].wrapped), ("aws", &new.wrapped));
        assert_eq!(m.verify(&[dek]).unwrap(), Seal::Sealed);
        // Once more, the change is of a key that is there no more.
        let e = m.rewrap(&rewrapped).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy);
    }

    #[test]
    fn what_cannot_stand_in_the_file_changes_nothing() {
        let (m, _) = sealed();
        let old = &m.keys()[0];
        let with = |slot, provider: &str, key_id: &str, len: usize| {
            let new = record(key_id, &vec![3; len]);
            Rewrapped::new(slot, old, provider, &new.wrapped)
        };
        let broken = Rewrapped { wrapped: "?".into(), ..with(0, "aws", "arn:2", 9) };
        for bad in [
            with(1, "aws", "arn:2", 9),
            with(0, "a b", "arn:2", 9),
            with(0, "aws", "", 9),
            with(0, "aws", "arn:2", 0),
            with(0, "aws", "arn:2", 6145),
            broken,
        ] {
            let mut changed = m.clone();
            assert_eq!(changed.rewrap(&bad).unwrap_err().kind(), Kind::Usage, "{bad}");
            assert_eq!(changed, m);
        }
    }
}
