//! Custom key stores: tokens of HSMs.
//!
//! A token is one of those that the settings name: whoever asks over the wire names no
//! code that is to be loaded.

use crate::hsm::Pin;
use crate::kms::embedded::key_stores::{KeyStoreChanges, KeyStoreMetadata, NewKeyStore};
use crate::kms::errors::Exception;
use crate::kms::server::operations::{Answer, Request, paged, seconds};
use crate::kms::server::wire::{Fields, WireError, missing};
use serde_json::{Value, json};

/// Bytes of a password, as AWS has it.
const PASSWORD_MIN: usize = 7;

pub(super) fn create(request: &Request<'_>) -> Answer {
    request.admin("CreateCustomKeyStore")?;
    let fields = &request.fields;
    let types = ["AWS_CLOUDHSM", "EXTERNAL_KEY_STORE"];
    if fields.one_of("CustomKeyStoreType", &types, types[0])? != types[0] {
        return Err(WireError::unsupported("External key stores are not supported; a token of an HSM is."));
    }
    let name = fields.text("CustomKeyStoreName")?;
    let cluster = fields.text("CloudHsmClusterId")?;
    let pin = pin(fields)?.ok_or_else(|| missing("KeyStorePassword"))?;
    let place = request.kms.token_named(cluster)?;
    let new = NewKeyStore { name, place, cluster: Some(cluster.to_owned()), pin: Some(pin) };
    Ok(json!({ "CustomKeyStoreId": request.kms.create_key_store(&new)? }))
}

pub(super) fn describe(request: &Request<'_>) -> Answer {
    request.admin("DescribeCustomKeyStores")?;
    let fields = &request.fields;
    let stores = match (fields.maybe_text("CustomKeyStoreId")?, fields.maybe_text("CustomKeyStoreName")?) {
        (Some(_), Some(_)) => {
            return Err(WireError::validation(
                "Name a custom key store by its ID or by its name, not by both.",
            ));
        }
        (Some(which), None) | (None, Some(which)) => vec![request.kms.key_store(which)?],
        (None, None) => request.kms.key_stores()?,
    };
    let page = request.piece()?.of(stores, |store| store.id.clone(), 100)?;
    Ok(paged("CustomKeyStores", page, |store| shown(&store)))
}

pub(super) fn connect(request: &Request<'_>) -> Answer {
    let which = which(request, "ConnectCustomKeyStore")?;
    match request.kms.connect_key_store(which, None) {
        Err(e) if is_of_request(&e) => Err(e.into()),
        // Of the attempt, the connection state tells.
        Err(e) => {
            log::warn!("connect the custom key store {which}: {e}");
            Ok(json!({}))
        }
        Ok(()) => Ok(json!({})),
    }
}

pub(super) fn disconnect(request: &Request<'_>) -> Answer {
    request.kms.disconnect_key_store(which(request, "DisconnectCustomKeyStore")?)?;
    Ok(json!({}))
}

pub(super) fn update(request: &Request<'_>) -> Answer {
    let which = which(request, "UpdateCustomKeyStore")?;
    let fields = &request.fields;
    let cluster = fields.maybe_text("CloudHsmClusterId")?;
    let place = cluster.map(|cluster| request.kms.token_named(cluster)).transpose()?;
    let changes = KeyStoreChanges {
        name: fields.maybe_text("NewCustomKeyStoreName")?,
        pin: pin(fields)?,
        place: place.map(|place| (place, cluster.map(str::to_owned))),
    };
    request.kms.update_key_store(which, &changes)?;
    Ok(json!({}))
}

pub(super) fn delete(request: &Request<'_>) -> Answer {
    request.kms.delete_key_store(which(request, "DeleteCustomKeyStore")?)?;
    Ok(json!({}))
}

fn which<'a>(request: &'a Request<'_>, action: &str) -> Result<&'a str, WireError> {
    request.admin(action)?;
    request.fields.text("CustomKeyStoreId")
}

/// Whether it is the request that is wrong, and no attempt was made.
fn is_of_request(e: &crate::kms::KmsError) -> bool {
    use crate::kms::KmsError::Other;
    matches!(e, Other(Exception::CustomKeyStoreNotFound | Exception::CustomKeyStoreInvalidState, _))
}

fn pin(fields: &Fields) -> Result<Option<Pin>, WireError> {
    let Some(password) = fields.maybe_text("KeyStorePassword")? else { return Ok(None) };
    if password.len() < PASSWORD_MIN {
        return Err(WireError::validation(format!(
            "1 validation error detected: Value at 'keyStorePassword' failed to satisfy constraint: Member \
             must have length greater than or equal to {PASSWORD_MIN}"
        )));
    }
    let pin = Pin::copy_of(password.as_bytes());
    pin.map(Some).map_err(|e| WireError::validation(e.to_string()))
}

fn shown(store: &KeyStoreMetadata) -> Value {
    let mut shown = json!({
        "CustomKeyStoreId": store.id,
        "CustomKeyStoreName": store.name,
        "CustomKeyStoreType": "AWS_CLOUDHSM",
        "CloudHsmClusterId": store.cluster,
        "ConnectionState": store.connection.name(),
        "CreationDate": seconds(store.created),
    });
    if let Some(code) = store.connection.error_code() {
        shown["ConnectionErrorCode"] = code.into();
    }
    shown
}
