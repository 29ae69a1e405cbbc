//! How much space a file system has, and how much of it a copy leaves to others.
//!
//! What copies are told is what any user may have (`f_bavail`): the blocks that a file system keeps for root
//! are not counted, also where root copies.
#![forbid(unsafe_code)]

use super::{Context, Result, size};
use nix::sys::statvfs::{Statvfs, fstatvfs, statvfs};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

/// Of a file system whose size is so many times this, the usual reserve is this.
const SHARE: u64 = 20;
/// The most that is kept free where nobody has said how much.
const MOST: u64 = 4 << 30;

/// How large a file system is, and how much of it is free, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Its size.
    pub size: u64,
    /// What is free.
    pub free: u64,
}

impl Space {
    /// That of the file system at `path`; none of one that does not say.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn at(path: &Path) -> Result<Option<Self>> {
        let found = statvfs(path).context(|| format!("ask how much space is free at {}", path.display()))?;
        Ok(Self::of_answer(&found))
    }

    /// That of the file system that an open file lies on; none of one that does not say, and none of what is
    /// no regular file.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn of(file: &File) -> io::Result<Option<Self>> {
        match file.metadata()?.is_file() {
            true => Ok(Self::of_answer(&fstatvfs(file)?)),
            false => Ok(None),
        }
    }

    fn of_answer(found: &Statvfs) -> Option<Self> {
        let bytes = |blocks: u64| blocks.saturating_mul(found.fragment_size());
        // A tmpfs without a limit has no blocks at all.
        (found.blocks() > 0)
            .then(|| Space { size: bytes(found.blocks()), free: bytes(found.blocks_available()) })
    }
}

/// Whether something failed because there was no space, or none that this user may have.
pub(crate) fn is_for_space(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// How much of a file system a copy leaves free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserve(Option<u64>);

impl Reserve {
    /// Nothing.
    pub const NONE: Self = Reserve(Some(0));

    /// So many bytes.
    pub fn of(bytes: u64) -> Self {
        Reserve(Some(bytes))
    }

    /// What somebody has said; without that, a twentieth of the file system, and 4 GiB at most.
    pub fn in_bytes(self, space: &Space) -> u64 {
        self.0.unwrap_or_else(|| (space.size / SHARE).min(MOST))
    }

    /// What somebody has said.
    pub fn given(self) -> Option<u64> {
        self.0
    }
}

impl fmt::Display for Reserve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => f.write_str(&size::human(bytes)),
            None => write!(f, "a {SHARE}th of the file system, {} at most", size::human(MOST)),
        }
    }
}

/// A file system has less space than is wanted of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// What is free.
    pub free: u64,
    /// What is to stay free.
    pub reserve: u64,
}

impl Shortage {
    /// What is short of `more` bytes in this space; none if nothing is.
    pub fn of(space: &Space, reserve: Reserve, more: u64) -> Option<Self> {
        let reserve = reserve.in_bytes(space);
        (space.free < reserve.saturating_add(more)).then_some(Shortage { free: space.free, reserve })
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "its file system has {} free, and a copy leaves {} free (space-reserve); the copy goes on when \
             there is more",
            size::about(self.free),
            size::about(self.reserve)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_reserve_is_a_part_of_the_file_system_and_no_more_than_four_gibibytes() {
        let reserve = |size| Reserve::default().in_bytes(&Space { size, free: 0 });
        assert_eq!((reserve(20 << 20), reserve(1 << 50)), (1 << 20, 4 << 30));
        assert_eq!(Reserve::of(7).in_bytes(&Space { size: 1 << 50, free: 0 }), 7);
    }

    #[test]
    fn there_is_a_shortage_where_the_reserve_would_be_touched() {
        let space = Space { size: 1 << 30, free: 1000 };
        assert_eq!(Shortage::of(&space, Reserve::of(900), 100), None);
        let short = Some(Shortage { free: 1000, reserve: 900 });
        assert_eq!(Shortage::of(&space, Reserve::of(900), 101), short);
        assert_eq!(Shortage::of(&space, Reserve::of(900), u64::MAX), short);
        assert_eq!(Shortage::of(&space, Reserve::NONE, 1000), None);
    }

    #[test]
    fn a_file_knows_its_file_system_and_a_device_has_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create(folder.path().join("file")).unwrap();
        let (there, here) = (Space::of(&file).unwrap().unwrap(), Space::at(folder.path()).unwrap().unwrap());
        assert!(there.size == here.size && there.free <= there.size);
        assert_eq!(Space::of(&File::open("/dev/null").unwrap()).unwrap(), None);
        assert!(Space::at(&folder.path().join("none")).is_err());
    }
}
