//! The cipher: data keys, the memory they live in, and AES-256-XTS over whole requests.
//!
//! Pure except for the pages of [`secret_mem`]: it knows no file, no socket, no KMS.

pub mod dek;
#[cfg(test)]
mod residue;
pub mod secret_mem;
mod sector_size;
pub mod wiping_allocator;
pub mod xts;

pub use dek::{BackupKeys, Dek, PassKey, SealKey};
pub use secret_mem::{Secret, SecretFd, SecretKind, SecretMem};
pub use sector_size::SectorSize;
