//! The encryption context: pairs that must be presented again, exactly, to unwrap a key.

use std::collections::BTreeMap;

/// Case-sensitive, order-free pairs, at most 8 in a grant's constraint, bound into every wrapped key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncryptionContext(BTreeMap<String, String>);

impl EncryptionContext {
    /// A context with one pair.
    pub fn pair(key: impl Into<String>, value: impl Into<String>) -> Self {
        EncryptionContext(BTreeMap::from([(key.into(), value.into())]))
    }

    /// The pairs, sorted by key.
    pub fn pairs(&self) -> &BTreeMap<String, String> {
        &self.0
    }
}

impl From<BTreeMap<String, String>> for EncryptionContext {
    fn from(pairs: BTreeMap<String, String>) -> Self {
        EncryptionContext(pairs)
    }
}
