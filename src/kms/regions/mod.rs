//! Multi-Region keys between the KMSs of several regions: ReplicateKey, UpdatePrimaryRegion, and what the
//! primary key's KMS brings the others.
//!
//! The KMS of the primary key asks, as a principal of the other one's (`kms principal create --peer`), by
//! that one's own wire. Which KMSs there are the settings say. Each step is written down before the next one
//! begins, and may be done again: whatever was interrupted comes to its end when the replicas are
//! synchronized next, which `kms serve` does by itself.
#![forbid(unsafe_code)]

mod peer;

use crate::config::Settings;
use crate::config::regions::KmsRegion;
use crate::kms::KmsError;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::admin::KeyMetadata;
use crate::kms::embedded::audit::Call;
use crate::kms::embedded::multi_region::Begun;
use crate::kms::embedded::synchronization::NewReplica;
use crate::kms::key_ref::id_text;
use peer::Peer;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::Thread;
use std::time::Duration;
use uuid::Uuid;

/// How often a server looks whether a replica is behind.
const PERIOD: Duration = Duration::from_secs(60);

/// What a region's KMS tells of a replica: KeyMetadata, as DescribeKey has it there.
pub struct Replica {
    /// The key's ARN in the other region.
    pub arn: String,
    /// KeyMetadata, in the words of the other region's KMS.
    pub metadata: Value,
}

/// ReplicateKey: the multi-Region key that `key` names here gets a replica in `region`.
///
/// # Errors
/// `Validation` for a region that the settings do not name; `AlreadyExists` if it has the key; `Transport` if
/// its KMS is not reached, then the same call again goes on with what has begun; those of both KMSs.
pub fn replicate(kms: &Embedded, key: &str, region: &str, new: &NewReplica) -> Result<Replica, KmsError> {
    let replicated = replicate_now(kms, key, region, new);
    kms.record(Call::new("ReplicateKey").on(key).with("replicaRegion", region), replicated)
}

fn replicate_now(kms: &Embedded, key: &str, region: &str, new: &NewReplica) -> Result<Replica, KmsError> {
    // Nothing begins that has no way to its end.
    let peer = Peer::of(&known(kms, region)?)?;
    let _telling = kms.telling_of(kms.key(key)?.id)?;
    let Begun { key: id, is_new } = kms.begin_replication(key, region)?;
    let metadata = match bring(kms, &peer, id, Some(new)) {
        Ok(metadata) => metadata,
        Err(e) => {
            // A refusal of the first try is one: nothing was made. Otherwise nobody knows. Nobody else has
            // told that region of the key meanwhile.
            if is_new && is_refusal(&e) {
                kms.note_replica_gone(id, region)?;
            }
            return Err(e);
        }
    };
    Ok(Replica { arn: kms.locality().in_region(region).key_arn(id), metadata })
}

/// UpdatePrimaryRegion: the replica in `region` of the key that `key` names here becomes the primary key, and
/// this one its replica.
///
/// # Errors
/// `Validation` for a region that the settings do not name; `NotFound` if it has no replica;
/// `Transport` if its KMS is not reached: then the key stays Updating until the same call again
/// succeeds; those of both KMSs.
pub fn update_primary(kms: &Embedded, key: &str, region: &str) -> Result<KeyMetadata, KmsError> {
    let moved = (|| {
        let peer = Peer::of(&known(kms, region)?)?;
        let _telling = kms.telling_of(kms.key(key)?.id)?;
        let Begun { key: id, is_new } = kms.begin_move(key, region)?;
        if let Err(e) = bring(kms, &peer, id, None) {
            // As above: what an earlier try has sent may be taken yet.
            if is_new && is_refusal(&e) {
                kms.note_not_moved(id)?;
            }
            return Err(e);
        }
        kms.key(&id_text(id))
    })();
    kms.record(Call::new("UpdatePrimaryRegion").on(key).with("primaryRegion", region), moved)
}

