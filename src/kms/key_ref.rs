//! How people name KMS keys: ids, ARNs, aliases, and which provider is meant.
//!
//! Pure: it parses names and makes names, it does not know which keys exist.

use crate::base::Error;
pub use crate::base::Locality;
use crate::kms::KmsError;
use std::fmt;
use uuid::{Builder, Uuid, Variant};

/// The longest alias name, `alias/` included.
pub const ALIAS_MAX: usize = 256;

/// What every alias name begins with.
pub const ALIAS_PREFIX: &str = "alias/";

/// What the alias names begin with that the KMS keeps for itself.
pub const RESERVED_ALIAS_PREFIX: &str = "alias/aws/";

/// The alias of the default key.
pub const DEFAULT_KEY_ALIAS: &str = crate::config::DEFAULT_KEY;

/// One key or alias of a KMS at a known [`Locality`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyName {
    /// A key by its id.
    Id(Uuid),
    /// An alias by its whole name, `alias/` included.
    Alias(String),
}

/// What the ids of multi-Region keys begin with.
const MULTI_REGION_PREFIX: &str = "mrk-";

/// The version of UUIDs that the ids of multi-Region keys are: one that is left to whoever makes them.
const MULTI_REGION_VERSION: usize = 8;

/// A new id of a multi-Region key, of these random bytes. Its 16 bytes tell what it is: all other ids are
/// UUIDs of another version.
pub fn multi_region_id(random: [u8; 16]) -> Uuid {
    Builder::from_custom_bytes(random).into_uuid()
}

/// Whether a key of this id can be in several regions, under the same id.
pub fn is_multi_region(id: Uuid) -> bool {
    id.get_version_num() == MULTI_REGION_VERSION && id.get_variant() == Variant::RFC4122
}

/// A key's id as people write it: of a multi-Region key `mrk-` and 32 hexadecimal digits, of others as UUIDs
/// are written.
pub fn id_text(id: Uuid) -> String {
    match is_multi_region(id) {
        true => format!("{MULTI_REGION_PREFIX}{}", id.simple()),
        false => id.to_string(),
    }
}

impl Locality {
    /// `arn:aws:kms:<region>:<account>:key/<id>`.
    pub fn key_arn(&self, id: Uuid) -> String {
        format!("arn:aws:kms:{}:{}:key/{}", self.region, self.account, id_text(id))
    }

    /// The same account in another region.
    pub fn in_region(&self, region: &str) -> Self {
        Locality { region: region.to_owned(), account: self.account.clone() }
    }

    /// `arn:aws:kms:<region>:<account>:<name>`, for a name that begins with `alias/`.
    pub fn alias_arn(&self, name: &str) -> String {
        format!("arn:aws:kms:{}:{}:{name}", self.region, self.account)
    }

    /// `arn:aws:iam::<account>:root`, the root principal.
    pub fn root_arn(&self) -> String {
        format!("arn:aws:iam::{}:root", self.account)
    }

    /// `arn:aws:iam::<account>:user/<name>`, a named principal.
    pub fn user_arn(&self, name: &str) -> String {
        format!("arn:aws:iam::{}:user/{name}", self.account)
    }

    /// Parses a key argument: an id, a key ARN, an alias name or an alias ARN of this place.
    ///
    /// Fails with NotFound, in AWS's words, for what is malformed or lies elsewhere.
    pub fn parse(&self, text: &str) -> Result<KeyName, KmsError> {
        let resource = match Arn::split(text) {
            None => return key_name(text, false).ok_or_else(|| invalid(text)),
            Some(arn) if arn.region != self.region => {
                return Err(KmsError::NotFound(format!("Invalid arn {}", arn.region)));
            }
            Some(arn) => {
                let name = key_name(arn.resource, true).ok_or_else(|| invalid(text))?;
                if arn.account == self.account {
                    return Ok(name);
                }
                name
            }
        };
        Err(match resource {
            KeyName::Id(_) => KmsError::NotFound(format!("Key '{text}' does not exist")),
            KeyName::Alias(_) => KmsError::NotFound(format!("Alias {text} is not found.")),
        })
    }
}

