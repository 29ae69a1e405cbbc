//! What a store tells the outside: points in time and events.
//!
//! May assume: a store's root folder. Must not know: keys in the clear, guests, sockets.
#![forbid(unsafe_code)]

pub mod audit;
pub mod events;
mod timestamp;

pub use timestamp::Timestamp;
