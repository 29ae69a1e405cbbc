//! What is kept of a volume's data keys, once they have proved its record right and their round keys are
//! made. The data keys themselves are wiped then.

use super::layers;
use crate::base::Result;
use crate::catalog::VolumeId;
use crate::catalog::metadata::Metadata;
use crate::catalog::slots::Unwrapped;
use crate::crypt::secret_mem::on_scrubbed_stack;
use crate::crypt::xts::{Engine, SectorCipher};
use crate::crypt::{Dek, PassKey, SealKey, SectorSize};
use crate::kms::KmsKey;
use std::sync::Arc;

/// What is kept of one data key: who gave it, by what it is known, what it seals records with, what it passes
/// another data key under, and its round keys. Copies of this are the same memory.
#[derive(Clone)]
pub struct Kept {
    by: KmsKey,
    check: [u8; 16],
    seal_key: SealKey,
    pass_key: PassKey,
    cipher: Arc<dyn SectorCipher>,
}

impl Kept {
    /// What is kept of `dek`, a key of `volume`'s, whose sectors are so large, and which the KMS key `by` has
    /// given.
    ///
    /// # Errors
    /// `Unsupported` when this CPU cannot run `engine`, or when the memory cannot be locked.
    pub fn of(
        dek: &Dek,
        by: KmsKey,
        volume: VolumeId,
        sector_size: SectorSize,
        engine: Engine,
    ) -> Result<Self> {
        let cipher = layers::cipher(dek, sector_size, engine)?;
        let (seal_key, pass_key) = (dek.seal_key(&volume.to_string())?, dek.pass_key()?);
        Ok(Kept { by, check: dek.check_value(), seal_key, pass_key, cipher })
    }

    /// What is kept of all data keys of `volume`, in the order of its keys.
    ///
    /// # Errors
    /// As for [`Kept::of`].
    pub fn of_all(deks: &[Unwrapped], volume: &Metadata, engine: Engine) -> Result<Vec<Self>> {
        let of = |it: &Unwrapped| Kept::of(&it.dek, it.by.clone(), volume.id(), volume.sector_size(), engine);
        deks.iter().map(of).collect()
    }

    /// The KMS key that has given it.
    pub fn by(&self) -> &KmsKey {
        &self.by
    }

    /// The check value of the data key.
    pub fn check(&self) -> [u8; 16] {
        self.check
    }

    /// What seals the volume's record, where this is the key of its top layer.
    pub fn seal_key(&self) -> &SealKey {
        &self.seal_key
    }

    /// What another data key of the volume is passed under, where this is the key of its top layer.
    pub fn pass_key(&self) -> &PassKey {
        &self.pass_key
    }

    /// Puts the data key together, out of its round keys, for a process that takes this one's place.
    ///
    /// # Panics
    /// Unless `out` has [`Dek::LEN`] bytes.
    pub(crate) fn write_dek(&self, out: &mut [u8]) {
        on_scrubbed_stack(|| self.cipher.write_key(out));
    }

    /// The cipher.
    pub fn cipher(&self) -> &Arc<dyn SectorCipher> {
        &self.cipher
    }
}
