//! Tokens of hardware security modules, by PKCS#11: keys that are made in a token and never leave it, and
//! what is encrypted and decrypted there.
//!
//! A vendor's PKCS#11 module is other people's code, and is not trusted. It is loaded by a process of its own
//! ([`module`]), which is confined before it is loaded: it reaches the files that the module needs and no
//! others, and has no network unless that is said. A [`Token`] is how another process uses it: it starts that
//! process, waits for no answer without end, and starts it again when the token was lost. What the process
//! answers is a claim ([`message`]).
//!
//! Nothing here knows what a key is for, or who may use it.

mod client;
pub mod message;
pub mod module;
#[cfg(feature = "pkcs11")]
mod token;

pub use client::{Pin, Reply, Token};
pub use message::{Place, Problem, Refusal};
