//! `[[pkcs11-token]]` in `sealblk.toml`: tokens of HSMs that custom key stores can be made of over the wire.
//!
//! ```toml
//! [[pkcs11-token]]
//! cluster = "cluster-volumes1234"                # what the wire names it by: CloudHsmClusterId
//! module = "/usr/lib/softhsm/libsofthsm2.so"    # the vendor's PKCS#11 module
//! token = "volumes"                             # the token's label
//! paths = ["/opt/vendor/state"]                 # files that the module needs, beside those that are known
//! network = false                               # true: it reaches its token by the network
//! ```
//!
//! A module is code. So whoever may ask the KMS over the wire chooses among those that stand here.

use crate::base::{Error, Result};
use crate::config::usage;
use serde::Deserialize;
use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// How long a name is, as AWS has it.
const NAME_LEN: RangeInclusive<usize> = 19..=24;

/// A token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pkcs11Token {
    /// What the wire names it by.
    pub cluster: String,
    /// The vendor's PKCS#11 module, an absolute path.
    pub module: PathBuf,
    /// Its label.
    pub token: String,
    /// Files, folders and devices that the module needs besides.
    pub paths: Vec<PathBuf>,
    /// Whether the module needs the network, or a socket of this machine.
    pub network: bool,
}

/// A token as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenToken {
    cluster: String,
    module: PathBuf,
    token: String,
    #[serde(default)]
    paths: Vec<PathBuf>,
    #[serde(default)]
    network: bool,
}

/// All tokens of the settings.
pub(super) fn parse(written: Vec<WrittenToken>) -> Result<Vec<Pkcs11Token>> {
    let tokens: Vec<Pkcs11Token> = written.into_iter().map(Pkcs11Token::try_from).collect::<Result<_>>()?;
    let mut names = HashSet::new();
    match tokens.iter().find(|token| !names.insert(&token.cluster)) {
        Some(twice) => Err(usage(format!("there are two PKCS#11 tokens {:?}", twice.cluster))),
        None => Ok(tokens),
    }
}

impl TryFrom<WrittenToken> for Pkcs11Token {
    type Error = Error;

    fn try_from(w: WrittenToken) -> Result<Self> {
        let WrittenToken { cluster, module, token, paths, network } = w;
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        let is_name = cluster.starts_with("cluster-")
            && NAME_LEN.contains(&cluster.len())
            && cluster.bytes().all(allowed);
        if !is_name {
            return Err(usage(format!(
                "cluster of a PKCS#11 token is \"cluster-\" and 11 to 16 letters and digits, not {cluster:?}"
            )));
        }
        if let Some(path) = std::iter::once(&module).chain(&paths).find(|path| !path.is_absolute()) {
            let message = format!("PKCS#11 token {cluster:?}: {} is not an absolute path", path.display());
            return Err(usage(message));
        }
        if token.is_empty() || token.len() > 32 {
            return Err(usage(format!("PKCS#11 token {cluster:?}: a token's label has 1 to 32 bytes")));
        }
        Ok(Pkcs11Token { cluster, module, token, paths, network })
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Settings;

    #[test]
    fn a_token_is_named_as_the_wire_names_clusters() {
        let parse = |cluster: &str, module: &str, token: &str| {
            let written =
                format!("[[pkcs11-token]]\ncluster = '{cluster}'\nmodule = '{module}'\ntoken = '{token}'");
            Settings::parse(&written).map(|settings| settings.pkcs11_tokens)
        };
        let good = parse("cluster-volumes1234", "/m.so", "volumes").unwrap();
        assert_eq!((good.len(), good[0].network, good[0].paths.len()), (1, false, 0));
        for (cluster, module, token) in [
            ("volumes", "/m.so", "t"),
            ("cluster-short", "/m.so", "t"),
            ("cluster-much-too-long-for-it", "/m.so", "t"),
            ("cluster-volumes123/", "/m.so", "t"),
            ("cluster-volumes1234", "m.so", "t"),
            ("cluster-volumes1234", "/m.so", ""),
        ] {
            assert!(parse(cluster, module, token).is_err(), "{cluster} {module} {token}");
        }
        let twice =
            "[[pkcs11-token]]\ncluster = 'cluster-volumes1234'\nmodule = '/m'\ntoken = 't'\n".repeat(2);
        assert!(Settings::parse(&twice).unwrap_err().to_string().contains("two PKCS#11 tokens"));
    }
}
