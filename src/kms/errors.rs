//! What a KMS can answer instead of a key, worded as AWS KMS words it: the message becomes the `cause` of an
//! event.

use crate::base::{Error, Kind};
use crate::kms::KeyState;

/// Exceptions of AWS KMS that only users of the whole KMS meet, never those of a [`crate::kms::KeyProvider`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// CloudHsmClusterInUseException: another key store has the token.
    CloudHsmClusterInUse,
    /// CloudHsmClusterInvalidConfigurationException: the token lacks what keys need.
    CloudHsmClusterInvalidConfiguration,
    /// CloudHsmClusterNotFoundException.
    CloudHsmClusterNotFound,
    /// CloudHsmClusterNotRelatedException: the token does not have the keys of the one before.
    CloudHsmClusterNotRelated,
    /// ConflictException.
    Conflict,
    /// CustomKeyStoreHasCMKsException.
    CustomKeyStoreHasKeys,
    /// CustomKeyStoreInvalidStateException.
    CustomKeyStoreInvalidState,
    /// CustomKeyStoreNameInUseException.
    CustomKeyStoreNameInUse,
    /// CustomKeyStoreNotFoundException.
    CustomKeyStoreNotFound,
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
    const ALL: [Exception; 21] = [
        Exception::CloudHsmClusterInUse,
        Exception::CloudHsmClusterInvalidConfiguration,
        Exception::CloudHsmClusterNotFound,
        Exception::CloudHsmClusterNotRelated,
        Exception::Conflict,
        Exception::CustomKeyStoreHasKeys,
        Exception::CustomKeyStoreInvalidState,
        Exception::CustomKeyStoreNameInUse,
        Exception::CustomKeyStoreNotFound,
        Exception::DryRun,
        Exception::ExpiredImportToken,
        Exception::IncorrectKeyMaterial,
        Exception::InvalidAliasName,
        Exception::InvalidArn,
        Exception::InvalidGrantId,
        Exception::InvalidGrantToken,
        Exception::InvalidImportToken,
        Exception::InvalidMarker,
        Exception::LimitExceeded,
        Exception::MalformedPolicyDocument,
        Exception::Tag,
    ];

    /// The exception of that name on the wire.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|exception| exception.name() == name)
    }

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Exception::CloudHsmClusterInUse => "CloudHsmClusterInUseException",
            Exception::CloudHsmClusterInvalidConfiguration => "CloudHsmClusterInvalidConfigurationException",
            Exception::CloudHsmClusterNotFound => "CloudHsmClusterNotFoundException",
            Exception::CloudHsmClusterNotRelated => "CloudHsmClusterNotRelatedException",
            Exception::Conflict => "ConflictException",
            Exception::CustomKeyStoreHasKeys => "CustomKeyStoreHasCMKsException",
            Exception::CustomKeyStoreInvalidState => "CustomKeyStoreInvalidStateException",
            Exception::CustomKeyStoreNameInUse => "CustomKeyStoreNameInUseException",
            Exception::CustomKeyStoreNotFound => "CustomKeyStoreNotFoundException",
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
    /// KMSInvalidStateException, the key store that has the key is not connected.
    #[error("{0}")]
    KeyStoreDisconnected(String),
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
    /// UnrecognizedClientException and its kin: the KMS does not believe who asks.
    #[error("{0}")]
    NotAuthenticated(String),
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
    /// No KMS was asked: the settings do not allow this key.
    #[error("{0}")]
    NotAllowed(String),
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
            KmsError::PendingDeletion(_)
            | KmsError::PendingImport(_)
            | KmsError::KeyStoreDisconnected(_)
            | KmsError::InvalidState(_) => "KMSInvalidStateException",
            KmsError::Unavailable(_) => "KeyUnavailableException",
            KmsError::NotFound(_) => "NotFoundException",
            KmsError::AlreadyExists(_) => "AlreadyExistsException",
            KmsError::AccessDenied(_) | KmsError::NotAllowed(_) => "AccessDeniedException",
            KmsError::NotAuthenticated(_) => "UnrecognizedClientException",
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

    /// The error that a KMS means which answered with this `__type` (without its namespace) and this message.
    ///
    /// The name alone decides: AWS gives most of them one HTTP status.
    pub fn of_wire(name: &str, message: String) -> Self {
        // Some have no message; then the name is the word that there is.
        let message = if message.is_empty() { name.to_owned() } else { message };
        match name {
            "DisabledException" => KmsError::Disabled(message),
            // It does not say in which state: the key does ([`KmsError::in_state`]).
            "KMSInvalidStateException" => KmsError::InvalidState(message),
            "KeyUnavailableException" | "DependencyTimeoutException" => KmsError::Unavailable(message),
            // "The request can be retried", as AWS documents it; of our own store it would mean damage.
            "KMSInternalException" => KmsError::Unavailable(message),
            "NotFoundException" => KmsError::NotFound(message),
            "AlreadyExistsException" => KmsError::AlreadyExists(message),
            "InvalidCiphertextException" => KmsError::InvalidCiphertext,
            "IncorrectKeyException" => KmsError::IncorrectKey(message),
            "ThrottlingException" => KmsError::Throttled(message),
            "UnsupportedOperationException" => KmsError::Unsupported(message),
            "ValidationException" | "InvalidKeyUsageException" | "SerializationException" => {
                KmsError::Validation(message)
            }
            "AccessDeniedException" | "NotAuthorized" | "OptInRequired" => KmsError::AccessDenied(message),
            "ExpiredTokenException"
            | "IncompleteSignatureException"
            | "InvalidClientTokenId"
            | "InvalidSignatureException"
            | "MissingAuthenticationTokenException"
            | "UnrecognizedClientException" => KmsError::NotAuthenticated(message),
            other => match Exception::named(other) {
                Some(exception) => KmsError::Other(exception, message),
                None => KmsError::Internal(format!("{other}: {message}")),
            },
        }
    }

    /// An invalid state as what it is for a key in `state`, in the same words; other
    /// errors stay what they are.
    pub fn in_state(self, state: KeyState) -> Self {
        match (self, state) {
            (
                KmsError::InvalidState(message),
                KeyState::PendingDeletion | KeyState::PendingReplicaDeletion,
            ) => KmsError::PendingDeletion(message),
            (KmsError::InvalidState(message), KeyState::PendingImport) => KmsError::PendingImport(message),
            (KmsError::InvalidState(message), KeyState::Unavailable) => {
                KmsError::KeyStoreDisconnected(message)
            }
            (error, _) => error,
        }
    }

    /// The error for the reader of a command: the KMS's message, and where it is plain what to do, that, in
    /// the commands of the provider of this name. `key` is the key as those commands take it.
    pub fn with_advice_of(self, provider: &str, key: &str) -> Error {
        let advice = match provider {
            "embedded" => self.advice_of_embedded(key),
            "aws" => self.advice_of_aws(key),
            _ => None,
        };
        match advice.or_else(|| self.advice_of_any()) {
            Some(advice) => self.advised(&advice),
            None => self.into(),
        }
    }

    fn advice_of_any(&self) -> Option<String> {
        match self {
            KmsError::InvalidCiphertext => {
                Some("the wrapped data key is damaged, or was made for another volume".into())
            }
            _ => None,
        }
    }

    fn advice_of_aws(&self, key: &str) -> Option<String> {
        Some(match self {
            KmsError::Disabled(_) => {
                format!("enable it with \"aws kms enable-key --key-id {key}\" and try again")
            }
            KmsError::PendingDeletion(_) => format!(
                "\"aws kms cancel-key-deletion --key-id {key}\" and \"aws kms enable-key --key-id {key}\" \
                 make it usable again"
            ),
            KmsError::PendingImport(_) => {
                "import its key material again (\"aws kms import-key-material …\") and try again".to_string()
            }
            KmsError::KeyStoreDisconnected(_) => {
                "\"aws kms connect-custom-key-store\" connects the key store that has it".to_string()
            }
            KmsError::AccessDenied(_) => {
                "look at the key's policy and at this host's credentials (docs/kms.md)".to_string()
            }
            KmsError::NotAuthenticated(_) => {
                "look at this host's credentials, and at its clock: a signature holds for five minutes \
                 (docs/kms.md)"
                    .to_string()
            }
            _ => return None,
        })
    }

    fn advised(self, advice: &str) -> Error {
        let e = Error::from(self);
        let message = format!("{}; {advice}", e.to_string().trim_end_matches('.'));
        e.reworded(message)
    }

    fn advice_of_embedded(&self, key: &str) -> Option<String> {
        Some(match self {
            KmsError::Disabled(_) => format!("enable it with \"sealblk key enable {key}\" and try again"),
            KmsError::PendingDeletion(_) => format!(
                "\"sealblk key cancel-deletion {key}\" and \"sealblk key enable {key}\" make it usable again"
            ),
            KmsError::KeyStoreDisconnected(_) => {
                "\"sealblk kms store list\" shows the key store that has it, and \"sealblk kms store \
                 connect\" connects it"
                    .to_string()
            }
            KmsError::NotFound(_) => "\"sealblk key list\" shows which keys there are".to_string(),
            _ => return None,
        })
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
            KmsError::NotAllowed(_) => Kind::Refused,
            KmsError::Other(Exception::CloudHsmClusterNotFound | Exception::CustomKeyStoreNotFound, _) => {
                Kind::NotFound
            }
            KmsError::Other(
                Exception::CloudHsmClusterInUse
                | Exception::CustomKeyStoreHasKeys
                | Exception::CustomKeyStoreNameInUse,
                _,
            ) => Kind::Busy,
            KmsError::Other(Exception::InvalidAliasName | Exception::Tag, _) => Kind::Usage,
            KmsError::Other(Exception::MalformedPolicyDocument, _) => Kind::Usage,
            _ => Kind::KmsRefused,
        };
        Error::of(kind, e)
    }
}

