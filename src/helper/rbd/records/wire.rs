//! What a process and the one that reaches its store's pool say to each other: a line of JSON each, in turns.
//!
//! Both sides are bounded, and neither believes the other: the one has librados, which speaks to a network,
//! the other may be a host process, which a guest may have broken into.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind};
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind};

/// The longest record in a pool, in bytes.
pub(super) const MAX_RECORD: usize = 8 << 20;
/// The longest line in bytes: a record in which every second byte has to be escaped.
pub(super) const MAX_LINE: usize = 2 * MAX_RECORD + (64 << 10);
/// The longest name, in bytes.
const MAX_NAME: usize = 160;
/// The longest text that says who has a lock.
pub(super) const MAX_HOLDER: usize = 4 << 10;
/// What a folder of records may be called, beside those of volumes.
const FOLDERS: [&str; 4] = ["snapshots", "ledger", "store", "layers"];
/// The folder of the volumes' folders.
pub(super) const VOLUMES: &str = "volumes";

/// Which pool is to be reached.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Begin {
    /// The address of an image there, whatever its name.
    pub(super) image: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) enum Request {
    Read { folder: String, file: String },
    Names { folder: String },
    Create { folder: String, file: String, text: String },
    Replace { folder: String, file: String, text: String },
    Remove { folder: String, file: String },
    Rename { folder: String, file: String, to: String },
    MakeFolder { folder: String },
    RemoveFolder { folder: String },
    Lock { name: String, holder: String },
    Unlock { name: String },
    Holder { name: String },
    BreakLock { name: String, holder: String },
    RemoveImage { name: String },
    MakeImageLonger { name: String, len: u64 },
    Narrow { folder: String, layers: Vec<String> },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) enum Answer {
    /// The pool is reached; the id of its cluster.
    Ready(String),
    Done,
    Text(String),
    Names(Vec<String>),
    /// The lock is another's.
    Anothers(Option<String>),
    /// Who has the lock.
    HeldBy(Option<String>),
    Failed(Problem, String),
}

/// What kind of error it is, as far as that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Problem {
    NotFound,
    Exists,
    Busy,
    NoSpace,
    Unsupported,
    Usage,
    Corrupt,
    Other,
}

impl Problem {
    pub(super) fn error(self, message: String) -> io::Error {
        let (io_kind, kind) = match self {
            Problem::NotFound => (ErrorKind::NotFound, Kind::NotFound),
            Problem::Exists => (ErrorKind::AlreadyExists, Kind::Other),
            Problem::Busy => (ErrorKind::ResourceBusy, Kind::Busy),
            Problem::NoSpace => (ErrorKind::StorageFull, Kind::NoSpace),
            Problem::Unsupported => (ErrorKind::Unsupported, Kind::Unsupported),
            Problem::Usage => (ErrorKind::InvalidInput, Kind::Usage),
            Problem::Corrupt => (ErrorKind::InvalidData, Kind::Corrupt),
            Problem::Other => (ErrorKind::Other, Kind::Other),
        };
        io::Error::new(io_kind, Error::new(kind, message))
    }

    pub(super) fn of_error(e: &Error) -> Self {
        match e.kind() {
            Kind::NotFound => Problem::NotFound,
            Kind::Busy => Problem::Busy,
            Kind::NoSpace => Problem::NoSpace,
            Kind::Unsupported => Problem::Unsupported,
            Kind::Usage => Problem::Usage,
            Kind::Corrupt => Problem::Corrupt,
            _ => Problem::Other,
        }
    }

    pub(super) fn of_io(e: &io::Error) -> Self {
        match e.kind() {
            ErrorKind::NotFound => Problem::NotFound,
            ErrorKind::AlreadyExists => Problem::Exists,
            ErrorKind::ResourceBusy => Problem::Busy,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Problem::NoSpace,
            _ => Problem::Other,
        }
    }
}

/// Whether this can be a name: of a record, a volume or a lock.
pub(super) fn is_name(text: &str) -> bool {
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MAX_NAME).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(is_known)
}

/// Whether this can be a folder of records.
pub(super) fn is_folder(text: &str) -> bool {
    FOLDERS.contains(&text) || of_volume(text).is_some()
}

/// The volume whose folder of records this is.
pub(super) fn of_volume(folder: &str) -> Option<&str> {
    let volume = folder.strip_prefix(VOLUMES)?.strip_prefix('/')?;
    is_name(volume).then_some(volume)
}

/// Whether this can be what a lock is called: one name, or one in a folder.
pub(super) fn is_lock(text: &str) -> bool {
    let mut parts = text.split('/');
    text.matches('/').count() <= 1 && parts.all(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for name in ["vol-0123.json", "a", "x_y"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", ".", "..", ".x", "a/b", "a b", "a\n", "\u{e4}", &"x".repeat(161)] {
            assert!(!is_name(name) && !is_folder(name), "{name}");
        }
        assert!(is_folder("ledger") && is_folder("volumes/vol-1"));
        assert!(!is_folder("volumes") && !is_folder("volumes/") && !is_folder("volumes/a/b"));
        assert!(!is_folder("other") && !is_folder("volumes/.."));
        assert!(is_lock("names") && is_lock("volumes/vol-1") && !is_lock("a/b/c") && !is_lock("a/"));
    }

    #[test]
    fn a_request_says_what_is_known_and_nothing_else() {
        for text in [
            r#"{"read":{"folder":"ledger"}}"#,
            r#"{"read":{"folder":"ledger","file":"x","more":1}}"#,
            r#"{"delete-everything":{}}"#,
            r#"["read"]"#,
        ] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
    }
}
