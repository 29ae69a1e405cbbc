//! Imported key material.

use crate::kms::embedded::import::{WRAPPING_ALGORITHM, WrappingKeySpec};
use crate::kms::server::operations::{Answer, Request, seconds};
use crate::kms::server::wire::{WireError, constraint, missing};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

pub(super) fn parameters(request: &Request<'_>) -> Answer {
    let key = request.admins_key("GetParametersForImport")?;
    let algorithm = request.fields.text("WrappingAlgorithm")?;
    if algorithm != WRAPPING_ALGORITHM {
        let message = format!("Material is wrapped with {WRAPPING_ALGORITHM} here, not with {algorithm}.");
        return Err(WireError::unsupported(message));
    }
    let spec = request.fields.text("WrappingKeySpec")?;
    let spec = WrappingKeySpec::named(spec).ok_or_else(|| {
        constraint(spec, "WrappingKeySpec", "satisfy enum value set: [RSA_2048, RSA_3072, RSA_4096]")
    })?;
    let parameters = request.kms.import_parameters(key, spec)?;
    Ok(json!({
        "KeyId": parameters.key,
        "ImportToken": STANDARD.encode(&parameters.token),
        "PublicKey": STANDARD.encode(&parameters.public_key),
        "ParametersValidTo": seconds(parameters.valid_to),
    }))
}

pub(super) fn import(request: &Request<'_>) -> Answer {
    let key = request.admins_key("ImportKeyMaterial")?;
    let fields = &request.fields;
    let models = ["KEY_MATERIAL_EXPIRES", "KEY_MATERIAL_DOES_NOT_EXPIRE"];
    let expires = match (fields.one_of("ExpirationModel", &models, models[0])?, fields.maybe_time("ValidTo")?)
    {
        ("KEY_MATERIAL_EXPIRES", None) => {
            let message = "A validTo date must be set if the ExpirationModel is KEY_MATERIAL_EXPIRES";
            return Err(WireError::validation(message));
        }
        ("KEY_MATERIAL_EXPIRES", at) => at,
        (_, None) => None,
        (_, Some(_)) => {
            let message =
                "A validTo date must not be set if the ExpirationModel is KEY_MATERIAL_DOES_NOT_EXPIRE";
            return Err(WireError::validation(message));
        }
    };
    fields.one_of("ImportType", &["EXISTING_KEY_MATERIAL"], "EXISTING_KEY_MATERIAL")?;
    let (token, wrapped) = (fields.bytes("ImportToken")?, fields.bytes("EncryptedKeyMaterial")?);
    if wrapped.is_empty() {
        return Err(missing("EncryptedKeyMaterial"));
    }
    let imported = request.kms.import(key, &token, &wrapped, expires)?;
    Ok(json!({ "KeyId": imported.key, "KeyMaterialId": imported.material }))
}

pub(super) fn delete(request: &Request<'_>) -> Answer {
    let key = request.admins_key("DeleteImportedKeyMaterial")?;
    let (key, material) = request.kms.delete_material(key)?;
    let mut answer = json!({ "KeyId": key });
    if let Some(material) = material {
        answer["KeyMaterialId"] = material.into();
    }
    Ok(answer)
}
