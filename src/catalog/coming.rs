//! Layers that are still coming from a place outside: a snapshot that was pulled lazily is there before what
//! its layers hold.
//!
//! Until everything of a layer is there its file is called `<uuid>.coming`, and beside it `<uuid>.wanted`
//! says what is to come, and from where. **The moment** is the rename to `<uuid>.img`: from then on the
//! layer is like any other, and the place is not needed any more. No record says whether a layer is still
//! coming, so that none has to be rewritten when it has come. Whoever does not know of the first name
//! finds no layer, and refuses.
//!
//! What lies in `<uuid>.wanted` is a claim. Here its first lines alone are read, for people, and to find out
//! which keys prove all of it; `backup::to_come` has the rest.

use super::device::layer_of_name;
use super::layer_file::make_layer;
use super::{Catalog, LayerId, SnapshotId, VolumeId};
use crate::backing::coming::BLOCK;
use crate::backing::file::{Place, next_data_of};
use crate::base::root::{create_dir_durable, files, sync_dir};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::layout::LayerRecord;
use crate::catalog::store_locks::RecordsLock;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, Metadata, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use uuid::Uuid;

/// The name's ending of a layer of which not everything is there.
const COMING: &str = ".coming";
/// Of what says what is to come.
const WANTED: &str = ".wanted";
/// The first line of such a file.
pub(crate) const FIRST_LINE: &str = "sealblk wanted 1\n";
/// Its second line, which is JSON, has so many bytes at most.
pub(crate) const MAX_HEAD: usize = 64 << 10;

/// What `<uuid>.wanted` says of a layer, whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// The layer.
    pub layer: LayerId,
    /// Its length in bytes.
    pub size: u64,
    /// How many of its blocks are to come. Of the others, all is zero.
    pub blocks: u64,
    /// The snapshot in the place.
    pub snapshot: SnapshotId,
    /// The volume that it is of.
    pub volume: VolumeId,
    /// The place's id.
    pub place: Uuid,
    /// Where the place is.
    pub url: String,
    /// Of an object store: where it listens.
    pub endpoint: Option<String>,
    /// Of an object store: its region.
    pub region: Option<String>,
    /// At most so many bytes a second come that nobody waits for; 0: no limit.
    pub rate: u64,
}

impl Head {
    /// Reads the first lines of such a file, whoever wrote them.
    ///
    /// # Errors
    /// `Corrupt` for what sealblk has not written; those of reading.
    pub fn read(from: impl Read) -> Result<Self> {
        let mut lines = BufReader::new(from).take((FIRST_LINE.len() + MAX_HEAD) as u64);
        let (mut first, mut second) = (String::new(), Vec::new());
        let of_another = || Error::new(Kind::Corrupt, "it is not what this sealblk writes");
        lines.read_line(&mut first).map_err(|_| of_another())?;
        lines.read_until(b'\n', &mut second)?;
        let head = serde_json::from_slice(&second).map_err(|_| of_another())?;
        if first == FIRST_LINE { Ok(head) } else { Err(of_another()) }
    }
}

/// How much of some layers has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HowFar {
    /// Bytes that have come, in whole blocks, as far as it is seen from the files.
    pub come: u64,
    /// Bytes that come in all.
    pub all: u64,
    /// Where from, in the words of who began it.
    pub from: String,
}

impl Catalog {
    /// The file of a layer that is still coming.
    pub fn coming_path(&self, layer: LayerId) -> PathBuf {
        self.root().layers().join(format!("{layer}{COMING}"))
    }

    /// What says what is to come of it.
    pub fn wanted_path(&self, layer: LayerId) -> PathBuf {
        self.root().layers().join(format!("{layer}{WANTED}"))
    }

    /// Whether a layer is still coming.
    pub fn is_coming(&self, layer: LayerId) -> bool {
        files::exists(&self.coming_path(layer)) && !files::exists(&self.layer_path(layer))
    }

    /// Those of `layers` that are still coming.
    pub fn coming_of(&self, layers: &[LayerRecord]) -> Vec<LayerRecord> {
        layers.iter().filter(|layer| self.is_coming(layer.id)).copied().collect()
    }

    /// The file of a layer of the store, whether it is still coming or not.
    pub(crate) fn file_of(&self, layer: LayerId) -> PathBuf {
        if self.is_coming(layer) { self.coming_path(layer) } else { self.layer_path(layer) }
    }

