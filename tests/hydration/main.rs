//! Re-keying, flattening and encrypting volumes, from outside: through the program, its sockets and
//! the files that it leaves.

mod clones;
#[path = "../common/mod.rs"]
mod common;
mod crash;
mod flatten;
mod rekey;
mod space;
mod watch;
