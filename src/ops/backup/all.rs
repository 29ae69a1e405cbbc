//! Volumes of a store are backed up to a place: each gets a snapshot, those that belong together at one
//! moment, and each snapshot is pushed. Of a volume the last one that was pushed stays at home as well, since
//! the next push finds by it what has changed; older ones of a backup's making go.
//!
//! What fails for one volume is reported, and stops no other. What a backup was interrupted in, the next one
//! ends first.

use super::push::Pushed;
use super::remove::{self, Keep, Removed, What};
use super::step::Site;
use super::{For, Session, Target, kms_log};
use crate::backup::manifest::Planes;
use crate::backup::saved::SavedVolume;
use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::metadata::KeyRecord;
use crate::catalog::snapshot::Snapshot;
use crate::catalog::{Catalog, LayerId, Metadata, SnapshotId, VolumeId};
use crate::kms::KmsKey;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::root_key::passphrase;
use crate::kms::key_ref::ProviderName;
use crate::ops::{Store, delete, snapshot, space};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// What is to be backed up, and how.
#[derive(Clone, Debug, Default)]
pub struct WantedBackup {
    /// These volumes.
    pub volumes: Vec<VolumeId>,
    /// Volumes that have a tag of this key, with one value, are backed up at one moment.
    pub group_by: Option<String>,
    /// What stays in the place, of the backups of this store; without it, everything.
    pub keep: Option<Keep>,
    /// Whether somebody says that the root key is kept elsewhere.
    pub root_key_is_kept: bool,
}

/// What came of it.
pub struct BackedUp {
    /// The id by which the place knows the store.
    pub store: Uuid,
    /// Each volume.
    pub volumes: Vec<OneVolume>,
    /// What a restore needs that is not in the place.
    pub needed: Needed,
    /// What was removed from the place, if that was wanted.
    pub removed: Result<Option<Removed>>,
}

/// What came of a volume.
pub struct OneVolume {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: Option<String>,
    /// How many of its tags found no room in its snapshot.
    pub tags_left_out: usize,
    /// Its snapshot, as it lies in the place now.
    pub outcome: Result<Pushed>,
}

/// What a restore needs beside the place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needed {
    /// The KMS keys that wrap data keys.
    pub keys: BTreeSet<KmsKey>,
    /// The embedded KMS, if some data key is wrapped by it.
    pub kms: Option<Uuid>,
    /// Whether there is a data key that only the embedded KMS gives: then nothing comes back without its root
    /// key.
    pub root_key: bool,
    /// When a copy of the root key was made last, as far as this host knows.
    pub root_key_copied: Option<Timestamp>,
}

impl BackedUp {
    /// What kept a volume from being backed up, and then whatever else went wrong.
    pub fn problem(&self) -> Option<Error> {
        let failed = self.volumes.iter().filter_map(|one| one.outcome.as_ref().err().map(|e| (one.id, e)));
        let failed: Vec<_> = failed.collect();
        match failed[..] {
            [] => self.removed.as_ref().err().map(|e| Error::new(e.kind(), e.to_string())),
            [(id, e)] => Some(Error::new(e.kind(), format!("one volume is not backed up: {id}: {e}"))),
            [(id, e), ..] => {
                let n = failed.len();
                Some(Error::new(e.kind(), format!("{n} volumes are not backed up, the first: {id}: {e}")))
            }
        }
    }
}

impl Needed {
    fn of(metadata: &[Metadata]) -> Result<Self> {
        let is_embedded = |key: &KmsKey| key.provider == ProviderName::Embedded.as_str();
        let mut needed = Needed::default();
        for key in metadata.iter().flat_map(Metadata::keys) {
            let by: Vec<KmsKey> = key.slots().iter().map(|slot| slot.kms_key()).collect();
            needed.root_key |= by.iter().all(is_embedded);
            needed.keys.extend(by);
        }
        Ok(needed)
    }

