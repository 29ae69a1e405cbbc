//! I/O errors of the store in plain words.

use crate::kms::KmsError;
use std::io::{Error, ErrorKind};
use std::path::Path;

/// What was attempted on what, and what can be done about it.
pub fn failed(what: &str, path: &Path, e: &Error) -> KmsError {
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