/// Brings every replica that is behind what its primary key here has. Returns what was not reached or was
/// refused, by region: one that fails keeps no other waiting. Under the region of the settings stands a key
/// that has another one.
///
/// # Errors
/// Those of the store.
pub fn synchronize(kms: &Embedded) -> Result<BTreeMap<String, KmsError>, KmsError> {
    let mut failed = BTreeMap::new();
    if let Err(e) = kms.check_regions() {
        failed.insert(kms.locality().region.clone(), e);
    }
    // A new version goes out twice: to be known, and to be used. What is behind after that is behind by
    // something that came meanwhile.
    for _ in 0..3 {
        for behind in kms.replicas_behind()? {
            if failed.contains_key(&behind.region) {
                continue;
            }
            let peer = match known(kms, &behind.region).and_then(|region| Peer::of(&region)) {
                Ok(peer) => peer,
                Err(e) => {
                    failed.insert(behind.region, e);
                    continue;
                }
            };
            let _telling = kms.telling_of(behind.key)?;
            // Whoever was waited for may have brought it, and more.
            if !kms.replicas_behind()?.contains(&behind) {
                continue;
            }
            match bring(kms, &peer, behind.key, None) {
                // There was one, and it is deleted.
                Err(KmsError::NotFound(_)) => kms.note_replica_gone(behind.key, &behind.region)?,
                Err(e) => drop(failed.insert(behind.region, e)),
                Ok(_) => {}
            }
        }
    }
    Ok(failed)
}

/// Synchronizes now and then, in a thread of its own, as long as the process lives; and at once
/// when the thread is unparked.
///
/// # Errors
/// The system's, which gives no thread.
pub(in crate::kms) fn synchronize_in_time(kms: &Arc<Embedded>) -> std::io::Result<Thread> {
    let kms = kms.clone();
    let in_time = move || {
        let mut told = BTreeMap::new();
        loop {
            match synchronize(&kms) {
                Ok(failed) => {
                    for (region, e) in &failed {
                        // Once, and not every minute.
                        if told.get(region) != Some(e) {
                            log::warn!("multi-Region keys are not brought up to date in {region}: {e}");
                        }
                    }
                    told = failed;
                }
                Err(e) => log::warn!("multi-Region keys were not looked at: {e}"),
            }
            std::thread::park_timeout(PERIOD);
        }
    };
    std::thread::Builder::new().name("regions".into()).spawn(in_time).map(|it| it.thread().clone())
}

/// Brings what the key here has to its replica, which is made if `new` says how. Returns KeyMetadata, in the
/// other KMS's words; null where it had all.
fn bring(kms: &Embedded, peer: &Peer, key: Uuid, new: Option<&NewReplica>) -> Result<Value, KmsError> {
    let region = peer.region();
    let wanted = kms.generation_for(key, region)?;
    let parameters = peer.parameters(key, wanted, new.is_some())?;
    let Some(wrapping) = &parameters.wrapping else {
        kms.note_parameters(key, region, &parameters)?;
        return Ok(Value::Null);
    };
    let (message, generation) = kms.message_for(key, region, wrapping, new)?;
    let metadata = peer.tell(key, &wrapping.token, &message)?;
    kms.note_synchronized(key, region, generation)?;
    Ok(metadata)
}

/// Whether the other KMS has said no, so that it has done nothing.
fn is_refusal(e: &KmsError) -> bool {
    !matches!(
        e,
        KmsError::Transport(_) | KmsError::Unavailable(_) | KmsError::Throttled(_) | KmsError::Internal(_)
    )
}

/// The KMS of this region, as the settings have it now.
fn known(kms: &Embedded, region: &str) -> Result<KmsRegion, KmsError> {
    let settings = Settings::load(kms.root()).map_err(|e| KmsError::Validation(e.to_string()))?;
    let found = settings.kms_regions.into_iter().find(|it| it.region == region);
    found.ok_or_else(|| {
        KmsError::Validation(format!(
            "no [[kms-region]] in the settings says where the KMS of {region} is, and nothing else does"
        ))
    })
}
