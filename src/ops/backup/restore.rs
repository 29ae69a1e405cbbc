//! Volumes come back out of the backups that a place has: of each the newest one, pulled, and made a volume
//! again with its name, its tags and what is kept with it.
//!
//! Volumes of which a backup was made at one moment come back as of one moment: of a volume that one is taken
//! whose moment is whole in the place. What the manifests say is proved when they are pulled; before, it only
//! serves to choose by.

use super::all::{copy_of, is_by_embedded};
use super::drill::Scratch;
use super::pull::Ahead;
use super::step::{Made, Site, Step};
use super::{For, Session, Target};
use crate::backup::saved::{RESTORED, SavedVolume};
use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::lock::{Holder, Purpose, VolumeLock};
use crate::catalog::metadata::VolumeName;
use crate::catalog::{Catalog, Snapshot, SnapshotId, VolumeId};
use crate::image::lock::Access;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::root_key::passphrase;
use crate::ops::create::{self, NewVolume};
use crate::ops::need::Budget;
use crate::ops::{Store, delete, modify};
use crate::volume::open::Opening;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use uuid::Uuid;

/// What is to be restored, and how.
#[derive(Clone, Debug, Default)]
pub struct WantedRestore {
    /// Of the backups of this store, by the id that the place knows it by; without one, the only store there.
    pub store: Option<Uuid>,
    /// Only volumes that had one of these names or ids; without any, all.
    pub volumes: Vec<String>,
    /// As they were then, or before.
    pub at: Option<Timestamp>,
    /// The KMS key that wraps their data keys from now on.
    pub key: Option<String>,
    /// A copy of the root key of the embedded KMS that was backed up.
    pub root_key: Option<Vec<u8>>,
    /// What may be used of the file system.
    pub budget: Budget,
    /// Whether it is only tried: in a store that is made for that, and removed.
    pub drill: bool,
}

/// What came of it.
pub struct Restored {
    /// The id by which the place knows the store that was backed up.
    pub store: Uuid,
    /// Each volume.
    pub volumes: Vec<OneRestored>,
}

/// What came of a volume.
pub struct OneRestored {
    /// What it was made of.
    pub chosen: Chosen,
    /// The volume; in a drill, as it was before it was deleted again.
    pub outcome: Result<Made>,
}

/// The backup of a volume that is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The snapshot in the place.
    pub snapshot: SnapshotId,
    /// The volume, as it was called where it was backed up.
    pub volume: VolumeId,
    /// Its name.
    pub name: Option<String>,
    /// Of when it is.
    pub created: Timestamp,
    /// How many backups of the volume are newer, and are not taken since another volume of the same moment is
    /// not there.
    pub passed_over: usize,
    /// Whether the place has no backup of it whose moment is whole.
    pub is_torn: bool,
    /// The embedded KMS that some data key of it is wrapped by.
    pub kms: Option<Uuid>,
}

impl Restored {
    /// What kept a volume from coming back.
    pub fn problem(&self) -> Option<Error> {
        let failed = self.volumes.iter().filter_map(|one| one.outcome.as_ref().err().map(|e| (one, e)));
        let failed: Vec<_> = failed.collect();
        let (first, e) = failed.first()?;
        let what = match failed.len() {
            1 => "one volume does not come back".to_owned(),
            n => format!("{n} volumes do not come back, the first"),
        };
        Some(Error::new(e.kind(), format!("{what}: {}: {e}", first.chosen.shown())))
    }
}

impl Chosen {
    /// Its name, or the id that it had.
    pub fn shown(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.volume.to_string())
    }
}

