//! The embedded KMS from outside: the provider suite, crashes, damage, deletion, and several processes at one
//! store.

mod damage;
mod deletion;
mod grants;
pub(crate) mod hands;
mod import;
mod processes;
mod regions;
mod rotation;
mod rules;
mod tags;

use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::{Clock, SystemClock};
use sealblk::kms::{EncryptionContext, KmsError};
use std::fs;
use std::path::PathBuf;

/// A store's two folders.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("kms")
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("config")
    }

    fn log(&self) -> PathBuf {
        self.data().join("log")
    }

    fn open(&self) -> Embedded {
        self.open_at(SystemClock)
    }

    fn open_at(&self, clock: impl Clock + 'static) -> Embedded {
        Embedded::at(self.data(), self.config(), Box::new(clock), sealblk::base::hardened::harden().unwrap())
    }

    fn config_file(&self, extension: &str) -> PathBuf {
        let mut files = fs::read_dir(self.config()).unwrap().map(|e| e.unwrap().path());
        files.find(|p| p.extension().is_some_and(|e| e == extension)).unwrap()
    }

    fn root_key(&self) -> PathBuf {
        self.config_file("key")
    }

    fn anchor(&self) -> PathBuf {
        self.config_file("head")
    }
}

fn volume(id: &str) -> EncryptionContext {
    EncryptionContext::pair("aws:ebs:id", id)
}

fn corrupt(result: Result<impl std::fmt::Debug, KmsError>) -> String {
    match result.unwrap_err() {
        KmsError::Corrupt(message) => message,
        other => panic!("not Corrupt: {other:?}"),
    }
}
