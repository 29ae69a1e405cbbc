//! Memory that the front-end shares with us in a file, beside the guest's own.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use vm_memory::{FileOffset, MmapRegion};

/// The error about `what`, by name, that the front-end gave.
pub(super) fn invalid(what: &str, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what}: {why}"))
}

/// Maps `size` bytes of `fd` from `offset`, a multiple of 4096; `what` is their name in errors.
///
/// # Errors
/// `InvalidData` for a file that is shorter, or that could become so: touching what is gone would end the
/// process (SIGBUS). A file that is sealed against shrinking stays as long as it is now; what is no
/// memory file cannot be sealed.
pub(super) fn map(what: &str, fd: OwnedFd, offset: u64, size: u64) -> io::Result<MmapRegion<()>> {
    // Ours are sealed, and so are those of some front-ends; this seals those of the others.
    let _ = fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));
    let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_retain);
    if !seals.contains(SealFlag::F_SEAL_SHRINK) {
        return Err(invalid(what, "its file cannot be sealed against shrinking"));
    }
    let file = File::from(fd);
    let end = offset.checked_add(size).ok_or_else(|| invalid(what, "its end is beyond any file"))?;
    if file.metadata()?.len() < end {
        return Err(invalid(what, "longer than its file"));
    }
    let map = MmapRegion::from_file(FileOffset::new(file, offset), size as usize);
    map.map_err(|e| invalid(what, &e.to_string()))
}

/// The file of what [`map`] has mapped, once more, and where the mapping begins in it.
pub(super) fn file_of(map: &MmapRegion<()>) -> io::Result<(OwnedFd, u64)> {
    let Some(at) = map.file_offset() else { unreachable!("every mapping here is of a file") };
    Ok((at.file().try_clone()?.into(), at.start()))
}
