//! Copies of snapshots under another data key: one new layer with everything that the original's layers have.
//!
//! What will be the copy's record is called `snap-….copying` until the copy is whole; it names the new layer,
//! so that nobody clears that away, and is locked (flock) by whoever is at it. The same copy asked for again
//! goes on with what it finds. The rename to `.json` **is the moment**. `docs/format.md` argues the steps.

use crate::base::root::{create_dir_durable, files, replace_file, sync_dir};
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::layer_file::make_layer;
use crate::catalog::layout::{KeyRecord, LayerRecord, Layout};
use crate::catalog::slots::Unwrapped;
use crate::catalog::snapshot::{Label, Snapshot};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, SnapshotId};
use crate::crypt::Dek;
use crate::kms::Failure;
use crate::ops::clone::is_key_of;
use crate::ops::keys::WrappingKey;
use crate::ops::need::{self, Budget};
use crate::volume::open::{Deks, Unwrap};
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::path::{Path, PathBuf};

/// A copy in the making, and the data keys that it takes.
pub struct Copying {
    copy: Snapshot,
    source_deks: Deks,
    dek: Unwrapped,
    _lock: Flock<File>,
}

impl Copying {
    /// Begins a copy of `source` under a new data key that `key` wraps, or goes on with one that was
    /// begun so and interrupted.
    ///
    /// # Errors
    /// The KMS's; `NoSpace` if the file system has too little; `Corrupt` if the source, or what was begun, is
    /// not what somebody who has its data keys made; those of the file system.
    pub fn begin(
        catalog: &Catalog,
        source: &Snapshot,
        label: Label,
        key: &WrappingKey<'_>,
        unwrap: Unwrap<'_>,
        budget: Budget,
    ) -> Result<Self, Failure> {
        catalog.check_snapshot(source)?;
        catalog.check_has_come(source.layers())?;
        let source_deks =
            source.keys().iter().map(|key| unwrap(source.key_owner(), key)).collect::<Result<Deks, _>>()?;
        source.verify(&source_deks)?;
        if let Some((copy, lock)) = interrupted(catalog, source, &label, key)? {
            let dek = unwrap(copy.key_owner(), &copy.keys()[0])?;
            copy.verify(std::slice::from_ref(&dek))?;
            log::info!("going on with {}, which was interrupted", copy.id());
            let copying = Copying { copy, source_deks, dek, _lock: lock };
            copying.make_layer(catalog)?;
            let top = copying.copy.layout().top();
            budget.check(catalog, need::of_layers(catalog, source.layers(), Some(top))?)?;
            return Ok(copying);
        }
        budget.check(catalog, need::of_layers(catalog, source.layers(), None)?)?;
        let id = SnapshotId::random();
        let record = key.generate(id)?;
        let dek = unwrap(id.into(), &record)?;
        let copy = Snapshot::under_another_key(source, id, label, record, &dek.dek)?;
        let lock = note(catalog, &copy)?;
        let copying = Copying { copy, source_deks, dek, _lock: lock };
        copying.make_layer(catalog)?;
        Ok(copying)
    }

    /// What it will be.
    pub fn copy(&self) -> &Snapshot {
        &self.copy
    }

    /// The data keys: of its one layer, and of the source's keys in their order.
    pub(super) fn deks(&self) -> (&Unwrapped, &[Unwrapped]) {
        (&self.dek, &self.source_deks)
    }

    fn make_layer(&self, catalog: &Catalog) -> Result<()> {
        make_empty(catalog, self.copy.layout().top())
    }

    /// With this the copy is there. **Its layer has everything, durably**, and nobody writes to it any more.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn commit(self, catalog: &Catalog) -> Result<Snapshot> {
        commit(catalog, &self.copy)?;
        Ok(self.copy)
    }
}

/// Makes a layer of a copy, empty; unless it is there already, and whole.
pub(in crate::ops) fn make_empty(catalog: &Catalog, layer: &LayerRecord) -> Result<()> {
    let path = catalog.layer_path(layer.id);
    match path.symlink_metadata() {
        // Whoever made it may have been cut off before its name was durable.
        Ok(found) if found.len() == layer.size => return sync_dir(&catalog.root().layers()),
        // Cut off in its making: nothing was written to it.
        Ok(_) => files::remove(&path).context(|| format!("remove {}", path.display()))?,
        Err(_) => create_dir_durable(&catalog.root().layers())?,
    }
    make_layer(&path, &catalog.root().layers(), layer.size, false)
}