fn invalid(text: &str) -> KmsError {
    KmsError::NotFound(format!("Invalid keyId '{text}'"))
}

/// An id or alias; in an ARN an id stands behind `key/`.
fn key_name(text: &str, in_arn: bool) -> Option<KeyName> {
    if is_alias(text) {
        return Some(KeyName::Alias(text.to_owned()));
    }
    let id = if in_arn { text.strip_prefix("key/")? } else { text };
    parse_id(id).map(KeyName::Id)
}

/// A key id in its one spelling. Others would be two names for one key.
fn parse_id(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text.strip_prefix(MULTI_REGION_PREFIX).unwrap_or(text)).ok()?;
    (id_text(id) == text).then_some(id)
}

/// Whether `name` is `alias/` and at least one of `[a-zA-Z0-9:/_-]`, at most [`ALIAS_MAX`] in all.
pub fn is_alias(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b":/_-".contains(&b);
    name.len() <= ALIAS_MAX
        && name.strip_prefix(ALIAS_PREFIX).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(allowed))
}

/// A key of the embedded KMS as it means the key wherever the KMS is said to be: an id in place of a key ARN.
/// The ARNs in records have the region and the account that the settings had when they were written.
pub fn anywhere(key: &str) -> &str {
    let id = Arn::split(key).and_then(|arn| arn.resource.strip_prefix("key/"));
    id.filter(|id| parse_id(id).is_some()).unwrap_or(key)
}

/// Whether two names that the provider of this name has given keys are one key's.
pub fn is_same_key(provider: &str, one: &str, other: &str) -> bool {
    one == other || (provider == ProviderName::Embedded.as_str() && anywhere(one) == anywhere(other))
}

/// The region that an ARN of a KMS names; `None` for what is no such ARN.
pub fn arn_region(text: &str) -> Option<&str> {
    Arn::split(text).map(|arn| arn.region).filter(|region| !region.is_empty())
}

/// The account that an ARN of a KMS names; `None` for what is no such ARN.
pub fn arn_account(text: &str) -> Option<&str> {
    Arn::split(text).map(|arn| arn.account).filter(|account| !account.is_empty())
}

/// The key of AWS KMS in `region` that is related to the one of this ARN: the same multi-Region key there.
/// `None` for a key that is in one region alone, and for what is no key's ARN.
pub fn related_arn(arn: &str, region: &str) -> Option<String> {
    let parts = Arn::split(arn)?;
    let partition = arn.split(':').nth(1)?;
    let is_related = parts.resource.strip_prefix("key/")?.starts_with(MULTI_REGION_PREFIX);
    is_related.then(|| format!("arn:{partition}:kms:{region}:{}:{}", parts.account, parts.resource))
}

/// An ARN of a KMS, cut into its parts. The resource may hold colons.
struct Arn<'a> {
    region: &'a str,
    account: &'a str,
    resource: &'a str,
}

impl<'a> Arn<'a> {
    /// `None` if `text` is not an ARN of the service `kms`.
    fn split(text: &'a str) -> Option<Self> {
        let mut parts = text.splitn(6, ':');
        let arn = parts.next()?;
        let (partition, service) = (parts.next()?, parts.next()?);
        let (region, account, resource) = (parts.next()?, parts.next()?, parts.next()?);
        let of_kms = arn == "arn" && partition.starts_with("aws") && service == "kms";
        of_kms.then_some(Arn { region, account, resource })
    }
}

/// Which provider a key reference means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProviderName {
    /// The KMS in the store's own folder.
    Embedded,
    /// AWS KMS.
    Aws,
}

impl ProviderName {
    /// The name in volume metadata and before the colon of a reference.
    pub fn as_str(self) -> &'static str {
        match self {
            ProviderName::Embedded => "embedded",
            ProviderName::Aws => "aws",
        }
    }
}

