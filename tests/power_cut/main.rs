//! Power cuts at every moment: what the real program does to files is recorded by tracing its system calls;
//! then every state in which a power cut could have left the disk is made anew, as far as time allows, and
//! the real program is asked whether everything that it had promised by then is there.
//!
//! `recorder` traces, `model` says what a disk keeps, `image` makes one state of it, `expect` is what
//! was promised, `check` asks the program, `explore` goes through the cuts, `script` is how a
//! scenario is told. The mutants are recordings that are edited to what a wrong program would have
//! done: each must be found out.
//!
//! All extremes are tried, or one of `POWER_CUT_ONE_OF`. `POWER_CUT_SECONDS` is how long each scenario may go
//! on with states chosen by chance after them. `POWER_CUT_SEED` decides which ones.
#![cfg(target_arch = "x86_64")]

mod block_log;
mod calls;
mod check;
#[path = "../common/mod.rs"]
mod common;
mod expect;
mod explore;
mod file_system;
mod harmless;
mod hydration;
mod image;
mod kms;
mod model;
mod mutants;
mod ptrace;
mod random;
mod recorder;
mod script;
mod settings;
mod site;
mod snapshots;
mod tape;
mod trace;
mod volumes;
