//! Multi-Region keys: one id and the same material in the KMSs of several regions, each of which works alone.
//!
//! One of them is the primary key, the others are its replicas. What all share (versions and rotation) is
//! changed at the primary key alone and has a number, the generation; state, description, tags, policy,
//! aliases and grants are each region's own. Here stands what a region writes down of it. What goes from
//! one region to another is `synchronization`'s matter, and the way there is that of `kms::regions`:
//! nothing here knows a network.
//!
//! A new version waits: it decrypts everywhere before it encrypts anywhere. So at any moment, and wherever a
//! process or a connection ended, what one region has encrypted every other region can decrypt.
#![forbid(unsafe_code)]

use crate::kms::embedded::Embedded;
use crate::kms::embedded::audit::{Call, Due};
use crate::kms::embedded::blob::random;
use crate::kms::embedded::lock::Lock;
use crate::kms::embedded::records::{Change, Deletion, KeyEntry, MultiRegion, VersionEntry};
use crate::kms::embedded::shared_log::Now;
use crate::kms::key_ref::{id_text, multi_region_id};
use crate::kms::{Exception, KeyState, KmsError};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// A multi-Region key among its relatives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relatives {
    /// Whether it is the primary key.
    pub is_primary: bool,
    /// The primary key.
    pub primary: Related,
    /// The replicas that are known to be there.
    pub replicas: Vec<Related>,
    /// At the primary key: the regions that may not have a replica yet. ReplicateKey again makes it.
    pub creating: Vec<String>,
    /// At the primary key: the regions that do not have its last change yet.
    pub behind: Vec<String>,
    /// At the primary key: the region whose replica becomes the primary key.
    pub moving_to: Option<String>,
}

/// A key of the same id in one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Related {
    /// The region.
    pub region: String,
    /// The key's ARN there.
    pub arn: String,
}

/// A replica that is to be brought up to date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Behind {
    /// The key.
    pub key: Uuid,
    /// The region of its replica.
    pub region: String,
}

/// What has begun of a replication or a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The key.
    pub key: Uuid,
    /// Whether this call has begun it; otherwise an earlier one has, whose outcome nobody knows.
    pub is_new: bool,
}

/// While this lives, nobody else tells another region of one key, in this process or another.
#[derive(Debug)]
pub struct Telling {
    _lock: Lock,
}

/// A new random id of a multi-Region key.
pub(super) fn new_multi_region_id() -> Result<Uuid, KmsError> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    Ok(multi_region_id(bytes))
}

impl MultiRegion {
    /// A primary key in this region, without replicas.
    pub(super) fn primary_in(region: &str) -> Self {
        MultiRegion {
            primary: region.to_owned(),
            generation: 1,
            replicas: BTreeMap::new(),
            moving_to: None,
            deletion_days: None,
        }
    }

    /// The regions whose replicas are known to be there.
    pub(super) fn confirmed(&self) -> impl Iterator<Item = &String> {
        self.replicas.iter().filter(|(_, has)| **has > 0).map(|(region, _)| region)
    }

    /// Whether there is a key of this id in `region`, as far as is known here.
    pub(super) fn has(&self, region: &str) -> bool {
        self.primary == region || self.replicas.get(region).is_some_and(|has| *has > 0)
    }

    /// Whether this can be what the KMS of `region` knows of its own key.
    fn is_in(&self, region: &str) -> bool {
        self.primary == region || self.replicas.contains_key(region)
    }

    /// The same key with its primary key in `region`: what the region that had it is then, and all others.
    pub(super) fn moved(&self, region: &str) -> (String, BTreeSet<String>) {
        let others = self.confirmed().filter(|other| *other != region).chain([&self.primary]);
        (region.to_owned(), others.cloned().collect())
    }
}

impl KeyEntry {
    /// Whether the key is a replica, for the KMS of this region.
    pub(super) fn is_replica_in(&self, region: &str) -> bool {
        self.multi_region.as_ref().is_some_and(|it| it.primary != region)
    }

