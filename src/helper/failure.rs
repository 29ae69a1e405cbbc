//! A failure as a helper process tells it to the process that started it.

use crate::base::{Error, Kind};
use crate::kms::Failure;
use serde::{Deserialize, Serialize};

/// A [`Failure`] on its way from one process to another. Of the error, the kind and the words go.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenFailure {
    cause: String,
    message: String,
    key_id: Option<String>,
    /// The name of the error's kind.
    kind: String,
}

impl From<Failure> for WrittenFailure {
    fn from(Failure { cause, error, key_id }: Failure) -> Self {
        WrittenFailure { cause, message: error.to_string(), key_id, kind: error.kind().name().into() }
    }
}

impl From<WrittenFailure> for Failure {
    fn from(written: WrittenFailure) -> Self {
        let error = Error::new(Kind::from_name(&written.kind), written.message);
        Failure { cause: written.cause, error, key_id: written.key_id }
    }
}
