//! The volumes of a store: which there are, which one a user means, and their metadata on disk.
//!
//! A volume is a folder `volumes/<id>/` that holds a `volume.json`. A folder without one is a volume that is
//! being made or deleted, or whose making or deleting was cut off (`ops::delete` clears those away).

pub mod attach_settings;
pub(crate) mod chains;
pub mod coming;
pub mod device;
pub mod freeze;
pub mod grow;
pub mod id;
pub mod layer_file;
pub mod layout;
pub mod leaving;
pub mod ledger;
pub mod lock;
pub mod metadata;
pub mod pending;
pub mod references;
pub mod rekey;
pub mod rewrap;
pub mod seal;
pub mod slots;
pub mod snapshot;
pub(crate) mod store_locks;
pub mod tags;

pub use id::{LayerId, SnapshotId, VolumeId};
pub use metadata::Metadata;
pub use pending::OwnLayer;
pub use seal::Seal;
pub use snapshot::Snapshot;

use crate::base::root::{Root, files, replace_file};
use crate::base::{Context, Error, Kind, Result};
use id::is_lower_hex;
use ledger::{Doubt, Facts, Ledger, SnapshotFacts, VolumeFacts};
use lock::{Held, VolumeLock};
use metadata::{LayerRecord, MAX_FILE_LEN, VolumeName};
use pending::Pending;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// Digits of an id that no name is like by chance.
const DIGITS_BEYOND_CHANCE: usize = 6;

/// The metadata's file name in a volume's folder.
pub const FILE: &str = "volume.json";
/// The metadata's name until a volume is there.
pub(crate) const CREATING: &str = "creating.json";
/// The metadata's name once a volume is not there any more.
pub(crate) const DELETING: &str = "deleting.json";

/// The volumes of one store. Holds nothing but paths: every question is asked of the disk.
#[derive(Clone, Debug)]
pub struct Catalog {
    root: Root,
    /// What records are held against; none for a process that is confined, and does not reach it.
    ledger: Option<Ledger>,
}

/// One volume, as a list shows it.
#[derive(Debug)]
pub struct Entry {
    /// Its id, which its folder's name tells.
    pub id: VolumeId,
    /// What is known of it, or why that cannot be read or is not believed.
    pub metadata: Result<Metadata>,
}

/// What a volume's record says, whoever wrote it.
type Claim = (VolumeId, Result<Metadata>);

impl Catalog {
    /// The volumes of the store at `root`, which need not exist yet. What records say is taken as it is: this
    /// is for a process that is confined, and for one that looks at claims.
    pub fn new(root: &Root) -> Self {
        Catalog { root: root.clone(), ledger: None }
    }

    /// The volumes of the store at `root`, for a command: records are held against the store's ledger, and
    /// changes are entered there.
    pub fn with_ledger(root: &Root) -> Self {
        Catalog { root: root.clone(), ledger: Some(Ledger::of(root)) }
    }

    /// These volumes for a process that is confined, and does not reach the ledger.
    pub fn without_ledger(&self) -> Self {
        Catalog::new(&self.root)
    }

    /// The store's root folder.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// A volume's folder.
    pub fn folder(&self, id: VolumeId) -> PathBuf {
        self.root.volumes().join(id.to_string())
    }

    /// A layer's file. Of a layer on a device there is none: see [`Catalog::place`]. Of one that is still
    /// [coming] it has another name.
    pub fn layer_path(&self, layer: LayerId) -> PathBuf {
        self.root.layers().join(format!("{layer}.img"))
    }

    /// Every volume's id, sorted.
    pub fn ids(&self) -> Result<Vec<VolumeId>> {
        let mut ids = self.folders()?;
        ids.retain(|&id| files::exists(&self.folder(id).join(FILE)));
        Ok(ids)
    }

