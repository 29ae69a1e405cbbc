//! The error of every command: what was attempted, on what, and what the reader can do.
//!
//! [`Kind`] decides the exit code. Modules with a vocabulary of their own (`kms`, `virtio`) have their
//! own enums and convert into this one at their border.

use std::fmt;

/// Shorthand for results with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it is, which decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Anything without a kind of its own: I/O errors, failed system calls. Exit code 1.
    Other,
    /// The arguments do not make sense. Exit code 2, as clap uses it.
    Usage,
    /// No such volume, key or file. Exit code 3.
    NotFound,
    /// In use, or exists already. Exit code 4.
    Busy,
    /// The KMS answered and refused: key disabled, pending deletion, access denied, … Exit code 5.
    KmsRefused,
    /// The settings do not allow it: require-encrypted, kms-keys. Exit code 5, as where a KMS refuses.
    Refused,
    /// The KMS could not be reached or is failing; a later try may succeed. Exit code 6.
    KmsUnavailable,
    /// Metadata or a store is damaged, tampered with, or of an unknown version. Exit code 7.
    Corrupt,
    /// The machine or the file lacks what is needed. Exit code 8.
    Unsupported,
}

impl Kind {
    /// The process exit code for this kind, 1..=8.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Other => 1,
            Kind::Usage => 2,
            Kind::NotFound => 3,
            Kind::Busy => 4,
            Kind::KmsRefused | Kind::Refused => 5,
            Kind::KmsUnavailable => 6,
            Kind::Corrupt => 7,
            Kind::Unsupported => 8,
        }
    }

    /// The kind of that [`name`](Kind::name); `Other` for a name of a newer version.
    pub fn from_name(name: &str) -> Self {
        let all = [
            Kind::Usage,
            Kind::NotFound,
            Kind::Busy,
            Kind::KmsRefused,
            Kind::Refused,
            Kind::KmsUnavailable,
            Kind::Corrupt,
            Kind::Unsupported,
        ];
        all.into_iter().find(|kind| kind.name() == name).unwrap_or(Kind::Other)
    }

    /// The name used in `--json` output.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Other => "error",
            Kind::Usage => "usage",
            Kind::NotFound => "not-found",
            Kind::Busy => "busy",
            Kind::KmsRefused => "kms-refused",
            Kind::Refused => "refused",
            Kind::KmsUnavailable => "kms-unavailable",
            Kind::Corrupt => "corrupt",
            Kind::Unsupported => "unsupported",
        }
    }
}

/// An error with its kind and a sentence for the reader. Never carries key material.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
}

impl Error {
    /// An error of `kind` that reads `message`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into() }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The same error, with what was attempted put before it: `what: message`.
    pub fn context(self, what: impl fmt::Display) -> Self {
        Error { kind: self.kind, message: format!("{what}: {}", self.message) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        let kind = match e.kind() {
            std::io::ErrorKind::NotFound => Kind::NotFound,
            std::io::ErrorKind::Unsupported => Kind::Unsupported,
            _ if e.get_ref().is_some_and(|inner| inner.is::<crate::base::root::files::Strange>()) => {
                Kind::Corrupt
            }
            _ => Kind::Other,
        };
        Error::new(kind, e.to_string())
    }
}

impl From<nix::Error> for Error {
    fn from(e: nix::Error) -> Self {
        std::io::Error::from(e).into()
    }
}

/// Adds what was attempted to a failing result.
pub trait Context<T> {
    /// Turns the error into an [`Error`] that begins with `what()`.
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| e.into().context(what()))
    }
}
