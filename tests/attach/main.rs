//! Attaching and detaching from outside: the key's states, crashes, locks, sockets, and everything that is refused.

#[path = "../common/attach.rs"]
mod attach;
#[path = "../common/mod.rs"]
mod common;
mod control;
mod crash;
mod damage;
mod kms_states;
mod locks;
#[path = "../common/process.rs"]
mod process;
mod rewrap;
mod show;
mod sockets;
#[path = "../common/store.rs"]
mod store;
#[path = "../common/attach_tree.rs"]
mod tree;
mod ways;
mod wrapped_keys;
