//! What the audit log keeps of a request: who asked for what, about which keys, and how it was answered.
//!
//! Fields are kept by name, so that no plaintext, ciphertext or token gets there. Of somebody who has no
//! right to what he asks for none is kept, nor the message that he got, which can repeat one; and of many
//! such requests there are a few records and then a count ([`super::super::refusals`]). Nobody fills the log
//! with his words, or with his trying.

use crate::kms::embedded::audit::Call;
use crate::kms::embedded::data::key_in;
use crate::kms::server::operations::{Answer, Request};
use crate::kms::server::wire::WireError;
use serde_json::{Value, json};

/// The fields that are kept, with their names on the wire and in the log, where members
/// begin with a small letter.
const KEPT: &[(&str, &str)] = &[
    ("KeyId", "keyId"),
    ("EncryptionContext", "encryptionContext"),
    ("EncryptionAlgorithm", "encryptionAlgorithm"),
    ("NumberOfBytes", "numberOfBytes"),
    ("KeySpec", "keySpec"),
    ("SourceKeyId", "sourceKeyId"),
    ("SourceEncryptionContext", "sourceEncryptionContext"),
    ("SourceEncryptionAlgorithm", "sourceEncryptionAlgorithm"),
    ("DestinationKeyId", "destinationKeyId"),
    ("DestinationEncryptionContext", "destinationEncryptionContext"),
    ("DestinationEncryptionAlgorithm", "destinationEncryptionAlgorithm"),
    ("DryRun", "dryRun"),
    ("MultiRegion", "multiRegion"),
    ("ReplicaRegion", "replicaRegion"),
    ("PrimaryRegion", "primaryRegion"),
    ("Generation", "generation"),
    ("CreatesReplica", "createsReplica"),
    ("KeyUsage", "keyUsage"),
    ("Origin", "origin"),
    ("CustomKeyStoreId", "customKeyStoreId"),
    ("CustomKeyStoreName", "customKeyStoreName"),
    ("NewCustomKeyStoreName", "newCustomKeyStoreName"),
    ("CustomKeyStoreType", "customKeyStoreType"),
    ("CloudHsmClusterId", "clusterId"),
    ("Description", "description"),
    ("Policy", "policy"),
    ("PolicyName", "policyName"),
    ("Tags", "tags"),
    ("TagKeys", "tagKeys"),
    ("PendingWindowInDays", "pendingWindowInDays"),
    ("RotationPeriodInDays", "rotationPeriodInDays"),
    ("AliasName", "aliasName"),
    ("TargetKeyId", "targetKeyId"),
    ("GrantId", "grantId"),
    ("GranteePrincipal", "granteePrincipal"),
    ("RetiringPrincipal", "retiringPrincipal"),
    ("Operations", "operations"),
    ("Constraints", "constraints"),
    ("Name", "name"),
    ("WrappingAlgorithm", "wrappingAlgorithm"),
    ("WrappingKeySpec", "wrappingKeySpec"),
    ("ExpirationModel", "expirationModel"),
    ("ValidTo", "validTo"),
    ("Limit", "limit"),
];

/// What is answered to whoever has no right.
const DENIED: &str = "AccessDeniedException";

/// Records a request; what it is answered then.
pub(super) fn record(request: &Request<'_>, operation: &str, answer: Answer) -> Answer {
    let refused = answer.as_ref().err().filter(|e| e.kind == DENIED || !request.has_right.get());
    if let Some(e) = refused
        && !request.refusals.is_worth_a_record(request.kms, &request.caller.arn, operation, e.kind)
    {
        return answer;
    }
    let mut call = Call::new(operation).by(identity(request));
    match refused {
        Some(_) => call = call.with("requestBytes", request.bytes),
        None => {
            let kept = KEPT.iter().filter_map(|(wire, log)| Some((log, request.fields.value(wire)?)));
            call = kept.fold(call, |call, (log, value)| call.with(log, value.clone()));
        }
    }
    for key in keys(request, answer.as_ref().unwrap_or(&Value::Null)) {
        call = call.about(&key);
    }
    let granted = answer.as_ref().ok().and_then(|answer| answer.get("GrantId"));
    if let Some(id) = granted {
        call = call.answering("grantId", id.clone());
    }
    let failure = answer.as_ref().err().map(|e| match refused {
        Some(_) => (e.kind, "refused; nothing of the request is kept"),
        None => (e.kind, e.message.as_deref().unwrap_or_default()),
    });
    request.kms.record_call(&call, failure).map_err(|e| {
        log::error!("{e}");
        let message =
            format!("{operation} could not be recorded in the audit log, and is not answered without.");
        WireError::new("KMSInternalException", message)
    })?;
    answer
}

/// Who asks, as CloudTrail has it.
fn identity(request: &Request<'_>) -> Value {
    let arn = &request.caller.arn;
    let account = &request.kms.locality().account;
    match arn.split_once(":user/") {
        Some((_, name)) => {
            json!({ "type": "IAMUser", "arn": arn, "accountId": account, "accessKeyId": request.access_key, "userName": name })
        }
        None => {
            json!({ "type": "Root", "arn": arn, "accountId": account, "accessKeyId": request.access_key })
        }
    }
}

/// The keys that the request is about: those that were answered, named, or meant by a ciphertext.
fn keys(request: &Request<'_>, answer: &Value) -> Vec<String> {
    let answered =
        ["/SourceKeyId", "/KeyId", "/KeyMetadata/Arn"].iter().filter_map(|place| answer.pointer(place));
    let mut keys: Vec<String> = answered.filter_map(Value::as_str).map(str::to_owned).collect();
    if keys.is_empty() {
        let named = ["SourceKeyId", "KeyId", "DestinationKeyId", "TargetKeyId"];
        let named = named.iter().filter_map(|name| request.fields.value(name)?.as_str());
        keys.extend(named.map(str::to_owned));
        if let Ok(blob) = request.fields.bytes("CiphertextBlob") {
            keys.push(key_in(&blob));
        }
    }
    keys
}