    /// The key with one version more. Where the key has replicas, the version waits until these have it.
    pub(super) fn with_version(mut self, version: VersionEntry) -> Self {
        let waits = self.multi_region.as_ref().is_some_and(|it| it.confirmed().next().is_some());
        self.versions.push(VersionEntry { waits, ..version });
        self.shared_anew()
    }

    /// The key after a change of what its relatives share with it.
    pub(super) fn shared_anew(mut self) -> Self {
        if let Some(it) = &mut self.multi_region {
            it.generation += 1;
        }
        self
    }

    /// The days that its deletion waits, if it waits for that: from a moment that is known, or from the
    /// end of the last replica.
    pub(super) fn deletion_days(&self) -> Option<u32> {
        let until_then = self.multi_region.as_ref().and_then(|it| it.deletion_days);
        self.deletion.as_ref().map(|deletion| deletion.days).or(until_then)
    }

    /// The key, whose deletion does not wait for that of its replicas any more.
    pub(super) fn not_waiting_for_replicas(mut self) -> Self {
        if let Some(it) = &mut self.multi_region {
            it.deletion_days = None;
        }
        self
    }

    /// What is known of the relatives of a multi-Region key.
    pub(super) fn related(&self) -> Result<&MultiRegion, KmsError> {
        let damaged = || KmsError::Corrupt(format!("{} says nothing of its regions", id_text(self.id)));
        self.multi_region.as_ref().ok_or_else(damaged)
    }
}

impl Embedded {
    /// Waits until nobody else tells another region of `key`. Of two that moved it at once, one
    /// could hear that the other region refuses, and take the move back here, while what the other
    /// has sent is taken there.
    ///
    /// # Errors
    /// Those of the store.
    pub fn telling_of(&self, key: Uuid) -> Result<Telling, KmsError> {
        Ok(Telling { _lock: self.log.telling_of(key)? })
    }

    /// Writes down that there is to be a replica of `key` in `region`: the first half of ReplicateKey,
    /// durable before the other region hears of it, so that no replica is ever unknown to its primary key.
    ///
    /// # Errors
    /// `AlreadyExists` if the replica is known to be there; `Unsupported` for a key that is in one region
    /// alone, and for a replica; those of the key's state.
    pub fn begin_replication(&self, key: &str, region: &str) -> Result<Begun, KmsError> {
        self.log.write(|log, _| {
            let entry = log.state().key(key, &self.place)?;
            self.check_replicable(entry)?;
            let mut it = entry.related()?.clone();
            let there = self.place.in_region(region).key_arn(entry.id);
            if region == it.primary || it.replicas.get(region).is_some_and(|has| *has > 0) {
                return Err(KmsError::AlreadyExists(format!("{there} already exists.")));
            }
            let is_new = it.replicas.insert(region.to_owned(), 0).is_none();
            let begun = Begun { key: entry.id, is_new };
            Ok((changed(entry, it), begun))
        })
    }

    /// Writes down that the replica of `key` in `region` is to be the primary key: the first half of
    /// UpdatePrimaryRegion. Until the other region has answered nothing that is shared changes here.
    ///
    /// # Errors
    /// `NotFound` if there is no such replica; `InvalidState` if another move, a replication or a rotation
    /// has not come to its end; `Unsupported` and those of the key's state as for ReplicateKey.
    pub fn begin_move(&self, key: &str, region: &str) -> Result<Begun, KmsError> {
        self.log.write(|log, _| {
            let entry = log.state().key(key, &self.place)?;
            self.check_movable(entry)?;
            let arn = self.place.key_arn(entry.id);
            let mut it = entry.related()?.clone();
            match &it.moving_to {
                Some(to) if to == region => return Ok((Vec::new(), Begun { key: entry.id, is_new: false })),
                Some(to) => {
                    return Err(KmsError::InvalidState(format!(
                        "{arn} is updating: {to} becomes its region."
                    )));
                }
                None => {}
            }
            if it.replicas.get(region).is_none_or(|has| *has == 0) {
                let there = self.place.in_region(region).key_arn(entry.id);
                return Err(KmsError::NotFound(format!("Key '{there}' does not exist")));
            }
            if it.replicas.values().any(|has| *has == 0) {
                let message =
                    format!("{arn} is being replicated: end that before its primary region changes.");
                return Err(KmsError::InvalidState(message));
            }
            if entry.versions.iter().any(|version| version.waits) {
                let message =
                    format!("{arn} is being rotated: not all of its replicas have the new material.");
                return Err(KmsError::InvalidState(message));
            }
            it.moving_to = Some(region.to_owned());
            Ok((changed(entry, it), Begun { key: entry.id, is_new: true }))
        })
    }

