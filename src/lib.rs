//! sealblk gives a virtual machine an encrypted disk that the guest cannot tell from an ordinary one.
//!
//! ```text
//! cli ─► attach ─► vhost ─► virtio          who asks; the VMM's protocol; the guest's requests, pure
//!           │        │
//!           │        └────► volume::io ─► crypt ─► store     sectors, cipher, ciphertext bytes
//!           ├──► volume (catalogue, life cycle) ─► kms (providers)
//!           └──► observe (events)
//! ```
//!
//! An arrow never points back up. `virtio` and `crypt` know no file, no socket, no KMS; `store` sees
//! ciphertext only and never a key; `kms` knows nothing of volumes but an encryption context.

pub mod attach;
pub mod cli;
pub mod config;
pub mod crypt;
pub mod error;
pub mod kms;
pub mod observe;
pub mod root;
pub mod store;
pub mod vhost;
pub mod virtio;
pub mod volume;

pub use error::{Error, Kind, Result};
