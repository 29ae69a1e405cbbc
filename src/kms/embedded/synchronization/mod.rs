//! What the KMS of one region tells that of another of a multi-Region key, its material among it.
//!
//! The receiver makes a key to wrap with for one message, the sender wraps all material with it (`envelope`).
//! So material is in the clear in the two KMSs alone, and whoever stands between them, a proxy that ends TLS
//! among them, learns none. That the message comes from the sender, the signature of its request says, and
//! that the key to wrap with is the receiver's, that of the answer: both are made with the secret of the
//! access key that one has given the other.
//!
//! What another region says is a claim: it is taken from the region of the primary key alone, and never takes
//! a version away that this region has, whatever its number is.
//!
//! Material that was imported goes nowhere: of that, a region tells the fingerprint alone, as a secret.
#![forbid(unsafe_code)]

mod envelope;
mod receive;
mod shared;

pub use envelope::{Message, Wrapping, seal};
pub use receive::Parameters;
pub use shared::NewReplica;

use crate::kms::KmsError;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::multi_region::conflict;
use crate::kms::embedded::records::KeyEntry;
use crate::kms::key_ref::id_text;
use shared::{Shared, SharedExternal, generation_for, secrets_of, state_of, versions_of};
use std::cmp::Ordering;
use uuid::Uuid;

impl Embedded {
    /// Writes down what the region says that it has of `key`, where it needs no message. A number alone says
    /// nothing: a store that was put back from a copy counts again from there, by other changes.
    ///
    /// # Errors
    /// ConflictException if that is something else than what was to be brought; those of the store.
    pub fn note_parameters(&self, key: Uuid, region: &str, has: &Parameters) -> Result<(), KmsError> {
        let agrees = self.log.read(|log| {
            let entry = log.state().key(&id_text(key), &self.place)?;
            let it = entry.related()?;
            let moves = it.moving_to.as_deref() == Some(region);
            let primary = if moves { region } else { &it.primary };
            let wanted = generation_for(it, region);
            Ok(match has.generation.cmp(&wanted) {
                // Something has changed here since the region was asked.
                Ordering::Less => true,
                Ordering::Equal => has.state == state_of(entry, primary, wanted)?,
                // The new primary key goes on by itself.
                Ordering::Greater => moves && has.is_primary,
            })
        })?;
        if !agrees {
            let (arn, its) = (self.place.key_arn(key), self.place.in_region(region).key_arn(key));
            return Err(conflict(format!(
                "{its} has a generation {} that {arn} never had: was one of the two put back from a backup?",
                has.generation
            )));
        }
        self.note_synchronized(key, region, has.generation).map(drop)
    }

    /// The generation of `key` that the replica in `region` is to have: one more than the one here if it
    /// is to be the primary key.
    ///
    /// # Errors
    /// `NotFound` if there is no such key.
    pub fn generation_for(&self, key: Uuid, region: &str) -> Result<u64, KmsError> {
        self.log.read(|log| {
            let it = log.state().key(&id_text(key), &self.place)?.related()?;
            Ok(generation_for(it, region))
        })
    }

    /// What the replica of `key` in `region` is to know, under the one-time key that it has given, and the
    /// generation that it has then. With `new`, it is made by that.
    ///
    /// # Errors
    /// `Validation` for what is no key to wrap with; `NotFound` if there is no such key; those of the store.
    pub fn message_for(
        &self,
        key: Uuid,
        region: &str,
        wrapping: &Wrapping,
        new: Option<&NewReplica>,
    ) -> Result<(Message, u64), KmsError> {
        self.log.read(|log| {
            let entry = log.state().key(&id_text(key), &self.place)?;
            let shared = self.shared(entry, region, new)?;
            let text = serde_json::to_string(&shared)
                .map_err(|e| KmsError::Internal(format!("write what regions share: {e}")))?;
            let pieces = secrets_of(entry).into_iter();
            let secrets = pieces.map(|(id, sealed)| log.keys().open(key, id, sealed));
            Ok((envelope::seal(wrapping, text, secrets)?, shared.generation))
        })
    }

    fn shared(&self, entry: &KeyEntry, region: &str, new: Option<&NewReplica>) -> Result<Shared, KmsError> {
        let it = entry.related()?;
        let (primary, replicas) = match it.moving_to.as_deref() == Some(region) {
            true => it.moved(region),
            false => {
                let replicas = it.confirmed().cloned().chain([region.to_owned()]).collect();
                (it.primary.clone(), replicas)
            }
        };
        Ok(Shared {
            key: entry.id,
            account: self.place.account.clone(),
            from: self.place.region.clone(),
            to: region.to_owned(),
            primary,
            replicas,
            generation: generation_for(it, region),
            rotation: entry.rotation.clone(),
            versions: versions_of(entry),
            external: entry.external.as_ref().map(SharedExternal::of),
            new: new.cloned(),
        })
    }
}
