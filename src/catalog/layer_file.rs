//! The files of layers: how one is made.

use crate::base::root::{files, sync_dir};
use crate::base::{Context, Error, Kind, Result};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use std::path::Path;

/// Makes a layer's file at `path`, where there must be none, without data; it is durable then.
/// Something names it already. It belongs to the owner of the folder `owners`: the volume's, who is going to
/// write it.
///
/// # Errors
/// Those of the file system; `Unsupported` if it cannot set space aside.
pub fn make_layer(path: &Path, owners: &Path, size: u64, preallocate: bool) -> Result<()> {
    let attempt = || format!("make {} of {size} bytes", path.display());
    let file = files::make_for_owner_of(owners, path).context(attempt)?;
    if preallocate {
        let len = libc::off_t::try_from(size).expect("Geometry: below 2^63");
        fallocate(&file, FallocateFlags::empty(), 0, len).map_err(|e| match e {
            Errno::EOPNOTSUPP => {
                let message = "this file system cannot set space aside; leave out --preallocate";
                Error::new(Kind::Unsupported, message).context(attempt())
            }
            e => Error::from(e).context(attempt()),
        })?;
    } else {
        file.set_len(size).context(attempt)?;
    }
    file.sync_all().context(attempt)?;
    sync_dir(path.parent().expect("a layer lies in a folder"))
}
