//! `[[kms-region]]` in `sealblk.toml`: the KMSs of other regions, to which the embedded KMS
//! brings multi-Region keys.
//!
//! ```toml
//! [[kms-region]]
//! region = "eu-west-1"
//! url = "https://kms.eu.example:8600"               # where "sealblk kms serve" listens there
//! ca = "/etc/sealblk/eu-west-1.pem"                 # who has signed its certificate
//! credentials = "/etc/sealblk/eu-west-1.key"        # as whom it is asked: what "principal create --peer" has printed
//! ```
//!
//! Material goes there, so nothing that lies in a store, or that comes over the wire, says where that is.
#![forbid(unsafe_code)]

use crate::base::{Error, Result};
use crate::config::usage;
use hyper::Uri;
use serde::Deserialize;
use std::collections::HashSet;
use std::net::IpAddr;
use std::path::PathBuf;

/// The KMS of another region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsRegion {
    /// The region.
    pub region: String,
    /// Where it listens: `https://`, or `http://` with an address of this machine.
    pub url: Uri,
    /// PEM, absolute: whose certificates are believed. There for `https://`.
    pub ca: Option<PathBuf>,
    /// Absolute: the file with the access key, which nobody else may read.
    pub credentials: PathBuf,
}

/// A region as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenRegion {
    region: String,
    url: String,
    ca: Option<PathBuf>,
    credentials: PathBuf,
}

/// Whether this can be a region: 1 to 64 lower-case letters, digits and hyphens.
pub fn is_region(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=64).contains(&text.len()) && text.bytes().all(allowed)
}

/// All regions of the settings of a KMS in the region `here`.
pub(super) fn parse(written: Vec<WrittenRegion>, here: &str) -> Result<Vec<KmsRegion>> {
    let regions: Vec<KmsRegion> = written.into_iter().map(KmsRegion::try_from).collect::<Result<_>>()?;
    let mut names = HashSet::new();
    if let Some(twice) = regions.iter().find(|it| !names.insert(&it.region)) {
        return Err(usage(format!("there are two KMS regions {:?}", twice.region)));
    }
    match regions.iter().find(|it| it.region == here) {
        Some(own) => Err(usage(format!("KMS region {:?}: that is this one's own", own.region))),
        None => Ok(regions),
    }
}

impl TryFrom<WrittenRegion> for KmsRegion {
    type Error = Error;

    fn try_from(w: WrittenRegion) -> Result<Self> {
        let WrittenRegion { region, url, ca, credentials } = w;
        if !is_region(&region) {
            return Err(usage("region of a KMS region must be lower-case letters, digits and hyphens"));
        }
        let wrong = |why: &str| usage(format!("KMS region {region:?}: {why}"));
        let url = check_url(&url).map_err(wrong)?;
        if url.scheme_str() == Some("https") && ca.is_none() {
            return Err(wrong(
                "ca is missing: the file with the certificate of whoever has signed that KMS's",
            ));
        }
        if ca.iter().chain([&credentials]).any(|path| !path.is_absolute()) {
            return Err(wrong("ca and credentials are absolute paths"));
        }
        Ok(KmsRegion { region, url, ca, credentials })
    }
}

fn check_url(url: &str) -> Result<Uri, &'static str> {
    let url: Uri = url.parse().map_err(|_| "url is not a URL")?;
    let host = url.host().ok_or("url is one with a host")?.trim_start_matches('[').trim_end_matches(']');
    if url.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err("url has a name or password in it, which does not belong there");
    }
    if url.path() != "/" || url.query().is_some() {
        return Err("url has nothing behind host and port");
    }
    let is_here = host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    match url.scheme_str() {
        Some("https") => Ok(url),
        Some("http") if is_here => Ok(url),
        _ => Err("url is https://, or http:// with an address of this machine"),
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Settings;

    #[test]
    fn a_region_is_reached_by_tls_or_on_this_machine() {
        let parse = |region: &str, url: &str, rest: &str| {
            let written = format!("[[kms-region]]\nregion = '{region}'\nurl = '{url}'\n{rest}\n");
            Settings::parse(&written).map(|settings| settings.kms_regions)
        };
        let (ca, key) = ("ca = '/ca.pem'\n", "credentials = '/key'");
        let good = parse("eu-west-1", "https://kms.example:8600", &format!("{ca}{key}")).unwrap();
        assert_eq!((good.len(), good[0].url.port_u16()), (1, Some(8600)));
        assert!(parse("eu-west-1", "http://[::1]:1", key).is_ok());
        for (region, url, rest) in [
            ("EU", "http://127.0.0.1:1", key),
            ("us-east-1", "http://127.0.0.1:1", key),
            ("eu-west-1", "https://kms.example", key),
            ("eu-west-1", "http://kms.example", key),
            ("eu-west-1", "http://localhost:1", key),
            ("eu-west-1", "http://10.0.0.1:1", key),
            ("eu-west-1", "http://a:b@127.0.0.1:1", key),
            ("eu-west-1", "http://127.0.0.1:1/x", key),
            ("eu-west-1", "http://127.0.0.1:1/?x=y", key),
            ("eu-west-1", "/x", key),
            ("eu-west-1", "http://127.0.0.1:1", "credentials = 'key'"),
            ("eu-west-1", "http://127.0.0.1:1", ""),
        ] {
            assert!(parse(region, url, rest).is_err(), "{region} {url} {rest}");
        }
        let twice =
            "[[kms-region]]\nregion = 'r'\nurl = 'http://127.0.0.1:1'\ncredentials = '/k'\n".repeat(2);
        assert!(Settings::parse(&twice).unwrap_err().to_string().contains("two KMS regions"));
    }
}
