//! What a KMS can answer instead of a key, worded as AWS KMS words it: the message becomes the `cause` of an
//! event.

use crate::error::{Error, Kind};

/// Exceptions of AWS KMS that only users of the whole KMS meet, never those of a [`super::KeyProvider`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// ConflictException.
    Conflict,
    /// DryRunOperationException: it would have been done.
    DryRun,
    /// ExpiredImportTokenException.
    ExpiredImportToken,
    /// IncorrectKeyMaterialException: not the material that the key had before.
    IncorrectKeyMaterial,
    /// InvalidAliasNameException.
    InvalidAliasName,
    /// InvalidArnException.
    InvalidArn,
    /// InvalidGrantIdException.
    InvalidGrantId,
    /// InvalidGrantTokenException.
    InvalidGrantToken,
    /// InvalidImportTokenException.
    InvalidImportToken,
    /// InvalidMarkerException.
    InvalidMarker,
    /// LimitExceededException: there are too many of something; trying again does not help.
    LimitExceeded,
    /// MalformedPolicyDocumentException.
    MalformedPolicyDocument,
    /// TagException.
    Tag,
}

impl Exception {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Exception::Conflict => "ConflictException",
            Exception::DryRun => "DryRunOperationException",
            Exception::ExpiredImportToken => "ExpiredImportTokenException",
            Exception::IncorrectKeyMaterial => "IncorrectKeyMaterialException",
            Exception::InvalidAliasName => "InvalidAliasNameException",
            Exception::InvalidArn => "InvalidArnException",
            Exception::InvalidGrantId => "InvalidGrantIdException",
            Exception::InvalidGrantToken => "InvalidGrantTokenException",
            Exception::InvalidImportToken => "InvalidImportTokenException",
            Exception::InvalidMarker => "InvalidMarkerException",
            Exception::LimitExceeded => "LimitExceededException",
            Exception::MalformedPolicyDocument => "MalformedPolicyDocumentException",
            Exception::Tag => "TagException",
        }
    }
}

/// Why a KMS did not do it. The text is the KMS's own message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KmsError {
    /// DisabledException.
    #[error("{0}")]
    Disabled(String),
    /// KMSInvalidStateException, the key waits for deletion.
    #[error("{0}")]
    PendingDeletion(String),
    /// KMSInvalidStateException, the key has no material yet.
    #[error("{0}")]
    PendingImport(String),
    /// KMSInvalidStateException of another sort, such as cancelling a deletion that nobody asked for.
    #[error("{0}")]
    InvalidState(String),
    /// KeyUnavailableException, DependencyTimeoutException: a later try may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// NotFoundException.
    #[error("{0}")]
    NotFound(String),
    /// AlreadyExistsException.
    #[error("{0}")]
    AlreadyExists(String),
    /// AccessDeniedException.
    #[error("{0}")]
    AccessDenied(String),
    /// InvalidCiphertextException: wrong context, tampered blob, garbage; AWS gives it no message.
    #[error("InvalidCiphertextException")]
    InvalidCiphertext,
    /// IncorrectKeyException.
    #[error("{0}")]
    IncorrectKey(String),
    /// ValidationException and its kin: the request makes no sense.
    #[error("{0}")]
    Validation(String),
    /// ThrottlingException.
    #[error("{0}")]
    Throttled(String),
    /// The KMS was not reached.
    #[error("{0}")]
    Transport(String),
    /// UnsupportedOperationException, or the provider lacks it.
    #[error("{0}")]
    Unsupported(String),
    /// The embedded KMS's store is damaged or was tampered with.
    #[error("{0}")]
    Corrupt(String),
    /// KMSInternalException, I/O errors of the store.
    #[error("{0}")]
    Internal(String),
    /// Another exception of AWS's, and its message.
    #[error("{1}")]
    Other(Exception, String),
}

impl KmsError {
    /// DryRunOperationException.
    pub fn dry_run() -> Self {
        let message = "The request would have succeeded, but the DryRun option is set.";
        KmsError::Other(Exception::DryRun, message.into())
    }

    /// The name that AWS's wire has for it.
    pub fn type_name(&self) -> &'static str {
        match self {
            KmsError::Disabled(_) => "DisabledException",
            KmsError::PendingDeletion(_) | KmsError::PendingImport(_) | KmsError::InvalidState(_) => {
                "KMSInvalidStateException"
            }
            KmsError::Unavailable(_) => "KeyUnavailableException",
            KmsError::NotFound(_) => "NotFoundException",
            KmsError::AlreadyExists(_) => "AlreadyExistsException",
            KmsError::AccessDenied(_) => "AccessDeniedException",
            KmsError::InvalidCiphertext => "InvalidCiphertextException",
            KmsError::IncorrectKey(_) => "IncorrectKeyException",
            KmsError::Validation(_) => "ValidationException",
            KmsError::Throttled(_) => "ThrottlingException",
            KmsError::Transport(_) => "DependencyTimeoutException",
            KmsError::Unsupported(_) => "UnsupportedOperationException",
            KmsError::Corrupt(_) | KmsError::Internal(_) => "KMSInternalException",
            KmsError::Other(exception, _) => exception.name(),
        }
    }

    /// The error for the reader of a command: the KMS's message, and where it is plain what to do, that. `key`
    /// is the key as `sealblk key` takes it.
    pub fn with_advice(self, key: &str) -> Error {
        let advice = match &self {
            KmsError::Disabled(_) => format!("enable it with \"sealblk key enable {key}\" and try again"),
            KmsError::PendingDeletion(_) => format!(
                "\"sealblk key cancel-deletion {key}\" and \"sealblk key enable {key}\" make it usable again"
            ),
            KmsError::NotFound(_) => "\"sealblk key list\" shows which keys there are".to_string(),
            KmsError::InvalidCiphertext => {
                "the wrapped data key is damaged, or was made for another volume".to_string()
            }
            _ => return self.into(),
        };
        let e = Error::from(self);
        Error::new(e.kind(), format!("{}; {advice}", e.to_string().trim_end_matches('.')))
    }
}

impl From<KmsError> for Error {
    fn from(e: KmsError) -> Self {
        let kind = match &e {
            KmsError::Unavailable(_) | KmsError::Throttled(_) | KmsError::Transport(_) => {
                Kind::KmsUnavailable
            }
            KmsError::NotFound(_) => Kind::NotFound,
            KmsError::AlreadyExists(_) => Kind::Busy,
            KmsError::Validation(_) => Kind::Usage,
            KmsError::Unsupported(_) => Kind::Unsupported,
            KmsError::Corrupt(_) => Kind::Corrupt,
            KmsError::Internal(_) => Kind::Other,
            KmsError::Other(Exception::InvalidAliasName | Exception::Tag, _) => Kind::Usage,
            KmsError::Other(Exception::MalformedPolicyDocument, _) => Kind::Usage,
            _ => Kind::KmsRefused,
        };
        Error::new(kind, e.to_string())
    }
}
