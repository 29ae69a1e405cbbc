//! A block device that an export overwrites, whole.
#![forbid(unsafe_code)]

use super::Whole;
use crate::base::root::offered::Offered;
use crate::base::{Context, Error, Kind, Result, size};
use crate::image::lock::{Access, ImageLock};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of zeros that the device is told of at a time.
const ZEROS: u64 = 64 << 20;
/// What the device is told of zeros begins and ends at a multiple of this.
const BLOCK: u64 = 4096;

/// A device that nobody else uses: it can be mounted, or written by QEMU, only after this.
pub(super) struct Device {
    path: PathBuf,
    file: File,
    len: u64,
    /// Zeros that the device was not told of yet.
    zeros: Range<u64>,
    _lock: ImageLock,
    /// Keeps others out.
    _claim: File,
}

impl Device {
    /// # Errors
    /// `Busy` for a device that is in use, or that may not be overwritten.
    pub(super) fn open(path: &Path, replace: bool) -> Result<Self> {
        if !replace {
            let message = format!("{} is a device; --force overwrites what it holds", path.display());
            return Err(Error::new(Kind::Busy, message));
        }
        let open = || {
            let Offered { file: claim, path } = Offered::open(path)?;
            let lock = ImageLock::of(&claim, &path, Access::ReadWrite)?;
            // The same device, and not another one that has its name by now.
            let file = File::options().write(true).open(format!("/proc/self/fd/{}", claim.as_raw_fd()))?;
            let len = lseek64(&file, 0, Whence::SeekEnd)? as u64;
            Ok(Device { path, file, len, zeros: 0..0, _lock: lock, _claim: claim })
        };
        open().map_err(|e: Error| e.context(format!("open {}", path.display())))
    }

    fn tell_of_zeros(&mut self) -> Result<()> {
        let Range { start, end } = std::mem::replace(&mut self.zeros, 0..0);
        let whole = start.next_multiple_of(BLOCK).min(end)..(end - end % BLOCK).max(start);
        let write = || -> Result<()> {
            if whole.is_empty() || !self.zero(whole.clone())? {
                return self.write_zeros(start..end);
            }
            self.write_zeros(start..whole.start)?;
            self.write_zeros(whole.end..end)
        };
        write().context(|| format!("write {}", self.path.display()))
    }

    /// Has the device make this range zeros: best without any blocks for it. Returns whether it can.
    fn zero(&self, range: Range<u64>) -> Result<bool> {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for how in [punch, FallocateFlags::FALLOC_FL_ZERO_RANGE] {
            match fallocate(&self.file, how, range.start as i64, (range.end - range.start) as i64) {
                Ok(()) => return Ok(true),
                Err(Errno::EOPNOTSUPP | Errno::EINVAL) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(false)
    }

    fn write_zeros(&self, range: Range<u64>) -> Result<()> {
        let zeros = [0; 64 << 10];
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(zeros.len() as u64);
            self.file.write_all_at(&zeros[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }
}

impl Whole for Device {
    fn check_size(&self, size: u64) -> Result<()> {
        let path = self.path.display();
        if self.len < size {
            let message = format!("{path} has {} bytes, and {size} are needed", self.len);
            return Err(Error::new(Kind::Usage, message));
        }
        if self.len > size {
            let rest = size::human(self.len - size);
            log::warn!("{path} is larger: what the last {rest} of it hold stays as it is");
        }
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8], _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.tell_of_zeros()?;
        self.file.write_all_at(bytes, at).context(|| format!("write {}", self.path.display()))
    }

    fn zeros(&mut self, range: Range<u64>, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let start = if self.zeros.is_empty() { range.start } else { self.zeros.start };
        self.zeros = start..range.end;
        if range.end - start >= ZEROS { self.tell_of_zeros() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<()> {
        self.tell_of_zeros()?;
        self.file.sync_all().context(|| format!("write {}", self.path.display()))
    }

    fn after_early_end(&self) -> String {
        format!("{} holds a part of the data, in the clear", self.path.display())
    }
}
