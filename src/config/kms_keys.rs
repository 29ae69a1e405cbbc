//! `kms-keys` in `sealblk.toml`: which KMS keys may wrap and unwrap data keys.
//!
//! ```toml
//! kms-keys = [
//!     "embedded",                                         # every key of the embedded KMS
//!     "alias/prod",                                       # one of them, by alias, id or ARN
//!     "arn:aws:kms:eu-1:111122223333:key/1234abcd-…",     # one key of AWS KMS
//!     "arn:aws:kms:eu-1:111122223333:key/*",              # every key of this account in this region
//!     "aws:alias/volumes",                                # what this alias means when a key is used
//!     "aws",                                              # every key of AWS KMS, whosever account it is in
//! ]
//! ```
//!
//! Here it is seen whether an entry can be one. What it means, the KMSs tell ([`crate::config`] knows none).

use crate::base::{Error, Result};
use crate::config::usage;
use std::fmt;

/// The list; without one, every key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KmsKeys(Option<Vec<Entry>>);

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Every key of the provider of this name.
    Provider(String),
    /// Every key whose reference is this ARN with a key's id in place of the `*` at its end.
    Place(String),
    /// The key of this reference.
    Key(String),
}

/// The names of the providers.
pub(super) const PROVIDERS: [&str; 2] = ["embedded", "aws"];
/// The end of the ARN of every key in a place.
pub(super) const ANY_KEY: &str = ":key/*";
/// The longest entry in bytes.
pub(super) const MAX_LEN: usize = 2048;

impl KmsKeys {
    /// # Errors
    /// `Usage` for what cannot name a key, and for no entry at all.
    pub(super) fn parse(written: Vec<String>) -> Result<Self> {
        if written.is_empty() {
            return Err(usage("kms-keys is empty: no key could be used; leave it out to allow every key"));
        }
        written.into_iter().map(Entry::try_from).collect::<Result<_>>().map(|entries| KmsKeys(Some(entries)))
    }

    /// The entries; none where every key is allowed.
    pub fn entries(&self) -> Option<&[Entry]> {
        self.0.as_deref()
    }
}

/// `also-keys` in `sealblk.toml`: the KMS keys that wrap every new data key besides, by their references.
///
/// # Errors
/// `Usage` for what cannot name one key, and for one that is there twice.
pub(super) fn parse_also(written: Vec<String>) -> Result<Vec<String>> {
    for (n, text) in written.iter().enumerate() {
        if written[..n].contains(text) {
            return Err(usage(format!("also-keys has {text:?} twice")));
        }
        if !matches!(Entry::try_from(text.clone()), Ok(Entry::Key(_))) {
            return Err(usage(format!(
                "also-keys: {text:?} names no key; write \"alias/NAME\", a key's id or ARN, or \
                 \"aws:alias/NAME\""
            )));
        }
    }
    Ok(written)
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Entry::Provider(text) | Entry::Place(text) | Entry::Key(text)) = self;
        f.write_str(text)
    }
}

impl TryFrom<String> for Entry {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        if PROVIDERS.contains(&text.as_str()) {
            return Ok(Entry::Provider(text));
        }
        let key =
            PROVIDERS.iter().find_map(|name| text.strip_prefix(name)?.strip_prefix(':')).unwrap_or(&text);
        let is_arn = key.starts_with("arn:") && key.split(':').count() >= 6;
        let is_name = !key.is_empty() && key.len() <= MAX_LEN && key.bytes().all(|b| b.is_ascii_graphic());
        if is_name && is_arn && key.ends_with(ANY_KEY) {
            return Ok(Entry::Place(text));
        }
        if is_name && !key.contains('*') && (is_arn || key.starts_with("alias/") || is_id(key)) {
            return Ok(Entry::Key(text));
        }
        Err(usage(format!(
            "kms-keys: {text:?} names no key; write \"embedded\", \"alias/NAME\", a key's id or ARN, an ARN \
             that ends with \":key/*\", \"aws:alias/NAME\" or \"aws\""
        )))
    }
}

/// Whether it is a key's id, as the embedded KMS or AWS writes it: `mrk-…` is of a multi-Region key.
fn is_id(key: &str) -> bool {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    match key.strip_prefix("mrk-") {
        Some(rest) => rest.len() == 32 && digits(rest),
        None => key.len() == 36 && digits(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Kind;

    #[test]
    fn entries_are_told_apart() {
        let id = "1234abcd-12ab-34cd-56ef-1234567890ab";
        let arn = format!("arn:aws:kms:eu-1:111122223333:key/{id}");
        let every = "arn:aws:kms:eu-1:111122223333:key/*";
        for text in [
            "alias/prod",
            id,
            &arn,
            "aws:alias/x",
            "embedded:alias/x",
            &format!("aws:{arn}"),
            "aws:mrk-1234abcd12ab34cd56ef1234567890ab",
        ] {
            assert_eq!(Entry::try_from(text.to_string()).unwrap(), Entry::Key(text.into()), "{text}");
        }
        for text in ["aws", "embedded"] {
            assert_eq!(Entry::try_from(text.to_string()).unwrap(), Entry::Provider(text.into()));
        }
        for text in [every, &format!("aws:{every}")] {
            assert_eq!(Entry::try_from(text.to_string()).unwrap(), Entry::Place(text.into()));
        }
    }

    #[test]
    fn what_names_no_key_is_refused() {
        assert_eq!(KmsKeys::parse(vec![]).unwrap_err().kind(), Kind::Usage);
        for text in [
            "",
            "*",
            "aws:",
            "aws:*",
            "AWS",
            "vault",
            "alais/x",
            "alias/*",
            "arn:aws:kms:eu-1:1:key/12*",
            "arn:x",
            "alias/a b",
        ] {
            let e = KmsKeys::parse(vec![text.into()]).unwrap_err();
            assert!(e.kind() == Kind::Usage && e.to_string().contains(&format!("{text:?}")), "{text}: {e}");
        }
    }
}
