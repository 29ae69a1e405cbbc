//! The volumes of a store: which there are, which one a user means, and their metadata on disk.
//!
//! A volume is a folder `volumes/<id>/` that holds a `volume.json`. A folder without one is a volume that is
//! being made or deleted, or whose making or deleting was cut off (`ops::delete` clears those away).

pub mod freeze;
pub mod grow;
pub mod id;
pub mod layer_file;
pub mod layout;
pub mod leaving;
pub mod lock;
pub mod metadata;
pub mod pending;
pub mod references;
pub mod rekey;
pub mod rewrap;
pub mod seal;
pub mod snapshot;
pub mod tags;

pub use id::{LayerId, SnapshotId, VolumeId};
pub use metadata::Metadata;
pub use pending::OwnLayer;
pub use seal::Seal;
pub use snapshot::Snapshot;

use crate::base::root::{Root, files, replace_file};
use crate::base::{Context, Error, Kind, Result};
use id::is_lower_hex;
use lock::{Held, VolumeLock};
use metadata::{LayerRecord, MAX_FILE_LEN};
use pending::Pending;
use std::fmt::Display;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Digits of an id that no name is like by chance.
const DIGITS_BEYOND_CHANCE: usize = 6;

/// The metadata's file name in a volume's folder.
pub const FILE: &str = "volume.json";

/// The volumes of one store. Holds nothing but the path: every question is asked of the disk.
#[derive(Clone, Debug)]
pub struct Catalog {
    root: Root,
}

/// One volume, as a list shows it.
#[derive(Debug)]
pub struct Entry {
    /// Its id, which its folder's name tells.
    pub id: VolumeId,
    /// What is known of it, or why that cannot be read.
    pub metadata: Result<Metadata>,
}

impl Catalog {
    /// The volumes of the store at `root`, which need not exist yet.
    pub fn new(root: &Root) -> Self {
        Catalog { root: root.clone() }
    }

    /// The store's root folder.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// A volume's folder.
    pub fn folder(&self, id: VolumeId) -> PathBuf {
        self.root.volumes().join(id.to_string())
    }

    /// A layer's file.
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
        let entry = |id| Entry { id, metadata: self.load(id) };
        let gone = |e: &Entry| matches!(&e.metadata, Err(err) if err.kind() == Kind::NotFound);
        Ok(self.ids()?.into_iter().map(entry).filter(|e| !gone(e)).collect())
    }

    /// Which volume `reference` means: a whole id, a name, or an id's first digits, with `vol-` or without.
    ///
    /// # Errors
    /// `NotFound`; `Usage` with the candidates if several ids begin so, or if several volumes have that name: a host process
    /// writes its volume's name, and could have taken another volume's.
    pub fn resolve(&self, reference: &str) -> Result<VolumeId> {
        let whole = reference.parse::<VolumeId>().ok();
        if let Some(id) = whole.filter(|&id| files::exists(&self.folder(id).join(FILE))) {
            return Ok(id);
        }
        let entries = self.list()?;
        let named: Vec<&Entry> = entries.iter().filter(|e| e.name() == Some(reference)).collect();
        let digits = reference.strip_prefix(VolumeId::PREFIX).unwrap_or(reference);
        let is_prefix = !digits.is_empty() && is_lower_hex(digits);
        let begins = |e: &&Entry| is_prefix && e.id.to_string()[VolumeId::PREFIX.len()..].starts_with(digits);
        let beginning: Vec<&Entry> = entries.iter().filter(begins).collect();
        // A name comes before a prefix: whether an id begins like it is chance. With so many digits it is none: a host process
        // could have given its volume the name by which another one is meant.
        let is_chance = digits.len() < DIGITS_BEYOND_CHANCE;
        let candidates = match (named.is_empty(), is_chance) {
            (true, _) => beginning,
            (false, true) => named,
            (false, false) => entries.iter().filter(|e| e.name() == Some(reference) || begins(e)).collect(),
        };
        match candidates[..] {
            [] => Err(self.no_such(reference, &entries)),
            [entry] => Ok(entry.id),
            _ => Err(ambiguous(reference, &candidates)),
        }
    }

    fn no_such(&self, reference: &str, entries: &[Entry]) -> Error {
        let mut message = format!("there is no volume {reference:?} in {}", self.root.path().display());
        match entries.iter().filter(|e| e.metadata.is_err()).count() {
            0 => message.push_str("; \"sealblk volume list\" shows which there are"),
            n => message.push_str(&format!("; {n} of its volumes cannot be read, whose names are unknown")),
        }
        Error::new(Kind::NotFound, message)
    }

    /// Reads a volume's metadata.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for a damaged, foreign or newer file, which the message names.
    pub fn load(&self, id: VolumeId) -> Result<Metadata> {
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
        replace_file(&folder.join(FILE), &next.to_json())?;
        *metadata = next;
        Ok(())
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
            // While a volume is made larger, and until somebody takes it after a crash in between, its top is longer.
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
            let path = self.layer_path(layer.id);
            let problem = match path.symlink_metadata() {
                Ok(m) if m.file_type().is_block_device() => continue,
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
