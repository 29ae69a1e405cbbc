//! What the KMS of one region tells that of another of a multi-Region key, its material among it.
//!
//! The receiver makes an RSA key for one message. Nothing is stored for it: as for an import, the token *is*
//! the private key, sealed under the receiver's store key together with what it is good for. The sender wraps
//! a fresh key with it (RSAES-OAEP-SHA-256), and under that all material (AES-256-GCM), with the rest of the
//! message as additional data. So material is in the clear in the two KMSs alone, and whoever stands between
//! them, a proxy that ends TLS among them, learns none. That the message comes from the sender, the signature
//! of its request says, and that the key to wrap with is the receiver's, that of the answer: both are made
//! with the secret of the access key that one has given the other.
//!
//! What another region says is a claim: it is taken from the region of the primary key alone, and never takes
//! a version away that this region has, whatever its number is.
#![forbid(unsafe_code)]

use crate::config::regions::is_region;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::admin::{KeyMetadata, check_description};
use crate::kms::embedded::blob::Material;
use crate::kms::embedded::import::{WrappingKeySpec, one_time_key, unwrap, wrap};
use crate::kms::embedded::keys::{LogKeys, same};
use crate::kms::embedded::multi_region::conflict;
use crate::kms::embedded::open_log::OpenLog;
use crate::kms::embedded::records::{Change, KeyEntry, MultiRegion, Rotation, RotationType, VersionEntry};
use crate::kms::embedded::rotation::TIMES;
use crate::kms::embedded::shared_log::Now;
use crate::kms::embedded::tags;
use crate::kms::key_ref::{KeyName, Locality, id_text, is_multi_region};
use crate::kms::{Exception, KmsError};
use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;
use zeroize::Zeroizing;

/// How long a one-time key is good, milliseconds: for one answer and one request.
const GOOD_FOR: i64 = 5 * 60_000;
/// Its size: 128 bits of security.
const SPEC: WrappingKeySpec = WrappingKeySpec::Rsa3072;
/// What a wrapped key and a token are for; no import takes them.
const LABEL: &str = "synchronize";
/// Bytes of material of one version.
const MATERIAL_LEN: usize = 32;
const TAG_LEN: usize = 16;
/// More versions than a key has in a hundred years of rotation: what has more is no key of ours.
const VERSIONS_MAX: usize = 512;
/// How many keys one other region may share with this one, by its own wish: at the most that a message can
/// say of each, half of what a log may have.
const KEYS_OF_A_REGION_MAX: usize = 2000;
/// More regions than there are.
const REPLICAS_MAX: usize = 256;

/// What the receiver gives for one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrapping {
    /// What to wrap with: SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
    /// To be given back with the message.
    pub token: Vec<u8>,
}

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

/// What is said of a replica when it is made: none of this is shared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewReplica {
    /// The operator's words.
    pub description: String,
    /// Its tags.
    pub tags: Vec<(String, String)>,
    /// Its policy, if not the one that every key is made with.
    pub policy: Option<String>,
}

/// A message, as it goes over the wire. Has no Debug.
pub struct Message {
    /// What it says, JSON.
    pub shared: String,
    /// The key that the material is under, wrapped.
    pub wrapped_key: Vec<u8>,
    /// The material of all versions, encrypted.
    pub material: Vec<u8>,
}

