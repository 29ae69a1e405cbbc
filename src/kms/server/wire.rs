//! AWS's JSON 1.1: the fields of a request, and errors.
//!
//! Pure. A field of the wrong type is a SerializationException, one that must be there and is not a
//! ValidationException; fields that nobody asks for are passed over, as AWS does.

use crate::kms::{EncryptionContext, KmsError};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use zeroize::Zeroizing;

/// An error as the wire has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireError {
    /// `__type`.
    pub kind: &'static str,
    /// `message`; InvalidCiphertextException has none.
    pub message: Option<String>,
}

impl WireError {
    /// An error with a message.
    pub fn new(kind: &'static str, message: impl Into<String>) -> Self {
        WireError { kind, message: Some(message.into()) }
    }

    /// ValidationException.
    pub fn validation(message: impl Into<String>) -> Self {
        Self::new("ValidationException", message)
    }

    /// UnsupportedOperationException.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new("UnsupportedOperationException", message)
    }

    /// SerializationException.
    pub fn serialization(message: impl Into<String>) -> Self {
        Self::new("SerializationException", message)
    }

    /// The HTTP status that it comes with.
    pub fn status(&self) -> u16 {
        if self.kind == "KMSInternalException" { 500 } else { 400 }
    }

    /// The body of the answer.
    pub fn body(&self) -> Vec<u8> {
        let mut body = Map::from_iter([("__type".to_owned(), Value::from(self.kind))]);
        body.extend(self.message.clone().map(|message| ("message".to_owned(), Value::from(message))));
        Value::Object(body).to_string().into_bytes()
    }
}

impl From<KmsError> for WireError {
    fn from(e: KmsError) -> Self {
        match e {
            KmsError::InvalidCiphertext => WireError { kind: e.type_name(), message: None },
            KmsError::Internal(_) | KmsError::Corrupt(_) => {
                // Paths of this machine are not the caller's business.
                log::error!("{e}");
                let message = "The KMS could not do it; its log says why.";
                WireError::new(e.type_name(), message)
            }
            e => WireError::new(e.type_name(), e.to_string()),
        }
    }
}

/// The fields of a request. Has no Debug: one may be a plaintext.
pub struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a request's body: a JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, WireError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Fields(fields)),
            // serde_json's own words could echo a value.
            Ok(_) | Err(_) => Err(WireError::serialization("The request is not a JSON object.")),
        }
    }

    /// A text that may be absent.
    pub fn maybe_text(&self, name: &str) -> Result<Option<&str>, WireError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(name, "a string")),
        }
    }

    /// A text that must be there, and not be empty.
    pub fn text(&self, name: &str) -> Result<&str, WireError> {
        match self.maybe_text(name)? {
            None => Err(missing(name)),
            Some("") => Err(constraint("", name, "have length greater than or equal to 1")),
            Some(text) => Ok(text),
        }
    }

    /// One of some texts, `default` if it is absent.
    pub fn one_of(
        &self,
        name: &str,
        known: &[&'static str],
        default: &'static str,
    ) -> Result<&'static str, WireError> {
        let Some(text) = self.maybe_text(name)? else { return Ok(default) };
        known
            .iter()
            .find(|k| **k == text)
            .copied()
            .ok_or_else(|| constraint(text, name, &format!("satisfy enum value set: [{}]", known.join(", "))))
    }

    /// A whole number that may be absent.
    pub fn maybe_number(&self, name: &str) -> Result<Option<i64>, WireError> {
        match self.value(name) {
            None => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| wrong_type(name, "an integer")),
        }
    }

    /// A moment that may be absent, in milliseconds since 1970; on the wire it is in seconds.
    pub fn maybe_time(&self, name: &str) -> Result<Option<i64>, WireError> {
        match self.value(name) {
            None => Ok(None),
            Some(value) => {
                let seconds = value.as_f64().filter(|s| s.abs() < 1e12);
                let ms = seconds.ok_or_else(|| wrong_type(name, "a timestamp"))? * 1000.0;
                Ok(Some(ms.round() as i64))
            }
        }
    }

    /// A truth value; absent is false.
    pub fn flag(&self, name: &str) -> Result<bool, WireError> {
        match self.value(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| wrong_type(name, "a boolean")),
        }
    }

    /// Bytes that must be there; on the wire they are base64.
    pub fn bytes(&self, name: &str) -> Result<Zeroizing<Vec<u8>>, WireError> {
        let text = self.maybe_text(name)?.ok_or_else(|| missing(name))?;
        let bytes = STANDARD.decode(text).map_err(|_| wrong_type(name, "base64"))?;
        Ok(Zeroizing::new(bytes))
    }

    /// The texts of a list; absent is empty.
    pub fn texts(&self, name: &str) -> Result<Vec<String>, WireError> {
        let text =
            |value: &Value| value.as_str().map(str::to_owned).ok_or_else(|| wrong_type(name, "strings"));
        self.list(name)?.iter().map(text).collect()
    }

    /// A list; absent is empty.
    pub fn list(&self, name: &str) -> Result<&[Value], WireError> {
        match self.value(name) {
            None => Ok(&[]),
            Some(Value::Array(list)) => Ok(list),
            Some(_) => Err(wrong_type(name, "a list")),
        }
    }

    /// An encryption context; absent is empty.
    pub fn context(&self, name: &str) -> Result<EncryptionContext, WireError> {
        Ok(self.maybe_pairs(name)?.unwrap_or_default().into())
    }

    /// Pairs of texts that may be absent.
    pub fn maybe_pairs(&self, name: &str) -> Result<Option<BTreeMap<String, String>>, WireError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let Value::Object(map) = value else { return Err(wrong_type(name, "a map")) };
        let pair = |(key, value): (&String, &Value)| match value {
            Value::String(text) => Ok((key.clone(), text.clone())),
            _ => Err(wrong_type(name, "a map of strings")),
        };
        map.iter().map(pair).collect::<Result<_, _>>().map(Some)
    }

    /// A structure that may be absent.
    pub fn maybe_fields(&self, name: &str) -> Result<Option<Fields>, WireError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Fields(fields.clone()))),
            Some(_) => Err(wrong_type(name, "a structure")),
        }
    }

    /// A field as it is; null is absent.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }
}

