//! Grants as the log has them.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Lets a principal do something with a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantEntry {
    /// The key that it is about.
    pub key: Uuid,
    /// Its id: 64 hex digits.
    pub id: String,
    /// The name that was given to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// ARN of the principal that it is for.
    pub grantee: String,
    /// ARN of the principal that may retire it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retiring: Option<String>,
    /// ARN of the principal that made it.
    pub issuer: String,
    /// What it lets the grantee do: without doubles, in a fixed order.
    pub operations: Vec<GrantOperation>,
    /// The contexts that it is good for.
    #[serde(default, skip_serializing_if = "Constraint::is_none")]
    pub constraint: Constraint,
}

/// What a grant asks of the encryption context; both, where both are there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constraint {
    /// The context must be these pairs, and no others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<BTreeMap<String, String>>,
    /// The context must have these pairs, and may have others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subset: Option<BTreeMap<String, String>>,
}

/// What a grant can let somebody do. The names are those of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum GrantOperation {
    /// Decrypt.
    Decrypt,
    /// Encrypt.
    Encrypt,
    /// GenerateDataKey.
    GenerateDataKey,
    /// GenerateDataKeyWithoutPlaintext.
    GenerateDataKeyWithoutPlaintext,
    /// ReEncrypt, for the key that the ciphertext is under.
    ReEncryptFrom,
    /// ReEncrypt, for the key that it is to be under.
    ReEncryptTo,
    /// CreateGrant, for no more than the grant itself allows.
    CreateGrant,
    /// RetireGrant.
    RetireGrant,
    /// DescribeKey.
    DescribeKey,
}

/// Names a grant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantName {
    /// Its key.
    pub key: Uuid,
    /// Its id.
    pub id: String,
}

impl Constraint {
    /// Whether it asks nothing.
    pub fn is_none(&self) -> bool {
        self.equals.is_none() && self.subset.is_none()
    }

    /// Whether a context of these pairs is good.
    pub fn allows(&self, context: &BTreeMap<String, String>) -> bool {
        self.equals.as_ref().is_none_or(|pairs| pairs == context)
            && self.subset.as_ref().is_none_or(|pairs| contains(context, pairs))
    }

    /// Whether every context that is good for `self` is good for `wider`.
    pub fn is_within(&self, wider: &Constraint) -> bool {
        let pairs = self.equals.as_ref();
        wider.equals.as_ref().is_none_or(|all| pairs == Some(all))
            && wider.subset.as_ref().is_none_or(|some| {
                [&self.equals, &self.subset].into_iter().flatten().any(|mine| contains(mine, some))
            })
    }
}

impl GrantOperation {
    /// All of them, with their names on the wire.
    pub const ALL: [(GrantOperation, &'static str); 9] = [
        (GrantOperation::Decrypt, "Decrypt"),
        (GrantOperation::Encrypt, "Encrypt"),
        (GrantOperation::GenerateDataKey, "GenerateDataKey"),
        (GrantOperation::GenerateDataKeyWithoutPlaintext, "GenerateDataKeyWithoutPlaintext"),
        (GrantOperation::ReEncryptFrom, "ReEncryptFrom"),
        (GrantOperation::ReEncryptTo, "ReEncryptTo"),
        (GrantOperation::CreateGrant, "CreateGrant"),
        (GrantOperation::RetireGrant, "RetireGrant"),
        (GrantOperation::DescribeKey, "DescribeKey"),
    ];

    /// The operation of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(operation, _)| *operation)
    }

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(known, _)| *known == self).map_or("", |(_, name)| name)
    }

    /// Whether it presents an encryption context, so that a constraint can say something about it.
    pub fn has_context(self) -> bool {
        !matches!(
            self,
            GrantOperation::CreateGrant | GrantOperation::RetireGrant | GrantOperation::DescribeKey
        )
    }
}

fn contains(whole: &BTreeMap<String, String>, part: &BTreeMap<String, String>) -> bool {
    part.iter().all(|(key, value)| whole.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> BTreeMap<String, String> {
        let pair = |p: &str| p.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        text.split_whitespace().filter_map(pair).collect()
    }

    fn equals(text: &str) -> Constraint {
        Constraint { equals: Some(pairs(text)), subset: None }
    }

    fn subset(text: &str) -> Constraint {
        Constraint { equals: None, subset: Some(pairs(text)) }
    }

    #[test]
    fn a_subset_allows_further_pairs_and_equality_does_not() {
        for (constraint, context, good) in [
            (subset("a=1"), "a=1", true),
            (subset("a=1"), "a=1 b=2", true),
            (subset("a=1"), "b=2", false),
            (subset("a=1"), "A=1", false),
            (subset("a=1"), "", false),
            (equals("a=1"), "a=1", true),
            (equals("a=1"), "a=1 b=2", false),
            (equals("a=1"), "", false),
            (Constraint::default(), "", true),
        ] {
            assert_eq!(constraint.allows(&pairs(context)), good, "{constraint:?} {context}");
        }
    }

    #[test]
    fn a_grant_of_a_grant_may_be_narrower_and_not_wider() {
        for (child, parent, within) in [
            (subset("a=1 b=2"), subset("a=1"), true),
            (equals("a=1 b=2"), subset("a=1"), true),
            (subset("b=2"), subset("a=1"), false),
            (Constraint::default(), subset("a=1"), false),
            (subset("a=1"), equals("a=1"), false),
            (equals("a=1"), equals("a=1"), true),
            (equals("a=1 b=2"), equals("a=1"), false),
            (subset("a=1"), Constraint::default(), true),
        ] {
            assert_eq!(child.is_within(&parent), within, "{child:?} of {parent:?}");
        }
    }

    #[test]
    fn names_are_those_of_the_wire() {
        for (operation, name) in GrantOperation::ALL {
            assert_eq!(GrantOperation::named(name), Some(operation));
            assert_eq!(operation.name(), name);
            assert_eq!(serde_json::to_value(operation).unwrap(), name);
        }
        assert_eq!(GrantOperation::named("Sign"), None);
    }
}
