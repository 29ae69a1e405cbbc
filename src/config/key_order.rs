//! `key-order` in `sealblk.toml`: which KMS keys are asked first, where several wrap a data key.
//!
//! ```toml
//! key-order = [
//!     "eu-central-1",                                     # keys of AWS KMS in this region
//!     "arn:aws:kms:eu-west-1:111122223333:key/*",         # those of this account in another
//!     "arn:aws:kms:eu-west-3:111122223333:key/1234abcd-…",
//!     "embedded",                                         # keys of the embedded KMS
//!     "aws",                                              # keys of AWS KMS anywhere
//! ]
//! ```
//!
//! Here it is seen whether an entry can be one. What it means for a key, [`crate::kms::order`] tells.

use super::kms_keys::{ANY_KEY, MAX_LEN, PROVIDERS};
use crate::base::Result;
use crate::config::usage;
use std::fmt;

/// The list, perhaps empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyOrder(Vec<Place>);

/// One entry: keys that are asked before those of the entries after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Every key of the provider of this name.
    Provider(String),
    /// Every key of AWS KMS in this region.
    Region(String),
    /// Every key whose ARN begins so.
    Prefix(String),
    /// The key of this ARN.
    Key(String),
}

impl KeyOrder {
    /// # Errors
    /// `Usage` for what can be no entry, and for one that is there twice.
    pub(super) fn parse(written: Vec<String>) -> Result<Self> {
        for (n, text) in written.iter().enumerate() {
            if written[..n].contains(text) {
                return Err(usage(format!("key-order has {text:?} twice")));
            }
        }
        written.into_iter().map(Place::parse).collect::<Result<_>>().map(KeyOrder)
    }

    /// The entries, those first that are asked first.
    pub fn entries(&self) -> &[Place] {
        &self.0
    }
}

impl Place {
    fn parse(text: String) -> Result<Self> {
        let is_name = !text.is_empty() && text.len() <= MAX_LEN && text.bytes().all(|b| b.is_ascii_graphic());
        let is_arn = text.starts_with("arn:") && text.split(':').count() >= 6;
        if PROVIDERS.contains(&text.as_str()) {
            return Ok(Place::Provider(text));
        }
        if is_name && is_arn {
            return match text.strip_suffix('*') {
                Some(prefix) if text.ends_with(ANY_KEY) && !prefix.contains('*') => {
                    Ok(Place::Prefix(prefix.to_owned()))
                }
                None if text.contains(":key/") && !text.contains('*') => Ok(Place::Key(text)),
                _ => Err(refusal(&text)),
            };
        }
        // As every region of AWS's: eu-central-1, us-gov-west-1.
        let is_region = |text: &str| {
            let parts: Vec<&str> = text.split('-').collect();
            let is_word = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase());
            let (number, words) = (parts.last().copied().unwrap_or_default(), &parts[..parts.len() - 1]);
            text.len() <= 64
                && !words.is_empty()
                && words.iter().all(is_word)
                && !number.is_empty()
                && number.bytes().all(|b| b.is_ascii_digit())
        };
        if is_region(&text) { Ok(Place::Region(text)) } else { Err(refusal(&text)) }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Provider(text) | Place::Region(text) | Place::Key(text) => f.write_str(text),
            Place::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

fn refusal(text: &str) -> crate::base::Error {
    usage(format!(
        "key-order: {text:?} is no region, no provider and no key; write a region of AWS such as \
         \"eu-central-1\", \"embedded\", \"aws\", a key's ARN, or an ARN that ends with \":key/*\""
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Kind;

    #[test]
    fn entries_are_told_apart() {
        let arn = "arn:aws:kms:eu-west-1:111122223333:key/1";
        let written = ["eu-1", "us-gov-west-1", "embedded", "aws", arn, "arn:aws:kms:eu-1:1:key/*"];
        let order = KeyOrder::parse(written.map(String::from).to_vec()).unwrap();
        let expected = [
            Place::Region("eu-1".into()),
            Place::Region("us-gov-west-1".into()),
            Place::Provider("embedded".into()),
            Place::Provider("aws".into()),
            Place::Key(arn.into()),
            Place::Prefix("arn:aws:kms:eu-1:1:key/".into()),
        ];
        assert_eq!(order.entries(), expected);
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for text in ["", "*", "EU-1", "eu", "eu-", "-1", "eu--1", "alias/x", "arn:aws:kms:eu-1:1:alias/x"] {
            let e = KeyOrder::parse(vec![text.into()]).unwrap_err();
            assert!(e.kind() == Kind::Usage && e.to_string().contains(&format!("{text:?}")), "{text}: {e}");
        }
        for text in ["arn:aws:kms:eu-1:1:key/1*", "arn:aws:kms:*:1:key/*", "eu-1 ", "embedded:x"] {
            assert!(KeyOrder::parse(vec![text.into()]).is_err(), "{text}");
        }
        let e = KeyOrder::parse(vec!["aws".into(), "aws".into()]).unwrap_err();
        assert!(e.to_string().contains("twice"), "{e}");
    }
}