/// Brings the volumes of a backup back. `watch` is told of which one it is about and how far that has come;
/// an error of it ends the restore, which the next one goes on with.
///
/// # Errors
/// `NotFound` if the place has no such backup; `Usage` if it has those of several stores; those of the place,
/// and of the KMS that has to be put back. What goes wrong with one volume is in what is returned.
pub fn restore(
    store: &Store,
    target: &Target,
    wanted: &WantedRestore,
    watch: &mut dyn FnMut(&Chosen, u64, u64) -> Result<()>,
) -> Result<Restored> {
    let _passphrase = passphrase::inherited_descriptors().map_err(Error::from)?;
    let mut session = Session::open(store, target, For::Reading)?;
    let (of, chosen) = choose(&mut session, wanted)?;
    drop(session);
    let kms = chosen.iter().find_map(|it| it.kms);
    let scratch = wanted.drill.then(|| Scratch::make(store, kms, wanted.root_key.is_some())).transpose()?;
    let site = match &scratch {
        Some(scratch) => scratch.site(),
        None => Site { root: store.root().clone(), config: None },
    };
    let known = if scratch.is_some() { None } else { Embedded::store_id_at(store.root()) };
    if let (Some(kms), None) = (kms, known) {
        site.run(&Step::Kms(kms, target.clone(), wanted.root_key.clone()), &mut |_, _| Ok(()))?;
    }
    let mut volumes = Vec::new();
    for chosen in chosen {
        watch(&chosen, 0, 0)?;
        let mut interrupted = None;
        let mut told =
            |done, total| watch(&chosen, done, total).inspect_err(|e| interrupted = Some(copy_of(e)));
        let one = One { store, site: &site, target, wanted };
        let outcome = one.bring(&chosen, &mut told);
        match interrupted {
            Some(e) => return Err(e),
            None => volumes.push(OneRestored { chosen, outcome }),
        }
    }
    Ok(Restored { store: of, volumes })
}

/// A backup, as its manifest says.
struct Found {
    id: SnapshotId,
    volume: VolumeId,
    created: Timestamp,
    saved: SavedVolume,
    kms: Option<Uuid>,
}

/// Which store, and of each volume which backup.
fn choose(session: &mut Session, wanted: &WantedRestore) -> Result<(Uuid, Vec<Chosen>)> {
    let mut found = Vec::new();
    for id in session.snapshots()? {
        let claim = match session.claim_of_known(id) {
            Ok(claim) => claim,
            Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::NotFound) => {
                log::warn!("passed over: {e}");
                continue;
            }
            Err(e) => return Err(e),
        };
        let snapshot = &claim.claimed().snapshot;
        let Some(saved) = SavedVolume::of_backup(snapshot.label()) else { continue };
        let (volume, created) = (snapshot.volume(), snapshot.created());
        let kms = saved.kms.filter(|_| snapshot.keys().iter().any(is_by_embedded));
        found.push(Found { id, volume, created, saved, kms });
    }
    let url = session.url.to_string();
    let of = store_of(&found, wanted, &url)?;
    found.retain(|it| it.saved.store == of && wanted.at.is_none_or(|at| it.created <= at));
    let mut members: HashMap<Uuid, usize> = HashMap::new();
    found.iter().for_each(|it| *members.entry(it.saved.moment).or_default() += 1);
    found.sort_by_key(|it| std::cmp::Reverse((it.created, it.saved.moment, it.id)));
    let mut of_volumes: BTreeMap<VolumeId, Vec<&Found>> = BTreeMap::new();
    found.iter().for_each(|it| of_volumes.entry(it.volume).or_default().push(it));
    let is_whole = |it: &&&Found| members.get(&it.saved.moment).is_some_and(|n| *n >= it.saved.of_moment);
    let mut chosen = Vec::new();
    for backups in of_volumes.values() {
        let whole = backups.iter().enumerate().find(|(_, it)| is_whole(it));
        let newest = backups.first().map(|it| (0, it));
        let Some((n, it)) = whole.or(newest) else { continue };
        let is_meant = |text: &String| it.saved.name.as_ref() == Some(text) || it.volume.to_string() == *text;
        if wanted.volumes.is_empty() || wanted.volumes.iter().any(is_meant) {
            chosen.push(Chosen {
                snapshot: it.id,
                volume: it.volume,
                name: it.saved.name.clone(),
                created: it.created,
                passed_over: n,
                is_torn: whole.is_none(),
                kms: it.kms,
            });
        }
    }
    let is_there = |text: &&String| {
        chosen.iter().any(|it| it.name.as_ref() == Some(*text) || it.volume.to_string() == **text)
    };
    if let Some(text) = wanted.volumes.iter().find(|text| !is_there(text)) {
        return Err(Error::new(Kind::NotFound, format!("{url} has no backup of a volume {text:?}")));
    }
    match chosen.is_empty() {
        false => Ok((of, chosen)),
        true => Err(Error::new(Kind::NotFound, format!("{url} has no backup that is so old"))),
    }
}

