//! The JSON of the KMS's wire.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sealblk::kms::server::wire::{Fields, WireError};
use serde_json::Value;

/// Fields of every type that operations ask for.
const NAMES: [&str; 8] =
    ["KeyId", "Plaintext", "EncryptionContext", "Limit", "ValidTo", "GrantTokens", "Constraints", "DryRun"];

/// Any body.
pub fn run(data: &[u8]) {
    let whole: Option<Value> = serde_json::from_slice(data).ok();
    match Fields::parse(data) {
        Ok(fields) => every_field(&fields, whole.as_ref().expect("an object is JSON")),
        Err(e) => {
            assert_eq!(e.kind, "SerializationException");
            assert!(!whole.is_some_and(|value| value.is_object()));
        }
    }
}

fn every_field(fields: &Fields, whole: &Value) {
    for name in NAMES {
        let value = Some(&whole[name]).filter(|value| !value.is_null());
        let text = value.and_then(Value::as_str);
        assert_eq!(
            answered(fields.maybe_text(name)).map(|found| found == text),
            value_is(value, Value::is_string)
        );
        if let Some(found) = answered(fields.text(name)) {
            assert!(!found.is_empty() && Some(found) == text);
        }
        if let Some(bytes) = answered(fields.bytes(name)) {
            // One text for each run of bytes, or two blobs would be one.
            assert_eq!(Some(STANDARD.encode(&*bytes).as_str()), text);
        }
        if let Some(Some(number)) = answered(fields.maybe_number(name)) {
            assert_eq!(value.and_then(Value::as_i64), Some(number));
        }
        if let Some(Some(time)) = answered(fields.maybe_time(name)) {
            assert!(time.abs() <= 1_000_000_000_000_000);
        }
        if let Some(true) = answered(fields.flag(name)) {
            assert_eq!(value, Some(&Value::Bool(true)));
        }
        if let Some(pairs) = answered(fields.maybe_pairs(name)) {
            assert_eq!(pairs.map(|pairs| pairs.len()), value.and_then(Value::as_object).map(|map| map.len()));
        }
        if let Some(texts) = answered(fields.texts(name)) {
            assert_eq!(texts.len(), value.and_then(Value::as_array).map_or(0, Vec::len));
        }
        if let Some(Some(inner)) = answered(fields.maybe_fields(name)) {
            answered(inner.text("Plaintext"));
        }
        answered(fields.one_of(name, &["SYMMETRIC_DEFAULT"], "SYMMETRIC_DEFAULT"));
        answered(fields.context(name));
    }
}

/// Absent, or of this type: what can be answered at all.
fn value_is(value: Option<&Value>, is: impl Fn(&Value) -> bool) -> Option<bool> {
    value.is_none_or(is).then_some(true)
}

/// The value; a refusal is one of AWS's two and can be told.
fn answered<T>(result: Result<T, WireError>) -> Option<T> {
    result
        .map_err(|e| {
            assert!(["SerializationException", "ValidationException"].contains(&e.kind), "{}", e.kind);
            let body: Value = serde_json::from_slice(&e.body()).expect("the body of an error is JSON");
            assert_eq!((body["__type"].as_str(), e.status()), (Some(e.kind), 400));
        })
        .ok()
}
