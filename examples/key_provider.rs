//! A key management service of one's own, and a volume whose data key it wraps.
//!
//!     cargo run --example key_provider -- STORE KEYS
//!
//! STORE is the store's folder. KEYS is a folder in which one file a KMS key lies: 32 random bytes, readable
//! for their owner alone. Where there is no such folder, it is made, with the key `volumes.key`. On a medium
//! of its own, it lets volumes be opened while the medium is there, and not when it is away.
//!
//! What a [`KeyProvider`] promises, and what this one does for it:
//!
//! - **A wrapped data key unwraps for its owner alone.** The encryption context, `{"aws:ebs:id": "vol-…"}`,
//!   is bound into it (here: additional data of AES-GCM), in a form in which no two contexts are alike.
//! - **`key_id` is canonical**: what stands in a volume's record for years names the key by itself, and no
//!   alias.
//! - **Errors tell two cases apart**: "asked and refused" (exit code 5) and "could not be asked" (exit code
//!   6; tried again later). The text becomes the `cause` of an event, so it names no secret.
//! - **Plaintext is wiped**: it is in `Zeroizing` memory from its beginning, and never grows, which would
//!   leave a copy behind.
//!
//! **What it takes beside this to attach such a volume.** The helper process that unwraps a data key for
//! `sealblk attach` finds a provider by the name that stands in the volume's record:
//! `kms::open_patient_provider` in src/kms/mod.rs has one arm for each. A new provider is a module beside
//! src/kms/aws, an arm there, and a prefix for `--key` in src/kms/key_ref.rs. In the arm it is put into the
//! audit log by the way; here, outside of it, that is done by hand.

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use sealblk::audit::{AuditLog, Entry, Step, name_command};
use sealblk::base::hardened::{harden, harden_children};
use sealblk::base::root::Root;
use sealblk::base::root::owners::Owners;
use sealblk::catalog::lock::Purpose;
use sealblk::catalog::metadata::{Geometry, KeyOwner, KeyRecord, encryption_context};
use sealblk::catalog::slots::Unwrapped;
use sealblk::catalog::tags::Tags;
use sealblk::catalog::{Catalog, VolumeId};
use sealblk::crypt::secret_mem::{SecretBytes, on_scrubbed_stack};
use sealblk::crypt::{Dek, SectorSize};
use sealblk::kms::{EncryptionContext, Failure, KeyDescription, KeyProvider, KeyState, KmsError, WrappedKey};
use sealblk::ops::Store;
use sealblk::ops::keys::WrappingKey;
use sealblk::ops::make::{self, Wanted};
use sealblk::volume::open::Taken;
use sealblk::{Error, Kind, Result};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use zeroize::Zeroizing;

/// The provider's name, as it stands in the records of volumes: 1 to 32 printable characters, and the same
/// for ever.
const PROVIDER: &str = "keyfile";
/// What its canonical key ids begin with.
const ID_PREFIX: &str = "keyfile:";
const KEY: &str = "volumes";

// A wrapped data key: the version of this form, a random IV, the ciphertext, the tag. With random IVs of 96
// bits one key is good for 2³² wrapped keys.
const VERSION: u8 = 1;
const IV: usize = 12;
const TAG: usize = 16;

/// Keys in files, in one folder.
struct KeyFiles {
    folder: PathBuf,
}

