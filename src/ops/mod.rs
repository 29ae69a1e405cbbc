//! The use cases.
#![forbid(unsafe_code)]

pub mod clone;
pub mod copy;
pub mod create;
pub mod delete;
pub mod export;
pub mod flatten;
pub mod gc;
pub mod import;
pub mod import_in_place;
pub mod keys;
pub mod rekey;
pub mod resize;
pub mod rewrap;
pub mod shred;
pub mod snapshot;
