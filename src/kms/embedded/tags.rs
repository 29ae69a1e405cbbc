//! Tags and policies: what is written down about a key. Neither decides who may do what; policies are
//! checked for their form only.

use crate::kms::embedded::Embedded;
use crate::kms::embedded::audit::Call;
use crate::kms::embedded::records::KeyEntry;
use crate::kms::{Exception, KmsError};
use serde_json::Value;
use std::collections::BTreeMap;

/// Tags of one key.
pub const TAGS_MAX: usize = 50;
/// Bytes of a policy.
pub const POLICY_MAX: usize = 32 * 1024;
/// The one name that a policy can have.
pub const POLICY_NAME: &str = "default";

impl Embedded {
    /// TagResource: adds tags, or gives them new values.
    pub fn tag(&self, key: &str, tags: &[(String, String)]) -> Result<(), KmsError> {
        let new = check_tags(tags)?;
        let change = |entry: &KeyEntry, _: &_| {
            entry.check_alive(&self.place)?;
            let mut tags = entry.tags.clone();
            tags.extend(new);
            check_count(&tags)?;
            Ok(KeyEntry { tags, ..entry.clone() })
        };
        let names: Vec<&str> = tags.iter().map(|(name, _)| &**name).collect();
        let call = Call::new("TagResource").on(key).with("tagKeys", names);
        self.record(call, self.change_key(key, change).map(drop))
    }

    /// UntagResource: removes tags; those that are not there are no error.
    pub fn untag(&self, key: &str, names: &[String]) -> Result<(), KmsError> {
        names.iter().try_for_each(|name| check_tag(name, ""))?;
        let change = |entry: &KeyEntry, _: &_| {
            entry.check_alive(&self.place)?;
            let mut tags = entry.tags.clone();
            tags.retain(|name, _| !names.contains(name));
            Ok(KeyEntry { tags, ..entry.clone() })
        };
        let call = Call::new("UntagResource").on(key).with("tagKeys", names);
        self.record(call, self.change_key(key, change).map(drop))
    }

    /// ListResourceTags, by name.
    pub fn tags(&self, key: &str) -> Result<BTreeMap<String, String>, KmsError> {
        self.current(|log| Ok(log.state().key(key, &self.place)?.tags.clone()))
    }

    /// PutKeyPolicy.
    pub fn put_policy(&self, key: &str, name: &str, policy: &str) -> Result<(), KmsError> {
        check_policy_name(name)?;
        check_policy(policy)?;
        let change = |entry: &KeyEntry, _: &_| {
            entry.check_alive(&self.place)?;
            Ok(KeyEntry { policy: Some(policy.to_owned()), ..entry.clone() })
        };
        let call = Call::new("PutKeyPolicy").on(key).with("policy", policy);
        self.record(call, self.change_key(key, change).map(drop))
    }

    /// GetKeyPolicy.
    pub fn policy(&self, key: &str, name: &str) -> Result<String, KmsError> {
        check_policy_name(name)?;
        self.current(|log| {
            let entry = log.state().key(key, &self.place)?;
            Ok(entry.policy.clone().unwrap_or_else(|| self.first_policy()))
        })
    }

    /// What a key is made with: the account may do everything.
    fn first_policy(&self) -> String {
        serde_json::json!({
            "Version": "2012-10-17",
            "Id": "key-default-1",
            "Statement": [{
                "Sid": "Enable IAM User Permissions",
                "Effect": "Allow",
                "Principal": { "AWS": self.place.root_arn() },
                "Action": "kms:*",
                "Resource": "*",
            }],
        })
        .to_string()
    }
}

/// The tags as they are kept; TagException, ValidationException or LimitExceededException for what cannot be.
pub fn check_tags(tags: &[(String, String)]) -> Result<BTreeMap<String, String>, KmsError> {
    tags.iter().try_for_each(|(name, value)| check_tag(name, value))?;
    let kept: BTreeMap<_, _> = tags.iter().cloned().collect();
    if kept.len() < tags.len() {
        return Err(KmsError::Other(Exception::Tag, "Duplicate tag keys".into()));
    }
    check_count(&kept)?;
    Ok(kept)
}

