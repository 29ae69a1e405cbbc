//! What is left over in a store: layers that nothing names, temporary files, remains of interrupted commands,
//! grants of attaches that are over.
//!
//! Commands clear up after interrupted ones of their own accord, by the records that those left. This finds
//! what no record leads to as well, such as a layer whose volume's folder was removed by hand.

use crate::base::root::{files, sync_dir};
use crate::base::{Context, Kind, Result};
use crate::catalog::device::layer_of_name;
use crate::catalog::lock::{Held, Holder, Purpose, VolumeLock};
use crate::catalog::references::named_layers;
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{self, Catalog, LayerId, VolumeId, leaving, pending};
use crate::helper::grants::{self, Note, notes};
use crate::image::lock::{Access, ImageLock};
use crate::ops::Store;
use crate::ops::backup::other_host::Arrivals;
use crate::ops::delete::clear_remains;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What was found in a store that nobody needs any more, and what became of it.
pub struct Collected {
    /// Files.
    pub left_overs: Vec<LeftOver>,
    /// Grants of attaches that are over; each with what came of retiring it, if that was tried.
    pub grants: Vec<(Note, Option<Result<()>>)>,
}

/// Finds what nobody needs any more, and touches nothing.
///
/// # Errors
/// `Corrupt`, naming the first record that cannot be read: then it is not known which layers are in use.
pub fn look(store: &Store) -> Result<Collected> {
    // A store that does not exist is not made by looking.
    let catalog = store.catalog();
    let mut found = if store.root().path().exists() { left_overs(&catalog)? } else { Vec::new() };
    found.extend(old_notes(store)?);
    found.extend(arrivals(store)?);
    let grants = grants::stale(&catalog)?.into_iter().map(|note| (note, None)).collect();
    Ok(Collected { left_overs: found, grants })
}

/// Removes what nobody needs any more, and retires grants of attaches that are over.
///
/// # Errors
/// As [`look`]; those of the file system. What had been removed until then is gone.
pub fn clear(store: &Store) -> Result<Collected> {
    let catalog = store.catalog();
    let mut found = if store.root().path().exists() { collect(&catalog)? } else { Vec::new() };
    let old = old_notes(store)?;
    for left in &old {
        files::remove_if_there(&left.path).context(|| format!("remove {}", left.path.display()))?;
    }
    found.extend(old);
    found.extend(arrivals(store)?);
    Arrivals::of(store.root()).clear()?;
    let retire = |note: Note| {
        let outcome = grants::retire(store.root(), &note);
        (note, Some(outcome))
    };
    let grants = grants::stale(&catalog)?.into_iter().map(retire).collect();
    Ok(Collected { left_overs: found, grants })
}

/// The notes of grants that earlier versions kept in the store, where whoever writes the ciphertext could
/// have written them. Nothing is done at the KMS because of them.
fn old_notes(store: &Store) -> Result<Vec<LeftOver>> {
    notes::warn_of_old(store.root());
    let paths = notes::old(store.root())?;
    Ok(paths.into_iter().filter_map(|path| LeftOver::at(What::Note, path)).collect())
}

/// What came from other hosts by connections that ended too soon.
fn arrivals(store: &Store) -> Result<Vec<LeftOver>> {
    let folders = Arrivals::of(store.root()).left_over()?;
    Ok(folders.into_iter().filter_map(|path| LeftOver::at(What::Arrival, path)).collect())
}

/// What a left-over is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A layer's file that no volume and no snapshot names.
    Layer,
    /// A file that never came to be renamed to what it was to be, or a layer's second name
    /// in its volume's folder.
    Temporary,
    /// A volume whose making or deleting was interrupted, with whatever of it is left.
    Volume,
    /// A snapshot whose copying or deleting was interrupted.
    Snapshot,
    /// A change of a volume's layers that was interrupted.
    Change,
    /// A note of a grant, as earlier versions kept them in the store. What it says is not looked at.
    Note,
    /// A part of a volume that another host has sent by a connection which ended too soon.
    Arrival,
}

impl What {
    /// In one word, for lists and JSON.
    pub fn name(self) -> &'static str {
        match self {
            What::Layer => "layer",
            What::Temporary => "temporary",
            What::Volume => "volume",
            What::Snapshot => "snapshot",
            What::Change => "change",
            What::Note => "note",
            What::Arrival => "arrival",
        }
    }
}

