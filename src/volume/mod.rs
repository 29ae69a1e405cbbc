//! A volume that this process has: its layers opened, each with its cipher.
#![forbid(unsafe_code)]

pub mod kept;
pub mod layers;
pub mod open;
