//! In what units a file takes transfers past the page cache (O_DIRECT).
//!
//! The kernel says it of each file (statx(2), STATX_DIOALIGN, since Linux 6.1). Where it does not, the
//! logical block size of the device below counts; and where there is no such device, as with btrfs or NFS,
//! the unit is a page, which every file system takes without a detour through its cache.
//!
//! What was said is proved by a read, where the layer holds data. A read from a hole proves nothing: ext4 and
//! XFS fill the buffer with zeros and never look whether the device could have done the transfer.

use crate::backing::file::Aligned;
use crate::reactor::pool::PAGE;
use nix::errno::Errno;
use nix::sys::stat::{major, minor};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

/// The unit of a backing that can be reached at any sector.
pub(super) const SECTOR: u64 = 512;
/// The largest unit that the buffers can serve.
const MAX_UNIT: u64 = PAGE as u64;

/// What was found out of a file, and of what it lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The device that the file lies on, or is.
    device: u64,
    /// Offsets, lengths and addresses of O_DIRECT transfers are multiples of this, a power of two from 512 to
    /// 4096; `None` if there are none, or in larger units only.
    pub(super) unit: Option<u64>,
}

impl Found {
    /// Of a file that was opened with O_DIRECT, or refused that. `near` is what was found of another layer of
    /// the volume: on the same device, a file without data takes no smaller units than that one.
    pub(super) fn of(
        file: &File,
        is_direct: bool,
        data: Option<Range<u64>>,
        near: Option<&Found>,
    ) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        let device = if is_device { metadata.rdev() } else { metadata.dev() };
        let near = near.filter(|near| near.device == device);
        let unit = match (said_of(file), near) {
            _ if !is_direct => None,
            (Said::No, _) => None,
            (Said::Unit(said), Some(near)) if data.is_none() => near.unit.map(|near| near.max(said)),
            (Said::Unit(said), _) => Some(said),
            (Said::Nothing, Some(near)) => near.unit,
            (Said::Nothing, None) => Some(logical_block(device).unwrap_or(MAX_UNIT)),
        };
        let unit = unit.map(|unit| unit.max(SECTOR)).filter(|unit| *unit <= MAX_UNIT);
        Ok(Found { device, unit: unit.and_then(|unit| proved(file, unit, data)) })
    }
}

/// What the kernel says of a file.
enum Said {
    Unit(u64),
    /// The file has no such transfers.
    No,
    Nothing,
}

fn said_of(file: &File) -> Said {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty string that ends with a zero byte, so that the call is about the open
    // descriptor; the kernel writes a `struct statx`, for which there is room.
    let answer = unsafe {
        let (path, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
        if libc::statx(file.as_raw_fd(), path, flags, libc::STATX_DIOALIGN, answer.as_mut_ptr()) != 0 {
            // Refused by a container's filter, say.
            return Said::Nothing;
        }
        // All of its fields are integers: zeros are a value of each.
        answer.assume_init()
    };
    if answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Said::Nothing;
    }
    match answer.stx_dio_mem_align.max(answer.stx_dio_offset_align) {
        _ if answer.stx_dio_offset_align == 0 => Said::No,
        unit => Said::Unit(u64::from(unit).next_power_of_two()),
    }
}

/// The logical block size of a block device, which for a partition is its disk's.
fn logical_block(device: u64) -> Option<u64> {
    let device = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let said = |place: &str| std::fs::read_to_string(format!("{device}/{place}/logical_block_size")).ok();
    said("queue")
        .or_else(|| said("../queue"))?
        .trim()
        .parse()
        .ok()
        .filter(|unit: &u64| unit.is_power_of_two())
}

/// The unit, if a read of what is there shows that it is taken, or nothing is there; the largest that there
/// is, if that one is taken; else none.
fn proved(file: &File, unit: u64, data: Option<Range<u64>>) -> Option<u64> {
    let Some(data) = data else { return Some(unit) };
    [unit, MAX_UNIT].into_iter().find(|unit| is_taken(file, *unit, &data))
}

/// Whether an O_DIRECT read of one unit of the data is taken: at a place, and into a place, at which no
/// larger unit begins, where there is one.
fn is_taken(file: &File, unit: u64, data: &Range<u64>) -> bool {
    let first = data.start - data.start % MAX_UNIT;
    let at = if first + 2 * unit <= data.end { first + unit } else { first };
    let mut room = Aligned::new(2 * unit as usize);
    match file.read_at(&mut room.bytes(2 * unit as usize)[unit as usize..], at) {
        Err(e) if e.raw_os_error() == Some(Errno::EINVAL as i32) => {
            log::info!(
                "O_DIRECT in units of {unit} bytes is refused, against what the kernel says of the file"
            );
            false
        }
        // A sector that cannot be read is no matter of the unit.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logical_block_size_is_that_of_the_device() {
        for device in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let said = |name| std::fs::read_to_string(device.path().join(name)).unwrap();
            let number = said("dev");
            let (major, minor) = number.trim().split_once(':').unwrap();
            let number = nix::sys::stat::makedev(major.parse().unwrap(), minor.parse().unwrap());
            let expected = said("queue/logical_block_size").trim().parse().unwrap();
            assert_eq!(logical_block(number), Some(expected), "{device:?}");
        }
        // No device of that number has blocks.
        assert_eq!(logical_block(nix::sys::stat::makedev(0, 1)), None);
    }

    #[test]
    fn what_is_known_of_a_layer_beside_it_holds_for_a_file_without_data() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let alone = Found::of(&file, true, None, None).unwrap();
        let unit = alone.unit.expect("the build's file system takes O_DIRECT");
        let near = Found { unit: Some(MAX_UNIT), ..alone };
        assert_eq!(Found::of(&file, true, None, Some(&near)).unwrap(), near);
        let never = Found { unit: None, ..alone };
        assert_eq!(Found::of(&file, true, None, Some(&never)).unwrap(), never);
        let elsewhere = Found { device: alone.device + 1, unit: Some(MAX_UNIT) };
        assert_eq!(Found::of(&file, true, None, Some(&elsewhere)).unwrap().unit, Some(unit));
        assert_eq!(Found::of(&file, false, None, None).unwrap().unit, None);
    }
}
