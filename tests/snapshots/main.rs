//! Snapshots and what is made of them, from outside: through the program, and by the files that it leaves.

#[path = "../common/attach.rs"]
mod attach;
mod attached;
mod clones;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/content.rs"]
mod content;
mod copies;
mod crash;
mod crash_attached;
mod detached;
mod gc;
#[path = "../common/killed.rs"]
mod killed;
#[path = "../common/process.rs"]
mod process;
mod rig;
#[path = "../common/store.rs"]
mod store;
mod tamper;
