//! `sealblk.toml` in the configuration folder: what is written (serde) into what is meant. It holds for every
//! store that is used with this folder.
//!
//! ```toml
//! default-key = "alias/aws/ebs"    # the KMS key of volumes made without --key
//! encrypt-by-default = false       # true: no unencrypted volume can be made
//! require-encrypted = false        # true: no unencrypted volume can be attached, or opened otherwise
//! also-keys = ["aws:alias/far"]    # further KMS keys that wrap each new data key
//! key-order = ["eu-central-1"]     # which KMS keys are asked first, where several wrap a data key
//! kms-keys = ["embedded"]          # which KMS keys may be asked for data keys; without it, all
//! clone-data-key = "snapshot"      # "own": a volume made from a snapshot writes under a data key of its own
//! region = "us-east-1"             # in events and in the ARNs of the embedded KMS
//! account = "000000000000"         # likewise, 12 digits
//! kms-patience = 60                # seconds for which a KMS that cannot be reached is asked again
//! attach-grants = true             # each attach makes a grant, and retires it at detach
//! space-reserve = "4GiB"           # what copies leave free of the store's file system
//! grantee-principal = "arn:aws:…"  # whose grants at AWS KMS: the principal of this host
//! ```
//!
//! and `[[event-sink]]` ([`sinks`]), `[[kms-region]]` ([`regions`]) and `[[pkcs11-token]]`
//! tables ([`tokens`]).
//!
//! What stands there has consequences: a command that is run, a key that is used. So it does not lie in the
//! store, with the ciphertext, where whoever can write the store could change it. A store with a
//! `sealblk.toml` of an earlier version is refused until that was moved ([`moving`]).
#![forbid(unsafe_code)]

pub mod edit;
pub mod key_order;
pub mod kms_keys;
pub mod moving;
pub mod regions;
pub mod sinks;
pub mod tokens;

use crate::base::root::{Root, owners};
use crate::base::space::Reserve;
use crate::base::{Context, Error, Kind, Locality, Result, size};
use key_order::KeyOrder;
use kms_keys::KmsKeys;
use serde::Deserialize;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The name of the file.
const FILE: &str = "sealblk.toml";

/// The most that `kms-patience` may be, seconds.
const PATIENCE_MAX: u64 = 3600;

/// The longest settings in bytes.
const MAX_LEN: u64 = 1 << 20;

/// The alias of the key that is made at first use, when neither the command nor the settings name one.
pub const DEFAULT_KEY: &str = "alias/aws/ebs";

/// Under which data key a volume writes that is made from a snapshot, where the command does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloneDataKey {
    /// The snapshot's, as EBS has it.
    #[default]
    Snapshot,
    /// One of its own.
    Own,
}

impl CloneDataKey {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            CloneDataKey::Snapshot => "snapshot",
            CloneDataKey::Own => "own",
        }
    }
}

/// The settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where the store lies, if neither the command nor the environment says it: a folder, or the address of
    /// a pool.
    pub root: Option<String>,
    /// The KMS key, as its provider takes it, of volumes that are made without `--key`.
    pub default_key: String,
    /// The KMS keys, as their providers take them, that wrap every new data key besides.
    pub also_keys: Vec<String>,
    /// Which KMS keys are asked first, where several wrap a data key.
    pub key_order: KeyOrder,
    /// Whether making an unencrypted volume is refused, as EBS's encryption by default does.
    pub encrypt_by_default: bool,
    /// Whether no unencrypted volume may be opened, or made.
    pub require_encrypted: bool,
    /// Which KMS keys may wrap and unwrap data keys.
    pub kms_keys: KmsKeys,
    /// Under which data key a volume writes that is made from a snapshot.
    pub clone_data_key: CloneDataKey,
    /// Where the embedded KMS and the store's events say that they are.
    pub locality: Locality,
    /// For how long a KMS that cannot be reached, or is overloaded, is asked again; at most an hour.
    pub kms_patience: Duration,
    /// How much of the store's file system copies leave free.
    pub space_reserve: Reserve,
    /// Whether an attach makes a grant for itself, where the KMS has grants and knows for whom.
    pub attach_grants: bool,
    /// The ARN of the principal as which this host asks AWS KMS; the grants are made for it.
    pub grantee_principal: Option<String>,
    /// To whom events are delivered.
    pub event_sinks: Vec<sinks::Sink>,
    /// The KMSs of other regions, to which multi-Region keys are brought.
    pub kms_regions: Vec<regions::KmsRegion>,
    /// Tokens of HSMs that the wire may name.
    pub pkcs11_tokens: Vec<tokens::Pkcs11Token>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            root: None,
            default_key: DEFAULT_KEY.into(),
            also_keys: Vec::new(),
            key_order: KeyOrder::default(),
            encrypt_by_default: false,
            require_encrypted: false,
            kms_keys: KmsKeys::default(),
            clone_data_key: CloneDataKey::default(),
            locality: Locality::default(),
            kms_patience: Duration::from_secs(60),
            space_reserve: Reserve::default(),
            attach_grants: true,
            grantee_principal: None,
            event_sinks: Vec::new(),
            kms_regions: Vec::new(),
            pkcs11_tokens: Vec::new(),
        }
    }
}