    /// Writes down that the primary key `key` stays here: the other region has refused the first that it
    /// heard of its move, and nothing else is on its way there.
    ///
    /// # Errors
    /// Those of the store.
    pub fn note_not_moved(&self, key: Uuid) -> Result<(), KmsError> {
        self.log.write(|log, _| {
            let entry = log.state().key(&id_text(key), &self.place)?;
            let it = MultiRegion { moving_to: None, ..entry.related()?.clone() };
            Ok((changed(entry, it), ()))
        })
    }

    /// The replicas that are known to be there and do not have what their primary keys here have; those of
    /// keys whose deletion waits for them; and those that are to be primary keys.
    ///
    /// # Errors
    /// Those of the store.
    pub fn replicas_behind(&self) -> Result<Vec<Behind>, KmsError> {
        if !self.log.exists()? {
            return Ok(Vec::new());
        }
        self.current(|log| {
            let primaries = log.state().keys().filter(|key| !key.is_replica_in(&self.place.region));
            let behind = primaries.filter_map(|key| Some((key.id, key.multi_region.as_ref()?)));
            let behind = behind.flat_map(|(key, it)| {
                let is = |region: &str, has: u64| {
                    let waits = it.deletion_days.is_some() || it.moving_to.as_deref() == Some(region);
                    has > 0 && (has < it.generation || waits)
                };
                let regions = it.replicas.iter().filter(move |(region, has)| is(region, **has));
                regions.map(move |(region, _)| Behind { key, region: region.clone() })
            });
            Ok(behind.collect())
        })
    }

    /// Writes down that the replica in `region` has this generation of `key`. What waited for that is done: a
    /// new version encrypts once all replicas have it, and a replica that has heard so is the primary key.
    /// Returns the key as it is then.
    ///
    /// # Errors
    /// ConflictException for a generation that the key here never had; those of the store.
    pub fn note_synchronized(
        &self,
        key: Uuid,
        region: &str,
        generation: u64,
    ) -> Result<super::admin::KeyMetadata, KmsError> {
        let (metadata, is_news) = self.log.write(|log, _| {
            let entry = log.state().key(&id_text(key), &self.place)?;
            let after = synchronized(entry, region, generation).ok_or_else(|| {
                let (arn, its) = (self.place.key_arn(key), self.place.in_region(region).key_arn(key));
                conflict(format!(
                    "{its} has generation {generation}, which {arn} never had: was the KMS here put back \
                     from a backup?"
                ))
            })?;
            let metadata = self.metadata(log, &after);
            let is_news = after != *entry;
            Ok((if is_news { vec![Change::Key(after)] } else { Vec::new() }, (metadata, is_news)))
        })?;
        if is_news {
            self.record_due(&[Due::synchronized(key)]);
        }
        Ok(metadata)
    }

    /// Writes down that there is no replica of `key` in `region` (any more). If the deletion of the key has
    /// waited for that alone, its waiting window begins.
    ///
    /// # Errors
    /// Those of the store.
    pub fn note_replica_gone(&self, key: Uuid, region: &str) -> Result<(), KmsError> {
        self.log.write(|log, now| {
            let entry = log.state().key(&id_text(key), &self.place)?;
            Ok((without_replica(entry, region, now)?, ()))
        })
    }

