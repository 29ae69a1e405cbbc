//! sealblk gives a virtual machine an encrypted disk that the guest cannot tell from an ordinary one.
//!
//! The rooms of the house, the highest first. A room uses those in its row, and all of them stand below it:
//! an arrow never points up. `ci/map` holds this table against the code.
//!
//! | room | what is in it | it uses |
//! |---|---|---|
//! | `cli` | the command line: arguments and printing | `audit` `backing` `base` `catalog` `config` `crypt` `events` `helper` `host` `hsm` `image` `kms` `ops` `place` `reactor` `sandbox` `vhost` |
//! | `ops` | the use cases, one file a verb | `audit` `backing` `backup` `base` `catalog` `config` `crypt` `disk` `events` `helper` `host` `image` `kms` `place` `sandbox` `vhost` `virtio` `volume` |
//! | `host` | the confined process that serves an attached volume and holds its data keys | `audit` `backing` `base` `catalog` `config` `crypt` `disk` `events` `helper` `image` `kms` `reactor` `sandbox` `vhost` `virtio` `volume` |
//! | `volume` | a volume that this process has: its layers opened, its record proved right | `backing` `base` `catalog` `crypt` `disk` `image` `kms` `virtio` |
//! | `helper` | processes that talk to a KMS, to a place outside, to an NBD server or to a Ceph cluster for another: unwrap, rewrap, the keeper of grants, the carrier, the dialler, what serves RBD images | `audit` `backing` `base` `catalog` `config` `crypt` `events` `kms` `place` `sandbox` |
//! | `backup` | a snapshot as it lies in a place outside: manifests, pages and blocks, and what this host knows of them | `base` `catalog` `crypt` `place` |
//! | `events` | what happened to volumes and snapshots, and its delivery | `base` `catalog` `config` |
//! | `catalog` | records: ids, metadata, layers, seals, snapshots, tags, locks | `backing` `base` `crypt` `image` `kms` |
//! | `place` | places outside for ciphertext: folders and object stores | `base` `kms` |
//! | `kms` | KMS keys: the embedded KMS and its server, AWS KMS | `audit` `base` `config` `crypt` `hsm` |
//! | `hsm` | tokens of HSMs by PKCS#11, whose modules are loaded by a process of its own | `base` `crypt` `sandbox` |
//! | `audit` | the log of every use of a key | `base` `crypt` |
//! | `vhost` | the VMM's protocol, and the threads that serve its rings | `backing` `base` `disk` `reactor` `virtio` |
//! | `disk` | sectors: between guest memory and the ciphertext of a chain of layers | `backing` `base` `crypt` `image` `reactor` `virtio` |
//! | `image` | disk images of others: raw, qcow2, QEMU's locks | `base` |
//! | `sandbox` | what a process gives up: system calls, files, its user | `base` `reactor` |
//! | `backing` | where ciphertext lies: files, block devices, NBD servers, RBD images | `base` `reactor` |
//! | `reactor` | what a thread that serves a disk waits with: io_uring, its bounce buffers, wake-ups | `base` |
//! | `virtio` | requests of a guest, pure | - |
//! | `crypt` | data keys in secret memory, AES-XTS | `base` |
//! | `config` | the settings: what an operator decides | `base` |
//! | `base` | errors, durable files, locks, time | - |

#![warn(unreachable_pub)]

pub mod audit;
pub mod backing;
pub mod backup;
pub mod base;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod crypt;
pub mod disk;
pub mod events;
pub mod helper;
pub mod host;
pub mod hsm;
pub mod image;
pub mod kms;
pub mod ops;
pub mod place;
pub mod reactor;
pub mod sandbox;
pub mod vhost;
pub mod virtio;
pub mod volume;

pub use base::{Error, Kind, Result};
