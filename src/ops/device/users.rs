//! Who has a block device, in words, for whoever is refused it. That it is in use, the kernel has said; this
//! only looks for the reason.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind};
use nix::sys::stat::{major, minor};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The error for a device that is in use; none where it cannot be found out why.
pub(super) fn in_use(path: &Path) -> Option<Error> {
    let number = fs::metadata(path).ok()?.rdev();
    let (what, way_out) = reason(number)?;
    Some(Error::new(Kind::Busy, format!("it is {what}; {way_out} first")))
}

/// Why the device of this number, or a part of it, is in use, and what ends that.
fn reason(number: u64) -> Option<(String, &'static str)> {
    let folder = folder_of(number);
    let parts = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let parts = parts.filter(|path| path.join("partition").exists());
    for device in std::iter::once(folder.clone()).chain(parts) {
        let Ok(said) = fs::read_to_string(device.join("dev")) else { continue };
        let said = said.trim();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if let Some(place) = mount_of(&mounts, said) {
            return Some((format!("mounted on {place}"), "unmount it"));
        }
        let name = device.canonicalize().ok()?.file_name()?.to_string_lossy().into_owned();
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        if swaps.lines().any(|line| line.split(' ').next() == Some(&format!("/dev/{name}"))) {
            return Some(("used as swap space".into(), "\"swapoff\" it"));
        }
        let mut holders = fs::read_dir(device.join("holders")).into_iter().flatten().flatten();
        if let Some(holder) = holders.next() {
            let holder = holder.file_name().to_string_lossy().into_owned();
            return Some((format!("a part of /dev/{holder} (LVM, RAID, dm-crypt)"), "take it out of that"));
        }
    }
    None
}

fn folder_of(number: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)))
}

/// Where the device of a number, as `8:1`, is mounted.
fn mount_of(mounts: &str, number: &str) -> Option<String> {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = fields.filter(|fields| fields.get(2) == Some(&number)).find_map(|fields| {
        let place = fields.get(4)?;
        Some(place.to_string())
    });
    found.map(|place| place.replace("\\040", " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_its_device() {
        let mounts = "36 35 98:0 /mnt1 /mnt/a\\040b rw,noatime master:1 - ext3 /dev/root rw\n\
                      37 35 98:1 / /other rw - ext4 /dev/x rw\n";
        assert_eq!(mount_of(mounts, "98:0").as_deref(), Some("/mnt/a b"));
        assert_eq!(mount_of(mounts, "98:1").as_deref(), Some("/other"));
        assert_eq!(mount_of(mounts, "98:2"), None);
    }
}
