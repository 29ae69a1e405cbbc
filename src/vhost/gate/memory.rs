//! The guest's memory regions, checked before anybody maps them.

use crate::vhost::gate::message::{Message, invalid};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use std::io;
use std::os::fd::OwnedFd;

/// Bytes of a region in a message: guest address, size, user address, offset in the file.
const REGION: usize = 32;

/// One region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
}

/// The regions that the front-end has given.
pub(super) struct MemoryTable {
    regions: Vec<Region>,
    /// The most of them.
    most: usize,
}

impl MemoryTable {
    /// No regions yet, and never more than so many.
    pub(super) fn of_at_most(most: usize) -> Self {
        MemoryTable { regions: Vec::new(), most }
    }

    /// Checks SET_MEM_TABLE, which replaces all regions.
    pub(super) fn set(&mut self, message: &Message) -> io::Result<()> {
        let count = message.u32_at(0).unwrap_or(0) as usize;
        if count == 0 || message.body.len() != 8 + count * REGION || message.fds.len() != count {
            return Err(invalid(format!(
                "SET_MEM_TABLE: {count} regions in {} bytes with {} descriptors",
                message.body.len(),
                message.fds.len()
            )));
        }
        let mut table = MemoryTable::of_at_most(self.most);
        for (i, fd) in message.fds.iter().enumerate() {
            table.insert(Region::parse(message, 8 + i * REGION)?, fd)?;
        }
        *self = table;
        Ok(())
    }

    /// Checks ADD_MEM_REG.
    pub(super) fn add(&mut self, message: &Message) -> io::Result<()> {
        match &message.fds[..] {
            [fd] => self.insert(Region::parse(message, 8)?, fd),
            fds => Err(invalid(format!("ADD_MEM_REG with {} descriptors", fds.len()))),
        }
    }

    /// Checks REM_MEM_REG: the region must be there, by its addresses and size.
    pub(super) fn remove(&mut self, message: &Message) -> io::Result<()> {
        let gone = Region::parse(message, 8)?;
        let same = |r: &Region| (r.guest, r.size, r.user) == (gone.guest, gone.size, gone.user);
        match self.regions.iter().position(same) {
            Some(index) => {
                self.regions.swap_remove(index);
                Ok(())
            }
            None => Err(invalid(format!("REM_MEM_REG of {:#x}, which is not there", gone.guest))),
        }
    }

    /// Forgets a region, and returns the body of the REM_MEM_REG that makes others forget it.
    pub(super) fn take(&mut self) -> Option<Vec<u8>> {
        let gone = self.regions.pop()?;
        Some(
            [0, gone.guest, gone.size, gone.user, gone.offset].iter().flat_map(|w| w.to_ne_bytes()).collect(),
        )
    }

    /// The regions, each as the protocol says it: guest address, size, user address, offset in the file.
    pub(super) fn regions(&self) -> Vec<[u64; 4]> {
        self.regions.iter().map(|r| [r.guest, r.size, r.user, r.offset]).collect()
    }

    /// Where the VMM has what the guest has at `guest`; `None` if that is in no region.
    pub(super) fn user_address(&self, guest: u64) -> Option<u64> {
        let holds = |r: &&Region| (r.guest..r.guest + r.size).contains(&guest);
        self.regions.iter().find(holds).map(|r| guest - r.guest + r.user)
    }

    /// The first guest address behind all regions; 0 without any.
    pub(super) fn end(&self) -> u64 {
        self.regions.iter().map(|r| r.guest + r.size).max().unwrap_or(0)
    }

    fn insert(&mut self, region: Region, file: &OwnedFd) -> io::Result<()> {
        if self.regions.len() == self.most {
            return Err(invalid(format!(
                "more than {} memory regions, as many as there are slots",
                self.most
            )));
        }
        if let Some(other) = self.regions.iter().find(|other| region.overlaps(other)) {
            return Err(invalid(format!(
                "memory regions {:#x} and {:#x} overlap",
                region.guest, other.guest
            )));
        }
        region.check_file(file)?;
        self.regions.push(region);
        Ok(())
    }
}

