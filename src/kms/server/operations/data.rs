//! Encrypt, Decrypt, ReEncrypt, GenerateDataKey*, GenerateRandom.

use crate::kms::KmsError;
use crate::kms::embedded::blob::{Blob, HEADER_LEN, PLAINTEXT_MAX, TAG_LEN};
use crate::kms::embedded::data::{RANDOM_LEN, Sealed, unknown_key};
use crate::kms::embedded::grant_records::GrantOperation;
use crate::kms::errors::out_of_range;
use crate::kms::server::operations::{Answer, Request};
use crate::kms::server::wire::{Fields, WireError, constraint, missing};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use zeroize::Zeroizing;

/// The longest ciphertext that AWS takes; ours are shorter.
const BLOB_MAX: usize = 6144;
const _: () = assert!(HEADER_LEN + PLAINTEXT_MAX + TAG_LEN <= BLOB_MAX);

const ALGORITHM: &str = "SYMMETRIC_DEFAULT";

pub(super) fn encrypt(request: &Request<'_>) -> Answer {
    let fields = &request.fields;
    check_algorithm(fields, "EncryptionAlgorithm")?;
    let (key, context) = (fields.text("KeyId")?, fields.context("EncryptionContext")?);
    let plaintext = fields.bytes("Plaintext")?;
    request.check_tokens()?;
    let key = request.allowed(GrantOperation::Encrypt, key, &context)?;
    let sealed = request.kms.encrypt(&key, &plaintext, &context)?;
    request.dry_run()?;
    let mut answer = sealed_json(&sealed);
    answer["EncryptionAlgorithm"] = ALGORITHM.into();
    Ok(answer)
}

pub(super) fn decrypt(request: &Request<'_>) -> Answer {
    let fields = &request.fields;
    check_algorithm(fields, "EncryptionAlgorithm")?;
    no_recipient(fields)?;
    let (blob, context) = (blob(fields)?, fields.context("EncryptionContext")?);
    request.check_tokens()?;
    let key = source_key(request, &blob, fields.maybe_text("KeyId")?)?;
    let key = request.allowed(GrantOperation::Decrypt, &key, &context)?;
    let opened = request.kms.open_blob(Some(&key), &blob, &context)?;
    request.dry_run()?;
    Ok(json!({
        "KeyId": opened.key,
        "Plaintext": &*secret_text(&opened.plaintext),
        "EncryptionAlgorithm": ALGORITHM,
        "KeyMaterialId": opened.material,
    }))
}

pub(super) fn re_encrypt(request: &Request<'_>) -> Answer {
    let fields = &request.fields;
    check_algorithm(fields, "SourceEncryptionAlgorithm")?;
    check_algorithm(fields, "DestinationEncryptionAlgorithm")?;
    let blob = blob(fields)?;
    let (from, to) =
        (fields.context("SourceEncryptionContext")?, fields.context("DestinationEncryptionContext")?);
    let target = fields.text("DestinationKeyId")?;
    request.check_tokens()?;
    let source = source_key(request, &blob, fields.maybe_text("SourceKeyId")?)?;
    let source = request.allowed(GrantOperation::ReEncryptFrom, &source, &from)?;
    let target = request.allowed(GrantOperation::ReEncryptTo, target, &to)?;
    let done = request.kms.re_encrypt(&blob, Some(&source), &from, &target, &to)?;
    request.dry_run()?;
    Ok(json!({
        "CiphertextBlob": STANDARD.encode(&done.sealed.blob),
        "SourceKeyId": done.source_key,
        "KeyId": done.sealed.key,
        "SourceEncryptionAlgorithm": ALGORITHM,
        "DestinationEncryptionAlgorithm": ALGORITHM,
        "SourceKeyMaterialId": done.source_material,
        "DestinationKeyMaterialId": done.sealed.material,
    }))
}

