//! A file from outside of the store that a command was told to take: an image that is to be imported.
//!
//! Whoever runs the command may read and remove far more than whoever lays images ready for it. So what
//! is opened is the file that was meant: it belongs to root or to the caller, and so does every symbolic
//! link on the way to it, in a folder where nobody else can put another one. It is used by its
//! descriptor from then on.

use crate::base::root::files::open_image;
use crate::base::root::users::name_of;
use crate::base::{Context, Error, Kind, Result};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

/// Links on the way to a file, after which there is no end to be expected.
const LINKS_MAX: u32 = 40;

/// A file, or block device, that may be taken.
#[derive(Debug)]
pub struct Offered {
    /// The file, open for reading.
    pub file: File,
    /// Its path, without symbolic links.
    pub path: PathBuf,
}

impl Offered {
    /// Opens what `path` means.
    ///
    /// # Errors
    /// `Busy` for a block device that is mounted, or of which another program is the only user; `Usage` for
    /// what is neither a file nor a block device, for another user's, for what is reached by another user's
    /// symbolic link, and for a symbolic link to a file.
    pub fn open(path: &Path) -> Result<Self> {
        let whole = std::path::absolute(path)?;
        if ["/dev/stdin", "/dev/fd", "/proc/self"].iter().any(|place| whole.starts_with(place)) {
            return Err(usage("it is no path of a file; standard input is called \"-\""));
        }
        let (path, is_link) = without_links(path)?;
        let file = open_image(&path).map_err(|e| match e.kind() {
            ErrorKind::ResourceBusy => Error::new(
                Kind::Busy,
                "the device, or a part of it, is mounted, or another program has it for itself (LVM, RAID, \
                 swap, another sealblk); end that first, or take a snapshot of the device (\"lsblk\" and \
                 \"lsof\" show who has it)",
            ),
            _ => e.into(),
        })?;
        let found = file.metadata()?;
        let kind = found.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(usage(
                "it is neither a file nor a block device; a stream is taken from standard input (\"-\")",
            ));
        }
        if is_link && !kind.is_block_device() {
            return Err(usage(format!("it is a symbolic link; name the file itself, {}", path.display())));
        }
        if !is_ours(&found) {
            return Err(usage(format!(
                "it belongs to {}, who can change it meanwhile; take a copy of it, or make it yours \
                 (\"chown\")",
                name_of(found.uid())
            )));
        }
        Ok(Offered { file, path })
    }
}

/// Whether it belongs to root or to whoever runs this.
fn is_ours(found: &Metadata) -> bool {
    found.uid() == 0 || found.uid() == nix::unistd::geteuid().as_raw()
}

/// The path without symbolic links, of which each may be followed; and whether the path itself is one's.
pub(super) fn without_links(path: &Path) -> Result<(PathBuf, bool)> {
    let whole = std::path::absolute(path)?;
    let parts = |path: &Path| -> Vec<OsString> {
        let inner =
            path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
        inner.map(|part| part.as_os_str().to_owned()).collect()
    };
    let (mut real, mut rest) = (PathBuf::from("/"), VecDeque::from(parts(&whole)));
    let (mut links, mut is_link) = (0, false);
    while let Some(part) = rest.pop_front() {
        if part == ".." {
            real.pop();
            continue;
        }
        let next = real.join(&part);
        let found = next.symlink_metadata().context(|| next.display().to_string())?;
        if !found.is_symlink() {
            real = next;
            continue;
        }
        let folder = real.symlink_metadata()?;
        // In a folder with the sticky bit nobody can replace another user's link.
        let may_be_replaced = folder.mode() & 0o022 != 0 && folder.mode() & 0o1000 == 0;
        if !is_ours(&found) || !is_ours(&folder) || may_be_replaced {
            return Err(usage(format!(
                "{} is a symbolic link that another user has made, or can replace; name the file itself",
                next.display()
            )));
        }
        links += 1;
        if links > LINKS_MAX {
            return Err(usage("its symbolic links have no end"));
        }
        is_link = is_link || rest.is_empty();
        let target = std::fs::read_link(&next)?;
        if target.is_absolute() {
            real = PathBuf::from("/");
        }
        parts(&target).into_iter().rev().for_each(|part| rest.push_front(part));
    }
    Ok((real, is_link))
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(Kind::Usage, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn links_are_followed_as_the_kernel_follows_them() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        std::fs::write(top.join("a/b/file"), "x").unwrap();
        symlink("a/b", top.join("relative")).unwrap();
        symlink(top.join("relative"), top.join("a/absolute")).unwrap();
        symlink("../a", top.join("a/up")).unwrap();
        for way in ["a/b/file", "relative/file", "a/absolute/file", "a/up/up/absolute/../b/./file"] {
            let (path, is_link) = without_links(&top.join(way)).unwrap();
            assert_eq!((path, is_link), (top.join("a/b/file"), false), "{way}");
            assert_eq!(Offered::open(&top.join(way)).unwrap().path, top.join("a/b/file"));
        }
        symlink("a/b/file", top.join("link")).unwrap();
        assert!(Offered::open(&top.join("link")).unwrap_err().to_string().contains("name the file itself"));
        symlink("round", top.join("round")).unwrap();
        assert!(without_links(&top.join("round")).unwrap_err().to_string().contains("no end"));
    }

    #[test]
    fn a_link_that_others_could_replace_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(top.join("open/real")).unwrap();
        std::fs::write(top.join("open/real/file"), "x").unwrap();
        symlink("real", top.join("open/link")).unwrap();
        let mode =
            |mode| std::fs::set_permissions(top.join("open"), std::fs::Permissions::from_mode(mode)).unwrap();
        for (bits, is_followed) in [(0o755, true), (0o777, false), (0o775, false), (0o1777, true)] {
            mode(bits);
            assert_eq!(Offered::open(&top.join("open/link/file")).is_ok(), is_followed, "{bits:o}");
        }
    }
}
