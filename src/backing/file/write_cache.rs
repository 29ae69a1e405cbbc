//! Whether a block device has a volatile cache, as the kernel says. Without one, what was written past
//! the page cache is durable when it completes, and there is nothing to flush. (For a file, the file
//! system's metadata always is.)
//!
//! The operator, or the device, can switch the cache on at any time. So it is asked at each flush: a read
//! from memory, while an fsync by io_uring takes a kernel thread.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

/// The kernel's word on a device's cache: `write back` or `write through`
/// (Documentation/ABI/stable/sysfs-block, `queue/write_cache`).
pub(super) struct WriteCache(File);

impl WriteCache {
    /// Of the block device that `device` is. `None` if the kernel does not say.
    pub(super) fn of(device: &File) -> Option<Self> {
        let number = device.metadata().ok()?.rdev();
        let device = PathBuf::from(format!(
            "/sys/dev/block/{}:{}",
            nix::sys::stat::major(number),
            nix::sys::stat::minor(number)
        ));
        // A partition has no queue; that of its disk is one up.
        let places = ["queue/write_cache", "../queue/write_cache"].map(|name| device.join(name));
        places.iter().find_map(|path| File::open(path).ok()).map(WriteCache)
    }

    /// Whether there is none, at this moment.
    pub(super) fn is_off(&self) -> bool {
        let mut words = [0; 32];
        self.0.read_at(&mut words, 0).is_ok_and(|n| words[..n].trim_ascii() == b"write through")
    }
}

#[cfg(test)]
impl From<File> for WriteCache {
    fn from(file: File) -> Self {
        WriteCache(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_word_of_the_device_itself() {
        for device in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let Ok(node) = File::open(PathBuf::from("/dev").join(device.file_name())) else { continue };
            let said = std::fs::read_to_string(device.path().join("queue/write_cache")).unwrap();
            let off = WriteCache::of(&node).expect("the kernel says").is_off();
            assert_eq!(off, said == "write through\n", "{device:?}");
        }
    }

    #[test]
    fn a_file_has_none() {
        assert!(WriteCache::of(&tempfile::tempfile().unwrap()).is_none());
    }
}
