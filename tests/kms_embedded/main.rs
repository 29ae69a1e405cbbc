//! The embedded KMS from outside: the provider suite, crashes, damage, deletion, and several processes at one
//! store.

mod damage;
mod deletion;
mod grants;
mod hands;
mod import;
#[path = "../kms_suite/mod.rs"]
mod kms_suite;
mod processes;
mod rotation;
mod rules;
mod tags;

use kms_suite::Admin;
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
        Embedded::at(self.data(), self.config(), Box::new(clock))
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

impl Admin for Embedded {
    fn create_key(&self) -> String {
        Embedded::create_key(self, "", None).unwrap().arn
    }
    fn absent_key(&self) -> String {
        self.locality().key_arn(uuid::Uuid::new_v4())
    }
    fn create_alias(&self, name: &str, key: &str) -> Result<(), KmsError> {
        Embedded::create_alias(self, name, key)
    }
    fn enable(&self, key: &str) -> Result<(), KmsError> {
        Embedded::enable(self, key).map(drop)
    }
    fn disable(&self, key: &str) -> Result<(), KmsError> {
        Embedded::disable(self, key).map(drop)
    }
    fn schedule_deletion(&self, key: &str) -> Result<(), KmsError> {
        Embedded::schedule_deletion(self, key, 7).map(drop)
    }
    fn cancel_deletion(&self, key: &str) -> Result<(), KmsError> {
        Embedded::cancel_deletion(self, key).map(drop)
    }
}