impl Settings {
    /// Reads the settings for the store at `root`; a file that is not there means the defaults.
    ///
    /// # Errors
    /// `Usage`, naming the file and the line, for what cannot be understood; for a file, or configuration
    /// folder, that somebody else can write, or that this user may not read; and for a store that still has
    /// settings in it.
    pub fn load(root: &Root) -> Result<Self> {
        Self::load_from(&Root::config_dir()?, root)
    }

    /// Reads the settings in this configuration folder, for the store at `root`.
    ///
    /// # Errors
    /// As for [`Settings::load`].
    pub fn load_from(config: &Path, root: &Root) -> Result<Self> {
        moving::refuse_old(config, root)?;
        match find(config)? {
            Some(path) => Self::read(&path),
            None => Ok(Self::default()),
        }
    }

    fn read(path: &Path) -> Result<Self> {
        let attempt = || format!("read {}", path.display());
        let text = owners::read_deciding(path, MAX_LEN).context(attempt)?;
        Self::parse(&String::from_utf8_lossy(&text)).context(attempt)
    }

    /// Whether `what`, which is encrypted or not, may be opened or made.
    ///
    /// # Errors
    /// `Refused` for what is not encrypted, where that is required.
    pub fn check_encrypted(&self, what: impl fmt::Display, is_encrypted: bool) -> Result<()> {
        if is_encrypted || !self.require_encrypted {
            return Ok(());
        }
        let message =
            format!("{what} is not encrypted, and {} says require-encrypted", shown_file().display());
        Err(Error::new(Kind::Refused, message))
    }

    pub(crate) fn parse(text: &str) -> Result<Self> {
        let written: Written = toml::from_str(text).map_err(|e| {
            let message = e.to_string().trim_end().to_owned();
            Error::of(Kind::Usage, e).reworded(message)
        })?;
        written.try_into()
    }
}

/// Where the settings are, or would be.
///
/// # Errors
/// `Usage` where there is no configuration folder.
pub fn file() -> Result<PathBuf> {
    Ok(Root::config_dir()?.join(FILE))
}

/// The settings file as messages name it: its path, or its name alone where nothing says where it is.
pub fn shown_file() -> PathBuf {
    file().unwrap_or_else(|_| FILE.into())
}

