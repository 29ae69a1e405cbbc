//! The address of an RBD image: `rbd:POOL[/NAMESPACE]/IMAGE`, and how the cluster is reached.
#![forbid(unsafe_code)]

use super::address::{decoded, encoded};
use crate::base::{Error, Kind};
use std::fmt;
use std::path::PathBuf;

/// What such an address begins with.
pub(super) const BEGINNING: &str = "rbd:";
/// The longest name, in bytes: of a pool, a namespace, an image or a user.
const NAME_MAX: usize = 255;
/// The longest path of a file.
const PATH_MAX: usize = 4095;
/// The folder of Ceph's settings, where nobody names another one.
const CEPH: &str = "/etc/ceph";
/// The user of the cluster that sealblk is, if nobody says another one.
const ID: &str = "sealblk";

/// An RBD image, and how its cluster is reached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Image {
    pool: String,
    namespace: String,
    name: String,
    id: Option<String>,
    conf: Option<String>,
    keyring: Option<String>,
}

impl Image {
    /// The pool's name.
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// The namespace in the pool; empty for the one without a name.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The image's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As which user of the cluster, without `client.`.
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or(ID)
    }

    /// The file that says where the cluster is.
    pub fn conf(&self) -> PathBuf {
        self.conf.as_ref().map_or_else(|| PathBuf::from(CEPH).join("ceph.conf"), PathBuf::from)
    }

    /// The file with the user's key of the cluster.
    pub fn keyring(&self) -> PathBuf {
        let usual = || PathBuf::from(CEPH).join(format!("ceph.client.{}.keyring", self.id()));
        self.keyring.as_ref().map_or_else(usual, PathBuf::from)
    }

    /// The image as people name it: `POOL[/NAMESPACE]/IMAGE`.
    pub fn shown(&self) -> String {
        let Image { pool, namespace, name, .. } = self;
        match namespace.as_str() {
            "" => format!("{pool}/{name}"),
            namespace => format!("{pool}/{namespace}/{name}"),
        }
    }

    /// The image that an operator has named, with `rbd:` before it or without.
    ///
    /// # Errors
    /// `Usage`, with what is wrong.
    pub fn named(text: &str) -> Result<Self, Error> {
        let parsed = Image::parse(text);
        parsed.map_err(|e| Error::new(Kind::Usage, format!("{text:?} is no RBD image: {e}")))
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let how = "give POOL[/NAMESPACE]/IMAGE[?id=ID&conf=/PATH&keyring=/PATH]";
        let (place, query) = text.split_once('?').unwrap_or((text, ""));
        let names: Vec<&str> = place.strip_prefix(BEGINNING).unwrap_or(place).split('/').collect();
        let (pool, namespace, name) = match names[..] {
            [pool, name] => (pool, "", name),
            [pool, namespace, name] if !namespace.is_empty() => (pool, namespace, name),
            _ => return Err(how.into()),
        };
        let [pool, namespace, name] = [name_of(pool)?, name_of(namespace)?, name_of(name)?];
        if pool.is_empty() || name.is_empty() {
            return Err(how.into());
        }
        let mut image = Image { pool, namespace, name, id: None, conf: None, keyring: None };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (word, value) = pair.split_once('=').ok_or(how)?;
            let (field, value) = match word {
                "id" => (&mut image.id, name_of(value)?),
                "conf" => (&mut image.conf, path_of(value)?),
                "keyring" => (&mut image.keyring, path_of(value)?),
                _ => return Err(how.into()),
            };
            if value.is_empty() || field.replace(value).is_some() {
                return Err(how.into());
            }
        }
        match image.id() {
            id if id.starts_with("client.") => Err("its id is given without \"client.\"".into()),
            _ => Ok(image),
        }
    }
}

/// A name in Ceph. It is never taken for anything but a name there: these characters have a meaning to
/// Ceph's own tools.
fn name_of(text: &str) -> Result<String, String> {
    let name = decoded(text)?;
    if name.len() > NAME_MAX {
        return Err(format!("a name has {} bytes, and may have {NAME_MAX}", name.len()));
    }
    match name.contains(['/', '@']) {
        true => Err(format!("{name:?} has a slash or an @, which no name of Ceph's may have")),
        false => Ok(name),
    }
}

fn path_of(text: &str) -> Result<String, String> {
    let path = decoded(text)?;
    match path.starts_with('/') && path.len() <= PATH_MAX {
        true => Ok(path),
        false => Err("the path of a file is to begin with a slash".into()),
    }
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{BEGINNING}{}", encoded(&self.pool))?;
        if !self.namespace.is_empty() {
            write!(f, "/{}", encoded(&self.namespace))?;
        }
        write!(f, "/{}", encoded(&self.name))?;
        let said = [("id", &self.id), ("conf", &self.conf), ("keyring", &self.keyring)];
        let said = said.into_iter().filter_map(|(word, value)| Some((word, value.as_ref()?)));
        for (n, (word, value)) in said.enumerate() {
            write!(f, "{}{word}={}", if n == 0 { '?' } else { '&' }, encoded(value))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_what_was_said_and_what_was_not_is_usual() {
        let image = Image::named("rbd/db").unwrap();
        assert_eq!((image.pool(), image.namespace(), image.name()), ("rbd", "", "db"));
        assert_eq!((image.id(), image.conf()), ("sealblk", "/etc/ceph/ceph.conf".into()));
        assert_eq!(image.keyring(), PathBuf::from("/etc/ceph/ceph.client.sealblk.keyring"));
        assert_eq!(image.to_string(), "rbd:rbd/db");
        let text = "rbd:p/n/a%20b?id=h&conf=/x/y%3Fz&keyring=/k";
        let image = Image::named(text).unwrap();
        assert_eq!((image.pool(), image.namespace(), image.name()), ("p", "n", "a b"));
        assert_eq!((image.id(), image.conf(), image.keyring()), ("h", "/x/y?z".into(), "/k".into()));
        assert_eq!((image.to_string(), image.shown()), (text.into(), "p/n/a b".into()));
    }

    #[test]
    fn what_is_no_image_is_refused_and_its_reason_is_told() {
        for (text, why) in [
            ("rbd:db", "give POOL"),
            ("rbd:/db", "give POOL"),
            ("rbd:p//db", "give POOL"),
            ("rbd:p/n/", "give POOL"),
            ("rbd:p/n/x/y", "give POOL"),
            ("rbd:p/x?key=secret", "give POOL"),
            ("rbd:p/x?id=", "give POOL"),
            ("rbd:p/x?id=a&id=b", "give POOL"),
            ("rbd:p/x?id=client.a", "without \"client.\""),
            ("rbd:p/x?conf=y", "begin with a slash"),
            ("rbd:p/x%2fy", "no name of Ceph"),
            ("rbd:p/x@snap", "no name of Ceph"),
            ("rbd:p/x%0a", "control characters"),
        ] {
            let refused = Image::named(text).unwrap_err();
            assert_eq!(refused.kind(), Kind::Usage);
            assert!(refused.to_string().contains(why), "{text}: {refused}");
        }
        assert!(Image::named(&format!("p/{}", "x".repeat(NAME_MAX + 1))).is_err());
    }
}
