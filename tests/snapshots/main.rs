//! Snapshots and what is made of them, from outside: through the program, and by the files that it leaves.

mod attached;
mod backup;
mod clones;
#[path = "../common/mod.rs"]
mod common;
mod copies;
mod crash;
mod crash_attached;
mod detached;
mod gc;
mod lazy;
mod moves;
mod moves_by_ssh;
mod nearly_full;
#[cfg(feature = "object-store")]
mod object_store;
#[cfg(feature = "object-store")]
mod object_store_faults;
mod outside;
mod outside_load;
mod own_keys;
mod slots;
mod space;
mod tamper;
