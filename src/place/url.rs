//! Where a place is.

use crate::base::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Component, PathBuf};
use std::str::FromStr;
use uuid::Uuid;

/// The URL of a place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlaceUrl {
    /// `file:///mnt/backup`: a folder.
    Folder(PathBuf),
    /// `s3://bucket/prefix`: what begins with the prefix in a bucket; `az://` and `gs://` likewise.
    Bucket {
        /// Whose bucket it is.
        service: Service,
        /// The bucket's name.
        bucket: String,
        /// The prefix, without `/` at either end; may be empty.
        prefix: String,
    },
    /// A folder of another host's, to which there is a connection. No user names it.
    Connection {
        /// The socket of the process that has the connection.
        socket: PathBuf,
        /// The place's id, by which it is known from one connection to the next.
        place: Uuid,
    },
}

/// An object store, by its protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// AWS S3, and whatever speaks its protocol.
    S3,
    /// Azure's Blob Storage, whose buckets are called containers.
    Azure,
    /// Google Cloud Storage.
    Gcs,
}

impl Service {
    const ALL: [Service; 3] = [Service::S3, Service::Azure, Service::Gcs];

    /// What a URL of its begins with, before `://`.
    pub fn scheme(self) -> &'static str {
        match self {
            Service::S3 => "s3",
            Service::Azure => "az",
            Service::Gcs => "gs",
        }
    }
}

impl FromStr for PlaceUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let usage = |problem: &str| Err(Error::new(Kind::Usage, format!("{text:?} {problem}")));
        if let Some(path) = text.strip_prefix("file://") {
            let path = PathBuf::from(path);
            let is_plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
            return match path.is_absolute() && path.components().all(is_plain) {
                true => Ok(PlaceUrl::Folder(path.components().collect())),
                false => usage("names no folder from the root on, as file:///mnt/backup does"),
            };
        }
        let of = |service: Service| {
            let rest = text.strip_prefix(service.scheme())?.strip_prefix("://")?;
            Some((service, rest))
        };
        let Some((service, rest)) = Service::ALL.into_iter().find_map(of) else {
            return usage(
                "is no place: file:///FOLDER, s3://BUCKET/PREFIX, az://CONTAINER/PREFIX and \
                 gs://BUCKET/PREFIX are",
            );
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let of_bucket =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._".contains(&byte);
        if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(of_bucket) {
            return usage(
                "has no bucket's name after \"://\": 3 to 63 lower-case letters, digits, \"-\" and \".\"",
            );
        }
        let prefix = prefix.trim_end_matches('/');
        let of_prefix = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let is_plain = |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(of_prefix);
        if !prefix.is_empty() && !prefix.split('/').all(is_plain) {
            return usage(
                "has a prefix with other characters than letters, digits, \"-\", \"_\", \".\" and \"/\"",
            );
        }
        Ok(PlaceUrl::Bucket { service, bucket: bucket.into(), prefix: prefix.into() })
    }
}

impl fmt::Display for PlaceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlaceUrl::Folder(path) => write!(f, "file://{}", path.display()),
            PlaceUrl::Bucket { service, bucket, prefix } => {
                write!(f, "{}://{bucket}", service.scheme())?;
                if prefix.is_empty() { Ok(()) } else { write!(f, "/{prefix}") }
            }
            PlaceUrl::Connection { place, .. } => write!(f, "connection:{place}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_has_one_spelling() {
        for (text, shown) in [
            ("file:///mnt/backup", "file:///mnt/backup"),
            ("file:///mnt//backup/", "file:///mnt/backup"),
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/", "s3://bucket"),
            ("s3://my.bucket-1/a/B_c/", "s3://my.bucket-1/a/B_c"),
            ("az://container/a", "az://container/a"),
            ("gs://bucket/", "gs://bucket"),
        ] {
            let url: PlaceUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(shown.parse::<PlaceUrl>().unwrap(), url);
        }
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for text in [
            "",
            "/mnt/backup",
            "file://backup",
            "file:///mnt/../etc",
            "file:backup",
            "http://x/y",
            "S3://bucket",
            "az:/bucket",
            "s3bucket",
            "s3://",
            "s3://B",
            "s3://ab",
            "s3://bucket/a//b",
            "s3://bucket/../x",
            "s3://bucket/a b",
            "s3://bucket/a?b",
            "connection:6f1c1f0c-3a87-4f0e-9d53-1d2b3c4d5e6f",
        ] {
            assert_eq!(text.parse::<PlaceUrl>().unwrap_err().kind(), Kind::Usage, "{text}");
        }
    }
}
