//! Key management: the embedded KMS, the same served as AWS KMS is, the AWS provider against that
//! server, and the root key.

#[cfg(all(feature = "aws", feature = "kms-server"))]
mod aws;
#[path = "../common/mod.rs"]
mod common;
mod embedded;
mod features;
#[cfg(all(feature = "pkcs11", feature = "kms-server"))]
mod hsm;
#[cfg(feature = "pkcs11")]
mod hsm_ends;
#[cfg(all(feature = "aws", feature = "pkcs11", feature = "kms-server"))]
mod mixed;
#[cfg(feature = "pkcs11")]
mod pinentry;
#[cfg(all(feature = "aws", feature = "kms-server"))]
mod regions;
mod root_key;
#[cfg(feature = "kms-server")]
mod server;
mod suite;