/// What `--key` says: a provider, and a key in that provider's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRef {
    /// Whose key it is.
    pub provider: ProviderName,
    /// The `key` argument for that provider.
    pub key: String,
}

impl KeyRef {
    /// Parses `[embedded:]KEY`, `aws:KEY` or an ARN, where the embedded KMS is at `here`.
    ///
    /// An ARN with another region or account than `here` means AWS; one of this place is a key of the
    /// embedded KMS, unless the settings have given that the account of somebody at AWS: then it has
    /// to be said which, or looked up ([`KeyRef::parse_by`]). For the embedded KMS the key's form is
    /// checked; AWS checks its own. Fails with NotFound or Validation.
    pub fn parse(text: &str, here: &Locality) -> Result<Self, KmsError> {
        Self::parse_by(text, here, |_| Ok(None))
    }

    /// As [`KeyRef::parse`]. Where the ARN of a key has the place of both the embedded KMS and an account at
    /// AWS, `has` tells whether the embedded KMS has a key of this id: ids are random, and so nobody else's.
    /// If it has not, the key is AWS's. Where it returns nothing, nobody knows.
    ///
    /// # Errors
    /// As [`KeyRef::parse`]; what `has` says.
    pub fn parse_by(
        text: &str,
        here: &Locality,
        has: impl FnOnce(Uuid) -> Result<Option<bool>, KmsError>,
    ) -> Result<Self, KmsError> {
        if let Some(key) = text.strip_prefix("aws:") {
            return KeyRef::aws(key);
        }
        let (key, prefixed) = match text.strip_prefix("embedded:") {
            Some(key) => (key, true),
            None => (text, false),
        };
        match Arn::split(key) {
            Some(arn) if !prefixed && (arn.region != here.region || arn.account != here.account) => {
                KeyRef::aws(key)
            }
            // Whoever makes the account theirs has keys of both kinds with such ARNs.
            Some(_) if !prefixed && here.account != Locality::default().account => {
                let known = match here.parse(key) {
                    Ok(KeyName::Id(id)) => has(id)?,
                    // What an alias is called, both can have chosen. An id that is none here is AWS's.
                    Ok(KeyName::Alias(_)) => None,
                    Err(_) => return KeyRef::aws(key),
                };
                match known {
                    Some(true) => {
                        return Ok(KeyRef { provider: ProviderName::Embedded, key: key.to_owned() });
                    }
                    Some(false) => return KeyRef::aws(key),
                    None => {}
                }
                Err(KmsError::Validation(format!(
                    "{key} can be a key of AWS KMS, or one of the embedded KMS, which the settings (account, \
                     region) have given the same place: write \"aws:{key}\" or \"embedded:{key}\""
                )))
            }
            _ => {
                here.parse(key)?;
                Ok(KeyRef { provider: ProviderName::Embedded, key: key.to_owned() })
            }
        }
    }

    /// As [`KeyRef::parse`], with what to do for the operator who wrote it: only names in the embedded
    /// KMS can be unknown so soon.
    ///
    /// # Errors
    /// NotFound or Usage.
    pub fn of_operator(text: &str, here: &Locality) -> Result<Self, Error> {
        Self::parse(text, here).map_err(|e| advised(e, text))
    }

    /// The key `key` of the provider of that name; `None` if this version has no such provider.
    pub fn of_provider(name: &str, key: &str) -> Option<Self> {
        let all = [ProviderName::Embedded, ProviderName::Aws];
        let provider = all.into_iter().find(|provider| provider.as_str() == name)?;
        Some(KeyRef { provider, key: key.to_owned() })
    }

    /// As [`KeyRef::parse_by`], with what to do for the operator who wrote it.
    ///
    /// # Errors
    /// As [`KeyRef::of_operator`].
    pub fn of_operator_by(
        text: &str,
        here: &Locality,
        has: impl FnOnce(Uuid) -> Result<Option<bool>, KmsError>,
    ) -> Result<Self, Error> {
        Self::parse_by(text, here, has).map_err(|e| advised(e, text))
    }

