//! What holds a layer behind a header ([`Medium`]): how long it is, how it is made zeros; and of a block
//! device, what the kernel says of it.
//!
//! Nothing here knows what lies there. A range of a block device is made zeros in one of three ways, and each
//! is exact to the byte, or refused by the kernel as a whole:
//!
//! 1. `fallocate` with `PUNCH_HOLE`: the device gives the space back **and promises zeros**. A device that
//!    gives space back without that promise is refused here (`EOPNOTSUPP`). BLKDISCARD is not used: it rounds
//!    to the device's own granularity and may leave what was there.
//! 2. `fallocate` with `ZERO_RANGE`: the device writes zeros by itself, or the kernel does.
//! 3. Zeros, written.
#![forbid(unsafe_code)]

use crate::backing::file::Aligned;
use crate::backing::medium::Medium;
use crate::base::zeros::is_zero;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::{major, minor};
use nix::unistd::{Whence, lseek64};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::PathBuf;

/// Where the layer's bytes begin on a device: before them lies the header.
pub const DATA_START: u64 = 1 << 20;
/// A volume on a device is a multiple of so many bytes long: no device that is taken has larger blocks.
pub const BLOCK: u64 = PAGE as u64;
/// Bytes that are looked at, or made zeros, at a time.
const STEP: u64 = 16 << 20;
/// Bytes that are read or written at once.
const ROOM: usize = 1 << 20;
/// What transfers past the page cache are multiples of on every device.
const PAGE: usize = 4096;

/// A block device.
impl Medium for File {
    fn length(&self) -> io::Result<u64> {
        Ok(lseek64(self, 0, Whence::SeekEnd)? as u64)
    }

    fn fetch(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(bytes, at)
    }

    fn store(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn make_zeros(&self, bytes: Range<u64>) -> io::Result<()> {
        make_zeros(self, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Whether an open file is a block device.
pub fn is_device(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_type().is_block_device())
}

/// How many bytes it has for a layer: whole [blocks](BLOCK), behind the header.
///
/// # Errors
/// Those of the medium.
pub fn room(medium: &dyn Medium) -> io::Result<u64> {
    let room = medium.length()?.saturating_sub(DATA_START);
    Ok(room - room % BLOCK)
}

/// The error for a device of `len` bytes on which there shall be a layer of `size`.
pub(super) fn too_short(len: u64, size: u64) -> io::Error {
    let need = DATA_START.saturating_add(size);
    let message = format!(
        "the device has {len} bytes, and its layer needs {need}: it has shrunk, or it is another device; \
         make it as long as it was"
    );
    io::Error::new(io::ErrorKind::UnexpectedEof, message)
}

/// What the kernel says of a device: a file of `queue/`, which of a partition is its disk's.
fn said(device: &File, name: &str) -> Option<u64> {
    let number = device.metadata().ok()?.rdev();
    let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)));
    let read = |queue: &str| std::fs::read_to_string(folder.join(queue).join(name)).ok();
    read("queue").or_else(|| read("../queue"))?.trim().parse().ok()
}

/// Bytes of its logical blocks; 4096 where the kernel does not say.
pub fn logical_block(device: &File) -> u64 {
    let block = said(device, "logical_block_size").filter(|block| block.is_power_of_two());
    block.unwrap_or(PAGE as u64)
}

/// Whether it can give space back and promise zeros. Where the kernel does not say, it is tried.
pub(super) fn gives_back(device: &File) -> bool {
    ["discard_max_bytes", "write_zeroes_max_bytes"].iter().all(|name| said(device, name) != Some(0))
}

