//! Rotation, tags and policies.

use crate::kms::embedded::page::Page;
use crate::kms::embedded::records::RotationType;
use crate::kms::embedded::rotation::{DEFAULT_PERIOD, KeyVersion, PERIOD_DAYS};
use crate::kms::embedded::tags::POLICY_NAME;
use crate::kms::errors::out_of_range;
use crate::kms::key_ref::id_text;
use crate::kms::server::operations::{Answer, Request, keys, paged, seconds};
use crate::kms::server::wire::WireError;
use serde_json::{Value, json};

pub(super) fn enable_rotation(request: &Request<'_>) -> Answer {
    let key = request.admins_key("EnableKeyRotation")?;
    let days = request.fields.maybe_number("RotationPeriodInDays")?.unwrap_or(i64::from(DEFAULT_PERIOD));
    let range = i64::from(*PERIOD_DAYS.start())..=i64::from(*PERIOD_DAYS.end());
    let days = u32::try_from(days).map_err(|_| out_of_range(days, "rotationPeriodInDays", &range))?;
    request.kms.enable_rotation(key, days)?;
    Ok(Value::Null)
}

pub(super) fn disable_rotation(request: &Request<'_>) -> Answer {
    request.kms.disable_rotation(request.admins_key("DisableKeyRotation")?)?;
    Ok(Value::Null)
}

pub(super) fn rotation_status(request: &Request<'_>) -> Answer {
    let status = request.kms.rotation_status(request.admins_key("GetKeyRotationStatus")?)?;
    let mut answer = json!({ "KeyId": status.key, "KeyRotationEnabled": status.automatic.is_some() });
    if let Some((days, next)) = status.automatic {
        answer["RotationPeriodInDays"] = days.into();
        answer["NextRotationDate"] = seconds(next);
    }
    Ok(answer)
}

pub(super) fn rotate_on_demand(request: &Request<'_>) -> Answer {
    let key = request.admins_key("RotateKeyOnDemand")?;
    Ok(json!({ "KeyId": request.kms.rotate_on_demand(key)? }))
}

pub(super) fn list_rotations(request: &Request<'_>) -> Answer {
    let key = request.admins_key("ListKeyRotations")?;
    let which = ["ROTATIONS_ONLY", "ALL_KEY_MATERIAL"];
    let all = request.fields.one_of("IncludeKeyMaterial", &which, which[0])? == which[1];
    let id = id_text(request.kms.key(key)?.id);
    let versions = request.kms.versions(key)?.into_iter().enumerate();
    let versions = versions.filter(|(_, version)| all || version.rotation.is_some());
    let page = request.piece()?.of(versions, |(n, _)| format!("{n:08}"), 100)?;
    let rotation = |(_, version): (usize, KeyVersion)| {
        let state = if version.current { "CURRENT" } else { "NON_CURRENT" };
        let mut entry = json!({ "KeyId": id, "KeyMaterialId": version.material, "KeyMaterialState": state });
        if let Some(by) = version.rotation {
            let by = match by {
                RotationType::Automatic => "AUTOMATIC",
                RotationType::OnDemand => "ON_DEMAND",
            };
            entry["RotationType"] = by.into();
            entry["RotationDate"] = seconds(version.created);
        }
        entry
    };
    Ok(paged("Rotations", page, rotation))
}

pub(super) fn tag(request: &Request<'_>) -> Answer {
    let key = request.admins_key("TagResource")?;
    request.kms.tag(key, &keys::tags(&request.fields)?)?;
    Ok(Value::Null)
}

pub(super) fn untag(request: &Request<'_>) -> Answer {
    let key = request.admins_key("UntagResource")?;
    request.kms.untag(key, &request.fields.texts("TagKeys")?)?;
    Ok(Value::Null)
}

pub(super) fn list_tags(request: &Request<'_>) -> Answer {
    let tags = request.kms.tags(request.admins_key("ListResourceTags")?)?;
    let page = request.piece()?.of(tags, |(name, _)| name.clone(), 50)?;
    Ok(paged("Tags", page, |(name, value)| json!({ "TagKey": name, "TagValue": value })))
}

pub(super) fn policy(request: &Request<'_>) -> Answer {
    let key = request.admins_key("GetKeyPolicy")?;
    let name = policy_name(request)?;
    Ok(json!({ "Policy": request.kms.policy(key, name)?, "PolicyName": name }))
}

pub(super) fn put_policy(request: &Request<'_>) -> Answer {
    let key = request.admins_key("PutKeyPolicy")?;
    request.kms.put_policy(key, policy_name(request)?, request.fields.text("Policy")?)?;
    Ok(Value::Null)
}

pub(super) fn list_policies(request: &Request<'_>) -> Answer {
    request.kms.key(request.admins_key("ListKeyPolicies")?)?;
    let page: Page<&str> = request.piece()?.of([POLICY_NAME], |name| (*name).to_owned(), 100)?;
    Ok(paged("PolicyNames", page, Value::from))
}

fn policy_name<'a>(request: &'a Request<'_>) -> Result<&'a str, WireError> {
    Ok(request.fields.maybe_text("PolicyName")?.unwrap_or(POLICY_NAME))
}
