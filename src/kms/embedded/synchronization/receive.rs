//! What the KMS of one region hears from that of another, and what it takes of it.
#![forbid(unsafe_code)]

use crate::kms::embedded::Embedded;
use crate::kms::embedded::admin::{KeyMetadata, check_description};
use crate::kms::embedded::blob::Material;
use crate::kms::embedded::keys::{LogKeys, same};
use crate::kms::embedded::multi_region::conflict;
use crate::kms::embedded::open_log::OpenLog;
use crate::kms::embedded::records::{Change, External, KeyEntry};
use crate::kms::embedded::shared_log::Now;
use crate::kms::embedded::synchronization::envelope::{self, Message, OneTime, Wrapping};
use crate::kms::embedded::synchronization::shared::{
    NewReplica, Shared, SharedExternal, state_of, with_shared,
};
use crate::kms::embedded::tags;
use crate::kms::key_ref::{KeyName, is_multi_region};
use crate::kms::{Exception, KmsError};
use uuid::Uuid;

/// How many keys one other region may share with this one, by its own wish: at the most that a message can
/// say of each, half of what a log may have.
const KEYS_OF_A_REGION_MAX: usize = 2000;

/// What a region has of a key, and what to wrap more with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// The generation that it has; 0 for none.
    pub generation: u64,
    /// Whether it is the primary key there.
    pub is_primary: bool,
    /// A hash of what it has of all that is shared, 64 hex digits; empty for none.
    pub state: String,
    /// Absent where it has what was asked about.
    pub wrapping: Option<Wrapping>,
}

impl Embedded {
    /// What the KMS of the region `from` needs to bring this generation of a key: what there is of
    /// the key here, and a one-time key unless that is enough. `makes` says that the replica is to
    /// be made if there is none.
    ///
    /// # Errors
    /// `NotFound` if there is no such key and none is to be made; `AccessDenied` for a region that is
    /// no relative of this key's.
    pub fn synchronization_parameters(
        &self,
        from: &str,
        key: &str,
        generation: u64,
        makes: bool,
    ) -> Result<Parameters, KmsError> {
        let id = match self.place.parse(key)? {
            KeyName::Id(id) if is_multi_region(id) => id,
            _ => return Err(KmsError::Validation(format!("{key} is not the id of a multi-Region key."))),
        };
        // A replica may be the first key of its store.
        if makes {
            self.log.create_if_absent()?;
        }
        let has = self.current(|log| {
            let Some(entry) = log.state().key_by_id(id) else {
                let none =
                    Parameters { generation: 0, is_primary: false, state: String::new(), wrapping: None };
                return if makes { Ok(none) } else { Err(self.no_such_key(id)) };
            };
            self.check_region(entry)?;
            let it = entry.related()?;
            if !it.has(from) && it.moving_to.as_deref() != Some(from) {
                return Err(self.not_a_relative(id, from));
            }
            let state = state_of(entry, &it.primary, it.generation)?;
            let is_primary = it.primary == self.place.region;
            Ok(Parameters { generation: it.generation, is_primary, state, wrapping: None })
        })?;
        if has.generation >= generation {
            return Ok(has);
        }
        // Before the store is locked: this can take seconds.
        let once = OneTime::new(self.log.now().wall)?;
        let wrapping = self.log.read(|log| once.wrapping(log.keys(), from, id))?;
        Ok(Parameters { wrapping: Some(wrapping), ..has })
    }

    /// Takes what the KMS of the region `from` says of `key`, with the token that this KMS gave for it. The
    /// same message again changes nothing.
    ///
    /// # Errors
    /// `Validation` for what is no message for this KMS; `AccessDenied` if it is not for that region to say;
    /// ConflictException for what is older than what is known here, or does not go together with it;
    /// `InvalidCiphertext` if the material does not open.
    pub fn receive(
        &self,
        from: &str,
        key: &str,
        token: &[u8],
        message: &Message,
    ) -> Result<KeyMetadata, KmsError> {
        let shared: Shared = serde_json::from_str(&message.shared)
            .map_err(|_| KmsError::Validation("What regions share has another form.".into()))?;
        shared.check(from, key, &self.place)?;
        let now = self.log.now().wall;
        let private = self.log.read(|log| envelope::open_token(log.keys(), from, token, shared.key, now))?;
        let material = envelope::open(&private, shared.secrets(), message)?;
        self.log.write(|log, now| {
            let known = log.state().key_by_id(shared.key);
            let after = match (known, &shared.new) {
                (Some(known), _) => self.brought_up_to_date(log, known, &shared, &material)?,
                (None, Some(new)) => self.replica(log, now, &shared, new, &material)?,
                (None, None) => return Err(self.no_such_key(shared.key)),
            };
            let metadata = self.metadata(log, &after);
            let is_news = known != Some(&after);
            Ok((if is_news { vec![Change::Key(after)] } else { Vec::new() }, metadata))
        })
    }

