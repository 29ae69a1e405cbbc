//! Grants.

use crate::kms::embedded::grant_records::{Constraint, GrantEntry, GrantOperation};
use crate::kms::embedded::grants::{GrantRef, NewGrant};
use crate::kms::embedded::page::Page;
use crate::kms::server::operations::{Answer, Request, paged, seconds};
use crate::kms::server::wire::{Fields, WireError, constraint};
use serde_json::{Value, json};

pub(super) fn create(request: &Request<'_>) -> Answer {
    let fields = &request.fields;
    let (key, operations, constraint) = (fields.text("KeyId")?, operations(fields)?, constraints(fields)?);
    let service =
        fields.maybe_text("GranteeServicePrincipal")?.or(fields.maybe_text("RetiringServicePrincipal")?);
    if service.is_some() {
        return Err(WireError::unsupported("There are no service principals here."));
    }
    request.check_tokens()?;
    let new = NewGrant {
        grantee: fields.text("GranteePrincipal")?,
        retiring: fields.maybe_text("RetiringPrincipal")?,
        operations: &operations,
        constraint,
        name: fields.maybe_text("Name")?,
    };
    let granted = request.kms.create_grant(request.caller, key, &new, fields.flag("DryRun")?)?;
    Ok(json!({ "GrantId": granted.id, "GrantToken": granted.token }))
}

pub(super) fn list(request: &Request<'_>) -> Answer {
    let key = request.admins_key("ListGrants")?;
    let (id, grantee) =
        (request.fields.maybe_text("GrantId")?, request.fields.maybe_text("GranteePrincipal")?);
    id.map_or(Ok(()), check_id)?;
    Ok(listed(request, request.kms.grants(key, id, grantee, &request.piece()?)?))
}

pub(super) fn list_retirable(request: &Request<'_>) -> Answer {
    let principal = request.fields.text("RetiringPrincipal")?;
    Ok(listed(request, request.kms.retirable_grants(request.caller, principal, &request.piece()?)?))
}

pub(super) fn retire(request: &Request<'_>) -> Answer {
    let fields = &request.fields;
    let names =
        (fields.maybe_text("GrantToken")?, fields.maybe_text("KeyId")?, fields.maybe_text("GrantId")?);
    let grant = match names {
        (Some(token), None, None) => GrantRef::Token(token),
        (None, Some(key), Some(grant)) => {
            check_id(grant)?;
            GrantRef::Id { key, grant }
        }
        _ => return Err(WireError::validation("Grant token or both key ID and grant ID are required.")),
    };
    request.kms.retire_grant(request.caller, grant, fields.flag("DryRun")?)?;
    Ok(Value::Null)
}

pub(super) fn revoke(request: &Request<'_>) -> Answer {
    let key = request.admins_key("RevokeGrant")?;
    let grant = request.fields.text("GrantId")?;
    check_id(grant)?;
    request.kms.revoke_grant(key, grant, request.fields.flag("DryRun")?)?;
    Ok(Value::Null)
}

fn check_id(id: &str) -> Result<(), WireError> {
    if id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(());
    }
    Err(WireError::new("InvalidGrantIdException", format!("Invalid grant ID '{id}'")))
}

fn operations(fields: &Fields) -> Result<Vec<GrantOperation>, WireError> {
    let operation = |name: String| {
        GrantOperation::named(&name).ok_or_else(|| {
            let known: Vec<&str> = GrantOperation::ALL.iter().map(|(_, name)| *name).collect();
            constraint(&name, "operations", &format!("satisfy enum value set: [{}]", known.join(", ")))
        })
    };
    fields.texts("Operations")?.into_iter().map(operation).collect()
}

fn constraints(fields: &Fields) -> Result<Constraint, WireError> {
    let Some(fields) = fields.maybe_fields("Constraints")? else { return Ok(Constraint::default()) };
    Ok(Constraint {
        equals: fields.maybe_pairs("EncryptionContextEquals")?,
        subset: fields.maybe_pairs("EncryptionContextSubset")?,
    })
}

fn listed(request: &Request<'_>, page: Page<GrantEntry>) -> Value {
    paged("Grants", page, |grant| {
        let operations: Vec<&str> = grant.operations.iter().map(|operation| operation.name()).collect();
        let mut entry = json!({
            "KeyId": request.kms.locality().key_arn(grant.key),
            "GrantId": grant.id,
            "Name": grant.name.unwrap_or_default(),
            "CreationDate": seconds(grant.created),
            "GranteePrincipal": grant.grantee,
            "IssuingAccount": request.kms.locality().root_arn(),
            "Operations": operations,
        });
        if let Some(retiring) = grant.retiring {
            entry["RetiringPrincipal"] = retiring.into();
        }
        if let Some(pairs) = grant.constraint.equals {
            entry["Constraints"]["EncryptionContextEquals"] = json!(pairs);
        }
        if let Some(pairs) = grant.constraint.subset {
            entry["Constraints"]["EncryptionContextSubset"] = json!(pairs);
        }
        entry
    })
}
