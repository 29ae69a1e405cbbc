//! Mapped pages with a guard page on either side. The system calls of secret memory and nothing else.

use crate::base::{Context, Error, Kind, Result};
use nix::sys::resource::{Resource, getrlimit};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

/// Readable and writable pages between two guard pages. Unmapped at drop.
pub(super) struct Pages {
    data: NonNull<u8>,
    data_len: usize,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl Send for Pages {}
// SAFETY: shared access only reads.
unsafe impl Sync for Pages {}

impl Pages {
    /// Zeroed private pages for `len` bytes (> 0): locked, undumpable, zeros in a forked child.
    pub(super) fn private(len: usize) -> Result<Self> {
        let pages = Self::reserve(len)?;
        pages.map_over(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
        pages.lock()?;
        pages.advise(libc::MADV_DONTDUMP)?;
        pages.advise(libc::MADV_WIPEONFORK)?;
        Ok(pages)
    }

    /// The first `len` bytes (> 0) of the memory file `fd`, shared with whoever maps it too: locked (pages of
    /// memfd_secret are by themselves, and refuse `mlock`), undumpable, absent in a forked child.
    pub(super) fn shared(fd: BorrowedFd<'_>, len: usize, locks_itself: bool) -> Result<Self> {
        let pages = Self::reserve(len)?;
        pages.map_over(libc::MAP_SHARED, fd.as_raw_fd())?;
        if !locks_itself {
            pages.lock()?;
        }
        pages.advise(libc::MADV_DONTDUMP)?;
        pages.advise(libc::MADV_DONTFORK)?;
        Ok(pages)
    }

    /// All bytes of the pages, also those past the length asked for.
    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: `data_len` bytes are mapped readable from `data` until drop, always initialised (the kernel
        // zeroes pages), and mutable access needs `&mut self`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.data_len) }
    }

    /// All bytes of the pages, to write to.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, mapped writable too, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.data_len) }
    }

    /// Takes address space for `len` bytes and both guards; nothing of it is accessible yet.
    fn reserve(len: usize) -> Result<Self> {
        let page = page_size();
        let data_len = len.next_multiple_of(page);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice; no existing memory is affected.
        let base = unsafe { libc::mmap(ptr::null_mut(), data_len + 2 * page, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context(|| "map memory for keys");
        }
        // SAFETY: base is not null (MAP_FAILED was handled, and the kernel never maps page 0 unasked), and
        // one page on still lies inside the reservation.
        let data = unsafe { NonNull::new_unchecked(base.cast::<u8>().add(page)) };
        Ok(Pages { data, data_len })
    }

    /// Replaces the inaccessible pages between the guards.
    fn map_over(&self, flags: libc::c_int, fd: libc::c_int) -> Result<()> {
        let address = self.data.as_ptr().cast();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: MAP_FIXED replaces only pages of our own reservation, to which no reference exists yet.
        let mapped =
            unsafe { libc::mmap(address, self.data_len, protection, flags | libc::MAP_FIXED, fd, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(lock_error(self.data_len, io::Error::last_os_error()));
        }
        Ok(())
    }

    fn lock(&self) -> Result<()> {
        // SAFETY: the range is ours and mapped; mlock changes no contents.
        if unsafe { libc::mlock(self.data.as_ptr().cast(), self.data_len) } != 0 {
            return Err(lock_error(self.data_len, io::Error::last_os_error()));
        }
        Ok(())
    }

    fn advise(&self, advice: libc::c_int) -> Result<()> {
        // SAFETY: the range is ours; the advices used here change what a dump or a forked child sees, never
        // the contents in this process.
        if unsafe { libc::madvise(self.data.as_ptr().cast(), self.data_len, advice) } != 0 {
            return Err(io::Error::last_os_error())
                .context(|| format!("protect memory for keys (madvise {advice})"));
        }
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let page = page_size();
        // SAFETY: exactly the reservation that `reserve` made; nothing borrows from it any more. The first
        // guard page lies right before `data`.
        unsafe {
            let base = self.data.as_ptr().sub(page);
            libc::munmap(base.cast(), self.data_len + 2 * page);
        }
    }
}

/// The kernel's page size in bytes.
pub(super) fn page_size() -> usize {
    // SAFETY: sysconf only reads a constant.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("Linux always knows its page size")
}

fn lock_error(len: usize, e: io::Error) -> Error {
    let may_lock_none = || getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == 0);
    let hint = lock_hint(e.raw_os_error(), may_lock_none);
    let message = format!("lock {len} bytes of memory for keys: {e}{hint}");
    Error::of(Kind::Unsupported, e).reworded(message)
}

/// What helps against an error of mlock(2).
fn lock_hint(errno: Option<i32>, may_lock_none: impl FnOnce() -> bool) -> &'static str {
    match errno {
        Some(libc::EAGAIN | libc::ENOMEM) => LIMIT_HINT,
        // The kernel says this of a limit of 0 alone. Otherwise it is somebody else's word.
        Some(libc::EPERM) if may_lock_none() => LIMIT_HINT,
        Some(libc::EPERM) => {
            "; it is not the limit on locked memory: a filter of system calls forbids it, a container's or \
             that of a systemd unit (SystemCallFilter=, where @memlock is to be allowed)"
        }
        _ => "",
    }
}

const LIMIT_HINT: &str =
    "; raise the limit on locked memory (\"ulimit -l\", LimitMEMLOCK= in a systemd unit)";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_forbids_to_lock_memory_is_told_apart() {
        for errno in [libc::EAGAIN, libc::ENOMEM] {
            assert!(lock_hint(Some(errno), || false).contains("LimitMEMLOCK="), "{errno}");
        }
        assert!(lock_hint(Some(libc::EPERM), || true).contains("LimitMEMLOCK="));
        let filter = lock_hint(Some(libc::EPERM), || false);
        assert!(filter.contains("@memlock") && !filter.contains("ulimit"), "{filter}");
        assert_eq!(lock_hint(Some(libc::EINVAL), || false), "");
    }
}