/// What all relatives share, and who tells whom.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shared {
    key: Uuid,
    account: String,
    from: String,
    to: String,
    primary: String,
    replicas: BTreeSet<String>,
    generation: u64,
    rotation: Option<Rotation>,
    /// Oldest first; the material of each is in the same order.
    versions: Vec<SharedVersion>,
    /// There where the replica is to be made.
    new: Option<NewReplica>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SharedVersion {
    id: Uuid,
    created: i64,
    rotation: Option<RotationType>,
    waits: bool,
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
        let (public_key, private) = one_time_key(SPEC)?;
        let valid_to = self.log.now().wall + GOOD_FOR;
        let head = [&id.as_bytes()[..], &valid_to.to_be_bytes()].concat();
        let token = self.log.read(|log| {
            let mut token = Zeroizing::new(Vec::with_capacity(head.len() + private.len()));
            token.extend_from_slice(&head);
            token.extend_from_slice(&private);
            log.keys().seal_token(&token_label(from), &token)
        })?;
        Ok(Parameters { wrapping: Some(Wrapping { public_key, token }), ..has })
    }

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
            // The room is there from the start: growing would leave a copy behind.
            let len = entry.versions.len() * MATERIAL_LEN;
            let mut material = Zeroizing::new(Vec::with_capacity(len + TAG_LEN));
            for version in &entry.versions {
                material.extend_from_slice(log.keys().open(key, version.id, &version.sealed)?.bytes());
            }
            let once = Material::random()?;
            let tag = cipher(&once)
                .encrypt_inout_detached(&nonce(), text.as_bytes(), material.as_mut_slice().into())
                .map_err(|_| KmsError::Internal("AES-GCM refused the length of a message".into()))?;
            let wrapped_key = wrap(&wrapping.public_key, &once, SPEC, LABEL.as_bytes())?;
            let material = [&material[..], &tag].concat();
            Ok((Message { shared: text, wrapped_key, material }, shared.generation))
        })
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
        let private = self.log.read(|log| open_token(log.keys(), from, token, shared.key, now))?;
        let material = opened(&private, &shared, message)?;
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
            versions: entry.versions.iter().map(SharedVersion::of).collect(),
            new: new.cloned(),
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
        material: &[Material],
    ) -> Result<KeyEntry, KmsError> {
        let arn = self.place.key_arn(known.id);
        for version in &known.versions {
            let Some(at) = shared.versions.iter().position(|other| other.id == version.id) else {
                let message = format!("{arn} has material that the message of {} lacks.", shared.from);
                return Err(conflict(message));
            };
            let own = log.keys().open(known.id, version.id, &version.sealed)?;
            if !same(own.bytes(), material[at].bytes()) {
                return Err(conflict(format!("{arn} has other material than {} says.", shared.from)));
            }
        }
        with_shared(log.keys(), known, shared, material)
    }

    fn not_a_relative(&self, key: Uuid, region: &str) -> KmsError {
        let arn = self.place.key_arn(key);
        KmsError::AccessDenied(format!("The KMS of {region} does not have the primary key of {arn}."))
    }

    fn no_such_key(&self, key: Uuid) -> KmsError {
        KmsError::NotFound(format!("Key '{}' does not exist", self.place.key_arn(key)))
    }
}

impl SharedVersion {
    fn of(version: &VersionEntry) -> Self {
        let VersionEntry { id, created, rotation, waits, .. } = *version;
        SharedVersion { id, created, rotation, waits }
    }
}

impl Shared {
    /// Fails unless this can be said of `key` by the KMS of the region `from` to the one at `here`.
    fn check(&self, from: &str, key: &str, here: &Locality) -> Result<(), KmsError> {
        let mut regions = self.replicas.iter().chain([&self.primary]);
        let ids: BTreeSet<Uuid> = self.versions.iter().map(|version| version.id).collect();
        let is_message = here.parse(key)? == KeyName::Id(self.key)
            && is_multi_region(self.key)
            && (&*self.from, &*self.to, &self.account) == (from, &*here.region, &here.account)
            && regions.all(|region| is_region(region))
            && self.replicas.len() <= REPLICAS_MAX
            && !self.replicas.contains(&self.primary)
            && (self.primary == self.to || self.replicas.contains(&self.to))
            && (self.primary == self.from || self.replicas.contains(&self.from))
            && (1..=VERSIONS_MAX).contains(&self.versions.len())
            && ids.len() == self.versions.len()
            && self.versions.iter().all(|version| TIMES.contains(&version.created))
            && self.rotation.as_ref().is_none_or(Rotation::is_sound)
            // What encrypts there can encrypt here.
            && self.versions.iter().any(|version| !version.waits)
            // A number that leaves room for the next ones.
            && self.generation < u64::MAX / 2;
        match is_message {
            true => Ok(()),
            false => Err(KmsError::Validation(format!(
                "That is no message of {from} about {key} in the account {} for {}.",
                here.account, here.region
            ))),
        }
    }
}

