//! Volumes.

pub mod io;