/// With this a copy is there that was [noted](note). **Its layers have everything, durably**, and nobody
/// writes to them any more.
pub(in crate::ops) fn commit(catalog: &Catalog, copy: &Snapshot) -> Result<()> {
    let _records = RecordsLock::acquire(catalog)?;
    catalog.mark_frozen(copy.layers());
    let (from, to) = (catalog.copying_path(copy.id()), catalog.snapshot_path(copy.id()));
    files::rename(&from, &to).context(|| format!("rename {} to {}", from.display(), to.display()))?;
    sync_dir(&catalog.root().snapshots())
}

/// Writes down what is going to be made, and locks it.
pub(in crate::ops) fn note(catalog: &Catalog, copy: &Snapshot) -> Result<Flock<File>> {
    let _records = RecordsLock::acquire(catalog)?;
    create_dir_durable(&catalog.root().snapshots())?;
    let path = catalog.copying_path(copy.id());
    catalog.enter_snapshot(copy)?;
    replace_file(&path, &copy.to_json())?;
    lock(&path)?.ok_or_else(|| Error::new(Kind::Busy, format!("{} is in use", path.display())))
}

/// Writes down that what is in the making, whose lock is `held`, becomes this copy, of the same layers.
pub(in crate::ops) fn note_anew(
    catalog: &Catalog,
    copy: &Snapshot,
    held: Flock<File>,
) -> Result<Flock<File>> {
    let _records = RecordsLock::acquire(catalog)?;
    catalog.save_copying(copy)?;
    let path = catalog.copying_path(copy.id());
    // Whoever looks for what nobody is at takes the records' lock first.
    let lock = lock(&path)?.ok_or_else(|| Error::new(Kind::Busy, format!("{} is in use", path.display())));
    drop(held);
    lock
}

/// A copy that was begun in this way and that nobody is at.
fn interrupted(
    catalog: &Catalog,
    source: &Snapshot,
    label: &Label,
    key: &WrappingKey<'_>,
) -> Result<Option<(Snapshot, Flock<File>)>, Failure> {
    let _records = RecordsLock::acquire(catalog)?;
    for (id, path) in catalog.copies_in_the_making()? {
        let read = catalog.load_copying(id);
        let Ok(copy) = read.inspect_err(|e| log::warn!("left as it is: {e}")) else { continue };
        // What is being pulled from a place may have several layers, and another process
        // is at it in another way.
        let same = copy.copy_of() == Some(source.id()) && copy.label() == label && copy.layers().len() == 1;
        if same
            && copy.geometry() == source.geometry()
            && is_key_of(key, &copy)?.is_some()
            && let Some(lock) = lock(&path)?
        {
            return Ok(Some((copy, lock)));
        }
    }
    Ok(None)
}

/// Locks the record of a copy at `path`; `None` if somebody else has it, or it is gone.
pub(in crate::ops) fn lock(path: &Path) -> Result<Option<Flock<File>>> {
    let file = match files::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::from(e).context(format!("open {}", path.display()))),
    };
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, e)) => Err(Error::from(e).context(format!("lock {}", path.display()))),
    }
}

impl Snapshot {
    /// What a copy of `source` under the data key `dek`, which `key` wraps, will be: sealed, with one layer.
    fn under_another_key(
        source: &Snapshot,
        id: SnapshotId,
        label: Label,
        key: KeyRecord,
        dek: &Dek,
    ) -> Result<Self> {
        let geometry = source.geometry();
        let key = key.checked(dek);
        let layers = vec![LayerRecord::new_top(Some(0), geometry.size())];
        let layout = Layout { geometry, keys: vec![key], layers, hydrate: None };
        let mut copy = Snapshot {
            id,
            volume: source.volume,
            copy_of: Some(source.id),
            layout,
            created: Timestamp::now(),
            label,
            sealed_as: id,
            mac: None,
        };
        copy.mac =
            Some(dek.seal_key(&copy.volume.to_string())?.mac(&copy.sealed_bytes(&copy.layout.checks())));
        Ok(copy)
    }
}

impl Catalog {
    /// The records of copies that were begun and that nobody is at.
    pub(crate) fn interrupted_copies(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for (_, path) in self.copies_in_the_making()? {
            // Held by nobody, if it can be had.
            found.extend(lock(&path)?.map(|_| path));
        }
        Ok(found)
    }
}