impl KeyFiles {
    /// Makes the folder and in it the key of this name, where there is no folder. In one that is there,
    /// nothing is made: the medium may be away, and a second key of the same name would open no volume of the
    /// first's.
    fn make_first(&self, name: &str) -> Result<(), KmsError> {
        match std::fs::DirBuilder::new().mode(0o700).create(&self.folder) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => return Ok(()),
            made => made.map_err(|e| self.not_reached(&e))?,
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.path(name)?);
        let mut file = file.map_err(|e| self.not_reached(&e))?;
        let mut key = Zeroizing::new([0; 32]);
        random(&mut *key)?;
        // Durable before anything is wrapped under it: a volume whose KMS key is lost is noise.
        let written = file.write_all(&*key).and_then(|()| file.sync_all());
        let written = written.and_then(|()| File::open(&self.folder)?.sync_all());
        written.map_err(|e| self.not_reached(&e))
    }

    /// The file of a key. A name comes from a record, which somebody may have written who is to read no other
    /// file.
    fn path(&self, name: &str) -> Result<PathBuf, KmsError> {
        let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        match plain {
            true => Ok(self.folder.join(format!("{name}.key"))),
            false => Err(KmsError::NotFound(format!("{name:?} is no key's name"))),
        }
    }

    /// The name that a reference means: one that somebody typed, or one out of a record.
    fn name(key: &str) -> &str {
        key.strip_prefix(ID_PREFIX).unwrap_or(key)
    }

    /// The cipher under this key. It is read each time, so that it is gone from here when the medium is.
    fn cipher(&self, name: &str) -> Result<Aes256Gcm, KmsError> {
        let path = self.path(name)?;
        let mut file = match File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound && self.folder.is_dir() => {
                return Err(KmsError::NotFound(format!("there is no {}", path.display())));
            }
            file => file.map_err(|e| self.not_reached(&e))?,
        };
        let mode = file.metadata().map_err(|e| self.not_reached(&e))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(KmsError::AccessDenied(format!(
                "{} may be read by others; chmod 600",
                path.display()
            )));
        }
        let key = SecretBytes::<32>::filled(|bytes| Ok::<(), Error>(file.read_exact(bytes)?));
        let key = key.map_err(|e| KmsError::Corrupt(format!("{}: {e}", path.display())))?;
        // The round keys that this makes are wiped when it is dropped (the feature "zeroize" of aes and
        // aes-gcm).
        Ok(Aes256Gcm::new_from_slice(key.as_array()).expect("the key has 32 bytes"))
    }

    fn not_reached(&self, e: &std::io::Error) -> KmsError {
        KmsError::Unavailable(format!("{}: {e}; is its medium there?", self.folder.display()))
    }

    fn seal(&self, key: &str, data_key: &[u8], context: &EncryptionContext) -> Result<WrappedKey, KmsError> {
        let name = Self::name(key);
        let cipher = on_scrubbed_stack(|| self.cipher(name))?;
        let key_id = format!("{ID_PREFIX}{name}");
        // The room is there from the start.
        let mut blob = Vec::with_capacity(1 + IV + data_key.len() + TAG);
        blob.push(VERSION);
        blob.resize(1 + IV, 0);
        random(&mut blob[1..])?;
        let nonce = Nonce::try_from(&blob[1..]).expect("the slice has 12 bytes");
        blob.extend_from_slice(data_key);
        let bound = bound(&key_id, context);
        let tag =
            on_scrubbed_stack(|| cipher.encrypt_inout_detached(&nonce, &bound, (&mut blob[1 + IV..]).into()));
        blob.extend_from_slice(&tag.map_err(|_| KmsError::Internal("AES-GCM refused the length".into()))?);
        Ok(WrappedKey { key_id, blob })
    }

    fn open(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        // Whatever this version has not made, damaged or another's, is one answer, which tells nothing more.
        let parts = wrapped.blob.strip_prefix(&[VERSION]).and_then(|rest| {
            let (iv, rest) = rest.split_at_checked(IV)?;
            let (text, tag) = rest.split_last_chunk::<TAG>()?;
            Some((Nonce::try_from(iv).ok()?, text, Tag::from(*tag)))
        });
        let (nonce, text, tag) = parts.ok_or(KmsError::InvalidCiphertext)?;
        let cipher = on_scrubbed_stack(|| self.cipher(Self::name(&wrapped.key_id)))?;
        let mut data_key = Zeroizing::new(text.to_vec());
        let bound = bound(&wrapped.key_id, context);
        let opened = on_scrubbed_stack(|| {
            cipher.decrypt_inout_detached(&nonce, &bound, data_key.as_mut_slice().into(), &tag)
        });
        opened.map_err(|_| KmsError::InvalidCiphertext)?;
        Ok(data_key)
    }
}

impl KeyProvider for KeyFiles {
    fn name(&self) -> &'static str {
        PROVIDER
    }

    fn describe(&self, key: &str) -> Result<KeyDescription, KmsError> {
        let name = Self::name(key);
        self.cipher(name)?;
        let description = self.folder.display().to_string();
        Ok(KeyDescription {
            key_id: format!("{ID_PREFIX}{name}"),
            state: KeyState::Enabled,
            description,
            deletion: None,
        })
    }

    fn generate_wrapped(
        &self,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        let mut data_key = Zeroizing::new(vec![0; len]);
        random(&mut data_key)?;
        self.seal(key, &data_key, context)
    }

    fn decrypt(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        self.open(wrapped, context)
    }

    /// For snapshots' copies, clones and `volume rewrap`. A KMS on another machine would not show the data
    /// key to its client in between; here, KMS and client are one process.
    fn rewrap(
        &self,
        wrapped: &WrappedKey,
        from: &EncryptionContext,
        key: &str,
        to: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        self.seal(key, &self.open(wrapped, from)?, to)
    }

    /// Lets volumes come here from another KMS (`volume rewrap`). Without this they cannot.
    fn wrap(&self, key: &str, data_key: &[u8], context: &EncryptionContext) -> Result<WrappedKey, KmsError> {
        self.seal(key, data_key, context)
    }
}

