//! Keys and aliases.

use crate::kms::EncryptionContext;
use crate::kms::embedded::admin::{AliasMetadata, DELETION_DAYS, KeyMetadata, NewKey};
use crate::kms::embedded::grant_records::GrantOperation;
use crate::kms::embedded::multi_region::{Related, Relatives};
use crate::kms::errors::out_of_range;
use crate::kms::key_ref::id_text;
use crate::kms::server::operations::{Answer, Request, paged, seconds};
use crate::kms::server::wire::{Fields, WireError, missing};
use serde_json::{Value, json};

const DEFAULT_DELETION_DAYS: i64 = 30;

pub(super) fn create(request: &Request<'_>) -> Answer {
    request.admin("CreateKey")?;
    let fields = &request.fields;
    fields.one_of("KeyUsage", &["ENCRYPT_DECRYPT"], "ENCRYPT_DECRYPT")?;
    fields.one_of("KeySpec", &["SYMMETRIC_DEFAULT"], "SYMMETRIC_DEFAULT")?;
    fields.one_of("CustomerMasterKeySpec", &["SYMMETRIC_DEFAULT"], "SYMMETRIC_DEFAULT")?;
    let origin = fields.one_of("Origin", &["AWS_KMS", "EXTERNAL", "AWS_CLOUDHSM"], "AWS_KMS")?;
    let key_store = fields.maybe_text("CustomKeyStoreId")?;
    if fields.maybe_text("XksKeyId")?.is_some() {
        return Err(WireError::unsupported("External keys are not supported."));
    }
    if (origin == "AWS_CLOUDHSM") != key_store.is_some() {
        return Err(WireError::validation(
            "A key in a custom key store has the origin AWS_CLOUDHSM, and needs the CustomKeyStoreId.",
        ));
    }
    let tags = tags(fields)?;
    let new = NewKey {
        description: fields.maybe_text("Description")?.unwrap_or(""),
        alias: None,
        external: origin == "EXTERNAL",
        key_store,
        multi_region: fields.flag("MultiRegion")?,
        tags: &tags,
        policy: fields.maybe_text("Policy")?,
    };
    Ok(json!({ "KeyMetadata": metadata(request, &request.kms.create(&new)?) }))
}

pub(super) fn describe(request: &Request<'_>) -> Answer {
    request.check_tokens()?;
    let key = request.fields.text("KeyId")?;
    let key = request.allowed(GrantOperation::DescribeKey, key, &EncryptionContext::default())?;
    Ok(json!({ "KeyMetadata": metadata(request, &request.kms.key(&key)?) }))
}

pub(super) fn list(request: &Request<'_>) -> Answer {
    request.admin("ListKeys")?;
    let page = request.piece()?.of(request.kms.keys()?, |key| key.id.to_string(), 100)?;
    Ok(paged("Keys", page, |key| json!({ "KeyId": id_text(key.id), "KeyArn": key.arn })))
}

pub(super) fn enable(request: &Request<'_>) -> Answer {
    request.kms.enable(request.admins_key("EnableKey")?)?;
    Ok(Value::Null)
}

pub(super) fn disable(request: &Request<'_>) -> Answer {
    request.kms.disable(request.admins_key("DisableKey")?)?;
    Ok(Value::Null)
}

pub(super) fn schedule_deletion(request: &Request<'_>) -> Answer {
    let key = request.admins_key("ScheduleKeyDeletion")?;
    let days = request.fields.maybe_number("PendingWindowInDays")?.unwrap_or(DEFAULT_DELETION_DAYS);
    let range = i64::from(*DELETION_DAYS.start())..=i64::from(*DELETION_DAYS.end());
    let days = u32::try_from(days).map_err(|_| out_of_range(days, "pendingWindowInDays", &range))?;
    let dying = request.kms.schedule_deletion(key, days)?;
    let mut answer = json!({
        "KeyId": dying.arn,
        "KeyState": dying.state.name(),
        "PendingWindowInDays": days,
    });
    // A primary key waits for the end of its replicas, and nobody knows when that is.
    if let Some(at) = dying.deletion {
        answer["DeletionDate"] = seconds(at);
    }
    Ok(answer)
}

pub(super) fn cancel_deletion(request: &Request<'_>) -> Answer {
    let key = request.admins_key("CancelKeyDeletion")?;
    Ok(json!({ "KeyId": request.kms.cancel_deletion(key)?.arn }))
}

pub(super) fn update_description(request: &Request<'_>) -> Answer {
    let key = request.admins_key("UpdateKeyDescription")?;
    let description = request.fields.maybe_text("Description")?.ok_or_else(|| missing("Description"))?;
    request.kms.update_description(key, description)?;
    Ok(Value::Null)
}