    /// The id of every folder that is named like a volume, sorted, whether it holds one or not.
    pub(crate) fn folders(&self) -> Result<Vec<VolumeId>> {
        let volumes = self.root.volumes();
        let mut ids = Vec::new();
        for name in files::names_if_there(&volumes)? {
            ids.extend(name.to_str().and_then(|name| name.parse::<VolumeId>().ok()));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Every volume, sorted by id; a damaged one does not hide the others.
    pub fn list(&self) -> Result<Vec<Entry>> {
        let entry = |(id, claim): Claim| Entry { id, metadata: claim.and_then(|it| self.believe(id, it)) };
        let gone = |e: &Entry| matches!(&e.metadata, Err(err) if err.kind() == Kind::NotFound);
        Ok(self.claims()?.into_iter().map(entry).filter(|e| !gone(e)).collect())
    }

    /// What the record of every volume says, believed or not; sorted by id.
    fn claims(&self) -> Result<Vec<Claim>> {
        let claim = |id| (id, self.load_claim(id));
        let gone = |(_, claim): &Claim| claim.as_ref().is_err_and(|e| e.kind() == Kind::NotFound);
        Ok(self.ids()?.into_iter().map(claim).filter(|it| !gone(it)).collect())
    }

    /// Some volume whose record claims this name, believed or not, other than `except`.
    pub(crate) fn claimant(&self, name: &VolumeName, except: Option<VolumeId>) -> Result<Option<VolumeId>> {
        let claims = |(id, claim): &Claim| {
            Some(*id) != except && claim.as_ref().is_ok_and(|it| it.name() == Some(name))
        };
        Ok(self.claims()?.into_iter().find(claims).map(|(id, _)| id))
    }

    /// Which volume `reference` means: a whole id, a name, or an id's first digits, with `vol-` or without.
    ///
    /// # Errors
    /// `NotFound`; `Usage` with the candidates if several ids begin so, or if several volumes have that name:
    /// a host process writes its volume's name, and could have taken another volume's.
    pub fn resolve(&self, reference: &str) -> Result<VolumeId> {
        let whole = reference.parse::<VolumeId>().ok();
        if let Some(id) = whole.filter(|&id| files::exists(&self.folder(id).join(FILE))) {
            return Ok(id);
        }
        let digits = reference.strip_prefix(VolumeId::PREFIX).unwrap_or(reference);
        let is_prefix = !digits.is_empty() && is_lower_hex(digits);
        let begins = |id: VolumeId| is_prefix && id.to_string()[VolumeId::PREFIX.len()..].starts_with(digits);
        // Of thousands, the ledger is asked about those alone that can be meant.
        let claims = self.claims()?;
        let is_claimed = |claim: &Result<Metadata>| {
            claim.as_ref().is_ok_and(|it| it.name().is_some_and(|name| name.as_str() == reference))
        };
        let possible = claims.iter().filter(|(id, claim)| begins(*id) || is_claimed(claim));
        let possible: Vec<Entry> = possible.map(|&(id, _)| Entry { id, metadata: self.load(id) }).collect();
        let is_named = |e: &Entry| e.name() == Some(reference);
        // A name comes before a prefix: whether an id begins like it is chance. With so many digits it is
        // none: a host process could have given its volume the name by which another one is meant.
        let is_chance = digits.len() < DIGITS_BEYOND_CHANCE;
        let only_named = is_chance && possible.iter().any(is_named);
        let is_meant = |e: &&Entry| is_named(e) || (!only_named && begins(e.id));
        match possible.iter().filter(is_meant).collect::<Vec<_>>()[..] {
            [] => {
                // The one that was meant, perhaps, and what is wrong with it.
                possible.into_iter().find_map(|e| e.metadata.err()).map_or(Ok(()), Err)?;
                Err(self.no_such(reference, &claims))
            }
            [entry] => Ok(entry.id),
            ref several => Err(ambiguous(reference, several)),
        }
    }

    fn no_such(&self, reference: &str, claims: &[Claim]) -> Error {
        let mut message = format!("there is no volume {reference:?} in {}", self.root.shown());
        match claims.iter().filter(|(_, claim)| claim.is_err()).count() {
            0 => message.push_str("; \"sealblk volume list\" shows which there are"),
            n => message.push_str(&format!("; {n} of its volumes cannot be read, whose names are unknown")),
        }
        Error::new(Kind::NotFound, message)
    }

    /// Reads a volume's metadata.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a damaged, foreign or newer file, which the message names, and for one that
    /// says something else than the store's ledger.
    pub fn load(&self, id: VolumeId) -> Result<Metadata> {
        self.believe(id, self.load_claim(id)?)
    }

    /// The metadata of which `claim` was read just now.
    ///
    /// # Errors
    /// As for [`Catalog::load`].
    fn believe(&self, id: VolumeId, claim: Metadata) -> Result<Metadata> {
        let (metadata, doubt) = self.judged(&id, claim, || self.load_claim(id), VolumeFacts::of)?;
        doubt.map_or(Ok(metadata), |doubt| Err(doubt.refuse(&id)))
    }

    /// Why a volume's record is not believed; none: it is.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a record that cannot be read; those of the file system.
    pub(crate) fn doubt(&self, id: VolumeId) -> Result<Option<Doubt>> {
        let (_, doubt) = self.judged(&id, self.load_claim(id)?, || self.load_claim(id), VolumeFacts::of)?;
        if doubt.is_some() {
            return Ok(doubt);
        }
        let of_settings = |doubt| Doubt::Differs(format!("the settings that are kept with it: {doubt}"));
        Ok(self.kept(id)?.err().map(of_settings))
    }

    /// What `read` returns of `id`, which was `claim` just now, and why that is not believed; none: it is, or
    /// this process has no ledger.
    fn judged<T: PartialEq, F: Facts>(
        &self,
        id: &dyn Display,
        mut claim: T,
        read: impl Fn() -> Result<T>,
        facts: impl Fn(&T) -> F,
    ) -> Result<(T, Option<Doubt>)> {
        let Some(ledger) = &self.ledger else { return Ok((claim, None)) };
        let id = id.to_string();
        loop {
            let Some(doubt) = ledger.judge(&id, &facts(&claim))? else { return Ok((claim, None)) };
            // A command may have replaced the record, and then the entry, in between.
            let now = read()?;
            if now == claim {
                return Ok((claim, Some(doubt)));
            }
            claim = now;
        }
    }

    /// Reads a volume's metadata as it stands there, whoever wrote it.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a damaged, foreign or newer file, which the message names.
    pub(crate) fn load_claim(&self, id: VolumeId) -> Result<Metadata> {
        let path = self.folder(id).join(FILE);
        match self.read_record(&path, id) {
            Err(e) if e.kind() == Kind::NotFound => {
                Err(Error::new(Kind::NotFound, format!("there is no volume {id}: no {}", path.display())))
            }
            result => result,
        }
    }

    /// Reads metadata of `id` from `path`, under whatever name it lies there.
    pub(crate) fn read_record(&self, path: &Path, id: VolumeId) -> Result<Metadata> {
        let attempt = || format!("read {}", path.display());
        let bytes = read_bounded(path).context(attempt)?;
        let metadata = Metadata::from_json(&bytes).context(attempt)?;
        if metadata.id() != id {
            let message = format!("it describes {}, not {id}; put back the right file", metadata.id());
            return Err(Error::new(Kind::Corrupt, message).context(attempt()));
        }
        Ok(metadata)
    }

    /// Writes a volume's metadata, as the next generation: after a power cut the file is the old one or this.
    /// Whoever writes has the volume, so that no two do.
    ///
    /// # Errors
    /// `Corrupt` if the generation cannot be counted on; otherwise as [`replace_file`]. `metadata` is then as
    /// it was.
    pub fn save(&self, lock: &VolumeLock, metadata: &mut Metadata) -> Result<()> {
        assert_eq!(lock.volume(), metadata.id(), "the lock is another volume's");
        let folder = self.folder(metadata.id());
        remove_temporary_files(&folder)?;
        let next = metadata.next_generation()?;
        let replace = || replace_file(&folder.join(FILE), &next.to_json());
        self.replaced(&next.id(), || VolumeFacts::of(&next), replace)?;
        self.copy_to_devices(&next);
        *metadata = next;
        Ok(())
    }

    /// Has `replace` give the record of `id` a state with these `facts`: entered before,
    /// and alone afterwards.
    fn replaced<F: Facts>(
        &self,
        id: &dyn Display,
        facts: impl Fn() -> F,
        replace: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(ledger) = &self.ledger else { return replace() };
        let mut change = ledger.change(&id.to_string())?;
        change.expect(facts())?;
        replace()?;
        settled(change.settle(facts()));
        Ok(())
    }

    /// Enters what the host process of an attached volume is about to make of its record: `change` says
    /// what becomes of what is there. Returns what [`Expected::settle`] is to be called on when the
    /// host process has done so.
    ///
    /// # Errors
    /// As [`Catalog::load`]; `Busy` if another command is changing the volume for long.
    pub fn expect(&self, id: VolumeId, change: impl Fn(&Metadata) -> Metadata) -> Result<Expected<'_>> {
        let Some(ledger) = &self.ledger else { return Ok(Expected { catalog: self, id, change: None }) };
        let mut entry = ledger.change(&id.to_string())?;
        let now = self.load(id)?;
        entry.expect(VolumeFacts::of(&change(&now)))?;
        // Its host process may have finished a hydration by then.
        let hydrated = Metadata { layout: now.layout().hydrated(), ..now };
        entry.expect(VolumeFacts::of(&change(&hydrated)))?;
        Ok(Expected { catalog: self, id, change: Some(entry) })
    }

    /// Enters what a volume's record says, which was believed: what it was before is not accepted any more.
    pub(crate) fn settle(&self, metadata: &Metadata) {
        let Some(ledger) = &self.ledger else { return };
        let change = ledger.change(&metadata.id().to_string());
        settled(change.and_then(|mut change| change.settle(VolumeFacts::of(metadata))));
    }

    /// Enters a volume that is going to be made.
    pub(crate) fn enter(&self, metadata: &Metadata) -> Result<()> {
        let Some(ledger) = &self.ledger else { return Ok(()) };
        self.begin_ledger(ledger)?;
        ledger.enter(&metadata.id().to_string(), VolumeFacts::of(metadata))
    }

    /// In a store without any record, the ledger begins with the first one.
    fn begin_ledger(&self, ledger: &Ledger) -> Result<()> {
        let is_new = || Ok::<_, Error>(self.ids()?.is_empty() && self.snapshot_ids()?.is_empty());
        // In a pool, another host may have begun it: then the key is looked at.
        let knows = ledger.knows_the_store()?;
        if knows && self.root.pool().is_some() || !knows && is_new()? {
            ledger.begin()?;
        }
        Ok(())
    }

    /// Accepts a volume's record as it is, whatever the ledger says.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a record that cannot be read; those of the file system.
    pub(crate) fn accept(&self, id: VolumeId) -> Result<()> {
        let facts = VolumeFacts::of(&self.load_claim(id)?);
        self.ledger.as_ref().map_or(Ok(()), |ledger| ledger.accept(&id.to_string(), facts))?;
        self.accept_attach_settings(id)
    }

    /// Accepts a snapshot's record as it is, whatever the ledger says.
    ///
    /// # Errors
    /// As [`Catalog::accept`].
    pub(crate) fn accept_snapshot(&self, id: SnapshotId) -> Result<()> {
        let facts = SnapshotFacts::of(&self.load_snapshot_claim(id)?);
        self.ledger.as_ref().map_or(Ok(()), |ledger| ledger.accept(&id.to_string(), facts))
    }

    /// The ids for which there is an entry and no record, in no order. Whoever makes a record enters it
    /// first, so the caller has the store locked.
    pub(crate) fn entries_of_nothing(&self, _store: &store_locks::RecordsLock) -> Result<Vec<String>> {
        let Some(ledger) = &self.ledger else { return Ok(Vec::new()) };
        let is_volume = |entry: &str| {
            let id = entry.parse().ok().or_else(|| attach_settings::owner_of_entry(entry));
            id.is_some_and(|id| files::exists(&self.folder(id)))
        };
        let is_snapshot =
            |id: &str| id.parse::<SnapshotId>().is_ok_and(|id| self.snapshot_is_there_or_begun(id));
        let ids = ledger.ids()?.into_iter();
        Ok(ids.filter(|id| !is_volume(id) && !is_snapshot(id)).collect())
    }

    /// Every layer that the ledger lets a volume's record name; none if this process has no ledger, or if
    /// that has no entry that is believed.
    pub(crate) fn layers_in_ledger(&self, id: VolumeId) -> Result<Option<Vec<LayerId>>> {
        let Some(ledger) = &self.ledger else { return Ok(None) };
        let states = ledger.accepted::<VolumeFacts>(&id.to_string())?;
        Ok(states.map(|states| states.iter().flat_map(VolumeFacts::layers).collect()))
    }

    /// As [`Catalog::layers_in_ledger`], of a snapshot, or of a copy in the making. Entries of earlier
    /// versions do not say it.
    pub(crate) fn snapshot_layers_in_ledger(&self, id: SnapshotId) -> Result<Option<Vec<LayerId>>> {
        let Some(ledger) = &self.ledger else { return Ok(None) };
        let states = ledger.accepted::<SnapshotFacts>(&id.to_string())?;
        let layers =
            states.map(|states| states.iter().map(SnapshotFacts::layers).collect::<Option<Vec<_>>>());
        Ok(layers.flatten().map(|layers| layers.concat()))
    }

    /// Takes the entry of a volume or snapshot out that is not there any more.
    pub(crate) fn forget_entry(&self, id: &dyn Display) -> Result<()> {
        self.ledger.as_ref().map_or(Ok(()), |ledger| ledger.forget(&id.to_string()))
    }

    /// Takes everything of a volume out of the ledger, which is not there any more.
    pub(crate) fn forget_volume(&self, id: VolumeId) -> Result<()> {
        self.forget_entry(&attach_settings::entry_of(id))?;
        self.forget_entry(&id)
    }

    /// Who has a volume.
    pub fn held(&self, id: VolumeId) -> Result<Held> {
        lock::query(&self.folder(id))
    }

    /// Looks whether the volume's layers are there and as long as they shall be.
    ///
    /// # Errors
    /// `Corrupt`, naming the first layer that is missing or has another length.
    pub fn check_layers(&self, metadata: &Metadata) -> Result<()> {
        self.check_files(&metadata.id(), metadata.layers()).or_else(|problem| {
            // While a volume is made larger, and until somebody takes it after a crash in
            // between, its top is longer.
            let Ok(Some(Pending::Resize(size))) = Pending::load(self, metadata.id()) else {
                return Err(problem);
            };
            let mut layers = metadata.layers().to_vec();
            layers[0].size = size;
            self.check_files(&metadata.id(), &layers).map_err(|_| problem)
        })
    }

    pub(crate) fn check_files(&self, whose: &dyn Display, layers: &[LayerRecord]) -> Result<()> {
        for layer in layers {
            if self.on_device(layer.id)?.is_some() {
                self.check_device(layer).map_err(|e| e.context(whose))?;
                continue;
            }
            let (path, found) = self.look_at(layer.id);
            let problem = match found {
                Ok(m) if !m.is_file() => "is not a file".to_string(),
                Ok(m) if m.len() != layer.size => {
                    format!("has {} bytes instead of {}", m.len(), layer.size)
                }
                Ok(_) => continue,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => "is missing".to_string(),
                Err(e) => return Err(Error::from(e).context(format!("look at {}", path.display()))),
            };
            let message = format!("{whose}'s layer {} {problem}; restore it from a backup", path.display());
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(())
    }
}

/// A change that the host process of an attached volume is about to make.
#[must_use = "the volume's entry is locked until this is dropped"]
pub struct Expected<'a> {
    catalog: &'a Catalog,
    id: VolumeId,
    change: Option<ledger::Change<'a, VolumeFacts>>,
}

impl Expected<'_> {
    /// Enters what the host process has made of the record, which is what was expected of it.
    ///
    /// # Errors
    /// `Corrupt`, naming what differs, for anything else.
    pub fn settle(mut self) -> Result<Metadata> {
        let now = self.catalog.load(self.id)?;
        if let Some(change) = &mut self.change {
            settled(change.settle(VolumeFacts::of(&now)));
        }
        Ok(now)
    }
}

