//! Re-keying, flattening and encrypting volumes, from outside: through the program, its sockets and the files that it leaves.

#[path = "../common/attach.rs"]
mod attach;
mod clones;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/content.rs"]
mod content;
mod crash;
mod flatten;
#[path = "../common/killed.rs"]
mod killed;
#[path = "../common/process.rs"]
mod process;
mod rekey;
#[path = "../snapshots/rig.rs"]
mod rig;
#[path = "../common/store.rs"]
mod store;
mod watch;