/// The file with the settings, if there is one, by a path without links. Nobody but root and the caller can
/// write it.
fn find(config: &Path) -> Result<Option<PathBuf>> {
    owners::find_deciding(config, FILE).context(|| "look for the settings")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Written {
    root: Option<String>,
    default_key: Option<String>,
    also_keys: Option<Vec<String>>,
    key_order: Option<Vec<String>>,
    encrypt_by_default: Option<bool>,
    require_encrypted: Option<bool>,
    kms_keys: Option<Vec<String>>,
    clone_data_key: Option<CloneDataKey>,
    region: Option<String>,
    account: Option<String>,
    kms_patience: Option<u64>,
    space_reserve: Option<String>,
    attach_grants: Option<bool>,
    grantee_principal: Option<String>,
    #[serde(default)]
    event_sink: Vec<sinks::WrittenSink>,
    #[serde(default)]
    kms_region: Vec<regions::WrittenRegion>,
    #[serde(default)]
    pkcs11_token: Vec<tokens::WrittenToken>,
}

impl TryFrom<Written> for Settings {
    type Error = Error;

    fn try_from(w: Written) -> Result<Self> {
        let default = Settings::default();
        let locality = Locality {
            region: w.region.unwrap_or(default.locality.region),
            account: w.account.unwrap_or(default.locality.account),
        };
        let settings = Settings {
            root: w.root,
            default_key: w.default_key.unwrap_or(default.default_key),
            also_keys: w.also_keys.map_or(Ok(default.also_keys), kms_keys::parse_also)?,
            key_order: w.key_order.map_or(Ok(default.key_order), KeyOrder::parse)?,
            encrypt_by_default: w.encrypt_by_default.unwrap_or(default.encrypt_by_default),
            require_encrypted: w.require_encrypted.unwrap_or(default.require_encrypted),
            clone_data_key: w.clone_data_key.unwrap_or(default.clone_data_key),
            kms_keys: w.kms_keys.map_or(Ok(default.kms_keys), KmsKeys::parse)?,
            kms_patience: w.kms_patience.map_or(default.kms_patience, Duration::from_secs),
            space_reserve: w.space_reserve.map_or(Ok(default.space_reserve), reserve)?,
            attach_grants: w.attach_grants.unwrap_or(default.attach_grants),
            grantee_principal: w.grantee_principal,
            event_sinks: sinks::parse(w.event_sink)?,
            kms_regions: regions::parse(w.kms_region, &locality.region)?,
            pkcs11_tokens: tokens::parse(w.pkcs11_token)?,
            locality,
        };
        if settings.root.as_ref().is_some_and(|root| !root.starts_with('/') && !root.starts_with("ceph:")) {
            return Err(usage("root must be a path that begins with a slash, or ceph:POOL[/NAMESPACE]"));
        }
        if settings.default_key.trim().is_empty() {
            return Err(usage("default-key is empty; leave it out to have alias/aws/ebs"));
        }
        if !regions::is_region(&settings.locality.region) {
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
                "grantee-principal must be the ARN of a principal, as \"aws sts get-caller-identity\" shows \
                 it",
            ));
        }
        Ok(settings)
    }
}

fn reserve(text: String) -> Result<Reserve> {
    size::parse(&text).map(Reserve::of).map_err(|e| usage(format!("space-reserve: {e}")))
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
        let (root, config) = (Root::new(dir.path().join("root")), dir.path().join("config"));
        assert_eq!(Settings::load_from(&config, &root).unwrap(), Settings::default());
        assert_eq!(Settings::parse("").unwrap(), Settings::default());
    }

    #[test]
    fn what_is_set_is_meant() {
        let settings = Settings::parse(
            "root = 'ceph:rbd/vms'\ndefault-key = 'alias/prod'\nencrypt-by-default = true\nrequire-encrypted \
             = true\n\
             clone-data-key = 'own'\nkms-keys = ['embedded']\nregion = 'eu-1'\naccount = '123456789012'\n\
             also-keys = ['aws:alias/far']\nkey-order = ['eu-1', 'aws']\nkms-patience = 0\nspace-reserve = \
             '2GiB'\nattach-grants = false\ngrantee-principal = 'arn:aws:iam::123456789012:role/host'\n",
        );
        let expected = Settings {
            root: Some("ceph:rbd/vms".into()),
            default_key: "alias/prod".into(),
            also_keys: vec!["aws:alias/far".into()],
            key_order: KeyOrder::parse(vec!["eu-1".into(), "aws".into()]).unwrap(),
            encrypt_by_default: true,
            require_encrypted: true,
            kms_keys: KmsKeys::parse(vec!["embedded".into()]).unwrap(),
            clone_data_key: CloneDataKey::Own,
            locality: Locality { region: "eu-1".into(), account: "123456789012".into() },
            kms_patience: Duration::ZERO,
            space_reserve: Reserve::of(2 << 30),
            attach_grants: false,
            grantee_principal: Some("arn:aws:iam::123456789012:role/host".into()),
            event_sinks: Vec::new(),
            kms_regions: Vec::new(),
            pkcs11_tokens: Vec::new(),
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
            ("require-encrypted = 1", "boolean"),
            ("kms-keys = 'embedded'", "sequence"),
            ("clone-data-key = 'mine'", "expected `snapshot` or `own`"),
            ("kms-keys = ['alais/prod']", "alais/prod"),
            ("also-keys = ['embedded']", "names no key"),
            ("also-keys = ['alias/a', 'alias/a']", "twice"),
            ("also-keys = 'alias/a'", "sequence"),
            ("key-order = ['nowhere']", "is no region"),
            ("default-key = ' '", "default-key is empty"),
            ("root = 'x'", "begins with a slash"),
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
            ("space-reserve = 'much'", "is not a size"),
            ("space-reserve = 5", "string"),
            ("attach-grants = 1", "boolean"),
            ("grantee-principal = 'host'", "ARN of a principal"),
        ] {
            let e = Settings::parse(text).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage, "{text}");
            assert!(e.to_string().contains(words), "{text}: {e}");
        }
    }
}
