//! How a data key is wrapped, changed: one of its slots is wrapped anew, one is added, one is removed. The
//! data key is the same, so the data and the seal stay as they are.

use crate::base::{Context, Error, Kind, Result};
use crate::catalog::Snapshot;
use crate::catalog::layout::written::{WrittenSlot, check_slots};
use crate::catalog::metadata::{KeyRecord, Metadata};
use crate::catalog::slots::{KeySlot, MAX_SLOTS};
use crate::kms::WrappedKey;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;

/// How a slot of one of the data keys of a volume or a snapshot is wrapped from now on. Says nothing that its
/// record would not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rewrapped {
    /// Which of its keys. (Before there were several slots, the name was of the key.)
    #[serde(rename = "slot")]
    key: usize,
    /// SHA-256 of the wrapped key that this replaces, hexadecimal: this is what tells the slot.
    replaces: String,
    provider: String,
    key_id: String,
    /// Base64.
    wrapped: String,
}

impl Rewrapped {
    /// `new` in place of `old`, which is a slot of key `key` of its record. Whoever makes this has seen that
    /// both unwrap to the same data key.
    pub fn new(key: usize, old: &KeySlot, new: &KeySlot) -> Self {
        let (provider, new) = (&new.provider, &new.wrapped);
        Rewrapped {
            key,
            replaces: digest(&old.wrapped.blob),
            provider: provider.clone(),
            key_id: new.key_id.clone(),
            wrapped: BASE64.encode(&new.blob),
        }
    }
}

impl fmt::Display for Rewrapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}: {}", self.key, self.provider, self.key_id)
    }
}

/// A slot that one of the data keys of a volume or a snapshot gets, or has no more. Says nothing that its
/// record would not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SlotChange {
    /// Which of its keys.
    key: usize,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum What {
    Add(WrittenSlot),
    /// SHA-256 of the wrapped key, hexadecimal.
    Remove(String),
}

impl SlotChange {
    /// `slot` for key `key` of its record. Whoever makes this has seen that it unwraps to that data key.
    pub fn add(key: usize, slot: &KeySlot) -> Self {
        SlotChange { key, what: What::Add(slot.into()) }
    }

    /// Key `key` of its record without `slot`. Whoever makes this has seen that the data key can be unwrapped
    /// without it.
    pub fn remove(key: usize, slot: &KeySlot) -> Self {
        SlotChange { key, what: What::Remove(digest(&slot.wrapped.blob)) }
    }

    /// Changes the slots of a record's keys; `show` is the command that shows them.
    fn apply_to(&self, keys: &mut [KeyRecord], show: &str) -> Result<()> {
        let n = self.key;
        let key = keys.get_mut(n).ok_or_else(|| no_key(n))?;
        match &self.what {
            What::Add(_) if key.slots.len() >= MAX_SLOTS => {
                let message =
                    format!("data key {n} is wrapped by {MAX_SLOTS} KMS keys, the most that there can be");
                Err(Error::new(Kind::Usage, message))
            }
            What::Add(slot) => {
                let usage = |problem| Error::new(Kind::Usage, problem);
                key.slots.push(KeySlot::try_from(slot.clone()).map_err(usage)?);
                check_slots(&key.slots).map_err(|problem| usage(format!("data key {n}: {problem}")))
            }
            What::Remove(wrapped) => {
                let found = key.slots.iter().position(|slot| digest(&slot.wrapped.blob) == *wrapped);
                let slot = found.ok_or_else(|| changed_meanwhile(n, show))?;
                if key.slots.len() == 1 {
                    let message = format!("it is the only KMS key that wraps data key {n}");
                    return Err(Error::new(Kind::Usage, message));
                }
                key.slots.remove(slot);
                Ok(())
            }
        }
    }
}

impl fmt::Display for SlotChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Add(_) => write!(f, "data key {} has another wrapped copy", self.key),
            What::Remove(_) => write!(f, "data key {} has a wrapped copy less", self.key),
        }
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

impl Metadata {
    /// Takes note of a slot that came, or went. It counts once it is stored.
    ///
    /// # Errors
    /// `Busy` if the slot is not there any more; `Usage` for what could not stand in `volume.json`, and for
    /// the last slot of a data key.
    pub fn change_slot(&mut self, change: &SlotChange) -> Result<()> {
        let mut changed = self.clone();
        change.apply_to(&mut changed.layout.keys, &format!("volume show {}", self.id))?;
        *self = readable(Metadata::from_json(&changed.to_json()))?;
        Ok(())
    }
}

