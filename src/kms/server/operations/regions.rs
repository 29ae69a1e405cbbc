//! Multi-Region keys: what people ask for, and what the KMS of another region brings.

use crate::kms::embedded::synchronization::{Message, NewReplica};
use crate::kms::key_ref::id_text;
use crate::kms::regions;
use crate::kms::server::operations::{Answer, Request, keys};
use crate::kms::server::wire::{WireError, constraint, missing};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// The operation by which a region hears of a key. AWS has no such operation, only a right of that name.
pub(super) const SYNCHRONIZE: &str = "SynchronizeMultiRegionKey";

/// The operation by which a region is asked what it has of a key, and what to wrap more with. Ours as well.
pub(super) const PARAMETERS: &str = "GetParametersForSynchronization";

pub(super) fn replicate(request: &Request<'_>) -> Answer {
    let key = request.admins_key("ReplicateKey")?;
    let fields = &request.fields;
    let region = fields.text("ReplicaRegion")?;
    let tags = keys::tags(fields)?;
    let new = NewReplica {
        description: fields.maybe_text("Description")?.unwrap_or_default().to_owned(),
        tags: tags.clone(),
        policy: fields.maybe_text("Policy")?.map(str::to_owned),
    };
    let replica = regions::replicate(request.kms, key, region, &new)?;
    let mut metadata = replica.metadata;
    if metadata.is_null() {
        // It was made by an earlier try, whose answer was lost.
        metadata = json!({ "Arn": replica.arn, "KeyId": id_text(request.kms.key(key)?.id) });
    }
    let shown = |(name, value): &(String, String)| json!({ "TagKey": name, "TagValue": value });
    let mut answer = json!({
        "ReplicaKeyMetadata": metadata,
        "ReplicaTags": tags.iter().map(shown).collect::<Vec<Value>>(),
    });
    if let Some(policy) = new.policy {
        answer["ReplicaPolicy"] = policy.into();
    }
    Ok(answer)
}

pub(super) fn update_primary(request: &Request<'_>) -> Answer {
    let key = request.admins_key("UpdatePrimaryRegion")?;
    regions::update_primary(request.kms, key, request.fields.text("PrimaryRegion")?)?;
    Ok(Value::Null)
}

pub(super) fn parameters(request: &Request<'_>) -> Answer {
    let (from, key) = asked_by(request)?;
    let fields = &request.fields;
    let generation = fields.maybe_number("Generation")?.ok_or_else(|| missing("Generation"))?;
    let generation = u64::try_from(generation).map_err(|_| {
        let must = "have value greater than or equal to 0";
        constraint(&generation.to_string(), "Generation", must)
    })?;
    let makes = fields.flag("CreatesReplica")?;
    let parameters = request.kms.synchronization_parameters(from, key, generation, makes)?;
    let mut answer = json!({
        "Generation": parameters.generation,
        "IsPrimary": parameters.is_primary,
        "State": parameters.state,
    });
    if let Some(wrapping) = parameters.wrapping {
        answer["PublicKey"] = STANDARD.encode(&wrapping.public_key).into();
        answer["ImportToken"] = STANDARD.encode(&wrapping.token).into();
    }
    Ok(answer)
}

pub(super) fn synchronize(request: &Request<'_>) -> Answer {
    let (from, key) = asked_by(request)?;
    let fields = &request.fields;
    let message = Message {
        shared: fields.text("Shared")?.to_owned(),
        wrapped_key: fields.bytes("WrappedKey")?.to_vec(),
        material: fields.bytes("SharedMaterial")?.to_vec(),
    };
    let metadata = request.kms.receive(from, key, &fields.bytes("ImportToken")?, &message)?;
    Ok(json!({ "KeyMetadata": keys::metadata(request, &metadata) }))
}

/// The region whose KMS asks, and the key that it asks about.
fn asked_by<'a>(request: &'a Request<'_>) -> Result<(&'a str, &'a str), WireError> {
    let key = request.fields.maybe_text("KeyId").unwrap_or_default().unwrap_or("*");
    let from = request.kms.check_peer(request.caller, SYNCHRONIZE, key)?;
    request.has_right.set(true);
    Ok((from, request.fields.text("KeyId")?))
}
