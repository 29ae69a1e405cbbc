//! `sealblk.toml`, the settings of a store: what is written (serde) into what is meant.
//!
//! ```toml
//! default-key = "alias/aws/ebs"    # the KMS key of volumes made without --key
//! encrypt-by-default = false       # true: no unencrypted volume can be made
//! region = "us-east-1"             # in events and in the ARNs of the embedded KMS
//! account = "000000000000"         # likewise, 12 digits
//! kms-patience = 60                # seconds for which a KMS that cannot be reached is asked again
//! attach-grants = true             # each attach makes a grant, and retires it at detach
//! grantee-principal = "arn:aws:…"  # whose grants at AWS KMS: the principal of this host
//! ```
//!
//! and `[[event-sink]]` tables ([`sinks`]).
#![forbid(unsafe_code)]

pub mod edit;
pub mod sinks;

use crate::base::root::{Root, files};
use crate::base::{Context, Error, Kind, Locality, Result};
use serde::Deserialize;
use std::time::Duration;

/// The most that `kms-patience` may be, seconds.
const PATIENCE_MAX: u64 = 3600;

/// The longest settings in bytes.
const MAX_LEN: u64 = 1 << 20;

/// The alias of the key that is made at first use, when neither the command nor the settings name one.
pub const DEFAULT_KEY: &str = "alias/aws/ebs";

/// The settings of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The KMS key, as its provider takes it, of volumes that are made without `--key`.
    pub default_key: String,
    /// Whether making an unencrypted volume is refused, as EBS's encryption by default does.
    pub encrypt_by_default: bool,
    /// Where the embedded KMS and the store's events say that they are.
    pub locality: Locality,
    /// For how long a KMS that cannot be reached, or is overloaded, is asked again; at most an hour.
    pub kms_patience: Duration,
    /// Whether an attach makes a grant for itself, where the KMS has grants and knows for whom.
    pub attach_grants: bool,
    /// The ARN of the principal as which this host asks AWS KMS; the grants are made for it.
    pub grantee_principal: Option<String>,
    /// To whom events are delivered.
    pub event_sinks: Vec<sinks::Sink>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            default_key: DEFAULT_KEY.into(),
            encrypt_by_default: false,
            locality: Locality::default(),
            kms_patience: Duration::from_secs(60),
            attach_grants: true,
            grantee_principal: None,
            event_sinks: Vec::new(),
        }
    }
}

