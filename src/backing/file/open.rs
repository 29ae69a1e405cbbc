//! How a layer is opened: its file, device or export looked at, and the way to it chosen.

use super::direct::Found;
use super::in_flight::{lock_in_flight, wait_for_earlier_writes};
use super::turns::Turns;
use super::way::{Access, Way};
use super::write_cache::WriteCache;
use super::{Earlier, FileBacking, Place, next_data_of};
use crate::backing::Caps;
use crate::backing::device::{self, DATA_START};
use crate::backing::nbd::{Address, Export, Right};
use crate::base::locks;
use crate::base::root::files;
use nix::fcntl::OFlag;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek64};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

impl FileBacking {
    /// Opens the file at `path`, which must exist and be a regular file or a block device, for transfers in
    /// multiples of `block_size` bytes (512 or 4096). `near` is another layer of the same volume, which may
    /// know more of the disk than can be found out of a file without data.
    pub fn open(
        path: &Path,
        read_only: bool,
        block_size: u32,
        near: Option<&FileBacking>,
    ) -> io::Result<Self> {
        Self::open_after(&Place::whole(path), read_only, block_size, near, Earlier::Awaited)
    }

    /// As [`FileBacking::open`], of what lies at `place`, and where it is known what became of the writes of
    /// earlier processes.
    ///
    /// # Errors
    /// `UnexpectedEof` if a device is not as long as the layer on it.
    pub fn open_after(
        place: &Place,
        read_only: bool,
        block_size: u32,
        near: Option<&FileBacking>,
        earlier: Earlier,
    ) -> io::Result<Self> {
        if let (Some(address), Some(size)) = (&place.behind, place.on_device) {
            return Self::open_export(address, size, &place.path, read_only, block_size);
        }
        let plain = files::open_layer(&place.path, if read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR })?;
        let is_device = plain.metadata()?.file_type().is_block_device();
        let direct = || {
            let mut how = OpenOptions::new();
            let how = how.read(true).write(!read_only).custom_flags(libc::O_DIRECT);
            // The file that was looked at, whatever its name means by now.
            how.open(format!("/proc/self/fd/{}", plain.as_raw_fd()))
        };
        let len = lseek64(&plain, 0, Whence::SeekEnd)? as u64;
        let (start, size) = match place.on_device {
            Some(size) => (DATA_START, size),
            None => (0, len),
        };
        if start.checked_add(size).is_none_or(|end| end > len) {
            return Err(device::too_short(len, size));
        }
        // Device nodes lie on a file system that is memory.
        let (direct, found) = if !is_device && fstatfs(&plain)?.filesystem_type() == TMPFS_MAGIC {
            (None, None)
        } else {
            let direct = direct().ok();
            let data = if is_device { Some(0..len) } else { next_data_of(&plain, 0)? };
            let near = near.and_then(|near| near.found.as_ref());
            let found = Found::of(direct.as_ref().unwrap_or(&plain), direct.is_some(), data, near)?;
            (direct, Some(found))
        };
        let way = Way::to(found.as_ref(), size, block_size, read_only);
        let file = direct.filter(|_| way.access == Access::Direct).unwrap_or(plain);
        match earlier {
            Earlier::Awaited if !read_only => wait_for_earlier_writes(&file)?,
            Earlier::Done if !read_only => lock_in_flight(&file, locks::Kind::Shared)?,
            _ => {}
        }
        let write_cache = match way.access {
            Access::Direct if is_device => WriteCache::of(&file).map(Arc::new),
            _ => None,
        };
        let opened = Self::of(Arc::new(file), start, is_device, found, block_size, way, read_only, size);
        Ok(FileBacking { write_cache, ..opened })
    }

    /// Opens a layer of `size` bytes behind an NBD server. Whatever an earlier process has asked the server
    /// for cannot be waited for: see docs/storage.md.
    fn open_export(
        address: &Address,
        size: u64,
        said_in: &Path,
        read_only: bool,
        block_size: u32,
    ) -> io::Result<Self> {
        let file = files::open_layer(said_in, OFlag::O_RDONLY)?;
        let right = if read_only { Right::Read } else { Right::Write };
        let export = Export::at(address, right)?;
        let terms = export.terms();
        if DATA_START.checked_add(size).is_none_or(|end| end > terms.size) {
            return Err(device::too_short(terms.size, size));
        }
        if !read_only && terms.is_read_only() {
            return Err(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                "the server lets nobody write there",
            ));
        }
        let unit = u64::from(terms.unit());
        let turns = (unit > u64::from(block_size) && !read_only).then(|| Arc::new(Turns::new()));
        let way = Way { access: Access::Export, unit, turns };
        let opened = Self::of(Arc::new(file), DATA_START, true, None, block_size, way, read_only, size);
        let durable = if terms.can_flush() { "" } else { ", which counts what it completes as durable" };
        let access = match address {
            Address::Server(_) => format!("NBD server{durable}"),
            Address::Rbd(_) => "RBD image, by librbd in a process of its own".into(),
        };
        let caps = Caps { access, gives_back: terms.can_zero(), ..opened.caps.clone() };
        Ok(FileBacking { export: Some(export), caps, ..opened })
    }

    #[allow(clippy::too_many_arguments, reason = "each is a field")]
    pub(super) fn of(
        file: Arc<File>,
        start: u64,
        is_device: bool,
        found: Option<Found>,
        block_size: u32,
        way: Way,
        read_only: bool,
        size: u64,
    ) -> Self {
        // A process that is confined could not ask any more.
        let gives_back = !is_device || device::gives_back(&file);
        let caps = Caps { access: way.words(found.as_ref()), size, unit: way.unit, gives_back };
        let memory = way.access.memory_of(&file, size);
        FileBacking {
            file,
            export: None,
            start,
            is_device,
            found,
            block_size,
            way,
            read_only,
            caps,
            memory,
            write_cache: None,
            coming: None,
        }
    }
}