impl Region {
    fn parse(message: &Message, at: usize) -> io::Result<Self> {
        let word = |i: usize| message.u64_at(at + 8 * i);
        let (Some(guest), Some(size), Some(user), Some(offset)) = (word(0), word(1), word(2), word(3)) else {
            return Err(invalid("memory region cut short".into()));
        };
        let fits = |start: u64| start.checked_add(size).is_some();
        // Addresses stay far below 2^63, so that no sum behind the gate can wrap.
        let sane = |start: u64| start < 1 << 62;
        if size == 0
            || ![guest, user, offset, size].into_iter().all(sane)
            || ![guest, user, offset].into_iter().all(fits)
        {
            return Err(invalid(format!("memory region {guest:#x} of {size:#x} bytes at {offset:#x}")));
        }
        if offset % 4096 != 0 {
            return Err(invalid(format!("memory region {guest:#x}: offset {offset:#x} is not page-aligned")));
        }
        Ok(Region { guest, size, user, offset })
    }

    fn overlaps(&self, other: &Region) -> bool {
        let cross = |a: u64, b: u64| a < b + other.size && b < a + self.size;
        cross(self.guest, other.guest) || cross(self.user, other.user)
    }

    /// Touching a page beyond the end of its file would end the process. A memfd is sealed against shrinking,
    /// so that what is checked stays true; another file can only be trusted.
    fn check_file(&self, file: &OwnedFd) -> io::Result<()> {
        let sealed = fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));
        log::debug!("memory region {:#x}: sealing against shrinking: {sealed:?}", self.guest);
        let stat = fstat(file)?;
        if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
            return Err(invalid(format!("memory region {:#x}: not a memory file", self.guest)));
        }
        let end = self.offset + self.size;
        if u64::try_from(stat.st_size).is_ok_and(|size| size >= end) {
            return Ok(());
        }
        Err(invalid(format!(
            "memory region {:#x} ends at {end:#x} of a file of {:#x} bytes",
            self.guest, stat.st_size
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;

    const PAGE: u64 = 0x1000;
    /// Pages in a memory file.
    const PAGES: u64 = 16;
    /// Guest address, size, user address, offset.
    const GOOD: [u64; 4] = [0, 8 * PAGE, 0x7000_0000, 0];

    /// The most regions.
    const SLOTS: usize = 37;

    fn new_table() -> MemoryTable {
        MemoryTable::of_at_most(SLOTS)
    }

    fn memory() -> File {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        file.set_len(PAGES * PAGE).unwrap();
        file
    }

    fn single(region: [u64; 4], file: &File) -> Message {
        let body = [vec![0; 8], region.map(u64::to_ne_bytes).concat()].concat();
        let mut message = Message::request(37, body);
        message.fds.push(file.try_clone().unwrap().into());
        message
    }

    fn whole(regions: &[[u64; 4]]) -> Message {
        let count = [(regions.len() as u32).to_ne_bytes(), [0; 4]].concat();
        let words = regions.as_flattened().iter().flat_map(|word| word.to_ne_bytes());
        let mut message = Message::request(5, count.into_iter().chain(words).collect());
        message.fds = regions.iter().map(|_| memory().into()).collect();
        message
    }

    fn add(table: &mut MemoryTable, region: [u64; 4]) -> bool {
        table.add(&single(region, &memory())).is_ok()
    }

    #[test]
    fn regions_lie_in_their_file() {
        for (size, offset, good) in [
            (PAGES * PAGE, 0, true),
            (PAGE, (PAGES - 1) * PAGE, true),
            (1, 0, true),
            (0, 0, false),
            (PAGES * PAGE + 1, 0, false),
            (PAGE + 1, (PAGES - 1) * PAGE, false),
            (PAGE, PAGES * PAGE, false),
            (PAGE, 1, false),
            (PAGE, 512, false),
            (PAGE, 1 << 62, false),
            (PAGE, u64::MAX - PAGE + 1, false),
            (1 << 62, 0, false),
            (u64::MAX, 0, false),
        ] {
            assert_eq!(add(&mut new_table(), [0, size, 0, offset]), good, "{size:#x} at {offset:#x}");
        }
    }

    #[test]
    fn addresses_never_wrap() {
        for high in [1 << 62, 1 << 63, u64::MAX - PAGE, u64::MAX] {
            assert!(!add(&mut new_table(), [high, PAGE, 0, 0]), "guest address {high:#x}");
            assert!(!add(&mut new_table(), [0, PAGE, high, 0]), "user address {high:#x}");
        }
        let high = (1 << 62) - PAGE;
        assert!(add(&mut new_table(), [high, PAGE, high, 0]));
    }

    #[test]
    fn regions_touch_but_never_overlap() {
        let [guest, size, user, _] = GOOD;
        for (other, good) in [
            ([guest + size, PAGE, user + size, 0], true),
            ([guest + size, PAGE, user - PAGE, 0], true),
            ([guest + size - 1, PAGE, user + size, 0], false),
            ([guest + size, PAGE, user + size - 1, 0], false),
            ([guest + size, PAGE + 1, user - PAGE, 0], false),
            ([guest + PAGE, PAGE, user + size, 0], false),
            (GOOD, false),
        ] {
            let mut table = new_table();
            assert!(add(&mut table, GOOD));
            assert_eq!(add(&mut table, other), good, "{other:x?}");
            assert_eq!(table.set(&whole(&[GOOD, other])).is_ok(), good, "{other:x?}");
            assert_eq!(table.set(&whole(&[other, GOOD])).is_ok(), good, "{other:x?}");
        }
    }

    #[test]
    fn a_table_replaces_all_regions_or_none() {
        let mut table = new_table();
        let beside = [8 * PAGE, PAGE, 0, 0];
        table.set(&whole(&[GOOD])).unwrap();
        table.set(&whole(&[beside, GOOD, GOOD])).unwrap_err();
        assert!(!add(&mut table, GOOD), "it is still there");
        table.set(&whole(&[beside])).unwrap();
        assert!(add(&mut table, GOOD), "it is there no more");
    }

    #[test]
    fn a_table_has_a_descriptor_for_each_region() {
        let mut table = new_table();
        for spoil in [
            |m: &mut Message| drop(m.fds.pop()),
            |m: &mut Message| m.fds.push(memory().into()),
            |m: &mut Message| m.body[0] = 0,
            |m: &mut Message| m.body[0] = 3,
            |m: &mut Message| m.body[3] = 0xff,
            |m: &mut Message| m.body.truncate(71),
            |m: &mut Message| m.body.truncate(8),
            |m: &mut Message| m.body.clear(),
        ] {
            let mut message = whole(&[GOOD, [8 * PAGE, PAGE, 0, 0]]);
            spoil(&mut message);
            assert!(table.set(&message).is_err(), "{message:x?}");
        }
        let mut message = single(GOOD, &memory());
        message.fds.clear();
        assert!(table.add(&message).is_err());
    }

    #[test]
    fn only_what_is_there_can_be_removed() {
        let mut table = new_table();
        assert!(add(&mut table, GOOD));
        for i in 0..3 {
            let mut other = GOOD;
            other[i] += PAGE;
            assert!(table.remove(&single(other, &memory())).is_err());
        }
        table.remove(&single(GOOD, &memory())).unwrap();
        table.remove(&single(GOOD, &memory())).unwrap_err();
        assert!(add(&mut table, GOOD));
    }

    #[test]
    fn a_memory_file_cannot_shrink_once_it_was_accepted() {
        let file = memory();
        new_table().add(&single(GOOD, &file)).unwrap();
        assert!(file.set_len(PAGE).is_err());
        assert!(file.set_len(2 * PAGES * PAGE).is_ok());
    }

    #[test]
    fn what_is_no_file_is_no_memory() {
        let odd = [File::open("/dev/null").unwrap(), File::open("/").unwrap()];
        for file in odd {
            assert!(new_table().add(&single(GOOD, &file)).is_err());
        }
    }

    #[test]
    fn regions_are_as_many_as_there_are_slots() {
        let (mut table, file) = (new_table(), memory());
        let nth = |n: u64| single([n * PAGE, PAGE, n * PAGE, 0], &file);
        assert!((0..SLOTS as u64).all(|n| table.add(&nth(n)).is_ok()));
        assert!(table.add(&nth(SLOTS as u64)).is_err());
    }
}
