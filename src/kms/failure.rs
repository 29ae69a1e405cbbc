//! Why something that needs a key was not done.

use super::KmsError;
use crate::base::Error;

/// Why something was not made: what the event says and what the reader is told.
#[derive(Debug)]
pub struct Failure {
    /// Of a KMS, its message, word for word.
    pub cause: String,
    /// What was attempted, the cause, and what can be done.
    pub error: Error,
    /// The KMS key that it is about, if it is about one: as its KMS or the caller names it.
    pub key_id: Option<String>,
}

impl Failure {
    /// The refusal of the provider of this name: its own words, and what can be done about `key`.
    pub fn kms(e: KmsError, provider: &str, key: &str) -> Self {
        Failure { cause: e.to_string(), error: e.with_advice_of(provider, key), key_id: Some(key.into()) }
    }

    /// This failure with what was attempted put before the error's message; the cause stays as it is.
    pub fn context(self, attempt: impl std::fmt::Display) -> Self {
        Failure { error: self.error.context(attempt), ..self }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { cause: error.to_string(), error, key_id: None }
    }
}
