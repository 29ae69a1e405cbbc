//! The name by which a device is known: one that means the same device after the next boot.
#![forbid(unsafe_code)]

use crate::backing::nbd::Address;
use crate::base::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Folders of names that last, the best ones first.
const FOLDERS: [&str; 4] = ["/dev/disk/by-id", "/dev/mapper", "/dev/disk/by-partuuid", "/dev/disk/by-path"];
/// Beginnings of names in `by-id`, the best ones first: what identifies the medium itself, or the volume that
/// a volume manager has made. Others follow.
const BEST: [&str; 5] = ["dm-uuid-", "md-uuid-", "nvme-eui.", "nvme-uuid.", "wwn-"];

/// A device's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    path: PathBuf,
    lasts: bool,
}

impl Name {
    /// The name of the device `real`, which somebody has called `said`: that, if it is a link in `/dev`,
    /// where device managers alone make any; else one that device managers have given it; else its own.
    pub(super) fn of(said: &Path, real: &Path) -> Result<Self> {
        let said = std::path::absolute(said).context(|| format!("find {}", said.display()))?;
        if said.starts_with("/dev") && said != real {
            return Ok(Name { path: said, lasts: true });
        }
        let found = FOLDERS.iter().find_map(|folder| best_in(Path::new(folder), real));
        let lasts = found.is_some();
        Ok(Name { path: found.unwrap_or_else(|| real.to_owned()), lasts })
    }

    /// An export's address, which lasts as long as whoever runs the server keeps it.
    pub(super) fn of_export(address: &Address) -> Self {
        Name { path: address.to_string().into(), lasts: true }
    }

    /// The name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it means the same device after the next boot.
    pub fn lasts(&self) -> bool {
        self.lasts
    }
}

/// The best name of the device `real` in a folder of links.
fn best_in(folder: &Path, real: &Path) -> Option<PathBuf> {
    let links = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    let names = links.filter(|link| link.is_symlink() && fs::canonicalize(link).is_ok_and(|it| it == real));
    names.min_by_key(|link| {
        let name = link.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (BEST.iter().position(|best| name.starts_with(best)).unwrap_or(BEST.len()), name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_name_that_tells_most_is_the_best() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let (real, other) = (top.join("sda"), top.join("sdb"));
        for device in [&real, &other] {
            fs::write(device, "").unwrap();
        }
        let links = top.join("by-id");
        fs::create_dir(&links).unwrap();
        assert_eq!(best_in(&links, &real), None);
        for (name, to) in
            [("ata-b", "../sda"), ("ata-a", "../sda"), ("wwn-0x2", "../sdb"), ("wwn-0x1", "../sda")]
        {
            symlink(to, links.join(name)).unwrap();
        }
        assert_eq!(best_in(&links, &real), Some(links.join("wwn-0x1")));
        fs::remove_file(links.join("wwn-0x1")).unwrap();
        assert_eq!(best_in(&links, &real), Some(links.join("ata-a")));
        assert_eq!(best_in(&top.join("none"), &real), None);
    }

    #[test]
    fn a_link_in_dev_is_kept_and_others_are_resolved() {
        let real = Path::new("/dev/null");
        let kept = Name::of(Path::new("/dev/disk/by-id/x"), real).unwrap();
        assert_eq!((kept.path(), kept.lasts()), (Path::new("/dev/disk/by-id/x"), true));
        for said in ["/dev/null", "/home/user/link"] {
            let own = Name::of(Path::new(said), real).unwrap();
            assert_eq!((own.path(), own.lasts()), (real, false), "{said}");
        }
    }
}
