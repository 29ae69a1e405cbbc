//! One KMS key, as records name it.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A KMS key: its KMS, and its canonical id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KmsKey {
    /// The name of its KMS's provider: `embedded`, …
    pub provider: String,
    /// Its canonical id, an ARN.
    pub key_id: String,
}

impl fmt::Display for KmsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.provider, self.key_id)
    }
}
