//! AWS KMS, and whatever speaks its protocol, by the AWS SDK: for the command line and the helper processes,
//! never for a host process, which has no network.
//!
//! Credentials, profiles, instance and container roles, web identity, endpoints and FIPS are the SDK's
//! affair and work as everywhere (`AWS_PROFILE`, `AWS_ENDPOINT_URL_KMS`, `AWS_USE_FIPS_ENDPOINT`, …).
//! Retries are our own ([`Patience`]), so that whoever waits is told why. A key's ARN decides the region;
//! other names need the environment's.
//!
//! The SDK's `Blob` prints its bytes: none is ever formatted here, and a plaintext leaves its own at once.

mod client;
mod failure;
mod plain_http;

#[cfg(feature = "object-store")]
pub(crate) use client::{connector_for_ciphertext, environment};

use crate::base::Timestamp;
use crate::base::hardened::Hardened;
use crate::base::sync::Locked;
use crate::kms::grant::{Grant, GrantRequest, ListedGrant};
use crate::kms::key_ref::arn_region;
use crate::kms::patience::Patience;
use crate::kms::{
    Capabilities, EncryptionContext, KeyDescription, KeyProvider, KeyState, KmsError, WrappedKey,
};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{self, GrantConstraints, GrantOperation};
use client::Regional;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::runtime::Runtime;
use zeroize::Zeroizing;

/// How many grants are asked for at a time.
const GRANTS_PER_PAGE: i32 = 100;
/// The most pages that are asked for: as many as the most grants that one key can have take.
const GRANT_PAGES_MAX: usize = 50_000 / GRANTS_PER_PAGE as usize;

/// AWS KMS in whichever regions its keys lie.
pub struct Aws {
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
    patience: Patience,
    grantee: Option<String>,
    /// By the region that an ARN named; `None` is the environment's.
    clients: Mutex<HashMap<Option<String>, Arc<Regional>>>,
}

