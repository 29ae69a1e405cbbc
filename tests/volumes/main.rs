//! Volumes as their operator has them: the commands, their records, settings, events and manifests.

mod apply;
mod commands;
#[path = "../common/mod.rs"]
mod common;
mod doctor;
mod event_sinks;
mod image_lock;
mod installed;
mod metadata;
mod odd_arguments;
mod settings;