/// What a wrapped key is bound to. Each string has its length before it: different contexts never give the
/// same bytes.
fn bound(key_id: &str, context: &EncryptionContext) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    let pairs = context.pairs().iter().flat_map(|(key, value)| [key.as_str(), value.as_str()]);
    for text in std::iter::once(key_id).chain(pairs) {
        bytes.extend_from_slice(&(text.len() as u32).to_be_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

fn random(bytes: &mut [u8]) -> Result<(), KmsError> {
    getrandom::fill(bytes).map_err(|e| KmsError::Internal(format!("no random bytes: {e}")))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match &arguments[..] {
        [store, keys] => run(store, keys),
        _ => Err(Error::new(Kind::Usage, "usage: key_provider STORE KEYS")),
    };
    let Err(e) = done else { return ExitCode::SUCCESS };
    eprintln!("key_provider: {e}");
    ExitCode::from(e.kind().exit_code())
}

fn run(store: &str, keys: &str) -> Result<()> {
    // First: no core file, and no debugger, from here on. See examples/attach.rs.
    let hardened = harden()?;
    harden_children()?;
    name_command("key_provider");
    let root = Root::new(store);
    Owners::configured()?.check_root(&root)?;
    let store = Store::open(&root, hardened)?;
    let (catalog, log) = (store.catalog(), AuditLog::new(&root)?);
    let provider = KeyFiles { folder: keys.into() };
    provider.make_first(KEY)?;

    // What `sealblk volume create` does, with this provider instead of one that it knows. Nobody sees the
    // data key.
    let wanted = Wanted {
        geometry: Geometry::new(64 << 20, SectorSize::B4096)?,
        name: None,
        tags: Tags::default(),
        preallocate: false,
        device: None,
    };
    let made = make::create(
        &catalog,
        &store.events(),
        &wanted,
        Some(WrappingKey { provider: &provider, key: KEY, also: None }),
    )?;
    let key = &made.keys()[0];
    record(&log, Step::Generate, KeyOwner::Volume(made.id()), key)?;
    println!("{} is made; its data key is wrapped by {}", made.id(), key.first().wrapped.key_id);

    // The first time, the data key seals the volume's record: whoever opens it after that proves that nobody
    // has changed its layers, or its key.
    let sealed = open(&catalog, &log, &provider, made.id())?;
    println!("it opens, and is sealed: record {} of it is on disk", sealed.generation());
    open(&catalog, &log, &provider, made.id())?;
    println!("it opens again, and its seal is right");

    // A wrapped key that somebody moved to another volume's record is worth nothing there.
    let elsewhere = encryption_context(VolumeId::random());
    match provider.decrypt(&key.first().wrapped, &elsewhere) {
        Err(KmsError::InvalidCiphertext) => println!("its wrapped key opens for no other volume"),
        Err(e) => return Err(e.into()),
        Ok(_) => return Err(Error::new(Kind::Other, "its wrapped key opens for another volume")),
    }
    Ok(())
}

/// Opens the volume as a command does that nobody has it attached for: takes its lock, unwraps its data keys,
/// proves its record, and opens its layers with their ciphers. `Taken` has all of that; here it is let go of
/// at once.
fn open(
    catalog: &Catalog,
    log: &AuditLog,
    provider: &KeyFiles,
    volume: VolumeId,
) -> Result<sealblk::catalog::Metadata> {
    let unwrap = |owner: KeyOwner, key: &KeyRecord| {
        let refused = |e| Failure::kms(e, PROVIDER, &key.first().wrapped.key_id);
        let plain = provider.decrypt(&key.first().wrapped, &encryption_context(owner)).map_err(refused)?;
        // On record before anything has an effect: no data key is released that the audit log does not know
        // of.
        record(log, Step::Unwrap, owner, key)?;
        // Into secret memory; `plain` is wiped at the end of this.
        let dek = Arc::new(Dek::from_bytes(&plain)?);
        Ok::<Unwrapped, Failure>(Unwrapped { dek, by: key.first().kms_key() })
    };
    let taken = Taken::take(catalog, volume, Purpose::Recover, &unwrap).map_err(|failure| failure.error)?;
    Ok(taken.opened.metadata)
}

fn record(log: &AuditLog, step: Step, owner: KeyOwner, key: &KeyRecord) -> Result<()> {
    let by = key.first().kms_key();
    let entry = Entry::dek(step, encryption_context(owner).pairs(), &by.provider, &by.key_id);
    // Without the KMS's audit key, which a provider of one's own does not have, a record has no MAC.
    log.append(&entry, None)
}
