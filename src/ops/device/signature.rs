//! What a device holds, in words: the commonest things, by what they begin with.
#![forbid(unsafe_code)]

use crate::backing::device;
use crate::backing::medium::Medium;

/// Bytes in which the marks of the list lie.
const LOOKED_AT: usize = 68 << 10;

/// A mark: what it means, where it is, and what stands there.
type Mark = (&'static str, usize, &'static [u8]);

/// The most telling first: what lies on a partitioned disk follows the table.
const MARKS: &[Mark] = &[
    ("a partition table (GPT)", 512, b"EFI PART"),
    ("a partition table (GPT)", 4096, b"EFI PART"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("a physical volume of LVM", 512, b"LABELONE"),
    ("a physical volume of LVM", 0, b"LABELONE"),
    ("an ext2, ext3 or ext4 file system", 1080, b"\x53\xef"),
    ("an XFS file system", 0, b"XFSB"),
    ("a btrfs file system", 0x10040, b"_BHRfS_M"),
    ("an F2FS file system", 1024, b"\x10\x20\xf5\xf2"),
    ("swap space", 4086, b"SWAPSPACE2"),
    ("a part of a RAID (md)", 4096, b"\xfc\x4e\x2b\xa9"),
    ("a part of a RAID (md)", 0, b"\xfc\x4e\x2b\xa9"),
    ("a Ceph OSD (BlueStore)", 0, b"bluestore block device"),
    ("a bcache device", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    ("a SquashFS", 0, b"hsqs"),
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("a FAT file system", 54, b"FAT1"),
    ("a FAT file system", 82, b"FAT32"),
    ("an ISO 9660 file system", 32769, b"CD001"),
    ("a damaged header of sealblk's", 0, b"sealblk device"),
    // Boot sectors of file systems end so as well.
    ("a partition table, or a boot sector", 510, b"\x55\xaa"),
];

/// What the device holds, if that is something which everybody knows.
pub(super) fn of(device: &dyn Medium) -> Option<&'static str> {
    let room = (device.length().ok()? as usize).min(LOOKED_AT) & !4095;
    let bytes = device::read_pages(device, 0, room).ok()?;
    let is_there = |(_, at, mark): &&Mark| bytes.get(*at..at + mark.len()) == Some(*mark);
    MARKS.iter().find(is_there).map(|(what, _, _)| *what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn each_mark_is_found_and_zeros_are_nothing() {
        for (what, at, mark) in MARKS.iter().filter(|(_, at, _)| *at < LOOKED_AT) {
            let file = tempfile::tempfile().unwrap();
            file.set_len(1 << 20).unwrap();
            assert_eq!(of(&file), None);
            file.write_all_at(mark, *at as u64).unwrap();
            assert_eq!(of(&file), Some(*what));
        }
    }
}
