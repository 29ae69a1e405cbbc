//! What a volume or snapshot holds, in the clear, in a file outside the store ([`file`]), on a block device
//! ([`device`]), or on standard output ([`stream`]).
//!
//! It needs the data keys, which the KMS gives out for it as for an attach. That it is done is in the audit
//! log before anything is written.

mod device;
mod file;
mod stream;

use self::device::Device;
use self::file::NewFile;
use self::stream::Stream;
use super::Store;
use super::need::{self, Budget, Gate};
use super::reach::Reach;
use crate::audit::{AuditLog, Entry, Step};
use crate::backing;
use crate::base::root::parent_of;
use crate::base::space::Reserve;
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::layout::Layout;
use crate::catalog::lock::{self, Purpose, VolumeLock};
use crate::catalog::metadata::{KeyOwner, encryption_context};
use crate::catalog::{Catalog, SnapshotId, VolumeId};
use crate::disk::Disk;
use crate::disk::transfer::{self, Transfer};
use crate::events::Event;
use crate::image::lock::Access;
use crate::kms::{Failure, KmsKey};
use crate::volume::layers;
use crate::volume::open::{Deks, Opening, Taken, Unwrap, shape};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use zeroize::Zeroizing;

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
pub enum Target<'a> {
    /// A file, which is made and gets mode 0600, or a block device.
    Path {
        /// Its path.
        path: &'a Path,
        /// Whether a file of that name may be replaced, or the device overwritten.
        replace: bool,
    },
    /// Standard output.
    StandardOutput,
}

/// Writes what `what` holds, in the clear: into a new file, without zeros; or whole, onto a device or
/// standard output. Reports an `exportVolume` or `exportSnapshot` event; returns the size.
///
/// # Errors
/// `Busy` if there is such a file, the device is in use, or the volume is attached; `NoSpace` if a file's
/// file system has too little; `Usage` for what cannot be written to; `NotFound`; `Corrupt` for what an
/// attach would refuse; the KMS's; those of the file system; what `watch` says. There is no new file then; a
/// device or standard output can have a part of the data.
pub fn export(
    store: &Store,
    what: What,
    target: Target<'_>,
    budget: Budget,
    watch: Watch<'_>,
) -> Result<u64> {
    let catalog = &store.catalog();
    let started = Timestamp::now();
    let attempt = || match what {
        What::Volume(id) => format!("export {id}"),
        What::Snapshot(id) => format!("export {id}"),
    };
    let mut sink = Sink::open(target).context(attempt)?;
    let (volume, snapshot) = match what {
        What::Volume(id) => (id, None),
        What::Snapshot(id) => (catalog.load_snapshot(id).context(attempt)?.volume(), Some(id)),
    };
    let done = Source::open(store, what).and_then(|source| {
        let size = source.layout.geometry().size();
        sink.check_size(size)?;
        let budget = budget_of(store, target, budget)?;
        if let (Sink::File(_), Target::Path { path, .. }) = (&sink, target) {
            let need = transfer::bytes_of(size, &|from| source.next_data(from))?;
            budget.check_at(parent_of(path), need)?;
        }
        source.record(catalog, snapshot, &sink.name(target))?;
        source.copy(&mut sink, budget.reserve, watch)?;
        Ok(size)
    });
    let result = done.as_ref().map(drop).map_err(|failure| failure.cause.clone());
    store.events().record(&Event::export(volume, snapshot, result, started));
    done.map_err(|failure| failure.error.context(attempt()))
}

/// What an export is written to.
enum Sink<'a> {
    File(NewFile<'a>),
    Device(Device),
    Stream(Stream),
}

/// What is written whole, zeros included, from one end to the other.
trait Whole {
    /// # Errors
    /// `Usage` for a disk that does not go in.
    fn check_size(&self, size: u64) -> Result<()>;