pub(super) fn generate_data_key(request: &Request<'_>, with_plaintext: bool) -> Answer {
    let fields = &request.fields;
    no_recipient(fields)?;
    let (key, context) = (fields.text("KeyId")?, fields.context("EncryptionContext")?);
    let len = match (fields.maybe_number("NumberOfBytes")?, fields.maybe_text("KeySpec")?) {
        (Some(len), None) => length(len)?,
        (None, Some("AES_256")) => 32,
        (None, Some("AES_128")) => 16,
        (None, Some(other)) => {
            return Err(constraint(other, "KeySpec", "satisfy enum value set: [AES_256, AES_128]"));
        }
        _ => return Err(WireError::validation("Please specify either number of bytes or key spec.")),
    };
    request.check_tokens()?;
    let operation = match with_plaintext {
        true => GrantOperation::GenerateDataKey,
        false => GrantOperation::GenerateDataKeyWithoutPlaintext,
    };
    let key = request.allowed(operation, key, &context)?;
    let (sealed, plaintext) = request.kms.generate_data_key(&key, len, &context)?;
    request.dry_run()?;
    let mut answer = sealed_json(&sealed);
    if with_plaintext {
        answer["Plaintext"] = Value::from(&**secret_text(&plaintext));
    }
    Ok(answer)
}

pub(super) fn generate_random(request: &Request<'_>) -> Answer {
    request.admin("GenerateRandom")?;
    let fields = &request.fields;
    no_recipient(fields)?;
    let len = fields.maybe_number("NumberOfBytes")?;
    let len = length(len.ok_or_else(|| missing("NumberOfBytes"))?)?;
    let bytes = match fields.maybe_text("CustomKeyStoreId")? {
        Some(which) => request.kms.generate_random_in(which, len)?,
        None => request.kms.generate_random(len)?,
    };
    Ok(json!({ "Plaintext": &*secret_text(&bytes) }))
}

/// The key that a ciphertext is to be opened with: the one that was named, else the one that it names itself.
fn source_key(request: &Request<'_>, blob: &[u8], named: Option<&str>) -> Result<String, WireError> {
    if let Some(key) = named {
        return Ok(key.to_owned());
    }
    let arn = request.kms.locality().key_arn(Blob::parse(blob)?.key);
    match request.kms.key(&arn) {
        Ok(key) => Ok(key.arn),
        Err(KmsError::NotFound(_)) => Err(unknown_key().into()),
        Err(e) => Err(e.into()),
    }
}

fn blob(fields: &Fields) -> Result<Zeroizing<Vec<u8>>, WireError> {
    let blob = fields.bytes("CiphertextBlob")?;
    let must = match blob.len() {
        0 => "have length greater than or equal to 1".to_owned(),
        1..=BLOB_MAX => return Ok(blob),
        _ => format!("have length less than or equal to {BLOB_MAX}"),
    };
    Err(WireError::validation(format!(
        "1 validation error detected: Value at 'ciphertextBlob' failed to satisfy constraint: Member must \
         {must}"
    )))
}

fn length(len: i64) -> Result<usize, WireError> {
    let range = *RANDOM_LEN.start() as i64..=*RANDOM_LEN.end() as i64;
    if range.contains(&len) {
        return Ok(len as usize);
    }
    Err(out_of_range(len, "numberOfBytes", &range).into())
}

fn check_algorithm(fields: &Fields, name: &str) -> Result<(), WireError> {
    fields.one_of(name, &[ALGORITHM], ALGORITHM).map(drop)
}

fn no_recipient(fields: &Fields) -> Result<(), WireError> {
    match fields.maybe_fields("Recipient")? {
        None => Ok(()),
        Some(_) => Err(WireError::unsupported("Recipients are not supported.")),
    }
}

fn sealed_json(sealed: &Sealed) -> Value {
    json!({
        "CiphertextBlob": STANDARD.encode(&sealed.blob),
        "KeyId": sealed.key,
        "KeyMaterialId": sealed.material,
    })
}

/// Base64 of a secret, without a copy that growing would leave behind.
fn secret_text(bytes: &[u8]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(bytes.len().div_ceil(3) * 4));
    STANDARD.encode_string(bytes, &mut text);
    text
}