pub(super) fn create_alias(request: &Request<'_>) -> Answer {
    request.admin("CreateAlias")?;
    let fields = &request.fields;
    request.kms.create_alias(fields.text("AliasName")?, target(fields)?)?;
    Ok(Value::Null)
}

pub(super) fn update_alias(request: &Request<'_>) -> Answer {
    request.admin("UpdateAlias")?;
    let fields = &request.fields;
    request.kms.update_alias(fields.text("AliasName")?, target(fields)?)?;
    Ok(Value::Null)
}

pub(super) fn delete_alias(request: &Request<'_>) -> Answer {
    request.admin("DeleteAlias")?;
    request.kms.delete_alias(request.fields.text("AliasName")?)?;
    Ok(Value::Null)
}

pub(super) fn list_aliases(request: &Request<'_>) -> Answer {
    request.admin("ListAliases")?;
    let key = request.fields.maybe_text("KeyId")?;
    let key = key.map(|key| request.kms.key(key)).transpose()?;
    let mut aliases = request.kms.aliases()?;
    aliases.retain(|alias| key.as_ref().is_none_or(|key| key.id == alias.key));
    let page = request.piece()?.of(aliases, |alias| alias.name.clone(), 50)?;
    let alias = |alias: AliasMetadata| {
        json!({
            "AliasName": alias.name,
            "AliasArn": alias.arn,
            "TargetKeyId": id_text(alias.key),
            "CreationDate": seconds(alias.created),
            "LastUpdatedDate": seconds(alias.updated),
        })
    };
    Ok(paged("Aliases", page, alias))
}

/// The tags of a request: pairs of TagKey and TagValue.
pub(super) fn tags(fields: &Fields) -> Result<Vec<(String, String)>, WireError> {
    let malformed = || WireError::serialization("Tags must be a list of TagKey and TagValue.");
    let tag = |value: &Value| {
        let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
        Ok((text("TagKey").ok_or_else(malformed)?, text("TagValue").ok_or_else(malformed)?))
    };
    fields.list("Tags")?.iter().map(tag).collect()
}

/// An alias cannot stand for another.
fn target(fields: &Fields) -> Result<&str, WireError> {
    let key = fields.text("TargetKeyId")?;
    if key.starts_with("alias/") || key.contains(":alias/") {
        return Err(WireError::validation("Aliases must refer to keys. Not aliases"));
    }
    Ok(key)
}

pub(super) fn metadata(request: &Request<'_>, key: &KeyMetadata) -> Value {
    let mut metadata = json!({
        "AWSAccountId": request.kms.locality().account,
        "KeyId": id_text(key.id),
        "Arn": key.arn,
        "CreationDate": seconds(key.created),
        "Enabled": key.state.is_usable(),
        "Description": key.description,
        "KeyUsage": "ENCRYPT_DECRYPT",
        "KeyState": key.state.name(),
        "Origin": key.origin,
        "KeyManager": "CUSTOMER",
        "CustomerMasterKeySpec": "SYMMETRIC_DEFAULT",
        "KeySpec": "SYMMETRIC_DEFAULT",
        "EncryptionAlgorithms": ["SYMMETRIC_DEFAULT"],
        "MultiRegion": key.multi_region.is_some(),
    });
    if let Some(relatives) = &key.multi_region {
        metadata["MultiRegionConfiguration"] = relatives_json(relatives);
    }
    if let Some((store, cluster)) = &key.key_store {
        metadata["CustomKeyStoreId"] = store.as_str().into();
        metadata["CloudHsmClusterId"] = cluster.as_str().into();
    }
    if let Some(at) = key.deletion {
        metadata["DeletionDate"] = seconds(at);
    } else if let Some(days) = key.deletion_days {
        metadata["PendingDeletionWindowInDays"] = days.into();
    }
    if let Some(material) = &key.material {
        metadata["CurrentKeyMaterialId"] = material.as_str().into();
        if key.origin == "EXTERNAL" {
            let expires =
                if key.expires.is_some() { "KEY_MATERIAL_EXPIRES" } else { "KEY_MATERIAL_DOES_NOT_EXPIRE" };
            metadata["ExpirationModel"] = expires.into();
        }
    }
    if let Some(at) = key.expires {
        metadata["ValidTo"] = seconds(at);
    }
    metadata
}

/// MultiRegionConfiguration.
fn relatives_json(relatives: &Relatives) -> Value {
    let related = |key: &Related| json!({ "Arn": key.arn, "Region": key.region });
    json!({
        "MultiRegionKeyType": if relatives.is_primary { "PRIMARY" } else { "REPLICA" },
        "PrimaryKey": related(&relatives.primary),
        "ReplicaKeys": relatives.replicas.iter().map(related).collect::<Vec<_>>(),
    })
}
