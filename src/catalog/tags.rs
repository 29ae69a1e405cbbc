//! Tags of volumes and snapshots: keys and values in an operator's own words, within EBS's limits.
//!
//! A volume's tags lie in `tags.json` in its folder, apart from its metadata, so that they can be changed
//! while the volume is attached. They decide nothing.

use crate::base::root::replace_file;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::metadata::written;
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, VolumeId, read_bounded};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The file's name in a volume's folder.
pub(crate) const FILE: &str = "tags.json";

const FORMAT: u32 = 1;

/// Keys and values, at most 50; keys of 1 to 128 characters that do not begin with `aws:`,
/// values of at most 256.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Tags(BTreeMap<String, String>);

impl Tags {
    /// The most tags of one volume or snapshot.
    pub const MAX: usize = 50;

    /// Adds a tag, or gives the key another value.
    ///
    /// # Errors
    /// `Usage` for what is outside of EBS's limits.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let usage = |problem: String| Err(Error::new(Kind::Usage, problem));
        let has_controls = |text: &str| text.chars().any(char::is_control);
        if !(1..=128).contains(&key.chars().count()) || has_controls(key) {
            return usage(format!("the tag key {key:?}: a key has 1 to 128 printable characters"));
        }
        if key.get(..4).is_some_and(|p| p.eq_ignore_ascii_case("aws:")) {
            return usage(format!("the tag key {key:?}: keys that begin with \"aws:\" are reserved"));
        }
        if value.chars().count() > 256 || has_controls(value) {
            return usage(format!("the tag {key:?}: a value has at most 256 printable characters"));
        }
        if self.0.len() == Self::MAX && !self.0.contains_key(key) {
            return usage(format!("there can be {} tags, and all are in use; remove one first", Self::MAX));
        }
        self.0.insert(key.into(), value.into());
        Ok(())
    }

    /// Takes a tag away; false if there was none of that key.
    pub fn remove(&mut self, key: &str) -> bool {
        self.0.remove(key).is_some()
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// All of them, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TryFrom<BTreeMap<String, String>> for Tags {
    type Error = Error;

    fn try_from(map: BTreeMap<String, String>) -> Result<Self> {
        let mut tags = Tags::default();
        map.iter().try_for_each(|(key, value)| tags.set(key, value))?;
        Ok(tags)
    }
}

impl From<Tags> for BTreeMap<String, String> {
    fn from(tags: Tags) -> Self {
        tags.0
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    tags: Tags,
}

impl Catalog {
    /// A volume's tags.
    ///
    /// # Errors
    /// `Corrupt` for a file that is none of ours.
    pub fn tags(&self, id: VolumeId) -> Result<Tags> {
        let path = self.folder(id).join(FILE);
        let attempt = || format!("read {}", path.display());
        let bytes = match read_bounded(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == Kind::NotFound => return Ok(Tags::default()),
            Err(e) => return Err(e.context(attempt())),
        };
        match written::version(&bytes).context(attempt)? {
            1 => Ok(written::read::<Written>(&bytes).context(attempt)?.tags),
            other => Err(written::unknown_version(other, "version 1").context(attempt())),
        }
    }

    /// Changes a volume's tags, of an attached one too.
    ///
    /// # Errors
    /// That of `change`; those of the file system. The tags are as they were then.
    pub fn change_tags(&self, id: VolumeId, change: impl FnOnce(&mut Tags) -> Result<()>) -> Result<Tags> {
        let _records = RecordsLock::acquire(self)?;
        // A volume that was deleted meanwhile gets no new file.
        self.load(id)?;
        let mut tags = self.tags(id)?;
        change(&mut tags)?;
        write(&self.folder(id), &tags)?;
        Ok(tags)
    }
}

/// Writes the tags of the volume whose folder is `folder`.
pub(crate) fn write(folder: &Path, tags: &Tags) -> Result<()> {
    replace_file(&folder.join(FILE), &written::to_json(&Written { format: FORMAT, tags: tags.clone() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_are_those_of_ebs() {
        let mut tags = Tags::default();
        for (key, value) in [
            ("", "x"),
            (&*"k".repeat(129), "x"),
            ("aws:x", "x"),
            ("AWS:x", "x"),
            ("a\nb", "x"),
            ("k", &*"v".repeat(257)),
            ("k", "\u{1b}"),
        ] {
            assert_eq!(tags.set(key, value).unwrap_err().kind(), Kind::Usage, "{key:?} {value:?}");
        }
        assert!(tags.is_empty());
        tags.set(&"ü".repeat(128), &"v".repeat(256)).unwrap();
        (1..50).for_each(|n| tags.set(&n.to_string(), "").unwrap());
        assert!(tags.set("one more", "").is_err());
        tags.set("7", "again").unwrap();
        assert_eq!(tags.get("7"), Some("again"));
        assert!(tags.remove("7") && !tags.remove("7"));
        tags.set("one more", "").unwrap();
    }
}
