//! What the tests share.

// Each test binary uses its own part of this.
#![allow(dead_code, unused_imports, unused_macros)]

pub mod attach;
pub mod content;
pub mod disk;
pub mod forward;
pub mod frontend;
pub mod guest;
pub mod helpers;
pub mod killed;
pub mod kms_server;
pub mod leaks;
pub mod loop_disk;
pub mod patience;
pub mod process;
pub mod qemu;
pub mod rig;
pub mod softhsm;
pub mod store;
pub mod successor;
pub mod trace;
pub mod tree;