impl Aws {
    /// Asks nobody yet. `grantee` is the principal as which this host decrypts.
    ///
    /// # Errors
    /// Internal, where the system gives no event queue.
    pub fn open(patience: Patience, grantee: Option<String>, _: Hardened) -> Result<Self, KmsError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| KmsError::Internal(format!("start the AWS SDK: {e}")))?;
        Ok(Aws { runtime: Some(runtime), patience, grantee, clients: Mutex::default() })
    }

    /// Sends one request, made by `send` for each try, to the region of `key`.
    fn call<T, E, F>(&self, key: &str, send: impl Fn(aws_sdk_kms::Client) -> F) -> Result<T, KmsError>
    where
        F: Future<Output = Result<T, aws_sdk_kms::error::SdkError<E>>>,
        E: aws_sdk_kms::error::ProvideErrorMetadata + std::error::Error + 'static,
    {
        self.call_within(self.patience, key, send)
    }

    fn call_within<T, E, F>(
        &self,
        patience: Patience,
        key: &str,
        send: impl Fn(aws_sdk_kms::Client) -> F,
    ) -> Result<T, KmsError>
    where
        F: Future<Output = Result<T, aws_sdk_kms::error::SdkError<E>>>,
        E: aws_sdk_kms::error::ProvideErrorMetadata + std::error::Error + 'static,
    {
        let runtime = self.runtime.as_ref().expect("it is taken at drop alone");
        patience.call(|time| {
            runtime.block_on(async {
                let tried = async {
                    let regional = self.regional(arn_region(key)).await?;
                    let sent = send(regional.client.clone()).await;
                    sent.map_err(|e| failure::of(e, &regional.endpoint()))
                };
                match tokio::time::timeout(time, tried).await {
                    Ok(outcome) => outcome,
                    Err(_) => Err(self.too_late(arn_region(key), time)),
                }
            })
        })
    }

    /// An invalid state says of no key which one it is in: each of `keys` is asked, until one is in a state
    /// that explains it. Once, whatever the patience: this is for better advice.
    fn in_state_of(&self, keys: &[&str], mut e: KmsError) -> KmsError {
        for key in keys {
            if let KmsError::InvalidState(_) = e
                && let Ok(key) = self.describe_within(Patience(Duration::ZERO), key)
            {
                e = e.in_state(key.state);
            }
        }
        e
    }

    async fn regional(&self, region: Option<&str>) -> Result<Arc<Regional>, KmsError> {
        if let Some(known) = self.known(region) {
            return Ok(known);
        }
        let made = Arc::new(Regional::new(region).await?);
        let mut clients = self.clients.locked();
        Ok(clients.entry(region.map(str::to_owned)).or_insert(made).clone())
    }

    fn known(&self, region: Option<&str>) -> Option<Arc<Regional>> {
        let clients = self.clients.locked();
        clients.get(&region.map(str::to_owned)).cloned()
    }

    fn too_late(&self, region: Option<&str>, time: Duration) -> KmsError {
        let endpoint = self.known(region).map_or_else(|| "AWS KMS".to_owned(), |known| known.endpoint());
        failure::unreachable(&endpoint, &format!("no answer within {} s", time.as_secs()))
    }

    fn describe_within(&self, patience: Patience, key: &str) -> Result<KeyDescription, KmsError> {
        let answer = self.call_within(patience, key, |kms| kms.describe_key().key_id(key).send())?;
        let metadata = answer.key_metadata.ok_or_else(|| lacks("KeyMetadata"))?;
        let key_id = metadata.arn.ok_or_else(|| lacks("Arn"))?;
        let state = match metadata.key_state {
            // AWS documents that a key can be used while it is being updated.
            Some(types::KeyState::Enabled | types::KeyState::Updating) => KeyState::Enabled,
            Some(types::KeyState::Disabled) => KeyState::Disabled,
            Some(types::KeyState::PendingDeletion) => KeyState::PendingDeletion,
            Some(types::KeyState::PendingReplicaDeletion) => KeyState::PendingReplicaDeletion,
            Some(types::KeyState::PendingImport) => KeyState::PendingImport,
            Some(types::KeyState::Unavailable) => KeyState::Unavailable,
            other => {
                let state = other.map_or("unknown".to_owned(), |state| state.as_str().to_owned());
                return Err(KmsError::Unavailable(format!("{key_id} is in state {state}.")));
            }
        };
        let deletion = metadata.deletion_date.and_then(|at| Timestamp::of_unix(at.secs()));
        Ok(KeyDescription { key_id, state, description: metadata.description.unwrap_or_default(), deletion })
    }

    fn decrypt_with(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
        token: Option<&str>,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let answer = self.call(&wrapped.key_id, |kms| {
            kms.decrypt()
                .key_id(&wrapped.key_id)
                .ciphertext_blob(Blob::new(wrapped.blob.as_slice()))
                .set_encryption_context(pairs(context))
                .set_grant_tokens(token.map(|token| vec![token.to_owned()]))
                .send()
        });
        let answer = answer.map_err(|e| self.in_state_of(&[&wrapped.key_id], e))?;
        // Moved, not copied.
        let plaintext = answer.plaintext.map(|blob| Zeroizing::new(blob.into_inner()));
        plaintext.ok_or_else(|| lacks("Plaintext"))
    }
}

impl Drop for Aws {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A name that is still being resolved does not keep us waiting; all tasks and
            // connections end here.
            runtime.shutdown_background();
        }
    }
}

