//! Where an export is: a Unix socket of this host, and the export's name there; or an RBD image, which a
//! process of this program's own serves.
#![forbid(unsafe_code)]

use super::image::{self, Image};
use crate::base::{Error, Kind};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// What the usual address begins with.
const URI: &str = "nbd+unix://";
/// What the short one begins with.
const SHORT: &str = "unix:";
/// The longest path of a socket, in bytes (unix(7)).
const SOCKET_MAX: usize = 107;
/// The longest name of an export that the protocol has, in bytes.
const EXPORT_MAX: usize = 4096;

/// The address of an export.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Address {
    /// Of an NBD server.
    Server(Server),
    /// An RBD image, in a Ceph cluster.
    Rbd(Image),
}

/// An NBD server of this host, and one of its exports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Server {
    socket: String,
    export: String,
}

impl Server {
    /// The socket's path, which is absolute.
    pub fn socket(&self) -> &Path {
        Path::new(&self.socket)
    }

    /// The export's name; the server's own choice if that is empty.
    pub fn export(&self) -> &str {
        &self.export
    }
}

impl Address {
    /// Whether a text is to be an address, and not the path of a device or file.
    pub fn is_meant(text: &str) -> bool {
        let beginnings = [SHORT, "nbd:", "nbd+", image::BEGINNING];
        beginnings.iter().any(|beginning| text.starts_with(beginning))
    }

    /// The NBD server, if it is one.
    pub fn server(&self) -> Option<&Server> {
        if let Address::Server(server) = self { Some(server) } else { None }
    }

    /// The RBD image, if it is one.
    pub fn image(&self) -> Option<&Image> {
        if let Address::Rbd(image) = self { Some(image) } else { None }
    }

    /// Who answers there, in words.
    pub fn who(&self) -> &'static str {
        if self.image().is_some() { "Ceph" } else { "the server" }
    }

    fn new(socket: &str, export: &str) -> Result<Self, String> {
        let (socket, export) = (decoded(socket)?, decoded(export)?);
        if !socket.starts_with('/') {
            return Err("the socket's path is to begin with a slash".into());
        }
        if socket.len() > SOCKET_MAX {
            return Err(format!("the socket's path has {} bytes, and may have {SOCKET_MAX}", socket.len()));
        }
        if export.len() > EXPORT_MAX {
            return Err(format!("the export's name has {} bytes, and may have {EXPORT_MAX}", export.len()));
        }
        Ok(Address::Server(Server { socket, export }))
    }

    fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with(image::BEGINNING) {
            return Image::parse(text).map(Address::Rbd);
        }
        let (place, query) = text.split_once('?').unwrap_or((text, ""));
        let asked = |name: &str| query.strip_prefix(name).filter(|value| !value.contains('&'));
        let how = "give unix:/PATH[?export=NAME] or nbd+unix:///NAME?socket=/PATH";
        if let Some(path) = place.strip_prefix(URI) {
            let export = path.strip_prefix('/').or_else(|| path.is_empty().then_some(""));
            let (Some(export), Some(socket)) = (export, asked("socket=")) else { return Err(how.into()) };
            return Address::new(socket, export);
        }
        match place.strip_prefix(SHORT) {
            Some(socket) if query.is_empty() => Address::new(socket, ""),
            Some(socket) => Address::new(socket, asked("export=").ok_or(how)?),
            None if text.starts_with("nbd") => {
                Err(format!("servers are reached by a Unix socket of this host alone, without TLS; {how}"))
            }
            None => Err(how.into()),
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let what = if text.starts_with(image::BEGINNING) { "RBD image" } else { "NBD export" };
        let parsed = Address::parse(text);
        parsed.map_err(|e| Error::new(Kind::Usage, format!("{text:?} is no address of an {what}: {e}")))
    }
}

impl TryFrom<String> for Address {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Server(Server { socket, export }) => {
                write!(f, "{URI}/{}?socket={}", encoded(export), encoded(socket))
            }
            Address::Rbd(image) => image.fmt(f),
        }
    }
}

/// The text in which `%41` means A. Nothing of it steers a terminal.
pub(super) fn decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = rest.split_at_checked(2);
        let byte = digits.and_then(|(digits, _)| hex::decode(digits).ok());
        let byte = byte.ok_or_else(|| "a % is to be followed by two hexadecimal digits".to_string())?;
        bytes.extend(byte);
        rest = &rest[2..];
    }
    let text = String::from_utf8(bytes).map_err(|_| "it is no UTF-8".to_string())?;
    match text.chars().any(char::is_control) {
        true => Err("it has control characters".into()),
        false => Ok(text),
    }
}

pub(super) fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for &byte in text.as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                encoded.push(byte.into());
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_write_an_address_mean_the_same() {
        for (short, long) in [
            ("unix:/run/x.sock", "nbd+unix:///?socket=/run/x.sock"),
            ("unix:/run/x.sock?export=a/b", "nbd+unix:///a/b?socket=/run/x.sock"),
            ("unix:/run/x%20y?export=%C3%A4%3F", "nbd+unix:///%C3%A4%3F?socket=/run/x%20y"),
        ] {
            let address: Address = short.parse().unwrap();
            assert_eq!(address, long.parse().unwrap(), "{short}");
            assert_eq!(address.to_string(), long);
            let json = serde_json::to_string(&address).unwrap();
            assert_eq!(serde_json::from_str::<Address>(&json).unwrap(), address);
        }
        assert_eq!("nbd+unix://?socket=/x".parse::<Address>().unwrap().server().unwrap().export(), "");
    }

    #[test]
    fn what_is_no_address_is_refused_and_its_reason_is_told() {
        for (text, why) in [
            ("unix:run/x", "begin with a slash"),
            ("unix:", "begin with a slash"),
            ("unix:/x?name=y", "give unix:"),
            ("unix:/x?export=y&tls=no", "give unix:"),
            ("nbd+unix:///x", "give unix:"),
            ("nbd+unix://host/x?socket=/y", "give unix:"),
            ("nbd://host/x", "without TLS"),
            ("nbds+unix:///x?socket=/y", "without TLS"),
            ("unix:/x%0a", "control characters"),
            ("unix:/x%0", "two hexadecimal digits"),
            ("unix:/x%ff", "no UTF-8"),
        ] {
            let refused = text.parse::<Address>().unwrap_err();
            assert_eq!(refused.kind(), Kind::Usage);
            assert!(refused.to_string().contains(why), "{refused}");
        }
        let long = "x".repeat(SOCKET_MAX);
        assert!(format!("unix:/{long}").parse::<Address>().is_err());
        assert!(format!("unix:/x?export={}", "x".repeat(EXPORT_MAX + 1)).parse::<Address>().is_err());
    }

    #[test]
    fn paths_are_no_addresses() {
        for path in ["/dev/sda", "file", "./unix:x", "disk"] {
            assert!(!Address::is_meant(path), "{path}");
        }
        for address in ["unix:/x", "nbd+unix:///?socket=/x", "nbd://host", "nbd:unix:/x"] {
            assert!(Address::is_meant(address), "{address}");
        }
    }
}