    /// A key that is made here by what `shared` says.
    fn replica(
        &self,
        log: &OpenLog,
        now: &Now,
        shared: &Shared,
        new: &NewReplica,
        material: &[Material],
    ) -> Result<KeyEntry, KmsError> {
        if shared.primary != shared.from {
            return Err(self.not_a_relative(shared.key, &shared.from));
        }
        let has = |key: &&KeyEntry| key.multi_region.as_ref().is_some_and(|it| it.has(&shared.from));
        if log.state().keys().filter(has).count() >= KEYS_OF_A_REGION_MAX {
            return Err(KmsError::Other(
                Exception::LimitExceeded,
                format!("{} shares {KEYS_OF_A_REGION_MAX} keys already, which is the limit.", shared.from),
            ));
        }
        check_description(&new.description)?;
        new.policy.as_deref().map_or(Ok(()), tags::check_policy)?;
        let empty = KeyEntry {
            id: shared.key,
            created: now.time,
            description: new.description.clone(),
            enabled: true,
            deletion: None,
            rotation: None,
            external: None,
            tags: tags::check_tags(&new.tags)?,
            policy: new.policy.clone(),
            key_store: None,
            multi_region: None,
            versions: Vec::new(),
        };
        with_shared(log.keys(), &empty, shared, material)
    }

    /// A key that is known here, by what `shared` says.
    fn brought_up_to_date(
        &self,
        log: &OpenLog,
        known: &KeyEntry,
        shared: &Shared,
        material: &[Material],
    ) -> Result<KeyEntry, KmsError> {
        self.check_region(known)?;
        let it = known.related()?;
        let after = self.with_all_that_is_known(log, known, shared, material);
        if after.as_ref().is_ok_and(|after| after == known) {
            // Two have brought the same. It may have been a move, after which the sender has nothing to say
            // any more: a refusal would have it believe that nothing was moved.
            return after;
        }
        let arn = self.place.key_arn(known.id);
        let is_primary_here = it.primary == self.place.region;
        let moves_there = is_primary_here && it.moving_to.as_deref() == Some(&shared.from);
        // A replica hears of another primary key from that one itself, which was a relative before.
        let was_moved = !is_primary_here && it.has(&shared.from) && shared.primary == shared.from;
        if !(it.primary == shared.from || moves_there || was_moved) {
            return Err(self.not_a_relative(known.id, &shared.from));
        }
        if moves_there && shared.primary != shared.from {
            return Err(conflict(format!("{arn} is moving to {}, which says otherwise.", shared.from)));
        }
        let after = after?;
        if shared.generation <= it.generation {
            let message = format!(
                "{arn} has generation {} already; {} brings generation {}. Was the KMS there put back from a \
                 backup?",
                it.generation, shared.from, shared.generation
            );
            return Err(conflict(message));
        }
        if shared.primary == self.place.region {
            known.check_usable(&self.place)?;
        }
        Ok(after)
    }

    /// The key with what `shared` says, unless that lacks a version that is known here, or
    /// has another material.
    fn with_all_that_is_known(
        &self,
        log: &OpenLog,
        known: &KeyEntry,
        shared: &Shared,
        secrets: &[Material],
    ) -> Result<KeyEntry, KmsError> {
        let (keys, arn) = (log.keys(), self.place.key_arn(known.id));
        let other = || conflict(format!("{arn} has other material than {} says.", shared.from));
        match (&known.external, &shared.external) {
            (None, None) => {}
            (Some(own), Some(its)) if is_same_imported(keys, known.id, own, its, secrets)? => {}
            _ => return Err(other()),
        }
        for version in known.versions.iter().filter(|_| known.external.is_none()) {
            let Some(at) = shared.versions.iter().position(|other| other.id == version.id) else {
                let message = format!("{arn} has material that the message of {} lacks.", shared.from);
                return Err(conflict(message));
            };
            let own = keys.open(known.id, version.id, &version.sealed)?;
            if !same(own.bytes(), secrets[at].bytes()) {
                return Err(other());
            }
        }
        with_shared(keys, known, shared, secrets)
    }

    fn not_a_relative(&self, key: Uuid, region: &str) -> KmsError {
        let arn = self.place.key_arn(key);
        KmsError::AccessDenied(format!("The KMS of {region} does not have the primary key of {arn}."))
    }

    fn no_such_key(&self, key: Uuid) -> KmsError {
        KmsError::NotFound(format!("Key '{}' does not exist", self.place.key_arn(key)))
    }
}

/// Whether a key whose material is imported, known as `own`, can be the one of which `its` tells.
fn is_same_imported(
    keys: &LogKeys,
    key: Uuid,
    own: &External,
    its: &SharedExternal,
    secrets: &[Material],
) -> Result<bool, KmsError> {
    if own.version != its.version {
        return Ok(false);
    }
    match (&own.fingerprint, secrets) {
        (None, _) => Ok(true),
        (Some(own), [secret]) if its.fingerprint == Some(own.id) => {
            Ok(same(keys.open(key, own.id, &own.sealed)?.bytes(), secret.bytes()))
        }
        _ => Ok(false),
    }
}