fn check_count(tags: &BTreeMap<String, String>) -> Result<(), KmsError> {
    if tags.len() <= TAGS_MAX {
        return Ok(());
    }
    Err(KmsError::Other(Exception::LimitExceeded, format!("A key can have at most {TAGS_MAX} tags.")))
}

fn check_tag(name: &str, value: &str) -> Result<(), KmsError> {
    let length = |text: &str, field: &str, relation: &str| {
        Err(KmsError::Validation(format!(
            "1 validation error detected: Value '{text}' at '{field}' failed to satisfy constraint: Member \
             must have length {relation}"
        )))
    };
    if name.is_empty() {
        return length(name, "tagKey", "greater than or equal to 1");
    }
    if name.chars().count() > 128 {
        return length(name, "tagKey", "less than or equal to 128");
    }
    if value.chars().count() > 256 {
        return length(value, "tagValue", "less than or equal to 256");
    }
    if name.to_ascii_lowercase().starts_with("aws:") {
        let message = "Tag keys that begin with \"aws:\" are reserved for system use";
        return Err(KmsError::Other(Exception::Tag, message.into()));
    }
    Ok(())
}

fn check_policy_name(name: &str) -> Result<(), KmsError> {
    if name == POLICY_NAME { Ok(()) } else { Err(KmsError::NotFound("No such policy exists".into())) }
}

/// Whether `policy` has the form of a key policy.
pub fn check_policy(policy: &str) -> Result<(), KmsError> {
    if policy.len() > POLICY_MAX {
        let message = format!("A key policy can have at most {POLICY_MAX} bytes.");
        return Err(KmsError::Other(Exception::LimitExceeded, message));
    }
    let malformed = |why: &str| Err(KmsError::Other(Exception::MalformedPolicyDocument, why.into()));
    let Ok(Value::Object(policy)) = serde_json::from_str(policy) else {
        return malformed("The policy is not a JSON object");
    };
    let version = policy.get("Version").map(|version| version.as_str());
    if !matches!(version, None | Some(Some("2012-10-17" | "2008-10-17"))) {
        return malformed("The policy's Version is not known");
    }
    let statements = match policy.get("Statement") {
        Some(Value::Array(statements)) if !statements.is_empty() => &statements[..],
        Some(statement @ Value::Object(_)) => std::slice::from_ref(statement),
        _ => return malformed("The policy has no Statement"),
    };
    let one_of = |statement: &Value, names: [&str; 2]| names.iter().any(|name| statement.get(name).is_some());
    for statement in statements {
        let effect = statement.get("Effect").and_then(Value::as_str);
        if !matches!(effect, Some("Allow" | "Deny"))
            || !one_of(statement, ["Principal", "NotPrincipal"])
            || !one_of(statement, ["Action", "NotAction"])
            || !one_of(statement, ["Resource", "NotResource"])
        {
            return malformed("A statement of the policy lacks Effect, Principal, Action or Resource");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_must_have_their_form() {
        let statement = r#"{"Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"}"#;
        for good in [
            format!(r#"{{"Statement":{statement}}}"#),
            format!(r#"{{"Version":"2012-10-17","Statement":[{statement}]}}"#),
        ] {
            assert_eq!(check_policy(&good), Ok(()));
        }
        let not_principal = statement.replace("Principal", "Somebody");
        for bad in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"Statement":[]}"#,
            r#"{"Statement":[{}]}"#,
            &format!(r#"{{"Version":"1","Statement":{statement}}}"#),
            &format!(r#"{{"Version":1,"Statement":{statement}}}"#),
            &format!(r#"{{"Statement":{}}}"#, statement.replace("Allow", "Maybe")),
            &format!(r#"{{"Statement":{not_principal}}}"#),
        ] {
            assert_eq!(
                check_policy(bad).unwrap_err().type_name(),
                "MalformedPolicyDocumentException",
                "{bad}"
            );
        }
        let long = format!(r#"{{"Id":"{}","Statement":{statement}}}"#, "x".repeat(POLICY_MAX));
        assert_eq!(check_policy(&long).unwrap_err().type_name(), "LimitExceededException");
    }
}
