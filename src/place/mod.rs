//! Places outside for what leaves the house: objects by name, in a folder of any file system ([`file`]) or in
//! a bucket of an object store ([`bucket`]): S3's, Azure's, Google's.
//!
//! Everything here runs in a process of its own, the carrier (`helper::carry`), which has no key. What an
//! object means it does not know, and what a place returns is a claim: whoever asked for it proves it.

#[cfg(feature = "azure")]
mod azure;
#[cfg(feature = "object-store")]
pub(crate) mod bucket;
#[cfg(feature = "object-store")]
mod connection;
mod file;
#[cfg(feature = "gcs")]
mod gcs;
#[cfg(feature = "object-store")]
mod s3;
mod url;

pub use url::{PlaceUrl, Service};

use crate::base::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// Longer answers of a place are refused, in bytes: the longest list of one folder, or the longest object.
pub(crate) const MAX_LEN: usize = 64 << 20;

/// The name of an object below the place's URL: lower-case letters, digits, `-`, `.`, and
/// `/` between folders.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct ObjectName(String);

impl ObjectName {
    /// # Errors
    /// `Usage` for any other text.
    pub(crate) fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let is_good = |part: &str| {
            let known =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
            !part.is_empty() && !part.starts_with('.') && part.bytes().all(known)
        };
        match text.len() <= 200 && text.split('/').all(is_good) {
            true => Ok(ObjectName(text)),
            false => Err(Error::new(Kind::Usage, format!("{text:?} is no name of an object"))),
        }
    }

    /// The name.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// What is behind the last `/`.
    pub(crate) fn last(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ObjectName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::new(text).map_err(|e| e.to_string())
    }
}

impl From<ObjectName> for String {
    fn from(name: ObjectName) -> String {
        name.0
    }
}

/// An object, as a list of its folder has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    /// Its name.
    pub(crate) name: ObjectName,
    /// When it was written, by the place's clock, in seconds after 1970 began.
    pub(crate) modified: i64,
}

/// What becomes of an object that has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Put {
    /// It stays: another one is not put.
    IfNew,
    /// It is replaced.
    Replace,
}

/// What a place can do. Each thread of the carrier has its own way to it.
pub(crate) trait Objects {
    /// The object of that name, of at most `max` bytes; none if there is none.
    fn get(&mut self, name: &ObjectName, max: usize) -> Result<Option<Vec<u8>>>;

    /// Whether there is an object of that name.
    fn exists(&mut self, name: &ObjectName) -> Result<bool>;

    /// Puts an object, whole or not at all. Returns whether it was put: one that is there may be in the way.
    fn put(&mut self, name: &ObjectName, bytes: Vec<u8>, put: Put) -> Result<bool>;

    /// The objects right in a folder, in no order.
    fn list(&mut self, folder: &ObjectName) -> Result<Vec<Listed>>;

    /// Removes an object; one that is not there is as good.
    fn remove(&mut self, name: &ObjectName) -> Result<()>;

    /// Makes durable what was put. An object store does that at each put.
    fn sync(&mut self) -> Result<()>;
}

/// How a place is reached, beside its URL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// Of an object store: where it listens, as a URL; without one, what the environment says, else AWS.
    pub endpoint: Option<String>,
    /// Of an object store: its region; without one, what the environment says.
    pub region: Option<String>,
}

/// A place that was looked at and can be opened by several threads.
pub(crate) enum Place {
    /// A folder.
    Folder(PathBuf),
    /// A bucket.
    #[cfg(feature = "object-store")]
    Bucket(Box<bucket::Bucket>),
}

impl Place {
    /// Looks how the place is reached: reads the environment and files, and may ask for credentials. What
    /// needs more than the place itself is done here, before the process is confined.
    ///
    /// # Errors
    /// `NotFound` for a folder that is not there; `Usage` for a place that cannot be reached so.
    pub(crate) fn prepare(url: &PlaceUrl, access: &Access) -> Result<Self> {
        match url {
            PlaceUrl::Folder(path) => {
                if access.endpoint.is_some() || access.region.is_some() {
                    return Err(Error::new(
                        Kind::Usage,
                        "a folder has no endpoint and no region: leave out --endpoint and --region",
                    ));
                }
                file::check(path).map(Place::Folder)
            }
            #[cfg(feature = "object-store")]
            PlaceUrl::Bucket { service, bucket, prefix } => {
                Ok(Place::Bucket(Box::new(bucket::Bucket::prepare(*service, bucket, prefix, access)?)))
            }
            PlaceUrl::Connection { .. } => Err(Error::new(
                Kind::Usage,
                "another host's place is reached by who has the connection, and not by a carrier",
            )),
            #[cfg(not(feature = "object-store"))]
            PlaceUrl::Bucket { .. } => Err(Error::new(
                Kind::Unsupported,
                "object stores are reached by the feature object-store, without which this sealblk was built",
            )),
        }
    }

    /// A way to it, for one thread.
    ///
    /// # Errors
    /// Those of the place.
    pub(crate) fn open(&self) -> Result<Box<dyn Objects>> {
        match self {
            Place::Folder(path) => Ok(Box::new(file::Folder::open(path)?)),
            #[cfg(feature = "object-store")]
            Place::Bucket(bucket) => Ok(Box::new(bucket.open()?)),
        }
    }

    /// How many requests are worth doing at a time.
    pub(crate) fn width(&self) -> usize {
        match self {
            // The page cache takes what one writes.
            Place::Folder(_) => 1,
            #[cfg(feature = "object-store")]
            Place::Bucket(_) => bucket::WIDTH,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_and_lead_nowhere_else() {
        for good in ["place.json", "blocks/0a/0a1b", "snapshots/snap-0123456789abcdef0.json", "a/b/c/d"] {
            assert!(ObjectName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".a", "a/.b", "A", "a b", "a\0", "ä", "a#1"]
        {
            assert!(ObjectName::new(bad).is_err(), "{bad:?}");
        }
        assert!(ObjectName::new("a".repeat(201)).is_err());
        assert_eq!(ObjectName::new("a/b.c").unwrap().last(), "b.c");
    }
}
