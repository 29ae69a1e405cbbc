//! What all relatives of a multi-Region key share, as one region says it to another.
//!
//! Pure. What another region says is a claim: [`Shared::check`] lets through what can be said of a key.
#![forbid(unsafe_code)]

use crate::config::regions::is_region;
use crate::kms::KmsError;
use crate::kms::embedded::blob::Material;
use crate::kms::embedded::keys::{LogKeys, SEALED_LEN};
use crate::kms::embedded::records::{
    External, Fingerprint, KeyEntry, MultiRegion, Rotation, RotationType, VersionEntry,
};
use crate::kms::embedded::rotation::TIMES;
use crate::kms::key_ref::{KeyName, Locality, is_multi_region};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// More versions than a key has in a hundred years of rotation: what has more is no key of ours.
const VERSIONS_MAX: usize = 512;
/// More regions than there are.
const REPLICAS_MAX: usize = 256;

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

/// What all relatives share, and who tells whom.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Shared {
    pub(super) key: Uuid,
    pub(super) account: String,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) primary: String,
    pub(super) replicas: BTreeSet<String>,
    pub(super) generation: u64,
    pub(super) rotation: Option<Rotation>,
    /// Oldest first; the material of each is in the same order. Of imported material there are none.
    pub(super) versions: Vec<SharedVersion>,
    /// There if material is imported into each of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) external: Option<SharedExternal>,
    /// There where the replica is to be made.
    pub(super) new: Option<NewReplica>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SharedVersion {
    pub(super) id: Uuid,
    pub(super) created: i64,
    pub(super) rotation: Option<RotationType>,
    pub(super) waits: bool,
}

/// What relatives share whose material is imported.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SharedExternal {
    /// The id of their one version.
    pub(super) version: Uuid,
    /// The id of the fingerprint, once there is one, which is in the place of the material then.
    pub(super) fingerprint: Option<Uuid>,
}

impl SharedExternal {
    pub(super) fn of(external: &External) -> Self {
        let fingerprint = external.fingerprint.as_ref().map(|it| it.id);
        SharedExternal { version: external.version, fingerprint }
    }
}

impl SharedVersion {
    fn of(version: &VersionEntry) -> Self {
        let VersionEntry { id, created, rotation, waits, .. } = *version;
        SharedVersion { id, created, rotation, waits }
    }
}

impl Shared {
    /// How many secrets go with it.
    pub(super) fn secrets(&self) -> usize {
        match &self.external {
            Some(it) => usize::from(it.fingerprint.is_some()),
            None => self.versions.len(),
        }
    }

    /// Fails unless this can be said of `key` by the KMS of the region `from` to the one at `here`.
    pub(super) fn check(&self, from: &str, key: &str, here: &Locality) -> Result<(), KmsError> {
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
            && self.versions.len() <= VERSIONS_MAX
            && ids.len() == self.versions.len()
            && self.versions.iter().all(|version| TIMES.contains(&version.created))
            && self.rotation.as_ref().is_none_or(Rotation::is_sound)
            && match self.external {
                // What encrypts there can encrypt here.
                None => self.versions.iter().any(|version| !version.waits),
                Some(_) => self.versions.is_empty() && self.rotation.is_none(),
            }
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

/// `key` with what its relatives share, and these secrets of theirs.
pub(super) fn with_shared(
    keys: &LogKeys,
    key: &KeyEntry,
    shared: &Shared,
    secrets: &[Material],
) -> Result<KeyEntry, KmsError> {
    let (external, versions) = match &shared.external {
        // What is imported here stays what it is.
        Some(it) => (Some(external(keys, key, it, secrets)?), key.versions.clone()),
        None => (None, versions(keys, key, shared, secrets)?),
    };
    let replicas: BTreeMap<String, u64> = shared.replicas.iter().map(|region| (region.clone(), 1)).collect();
    let multi_region = Some(MultiRegion {
        primary: shared.primary.clone(),
        generation: shared.generation,
        replicas,
        moving_to: None,
        deletion_days: None,
    });
    Ok(KeyEntry { rotation: shared.rotation.clone(), multi_region, external, versions, ..key.clone() })
}

fn versions(
    keys: &LogKeys,
    key: &KeyEntry,
    shared: &Shared,
    material: &[Material],
) -> Result<Vec<VersionEntry>, KmsError> {
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
    Ok(versions)
}

fn external(
    keys: &LogKeys,
    key: &KeyEntry,
    shared: &SharedExternal,
    secrets: &[Material],
) -> Result<External, KmsError> {
    let own = key.external.as_ref();
    let known = own.and_then(|own| own.fingerprint.clone()).filter(|own| Some(own.id) == shared.fingerprint);
    let fingerprint = match (known, shared.fingerprint, secrets) {
        (None, Some(id), [secret]) => {
            Some(Box::new(Fingerprint { id, sealed: keys.seal(key.id, id, secret)? }))
        }
        (known, ..) => known,
    };
    let expires = own.and_then(|own| own.expires);
    Ok(External { version: shared.version, check: None, fingerprint, expires })
}

/// What all relatives of `key` share that is secret: where it lies sealed, each with its id.
pub(super) fn secrets_of(key: &KeyEntry) -> Vec<(Uuid, &[u8; SEALED_LEN])> {
    match &key.external {
        Some(external) => external.fingerprint.iter().map(|it| (it.id, &it.sealed)).collect(),
        None => key.versions.iter().map(|version| (version.id, &version.sealed)).collect(),
    }
}

pub(super) fn versions_of(key: &KeyEntry) -> Vec<SharedVersion> {
    match &key.external {
        Some(_) => Vec::new(),
        None => key.versions.iter().map(SharedVersion::of).collect(),
    }
}

/// A hash of what all relatives of `key` share, with the primary key in this region. Which replicas there are
/// is left out: of those a relative may hear later.
pub(super) fn state_of(key: &KeyEntry, primary: &str, generation: u64) -> Result<String, KmsError> {
    let versions = versions_of(key);
    let shared = match key.external.as_ref().map(SharedExternal::of) {
        None => serde_json::to_vec(&(key.id, primary, generation, &key.rotation, versions)),
        Some(it) => serde_json::to_vec(&(key.id, primary, generation, &key.rotation, versions, it)),
    };
    let shared = shared.map_err(|e| KmsError::Internal(format!("write what regions share: {e}")))?;
    Ok(hex::encode(Sha256::digest(shared)))
}

pub(super) fn generation_for(it: &MultiRegion, region: &str) -> u64 {
    it.generation + u64::from(it.moving_to.as_deref() == Some(region))
}
