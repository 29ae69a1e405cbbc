//! Grants as a provider makes them for an attach: one key, one context, Decrypt alone.
//!
//! The embedded KMS's own grants, with all their operations and constraints, are in
//! [`crate::kms::embedded::grants`].

use crate::kms::EncryptionContext;

/// A grant to be made: the grantee may decrypt what is bound to `context`, and retire the grant.
#[derive(Clone, Copy, Debug)]
pub struct GrantRequest<'a> {
    /// The key, as the provider takes it.
    pub key: &'a str,
    /// ARN of the principal that it is for, who may also retire it.
    pub grantee: &'a str,
    /// Decrypt is allowed under contexts that have these pairs.
    pub context: &'a EncryptionContext,
    /// A name of its own, 1..=256 of `[a-zA-Z0-9:/_-]`: the same request again is the same grant.
    pub name: &'a str,
}

/// A grant that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The key's ARN.
    pub key_id: String,
    /// The grant's id.
    pub id: String,
    /// Its token, known to whoever made it: good for a few minutes, until the whole KMS knows the grant.
    pub token: Option<String>,
}

/// A grant as the KMS lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedGrant {
    /// The grant's id.
    pub id: String,
    /// The name that it was made under, if it was made under one.
    pub name: Option<String>,
}