    /// As [`Catalog::file_of`], with what is there.
    pub(super) fn look_at(&self, layer: LayerId) -> (PathBuf, io::Result<Metadata>) {
        // It may get its other name in between.
        for path in [self.layer_path(layer), self.coming_path(layer)] {
            match path.symlink_metadata() {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                found => return (path, found),
            }
        }
        let path = self.layer_path(layer);
        let found = path.symlink_metadata();
        (path, found)
    }

    /// As [`Catalog::place`], for whoever can wait for what has not come: then the second value says that
    /// the layer is still coming.
    ///
    /// # Errors
    /// As for that.
    pub fn place_or_coming(&self, layer: &LayerRecord) -> Result<(Place, bool)> {
        match self.is_coming(layer.id) {
            true => Ok((Place::whole(self.coming_path(layer.id)), true)),
            false => self.place(layer).map(|place| (place, false)),
        }
    }

    /// # Errors
    /// `Busy`, naming the command that completes it, if one of `layers` is still coming.
    pub fn check_has_come(&self, layers: &[LayerRecord]) -> Result<()> {
        layers
            .iter()
            .find(|layer| self.is_coming(layer.id))
            .map_or(Ok(()), |layer| Err(self.has_not_come(layer.id)))
    }

    /// Why a layer that is still coming cannot be read.
    pub(crate) fn has_not_come(&self, layer: LayerId) -> Error {
        let from = self.wanted_head(layer).map_or_else(|_| "a place".into(), |head| head.url);
        let names = |id: &SnapshotId| {
            self.load_snapshot_claim(*id).is_ok_and(|it| it.layers().iter().any(|its| its.id == layer))
        };
        let whose = self.snapshot_ids().ok().and_then(|ids| ids.into_iter().find(names));
        let how = match whose {
            Some(id) => format!("\"sealblk snapshot complete {id}\" brings the rest"),
            None => "\"sealblk snapshot complete VOLUME\" brings the rest".into(),
        };
        Error::new(Kind::Busy, format!("layer {layer} is still coming from {from}: {how}"))
    }

    /// What says what is to come of a layer: its first lines, whoever wrote them.
    ///
    /// # Errors
    /// `Corrupt` for what sealblk has not written; those of the file system.
    pub fn wanted_head(&self, layer: LayerId) -> Result<Head> {
        let path = self.wanted_path(layer);
        let attempt = || format!("read {}", path.display());
        let file = files::open(&path).context(attempt)?;
        let head = Head::read(file).context(attempt)?;
        match head.layer == layer {
            true => Ok(head),
            false => Err(Error::new(Kind::Corrupt, "it is about another layer").context(attempt())),
        }
    }

    /// How much has come of those of `layers` that are still coming; none if there is no such layer.
    pub fn how_far(&self, layers: &[LayerRecord]) -> Option<HowFar> {
        let mut sum: Option<HowFar> = None;
        for layer in self.coming_of(layers) {
            let Ok(head) = self.wanted_head(layer.id) else { continue };
            let come = blocks_with_data(self, layer.id, layer.size).unwrap_or(0).min(head.blocks);
            let sum = sum.get_or_insert_with(HowFar::default);
            sum.come = sum.come.saturating_add(come.saturating_mul(BLOCK));
            sum.all = sum.all.saturating_add(head.blocks.saturating_mul(BLOCK));
            sum.from = head.url;
        }
        sum
    }

