//! What a volume or snapshot holds, in the clear, in a file outside the store.
//!
//! It needs the data keys, which the KMS gives out for it as for an attach. That it is done is in the audit log before
//! anything is written. The file gets its name when all of it is there; until then it has another, by which it is
//! removed if the export ends early.

use super::Store;
use super::reach::Reach;
use crate::audit::{AuditLog, Entry, Step};
use crate::backing;
use crate::base::root::sync_dir;
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::layout::Layout;
use crate::catalog::lock::{self, Purpose, VolumeLock};
use crate::catalog::metadata::{KeyOwner, encryption_context};
use crate::catalog::{Catalog, SnapshotId, VolumeId};
use crate::crypt::Dek;
use crate::disk::Disk;
use crate::disk::transfer::{self, Transfer};
use crate::events::Event;
use crate::image::lock::Access;
use crate::kms::Failure;
use crate::volume::layers;
use crate::volume::open::{Opening, Taken, Unwrap, shape};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use crate::disk::transfer::{Watch, interrupted};

/// What is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A volume that nobody has attached.
    Volume(VolumeId),
    /// A snapshot.
    Snapshot(SnapshotId),
}

/// Where to.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The file, which gets mode 0600.
    pub path: &'a Path,
    /// Whether a file of that name may be replaced.
    pub replace: bool,
}

/// Writes what `what` holds, in the clear and without zeros, into a file. Reports an
/// `exportVolume` or `exportSnapshot` event; returns the size.
///
/// # Errors
/// `Busy` if there is such a file, or the volume is attached; `NotFound`; `Corrupt` for what an attach would refuse; the
/// KMS's; those of the file system; what `watch` returns. There is no new file then.
pub fn export(store: &Store, what: What, target: Target<'_>, watch: Watch<'_>) -> Result<u64> {
    let (catalog, unwrap) = (&store.catalog(), |owner, key: &_| store.unwrap(owner, key));
    let started = Timestamp::now();
    let attempt = || match what {
        What::Volume(id) => format!("export {id}"),
        What::Snapshot(id) => format!("export {id}"),
    };
    check_target(target).context(attempt)?;
    let (volume, snapshot) = match what {
        What::Volume(id) => (id, None),
        What::Snapshot(id) => (catalog.load_snapshot(id).context(attempt)?.volume(), Some(id)),
    };
    let done = Source::open(catalog, what, &unwrap).and_then(|source| {
        let size = source.layout.geometry().size();
        source.record(catalog, snapshot, target.path)?;
        source.copy(target, watch)?;
        Ok(size)
    });
    let result = done.as_ref().map(drop).map_err(|failure| failure.cause.clone());
    store.events().record(&Event::export(volume, snapshot, result, started));
    done.map_err(|failure| failure.error.context(attempt()))
}

/// Something that can be read, proved right as an attach would.
struct Source {
    layout: Layout,
    owner: KeyOwner,
    backing: Arc<dyn backing::Backing>,
    disk: Arc<Disk>,
    /// The volume's; a snapshot's layers do not change.
    _lock: Option<VolumeLock>,
}

impl Source {
    fn open(catalog: &Catalog, what: What, unwrap: Unwrap<'_>) -> Result<Self, Failure> {
        match what {
            What::Volume(id) => Self::volume(catalog, id, unwrap),
            What::Snapshot(id) => Self::snapshot(catalog, id, unwrap),
        }
    }

    fn volume(catalog: &Catalog, id: VolumeId, unwrap: Unwrap<'_>) -> Result<Self, Failure> {
        let Reach::Mine(lock) = Reach::of(catalog, id, Purpose::Export)? else {
            return Err(attached(catalog, id)?.into());
        };
        let Taken { lock, opened } = Taken::open(catalog, lock, Opening::Read, Access::Read, unwrap)?;
        let layout = opened.metadata.layout().clone();
        Ok(Self::over(layout, KeyOwner::Volume(id), &opened.layers, Some(lock))?)
    }

    fn snapshot(catalog: &Catalog, id: SnapshotId, unwrap: Unwrap<'_>) -> Result<Self, Failure> {
        let snapshot = catalog.load_snapshot(id)?;
        catalog.check_files(&id, snapshot.layers())?;
        let deks = unwrap_all(snapshot.layout(), snapshot.key_owner(), unwrap)?;
        snapshot.verify(&deks)?;
        let layers = layers::open_all(catalog, snapshot.layout(), &deks, Access::Read)?;
        Ok(Self::over(snapshot.layout().clone(), snapshot.key_owner(), &layers, None)?)
    }

    fn over(
        layout: Layout,
        owner: KeyOwner,
        layers: &[layers::Layer],
        lock: Option<VolumeLock>,
    ) -> Result<Self> {
        let chain = layers::chain(layers);
        let backing = chain.backing.clone();
        let disk = Disk::layered(shape(layout.geometry(), true), "", chain).context(|| "open its layers")?;
        Ok(Source { layout, owner, backing, disk: Arc::new(disk), _lock: lock })
    }

