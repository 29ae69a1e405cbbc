//! What VMMs and guests meet: the protocol's messages, rings and requests, lawful and not, through a
//! front-end of our own against the real process.

mod chains;
mod changing_rings;
mod clients;
mod coming_back;
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "kms-server")]
mod corpus;
mod dirty_log;
mod failing_disk;
mod guest_memory;
mod hostile;
mod inflight;
mod protocol;
mod rings;
mod soak;
mod start_stop;
mod vmm_sequences;
