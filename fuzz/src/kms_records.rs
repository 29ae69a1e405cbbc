//! The bodies of the KMS log's records.

use sealblk::kms::KmsError;
use sealblk::kms::embedded::records::{Change, Transaction};

/// Any body.
pub fn run(data: &[u8]) {
    match Transaction::decode(1, data) {
        Ok(transaction) => {
            let empty = |c: &Change| {
                matches!(c, Change::Key(key)
                    if key.versions.is_empty() && key.external.is_none() && key.key_store.is_none())
            };
            assert!(!transaction.changes.iter().any(empty));
            let bytes = transaction.encode().expect("what was read can be written");
            assert_eq!(Transaction::decode(1, &bytes), Ok(transaction));
        }
        Err(e) => assert!(matches!(e, KmsError::Corrupt(_))),
    }
}