    /// Has the primary key `key` forget its replica in `region`, which is lost for good: nothing waits for
    /// that region any more, and nothing is brought there. If its KMS comes back, its key stays as it was,
    /// and is no relative of this one any more.
    ///
    /// # Errors
    /// `NotFound` if no replica there is known; `Unsupported` for what is no primary key; `InvalidState`
    /// while the primary key moves there, since it may be there already.
    pub fn forget_replica(&self, key: &str, region: &str) -> Result<(), KmsError> {
        let forgotten = self.log.write(|log, now| {
            let entry = log.state().key(key, &self.place)?;
            self.check_multi_region(entry)?;
            self.check_primary(entry)?;
            let it = entry.related()?;
            if it.moving_to.as_deref() == Some(region) {
                return self.check_not_updating(entry).map(|()| (Vec::new(), ()));
            }
            if !it.replicas.contains_key(region) {
                let there = self.place.in_region(region).key_arn(entry.id);
                return Err(KmsError::NotFound(format!("Key '{there}' does not exist")));
            }
            Ok((without_replica(entry, region, now)?, ()))
        });
        self.record(Call::new("ForgetReplica").on(key).with("replicaRegion", region), forgotten)
    }

    /// Fails unless `key` may be made a replica: it is an enabled primary key.
    fn check_movable(&self, key: &KeyEntry) -> Result<(), KmsError> {
        self.check_multi_region(key)?;
        key.check_usable(&self.place)?;
        self.check_primary(key)
    }

    /// Fails unless `key` may be replicated: it is a primary key, and enabled, or waits for its material,
    /// which does not go along.
    fn check_replicable(&self, key: &KeyEntry) -> Result<(), KmsError> {
        self.check_multi_region(key)?;
        if key.state() != KeyState::PendingImport {
            key.check_usable(&self.place)?;
        }
        self.check_primary(key)?;
        self.check_not_updating(key)
    }

    fn check_multi_region(&self, key: &KeyEntry) -> Result<(), KmsError> {
        let arn = self.place.key_arn(key.id);
        let message = || format!("{arn} is not a multi-Region key: no other region can have it.");
        if key.multi_region.is_some() { Ok(()) } else { Err(KmsError::Unsupported(message())) }
    }

    /// Fails if a multi-Region key here is neither the primary key nor a replica in the region of the
    /// settings: that has been changed since the key was made, and no relative knows of it.
    ///
    /// # Errors
    /// `InvalidState`, for the first such key; those of the store.
    pub fn check_regions(&self) -> Result<(), KmsError> {
        if !self.log.exists()? {
            return Ok(());
        }
        self.current(|log| log.state().keys().try_for_each(|key| self.check_region(key)))
    }

    /// As [`Embedded::check_regions`], for one key.
    pub(super) fn check_region(&self, key: &KeyEntry) -> Result<(), KmsError> {
        let here = &self.place.region;
        let Some(it) = key.multi_region.as_ref().filter(|it| !it.is_in(here)) else { return Ok(()) };
        let those: Vec<&str> = it.confirmed().chain([&it.primary]).map(String::as_str).collect();
        Err(KmsError::InvalidState(format!(
            "{} is a multi-Region key of {}, and \"region\" in the settings is {here}: nothing is rotated or \
             brought to other regions until the settings have its region again.",
            id_text(key.id),
            those.join(", ")
        )))
    }

    /// Fails for a replica, and for a key whose region the settings do not have any more.
    pub(super) fn check_primary(&self, key: &KeyEntry) -> Result<(), KmsError> {
        self.check_region(key)?;
        let Some(it) = key.multi_region.as_ref().filter(|_| key.is_replica_in(&self.place.region)) else {
            return Ok(());
        };
        let (arn, primary) = (self.place.key_arn(key.id), self.place.in_region(&it.primary).key_arn(key.id));
        Err(KmsError::Unsupported(format!("{arn} is a replica key; its primary key is {primary}.")))
    }

    /// Fails while the primary key moves to another region.
    pub(super) fn check_not_updating(&self, key: &KeyEntry) -> Result<(), KmsError> {
        let moves = key.multi_region.as_ref().is_some_and(|it| it.moving_to.is_some());
        let message = || format!("{} is updating.", self.place.key_arn(key.id));
        if moves { Err(KmsError::InvalidState(message())) } else { Ok(()) }
    }

