//! What each fuzz target does with its input: every `run` takes any bytes and panics if something
//! that must hold does not.
//!
//! The fuzzer drives these (`ci/fuzz`), and `tests/vhost/corpus.rs` includes this file and replays the
//! kept inputs in `corpus/<target>/` in an ordinary test. So it uses nothing of the fuzzer's, and only
//! public parts of sealblk.

pub mod audit_log;
pub mod config_space;
pub mod gate;
pub mod image;
pub mod input;
pub mod key_ref;
pub mod kms_blob;
pub mod kms_log;
pub mod kms_records;
pub mod ledger_entry;
pub mod nbd_replies;
pub mod place;
pub mod region_message;
pub mod request;
pub mod script;
pub mod session;
pub mod sigv4;
pub mod slot_change;
pub mod snapshot_record;
pub mod token_answer;
pub mod volume_metadata;
pub mod wanted;
pub mod wire;
