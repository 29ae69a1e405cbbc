//! Helper processes: this program once more, with a socket as its standard input and a hidden command.
//!
//! What needs a network, credentials or the KMS's store happens in them, never in the host process.

pub mod carry;
pub mod dial;
mod failure;
pub mod fetch;
pub mod grants;
pub mod other_host;
pub mod rbd;
pub mod rewrap;
pub mod slots;
pub mod unwrap;
