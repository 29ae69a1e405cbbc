//! A layer's file that is filled with blocks that came from a place.

use crate::backing::file::next_data_of;
use crate::backup::ContentName;
use crate::backup::block::{self, BLOCK, SECTOR};
use crate::backup::manifest;
use crate::base::zeros::is_zero;
use crate::base::{Error, Kind, Result};
use crate::crypt::BackupKeys;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Makes a hole of these bytes of a layer; where its file system has none, zeros, which mean the same.
fn make_zeros(file: &File, bytes: Range<u64>) -> Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (at, len) = (bytes.start as libc::off_t, (bytes.end - bytes.start) as libc::off_t);
    match fallocate(file, flags, at, len) {
        Err(Errno::EOPNOTSUPP) => {
            let mut room = vec![0; BLOCK];
            let mut at = bytes.start;
            while at < bytes.end {
                let room = &mut room[..(bytes.end - at).min(BLOCK as u64) as usize];
                file.read_exact_at(room, at)?;
                if !is_zero(room) {
                    room.fill(0);
                    file.write_all_at(room, at)?;
                }
                at += room.len() as u64;
            }
            Ok(())
        }
        done => Ok(done?),
    }
}

/// What a layer has of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum There {
    Nothing,
    /// All of it.
    This,
    /// Something else, or a part of it.
    Another,
}

/// A layer that is being filled.
pub(super) struct Into {
    pub(super) file: File,
    size: u64,
    room: Vec<u8>,
}

impl Into {
    /// The file of a layer of `size` bytes.
    pub(super) fn new(file: File, size: u64) -> Self {
        Into { file, size, room: vec![0; BLOCK] }
    }

    fn bytes_of(&self, number: u64) -> Range<u64> {
        let at = number * BLOCK as u64;
        at..(at + BLOCK as u64).min(self.size)
    }

    /// Fails for a block that lies beyond the end.
    pub(super) fn check(&self, number: u64) -> Result<()> {
        match number < manifest::blocks_of(self.size) {
            true => Ok(()),
            false => Err(Error::new(Kind::Corrupt, format!("there is a block {number}, beyond its end"))),
        }
    }

    /// What the layer has of the block, from a pull that was interrupted or that came ahead.
    pub(super) fn look(&mut self, number: u64, name: ContentName, keys: &BackupKeys) -> Result<There> {
        let bytes = self.bytes_of(number);
        if !self.has_data(&bytes)? {
            return Ok(There::Nothing);
        }
        let room = &mut self.room[..(bytes.end - bytes.start) as usize];
        self.file.read_exact_at(room, bytes.start)?;
        match block::encode(room).is_some_and(|object| name.is(&keys.name(&object))) {
            true => Ok(There::This),
            false => Ok(There::Another),
        }
    }

    /// Whether there may be anything in these bytes.
    fn has_data(&self, bytes: &Range<u64>) -> Result<bool> {
        let data = next_data_of(&self.file, bytes.start)?;
        Ok(data.is_some_and(|data| data.start < bytes.end))
    }

    /// Makes a hole of these blocks, where there may be anything.
    pub(super) fn clear(&self, blocks: Range<u64>) -> Result<()> {
        let end = (blocks.end * BLOCK as u64).min(self.size);
        let mut at = blocks.start * BLOCK as u64;
        while let Some(data) = next_data_of(&self.file, at)?.filter(|data| data.start < end) {
            let (start, until) = (data.start.max(at), data.end.min(end));
            make_zeros(&self.file, start..until)?;
            at = until;
        }
        Ok(())
    }

    /// Writes a block of which `object` is the object, where the layer has nothing.
    pub(super) fn write(&mut self, number: u64, object: &[u8]) -> Result<()> {
        let bytes = self.bytes_of(number);
        let room = &mut self.room[..(bytes.end - bytes.start) as usize];
        block::decode(object, room)?;
        let mut at = 0;
        while at < room.len() {
            let len = room[at..]
                .chunks(SECTOR)
                .take_while(|sector| !is_zero(sector))
                .map(<[u8]>::len)
                .sum::<usize>();
            self.file.write_all_at(&room[at..at + len], bytes.start + at as u64)?;
            at += len;
            at += room[at..]
                .chunks(SECTOR)
                .take_while(|sector| is_zero(sector))
                .map(<[u8]>::len)
                .sum::<usize>();
        }
        Ok(())
    }

    /// Writes a block of which `object` is the object, over whatever the layer has there. Whoever reads what
    /// is right already goes on reading that: there is no hole for a moment.
    pub(super) fn write_over(&mut self, number: u64, object: &[u8]) -> Result<()> {
        let bytes = self.bytes_of(number);
        let room = &mut self.room[..(bytes.end - bytes.start) as usize];
        block::decode(object, room)?;
        Ok(self.file.write_all_at(room, bytes.start)?)
    }
}
