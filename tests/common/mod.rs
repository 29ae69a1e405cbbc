//! What the tests share.

pub mod frontend;