    fn look_for_root_key(&mut self, store: &Store) -> Result<()> {
        if self.keys.iter().any(|key| key.provider == ProviderName::Embedded.as_str()) {
            self.kms = Embedded::store_id_at(store.root());
        }
        if let Some(kms) = self.kms {
            self.root_key_copied = Embedded::root_key_copied(kms)?;
        }
        Ok(())
    }

    /// # Errors
    /// `Usage` if nothing could be restored without the root key, and nobody knows of a copy.
    fn check(&self, root_key_is_kept: bool) -> Result<()> {
        if !self.root_key || root_key_is_kept || self.root_key_copied.is_some() {
            return Ok(());
        }
        let message = "what would be in the place could not be opened without the root key of this store's \
                       KMS, which is not brought there, and of which no copy is known: make one with \
                       \"sealblk kms backup FILE\" and keep it elsewhere, or say --root-key-is-kept if there \
                       is one";
        Err(Error::new(Kind::Usage, message))
    }
}

/// Backs volumes up to a place. `watch` is told of which volume it is about and how far that has come; an
/// error of it ends the backup, which the next one goes on with.
///
/// # Errors
/// `Usage` if the root key is nowhere else, or if nothing would stay of earlier backups; `Busy` if the store
/// is being backed up there already; those of the place. What goes wrong with one volume is in what is
/// returned.
pub fn back_up(
    store: &Store,
    target: &Target,
    wanted: &WantedBackup,
    watch: &mut dyn FnMut(VolumeId, u64, u64) -> Result<()>,
) -> Result<BackedUp> {
    let _passphrase = passphrase::inherited_descriptors().map_err(Error::from)?;
    wanted.keep.as_ref().map_or(Ok(()), Keep::check)?;
    let catalog = store.catalog();
    let loaded: Vec<_> = wanted.volumes.iter().map(|&id| (id, loaded(store, &catalog, id))).collect();
    let good: Vec<Metadata> =
        loaded.iter().filter_map(|(_, metadata)| metadata.as_ref().ok()).cloned().collect();
    let mut needed = Needed::of(&good)?;
    needed.look_for_root_key(store)?;
    needed.check(wanted.root_key_is_kept)?;
    let mut session = Session::open(store, target, For::Pushing)?;
    let (store_id, _lock) = session.marks.store(store.root())?;
    let place = session.id.0;
    let mut backup = Backup {
        store,
        catalog,
        target,
        site: Site { root: store.root().clone(), config: None },
        own: Own { place, store: store_id },
        kms: needed.kms,
        watch,
    };
    let there = session.snapshots()?;
    for volume in good.iter().map(Metadata::id) {
        backup.end_interrupted(volume, &there)?;
    }
    let begun = backup.snapshots(good, wanted.group_by.as_deref());
    if let Some(kms) = needed.kms {
        kms_log::put(store, &mut session, kms)?;
    }
    // Pushes have ways of their own.
    drop(session);
    let mut volumes = Vec::new();
    for (id, metadata) in loaded {
        let (name, begun) = match metadata {
            Ok(metadata) => {
                let begun = begun.get(&id).map(|begun| begun.as_ref().map_err(copy_of));
                let none = || Err(Error::new(Kind::Other, "there is no snapshot of it"));
                (metadata.name().map(ToString::to_string), begun.unwrap_or_else(none))
            }
            Err(e) => (None, Err(e)),
        };
        let tags_left_out = begun.as_ref().map_or(0, |begun| begun.tags_left_out);
        let outcome = match begun {
            Ok(begun) => backup.push(id, begun.snapshot)?,
            Err(e) => Err(e),
        };
        volumes.push(OneVolume { id, name, tags_left_out, outcome });
    }
    let removed = backup.tidy(wanted.keep);
    Ok(BackedUp { store: store_id, volumes, needed, removed })
}