/// Whose backups are meant.
fn store_of(found: &[Found], wanted: &WantedRestore, url: &str) -> Result<Uuid> {
    let stores: BTreeSet<Uuid> = found.iter().map(|it| it.saved.store).collect();
    let all = || stores.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match (wanted.store, stores.first()) {
        (_, None) => {
            let message = format!(
                "{url} has no backup that \"sealblk backup\" has made; \"sealblk snapshot list {url}\" shows \
                 what it has"
            );
            Err(Error::new(Kind::NotFound, message))
        }
        (Some(store), _) if stores.contains(&store) => Ok(store),
        (Some(store), _) => {
            let message = format!("{url} has no backup of the store {store}; it has those of {}", all());
            Err(Error::new(Kind::NotFound, message))
        }
        (None, Some(only)) if stores.len() == 1 => Ok(*only),
        (None, _) => {
            let message = format!("{url} has backups of several stores; say --store, of {}", all());
            Err(Error::new(Kind::Usage, message))
        }
    }
}

/// How a volume comes back.
struct One<'a> {
    store: &'a Store,
    site: &'a Site,
    target: &'a Target,
    wanted: &'a WantedRestore,
}

impl One<'_> {
    fn bring(&self, chosen: &Chosen, watch: crate::disk::transfer::Watch<'_>) -> Result<Made> {
        let catalog = self.store.catalog();
        let mark = chosen.snapshot.to_string();
        let mut pulled = None;
        if !self.wanted.drill {
            pulled = pulled_before(&catalog, &mark)?;
            match made_before(&catalog, &mark)? {
                // With what was pulled for it, what is left to do goes on.
                Some(made) if pulled.is_none() => return Ok(made),
                Some(_) => {}
                None => check_name(&catalog, chosen.name.as_deref())?,
            }
        }
        let pulled = match pulled {
            Some(id) => id,
            None => {
                let (key, budget) = (self.wanted.key.clone(), self.wanted.budget);
                self.site.pull_to_restore(chosen.snapshot, self.target, key, budget, Ahead::No, watch)?
            }
        };
        let made = self.site.make(pulled, watch)?;
        if self.wanted.drill {
            self.site.run(&Step::Try(made.volume), watch)?;
        }
        Ok(made)
    }
}

/// # Errors
/// `Busy` if a volume has the name that one is going to get.
pub(super) fn check_name(catalog: &Catalog, name: Option<&str>) -> Result<()> {
    let name = name.and_then(|name| name.parse::<VolumeName>().ok());
    match name.map_or(Ok(None), |name| catalog.claimant(&name, None))? {
        None => Ok(()),
        Some(id) => {
            let message = format!("{id} has its name already; rename or delete that one");
            Err(Error::new(Kind::Busy, message))
        }
    }
}

/// The volume that an earlier restore has made of this snapshot in the place.
pub(super) fn made_before(catalog: &Catalog, mark: &str) -> Result<Option<Made>> {
    for metadata in catalog.list()?.into_iter().filter_map(|entry| entry.metadata.ok()) {
        if catalog.tags(metadata.id())?.get(RESTORED) == Some(mark) {
            return Ok(Some(Made { volume: metadata.id(), size: metadata.size(), was_there: true }));
        }
    }
    Ok(None)
}

