//! Why something that needs a key was not done.

use super::{KmsError, KmsKey};
use crate::base::{Error, Kind};

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

    /// That none of these KMS keys has given a data key: the answer of each. What a later try may put right
    /// decides the kind. Of one, it is that one's.
    pub(crate) fn of_all(mut refusals: Vec<(KmsKey, Failure)>) -> Self {
        if refusals.len() == 1 {
            return refusals.remove(0).1;
        }
        let is_later = |(_, e): &&(KmsKey, Failure)| e.error.kind() == Kind::KmsUnavailable;
        let kind =
            refusals.iter().find(is_later).or(refusals.first()).map_or(Kind::Other, |(_, e)| e.error.kind());
        let key_id = refusals.first().map(|(key, _)| key.key_id.clone());
        let all = |of: &dyn Fn(&Failure) -> String| {
            let said: Vec<String> = refusals.iter().map(|(key, e)| format!("{key}: {}", of(e))).collect();
            said.join("; ")
        };
        let answers = all(&|e| e.error.to_string());
        let message = format!("none of the {} KMS keys gives the data key: {answers}", refusals.len());
        Failure { cause: all(&|e| e.cause.clone()), error: Error::new(kind, message), key_id }
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