impl Snapshot {
    /// Takes note of a slot that came, or went. What proves the snapshot's layers does not depend on it.
    ///
    /// # Errors
    /// As for [`Metadata::change_slot`].
    pub fn change_slot(&mut self, change: &SlotChange) -> Result<()> {
        let mut changed = self.clone();
        change.apply_to(&mut changed.layout.keys, &format!("snapshot show {}", self.id))?;
        *self = readable(Snapshot::from_json(&changed.to_json()))?;
        Ok(())
    }

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
        let key = keys.get_mut(self.key).ok_or_else(|| no_key(self.key))?;
        let slot = key.slots.iter_mut().find(|slot| digest(&slot.wrapped.blob) == self.replaces);
        let slot = slot.ok_or_else(|| changed_meanwhile(self.key, show))?;
        let blob = BASE64.decode(&self.wrapped).map_err(|e| Error::of(Kind::Usage, e).context("wrapped"))?;
        *slot = KeySlot::new(&*self.provider, WrappedKey { key_id: self.key_id.clone(), blob });
        Ok(())
    }
}

fn no_key(n: usize) -> Error {
    Error::new(Kind::Usage, format!("it has no data key {n}"))
}

fn changed_meanwhile(n: usize, show: &str) -> Error {
    let message = format!(
        "how data key {n} is wrapped was changed by somebody else meanwhile; look at \"sealblk {show}\" and \
         try again"
    );
    Error::new(Kind::Busy, message)
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
        KeyRecord::new(slot("embedded", key_id, blob))
    }

    fn slot(provider: &str, key_id: &str, blob: &[u8]) -> KeySlot {
        KeySlot::new(provider, WrappedKey { key_id: key_id.into(), blob: blob.into() })
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
        let new = slot("aws", "arn:2", &[2; 200]);
        let rewrapped = Rewrapped::new(0, m.keys()[0].first(), &new);
        m.rewrap(&rewrapped).unwrap();
        assert_eq!(m.keys()[0].slots(), [new]);
        assert_eq!(m.verify(&[dek]).unwrap(), Seal::Sealed);
        // Once more, the change is of a key that is there no more.
        let e = m.rewrap(&rewrapped).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy);
    }

    #[test]
    fn what_cannot_stand_in_the_file_changes_nothing() {
        let (m, _) = sealed();
        let old = m.keys()[0].first();
        let with = |key, provider: &str, key_id: &str, len: usize| {
            Rewrapped::new(key, old, &slot(provider, key_id, &vec![3; len]))
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

    #[test]
    fn slots_come_and_go_one_at_a_time_and_the_seal_stays() {
        let (mut m, dek) = sealed();
        let (first, second) = (m.keys()[0].first().clone(), slot("aws", "arn:2", &[2; 200]));
        let whole = m.clone();
        m.change_slot(&SlotChange::add(0, &second)).unwrap();
        assert_eq!(m.keys()[0].slots(), [first.clone(), second.clone()]);
        assert_eq!(m.verify(&[dek]).unwrap(), Seal::Sealed);
        assert_eq!(Metadata::from_json(&m.to_json()).unwrap(), m);
        // The other slot is not touched by a rewrap of one.
        let third = slot("aws", "arn:3", &[3; 9]);
        m.rewrap(&Rewrapped::new(0, &second, &third)).unwrap();
        assert_eq!(m.keys()[0].slots(), [first.clone(), third.clone()]);
        let busy = m.change_slot(&SlotChange::remove(0, &second)).unwrap_err();
        assert_eq!(busy.kind(), Kind::Busy, "{busy}");
        m.change_slot(&SlotChange::remove(0, &third)).unwrap();
        assert_eq!(m, whole);
        let last = m.change_slot(&SlotChange::remove(0, &first)).unwrap_err();
        assert!(last.kind() == Kind::Usage && last.to_string().contains("the only KMS key"), "{last}");
        assert_eq!(m, whole);
    }

    #[test]
    fn a_slot_that_cannot_stand_in_the_file_is_not_added() {
        let (mut m, _) = sealed();
        let first = m.keys()[0].first().clone();
        for (change, words) in [
            (SlotChange::add(1, &slot("aws", "arn:2", &[2])), "no data key 1"),
            (SlotChange::add(0, &slot("a b", "arn:2", &[2])), "provider"),
            (SlotChange::add(0, &slot("aws", "", &[2])), "KMS key's id"),
            (SlotChange::add(0, &slot("aws", "arn:2", &[])), "0 bytes"),
            (SlotChange::add(0, &slot("embedded", "arn:1", &[2])), "wraps it twice"),
            (SlotChange::remove(1, &first), "no data key 1"),
        ] {
            let before = m.clone();
            let e = m.change_slot(&change).unwrap_err();
            assert!(e.kind() == Kind::Usage && e.to_string().contains(words), "{change:?}: {e}");
            assert_eq!(m, before);
        }
        for n in 2..=MAX_SLOTS {
            m.change_slot(&SlotChange::add(0, &slot("aws", &format!("arn:{n}"), &[2]))).unwrap();
        }
        let e = m.change_slot(&SlotChange::add(0, &slot("aws", "arn:17", &[2]))).unwrap_err();
        assert!(e.to_string().contains("the most"), "{e}");
    }
}
