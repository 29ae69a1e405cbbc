//! I/O errors of the store in plain words.

use crate::crypt::secret_mem::SecretBytes;
use crate::kms::KmsError;
use std::io::{Error, ErrorKind};
use std::path::Path;

/// Secret memory that `fill` fills; what keeps it from being made is Internal.
pub(super) fn secret<const N: usize>(
    fill: impl FnOnce(&mut [u8; N]) -> Result<(), KmsError>,
) -> Result<SecretBytes<N>, KmsError> {
    SecretBytes::filled(|bytes| fill(bytes).map_err(Refused::Filling)).map_err(|e| match e {
        Refused::Filling(e) => e,
        Refused::Memory(e) => KmsError::Internal(e.to_string()),
    })
}

enum Refused {
    Filling(KmsError),
    Memory(crate::base::Error),
}

impl From<crate::base::Error> for Refused {
    fn from(e: crate::base::Error) -> Self {
        Refused::Memory(e)
    }
}

/// What was attempted on what, and what can be done about it.
pub(super) fn failed(what: &str, path: &Path, e: &Error) -> KmsError {
    let path = path.display();
    KmsError::Internal(match e.kind() {
        ErrorKind::PermissionDenied => {
            format!("{what}: no permission for {path}; run this as the user who owns the store")
        }
        ErrorKind::ReadOnlyFilesystem => {
            format!("{what}: {path} is on a read-only file system, so nothing can be changed there")
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            format!("{what}: no space left for {path}; make room and try again")
        }
        _ => format!("{what} {path}: {e}"),
    })
}