/// Makes the bytes of a block device zeros, whole logical blocks, by the best way that it has.
fn make_zeros(device: &File, bytes: Range<u64>) -> io::Result<()> {
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let ways = [FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE];
    for way in ways {
        match uninterrupted(|| {
            fallocate(device, way | keep, bytes.start as i64, (bytes.end - bytes.start) as i64)
        }) {
            Ok(()) => return Ok(()),
            Err(Errno::EOPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let mut zeros = Aligned::new(ROOM);
    let mut at = bytes.start;
    while at < bytes.end {
        let len = (bytes.end - at).min(ROOM as u64);
        device.write_all_at(zeros.bytes(len as usize), at)?;
        at += len;
    }
    Ok(())
}

fn uninterrupted(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            done => return done,
        }
    }
}

/// Where the first byte is that is not zero, if there is one. A device is open for transfers past the page
/// cache, or not.
///
/// # Errors
/// Those of the device.
pub fn first_data(medium: &dyn Medium, bytes: Range<u64>) -> io::Result<Option<u64>> {
    let mut room = Aligned::new(ROOM);
    let mut at = bytes.start;
    while at < bytes.end {
        let room = room.bytes((bytes.end - at).min(ROOM as u64) as usize);
        medium.fetch(room, at)?;
        if !is_zero(room) {
            let first = room.iter().position(|byte| *byte != 0).unwrap_or(0);
            return Ok(Some(at + first as u64));
        }
        at += room.len() as u64;
    }
    Ok(None)
}

/// Makes all of these bytes zeros that are not, durably. What is zeros already is only read: so whoever was
/// interrupted goes on where it was, without a note of that, which could be wrong. `watch` is told how many
/// bytes are done, and of how many.
///
/// # Errors
/// Those of the device; what `watch` says.
pub fn wipe<E: From<io::Error>>(
    medium: &dyn Medium,
    bytes: Range<u64>,
    watch: &mut dyn FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    each_step(bytes.clone(), &mut |step| -> Result<(), E> {
        watch(step.start - bytes.start, bytes.end - bytes.start)?;
        match first_data(medium, step.clone())? {
            None => Ok(()),
            Some(_) => Ok(medium.make_zeros(step)?),
        }
    })?;
    medium.sync()?;
    watch(bytes.end - bytes.start, bytes.end - bytes.start)
}

/// Calls `f` for one part of `bytes` after the other.
///
/// # Errors
/// What `f` says.
pub fn each_step<E>(bytes: Range<u64>, f: &mut dyn FnMut(Range<u64>) -> Result<(), E>) -> Result<(), E> {
    let mut at = bytes.start;
    while at < bytes.end {
        let end = (at - at % STEP + STEP).min(bytes.end);
        f(at..end)?;
        at = end;
    }
    Ok(())
}

/// Reads `len` bytes at `at`, both multiples of 4096, also past the page cache.
///
/// # Errors
/// Those of the device.
pub fn read_pages(medium: &dyn Medium, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut room = Aligned::new(len);
    medium.fetch(room.bytes(len), at)?;
    Ok(room.bytes(len).to_vec())
}

/// Writes bytes at `at`, a multiple of 4096, with zeros behind them to the next one; also
/// past the page cache.
///
/// # Errors
/// Those of the device.
pub fn write_pages(medium: &dyn Medium, at: u64, bytes: &[u8]) -> io::Result<()> {
    let len = bytes.len().next_multiple_of(PAGE);
    let mut room = Aligned::new(len);
    room.bytes(len)[..bytes.len()].copy_from_slice(bytes);
    medium.store(room.bytes(len), at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_zeros_is_only_read_and_the_rest_is_made_zeros() {
        let file = tempfile::tempfile().unwrap();
        let len = 2 * STEP + 12288;
        file.set_len(len).unwrap();
        for at in [0, STEP - 1, STEP, len - 1] {
            file.write_all_at(&[7], at).unwrap();
        }
        assert_eq!(first_data(&file, 0..len).unwrap(), Some(0));
        assert_eq!(first_data(&file, 4096..len).unwrap(), Some(STEP - 1));
        let mut told = Vec::new();
        let mut watch = |done, total| {
            told.push((done, total));
            Ok::<_, io::Error>(())
        };
        wipe(&file, 4096..len, &mut watch).unwrap();
        let total = len - 4096;
        assert_eq!(told, [0, STEP - 4096, 2 * STEP - 4096, total].map(|done| (done, total)));
        assert_eq!(first_data(&file, 4096..len).unwrap(), None);
        assert_eq!(first_data(&file, 0..len).unwrap(), Some(0), "what was not named stays");
    }

    #[test]
    fn a_wipe_that_is_stopped_goes_on_where_it_was() {
        let file = tempfile::tempfile().unwrap();
        let len = 4 * STEP;
        for at in (0..len).step_by(STEP as usize) {
            file.write_all_at(&[7; 4096], at).unwrap();
        }
        file.set_len(len).unwrap();
        let mut stop = |done, _| match done {
            0 | STEP => Ok(()),
            _ => Err(io::Error::other("enough")),
        };
        assert_eq!(wipe(&file, 0..len, &mut stop).unwrap_err().to_string(), "enough");
        assert_eq!(first_data(&file, 0..len).unwrap(), Some(2 * STEP));
        wipe(&file, 0..len, &mut |_, _| Ok::<_, io::Error>(())).unwrap();
        assert_eq!(first_data(&file, 0..len).unwrap(), None);
    }
}
