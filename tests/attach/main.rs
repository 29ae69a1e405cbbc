//! Attaching and detaching from outside: the key's states, crashes, locks, sockets, moving to another
//! process, and everything that is refused.

#[path = "../common/mod.rs"]
mod common;
mod control;
mod cpus;
mod crash;
mod damage;
mod handover;
mod kms_states;
mod locks;
mod metrics;
mod resize;
mod rewrap;
mod show;
mod slots;
mod sockets;
mod stats;
mod surroundings;
#[cfg(feature = "top")]
mod top;
mod upgrade;
mod ways;
mod wrapped_keys;