    /// Writes the next bytes, which are at `at`. `watch` is asked whether to go on where this can take long.
    fn write(&mut self, at: u64, bytes: &[u8], watch: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// The same for bytes that are zeros.
    fn zeros(&mut self, range: Range<u64>, watch: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// Makes everything durable, where that is possible.
    fn finish(&mut self) -> Result<()>;

    /// What is to be known if it was written only in part.
    fn after_early_end(&self) -> String;
}

impl<'a> Sink<'a> {
    /// # Errors
    /// `Busy` for a file that is there and is not to be replaced, and a device that is in use; `Usage` for
    /// what is neither.
    fn open(target: Target<'a>) -> Result<Self> {
        let Target::Path { path, replace } = target else {
            return Ok(Sink::Stream(Stream::standard_output()?));
        };
        let there = match path.symlink_metadata() {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Sink::File(NewFile::new(path, replace)?)),
            found => found.context(|| format!("look at {}", path.display()))?,
        };
        // A symbolic link to a device is one of its names; one to a file would be replaced itself.
        let is_device = path.metadata().is_ok_and(|found| found.file_type().is_block_device());
        match there.file_type() {
            _ if is_device => Ok(Sink::Device(Device::open(path, replace)?)),
            kind if kind.is_file() => Ok(Sink::File(NewFile::new(path, replace)?)),
            kind => {
                let way = match kind.is_fifo() || kind.is_char_device() || path.starts_with("/dev") {
                    true => "write to standard output (\"-\"), and let the shell open it (\"> FILE\")",
                    false => "name one that is to be made, or a block device",
                };
                Err(Error::new(Kind::Usage, format!("{} is not a file; {way}", path.display())))
            }
        }
    }

    fn check_size(&self, size: u64) -> Result<()> {
        match self {
            Sink::File(_) => Ok(()),
            Sink::Device(device) => device.check_size(size),
            Sink::Stream(stream) => stream.check_size(size),
        }
    }

    /// Its name in the audit log.
    fn name(&self, target: Target<'_>) -> String {
        match (self, target) {
            (Sink::Stream(stream), _) => stream.name(),
            (_, Target::Path { path, .. }) => path.display().to_string(),
            (_, Target::StandardOutput) => "standard output".into(),
        }
    }
}

/// Something that can be read, proved right as an attach would.
struct Source {
    layout: Layout,
    owner: KeyOwner,
    /// The KMS keys that have given its data keys.
    unwrapped_by: Vec<KmsKey>,
    backing: Arc<dyn backing::Backing>,
    disk: Arc<Disk>,
    /// The volume's; a snapshot's layers do not change as long as its record is there.
    _lock: Option<VolumeLock>,
    snapshot: Option<(Catalog, SnapshotId)>,
}

impl Source {
    fn open(store: &Store, what: What) -> Result<Self, Failure> {
        match what {
            What::Volume(id) => Self::volume(store, id),
            What::Snapshot(id) => Self::snapshot(store, id),
        }
    }

    fn volume(store: &Store, id: VolumeId) -> Result<Self, Failure> {
        let catalog = store.catalog();
        let Reach::Mine(lock) = Reach::of(&catalog, id, Purpose::Export)? else {
            return Err(attached(&catalog, id)?.into());
        };
        catalog.check_has_come(catalog.load(id)?.layers())?;
        let Taken { lock, opened } = store.open_as(lock, Opening::Read, Access::Read)?;
        let layout = opened.metadata.layout().clone();
        Ok(Self::over(layout, (KeyOwner::Volume(id), opened.unwrapped_by), &opened.layers, Some(lock))?)
    }

    fn snapshot(store: &Store, id: SnapshotId) -> Result<Self, Failure> {
        let catalog = store.catalog();
        let snapshot = catalog.load_snapshot(id)?;
        store.settings().check_encrypted(id, snapshot.is_encrypted())?;
        catalog.check_files(&id, snapshot.layers())?;
        catalog.check_has_come(snapshot.layers())?;
        let unwrap = |owner, key: &_| store.unwrap(owner, key);
        let deks = unwrap_all(snapshot.layout(), snapshot.key_owner(), &unwrap)?;
        snapshot.verify(&deks)?;
        let layers = layers::open_all(&catalog, snapshot.layout(), &deks, Access::Read)?;
        let unwrapped_by = deks.into_iter().map(|dek| dek.by).collect();
        let keys = (snapshot.key_owner(), unwrapped_by);
        let source = Self::over(snapshot.layout().clone(), keys, &layers, None)?;
        Ok(Source { snapshot: Some((catalog, id)), ..source })
    }

    fn over(
        layout: Layout,
        (owner, unwrapped_by): (KeyOwner, Vec<KmsKey>),
        layers: &[layers::Layer],
        lock: Option<VolumeLock>,
    ) -> Result<Self> {
        let chain = layers::chain(layers);
        let backing = chain.backing.clone();
        let disk = Disk::layered(shape(layout.geometry(), true), "", chain).context(|| "open its layers")?;
        Ok(Source { layout, owner, unwrapped_by, backing, disk: Arc::new(disk), _lock: lock, snapshot: None })
    }

    /// Notes for each data key, durably, what it is going to be used for.
    fn record(&self, catalog: &Catalog, snapshot: Option<SnapshotId>, file: &str) -> Result<()> {
        let log = AuditLog::new(catalog.root())?;
        let context = encryption_context(self.owner);
        for KmsKey { provider, key_id } in &self.unwrapped_by {
            let entry = Entry::dek(Step::Export, context.pairs(), provider, key_id);
            let entry = entry.with("file", file);
            let entry = match snapshot {
                Some(id) => entry.with("snapshotId", id.to_string()),
                None => entry,
            };
            log.append(&entry, None)?;
        }
        Ok(())
    }

