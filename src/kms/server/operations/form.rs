//! What a request must look like whoever has sent it: how long its fields may be, and which
//! operations take no alias.
//!
//! The lengths are those of AWS's public model of the service, in characters, as AWS counts them.
//! Of a field that is too long no message tells more than that: a stranger's text goes neither
//! into logs nor into answers.

use crate::kms::errors::Exception;
use crate::kms::key_ref::ALIAS_PREFIX;
use crate::kms::server::wire::{Fields, WireError};
use crate::kms::{EncryptionContext, KmsError};
use serde_json::Value;

/// The longest text of each field, in characters.
const TEXTS: &[(&str, usize)] = &[
    ("AliasName", 256),
    ("CiphertextBlob", base64_len(6144)),
    ("CloudHsmClusterId", 24),
    ("CustomKeyStoreId", 64),
    ("CustomKeyStoreName", 256),
    ("CustomKeyStoreType", NAME_MAX),
    ("CustomerMasterKeySpec", NAME_MAX),
    ("Description", 8192),
    ("DestinationEncryptionAlgorithm", NAME_MAX),
    ("DestinationKeyId", 2048),
    ("EncryptedKeyMaterial", base64_len(6144)),
    ("EncryptionAlgorithm", NAME_MAX),
    ("ExpirationModel", NAME_MAX),
    ("GrantId", 128),
    ("GrantToken", 8192),
    ("GranteePrincipal", 256),
    ("GranteeServicePrincipal", 128),
    ("ImportToken", base64_len(6144)),
    ("ImportType", NAME_MAX),
    ("IncludeKeyMaterial", NAME_MAX),
    ("KeyId", 2048),
    ("KeyMaterialDescription", 256),
    ("KeyMaterialId", 64),
    ("KeySpec", NAME_MAX),
    ("KeyStorePassword", 32),
    ("KeyUsage", NAME_MAX),
    ("Marker", 1024),
    ("Name", 256),
    ("NewCustomKeyStoreName", 256),
    ("Origin", NAME_MAX),
    ("Plaintext", base64_len(4096)),
    ("Policy", 131_072),
    ("PolicyName", 128),
    ("PrimaryRegion", 64),
    ("ReplicaRegion", 64),
    ("RetiringPrincipal", 256),
    ("RetiringServicePrincipal", 128),
    ("Shared", 131_072),
    ("SharedMaterial", base64_len(32 * 512 + 16)),
    ("SourceEncryptionAlgorithm", NAME_MAX),
    ("SourceKeyId", 2048),
    ("TargetKeyId", 2048),
    ("TrustAnchorCertificate", 5000),
    ("WrappedKey", base64_len(512)),
    ("WrappingAlgorithm", NAME_MAX),
    ("WrappingKeySpec", NAME_MAX),
    ("XksKeyId", 128),
];
/// Of texts that are one of a few names, which AWS's model gives no length: longer than any of them.
const NAME_MAX: usize = 64;
/// The most items of each list, and the longest text in it.
const LISTS: &[(&str, usize, usize)] =
    &[("GrantTokens", 10, 8192), ("Operations", 64, NAME_MAX), ("TagKeys", 50, 128), ("Tags", 50, 0)];
/// Encryption contexts.
const CONTEXTS: &[&str] = &["EncryptionContext", "SourceEncryptionContext", "DestinationEncryptionContext"];
/// Bytes of all keys and values of an encryption context. AWS does not publish its limit.
const CONTEXT_MAX: usize = 8192;

/// The operations that take an alias in place of a key's id or ARN, as AWS's documentation of each says.
/// CreateAlias and UpdateAlias, which have another field for the key, refuse an alias in words of their own.
const TAKE_ALIASES: &[&str] =
    &["Decrypt", "DescribeKey", "Encrypt", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext", "ReEncrypt"];

/// Fails for a field that is longer than AWS lets it be.
pub(super) fn check_lengths(fields: &Fields) -> Result<(), WireError> {
    for (name, longest) in TEXTS {
        if let Some(Value::String(text)) = fields.value(name) {
            check_text(text, name, *longest)?;
        }
    }
    for (name, most, longest) in LISTS {
        let Some(Value::Array(items)) = fields.value(name) else { continue };
        if items.len() > *most {
            return Err(too_long(name, *most));
        }
        items.iter().filter_map(Value::as_str).try_for_each(|text| check_text(text, name, *longest))?;
    }
    // What has another type is refused by whoever needs the field.
    let contexts = CONTEXTS.iter().filter_map(|name| Some((fields.context(name).ok()?, name)));
    contexts.into_iter().try_for_each(|(context, name)| check_context(&context, name))
}

/// Fails if the key is named by an alias and the operation takes none.
pub(super) fn check_no_alias(operation: &str, fields: &Fields) -> Result<(), WireError> {
    if TAKE_ALIASES.contains(&operation) {
        return Ok(());
    }
    let key = fields.maybe_text("KeyId")?.unwrap_or_default();
    let resource = key.splitn(6, ':').nth(5).filter(|_| key.starts_with("arn:"));
    if !resource.unwrap_or(key).starts_with(ALIAS_PREFIX) {
        return Ok(());
    }
    let message = "Key Aliases are not supported for this operation.";
    Err(KmsError::Other(Exception::InvalidArn, message.into()).into())
}

fn check_context(context: &EncryptionContext, name: &str) -> Result<(), WireError> {
    let bytes: usize = context.pairs().iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes <= CONTEXT_MAX { Ok(()) } else { Err(too_long(name, CONTEXT_MAX)) }
}

fn check_text(text: &str, name: &str, longest: usize) -> Result<(), WireError> {
    // Bytes are counted at once; only what may be too long is gone through.
    if text.len() <= longest || text.chars().count() <= longest {
        Ok(())
    } else {
        Err(too_long(name, longest))
    }
}

fn too_long(name: &str, longest: usize) -> WireError {
    let mut field = name.to_owned();
    field[..1].make_ascii_lowercase();
    WireError::validation(format!(
        "1 validation error detected: Value at '{field}' failed to satisfy constraint: Member must have \
         length less than or equal to {longest}"
    ))
}

/// Characters of base64 for so many bytes.
const fn base64_len(bytes: usize) -> usize {
    bytes.div_ceil(3) * 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: &Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    fn refused(value: &Value) -> bool {
        check_lengths(&fields(value)).is_err_and(|e| e.kind == "ValidationException")
    }

    #[test]
    fn every_text_may_be_as_long_as_awss_and_no_longer() {
        for (name, longest) in TEXTS {
            assert!(!refused(&json!({ *name: "ä".repeat(*longest) })), "{name}");
            let long = json!({ *name: "X".repeat(longest + 1) });
            let error = check_lengths(&fields(&long)).unwrap_err();
            assert!(error.message.unwrap().len() < 200, "{name}: the value is not repeated");
        }
    }

    #[test]
    fn lists_and_contexts_are_bounded() {
        for (name, most, longest) in LISTS {
            assert!(!refused(&json!({ *name: vec!["x".repeat(*longest); *most] })), "{name}");
            assert!(refused(&json!({ *name: vec![""; most + 1] })), "{name}");
            assert!(refused(&json!({ *name: ["x".repeat(longest + 1)] })), "{name}");
        }
        for name in CONTEXTS {
            assert!(!refused(&json!({ *name: { "key": "x".repeat(CONTEXT_MAX - 3) } })), "{name}");
            assert!(refused(&json!({ *name: { "key": "x".repeat(CONTEXT_MAX - 2) } })), "{name}");
        }
    }
}
