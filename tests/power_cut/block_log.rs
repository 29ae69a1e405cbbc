//! A log of a block device's writes, in the format of Linux's dm-log-writes (drivers/md/dm-log-writes.c), as
//! QEMU's block driver blklogwrites makes it.
//!
//! A header of one sector: magic, version 1, number of entries (8 bytes each, little-endian), bytes in a
//! sector (4). Then the entries, each of one sector: first sector, sectors, flags, bytes of a mark (8 bytes
//! each), and after it the data.

use super::image::Share;
use super::model::SECTOR;
use super::random::Random;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x6a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
/// What is written whole or not at all. File systems count on their blocks being so: a half of
/// ext4's superblock is none.
const BLOCK: u64 = 4096;

/// One write of the device.
struct Entry {
    /// Where, in bytes of the device.
    at: u64,
    /// How much; a flush alone has nothing.
    len: u64,
    /// Where the data is in the log; none: zeros.
    data: Option<u64>,
    /// Everything that was written before is on the disk.
    flush: bool,
    /// It is on the disk itself.
    durable: bool,
    /// Where it ends in the log.
    end: u64,
}

/// A log.
pub struct BlockLog {
    file: File,
    entries: Vec<Entry>,
}

impl BlockLog {
    /// Reads the log at `path`, which was finished.
    pub fn read(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let number = |at: u64| -> io::Result<u64> {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at)?;
            Ok(u64::from_le_bytes(bytes))
        };
        assert_eq!((number(0)?, number(8)?), (MAGIC, 1), "it is no log of writes");
        assert_eq!(number(24)? as u32 as u64, SECTOR, "its sectors have another size");
        let (mut entries, mut at) = (Vec::new(), SECTOR);
        for _ in 0..number(16)? {
            let [sector, count, flags, mark] =
                [number(at)?, number(at + 8)?, number(at + 16)?, number(at + 24)?];
            assert_eq!(
                (flags & !(FLUSH | FUA | DISCARD), mark),
                (0, 0),
                "an entry of a kind that is not known"
            );
            let (len, data) = (count * SECTOR, flags & DISCARD == 0);
            let end = at + SECTOR + if data { len } else { 0 };
            let (flush, durable) = (flags & FLUSH != 0, flags & FUA != 0);
            let data = data.then_some(at + SECTOR);
            entries.push(Entry { at: sector * SECTOR, len, data, flush, durable, end });
            at = end;
        }
        Ok(BlockLog { file, entries })
    }

    /// How many entries lie in the first `len` bytes of the log.
    pub fn entries_in(&self, len: u64) -> usize {
        self.entries.partition_point(|entry| entry.end <= len)
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// As if the device had never flushed.
    pub fn forget_flushes(&mut self) {
        self.entries.iter_mut().for_each(|entry| (entry.flush, entry.durable) = (false, false));
    }

    /// The last entries before each flush, and the last of all: how many were done.
    pub fn before_flushes(&self, from: usize) -> Vec<usize> {
        let flushes = (from..self.len()).filter(|&n| self.entries[n].flush);
        flushes.chain([self.len()]).collect()
    }

    /// Puts into `image` what a power cut after so many entries leaves: everything before the last flush, and
    /// that share of what came after it.
    pub fn replay(&self, done: usize, share: Share, random: &mut Random, image: &File) -> io::Result<()> {
        let flushed = self.entries[..done].iter().rposition(|entry| entry.flush).map_or(0, |n| n + 1);
        for (number, entry) in self.entries[..done].iter().enumerate() {
            let whole = number < flushed || entry.durable || share == Share::All;
            if whole {
                self.write(entry, 0..entry.len, image)?;
            } else if share == Share::Chance {
                self.write_part(entry, random, image)?;
            }
        }
        Ok(())
    }

    /// Of an entry nothing, everything, or any of its blocks.
    fn write_part(&self, entry: &Entry, random: &mut Random, image: &File) -> io::Result<()> {
        let share = [Share::None, Share::All, Share::Chance][random.below(3)];
        let mut at = 0;
        while at < entry.len {
            let end = ((entry.at + at) / BLOCK * BLOCK + BLOCK - entry.at).min(entry.len);
            if share == Share::All || share == Share::Chance && random.below(2) == 0 {
                self.write(entry, at..end, image)?;
            }
            at = end;
        }
        Ok(())
    }

    fn write(&self, entry: &Entry, part: Range<u64>, image: &File) -> io::Result<()> {
        let mut bytes = vec![0; (part.end - part.start) as usize];
        if let Some(data) = entry.data {
            self.file.read_exact_at(&mut bytes, data + part.start)?;
        }
        image.write_all_at(&bytes, entry.at + part.start)
    }
}
