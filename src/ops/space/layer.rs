//! A layer's file, as whoever gives space back sees it: where it has something, in sectors of 512 bytes.
//!
//! It is read and written through the page cache, whatever its volume's host process does: the kernel keeps
//! the two coherent for sectors that nobody else writes at that moment, and there are no others here.

use crate::backing::file::next_data_of;
use crate::base::root::files;
use crate::base::zeros::is_zero;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::{Catalog, LayerId};
use crate::ops::need;
use crate::virtio::SECTOR_SIZE;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::statvfs::fstatvfs;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Bytes that are looked at together: a multiple of every block and every sector size.
pub(super) const WINDOW: u64 = 1 << 20;
/// Sectors of a window.
pub(super) const WINDOW_SECTORS: usize = (WINDOW / SECTOR_SIZE) as usize;

const SECTOR: usize = SECTOR_SIZE as usize;
/// What a file system gives back at a time: from what it says, between these.
const BLOCKS: (u64, u64) = (4096, 64 << 10);

/// A layer's file, open for reading, and for writing where it is to be changed.
pub(super) struct LayerFile {
    /// The layer.
    pub(super) id: LayerId,
    path: PathBuf,
    file: File,
    /// Its length in bytes.
    pub(super) size: u64,
    /// What its file system gives back at a time, in bytes.
    pub(super) block: u64,
}

impl LayerFile {
    /// Opens a layer to look at it; none if its file has gone, or is no regular file.
    pub(super) fn look_at(catalog: &Catalog, id: LayerId) -> Result<Option<Self>> {
        Self::open(catalog, id, OFlag::O_RDONLY)
    }

    /// Opens a layer to change it; none if its file has gone, or is no regular file.
    pub(super) fn change(catalog: &Catalog, id: LayerId) -> Result<Option<Self>> {
        Self::open(catalog, id, OFlag::O_RDWR)
    }

    fn open(catalog: &Catalog, id: LayerId, flags: OFlag) -> Result<Option<Self>> {
        let path = catalog.layer_path(id);
        let attempt = || format!("open {}", path.display());
        let file = match open_frozen(&path, flags) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::from(e).context(attempt())),
        };
        let found = file.metadata().context(attempt)?;
        if !found.is_file() {
            return Ok(None);
        }
        let unit = fstatvfs(&file).context(attempt)?.fragment_size() as u64;
        let block = if unit.is_power_of_two() { unit.clamp(BLOCKS.0, BLOCKS.1) } else { BLOCKS.0 };
        Ok(Some(LayerFile { id, path, file, size: found.len(), block }))
    }

    /// The next run of bytes at or after `from` in which there may be something.
    pub(super) fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        next_data_of(&self.file, from).context(|| format!("look for data in {}", self.path.display()))
    }

    /// Whether a layer is a regular file with nothing in it, not even zeros.
    pub(super) fn is_empty(catalog: &Catalog, id: LayerId) -> Result<bool> {
        match Self::look_at(catalog, id)? {
            Some(file) => Ok(file.next_data(0)?.is_none()),
            None => Ok(false),
        }
    }

    /// In how many bytes there may be something.
    pub(super) fn data_bytes(&self) -> Result<u64> {
        need::of_file(&self.file)
    }

    /// The bytes of the window at `at`, into `room`, which is as long as a window: zeros beyond its end.
    pub(super) fn read(&self, at: u64, room: &mut [u8]) -> Result<()> {
        let attempt = || format!("read {} at {at}", self.path.display());
        let there = (self.size.saturating_sub(at) as usize).min(room.len());
        self.file.read_exact_at(&mut room[..there], at).context(attempt)?;
        room[there..].fill(0);
        // Others may need the memory more than whoever reads this next.
        let _ = posix_fadvise(
            &self.file,
            at as libc::off_t,
            there as libc::off_t,
            PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        );
        Ok(())
    }

    /// Adds the sectors of the window at `at` that it has to `sectors`. `room` is as long as a window.
    pub(super) fn add_sectors(&self, at: u64, room: &mut [u8], sectors: &mut [bool]) -> Result<()> {
        if self.next_data(at)?.is_none_or(|data| data.start >= at + WINDOW) {
            return Ok(());
        }
        self.read(at, room)?;
        for (has, sector) in sectors.iter_mut().zip(room.chunks(SECTOR)) {
            *has = *has || !is_zero(sector);
        }
        Ok(())
    }

    /// Writes bytes at `at`.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).context(|| format!("write {} at {at}", self.path.display()))
    }

    /// Makes all that was written durable, whoever wrote it.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_data().context(|| format!("sync {}", self.path.display()))
    }

    /// Whether its file system makes holes: tried behind the file's end, where it changes nothing.
    pub(super) fn can_have_holes(&self) -> Result<bool> {
        match self.make_hole(self.size..self.size + self.block) {
            Err(Errno::EOPNOTSUPP) => Ok(false),
            done => done.map(|()| true).context(|| format!("try to make a hole in {}", self.path.display())),
        }
    }

    /// Gives these bytes back: they read as zeros from now on. Nobody needs them.
    ///
    /// # Errors
    /// `Unsupported` where the file system has no holes.
    pub(super) fn punch(&self, bytes: Range<u64>) -> Result<()> {
        match self.make_hole(bytes) {
            Err(Errno::EOPNOTSUPP) => {
                let message = "this file system makes no holes: nothing can be given back";
                Err(Error::new(Kind::Unsupported, message))
            }
            done => done.context(|| format!("make a hole in {}", self.path.display())),
        }
    }

    fn make_hole(&self, bytes: Range<u64>) -> Result<(), Errno> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, len) = (bytes.start as libc::off_t, (bytes.end - bytes.start) as libc::off_t);
        loop {
            match fallocate(&self.file, flags, start, len) {
                Err(Errno::EINTR) => {}
                done => return done,
            }
        }
    }
}

/// Opens a layer's file. A frozen one is read-only to whoever is not root.
fn open_frozen(path: &std::path::Path, flags: OFlag) -> std::io::Result<File> {
    match files::open_layer(path, flags) {
        Err(e) if e.kind() == ErrorKind::PermissionDenied && flags.contains(OFlag::O_RDWR) => {
            files::set_mode(path, 0o600)?;
            let opened = files::open_layer(path, flags);
            files::set_mode(path, 0o444)?;
            opened
        }
        opened => opened,
    }
}