/// Something that is left over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOver {
    /// What it is.
    pub what: What,
    /// Its file or folder.
    pub path: PathBuf,
    /// What it takes on disk, in bytes; of a folder, what is in it is not counted.
    pub bytes: u64,
}

impl LeftOver {
    /// What lies at `path`; `None` if that has gone meanwhile.
    pub(crate) fn at(what: What, path: PathBuf) -> Option<Self> {
        let bytes = std::fs::symlink_metadata(&path).ok()?.blocks() * 512;
        Some(LeftOver { what, path, bytes })
    }
}

/// What is left over and belongs to nobody who is at work.
///
/// # Errors
/// `Corrupt`, naming the first record that cannot be read: then it is not known which layers are in use.
fn left_overs(catalog: &Catalog) -> Result<Vec<LeftOver>> {
    let records = RecordsLock::acquire(catalog)?;
    find(catalog, &records)
}

/// Removes what is left over, and returns what that was.
///
/// # Errors
/// As [`left_overs`]; those of the file system. What had been removed until then is gone.
fn collect(catalog: &Catalog) -> Result<Vec<LeftOver>> {
    let records = RecordsLock::acquire(catalog)?;
    let mut found = find(catalog, &records)?;
    clear_remains(catalog, &records);
    catalog.interrupted_copies()?.iter().try_for_each(|path| remove(path))?;
    catalog.entries_of_nothing(&records)?.iter().try_for_each(|id| catalog.forget_entry(id))?;
    for id in catalog.ids()? {
        tidy(catalog, id, &records)?;
    }
    // What the remains named is named no more.
    found.extend(unnamed_layers(catalog, &records)?);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found.dedup_by(|a, b| a.path == b.path);
    let (snapshots, layers) = (catalog.root().snapshots(), catalog.root().layers());
    for left in &found {
        // What lies in a volume's folder is its next holder's, who may already be waiting for it.
        let parent = left.path.parent();
        let is_temporary =
            left.what == What::Temporary && [Some(&*snapshots), Some(&*layers)].contains(&parent);
        let name = left.path.file_name().and_then(|name| name.to_str());
        match name.and_then(layer_of_name).filter(|_| left.what == What::Layer) {
            Some(layer) => drop(catalog.remove_layer(layer)?),
            None if is_temporary => remove(&left.path)?,
            None => {}
        }
    }
    for folder in [catalog.root().layers(), catalog.root().snapshots()].iter().filter(|f| files::exists(f)) {
        sync_dir(folder)?;
    }
    // What could not be removed was warned of, and is not said to be gone.
    found.retain(|left| !files::exists(&left.path));
    Ok(found)
}

fn find(catalog: &Catalog, records: &RecordsLock) -> Result<Vec<LeftOver>> {
    let mut found = unnamed_layers(catalog, records)?;
    for id in catalog.folders()? {
        if catalog.held(id)? != Held::Free {
            continue;
        }
        let folder = catalog.folder(id);
        if !files::exists(&folder.join(catalog::FILE)) {
            found.extend(LeftOver::at(What::Volume, folder));
            continue;
        }
        let temporary = temporary_files(&folder)?.into_iter().chain(catalog.own_layers(id)?);
        found.extend(temporary.filter_map(|path| LeftOver::at(What::Temporary, path)));
        for name in [pending::FILE, leaving::FILE] {
            found.extend(LeftOver::at(What::Change, folder.join(name)));
        }
    }
    let snapshots = catalog.root().snapshots();
    if files::exists(&snapshots) {
        let temporary = temporary_files(&snapshots)?.into_iter();
        found.extend(temporary.filter_map(|path| LeftOver::at(What::Temporary, path)));
    }
    let copies = catalog.interrupted_copies()?.into_iter();
    found.extend(copies.filter_map(|path| LeftOver::at(What::Snapshot, path)));
    let deleted = catalog.deleted_snapshots()?.into_iter();
    found.extend(deleted.filter_map(|path| LeftOver::at(What::Snapshot, path)));
    Ok(found)
}

