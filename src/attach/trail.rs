//! The host process's records in the audit log: since when it has a volume's data keys, and until when.
//!
//! The log's files are opened with the first record, before the process is confined. It has no audit key: its records
//! have no MAC, and are held by the chain and by the log's mark (docs/audit.md).

use crate::error::{Error, Result};
use crate::observe::audit::{AuditLog, Entry, Step};
use crate::root::Root;
use crate::volume::Metadata;

/// That this process has the data keys of a volume. Drop it when they are wiped: that is recorded then.
pub struct KeysHeld {
    log: AuditLog,
    volume: Metadata,
    failure: Option<(&'static str, String)>,
}

impl KeysHeld {
    /// Records that this process has the data keys of `volume`; `None` if it has none.
    pub fn begin(root: &Root, volume: &Metadata) -> Result<Option<Self>> {
        if volume.keys().is_empty() {
            return Ok(None);
        }
        let held = KeysHeld { log: AuditLog::new(root)?, volume: volume.clone(), failure: None };
        for entry in held.entries(Step::Attach) {
            held.log.append(&entry, None)?;
        }
        Ok(Some(held))
    }

    /// Says with what the attachment ended, if it did not end as it should.
    pub fn ended(&mut self, result: &Result<()>) {
        self.failure = result.as_ref().err().map(|e: &Error| (e.kind().name(), e.to_string()));
    }

    fn entries(&self, step: Step) -> impl Iterator<Item = Entry> {
        let context = self.volume.encryption_context();
        let entry = move |(provider, arn): (&str, &str)| Entry::dek(step, &context, provider, arn);
        self.volume.keys().iter().map(|key| (&*key.provider, &*key.wrapped.key_id)).map(entry)
    }
}

impl Drop for KeysHeld {
    fn drop(&mut self) {
        for entry in self.entries(Step::Detach) {
            let entry = match &self.failure {
                Some((code, message)) => entry.failed(code, message),
                None => entry,
            };
            self.log.record(&entry);
        }
    }
}
