//! Key management: the embedded KMS, the same served as AWS KMS is, the AWS provider against that server, and the root key.

mod aws;
#[path = "../common/mod.rs"]
mod common;
mod embedded;
mod root_key;
mod server;
mod suite;
