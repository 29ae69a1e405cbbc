//! What is changed of a volume while it is attached.

pub mod hydrate;
mod rekey;
mod resize;
mod snapshot;