    /// Copies everything.
    fn copy(&self, sink: &mut Sink<'_>, reserve: Reserve, watch: Watch<'_>) -> Result<()> {
        match sink {
            Sink::File(file) => self.copy_to_file(file, reserve, watch),
            Sink::Device(device) => self.copy_whole(device, watch),
            Sink::Stream(stream) => self.copy_whole(stream, watch),
        }
    }

    fn copy_to_file(&self, file: &mut NewFile<'_>, reserve: Reserve, watch: Watch<'_>) -> Result<()> {
        let size = self.layout.geometry().size();
        file.begin(size)?;
        let mut gate = Gate::new(file.folder(), reserve);
        let watch = &mut |done, total| {
            watch(done, total)?;
            if done < total { gate.wait(&mut || watch(done, total)) } else { Ok(()) }
        };
        let mut transfer = Transfer::new(&self.disk)?;
        transfer::each_chunk(size, &|from| self.next_data(from), watch, &mut |at, chunk| {
            transfer.read(at, chunk)?;
            transfer::runs(chunk)
                .into_iter()
                .try_for_each(|(start, len)| file.write(at + start as u64, &chunk[start..start + len]))
        })?;
        self.check_still_there()?;
        file.finish()
    }

    /// Of a snapshot that was deleted meanwhile, a part may have been given back before it was read.
    ///
    /// # Errors
    /// `NotFound`.
    fn check_still_there(&self) -> Result<()> {
        let Some((catalog, id)) = &self.snapshot else { return Ok(()) };
        catalog.load_snapshot(*id).map(drop)
    }

    fn copy_whole(&self, out: &mut dyn Whole, watch: Watch<'_>) -> Result<()> {
        let mut is_interrupted = false;
        let mut watch = |done, total| watch(done, total).inspect_err(|_| is_interrupted = true);
        let copied = self.copy_from_end_to_end(out, &mut watch);
        copied.map_err(|e| match is_interrupted {
            true => Error::new(e.kind(), format!("it was interrupted; {}", out.after_early_end())),
            false => Error::new(e.kind(), format!("{e}; {}", out.after_early_end())),
        })
    }

    fn copy_from_end_to_end(&self, out: &mut dyn Whole, watch: Watch<'_>) -> Result<()> {
        let size = self.layout.geometry().size();
        let mut transfer = Transfer::new(&self.disk)?;
        let mut room = Zeroizing::new(vec![0; transfer::CHUNK]);
        let mut data = self.next_data(0)?;
        let mut at = 0;
        while at < size {
            watch(at, size)?;
            let end = size.min(at + transfer::CHUNK as u64);
            if data.as_ref().is_some_and(|data| data.end <= at) {
                data = self.next_data(at)?;
            }
            let mut goes_on = || watch(at, size);
            if data.as_ref().is_some_and(|data| data.start < end) {
                let chunk = &mut room[..(end - at) as usize];
                transfer.read(at, chunk)?;
                out.write(at, chunk, &mut goes_on)?;
            } else {
                out.zeros(at..end, &mut goes_on)?;
            }
            at = end;
        }
        watch(size, size)?;
        self.check_still_there()?;
        out.finish()
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

/// What may be used where an export goes. The settings' reserve is for the guests of the store: elsewhere
/// everything may be used.
fn budget_of(store: &Store, target: Target<'_>, budget: Budget) -> Result<Budget> {
    let Target::Path { path, .. } = target else { return Ok(budget) };
    let folder = parent_of(path);
    let device = folder.metadata().context(|| format!("look at {}", folder.display()))?.dev();
    let is_the_store_s = need::place(store.root()).metadata().is_ok_and(|there| there.dev() == device);
    Ok(if is_the_store_s { budget } else { Budget { reserve: Reserve::NONE, ..budget } })
}

fn unwrap_all(layout: &Layout, owner: KeyOwner, unwrap: Unwrap<'_>) -> Result<Deks, Failure> {
    layout.keys().iter().map(|key| unwrap(owner, key)).collect()
}

/// What to do about a volume that is attached.
fn attached(catalog: &Catalog, id: VolumeId) -> Result<Error> {
    let e = lock::busy(id, &catalog.held(id)?);
    let hint = format!("make a snapshot (\"sealblk snapshot create {id}\") and export that, or detach it");
    let message = format!("{e}; {hint}");
    Ok(e.reworded(message))
}
