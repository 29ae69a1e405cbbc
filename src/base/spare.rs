//! Space of the store's own, for records on a full disk.
//!
//! On a file system without a free block nothing could be attached, detached or deleted, and nothing would
//! become better: an audit record, an entry of the ledger and the KMS's log take a block each. So the store
//! keeps a file that has blocks and no content. Whoever writes a record and finds the file system full makes
//! that file shorter by a piece, and tries again ([`with`]). The file is made again when there is space.
//!
//! A process works with one store, and has its file open from its beginning on: one that is confined later
//! can still make it shorter. Guests' data never gets any of it, except for what a guest is quick enough to
//! take: hence the small pieces, each of which is a new chance.
#![forbid(unsafe_code)]

use crate::base::space::{Space, is_for_space};
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

/// The most that the file has, in bytes.
const LEN_MAX: u64 = 4 << 20;
/// Of a file system whose size is so many times this, the file has this.
const SHARE: u64 = 64;
/// What is given up at a time, in bytes.
const PIECE: u64 = 64 << 10;
/// The file is made again when so many times its length is free.
const ENOUGH: u64 = 4;

static KEPT: OnceLock<File> = OnceLock::new();

/// How long the file is to be on such a file system, in bytes.
fn len_on(space: &Space) -> u64 {
    let len = (space.size / SHARE).min(LEN_MAX);
    len - len % PIECE
}

/// Whether there is enough space to make the file, or to make it as long as it was.
pub(crate) fn may_be_made(space: &Space) -> bool {
    len_on(space) > 0 && space.free >= ENOUGH * len_on(space)
}

/// Has this process use the file from now on; the first one that it is told of. Sets blocks aside for
/// it where there is space.
///
/// # Errors
/// Those of the file system; `Unsupported` for one that cannot set blocks aside.
pub(crate) fn keep(file: File, space: &Space) -> io::Result<()> {
    let len = len_on(space);
    if may_be_made(space) && file.metadata()?.blocks() * 512 < len {
        let all = libc::off_t::try_from(len).map_err(io::Error::other)?;
        fallocate(&file, FallocateFlags::empty(), 0, all)?;
    }
    let _ = KEPT.set(file);
    Ok(())
}

/// Does something that makes a record durable; where the file system has no space for that, again with more
/// of it, as long as the store has some of its own.
///
/// # Errors
/// What `attempt` returned last.
pub(crate) fn with<T>(attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    with_file(KEPT.get(), attempt)
}

fn with_file<T>(kept: Option<&File>, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt() {
            Err(e) if is_for_space(&e) && kept.is_some_and(|file| give_up(file, &e).unwrap_or(false)) => {}
            done => return done,
        }
    }
}

/// Makes the file shorter by a piece. Returns whether that can have helped.
fn give_up(file: &File, why: &io::Error) -> io::Result<bool> {
    let len = file.metadata()?.len();
    // It may be another file system that is full, the configuration folder's.
    let is_here = Space::of(file)?.is_some_and(|space| space.free < LEN_MAX);
    if len == 0 || (why.kind() == ErrorKind::StorageFull && !is_here) {
        return Ok(false);
    }
    file.set_len(len.saturating_sub(PIECE))?;
    log::warn!("the store's file system is full: space that was kept for records is used ({why})");
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_a_small_part_of_the_file_system_in_whole_pieces() {
        let of = |size| len_on(&Space { size, free: 0 });
        assert_eq!((of(1 << 20), of(12 << 20), of(1 << 40)), (0, 3 * PIECE, LEN_MAX));
        let may = |size, free| may_be_made(&Space { size, free });
        assert!(may(12 << 20, 12 * PIECE) && !may(12 << 20, 12 * PIECE - 1) && !may(1 << 20, 1 << 20));
    }

    #[test]
    fn it_is_given_up_by_pieces_until_that_helps_and_for_want_of_space_alone() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * PIECE).unwrap();
        let len = || file.metadata().unwrap().len();
        let quota = || io::Error::from_raw_os_error(libc::EDQUOT);
        let mut tries = 0;
        let done = with_file(Some(&file), || {
            tries += 1;
            if tries < 3 { Err(quota()) } else { Ok(tries) }
        });
        assert_eq!((done.unwrap(), len()), (3, PIECE));
        let other = with_file(Some(&file), || Err::<(), _>(io::Error::from_raw_os_error(libc::EIO)));
        assert_eq!((other.unwrap_err().raw_os_error(), len()), (Some(libc::EIO), PIECE));
        let mut tries = 0;
        let never = with_file(Some(&file), || {
            tries += 1;
            Err::<(), _>(quota())
        });
        assert_eq!((never.unwrap_err().raw_os_error(), tries, len()), (Some(libc::EDQUOT), 2, 0));
        assert!(with_file(None, || Err::<(), _>(quota())).is_err());
    }

    #[test]
    fn blocks_are_set_aside() {
        let file = tempfile::tempfile().unwrap();
        // Nobody else in this process keeps one.
        keep(file.try_clone().unwrap(), &Space { size: 64 * 4 * PIECE, free: 16 * PIECE }).unwrap();
        let found = file.metadata().unwrap();
        assert!(found.len() == 4 * PIECE && found.blocks() * 512 >= 4 * PIECE);
    }
}
