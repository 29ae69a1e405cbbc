//! A provider whose uses go into the store's audit log: the life of data keys, as sealblk
//! sees it, whoever the KMS is.
//!
//! A record is durable before what it tells of is answered. The embedded KMS's own records stand beside
//! these: they tell of its keys, these of the data keys.

use crate::audit::{AuditKey, AuditLog, Entry, Step};
use crate::base::root::Root;
use crate::kms::{
    Capabilities, EncryptionContext, Grant, GrantRequest, KeyDescription, KeyProvider, KmsError, ListedGrant,
    WrappedKey,
};
use zeroize::Zeroizing;

/// A provider and the log.
pub(super) struct Recorded {
    inner: Box<dyn KeyProvider>,
    log: AuditLog,
}

impl Recorded {
    /// `inner`, recorded in the log of the store at `root`.
    pub(super) fn new(root: &Root, inner: Box<dyn KeyProvider>) -> Result<Self, KmsError> {
        let log = AuditLog::new(root).map_err(|e| KmsError::Internal(e.to_string()))?;
        Ok(Recorded { inner, log })
    }

    /// Records a step that was answered so, with the key of this id; returns it, unless it has
    /// succeeded and cannot be recorded.
    fn record<T>(
        &self,
        (step, key): (Step, &str),
        context: &EncryptionContext,
        result: Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        let entry = Entry::dek(step, context.pairs(), self.inner.name(), key);
        let entry = entry.in_region(self.inner.region(key));
        let entry = match &result {
            Ok(_) => entry,
            Err(e) => entry.failed(e.type_name(), &e.to_string()),
        };
        // A KMS that cannot tell its key has refused for the same reason.
        let audit_key = self.inner.audit_key().unwrap_or_default();
        match (result, self.log.append(&entry, audit_key.as_ref())) {
            (Ok(_), Err(e)) => Err(KmsError::Internal(format!(
                "the data key was not released, since that could not be recorded: {e}"
            ))),
            (result, recorded) => {
                if let Err(e) = recorded {
                    log::error!("an audit record was lost: {e}");
                }
                result
            }
        }
    }
}

impl KeyProvider for Recorded {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn region(&self, key: &str) -> Option<String> {
        self.inner.region(key)
    }

    fn describe(&self, key: &str) -> Result<KeyDescription, KmsError> {
        self.inner.describe(key)
    }

    fn generate_wrapped(
        &self,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        let made = self.inner.generate_wrapped(key, len, context);
        let id = made.as_ref().map_or(key.to_owned(), |made| made.key_id.clone());
        self.record((Step::Generate, &id), context, made)
    }

    fn decrypt(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let opened = self.inner.decrypt(wrapped, context);
        self.record((Step::Unwrap, &wrapped.key_id), context, opened)
    }

    fn rewrap(
        &self,
        wrapped: &WrappedKey,
        from: &EncryptionContext,
        key: &str,
        to: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        let made = self.inner.rewrap(wrapped, from, key, to);
        let id = made.as_ref().map_or(key.to_owned(), |made| made.key_id.clone());
        self.record((Step::Rewrap, &id), to, made)
    }

    fn wrap(&self, key: &str, data_key: &[u8], context: &EncryptionContext) -> Result<WrappedKey, KmsError> {
        let made = self.inner.wrap(key, data_key, context);
        let id = made.as_ref().map_or(key.to_owned(), |made| made.key_id.clone());
        self.record((Step::Rewrap, &id), context, made)
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn decrypt_granted(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
        token: &str,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let opened = self.inner.decrypt_granted(wrapped, context, token);
        self.record((Step::Unwrap, &wrapped.key_id), context, opened)
    }

    fn create_grant(&self, request: &GrantRequest<'_>) -> Result<Grant, KmsError> {
        self.inner.create_grant(request)
    }

    fn retire_grant(&self, grant: &Grant) -> Result<(), KmsError> {
        self.inner.retire_grant(grant)
    }

    fn grants_for(&self, key: &str, grantee: &str) -> Result<Vec<ListedGrant>, KmsError> {
        self.inner.grants_for(key, grantee)
    }

    fn audit_key(&self) -> Result<Option<AuditKey>, KmsError> {
        self.inner.audit_key()
    }
}
