//! A data key as a record has it: wrapped by one KMS key or by several, any of which gives it back.
//!
//! Each wrapped copy is a **slot**. All slots of a data key are bound to the same encryption context, and
//! unwrap to the same data key: whoever added one has proved that. None of them is better than another; in
//! which order they are asked, the settings say ([`crate::kms::order`]).

use crate::crypt::Dek;
use crate::kms::key_ref::is_same_key;
use crate::kms::{KmsKey, WrappedKey};
use std::borrow::Borrow;
use std::sync::Arc;

/// The most slots that a data key may have. An attach may have to ask for every one of them.
pub const MAX_SLOTS: usize = 16;

/// One wrapped copy of a data key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// The provider that wrapped it: `embedded`, …
    pub provider: String,
    /// The KMS key's canonical id and the wrapped data key.
    pub wrapped: WrappedKey,
}

impl KeySlot {
    /// What `provider` has wrapped.
    pub fn new(provider: impl Into<String>, wrapped: WrappedKey) -> Self {
        KeySlot { provider: provider.into(), wrapped }
    }

    /// The KMS key that wraps it.
    pub fn kms_key(&self) -> KmsKey {
        KmsKey { provider: self.provider.clone(), key_id: self.wrapped.key_id.clone() }
    }

    /// Whether it is this KMS key that wraps it.
    pub fn is_by(&self, key: &KmsKey) -> bool {
        self.provider == key.provider && is_same_key(&self.provider, &self.wrapped.key_id, &key.key_id)
    }
}

/// A data key as a volume has it: its slots, and what tells whether an unwrapped one is the right one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    /// There is one at least.
    pub(in crate::catalog) slots: Vec<KeySlot>,
    /// [`Dek::check_value`] of the data key; none until the first attach.
    pub(crate) check: Option<[u8; 16]>,
}

impl KeyRecord {
    /// A data key that nobody has had yet, in its first slot.
    pub fn new(slot: KeySlot) -> Self {
        KeyRecord { slots: vec![slot], check: None }
    }

    /// Notes what tells the data key from others.
    pub(crate) fn checked(self, dek: &Dek) -> Self {
        KeyRecord { check: Some(dek.check_value()), ..self }
    }

    /// This data key with another slot besides.
    ///
    /// The caller has seen that both unwrap to the same data key.
    pub(crate) fn and(mut self, slot: KeySlot) -> Self {
        self.slots.push(slot);
        self
    }

    /// This data key, and that slot is this one.
    pub(crate) fn with_slot(mut self, number: usize, slot: KeySlot) -> Self {
        self.slots[number] = slot;
        self
    }

    /// This data key without the slots that this KMS key wraps; `None` if no other is left.
    pub(crate) fn without(&self, key: &KmsKey) -> Option<Self> {
        let slots: Vec<KeySlot> = self.slots.iter().filter(|slot| !slot.is_by(key)).cloned().collect();
        (!slots.is_empty()).then_some(KeyRecord { slots, check: self.check })
    }

    /// A data key that is in these slots, which are of one; `None` for no slot.
    pub(crate) fn of_slots(slots: Vec<KeySlot>) -> Option<Self> {
        (!slots.is_empty()).then_some(KeyRecord { slots, check: None })
    }

    /// Its slots, in the order in which they were added.
    pub fn slots(&self) -> &[KeySlot] {
        &self.slots
    }

    /// The KMS keys that wrap it, in the order of its slots.
    pub fn kms_keys(&self) -> Vec<KmsKey> {
        self.slots.iter().map(KeySlot::kms_key).collect()
    }

    /// The slot that it had first of those that it has.
    pub fn first(&self) -> &KeySlot {
        self.slots.first().expect("there is one: new() makes one, and nobody removes the last one")
    }

    /// The slot that this KMS key wraps, if one does.
    pub fn slot_by(&self, key: &KmsKey) -> Option<&KeySlot> {
        self.slots.iter().find(|slot| slot.is_by(key))
    }

    /// The data key's check value, once an attach has noted it.
    pub fn check(&self) -> Option<[u8; 16]> {
        self.check
    }
}

/// A data key in the clear, and the KMS key that gave it.
#[derive(Clone)]
pub struct Unwrapped {
    /// The data key.
    pub dek: Arc<Dek>,
    /// The KMS key that has unwrapped it.
    pub by: KmsKey,
}

impl Borrow<Dek> for Unwrapped {
    fn borrow(&self) -> &Dek {
        &self.dek
    }
}
