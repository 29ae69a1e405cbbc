//! A block device, or the export of an NBD server, that is to become a volume's layer: whether it may be
//! taken, and how it becomes zeros.
//!
//! An all-zero sector of a layer means "not in this layer", so a device is taken only if every byte of it is
//! zero: it is read from one end to the other, or made zeros. Whatever else a device may hold (a file system,
//! a partition table, a part of LVM, another volume) is therefore found without a list of what there is. The
//! short list in [`signature`] only gives a refusal its words; nobody's data depend on it, and no other
//! program has to be there.

mod name;
mod signature;
mod users;

use crate::backing::device::{self, BLOCK, DATA_START};
use crate::backing::medium::Medium;
use crate::backing::nbd::{Address, Export, Right};
use crate::base::root::offered::Offered;
use crate::base::{Context, Error, Kind, Result, size};
use crate::catalog::Catalog;
use crate::catalog::device::header::Header;
use crate::catalog::references::named_layers;
use crate::catalog::store_locks::RecordsLock;
use crate::disk::transfer::Watch;
use crate::image::lock::{Access, ImageLock};
use nix::errno::Errno;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

pub use name::Name;

/// A device that nobody else can take meanwhile, and that is to hold a layer.
pub struct Candidate {
    name: Name,
    medium: Arc<dyn Medium + Send + Sync>,
    len: u64,
    room: u64,
    logical_block: u64,
    /// Keep others out, as far as that can be.
    _claims: Option<(ImageLock, File)>,
}

impl fmt::Debug for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.path().display().fmt(f)
    }
}