/// The same error once more.
pub(super) fn copy_of(e: &Error) -> Error {
    Error::new(e.kind(), e.to_string())
}

/// The record of a volume that can be pushed.
fn loaded(store: &Store, catalog: &Catalog, id: VolumeId) -> Result<Metadata> {
    let metadata = catalog.load(id)?;
    store.settings().check_encrypted(id, metadata.is_encrypted())?;
    check_can_be_pushed(&metadata)?;
    Ok(metadata)
}

/// # Errors
/// `Unsupported` for a volume of which anything is in the clear.
pub(super) fn check_can_be_pushed(metadata: &Metadata) -> Result<()> {
    let message = match Planes::of(metadata.layout()) {
        Some(_) => return Ok(()),
        None if metadata.is_encrypted() => {
            "a part of it is in the clear, from before it was encrypted, and nothing leaves so: \"sealblk \
             volume show\" says how far that is"
        }
        None => {
            "it is not encrypted, and nothing leaves in the clear; --filter encrypted=true leaves such \
             volumes out of a backup"
        }
    };
    Err(Error::new(Kind::Unsupported, message))
}

/// How a store's own backups are known.
#[derive(Clone, Copy)]
struct Own {
    place: Uuid,
    store: Uuid,
}

/// A snapshot that is to be pushed.
struct Begun {
    snapshot: SnapshotId,
    tags_left_out: usize,
}

struct Backup<'a> {
    store: &'a Store,
    catalog: Catalog,
    target: &'a Target,
    site: Site,
    own: Own,
    kms: Option<Uuid>,
    watch: &'a mut dyn FnMut(VolumeId, u64, u64) -> Result<()>,
}

