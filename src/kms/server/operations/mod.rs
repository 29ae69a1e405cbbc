//! The operations of the wire: the fields of a request to calls of the embedded KMS, and its answers to JSON.
//!
//! Who asks is known by then. What that caller may do is decided here: administrators everything, others what
//! grants let them do.

mod data;
mod form;
mod grants;
mod import;
mod key_stores;
mod keys;
mod notes;
mod regions;
mod trail;

use crate::crypt::secret_mem::on_scrubbed_stack;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::grant_records::GrantOperation;
use crate::kms::embedded::page::{Page, Piece};
use crate::kms::embedded::principals::Caller;
use crate::kms::server::refusals::Refusals;
use crate::kms::server::wire::{Fields, WireError};
use crate::kms::{EncryptionContext, KmsError};
use serde_json::{Value, json};
use std::cell::Cell;

/// A request whose sender is known.
pub(super) struct Request<'a> {
    /// The KMS.
    pub kms: &'a Embedded,
    /// Who asks.
    pub caller: &'a Caller,
    /// The id of the access key that has signed it.
    pub access_key: &'a str,
    /// What is asked.
    pub fields: Fields,
    refusals: &'a Refusals,
    /// Bytes of its body.
    bytes: usize,
    /// Whether the caller was found to have a right to what it asks for.
    has_right: Cell<bool>,
}

impl<'a> Request<'a> {
    /// A request of `caller`, signed by this access key, whose body of so many bytes has these fields.
    pub(super) fn new(
        kms: &'a Embedded,
        refusals: &'a Refusals,
        caller: &'a Caller,
        access_key: &'a str,
        fields: Fields,
        bytes: usize,
    ) -> Self {
        Request { kms, caller, access_key, fields, refusals, bytes, has_right: Cell::new(caller.admin) }
    }
}

/// By these one KMS asks another, which believes signed answers alone.
pub(super) const BETWEEN_REGIONS: [&str; 2] = [regions::PARAMETERS, regions::SYNCHRONIZE];

/// After these, what other regions have of a multi-Region key may be out of date.
pub(super) const CHANGE_WHAT_REGIONS_SHARE: [&str; 8] = [
    "DisableKeyRotation",
    "EnableKeyRotation",
    "ImportKeyMaterial",
    "ReplicateKey",
    "RotateKeyOnDemand",
    "ScheduleKeyDeletion",
    "UpdatePrimaryRegion",
    regions::SYNCHRONIZE,
];

/// What is answered; null is an empty body.
pub(super) type Answer = Result<Value, WireError>;

/// Answers a request for the operation of this name, once it is recorded in the audit log.
pub(super) fn answer(request: &Request<'_>, operation: &str) -> Answer {
    // What is on the stack of a plaintext would outlive the record: that takes other
    // frames than an answer does.
    match on_scrubbed_stack(|| perform(request, operation)) {
        Err(WireError { kind: "UnknownOperationException", message }) => {
            Err(WireError { kind: "UnknownOperationException", message })
        }
        answer => trail::record(request, operation, answer),
    }
}