/// Where the ledger cannot be brought up to date, it lists what the record was as well,
/// until the next change.
fn settled(result: Result<()>) {
    if let Err(e) = result {
        log::warn!("the store's ledger is behind by one change: {e}");
    }
}

impl Entry {
    /// The volume's name, where it has one and it can be read.
    pub fn name(&self) -> Option<&str> {
        self.metadata.as_ref().ok().and_then(|m| m.name()).map(|n| n.as_str())
    }
}

fn ambiguous(reference: &str, candidates: &[&Entry]) -> Error {
    let list: Vec<String> = candidates
        .iter()
        .map(|e| match e.name() {
            Some(name) => format!("{} ({name})", e.id),
            None => e.id.to_string(),
        })
        .collect();
    Error::new(Kind::Usage, format!("{reference:?} can be any of {}; give an id", list.join(", ")))
}

pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    Ok(files::read(path, MAX_FILE_LEN)?)
}

/// Removes what a power cut left of a replacement that did not come to its rename.
fn remove_temporary_files(folder: &Path) -> Result<()> {
    let attempt = || format!("clear up {}", folder.display());
    for name in files::names(folder).context(attempt)? {
        if name.to_str().is_some_and(|n| n.starts_with(FILE) && n.ends_with(".tmp")) {
            files::remove(&folder.join(name)).context(attempt)?;
        }
    }
    Ok(())
}