impl KeyProvider for Aws {
    fn name(&self) -> &'static str {
        "aws"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { grantee: self.grantee.clone() }
    }

    fn describe(&self, key: &str) -> Result<KeyDescription, KmsError> {
        self.describe_within(self.patience, key)
    }

    fn generate_wrapped(
        &self,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        // What does not fit is as wrong as too much is; the KMS says so in its own words.
        let len = i32::try_from(len).unwrap_or(i32::MAX);
        let answer = self.call(key, |kms| {
            kms.generate_data_key_without_plaintext()
                .key_id(key)
                .number_of_bytes(len)
                .set_encryption_context(pairs(context))
                .send()
        });
        let answer = answer.map_err(|e| self.in_state_of(&[key], e))?;
        wrapped(answer.key_id, answer.ciphertext_blob)
    }

    fn decrypt(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        self.decrypt_with(wrapped, context, None)
    }

    fn decrypt_granted(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
        token: &str,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        self.decrypt_with(wrapped, context, Some(token))
    }

    fn rewrap(
        &self,
        wrapped: &WrappedKey,
        from: &EncryptionContext,
        key: &str,
        to: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        let answer = self.call(key, |kms| {
            kms.re_encrypt()
                .ciphertext_blob(Blob::new(wrapped.blob.as_slice()))
                .source_key_id(&wrapped.key_id)
                .set_source_encryption_context(pairs(from))
                .destination_key_id(key)
                .set_destination_encryption_context(pairs(to))
                .send()
        });
        let answer = answer.map_err(|e| self.in_state_of(&[&wrapped.key_id, key], e))?;
        self::wrapped(answer.key_id, answer.ciphertext_blob)
    }

    /// Encrypt. The SDK keeps copies of the data key that nobody can wipe: only for processes
    /// that wipe what they free.
    fn wrap(&self, key: &str, data_key: &[u8], context: &EncryptionContext) -> Result<WrappedKey, KmsError> {
        let answer = self.call(key, |kms| {
            kms.encrypt()
                .key_id(key)
                .plaintext(Blob::new(data_key))
                .set_encryption_context(pairs(context))
                .send()
        });
        let answer = answer.map_err(|e| self.in_state_of(&[key], e))?;
        wrapped(answer.key_id, answer.ciphertext_blob)
    }

    fn create_grant(&self, request: &GrantRequest<'_>) -> Result<Grant, KmsError> {
        let constraints =
            GrantConstraints::builder().set_encryption_context_subset(pairs(request.context)).build();
        let answer = self.call(request.key, |kms| {
            kms.create_grant()
                .key_id(request.key)
                .grantee_principal(request.grantee)
                .retiring_principal(request.grantee)
                .operations(GrantOperation::Decrypt)
                .constraints(constraints.clone())
                .name(request.name)
                .send()
        });
        let answer = answer.map_err(|e| self.in_state_of(&[request.key], e))?;
        let id = answer.grant_id.ok_or_else(|| lacks("GrantId"))?;
        Ok(Grant { key_id: request.key.to_owned(), id, token: answer.grant_token })
    }

    fn retire_grant(&self, grant: &Grant) -> Result<(), KmsError> {
        let done = self.call(&grant.key_id, |kms| match &grant.token {
            // Good also before all of the KMS knows the grant.
            Some(token) => kms.retire_grant().grant_token(token).send(),
            None => kms.retire_grant().key_id(&grant.key_id).grant_id(&grant.id).send(),
        });
        done.map(drop)
    }

    /// Of all keys of the region, since this takes no right on the key; a page at a time.
    fn grants_for(&self, key: &str, grantee: &str) -> Result<Vec<ListedGrant>, KmsError> {
        let mut found = Vec::new();
        let mut marker: Option<String> = None;
        for _ in 0..GRANT_PAGES_MAX {
            let page = self.call(key, |kms| {
                kms.list_retirable_grants()
                    .retiring_principal(grantee)
                    .limit(GRANTS_PER_PAGE)
                    .set_marker(marker.clone())
                    .send()
            })?;
            let ours = page.grants.unwrap_or_default().into_iter().filter(|grant| {
                grant.key_id.as_deref() == Some(key) && grant.grantee_principal.as_deref() == Some(grantee)
            });
            found
                .extend(ours.filter_map(|grant| Some(ListedGrant { id: grant.grant_id?, name: grant.name })));
            marker = page.next_marker;
            if !page.truncated || marker.is_none() {
                return Ok(found);
            }
        }
        Err(KmsError::Internal(format!("the KMS's list of the grants of {grantee} has no end")))
    }
}

/// The context as the SDK takes it; none at all if it is empty, as the SDK's own users send it.
fn pairs(context: &EncryptionContext) -> Option<HashMap<String, String>> {
    let pairs: HashMap<String, String> = context.pairs().clone().into_iter().collect();
    (!pairs.is_empty()).then_some(pairs)
}

fn wrapped(key_id: Option<String>, blob: Option<Blob>) -> Result<WrappedKey, KmsError> {
    let key_id = key_id.ok_or_else(|| lacks("KeyId"))?;
    let blob = blob.ok_or_else(|| lacks("CiphertextBlob"))?.into_inner();
    Ok(WrappedKey { key_id, blob })
}

fn lacks(field: &str) -> KmsError {
    KmsError::Internal(format!("the KMS's answer has no {field}; is that AWS KMS?"))
}
