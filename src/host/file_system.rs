//! What an attach wants of the file system that the store lies on, a read-only attach as well: to write
//! there.
//!
//! The lock, which keeps a second writer off, is a file that is open for writing; the sockets are files; and
//! no data key is in use that the audit log does not know of. None of them can be done without, so what
//! stands in the way is said.
#![forbid(unsafe_code)]

use crate::base::root::Root;
use crate::base::{Error, Kind, Result};
use nix::sys::statvfs::{FsFlags, Statvfs, statvfs};

/// Finds out whether the store can be written to at all.
///
/// # Errors
/// `Unsupported` if it lies on a file system that is mounted read-only.
pub(super) fn check_writable(root: &Root) -> Result<()> {
    let read_only = statvfs(root.path()).is_ok_and(|found| found.flags().contains(FsFlags::ST_RDONLY));
    if !read_only {
        return Ok(());
    }
    Err(Error::new(
        Kind::Unsupported,
        format!(
            "{} lies on a file system that is mounted read-only. Whoever attaches a volume, \"--read-only\" \
             as well, writes there that he has it: its lock, its sockets, and an audit record for its data \
             key. Remount it (\"mount -o remount,rw\"), or attach a copy of the store",
            root.path().display()
        ),
    ))
}

/// The error with what may be behind it, where the store's file system is full.
pub(super) fn explained(e: Error, root: &Root) -> Error {
    match statvfs(root.path()) {
        Ok(found) if is_full(&found, nix::unistd::geteuid().is_root()) => Error::new(
            e.kind(),
            format!(
                "{e}; the file system of {} is full, and an attach writes there that somebody has the volume \
                 (its sockets, and an audit record for its data key): make room first, by removing what else \
                 lies there, or with \"sealblk snapshot delete\" and \"sealblk gc\"",
                root.path().display()
            ),
        ),
        _ => e,
    }
}

/// Whether there is no block, or no inode, that this user may have.
fn is_full(found: &Statvfs, is_root: bool) -> bool {
    let blocks = if is_root { found.blocks_free() } else { found.blocks_available() };
    let inodes = if is_root { found.files_free() } else { found.files_available() };
    // Some file systems do not count inodes.
    blocks == 0 || (found.files() > 0 && inodes == 0)
}
