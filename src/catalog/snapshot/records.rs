//! The snapshots of a store on disk: which there are, which one a user means, how one is
//! noted and taken away.

use crate::base::root::files::{self, create_file};
use crate::base::root::{create_dir_durable, replace_file, sync_dir};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::id::is_lower_hex;
use crate::catalog::ledger::{Doubt, SnapshotFacts};
use crate::catalog::references::remove_unnamed;
use crate::catalog::snapshot::Snapshot;
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::tags::Tags;
use crate::catalog::{Catalog, SnapshotId, read_bounded, settled};
use std::path::{Path, PathBuf};

/// What a record's name ends with while the snapshot is there.
const RECORD: &str = "json";
/// What a record's name ends with once the snapshot is not there any more, until its layers are gone.
const DELETING: &str = "deleting";
/// What a record's name ends with until the snapshot is there, where it is a copy under another data key.
const COPYING: &str = "copying";

/// One snapshot, as a list shows it.
#[derive(Debug)]
pub struct Entry {
    /// Its id, which its record's name tells.
    pub id: SnapshotId,
    /// What is known of it, or why that cannot be read.
    pub snapshot: Result<Snapshot>,
}

impl Catalog {
    fn snapshot_file(&self, id: SnapshotId, ending: &str) -> PathBuf {
        self.root().snapshots().join(format!("{id}.{ending}"))
    }

    /// A snapshot's record.
    pub fn snapshot_path(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_file(id, RECORD)
    }

    /// What will be the record of a copy.
    pub(crate) fn copying_path(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_file(id, COPYING)
    }

    /// What will be the records of copies.
    pub(crate) fn copies_in_the_making(&self) -> Result<Vec<(SnapshotId, PathBuf)>> {
        Ok(self.snapshot_files(COPYING)?.into_iter().map(|id| (id, self.copying_path(id))).collect())
    }

    /// Reads what will be the record of a copy.
    ///
    /// # Errors
    /// As for [`Catalog::load_snapshot`].
    pub(crate) fn load_copying(&self, id: SnapshotId) -> Result<Snapshot> {
        self.believed_snapshot(id, || self.load_copying_claim(id))
    }

    /// As [`Catalog::load_copying`], as it stands there, whoever wrote it.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a damaged, foreign or newer record, which the message names.
    pub(crate) fn load_copying_claim(&self, id: SnapshotId) -> Result<Snapshot> {
        read_snapshot(&self.copying_path(id), id)
    }

    /// Whether there is anything of a snapshot: its record, or that of a copy or deletion
    /// that was not finished.
    pub(crate) fn snapshot_is_there_or_begun(&self, id: SnapshotId) -> bool {
        [RECORD, COPYING, DELETING].iter().any(|ending| files::exists(&self.snapshot_file(id, ending)))
    }

    /// Every snapshot's id, sorted.
    pub fn snapshot_ids(&self) -> Result<Vec<SnapshotId>> {
        self.snapshot_files(RECORD)
    }

