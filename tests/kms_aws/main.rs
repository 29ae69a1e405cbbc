//! The AWS provider: against a server of our own it passes the provider suite, finds credentials and endpoints as AWS's
//! users expect, and a volume is attached by it whatever the KMS does. All on loopback.

#[path = "../common/attach.rs"]
mod attach;
#[path = "../common/mod.rs"]
mod common;
mod configuration;
mod faults;
mod grants;
#[path = "../common/kms_server.rs"]
mod kms_server;
#[path = "../kms_suite/mod.rs"]
mod kms_suite;
#[path = "../common/attach_memory.rs"]
mod memory;
#[path = "../common/process.rs"]
mod process;
mod provider;
mod refusals;
mod site;
#[path = "../common/store.rs"]
mod store;
mod waiting;
