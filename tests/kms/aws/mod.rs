//! The AWS provider: against a server of our own it passes the provider suite, finds credentials and
//! endpoints as AWS's users expect, and a volume is attached by it whatever the KMS does. All on loopback.

mod configuration;
mod faults;
mod flood;
mod grants;
mod provider;
mod refusals;
mod site;
mod slots;
mod waiting;