    fn snapshot_files(&self, ending: &str) -> Result<Vec<SnapshotId>> {
        let folder = self.root().snapshots();
        let mut ids = Vec::new();
        for name in files::names_if_there(&folder)? {
            let stem = name.to_str().and_then(|name| name.strip_suffix(ending)?.strip_suffix('.'));
            ids.extend(stem.and_then(|stem| stem.parse::<SnapshotId>().ok()));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Every snapshot, sorted by id; a damaged one does not hide the others.
    pub fn snapshots(&self) -> Result<Vec<Entry>> {
        let entry = |id| Entry { id, snapshot: self.load_snapshot(id) };
        let gone = |e: &Entry| matches!(&e.snapshot, Err(err) if err.kind() == Kind::NotFound);
        Ok(self.snapshot_ids()?.into_iter().map(entry).filter(|e| !gone(e)).collect())
    }

    /// Reads a snapshot's record.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a damaged, foreign or newer record, which the message names, and for one
    /// that says something else than the store's ledger.
    pub fn load_snapshot(&self, id: SnapshotId) -> Result<Snapshot> {
        self.believed_snapshot(id, || self.load_snapshot_claim(id))
    }

    fn believed_snapshot(&self, id: SnapshotId, read: impl Fn() -> Result<Snapshot>) -> Result<Snapshot> {
        let (snapshot, doubt) = self.judged(&id, read()?, read, SnapshotFacts::of)?;
        doubt.map_or(Ok(snapshot), |doubt| Err(doubt.refuse(&id)))
    }

    /// Why a snapshot's record is not believed; none: it is.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a record that cannot be read; those of the file system.
    pub(crate) fn doubt_of_snapshot(&self, id: SnapshotId) -> Result<Option<Doubt>> {
        let read = || self.load_snapshot_claim(id);
        Ok(self.judged(&id, read()?, read, SnapshotFacts::of)?.1)
    }

    /// Reads a snapshot's record as it stands there, whoever wrote it.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a damaged, foreign or newer record, which the message names.
    pub(crate) fn load_snapshot_claim(&self, id: SnapshotId) -> Result<Snapshot> {
        let path = self.snapshot_path(id);
        match read_snapshot(&path, id) {
            Err(e) if e.kind() == Kind::NotFound => {
                Err(Error::new(Kind::NotFound, format!("there is no snapshot {id}: no {}", path.display())))
            }
            result => result,
        }
    }

    /// Which snapshot `reference` means: a whole id, the value of a tag `Name` that one snapshot has, or an
    /// id's first digits, with `snap-` or without.
    ///
    /// # Errors
    /// `NotFound`; `Usage` with the candidates if it can be several.
    pub fn resolve_snapshot(&self, reference: &str) -> Result<SnapshotId> {
        let whole = reference.parse::<SnapshotId>().ok();
        if let Some(id) = whole.filter(|&id| files::exists(&self.snapshot_path(id))) {
            return Ok(id);
        }
        let entries = self.snapshots()?;
        let named = entries.iter().filter(|e| e.name() == Some(reference)).map(|e| e.id);
        let named: Vec<SnapshotId> = named.collect();
        let digits = reference.strip_prefix(SnapshotId::PREFIX).unwrap_or(reference);
        let is_prefix = !digits.is_empty() && is_lower_hex(digits);
        let begins =
            |id: &SnapshotId| is_prefix && id.to_string()[SnapshotId::PREFIX.len()..].starts_with(digits);
        // A name comes before a prefix: whether an id begins like it is chance.
        let candidates = match named.is_empty() {
            true => entries.iter().map(|e| e.id).filter(begins).collect(),
            false => named,
        };
        match candidates[..] {
            [id] => Ok(id),
            [] => {
                let store = self.root().path().display();
                let message = format!(
                    "there is no snapshot {reference:?} in {store}; \"sealblk snapshot list\" shows which \
                     there are"
                );
                Err(Error::new(Kind::NotFound, message))
            }
            _ => {
                let list: Vec<String> = candidates.iter().map(ToString::to_string).collect();
                let message = format!("{reference:?} can be any of {}; give the id", list.join(", "));
                Err(Error::new(Kind::Usage, message))
            }
        }
    }

    /// Looks whether the snapshot's layers are there and as long as they shall be.
    ///
    /// # Errors
    /// `Corrupt`, naming the first layer that is missing or has another length.
    pub fn check_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        self.check_files(&snapshot.id, snapshot.layers())
    }

    /// Replaces a snapshot's record.
    pub(crate) fn save_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        create_dir_durable(&self.root().snapshots())?;
        let replace = || replace_file(&self.snapshot_path(snapshot.id), &snapshot.to_json());
        self.replaced(&snapshot.id, || SnapshotFacts::of(snapshot), replace)
    }

    /// Replaces what will be the record of a copy.
    pub(crate) fn save_copying(&self, snapshot: &Snapshot) -> Result<()> {
        let replace = || replace_file(&self.copying_path(snapshot.id), &snapshot.to_json());
        self.replaced(&snapshot.id, || SnapshotFacts::of(snapshot), replace)
    }

