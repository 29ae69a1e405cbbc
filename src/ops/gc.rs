//! What is left over in a store: layers that nothing names, temporary files, remains of interrupted commands.
//!
//! Commands clear up after interrupted ones of their own accord, by the records that those left. This finds what no
//! record leads to as well, such as a layer whose volume's folder was removed by hand.

use crate::base::root::{files, sync_dir};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Held, Holder, Purpose, VolumeLock};
use crate::catalog::references::{StoreLock, named_layers};
use crate::catalog::{self, Catalog, LayerId, VolumeId, leaving, pending};
use crate::image::lock::{Access, ImageLock};
use crate::ops::delete::clear_remains;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What a left-over is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A layer's file that no volume and no snapshot names.
    Layer,
    /// A file that never came to be renamed to what it was to be, or a layer's second name in its volume's folder.
    Temporary,
    /// A volume whose making or deleting was interrupted, with whatever of it is left.
    Volume,
    /// A snapshot whose copying or deleting was interrupted.
    Snapshot,
    /// A change of a volume's layers that was interrupted.
    Change,
    /// A note of a grant, as earlier versions kept them in the store. What it says is not looked at.
    Note,
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
    /// What it takes on disk, in bytes; of a folder, its layers are not counted.
    pub bytes: u64,
}

impl LeftOver {
    /// None if it has gone meanwhile.
    pub(crate) fn at(what: What, path: PathBuf) -> Option<Self> {
        let bytes = std::fs::symlink_metadata(&path).ok()?.blocks() * 512;
        Some(LeftOver { what, path, bytes })
    }
}

impl Catalog {
    /// What is left over and belongs to nobody who is at work.
    ///
    /// # Errors
    /// `Corrupt`, naming the first record that cannot be read: then it is not known which layers are in use.
    pub fn left_overs(&self) -> Result<Vec<LeftOver>> {
        let store = StoreLock::acquire(self)?;
        self.find(&store)
    }

    /// Removes what is left over, and answers what that was.
    ///
    /// # Errors
    /// As [`Catalog::left_overs`]; those of the file system. What had been removed until then is gone.
    pub fn collect(&self) -> Result<Vec<LeftOver>> {
        let store = StoreLock::acquire(self)?;
        let mut found = self.find(&store)?;
        clear_remains(self, &store);
        self.interrupted_copies()?.iter().try_for_each(|path| remove(path))?;
        for id in self.ids()? {
            self.tidy(id, &store)?;
        }
        // What the remains named is named no more.
        found.extend(self.unnamed_layers(&store)?);
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found.dedup_by(|a, b| a.path == b.path);
        let snapshots = self.root().snapshots();
        for left in &found {
            // What lies in a volume's folder is its next holder's, who may already be waiting for it.
            let is_temporary = left.what == What::Temporary && left.path.parent() == Some(&*snapshots);
            if left.what == What::Layer || is_temporary {
                remove(&left.path)?;
            }
        }
        for folder in [self.root().layers(), self.root().snapshots()].iter().filter(|f| files::exists(f)) {
            sync_dir(folder)?;
        }
        // What could not be removed was warned of, and is not said to be gone.
        found.retain(|left| !files::exists(&left.path));
        Ok(found)
    }

    fn find(&self, store: &StoreLock) -> Result<Vec<LeftOver>> {
        let mut found = self.unnamed_layers(store)?;
        for id in self.folders()? {
            if self.held(id)? != Held::Free {
                continue;
            }
            let folder = self.folder(id);
            if !files::exists(&folder.join(catalog::FILE)) {
                found.extend(LeftOver::at(What::Volume, folder));
                continue;
            }
            let temporary = temporary_files(&folder)?.into_iter().chain(self.own_layers(id)?);
            found.extend(temporary.filter_map(|path| LeftOver::at(What::Temporary, path)));
            for name in [pending::FILE, leaving::FILE] {
                found.extend(LeftOver::at(What::Change, folder.join(name)));
            }
        }
        let snapshots = self.root().snapshots();
        if files::exists(&snapshots) {
            let temporary = temporary_files(&snapshots)?.into_iter();
            found.extend(temporary.filter_map(|path| LeftOver::at(What::Temporary, path)));
        }
        let copies = self.interrupted_copies()?.into_iter();
        found.extend(copies.filter_map(|path| LeftOver::at(What::Snapshot, path)));
        let deleted = self.deleted_snapshots()?.into_iter();
        found.extend(deleted.filter_map(|path| LeftOver::at(What::Snapshot, path)));
        Ok(found)
    }

    /// The files of layers that nothing names. They are listed before the records are read: a layer that is made
    /// meanwhile is not among them, and one that was made before was named before.
    fn unnamed_layers(&self, store: &StoreLock) -> Result<Vec<LeftOver>> {
        let folder = self.root().layers();
        let attempt = || format!("list {}", folder.display());
        let mut layers = Vec::new();
        match files::names(&folder) {
            Ok(names) => {
                for name in names {
                    let id =
                        name.to_str().and_then(|name| name.strip_suffix(".img")?.parse::<LayerId>().ok());
                    layers.extend(id);
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::from(e).context(attempt())),
        }
        layers.sort_unstable();
        let named = named_layers(self, store)?;
        let unnamed = layers.into_iter().filter(|layer| !named.contains(layer)).map(|l| self.layer_path(l));
        // A file that somebody serves is in use, whatever the records say.
        let unused = unnamed.filter(|path| ImageLock::acquire(path, Access::ReadWrite).is_ok());
        Ok(unused.filter_map(|path| LeftOver::at(What::Layer, path)).collect())
    }

    /// Undoes what an interrupted command left in the folder of a volume, unless somebody has the volume.
    fn tidy(&self, id: VolumeId, store: &StoreLock) -> Result<()> {
        let folder = self.folder(id);
        let is_tidy = temporary_files(&folder)?.is_empty() && self.own_layers(id)?.is_empty();
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
        let metadata = self.load(id)?;
        if let Err(e) = self.check_top_is_own(&metadata) {
            log::warn!("{e}; what an interrupted command left there stays");
            return Ok(());
        }
        self.undo_pending(&lock, &metadata, Some(store))?;
        match self.has_left_layers(id) {
            true => self.settle_left(&lock, store),
            false => Ok(()),
        }
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
