//! The KMS's records in the audit log: every use of a key, and every change of keys and of
//! what is known of them.
//!
//! A record is durable before what was done is answered: no plaintext leaves the KMS that the log does not
//! know of. What only shows keys is recorded when it is asked over the wire; of the store's owner, who can
//! read the files as they lie, it is not.

use crate::audit::{AuditKey, Entry};
use crate::kms::embedded::Embedded;
use crate::kms::embedded::records::Change;
use crate::kms::embedded::state::State;
use crate::kms::{EncryptionContext, KmsError};
use serde_json::{Value, json};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use uuid::Uuid;

/// A call, as it is recorded.
pub struct Call<'a> {
    name: &'a str,
    keys: Vec<String>,
    parameters: Vec<(&'a str, Value)>,
    answer: Option<(&'a str, Value)>,
    by: Option<Value>,
}

impl<'a> Call<'a> {
    /// A call of the operation of this name.
    pub fn new(name: &'a str) -> Self {
        Call { name, keys: Vec::new(), parameters: Vec::new(), answer: None, by: None }
    }

    /// This call, on the key that this argument names.
    pub fn on(self, key: &str) -> Self {
        self.about(key).with("keyId", key)
    }

    /// This call, about the key that this argument names.
    pub fn about(mut self, key: &str) -> Self {
        self.keys.push(key.to_owned());
        self
    }

    /// This call with a parameter. Never a plaintext, a ciphertext or a token.
    pub fn with(mut self, name: &'a str, value: impl Into<Value>) -> Self {
        self.parameters.push((name, value.into()));
        self
    }

    /// This call, under this encryption context.
    pub fn under(self, name: &'a str, context: &EncryptionContext) -> Self {
        if context.pairs().is_empty() { self } else { self.with(name, json!(context.pairs())) }
    }

    /// This call with something that was answered.
    pub fn answering(self, name: &'a str, value: impl Into<Value>) -> Self {
        Call { answer: Some((name, value.into())), ..self }
    }

    /// This call, by somebody else than the user of this process.
    pub fn by(self, identity: Value) -> Self {
        Call { by: Some(identity), ..self }
    }
}

impl Embedded {
    /// This KMS, for a caller that records calls by itself ([`Embedded::record_call`]).
    pub fn recorded_by_caller(self) -> Self {
        Embedded { caller_records: true, waiting: self.waiting.once(), ..self }
    }

    /// The store's audit key; `None` if there is no store.
    pub fn audit_key(&self) -> Result<Option<AuditKey>, KmsError> {
        if !self.log.exists()? {
            return Ok(None);
        }
        self.log.read(|log| Ok(Some(log.keys().audit().clone())))
    }

    /// Records a call of the store's owner; returns `result`, unless it cannot be recorded.
    pub(in crate::kms) fn record<T>(
        &self,
        call: Call<'_>,
        result: Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        if self.caller_records {
            return result;
        }
        let failure = result.as_ref().err().map(|e| (e.type_name(), e.to_string()));
        self.record_call(&call, failure.as_ref().map(|(code, message)| (*code, &**message)))?;
        result
    }

    /// Records a call, and with what code and message it failed, if it did.
    ///
    /// # Errors
    /// Internal if a call that has succeeded could not be recorded, and must not be answered therefore.
    pub fn record_call(&self, call: &Call<'_>, failure: Option<(&str, &str)>) -> Result<(), KmsError> {
        let write = || -> Result<(), KmsError> {
            // Without a store there is no key that could have been used.
            let Some((key, arns)) = self.key_and_arns(call)? else { return Ok(()) };
            let entry = self.entry(call, &arns, failure);
            self.audit.append(&entry, Some(&key)).map_err(|e| KmsError::Internal(e.to_string()))
        };
        match (write(), failure) {
            (Err(e), None) => Err(not_recorded(call.name, &e)),
            (Err(e), Some((code, _))) => {
                log::error!("{} failed ({code}), and that could not be recorded: {e}", call.name);
                Ok(())
            }
            (Ok(()), _) => Ok(()),
        }
    }

    /// Records what the KMS has done by itself: what became due, or a key that was made for its first user.
    pub(super) fn record_due(&self, done: &[Due]) {
        for Due { name, key } in done {
            let entry = Entry::kms_service(name, &self.place).about_key(&self.place.key_arn(*key));
            let key = self.audit_key().ok().flatten();
            if let Err(e) = self.audit.append(&entry, key.as_ref()) {
                log::error!("{name} could not be recorded: {e}");
            }
        }
    }

    /// Records how often somebody was refused something, where each time has no record of its own.
    ///
    /// # Errors
    /// Internal if it could not be recorded.
    pub fn record_refusals(&self, refused: &Refused<'_>) -> Result<(), KmsError> {
        let times = refused.counted.iter();
        let times: Vec<Value> = times
            .map(|((operation, code), times)| {
                json!({ "eventName": operation, "errorCode": code, "times": times })
            })
            .collect();
        let entry = Entry::kms_service("RefusedCalls", &self.place)
            .with("principal", refused.principal)
            .with("withinSeconds", refused.seconds)
            .with("refused", times);
        let key = self.audit_key()?;
        self.audit.append(&entry, key.as_ref()).map_err(|e| KmsError::Internal(e.to_string()))
    }

    fn entry(&self, call: &Call<'_>, arns: &[String], failure: Option<(&str, &str)>) -> Entry {
        let mut entry = Entry::kms_call(call.name, &self.place);
        for arn in arns {
            entry = entry.about_key(arn);
        }
        for (name, value) in &call.parameters {
            entry = entry.with(name, value.clone());
        }
        if let Some((name, value)) = &call.answer {
            entry = entry.answering(name, value.clone());
        }
        if let Some(identity) = &call.by {
            entry = entry.by(identity.clone());
        }
        match failure {
            Some((code, message)) => entry.failed(code, message),
            None => entry,
        }
    }

    /// The audit key, and the ARNs of the keys that the call names, as far as they are there.
    fn key_and_arns(&self, call: &Call<'_>) -> Result<Option<(AuditKey, Vec<String>)>, KmsError> {
        if !self.log.exists()? {
            return Ok(None);
        }
        let arn =
            |state: &State, key: &String| Some(self.place.key_arn(state.key(key, &self.place).ok()?.id));
        self.log.read(|log| {
            let arns = call.keys.iter().filter_map(|key| arn(log.state(), key)).collect();
            Ok(Some((log.keys().audit().clone(), arns)))
        })
    }
}

/// What somebody was refused.
pub struct Refused<'a> {
    /// His ARN.
    pub principal: &'a str,
    /// In how many seconds, the last of them now.
    pub seconds: u64,
    /// How often, by operation and code.
    pub counted: &'a BTreeMap<(String, &'static str), u64>,
}

