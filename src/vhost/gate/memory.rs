//! The guest's memory regions, checked before anybody maps them.

use super::message::{Message, invalid};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use std::io;
use std::os::fd::OwnedFd;

/// Bytes of a region in a message: guest address, size, user address, offset in the file.
const REGION: usize = 32;
/// Most regions at a time: what the crate says in answer to GET_MAX_MEM_SLOTS.
const MAX_REGIONS: usize = 509;

/// One region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
}

/// The regions that the front-end has given.
#[derive(Default)]
pub struct MemoryTable(Vec<Region>);

impl MemoryTable {
    /// Checks SET_MEM_TABLE, which replaces all regions.
    pub fn set(&mut self, message: &Message) -> io::Result<()> {
        let count = message.u32_at(0).unwrap_or(0) as usize;
        if count == 0 || message.body.len() != 8 + count * REGION || message.fds.len() != count {
            return Err(invalid(format!(
                "SET_MEM_TABLE: {count} regions in {} bytes with {} descriptors",
                message.body.len(),
                message.fds.len()
            )));
        }
        let mut table = MemoryTable::default();
        for (i, fd) in message.fds.iter().enumerate() {
            table.insert(Region::parse(message, 8 + i * REGION)?, fd)?;
        }
        *self = table;
        Ok(())
    }

    /// Checks ADD_MEM_REG.
    pub fn add(&mut self, message: &Message) -> io::Result<()> {
        match &message.fds[..] {
            [fd] => self.insert(Region::parse(message, 8)?, fd),
            fds => Err(invalid(format!("ADD_MEM_REG with {} descriptors", fds.len()))),
        }
    }

    /// Checks REM_MEM_REG: the region must be there, by its addresses and size.
    pub fn remove(&mut self, message: &Message) -> io::Result<()> {
        let gone = Region::parse(message, 8)?;
        let same = |r: &Region| (r.guest, r.size, r.user) == (gone.guest, gone.size, gone.user);
        match self.0.iter().position(same) {
            Some(index) => {
                self.0.swap_remove(index);
                Ok(())
            }
            None => Err(invalid(format!("REM_MEM_REG of {:#x}, which is not there", gone.guest))),
        }
    }

    /// Forgets a region, and answers the body of the REM_MEM_REG that makes others forget it.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let gone = self.0.pop()?;
        Some(
            [0, gone.guest, gone.size, gone.user, gone.offset].iter().flat_map(|w| w.to_ne_bytes()).collect(),
        )
    }

    fn insert(&mut self, region: Region, file: &OwnedFd) -> io::Result<()> {
        if self.0.len() == MAX_REGIONS {
            return Err(invalid(format!("more than {MAX_REGIONS} memory regions")));
        }
        if let Some(other) = self.0.iter().find(|other| region.overlaps(other)) {
            return Err(invalid(format!(
                "memory regions {:#x} and {:#x} overlap",
                region.guest, other.guest
            )));
        }
        region.check_file(file)?;
        self.0.push(region);
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