    /// Enters a snapshot that is going to be made.
    pub(crate) fn enter_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let Some(ledger) = &self.ledger else { return Ok(()) };
        self.begin_ledger(ledger)?;
        ledger.enter(&snapshot.id.to_string(), SnapshotFacts::of(snapshot))
    }

    /// As [`Catalog::save_snapshot`], for a snapshot that is new. A record that is there already is another
    /// one's, whoever has chosen the id, and stays.
    pub(crate) fn save_new_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        create_dir_durable(&self.root().snapshots())?;
        self.enter_snapshot(snapshot)?;
        create_file(&self.snapshot_path(snapshot.id), &snapshot.to_json())
            .inspect_err(|_| settled(self.forget_entry(&snapshot.id)))
    }

    /// Changes a snapshot's tags.
    ///
    /// # Errors
    /// That of `change`; those of the file system. The tags are as they were then.
    pub fn retag_snapshot(
        &self,
        id: SnapshotId,
        change: impl FnOnce(&mut Tags) -> Result<()>,
    ) -> Result<Snapshot> {
        let _records = RecordsLock::acquire(self)?;
        let mut snapshot = self.load_snapshot(id)?;
        change(&mut snapshot.label.tags)?;
        self.save_snapshot(&snapshot)?;
        Ok(snapshot)
    }

    /// Changes how a snapshot's data keys are wrapped, by `change`.
    ///
    /// # Errors
    /// Those of `change` and of the file system. The record is as it was then.
    pub(crate) fn change_wrapping(
        &self,
        id: SnapshotId,
        change: impl FnOnce(&mut Snapshot) -> Result<()>,
    ) -> Result<()> {
        let _records = RecordsLock::acquire(self)?;
        let mut snapshot = self.load_snapshot(id)?;
        change(&mut snapshot)?;
        self.save_snapshot(&snapshot)
    }

    /// Deletes a snapshot, and those of its layers that nothing else names. Returns what its record said.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` if its record cannot be read, since then nobody knows its layers. An error
    /// after it is gone says so.
    pub fn delete_snapshot(&self, id: SnapshotId) -> Result<Snapshot> {
        let attempt = || format!("delete {id}");
        let records = RecordsLock::acquire(self).context(attempt)?;
        let snapshot = self.load_snapshot(id).context(attempt)?;
        let (from, to) = (self.snapshot_path(id), self.snapshot_file(id, DELETING));
        files::rename(&from, &to).context(|| format!("rename {} to {}", from.display(), to.display()))?;
        sync_dir(&self.root().snapshots())?;
        self.clear_snapshot(&snapshot, &records).context(|| {
            format!("{id} is deleted, but not its layers; \"sealblk gc\" and the next deletion try again")
        })?;
        Ok(snapshot)
    }

    fn clear_snapshot(&self, snapshot: &Snapshot, records: &RecordsLock) -> Result<()> {
        remove_unnamed(self, snapshot.layers().iter().map(|l| l.id), records)?;
        let path = self.snapshot_file(snapshot.id, DELETING);
        files::remove(&path).context(|| format!("remove {}", path.display()))?;
        sync_dir(&self.root().snapshots())?;
        self.forget_entry(&snapshot.id)
    }

    /// Takes a copy back that is not there yet, with those of its layers that nothing else names.
    ///
    /// # Errors
    /// Those of the file system: what is left is cleared away like what an interrupted deletion leaves.
    pub(crate) fn abandon_copy(&self, id: SnapshotId, records: &RecordsLock) -> Result<()> {
        let (from, to) = (self.copying_path(id), self.snapshot_file(id, DELETING));
        let copy = read_snapshot(&from, id)?;
        files::rename(&from, &to).context(|| format!("rename {} to {}", from.display(), to.display()))?;
        sync_dir(&self.root().snapshots())?;
        self.clear_snapshot(&copy, records)
    }

    /// The records of snapshots whose deletion was interrupted.
    pub(crate) fn deleted_snapshots(&self) -> Result<Vec<PathBuf>> {
        Ok(self.snapshot_files(DELETING)?.into_iter().map(|id| self.snapshot_file(id, DELETING)).collect())
    }

    /// Clears away what an interrupted deletion of a snapshot left.
    pub(crate) fn clear_deleted_snapshots(&self, records: &RecordsLock) -> Result<()> {
        for id in self.snapshot_files(DELETING)? {
            let path = self.snapshot_file(id, DELETING);
            let cleared =
                read_snapshot(&path, id).and_then(|snapshot| self.clear_snapshot(&snapshot, records));
            if let Err(e) = cleared {
                log::warn!("{}: left as it is: {e}", path.display());
            }
        }
        Ok(())
    }
}

impl Entry {
    /// The value of the tag `Name`, where it has one and can be read.
    pub fn name(&self) -> Option<&str> {
        self.snapshot.as_ref().ok().and_then(|s| s.label.tags.get("Name"))
    }
}

fn read_snapshot(path: &Path, id: SnapshotId) -> Result<Snapshot> {
    let attempt = || format!("read {}", path.display());
    let bytes = read_bounded(path).context(attempt)?;
    let snapshot = Snapshot::from_json(&bytes).context(attempt)?;
    if snapshot.id != id {
        let message = format!("it describes {}, not {id}; put back the right file", snapshot.id);
        return Err(Error::new(Kind::Corrupt, message).context(attempt()));
    }
    Ok(snapshot)
}