/// Something that the KMS did by itself, as AWS names it, and to which key.
#[derive(Debug, PartialEq, Eq)]
pub struct Due {
    name: &'static str,
    key: Uuid,
}

impl Due {
    /// The default key was made, for its first user.
    pub fn default_key(key: Uuid) -> Self {
        Due { name: "CreateKey", key }
    }

    /// A replica was brought up to date.
    pub(super) fn synchronized(key: Uuid) -> Self {
        Due { name: "SynchronizeMultiRegionKey", key }
    }

    /// What a change that time asked for is; `None` for a mere note.
    pub fn of(change: &Change, before: &State) -> Option<Self> {
        match change {
            Change::KeyDeleted(key) => Some(Due { name: "DeleteKey", key: key.id }),
            Change::Key(after) => {
                let versions = before.key_by_id(after.id).map_or(0, |key| key.versions.len());
                let name = match after.versions.len().cmp(&versions) {
                    Ordering::Less => "DeleteExpiredKeyMaterial",
                    Ordering::Greater => "RotateKey",
                    Ordering::Equal => return None,
                };
                Some(Due { name, key: after.id })
            }
            _ => None,
        }
    }
}

fn not_recorded(operation: &str, e: &KmsError) -> KmsError {
    KmsError::Internal(format!(
        "{operation} is not answered, since it could not be recorded in the audit log: {e}. A change that \
         was asked for may have been made: look at the key before you try again"
    ))
}