impl Settings {
    /// Reads the settings of the store at `root`; a file that is not there means the defaults.
    ///
    /// # Errors
    /// `Usage`, naming the file and the line, for what cannot be understood.
    pub fn load(root: &Root) -> Result<Self> {
        let path = root.settings();
        let attempt = || format!("read {}", path.display());
        // The operator may have made it a symbolic link: whoever can make one there decides what it says in any case.
        let text = path.canonicalize().and_then(|real| files::read(&real, MAX_LEN));
        match text {
            Ok(text) => Self::parse(&String::from_utf8_lossy(&text)).context(attempt),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(Error::from(e).context(attempt())),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let written: Written = toml::from_str(text).map_err(|e| {
            let message = e.to_string().trim_end().to_owned();
            Error::of(Kind::Usage, e).reworded(message)
        })?;
        written.try_into()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Written {
    default_key: Option<String>,
    encrypt_by_default: Option<bool>,
    region: Option<String>,
    account: Option<String>,
    kms_patience: Option<u64>,
    attach_grants: Option<bool>,
    grantee_principal: Option<String>,
    #[serde(default)]
    event_sink: Vec<sinks::WrittenSink>,
}

impl TryFrom<Written> for Settings {
    type Error = Error;

    fn try_from(w: Written) -> Result<Self> {
        let default = Settings::default();
        let settings = Settings {
            default_key: w.default_key.unwrap_or(default.default_key),
            encrypt_by_default: w.encrypt_by_default.unwrap_or(default.encrypt_by_default),
            locality: Locality {
                region: w.region.unwrap_or(default.locality.region),
                account: w.account.unwrap_or(default.locality.account),
            },
            kms_patience: w.kms_patience.map_or(default.kms_patience, Duration::from_secs),
            attach_grants: w.attach_grants.unwrap_or(default.attach_grants),
            grantee_principal: w.grantee_principal,
            event_sinks: sinks::parse(w.event_sink)?,
        };
        if settings.default_key.trim().is_empty() {
            return Err(usage("default-key is empty; leave it out to have alias/aws/ebs"));
        }
        let is_region = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if !(1..=64).contains(&settings.locality.region.len())
            || !settings.locality.region.bytes().all(is_region)
        {
            return Err(usage("region must be lower-case letters, digits and hyphens"));
        }
        if settings.locality.account.len() != 12
            || !settings.locality.account.bytes().all(|b| b.is_ascii_digit())
        {
            return Err(usage("account must be 12 digits, in quotation marks"));
        }
        if settings.kms_patience > Duration::from_secs(PATIENCE_MAX) {
            return Err(usage(format!("kms-patience must be a number of seconds, at most {PATIENCE_MAX}")));
        }
        let is_arn = |text: &str| {
            text.starts_with("arn:") && text.len() <= 256 && text.bytes().all(|b| b.is_ascii_graphic())
        };
        if settings.grantee_principal.as_deref().is_some_and(|arn| !is_arn(arn)) {
            return Err(usage(
                "grantee-principal must be the ARN of a principal, as \"aws sts get-caller-identity\" shows it",
            ));
        }
        Ok(settings)
    }
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(Kind::Usage, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_or_empty_file_means_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Settings::load(&Root::new(dir.path())).unwrap(), Settings::default());
        assert_eq!(Settings::parse("").unwrap(), Settings::default());
    }

    #[test]
    fn what_is_set_is_meant() {
        let settings = Settings::parse(
            "default-key = 'alias/prod'\nencrypt-by-default = true\nregion = 'eu-1'\naccount = '123456789012'\n\
             kms-patience = 0\nattach-grants = false\ngrantee-principal = 'arn:aws:iam::123456789012:role/host'\n",
        );
        let expected = Settings {
            default_key: "alias/prod".into(),
            encrypt_by_default: true,
            locality: Locality { region: "eu-1".into(), account: "123456789012".into() },
            kms_patience: Duration::ZERO,
            attach_grants: false,
            grantee_principal: Some("arn:aws:iam::123456789012:role/host".into()),
            event_sinks: Vec::new(),
        };
        assert_eq!(settings.unwrap(), expected);
    }

    #[test]
    fn event_sinks_are_commands_or_urls() {
        let settings = Settings::parse(
            "[[event-sink]]\nname = 'a'\ncommand = ['/bin/x', 'y']\ntimeout = 5\n\
             [[event-sink]]\nname = 'b-2'\nurl = 'http://[::1]:80/e?x=1'\n",
        );
        let expected = [
            sinks::Sink {
                name: "a".into(),
                target: sinks::Target::Command(vec!["/bin/x".into(), "y".into()]),
                timeout: Duration::from_secs(5),
            },
            sinks::Sink {
                name: "b-2".into(),
                target: sinks::Target::Http("http://[::1]:80/e?x=1".parse().unwrap()),
                timeout: Duration::from_secs(30),
            },
        ];
        assert_eq!(settings.unwrap().event_sinks, expected);
    }

    #[test]
    fn what_cannot_be_understood_is_refused() {
        for (text, words) in [
            ("encrypt-by-defaults = true", "unknown field"),
            ("encrypt-by-default = 'yes'", "boolean"),
            ("default-key = ' '", "default-key is empty"),
            ("region = 'EU:1'", "region must be"),
            ("account = '12'", "12 digits"),
            ("region = ", "region"),
            ("[[event-sink]]\nname = 'A'\nurl = 'http://h/'", "name is 1 to 64"),
            ("[[event-sink]]\nname = 'a'", "either command or url"),
            ("[[event-sink]]\nname = 'a'\nurl = 'http://h/'\ncommand = ['/x']", "either command or url"),
            ("[[event-sink]]\nname = 'a'\nurl = 'https://h/'", "https is not spoken"),
            ("[[event-sink]]\nname = 'a'\nurl = '/h'", "with a host"),
            ("[[event-sink]]\nname = 'a'\nurl = 'http://u:p@h/'", "name or password"),
            ("[[event-sink]]\nname = 'a'\ncommand = ['page']", "absolute path"),
            ("[[event-sink]]\nname = 'a'\nurl = 'http://h/'\ntimeout = 0", "1 to 600"),
            ("[[event-sink]]\nname = 'a'\nurl = 'http://h/'\nretries = 1", "unknown field"),
            (
                "[[event-sink]]\nname = 'a'\ncommand = ['/x']\n[[event-sink]]\nname = 'a'\ncommand = ['/y']",
                "two event sinks",
            ),
            ("kms-patience = 3601", "at most 3600"),
            ("kms-patience = -1", "kms-patience"),
            ("attach-grants = 1", "boolean"),
            ("grantee-principal = 'host'", "ARN of a principal"),
        ] {
            let e = Settings::parse(text).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage, "{text}");
            assert!(e.to_string().contains(words), "{text}: {e}");
        }
    }
}
