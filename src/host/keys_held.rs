//! The host process's records in the audit log: since when it has a volume's data keys, and until when.
//!
//! The log's files are opened with the first record, before the process is confined. It has no audit key: its
//! records have no MAC, and are held by the chain and by the log's mark (docs/audit.md).

use crate::audit::{AuditLog, Entry, Step};
use crate::base::root::Root;
use crate::base::{Error, Result};
use crate::catalog::Metadata;
use crate::catalog::metadata::KeyRecord;
use crate::kms::KmsKey;

/// Stands for the data keys of a volume that this process has. Drop it when the keys are
/// wiped: dropping records that.
pub(crate) struct KeysHeld {
    log: AuditLog,
    volume: Metadata,
    /// Of the data keys that this process has: the KMS key that has given each.
    used: Vec<(KeyRecord, KmsKey)>,
    failure: Option<(&'static str, String)>,
}

impl KeysHeld {
    /// Records that this process has the data keys of `volume`, which these KMS keys have given, in the order
    /// of its keys; `None` if it has none.
    pub(crate) fn begin(root: &Root, volume: &Metadata, used: Vec<KmsKey>) -> Result<Option<Self>> {
        if volume.keys().is_empty() {
            return Ok(None);
        }
        let used = volume.keys().iter().cloned().zip(used).collect();
        let held = KeysHeld { log: AuditLog::new(root)?, volume: volume.clone(), used, failure: None };
        for entry in held.entries(Step::Attach) {
            held.log.append(&entry, None)?;
        }
        Ok(Some(held))
    }

    /// Records that the volume has other data keys now: that this process has those that are new, or, of
    /// those that are gone, that it has wiped them.
    ///
    /// # Errors
    /// Those of the log; none of the new ones may be used then.
    pub(crate) fn follow(&mut self, volume: &Metadata) -> Result<()> {
        let mine = |key: &KeyRecord, others: &Metadata| !others.keys().iter().any(|k| is_same(k, key));
        let gone: Vec<Entry> = self.some_entries(Step::Detach, |key| mine(key, volume)).collect();
        let before = std::mem::replace(&mut self.volume, volume.clone());
        let new: Vec<Entry> = self.some_entries(Step::Attach, |key| mine(key, &before)).collect();
        let noted = gone.iter().chain(&new).try_for_each(|entry| self.log.append(entry, None));
        noted.inspect_err(|_| self.volume = before)
    }

    /// Says with what the attachment ended, if it did not end as it should.
    pub(crate) fn ended(&mut self, result: &Result<()>) {
        self.failure = result.as_ref().err().map(|e: &Error| (e.kind().name(), e.to_string()));
    }

    fn entries(&self, step: Step) -> impl Iterator<Item = Entry> {
        self.some_entries(step, |_| true)
    }

    fn some_entries(&self, step: Step, which: impl Fn(&KeyRecord) -> bool) -> impl Iterator<Item = Entry> {
        let context = self.volume.encryption_context();
        let entry = move |key: &KeyRecord| {
            // One that came later was given by the KMS key that has made it.
            let used = self.used.iter().find(|(known, _)| is_same(known, key)).map(|(_, used)| used.clone());
            let KmsKey { provider, key_id } = used.unwrap_or_else(|| key.first().kms_key());
            Entry::dek(step, context.pairs(), &provider, &key_id)
        };
        self.volume.keys().iter().filter(move |key| which(key)).map(entry)
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

/// Whether it is the same data key, however it is wrapped.
fn is_same(a: &KeyRecord, b: &KeyRecord) -> bool {
    match (a.check(), b.check()) {
        (Some(a), Some(b)) => a == b,
        _ => a.slots().iter().any(|slot| b.slots().contains(slot)),
    }
}
