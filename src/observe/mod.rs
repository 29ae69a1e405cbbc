//! What a store tells the outside: points in time, events and to whom they go, the audit log.
//!
//! May assume: a store's root folder. Must not know: keys in the clear, guests, sockets.
#![forbid(unsafe_code)]

pub mod audit;
pub mod deliver;
pub mod events;
mod timestamp;

pub use timestamp::Timestamp;