/// ValidationException for a number outside its range.
pub(in crate::kms) fn out_of_range<T: PartialOrd + std::fmt::Display>(
    value: T,
    field: &str,
    range: &std::ops::RangeInclusive<T>,
) -> KmsError {
    let (relation, bound) =
        if value < *range.start() { ("greater", range.start()) } else { ("less", range.end()) };
    KmsError::Validation(format!(
        "1 validation error detected: Value '{value}' at '{field}' failed to satisfy constraint: Member must \
         have value {relation} than or equal to {bound}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_on_the_wire_decides_and_the_message_stays() {
        let of = |name: &str, message: &str| KmsError::of_wire(name, message.to_owned());
        let state = || of("KMSInvalidStateException", "words");
        assert_eq!(state(), KmsError::InvalidState("words".into()));
        assert_eq!(state().in_state(KeyState::Enabled), state());
        assert_eq!(state().in_state(KeyState::PendingDeletion), KmsError::PendingDeletion("words".into()));
        assert_eq!(state().in_state(KeyState::PendingImport), KmsError::PendingImport("words".into()));
        let disabled = || of("DisabledException", "words");
        assert_eq!(disabled().in_state(KeyState::PendingDeletion), disabled());
        assert_eq!(of("InvalidCiphertextException", ""), KmsError::InvalidCiphertext);
        assert_eq!(of("ThrottlingException", "Rate exceeded"), KmsError::Throttled("Rate exceeded".into()));
        assert_eq!(
            of("LimitExceededException", "too many"),
            KmsError::Other(Exception::LimitExceeded, "too many".into())
        );
        assert_eq!(of("NewException", "x"), KmsError::Internal("NewException: x".into()));
        assert_eq!(of("AccessDeniedException", ""), KmsError::AccessDenied("AccessDeniedException".into()));
    }

    #[test]
    fn every_error_of_ours_comes_back_from_its_own_name() {
        let m = || "words".to_string();
        let all = [
            KmsError::Disabled(m()),
            KmsError::InvalidState(m()),
            KmsError::Unavailable(m()),
            KmsError::NotFound(m()),
            KmsError::AlreadyExists(m()),
            KmsError::AccessDenied(m()),
            KmsError::NotAuthenticated(m()),
            KmsError::InvalidCiphertext,
            KmsError::IncorrectKey(m()),
            KmsError::Validation(m()),
            KmsError::Throttled(m()),
            KmsError::Unsupported(m()),
        ];
        let others = Exception::ALL.map(|exception| KmsError::Other(exception, m()));
        for error in all.into_iter().chain(others) {
            assert_eq!(KmsError::of_wire(error.type_name(), m()), error);
        }
    }

    #[test]
    fn advice_names_the_provider_s_own_commands() {
        let disabled = || KmsError::Disabled("it is disabled.".into());
        let words = |provider| disabled().with_advice_of(provider, "arn:x").to_string();
        assert!(
            words("aws").starts_with("it is disabled; ")
                && words("aws").contains("aws kms enable-key --key-id arn:x")
        );
        assert!(words("embedded").contains("sealblk key enable arn:x"));
        let expired = KmsError::of_wire("InvalidSignatureException", "Signature expired".into());
        assert!(expired.with_advice_of("aws", "arn:x").to_string().contains("and at its clock"));
        assert_eq!(words("another"), "it is disabled.");
    }
}