impl Candidate {
    /// Opens the device that `path` means, or the export if that is an address, and looks whether it could
    /// hold a layer; what is on it is not looked at.
    ///
    /// # Errors
    /// `Busy` for a device that is mounted, or that another program uses; `Usage` for what is no device, or
    /// too small; `Unsupported` for one with blocks of more than 4096 bytes; those of the NBD server.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_or_make(path, None)
    }

    /// As [`Candidate::open`]; an RBD image that is not there is made, with room for a
    /// volume of `size` bytes.
    ///
    /// # Errors
    /// As for that.
    pub fn open_or_make(path: &Path, size: Option<u64>) -> Result<Self> {
        let address = path.to_str().filter(|text| Address::is_meant(text)).map(str::parse).transpose()?;
        match address {
            Some(address) => Self::open_export(&address, size),
            None => Self::open_device(path),
        }
    }

    fn open_export(address: &Address, size: Option<u64>) -> Result<Self> {
        let open = || {
            let export = match size {
                Some(size) => {
                    let whole =
                        size.checked_next_multiple_of(BLOCK).and_then(|it| it.checked_add(DATA_START));
                    let whole = whole.ok_or_else(|| Error::new(Kind::Usage, "so large nothing can be"))?;
                    Export::made_at(address, whole)?
                }
                None => Export::at(address, Right::Write)?,
            };
            let terms = export.terms();
            if terms.is_read_only() {
                return Err(Error::new(Kind::Usage, "the server lets nobody write there"));
            }
            let logical_block = u64::from(terms.unit());
            Self::of(Name::of_export(address), export, logical_block, None)
        };
        open().context(|| format!("take {address}"))
    }

    fn open_device(path: &Path) -> Result<Self> {
        let open = || {
            let Offered { file: claim, path: real } = Offered::open(path).map_err(|e| match e.kind() {
                Kind::Busy => users::in_use(path).unwrap_or(e),
                _ => e,
            })?;
            if !device::is_device(&claim)? {
                let message = "it is a file, and no block device; volumes lie in files of the store without \
                               --device";
                return Err(Error::new(Kind::Usage, message));
            }
            let lock = ImageLock::of(&claim, &real, Access::ReadWrite)?;
            let mut how = OpenOptions::new();
            let how = how.read(true).write(true).custom_flags(libc::O_DIRECT);
            // The same device, and not another one that has its name by now.
            let file =
                how.open(format!("/proc/self/fd/{}", claim.as_raw_fd())).map_err(may_not_be_written)?;
            let logical_block = device::logical_block(&file);
            Self::of(Name::of(path, &real)?, Arc::new(file), logical_block, Some((lock, claim)))
        };
        open().context(|| format!("take {}", path.display()))
    }

    fn of(
        name: Name,
        medium: Arc<dyn Medium + Send + Sync>,
        logical_block: u64,
        claims: Option<(ImageLock, File)>,
    ) -> Result<Self> {
        let (len, room) = (medium.length()?, device::room(&*medium)?);
        if logical_block > BLOCK {
            let message = format!("its blocks have {logical_block} bytes, and no more than {BLOCK} can be");
            return Err(Error::new(Kind::Unsupported, message));
        }
        if room < BLOCK {
            let message = format!(
                "it has {len} bytes, and a volume on a device takes 1 MiB for its header, and {BLOCK} bytes \
                 at least behind that"
            );
            return Err(Error::new(Kind::Usage, message));
        }
        Ok(Candidate { name, medium, len, room, logical_block, _claims: claims })
    }

    /// The name by which it is going to be known.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The device, open for reading and writing past the page cache.
    pub(super) fn medium(&self) -> &dyn Medium {
        &*self.medium
    }

    /// What the device says of itself, if it has a header.
    ///
    /// # Errors
    /// `Corrupt` for one that is damaged; those of the device.
    pub(super) fn header(&self) -> Result<Option<Header>> {
        Header::read(self.medium())
    }

    /// How many bytes it has for a volume.
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Bytes of its logical blocks.
    pub fn logical_block(&self) -> u64 {
        self.logical_block
    }

    /// Looks whether a volume of `size` bytes can lie on it.
    ///
    /// # Errors
    /// `Usage`, with the sizes that can be.
    pub fn check_size(&self, size: u64) -> Result<()> {
        let shown = self.name.path().display();
        if size > self.room {
            let room = self.room;
            let message = format!(
                "{shown} has room for a volume of {room} bytes ({}), behind its header of 1 MiB",
                size::about(room)
            );
            return Err(Error::new(Kind::Usage, message));
        }
        if !size.is_multiple_of(BLOCK) {
            let below = size - size % BLOCK;
            let message = format!(
                "{size} bytes are not whole blocks of {BLOCK} bytes, which a volume on a device consists of; \
                 use {} or {}",
                below.max(BLOCK),
                (below + BLOCK).min(self.room)
            );
            return Err(Error::new(Kind::Usage, message));
        }
        Ok(())
    }

    /// Sees to it that every byte of the device is zero: with `wipe`, makes it so; without, reads all of it.
    /// `watch` is told how far that is. One that was interrupted goes on with what is not zero yet.
    ///
    /// # Errors
    /// `Busy` for a device that a volume of this store lies on, and, without `wipe`, for one that holds
    /// anything; what `watch` says; those of the device.
    pub fn make_zeros(&self, catalog: &Catalog, wipe: bool, watch: Watch<'_>) -> Result<()> {
        let mut check = || {
            self.check_header(catalog, wipe)?;
            if wipe {
                return device::wipe(self.medium(), 0..self.len, &mut |done, total| watch(done, total));
            }
            device::each_step(0..self.len, &mut |step| {
                watch(step.start, self.len)?;
                match self.first_data(step)? {
                    None => Ok(()),
                    Some(at) => Err(self.not_empty(at)),
                }
            })?;
            watch(self.len, self.len)
        };
        check().context(|| format!("take {}", self.name.path().display()))
    }

    /// Where the first byte is that is not zero. What the medium itself says is empty is not read.
    fn first_data(&self, step: Range<u64>) -> Result<Option<u64>> {
        let mut at = step.start;
        while at < step.end {
            let Some(run) = self.medium().next_data(at..step.end)? else { return Ok(None) };
            // Whole blocks, as transfers past the page cache are.
            let start = (run.start - run.start % BLOCK).max(step.start);
            let end = run.end.next_multiple_of(BLOCK).min(step.end);
            if let Some(found) = device::first_data(self.medium(), start..end)? {
                return Ok(Some(found));
            }
            at = end;
        }
        Ok(None)
    }

    /// Whether a volume lies there, of this store or of another one.
    fn check_header(&self, catalog: &Catalog, wipe: bool) -> Result<()> {
        let header = match Header::read(self.medium()) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(()),
            // One that is damaged is data like other data.
            Err(e) if e.kind() == Kind::Corrupt => return Ok(()),
            Err(e) => return Err(e),
        };
        let whose = header.volume_id().map_or_else(|| "a volume".to_string(), |id| id.to_string());
        let records = RecordsLock::acquire(catalog)?;
        if named_layers(catalog, &records)?.contains(&header.layer) {
            let message = format!(
                "a layer of {whose}, which is in this store, lies there; delete what needs it (\"sealblk \
                 volume show {whose}\" tells) before it is used for another one"
            );
            return Err(Error::new(Kind::Busy, message));
        }
        if !wipe {
            let message = format!(
                "{whose} lies there, which this store does not know, and perhaps another one does; with \
                 --wipe it is overwritten, and lost"
            );
            return Err(Error::new(Kind::Busy, message));
        }
        log::warn!("{} holds {whose}, of another store; it is overwritten", self.name.path().display());
        Ok(())
    }

    fn not_empty(&self, at: u64) -> Error {
        let what = match signature::of(self.medium()) {
            Some(what) => what.to_string(),
            None => format!("data (the first byte that is not zero is at {at})"),
        };
        let message = format!(
            "it holds {what}, and only a device of zeros can become a volume's; with --wipe it is made \
             zeros, and what it holds is lost"
        );
        Error::new(Kind::Busy, message)
    }
}

fn may_not_be_written(e: std::io::Error) -> Error {
    match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EROFS | Errno::EACCES | Errno::EPERM) => Error::new(
            Kind::Usage,
            format!("it cannot be written ({e}); \"blockdev --getro\" tells whether it is read-only"),
        ),
        _ => e.into(),
    }
}