fn perform(request: &Request<'_>, operation: &str) -> Answer {
    form::check_lengths(&request.fields)?;
    form::check_no_alias(operation, &request.fields)?;
    match operation {
        "CreateKey" => keys::create(request),
        "DescribeKey" => keys::describe(request),
        "ListKeys" => keys::list(request),
        "EnableKey" => keys::enable(request),
        "DisableKey" => keys::disable(request),
        "ScheduleKeyDeletion" => keys::schedule_deletion(request),
        "CancelKeyDeletion" => keys::cancel_deletion(request),
        "UpdateKeyDescription" => keys::update_description(request),
        "CreateCustomKeyStore" => key_stores::create(request),
        "DescribeCustomKeyStores" => key_stores::describe(request),
        "ConnectCustomKeyStore" => key_stores::connect(request),
        "DisconnectCustomKeyStore" => key_stores::disconnect(request),
        "UpdateCustomKeyStore" => key_stores::update(request),
        "DeleteCustomKeyStore" => key_stores::delete(request),
        "CreateAlias" => keys::create_alias(request),
        "UpdateAlias" => keys::update_alias(request),
        "DeleteAlias" => keys::delete_alias(request),
        "ListAliases" => keys::list_aliases(request),
        "Encrypt" => data::encrypt(request),
        "Decrypt" => data::decrypt(request),
        "ReEncrypt" => data::re_encrypt(request),
        "GenerateDataKey" => data::generate_data_key(request, true),
        "GenerateDataKeyWithoutPlaintext" => data::generate_data_key(request, false),
        "GenerateRandom" => data::generate_random(request),
        "CreateGrant" => grants::create(request),
        "ListGrants" => grants::list(request),
        "ListRetirableGrants" => grants::list_retirable(request),
        "RetireGrant" => grants::retire(request),
        "RevokeGrant" => grants::revoke(request),
        "EnableKeyRotation" => notes::enable_rotation(request),
        "DisableKeyRotation" => notes::disable_rotation(request),
        "GetKeyRotationStatus" => notes::rotation_status(request),
        "RotateKeyOnDemand" => notes::rotate_on_demand(request),
        "ListKeyRotations" => notes::list_rotations(request),
        "TagResource" => notes::tag(request),
        "UntagResource" => notes::untag(request),
        "ListResourceTags" => notes::list_tags(request),
        "GetKeyPolicy" => notes::policy(request),
        "PutKeyPolicy" => notes::put_policy(request),
        "ListKeyPolicies" => notes::list_policies(request),
        "GetParametersForImport" => import::parameters(request),
        "ImportKeyMaterial" => import::import(request),
        "DeleteImportedKeyMaterial" => import::delete(request),
        "ReplicateKey" => regions::replicate(request),
        "UpdatePrimaryRegion" => regions::update_primary(request),
        regions::PARAMETERS => regions::parameters(request),
        regions::SYNCHRONIZE => regions::synchronize(request),
        _ => Err(WireError { kind: "UnknownOperationException", message: None }),
    }
}

impl Request<'_> {
    /// Fails unless the caller may do everything.
    fn admin(&self, action: &str) -> Result<(), WireError> {
        let key = self.fields.maybe_text("KeyId").unwrap_or_default();
        Ok(self.kms.check_admin(self.caller, action, key.unwrap_or("*"))?)
    }

    /// The key of a request that only administrators may make.
    fn admins_key(&self, action: &str) -> Result<&str, WireError> {
        self.admin(action)?;
        self.fields.text("KeyId")
    }

    /// The key argument, checked to be one that the caller may do `operation` with.
    fn allowed(
        &self,
        operation: GrantOperation,
        key: &str,
        context: &EncryptionContext,
    ) -> Result<String, WireError> {
        let allowed = self.kms.check_allowed(self.caller, operation, key, context)?;
        self.has_right.set(true);
        Ok(allowed)
    }

    fn check_tokens(&self) -> Result<(), WireError> {
        Ok(self.kms.check_tokens(&self.fields.texts("GrantTokens")?)?)
    }

    /// Fails, at the end of what would have succeeded, if only that was asked.
    fn dry_run(&self) -> Result<(), WireError> {
        if self.fields.flag("DryRun")? { Err(KmsError::dry_run().into()) } else { Ok(()) }
    }

    fn piece(&self) -> Result<Piece, WireError> {
        let limit = self.fields.maybe_number("Limit")?;
        // What does not fit is as wrong as zero is; the list says so in its own words.
        let limit = limit.map(|limit| u32::try_from(limit).unwrap_or(0));
        Ok(Piece { limit, marker: self.fields.maybe_text("Marker")?.map(str::to_owned) })
    }
}

/// A page as the answer has it: the items under `name`.
fn paged<T>(name: &str, page: Page<T>, item: impl Fn(T) -> Value) -> Value {
    let items: Vec<Value> = page.items.into_iter().map(item).collect();
    let mut answer = json!({ "Truncated": page.next.is_some() });
    answer[name] = items.into();
    if let Some(next) = page.next {
        answer["NextMarker"] = next.into();
    }
    answer
}

/// Milliseconds since 1970 as the wire has it: seconds.
fn seconds(ms: i64) -> Value {
    (ms as f64 / 1000.0).into()
}