impl Backup<'_> {
    /// The snapshots that backups of this store to this place have made, of one volume or of all; the newest
    /// first.
    fn own_snapshots(&self, volume: Option<VolumeId>) -> Result<Vec<Snapshot>> {
        let all = self.catalog.snapshots()?.into_iter().filter_map(|entry| entry.snapshot.ok());
        let is_own = |it: &Snapshot| SavedVolume::is_own(it, self.own.place, self.own.store, volume);
        let mut own: Vec<Snapshot> = all.filter(is_own).collect();
        own.sort_by_cached_key(|it| {
            std::cmp::Reverse((it.created(), SavedVolume::moment_of(it.label()), it.id()))
        });
        Ok(own)
    }

    /// Ends what an earlier backup of the volume was interrupted in, so that what it has brought already is
    /// of use.
    fn end_interrupted(&mut self, volume: VolumeId, there: &[SnapshotId]) -> Result<()> {
        let newest = self.own_snapshots(Some(volume))?.into_iter().next();
        let Some(left) = newest.filter(|it| !there.contains(&it.id())) else { return Ok(()) };
        if let Err(e) = self.push(volume, left.id())? {
            log::warn!("{}, which an earlier backup was interrupted in: {e}", left.id());
        }
        Ok(())
    }

    /// Makes a snapshot of each volume, those of a group at one moment.
    fn snapshots(
        &self,
        metadata: Vec<Metadata>,
        group_by: Option<&str>,
    ) -> BTreeMap<VolumeId, Result<Begun>> {
        let mut groups: BTreeMap<String, Vec<Metadata>> = BTreeMap::new();
        let mut alone = Vec::new();
        for metadata in metadata {
            let tags = self.catalog.tags(metadata.id()).unwrap_or_default();
            match group_by.and_then(|key| tags.get(key)) {
                Some(value) => groups.entry(value.to_owned()).or_default().push(metadata),
                None => alone.push(vec![metadata]),
            }
        }
        let mut begun = BTreeMap::new();
        for group in groups.into_values().chain(alone) {
            match self.moment(&group) {
                Ok(made) => begun.extend(made.into_iter().map(|(id, it)| (id, Ok(it)))),
                Err(e) => begun.extend(group.iter().map(|it| (it.id(), Err(copy_of(&e))))),
            }
        }
        begun
    }

    fn moment(&self, group: &[Metadata]) -> Result<Vec<(VolumeId, Begun)>> {
        let moment = Uuid::now_v7();
        let (mut labelled, mut left_out) = (Vec::new(), Vec::new());
        for metadata in group {
            let id = metadata.id();
            let saved = SavedVolume {
                place: self.own.place,
                store: self.own.store,
                moment,
                of_moment: group.len(),
                name: metadata.name().map(ToString::to_string),
                attach: self.catalog.attach_settings(id)?,
                kms: self.kms,
                sent: None,
            };
            let (label, left) = saved.label(&self.catalog.tags(id)?)?;
            if left > 0 {
                log::warn!("{id} has more tags than its snapshot has room for: {left} are left out");
            }
            labelled.push((id, label));
            left_out.push(left);
        }
        let made = snapshot::create(self.store, &labelled)?;
        let begun = made.iter().zip(left_out).map(|(made, tags_left_out)| {
            (made.snapshot.volume(), Begun { snapshot: made.snapshot.id(), tags_left_out })
        });
        Ok(begun.collect())
    }

    /// Pushes a snapshot; the outer error is that of whoever watches.
    fn push(&mut self, volume: VolumeId, snapshot: SnapshotId) -> Result<Result<Pushed>> {
        (self.watch)(volume, 0, 0)?;
        let mut interrupted = None;
        let mut watch =
            |done, total| (self.watch)(volume, done, total).inspect_err(|e| interrupted = Some(copy_of(e)));
        let pushed = self.site.push(snapshot, self.target, &mut watch);
        match interrupted {
            Some(e) => Err(e),
            None => Ok(pushed),
        }
    }

    /// Deletes what no later backup needs, here and, by `keep`, in the place.
    fn tidy(&self, keep: Option<Keep>) -> Result<Option<Removed>> {
        let mut session = Session::open(self.store, self.target, For::Reading)?;
        let there = session.snapshots()?;
        drop(session);
        let mut layers: Vec<LayerId> = Vec::new();
        for id in self.not_needed(&there)? {
            layers.extend(delete::delete_snapshot(&self.catalog, id)?);
        }
        if !layers.is_empty() {
            space::give_back(self.store, Some(&layers), 0, &mut |_, _, _| Ok(()))?;
        }
        let Some(keep) = keep else { return Ok(None) };
        let what = What { keep: Some(keep), store: Some(self.own.store), ..What::default() };
        remove::remove(self.store, self.target, &what).map(Some)
    }

    /// Of each volume the newest snapshot that is `there` stays, and the newest of all, which may not be
    /// there yet. Of a volume that is gone, only what is not there.
    fn not_needed(&self, there: &[SnapshotId]) -> Result<Vec<SnapshotId>> {
        let mut of_volumes: BTreeMap<VolumeId, Vec<SnapshotId>> = BTreeMap::new();
        for own in self.own_snapshots(None)? {
            of_volumes.entry(own.volume()).or_default().push(own.id());
        }
        let volumes: BTreeSet<VolumeId> = self.catalog.ids()?.into_iter().collect();
        let mut goes = Vec::new();
        for (volume, own) in of_volumes {
            let newest_there = own.iter().find(|id| there.contains(id)).copied();
            let stays = |n: usize, id: &SnapshotId| match volumes.contains(&volume) {
                true => n == 0 || Some(*id) == newest_there,
                false => !there.contains(id),
            };
            goes.extend(own.iter().enumerate().filter(|(n, id)| !stays(*n, id)).map(|(_, id)| *id));
        }
        Ok(goes)
    }
}

/// Whether one of a data key's slots is of the embedded KMS.
pub(super) fn is_by_embedded(key: &KeyRecord) -> bool {
    key.slots().iter().any(|slot| slot.provider == ProviderName::Embedded.as_str())
}