/// What a request held may have been a plaintext.
impl Drop for Fields {
    fn drop(&mut self) {
        for value in self.0.values_mut() {
            if let Value::String(text) = value {
                zeroize::Zeroize::zeroize(text);
            }
        }
    }
}

/// ValidationException for a value that is not as it must be.
pub fn constraint(value: &str, name: &str, must: &str) -> WireError {
    WireError::validation(format!(
        "1 validation error detected: Value '{value}' at '{}' failed to satisfy constraint: Member must \
         {must}",
        member(name)
    ))
}

/// ValidationException for what is not there.
pub fn missing(name: &str) -> WireError {
    WireError::validation(format!(
        "1 validation error detected: Value null at '{}' failed to satisfy constraint: Member must not be \
         null",
        member(name)
    ))
}

fn wrong_type(name: &str, wanted: &str) -> WireError {
    WireError::serialization(format!("{name} must be {wanted}."))
}

/// In messages members begin with a small letter.
fn member(name: &str) -> String {
    let mut letters = name.chars();
    letters.next().map_or(String::new(), |first| first.to_lowercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind<T>(result: Result<T, WireError>) -> &'static str {
        result.err().expect("an error").kind
    }

    #[test]
    fn fields_have_types_and_null_is_absent() {
        let fields =
            br#"{"t":"x","n":7,"b":"AQI=","m":{"a":"b"},"l":["x"],"f":true,"o":null,"s":1.5,"e":""}"#;
        let fields = Fields::parse(fields).unwrap();
        assert_eq!((fields.text("t").unwrap(), fields.maybe_number("n").unwrap()), ("x", Some(7)));
        assert_eq!((&*fields.bytes("b").unwrap(), fields.flag("f").unwrap()), (&vec![1, 2], true));
        assert_eq!(
            (fields.texts("l").unwrap(), fields.maybe_time("s").unwrap()),
            (vec!["x".into()], Some(1500))
        );
        assert_eq!(fields.context("m").unwrap(), EncryptionContext::pair("a", "b"));
        assert_eq!((fields.maybe_text("o").unwrap(), fields.flag("o").unwrap()), (None, false));
        assert_eq!(kind(fields.maybe_text("n")), "SerializationException");
        assert_eq!(kind(fields.maybe_number("s")), "SerializationException");
        assert_eq!(kind(fields.bytes("m")), "SerializationException");
        assert_eq!(kind(fields.context("l")), "SerializationException");
        assert_eq!(kind(fields.text("o")), "ValidationException");
        assert_eq!(kind(fields.text("e")), "ValidationException");
        for body in [&b"[]"[..], b"", b"{", b"\xff", b"{}x"] {
            assert_eq!(kind(Fields::parse(body)), "SerializationException");
        }
    }

    #[test]
    fn an_invalid_ciphertext_has_no_message() {
        let error = WireError::from(KmsError::InvalidCiphertext);
        assert_eq!(error.body(), br#"{"__type":"InvalidCiphertextException"}"#);
        assert_eq!(WireError::from(KmsError::Internal("/secret/path".into())).status(), 500);
    }
}