/// `key` with what its relatives share.
fn with_shared(
    keys: &LogKeys,
    key: &KeyEntry,
    shared: &Shared,
    material: &[Material],
) -> Result<KeyEntry, KmsError> {
    let mut versions = Vec::with_capacity(shared.versions.len());
    for (version, material) in shared.versions.iter().zip(material) {
        let known = key.versions.iter().find(|known| known.id == version.id);
        let sealed = match known {
            Some(known) => known.sealed,
            None => keys.seal(key.id, version.id, material)?,
        };
        let SharedVersion { id, created, rotation, waits } = *version;
        versions.push(VersionEntry { id, created, rotation, waits, sealed });
    }
    let replicas: BTreeMap<String, u64> = shared.replicas.iter().map(|region| (region.clone(), 1)).collect();
    let multi_region = Some(MultiRegion {
        primary: shared.primary.clone(),
        generation: shared.generation,
        replicas,
        moving_to: None,
        deletion_days: None,
    });
    Ok(KeyEntry { rotation: shared.rotation.clone(), multi_region, versions, ..key.clone() })
}

/// A hash of what all relatives of `key` share, with the primary key in this region. Which replicas there are
/// is left out: of those a relative may hear later.
fn state_of(key: &KeyEntry, primary: &str, generation: u64) -> Result<String, KmsError> {
    let versions: Vec<SharedVersion> = key.versions.iter().map(SharedVersion::of).collect();
    let shared = serde_json::to_vec(&(key.id, primary, generation, &key.rotation, versions))
        .map_err(|e| KmsError::Internal(format!("write what regions share: {e}")))?;
    Ok(hex::encode(Sha256::digest(shared)))
}

fn generation_for(it: &MultiRegion, region: &str) -> u64 {
    it.generation + u64::from(it.moving_to.as_deref() == Some(region))
}

fn token_label(from: &str) -> String {
    format!("{LABEL} from {from}")
}

/// The private key in a token, PKCS#8.
fn open_token(
    keys: &LogKeys,
    from: &str,
    token: &[u8],
    key: Uuid,
    now: i64,
) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    let invalid = || KmsError::Validation("The token is not one of this KMS's for this message.".into());
    let opened = keys.open_token(&token_label(from), token).ok_or_else(invalid)?;
    let (id, rest) = opened.split_first_chunk::<16>().ok_or_else(invalid)?;
    let (valid_to, private) = rest.split_first_chunk::<8>().ok_or_else(invalid)?;
    if id != key.as_bytes() || i64::from_be_bytes(*valid_to) <= now {
        return Err(invalid());
    }
    Ok(Zeroizing::new(private.to_vec()))
}

/// The material of each version that `shared` names, in that order.
fn opened(private: &[u8], shared: &Shared, message: &Message) -> Result<Vec<Material>, KmsError> {
    let once = unwrap(private, &message.wrapped_key, LABEL.as_bytes())?;
    let (text, tag) = message.material.split_last_chunk::<TAG_LEN>().ok_or(KmsError::InvalidCiphertext)?;
    if text.len() != shared.versions.len() * MATERIAL_LEN {
        return Err(KmsError::InvalidCiphertext);
    }
    let mut bytes = Zeroizing::new(text.to_vec());
    cipher(&once)
        .decrypt_inout_detached(
            &nonce(),
            message.shared.as_bytes(),
            bytes.as_mut_slice().into(),
            &Tag::from(*tag),
        )
        .map_err(|_| KmsError::InvalidCiphertext)?;
    let (each, _) = bytes.as_chunks::<MATERIAL_LEN>();
    each.iter().map(Material::copy_of).collect()
}

fn cipher(once: &Material) -> Aes256Gcm {
    Aes256Gcm::new_from_slice(once.bytes()).expect("the key has 32 bytes")
}

/// Each key is random and encrypts one message.
fn nonce() -> Nonce<aes_gcm::aead::consts::U12> {
    Nonce::default()
}
