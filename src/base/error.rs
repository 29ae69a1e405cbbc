//! The error of every command: what was attempted, on what, and what the reader can do.
//!
//! [`Kind`] decides the exit code. Modules with a vocabulary of their own (`kms`, `virtio`) have their own
//! enums and convert into this one at their border. What an error was made from stays its source, so that
//! whoever has to decide something asks that, and never the text.

use std::fmt;
use std::io;

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
    /// The file system has too little space. Exit code 8, as for whatever else the machine lacks.
    NoSpace,
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
            Kind::Unsupported | Kind::NoSpace => 8,
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
            Kind::NoSpace,
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
            Kind::NoSpace => "no-space",
        }
    }
}

/// An error with its kind and a sentence for the reader. Never carries key material.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    /// All that the reader is told, the source's words among it.
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that reads `message`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), source: None }
    }

    /// An error of `kind` in the words of `source`.
    pub fn of(kind: Kind, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Error { kind, message: source.to_string(), source: Some(Box::new(source)) }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The number of the system's error that it was made from, if it was made from one.
    pub fn raw_os_error(&self) -> Option<i32> {
        errno(self)
    }

    /// This error, with what was attempted put before it: `what: message`.
    pub fn context(self, what: impl fmt::Display) -> Self {
        let message = format!("{what}: {}", self.message);
        self.reworded(message)
    }

    /// This error, its kind and its source, in other words.
    pub fn reworded(self, message: impl Into<String>) -> Self {
        Error { message: message.into(), ..self }
    }
}

/// The number of the system's error that is `error`, or that it was made from.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let chain = std::iter::successors(Some(error), |e| e.source());
    chain.filter_map(|e| e.downcast_ref::<io::Error>()).find_map(io::Error::raw_os_error)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<io::Error> for Error {
    fn from(e: io::Error) -> Self {
        let kind = match e.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::Unsupported => Kind::Unsupported,
            _ if e.get_ref().is_some_and(|inner| inner.is::<crate::base::root::files::Strange>()) => {
                Kind::Corrupt
            }
            // It is one of ours, which has come a way that takes those of the system.
            _ => e.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).map_or(Kind::Other, Error::kind),
        };
        Error::of(kind, e)
    }
}

impl From<nix::Error> for Error {
    fn from(e: nix::Error) -> Self {
        io::Error::from(e).into()
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

/// An error of the system, with what was attempted put before it, for those who pass `io::Error`s on. Its
/// kind stays, and it is the source.
pub(crate) fn attempted(what: impl fmt::Display, e: io::Error) -> io::Error {
    io::Error::new(e.kind(), Attempted { message: format!("{what}: {e}"), source: e })
}

#[derive(Debug)]
struct Attempted {
    message: String,
    source: io::Error,
}

impl fmt::Display for Attempted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Attempted {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn the_system_s_error_survives_every_word_that_is_put_before_it() {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::from(attempted("write", full())).context("copy").context("export");
        assert_eq!(error.to_string(), format!("export: copy: write: {}", full()));
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        let wrapped = Error::of(Kind::Busy, error).reworded("wait");
        assert_eq!((wrapped.kind(), wrapped.raw_os_error()), (Kind::Busy, Some(libc::ENOSPC)));
        assert!(wrapped.source().is_some_and(|e| e.is::<Error>()));
        assert_eq!(Error::from(nix::Error::EPERM).raw_os_error(), Some(libc::EPERM));
        assert_eq!(Error::new(Kind::Other, "no error of the system's").raw_os_error(), None);
    }
}
