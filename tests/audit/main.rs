//! The audit log: every kind of tampering is found and named, crashes are told from it, writers do not mix,
//! and nothing is answered that it does not know of.

#[path = "../common/mod.rs"]
mod common;
mod crashes;
mod program;
mod shred;
mod tampering;
mod writers;

use sealblk::audit::verify::{Report, verify};
use sealblk::audit::{AuditKey, AuditLog, Entry, Step};
use sealblk::base::Locality;
use sealblk::crypt::secret_mem::SecretBytes;
use sealblk::kms::EncryptionContext;
use std::fs;
use std::path::PathBuf;
use uuid::Uuid;

const ARN: &str = "arn:aws:kms:us-east-1:000000000000:key/6f91d0da-414a-4422-add9-6929355f8408";

/// A log's two folders.
struct Folders {
    dir: tempfile::TempDir,
}

impl Folders {
    fn new() -> Self {
        Folders { dir: tempfile::tempdir().unwrap() }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("config")
    }

    fn file(&self) -> PathBuf {
        self.root().join("audit.jsonl")
    }

    fn read(&self) -> Vec<u8> {
        fs::read(self.file()).unwrap()
    }

    fn open(&self) -> AuditLog {
        AuditLog::at(&self.root(), &self.config())
    }

    /// The mark with a MAC, or the one without.
    fn mark(&self, extension: &str) -> PathBuf {
        let mut files = fs::read_dir(self.config()).unwrap().map(|e| e.unwrap().path());
        files.find(|p| p.extension().is_some_and(|e| e == extension)).unwrap()
    }

    /// What who has the key finds.
    fn verify(&self) -> Report {
        verify(&self.root(), &self.config(), Some(&key(1))).unwrap()
    }

    /// What who has not finds.
    fn verify_without_key(&self) -> Report {
        verify(&self.root(), &self.config(), None).unwrap()
    }
}

fn key(n: u8) -> AuditKey {
    AuditKey::new(Uuid::from_u128(1), SecretBytes::copy_of(&[n; 32]).unwrap())
}

/// A record of the KMS's, which has a MAC.
fn decrypt() -> Entry {
    let place = Locality::default();
    Entry::kms_call("Decrypt", &place).with("keyId", ARN).about_key(ARN)
}

/// A record of a process that has no audit key.
fn attach() -> Entry {
    Entry::dek(
        Step::Attach,
        EncryptionContext::pair("aws:ebs:id", "vol-0123456789abcdef0").pairs(),
        "embedded",
        ARN,
    )
}