    /// A primary key that has replicas, and whose deletion is to begin when they are gone; `None` for others.
    pub(super) fn until_replicas_are_gone(&self, key: &KeyEntry, days: u32) -> Option<KeyEntry> {
        let it = key.multi_region.as_ref().filter(|it| !it.replicas.is_empty())?;
        if key.is_replica_in(&self.place.region) {
            return None;
        }
        let multi_region = Some(MultiRegion { deletion_days: Some(days), ..it.clone() });
        Some(KeyEntry { enabled: false, multi_region, ..key.clone() })
    }

    /// What the KMS tells of the relatives of a key.
    pub(super) fn relatives(&self, key: Uuid, it: &MultiRegion) -> Relatives {
        let related = |region: &String| {
            let arn = self.place.in_region(region).key_arn(key);
            Related { region: region.clone(), arn }
        };
        let is_primary = it.primary == self.place.region;
        let those = |is: &dyn Fn(u64) -> bool| {
            let those = it.replicas.iter().filter(|(_, has)| is_primary && is(**has));
            those.map(|(region, _)| region.clone()).collect()
        };
        Relatives {
            is_primary,
            primary: related(&it.primary),
            replicas: it.confirmed().map(related).collect(),
            creating: those(&|has| has == 0),
            behind: those(&|has| has > 0 && has < it.generation),
            moving_to: it.moving_to.clone(),
        }
    }
}

/// The key once the replica in `region` has this generation; `None` if that cannot be.
fn synchronized(key: &KeyEntry, region: &str, generation: u64) -> Option<KeyEntry> {
    let mut after = key.clone();
    let it = key.multi_region.as_ref()?;
    if it.moving_to.as_deref() == Some(region) && generation > it.generation {
        let (primary, replicas) = it.moved(region);
        let replicas = replicas.into_iter().map(|replica| (replica, 1)).collect();
        let generation = it.generation + 1;
        let deletion_days = None;
        after.multi_region =
            Some(MultiRegion { primary, generation, replicas, moving_to: None, deletion_days });
        return Some(after);
    }
    let mut it = it.clone();
    if generation > it.generation {
        return None;
    }
    // It may be forgotten meanwhile.
    let Some(has) = it.replicas.get_mut(region) else { return Some(after) };
    let is_new = *has == 0;
    *has = (*has).max(generation);
    if is_new && it.confirmed().count() > 1 {
        // The others are to hear of it.
        it.generation += 1;
    }
    let all_have_it = it.replicas.values().filter(|has| **has > 0).all(|has| *has == it.generation);
    after.multi_region = Some(it);
    Some(if all_have_it { after.without_waiting() } else { after })
}

/// The change by which the key has no replica in `region`.
fn without_replica(key: &KeyEntry, region: &str, now: &Now) -> Result<Vec<Change>, KmsError> {
    let mut it = key.related()?.clone();
    if it.replicas.remove(region).is_none() {
        return Ok(Vec::new());
    }
    it.generation += 1;
    // It does not become the primary key any more.
    it.moving_to.take_if(|to| to == region);
    let all_have_it = it.confirmed().next().is_none();
    let days = it.deletion_days.take_if(|_| it.replicas.is_empty());
    let mut after = KeyEntry { multi_region: Some(it), ..key.clone() };
    if let Some(days) = days {
        after.deletion = Some(Deletion::ask(days, &now.moment, now.time));
    }
    Ok(vec![Change::Key(if all_have_it { after.without_waiting() } else { after })])
}

impl KeyEntry {
    /// The key when all of its relatives have every version.
    fn without_waiting(mut self) -> Self {
        if !self.versions.iter().any(|version| version.waits) {
            return self;
        }
        self.versions.iter_mut().for_each(|version| version.waits = false);
        self.shared_anew()
    }
}

fn changed(key: &KeyEntry, it: MultiRegion) -> Vec<Change> {
    if key.multi_region.as_ref() == Some(&it) {
        return Vec::new();
    }
    vec![Change::Key(KeyEntry { multi_region: Some(it), ..key.clone() })]
}

/// ConflictException.
pub(super) fn conflict(message: String) -> KmsError {
    KmsError::Other(Exception::Conflict, message)
}