/// The files of layers that nothing names. They are listed before the records are read: a layer that is made
/// meanwhile is not among them, and one that was made before was named before.
fn unnamed_layers(catalog: &Catalog, records: &RecordsLock) -> Result<Vec<LeftOver>> {
    let folder = catalog.root().layers();
    let names = files::names_if_there(&folder)?;
    let mut layers: Vec<LayerId> = names.iter().filter_map(|name| layer_of_name(name.to_str()?)).collect();
    layers.sort_unstable();
    layers.dedup();
    let named = named_layers(catalog, records)?;
    let unnamed = layers.into_iter().filter(|layer| !named.contains(layer));
    let mut found: Vec<LeftOver> = unnamed.filter_map(|layer| unused(catalog, layer)).collect();
    // What says on which device a layer lies never came to its name: nobody makes the layer any more.
    let never_named =
        names.iter().filter(|name| layer_of_temporary(name).is_some_and(|layer| !named.contains(&layer)));
    found.extend(never_named.filter_map(|name| LeftOver::at(What::Temporary, folder.join(name))));
    let of_nothing = catalog.wanted_of_nothing()?.into_iter();
    found.extend(of_nothing.filter_map(|path| LeftOver::at(What::Temporary, path)));
    Ok(found)
}

/// The layer that a temporary file in `layers/` was going to say something of.
fn layer_of_temporary(name: &OsString) -> Option<LayerId> {
    layer_of_name(name.to_str()?.strip_suffix(".tmp")?.rsplit_once('.')?.0)
}

/// A layer that nothing names, unless somebody serves it: then it is in use, whatever the records say.
fn unused(catalog: &Catalog, layer: LayerId) -> Option<LeftOver> {
    let (path, lies_at) = match catalog.on_device(layer).ok()? {
        Some(on) if on.address.is_some() => (catalog.device_file(layer), Some(catalog.device_file(layer))),
        Some(on) => (catalog.device_file(layer), on.name.canonicalize().ok()),
        None if files::exists(&catalog.file_of(layer)) => {
            (catalog.file_of(layer), Some(catalog.file_of(layer)))
        }
        // What says what is to come is all that there is.
        None => (catalog.wanted_path(layer), None),
    };
    // A device that is not there is served by nobody.
    let is_unused = lies_at.is_none_or(|path| ImageLock::acquire(&path, Access::ReadWrite).is_ok());
    is_unused.then(|| LeftOver::at(What::Layer, path)).flatten()
}

/// Undoes what an interrupted command left in the folder of a volume, unless somebody has the volume.
fn tidy(catalog: &Catalog, id: VolumeId, records: &RecordsLock) -> Result<()> {
    let folder = catalog.folder(id);
    let is_tidy = temporary_files(&folder)?.is_empty() && catalog.own_layers(id)?.is_empty();
    if is_tidy && ![pending::FILE, leaving::FILE].iter().any(|name| files::exists(&folder.join(name))) {
        return Ok(());
    }
    let holder = Holder::this_process(Purpose::Recover, None)?;
    let lock = match VolumeLock::acquire(&folder, id, &holder) {
        Ok(lock) => lock,
        Err(e) if matches!(e.kind(), Kind::Busy | Kind::NotFound) => return Ok(()),
        Err(e) => return Err(e),
    };
    temporary_files(&folder)?.iter().try_for_each(|path| remove(path))?;
    let metadata = catalog.load(id)?;
    if let Err(e) = catalog.check_top_is_own(&metadata) {
        log::warn!("{e}; what an interrupted command left there stays");
        return Ok(());
    }
    catalog.undo_pending(&lock, &metadata, Some(records))?;
    match catalog.has_left_layers(id) {
        true => catalog.settle_left(&lock, records),
        false => Ok(()),
    }
}

fn temporary_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let attempt = || format!("list {}", folder.display());
    let mut found = Vec::new();
    for name in files::names(folder).context(attempt)? {
        let path = folder.join(name);
        // As replace_file names them: <name>.json.<32 hexadecimal digits>.tmp.
        if path.extension().is_some_and(|e| e == "tmp") {
            found.push(path);
        }
    }
    Ok(found)
}

fn remove(path: &Path) -> Result<()> {
    files::remove_if_there(path).context(|| format!("remove {}", path.display()))
}
