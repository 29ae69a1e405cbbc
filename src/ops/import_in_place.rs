//! A raw image that becomes a volume where it lies: at once, whatever its size.
//!
//! The file gets a second name, a layer's; the volume has it as its lowest layer, in the clear, below an
//! empty top under a new data key, and is marked to be copied up ([`crate::disk::hydrate`]). When the volume
//! is there, the file's first name goes. So at every moment one of the two names is there, durably: the image
//! is never lost, and never without a name. `docs/format.md` argues the steps.
//!
//! Nothing could prove a layer in the clear, so the volume is sealed as it is made.

use crate::base::root::offered::Offered;
use crate::base::root::{create_dir_durable, files, sync_dir};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::layout::Layout;
use crate::catalog::metadata::{LayerRecord, Metadata};
use crate::catalog::{Catalog, LayerId};
use crate::events::EventLog;
use crate::image::lock::{Access, ImageLock};
use crate::ops::import_copy::{Key, unwrap_all};
use crate::ops::make::{self, Wanted};
use crate::ops::need;
use std::fs::File;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};

/// The file of an image that is to become a layer: nobody writes to it as far as one can tell, and it can
/// have a second name in the store.
pub(super) struct Candidate {
    path: PathBuf,
    file: File,
    len: u64,
    lock: ImageLock,
}

impl Candidate {
    /// Looks at the file of an image.
    ///
    /// # Errors
    /// `Usage` for what is no file, is the store's, is on another file system, or has several names already;
    /// `Busy` if somebody has it open for writing, QEMU has it open at all, or a loop device has it.
    pub(super) fn new(catalog: &Catalog, image: Offered) -> Result<Self> {
        let Offered { file, path } = image;
        let lock = ImageLock::of(&file, &path, Access::ReadWrite)?;
        let found = file.metadata()?;
        let layers = catalog.root().layers();
        create_dir_durable(&layers)?;
        let usage = |message: String| Err(Error::new(Kind::Usage, message));
        if !found.is_file() {
            return usage(
                "only a file can become a layer where it lies; leave out --in-place to copy it".into(),
            );
        }
        if path.starts_with(catalog.root().path()) {
            return usage("it lies in the store itself".into());
        }
        if found.dev() != files::folder(&layers)?.metadata()?.dev() {
            return usage(format!(
                "it is on another file system than {}; leave out --in-place to copy it, or move it there \
                 first",
                layers.display()
            ));
        }
        if found.nlink() != 1 {
            return usage(
                "the file has another name (a hard link), by which it could be changed. If an import in \
                 place was cut off, \"sealblk volume list\" shows the volume, and this name can be removed; \
                 otherwise \"sealblk gc\" removes the other one"
                    .into(),
            );
        }
        if let Some(device) = loop_device_of(&path) {
            let message = format!("{device} has it; detach that first (\"losetup --detach\")");
            return Err(Error::new(Kind::Busy, message));
        }
        if !lock.check_nobody_writes(&path)? {
            log::warn!(
                "whether anybody has {} open for writing cannot be told here; whoever has could change what \
                 the guest reads",
                path.display()
            );
        }
        Ok(Candidate { path, file, len: found.len(), lock })
    }

    /// How many bytes are going to be copied up.
    pub(super) fn need(&self) -> Result<u64> {
        need::of_file(&self.file).context(|| format!("look at {}", self.path.display()))
    }

    /// Gives the file its second name, durably, with all that was ever written to it.
    fn link(&self, catalog: &Catalog, layer: LayerId) -> Result<()> {
        let to = catalog.layer_path(layer);
        self.file.sync_all().context(|| format!("sync {}", self.path.display()))?;
        files::link(&self.file, &self.path, &to)
            .context(|| format!("link {} to {}", self.path.display(), to.display()))?;
        if self.file.metadata()?.len() != self.len {
            return Err(Error::new(Kind::Busy, format!("{} is being changed", self.path.display())));
        }
        // Whoever has opened it since the first look is seen here, before there is a volume.
        self.lock.check_nobody_writes(&self.path)?;
        sync_dir(&catalog.root().layers())
    }

    /// Takes the file's first name away: it is the store's from now on.
    fn hand_over(&self, catalog: &Catalog, metadata: &Metadata) -> Result<()> {
        let owner = files::folder(&catalog.root().layers())?.metadata()?;
        if self.file.metadata()?.uid() != owner.uid() {
            fchown(&self.file, Some(owner.uid()), Some(owner.gid()))?;
        }
        catalog.mark_frozen(&metadata.layers()[1..]);
        files::remove_name_of(&self.file, &self.path)?;
        sync_dir(self.path.parent().unwrap_or(Path::new("/")))
    }
}

/// Makes a volume whose lowest layer is the file of `image`, which is the store's afterwards.
/// Reports a `createVolume` event.
///
/// # Errors
/// As [`make::create`], `Usage` for a file that is not whole sectors. The file is as it was then.
pub(super) fn import(
    catalog: &Catalog,
    events: &EventLog,
    wanted: &Wanted,
    image: &Candidate,
    key: Key<'_>,
) -> Result<Metadata> {
    check_length(image, wanted)?;
    let lowest = LayerRecord { id: LayerId::random(), key: None, masked: false, size: image.len };
    let prepare = |id| {
        let layout = Layout {
            geometry: wanted.geometry,
            keys: vec![key.wrapping.generate(id)?],
            layers: vec![LayerRecord::new_top(Some(0), wanted.geometry.size()), lowest],
            hydrate: Some(lowest.id),
        };
        let mut metadata = Metadata::with_layout(id, wanted.name.clone(), layout, None);
        metadata.seal(&unwrap_all(&metadata, Some(key))?);
        Ok(metadata)
    };
    let made = make::create_filled(catalog, events, wanted, prepare, |_| image.link(catalog, lowest.id))?;
    if let Err(e) = image.hand_over(catalog, &made) {
        log::error!(
            "{} is there, but {} is still a second name of its layer: {e}; remove that name, and do not \
             write by it",
            made.id(),
            image.path.display()
        );
    }
    Ok(made)
}

fn check_length(image: &Candidate, wanted: &Wanted) -> Result<()> {
    let unit = u64::from(wanted.geometry.sector_size().bytes());
    if image.len > wanted.geometry.size() {
        return Err(Error::new(Kind::Busy, format!("{} is being changed", image.path.display())));
    }
    if image.len.is_multiple_of(unit) {
        return Ok(());
    }
    let message = format!(
        "it has {} bytes, which are not whole sectors of {unit}; \"truncate --size=%{unit}\" adds zeros to \
         it",
        image.len
    );
    Err(Error::new(Kind::Usage, message))
}

/// The loop device that has this file, if there is one.
fn loop_device_of(path: &Path) -> Option<String> {
    let devices = std::fs::read_dir("/sys/block").ok()?;
    devices.flatten().find_map(|device| {
        let backing = std::fs::read_to_string(device.path().join("loop/backing_file")).ok()?;
        let is_it = Path::new(backing.trim_end_matches('\n')) == path;
        is_it.then(|| format!("/dev/{}", device.file_name().display()))
    })
}
