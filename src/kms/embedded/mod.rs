//! kms/embedded
