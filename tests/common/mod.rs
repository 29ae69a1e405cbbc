//! What the tests share.

pub mod disk;
pub mod frontend;