    /// Notes for each data key, durably, what it is going to be used for.
    fn record(&self, catalog: &Catalog, snapshot: Option<SnapshotId>, file: &Path) -> Result<()> {
        let log = AuditLog::new(catalog.root())?;
        let context = encryption_context(self.owner);
        for key in self.layout.keys() {
            let entry = Entry::dek(Step::Export, context.pairs(), &key.provider, &key.wrapped.key_id);
            let entry = entry.with("file", file.display().to_string());
            let entry = match snapshot {
                Some(id) => entry.with("snapshotId", id.to_string()),
                None => entry,
            };
            log.append(&entry, None)?;
        }
        Ok(())
    }

    /// Copies everything into the file, and gives it its name.
    fn copy(&self, target: Target<'_>, watch: Watch<'_>) -> Result<()> {
        let partial = Partial::new(target)?;
        let size = self.layout.geometry().size();
        let write = |e: std::io::Error| Error::from(e).context(format!("write {}", target.path.display()));
        partial.file.set_len(size).map_err(write)?;
        let mut transfer = Transfer::new(&self.disk)?;
        transfer::each_chunk(size, &|from| self.next_data(from), watch, &mut |at, chunk| {
            transfer.read(at, chunk)?;
            transfer::runs(chunk).into_iter().try_for_each(|(start, len)| {
                let run = &chunk[start..start + len];
                partial.file.write_all_at(run, at + start as u64).map_err(write)
            })
        })?;
        partial.file.sync_all().map_err(write)?;
        partial.finish().context(|| format!("name {}", target.path.display()))
    }

    /// The next bytes that any layer may have.
    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let mut next: Option<Range<u64>> = None;
        for layer in 0..=self.backing.below().len() {
            let found = self.backing.next_data(layer, from).context(|| "look for data in the layers")?;
            next = next.into_iter().chain(found).min_by_key(|data| data.start);
        }
        Ok(next)
    }
}

fn unwrap_all(layout: &Layout, owner: KeyOwner, unwrap: Unwrap<'_>) -> Result<Vec<Dek>, Failure> {
    layout.keys().iter().map(|key| unwrap(owner, key)).collect()
}

/// What to do about a volume that is attached.
fn attached(catalog: &Catalog, id: VolumeId) -> Result<Error> {
    let e = lock::busy(id, &catalog.held(id)?);
    let hint = format!("make a snapshot (\"sealblk snapshot create {id}\") and export that, or detach it");
    let message = format!("{e}; {hint}");
    Ok(e.reworded(message))
}

/// # Errors
/// `Busy` for a file that is there and is not to be replaced; `Usage` for what is no file.
fn check_target(target: Target<'_>) -> Result<()> {
    let path = target.path.display();
    match std::fs::symlink_metadata(target.path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::from(e).context(format!("look at {path}"))),
        Ok(found) if !found.is_file() => {
            Err(Error::new(Kind::Usage, format!("{path} is not a file; name one that is to be made")))
        }
        Ok(_) if target.replace => Ok(()),
        Ok(_) => Err(Error::new(Kind::Busy, format!("there is a {path} already; --force replaces it"))),
    }
}

/// A file that has not its name yet. It is removed when this is dropped.
struct Partial<'a> {
    target: Target<'a>,
    path: PathBuf,
    file: File,
}

impl<'a> Partial<'a> {
    fn new(target: Target<'a>) -> Result<Self> {
        let Some(name) = target.path.file_name() else {
            return Err(Error::new(Kind::Usage, format!("{} is no file's name", target.path.display())));
        };
        let mut partial = name.to_os_string();
        partial.push(format!(".{}.partial", uuid::Uuid::new_v4().simple()));
        let path = target.path.with_file_name(partial);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        Ok(Partial { target, file: file.context(|| format!("make {}", path.display()))?, path })
    }

    /// Gives it its name, durably.
    fn finish(&self) -> Result<()> {
        let flags = if self.target.replace { RenameFlags::empty() } else { RenameFlags::RENAME_NOREPLACE };
        match renameat2(AT_FDCWD, &self.path, AT_FDCWD, self.target.path, flags) {
            // This file system cannot say "unless there is one"; it was looked at in the beginning.
            Err(Errno::EINVAL) if !self.target.replace => {
                check_target(self.target)?;
                std::fs::rename(&self.path, self.target.path)?;
            }
            renamed => renamed?,
        }
        let folder = self.target.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        sync_dir(folder.unwrap_or(Path::new(".")))
    }
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.path) {
            // It has its name.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => log::error!("{} is left, in the clear: {e}", self.path.display()),
            Ok(()) => {}
        }
    }
}