    /// Makes the file of a layer of which everything is still to come, or goes on with what an interrupted
    /// pull has left of it. `wanted` says what is to come. Both are durable then; the record that makes the
    /// layer somebody's is not there yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn make_coming(&self, layer: &LayerRecord, wanted: &[u8]) -> Result<()> {
        let folder = self.root().layers();
        create_dir_durable(&folder)?;
        let (whole, path) = (self.layer_path(layer.id), self.coming_path(layer.id));
        if files::exists(&whole) {
            files::rename(&whole, &path).context(|| format!("rename {}", whole.display()))?;
        }
        match path.symlink_metadata() {
            Ok(found) if found.len() == layer.size => {}
            Ok(_) => {
                files::remove(&path).context(|| format!("remove {}", path.display()))?;
                make_layer(&path, &folder, layer.size, false)?;
            }
            Err(_) => make_layer(&path, &folder, layer.size, false)?,
        }
        let path = self.wanted_path(layer.id);
        let write = || -> Result<()> {
            files::remove_if_there(&path)?;
            let mut file = files::make_for_owner_of(&folder, &path)?;
            file.write_all(wanted)?;
            Ok(file.sync_all()?)
        };
        write().context(|| format!("write {}", path.display()))?;
        sync_dir(&folder)
    }

    /// A layer that an interrupted pull has left, of which the rest was to come later, gets the name of one
    /// that is being filled now. Nobody has it: its record is not there yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn fill_now(&self, layer: LayerId) -> Result<()> {
        let (from, to) = (self.coming_path(layer), self.layer_path(layer));
        if self.is_coming(layer) {
            files::rename(&from, &to).context(|| format!("rename {} to {}", from.display(), to.display()))?;
        }
        let wanted = self.wanted_path(layer);
        files::remove_if_there(&wanted).context(|| format!("remove {}", wanted.display()))
    }

    /// Everything of a layer, whose file this is, has come, durably: from now on it is like any other.
    /// Returns whether it was still said to be coming.
    ///
    /// # Errors
    /// `NotFound` for a layer that was removed meanwhile; those of the file system.
    pub(crate) fn has_come(&self, layer: &LayerRecord, file: &File, _records: &RecordsLock) -> Result<bool> {
        let (from, to) = (self.coming_path(layer.id), self.layer_path(layer.id));
        let was_coming = self.is_coming(layer.id);
        if was_coming {
            files::rename(&from, &to).context(|| format!("rename {} to {}", from.display(), to.display()))?;
            sync_dir(&self.root().layers())?;
            // By what is open: whoever fills it may be confined, and reach no file.
            if let Err(e) = file.set_permissions(Permissions::from_mode(0o444)) {
                log::warn!("chmod 0444 {}: {e}", to.display());
            }
        } else if !files::exists(&to) {
            return Err(Error::new(Kind::NotFound, format!("layer {} was removed meanwhile", layer.id)));
        }
        let wanted = self.wanted_path(layer.id);
        files::remove_if_there(&wanted).context(|| format!("remove {}", wanted.display()))?;
        Ok(was_coming)
    }

    /// The snapshots in the place with this id that layers here are still coming from,
    /// each with such a layer.
    pub(crate) fn coming_from(&self, place: Uuid) -> Result<BTreeMap<SnapshotId, LayerId>> {
        let names = files::names_if_there(&self.root().layers())?;
        let layers = names.iter().filter_map(|name| name.to_str()).filter(|name| name.ends_with(WANTED));
        let coming = layers.filter_map(layer_of_name).filter(|layer| self.is_coming(*layer));
        let heads = coming.filter_map(|layer| self.wanted_head(layer).ok());
        Ok(heads.filter(|head| head.place == place).map(|head| (head.snapshot, head.layer)).collect())
    }

    /// What says what is to come of layers that have come: whoever ended that was cut off.
    pub(crate) fn wanted_of_nothing(&self) -> Result<Vec<PathBuf>> {
        let names = files::names_if_there(&self.root().layers())?;
        let layers = names.iter().filter_map(|name| name.to_str()).filter(|name| name.ends_with(WANTED));
        let layers = layers.filter_map(layer_of_name);
        let has_come = layers.filter(|layer| files::exists(&self.layer_path(*layer)));
        Ok(has_come.map(|layer| self.wanted_path(layer)).collect())
    }
}

/// The layer whose file has this name, while it is coming, or that this file is about.
pub(super) fn coming_of_name(name: &str) -> Option<&str> {
    name.strip_suffix(COMING).or_else(|| name.strip_suffix(WANTED))
}

/// How many blocks of a layer that is coming have anything in them.
fn blocks_with_data(catalog: &Catalog, layer: LayerId, size: u64) -> Result<u64> {
    let file = files::open_layer(&catalog.coming_path(layer), OFlag::O_RDONLY)?;
    let (mut blocks, mut at) = (0, 0);
    while let Some(data) = next_data_of(&file, at)?.filter(|_| at < size) {
        let (first, end) = (data.start.max(at) / BLOCK, data.end.div_ceil(BLOCK));
        blocks += end.saturating_sub(first);
        at = end * BLOCK;
    }
    Ok(blocks)
}