/// As [`made_before`], of a volume that has the layers of what was pulled for it. The id of a snapshot in a
/// place is what somebody says who has that snapshot's keys: he can name one that another volume is of.
pub(super) fn made_of(catalog: &Catalog, pulled: &Snapshot, mark: &str) -> Result<Option<Made>> {
    let layers = pulled.layers();
    for metadata in catalog.list()?.into_iter().filter_map(|entry| entry.metadata.ok()) {
        let below = metadata.layers().iter().rev().zip(layers.iter().rev());
        let has_them =
            metadata.layers().len() > layers.len() && below.into_iter().all(|(own, it)| own.id == it.id);
        if has_them && catalog.tags(metadata.id())?.get(RESTORED) == Some(mark) {
            return Ok(Some(Made { volume: metadata.id(), size: metadata.size(), was_there: true }));
        }
    }
    Ok(None)
}

/// What an earlier restore has pulled of this snapshot in the place, and was interrupted after.
pub(super) fn pulled_before(catalog: &Catalog, mark: &str) -> Result<Option<SnapshotId>> {
    let all = catalog.snapshots()?.into_iter().filter_map(|entry| entry.snapshot.ok());
    let is_it = |it: &Snapshot| {
        it.label().tags.get(RESTORED) == Some(mark) && it.copy_of().is_some_and(|id| id.to_string() == mark)
    };
    Ok(all.filter(is_it).map(|it| it.id()).next())
}

/// Makes the volume again that a snapshot is of which was pulled for that, and deletes the snapshot; or goes
/// on where an earlier one was interrupted.
///
/// # Errors
/// Those of making a volume; `Usage` for a snapshot that no backup has made.
pub(super) fn make(store: &Store, id: SnapshotId) -> Result<Made> {
    let catalog = store.catalog();
    let snapshot = catalog.load_snapshot(id)?;
    let saved = SavedVolume::of(snapshot.label())
        .ok_or_else(|| Error::new(Kind::Usage, format!("{id} does not say what volume it was")))?;
    let mut tags = SavedVolume::tags(snapshot.label())?;
    if let Some(mark) = snapshot.label().tags.get(RESTORED) {
        tags.set(RESTORED, mark)?;
    }
    let mark = snapshot.label().tags.get(RESTORED);
    let before = mark.map_or(Ok(None), |mark| made_of(&catalog, &snapshot, mark))?;
    let made = match before {
        // Whoever made it was interrupted in what follows.
        Some(made) => made,
        None => {
            let name = saved.name.map(|name| name.parse::<VolumeName>()).transpose();
            let name = name.map_err(|problem| Error::new(Kind::Corrupt, problem))?;
            let new = NewVolume { name, tags, ..NewVolume::default() };
            let made = create::create(store, &new, Some(&snapshot))?;
            Made { volume: made.id(), size: made.size(), was_there: false }
        }
    };
    if !saved.attach.is_empty() && catalog.attach_settings(made.volume)?.is_empty() {
        modify::modify(store, made.volume, |settings| {
            *settings = saved.attach;
            Ok(())
        })?;
    }
    // What the volume needs of it stays.
    delete::delete_snapshot(&catalog, id)?;
    Ok(made)
}

/// Opens a volume as an attach does, its data keys unwrapped and its layers proved, and deletes it.
///
/// # Errors
/// What an attach would say.
pub(super) fn open_and_delete(store: &Store, id: VolumeId) -> Result<()> {
    let catalog = store.catalog();
    let holder = Holder::this_process(Purpose::Export, None)?;
    let lock = VolumeLock::acquire(&catalog.folder(id), id, &holder)?;
    let taken = store.open_as(lock, Opening::Read, Access::Read).map_err(|failure| failure.error)?;
    drop(taken);
    delete::delete(&catalog, &store.events(), id).map(drop)
}