    fn aws(key: &str) -> Result<Self, KmsError> {
        if key.is_empty() || key.len() > 2048 || !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(KmsError::Validation(
                "\"aws:\" must be followed by a key id, a key ARN, an alias name or an alias ARN".into(),
            ));
        }
        Ok(KeyRef { provider: ProviderName::Aws, key: key.to_owned() })
    }
}

fn advised(e: KmsError, text: &str) -> Error {
    e.with_advice_of(ProviderName::Embedded.as_str(), text)
}

impl fmt::Display for KeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.provider.as_str(), self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "1234abcd-12ab-44cd-92ef-1234567890ab";

    fn parse(text: &str) -> Result<KeyRef, KmsError> {
        KeyRef::parse(text, &Locality::default())
    }

    #[test]
    fn references_without_a_prefix_mean_the_embedded_kms() {
        let arn = format!("arn:aws:kms:us-east-1:000000000000:key/{ID}");
        let alias_arn = "arn:aws:kms:us-east-1:000000000000:alias/a:b";
        for text in [ID, &arn, "alias/team/disks", alias_arn] {
            let bare = parse(text).unwrap();
            assert_eq!(bare, KeyRef { provider: ProviderName::Embedded, key: text.into() });
            assert_eq!(parse(&format!("embedded:{text}")).unwrap(), bare);
            assert_eq!(parse(&bare.to_string()).unwrap(), bare);
        }
    }

    #[test]
    fn foreign_arns_and_the_prefix_mean_aws() {
        for text in [
            format!("arn:aws:kms:eu-west-1:000000000000:key/{ID}"),
            format!("arn:aws:kms:us-east-1:111122223333:key/mrk-{ID}"),
            "arn:aws-cn:kms:cn-north-1:111122223333:alias/x".into(),
        ] {
            let reference = parse(&text).unwrap();
            assert_eq!((reference.provider, reference.key.as_str()), (ProviderName::Aws, text.as_str()));
            assert_eq!(parse(&reference.to_string()).unwrap(), reference);
        }
        assert_eq!(parse("aws:alias/x").unwrap().provider, ProviderName::Aws);
        assert!(matches!(parse("aws:"), Err(KmsError::Validation(_))));
        assert!(matches!(parse("aws:a b"), Err(KmsError::Validation(_))));
    }

    #[test]
    fn an_arn_that_both_could_have_is_whose_key_it_is() {
        let here = Locality { region: "eu-west-1".into(), account: "111122223333".into() };
        let arn = format!("arn:aws:kms:eu-west-1:111122223333:key/{ID}");
        let by = |text: &str, known: Option<bool>| KeyRef::parse_by(text, &here, |_| Ok(known));
        assert_eq!(by(&arn, Some(true)).unwrap().provider, ProviderName::Embedded);
        assert_eq!(by(&arn, Some(false)).unwrap().provider, ProviderName::Aws);
        let alias = "arn:aws:kms:eu-west-1:111122223333:alias/x";
        for (text, known) in [(&*arn, None), (alias, None), (alias, Some(true)), (alias, Some(false))] {
            let e = by(text, known).unwrap_err();
            assert!(
                matches!(&e, KmsError::Validation(words) if words.contains("write \"aws:")),
                "{text}: {e}"
            );
        }
        // Ids of AWS's multi-Region keys are any digits; ours are some of them, and looked
        // for like any other.
        let multi = |id: &str| format!("arn:aws:kms:eu-west-1:111122223333:key/mrk-{id}");
        let never_ours = multi("1234abcd12ab44cd92ef1234567890ab");
        assert_eq!(by(&never_ours, None).unwrap().provider, ProviderName::Aws);
        let perhaps = multi("1234abcd12ab84cd92ef1234567890ab");
        assert!(by(&perhaps, None).is_err());
        assert_eq!(by(&perhaps, Some(false)).unwrap().provider, ProviderName::Aws);
        assert_eq!(by(&perhaps, Some(true)).unwrap().provider, ProviderName::Embedded);
        for prefixed in ["aws", "embedded"] {
            assert_eq!(
                by(&format!("{prefixed}:{arn}"), Some(prefixed == "aws")).unwrap().provider.as_str(),
                prefixed
            );
        }
        // Without an account of one's own there is nobody at AWS who could have it.
        let nobody = |_| -> Result<Option<bool>, KmsError> { unreachable!("nobody is asked") };
        let default = format!("arn:aws:kms:us-east-1:000000000000:key/{ID}");
        let reference = KeyRef::parse_by(&default, &Locality::default(), nobody).unwrap();
        assert_eq!(reference.provider, ProviderName::Embedded);
    }

    #[test]
    fn malformed_and_foreign_names_are_refused_in_aws_words() {
        let upper = ID.to_uppercase();
        let simple = ID.replace('-', "");
        for text in ["", "x", "alias/", "alias/ä", &upper, &simple, "arn:aws:kms:us-east-1:000000000000:x/y"]
        {
            let error = Locality::default().parse(text).unwrap_err();
            assert_eq!(error, KmsError::NotFound(format!("Invalid keyId '{text}'")));
        }
        let elsewhere = format!("embedded:arn:aws:kms:eu-west-1:000000000000:key/{ID}");
        assert_eq!(parse(&elsewhere), Err(KmsError::NotFound("Invalid arn eu-west-1".into())));
        let other = format!("arn:aws:kms:us-east-1:111122223333:key/{ID}");
        let error = Locality::default().parse(&other).unwrap_err();
        assert_eq!(error, KmsError::NotFound(format!("Key '{other}' does not exist")));
    }

    #[test]
    fn an_id_tells_whether_its_key_can_be_in_several_regions() {
        let multi = multi_region_id([0xab; 16]);
        let text = id_text(multi);
        assert_eq!((text.len(), &text[..4]), (36, "mrk-"));
        let here = Locality::default();
        assert_eq!(here.parse(&text).unwrap(), KeyName::Id(multi));
        assert_eq!(here.parse(&here.key_arn(multi)).unwrap(), KeyName::Id(multi));
        let single = Uuid::new_v4();
        assert!(is_multi_region(multi) && !is_multi_region(single));
        // No key has two names.
        for other in [multi.to_string(), format!("mrk-{}", single.simple()), text.to_uppercase()] {
            assert!(here.parse(&other).is_err(), "{other}");
        }
        assert_eq!(anywhere(&here.in_region("eu-west-1").key_arn(multi)), text);
    }

    #[test]
    fn only_a_multi_region_key_is_related_to_one_in_another_region() {
        let arn = |region: &str, id: &str| format!("arn:aws-cn:kms:{region}:111122223333:key/{id}");
        let multi = "mrk-1234abcd12ab44cd92ef1234567890ab";
        assert_eq!(related_arn(&arn("cn-north-1", multi), "cn-x"), Some(arn("cn-x", multi)));
        for other in [&arn("cn-north-1", ID), "arn:aws:kms:r:1:alias/mrk-x", "mrk-1", multi] {
            assert_eq!(related_arn(other, "r"), None, "{other}");
        }
    }

    #[test]
    fn an_arn_tells_its_region() {
        assert_eq!(
            arn_region(&format!("arn:aws-cn:kms:cn-north-1:111122223333:key/{ID}")),
            Some("cn-north-1")
        );
        for text in ["alias/arn:aws", ID, "arn:aws:kms::1:key/x", "arn:aws:s3:us-east-1:1:key/x"] {
            assert_eq!(arn_region(text), None, "{text}");
        }
    }

    #[test]
    fn aliases_have_a_charset_and_a_length() {
        let longest = format!("alias/{}", "a".repeat(250));
        assert!(is_alias(&longest) && !is_alias(&format!("{longest}a")));
        assert!(is_alias("alias/a-b_c/d:e9") && !is_alias("alias/a b") && !is_alias("Alias/a"));
    }
}
