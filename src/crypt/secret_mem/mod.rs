//! Pages that hold keys: locked, out of core dumps, not shared with forked children, between guard pages, and
//! wiped before they are given back.
//!
//! [`SecretMem`] is such memory as bytes, [`SecretBytes`] a key of a fixed length, [`Secret`] a value
//! inside it, [`SecretFd`] a way to hand it from one process to another. The kernel's own `memfd_secret`
//! is used where it is switched on (it also takes the pages out of the kernel's direct map, so that
//! neither `/proc/PID/mem` nor a debugger reads them); elsewhere ordinary pages with `mlock`. It must
//! not know what a key is for.
//!
//! Every owner costs at least one locked page, which counts against `RLIMIT_MEMLOCK` (8 MiB by default for
//! those who are not root): put what belongs together into one [`Secret`].

mod bytes;
mod fd;
mod pages;
pub(super) mod registers;
mod stack;
#[cfg(test)]
mod tests;

pub use bytes::SecretBytes;
pub use fd::SecretFd;
pub use stack::{on_scrubbed_stack, wipe_stack};

use crate::base::{Error, Kind, Result};
use pages::Pages;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use zeroize::Zeroize;

/// The most that one owner may ask for, bytes. Keys are small; a larger number is a mistake.
pub const MAX_LEN: usize = 64 * 1024;

/// How well a piece of secret memory is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecretKind {
    /// `memfd_secret(2)`: locked, undumpable, and not even in the kernel's direct map.
    MemfdSecret,
    /// Private anonymous pages: `mlock`, `MADV_DONTDUMP`, `MADV_WIPEONFORK`.
    Locked,
    /// Pages of a sealed `memfd_create` file that two processes share: `mlock`, `MADV_DONTDUMP`,
    /// `MADV_DONTFORK`.
    LockedMemfd,
}

impl fmt::Display for SecretKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SecretKind::MemfdSecret => "memfd_secret",
            SecretKind::Locked => "locked memory",
            SecretKind::LockedMemfd => "locked memfd",
        })
    }
}

/// Bytes in secret memory. Zero when made, wiped and unmapped at drop. It can be neither cloned nor printed.
///
/// A child made by `fork` must not touch it: it finds zeros or no page at all, depending on the kind.
pub struct SecretMem {
    pages: Pages,
    len: usize,
    kind: SecretKind,
    wipe_at_drop: bool,
}

impl SecretMem {
    /// `len` zero bytes, 1..=[`MAX_LEN`]: `memfd_secret` where the kernel has it, else locked pages.
    ///
    /// # Errors
    /// `Usage` for a bad length; `Unsupported` where the memory cannot be locked (`RLIMIT_MEMLOCK`).
    pub fn new(len: usize) -> Result<Self> {
        Self::with_kind(SecretKind::MemfdSecret, len).or_else(|e| match e.kind() {
            Kind::Usage => Err(e),
            _ => Self::with_kind(SecretKind::Locked, len),
        })
    }

    /// Memory of `len` zero bytes, of this kind and no other.
    ///
    /// # Errors
    /// As [`SecretMem::new`], and `Unsupported` where the kernel does not have this kind.
    pub fn with_kind(kind: SecretKind, len: usize) -> Result<Self> {
        match kind {
            SecretKind::Locked => {
                check_len(len)?;
                Ok(SecretMem { pages: Pages::private(len)?, len, kind, wipe_at_drop: true })
            }
            SecretKind::MemfdSecret | SecretKind::LockedMemfd => SecretFd::with_kind(kind, len)?.map(),
        }
    }

    /// Which protection it has; worth a line in the log.
    pub fn kind(&self) -> SecretKind {
        self.kind
    }

    /// Length in bytes, as asked for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: empty secret memory cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.pages.as_slice()[..self.len]
    }

    /// The bytes, to write to.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut self.pages.as_mut_slice()[..len]
    }

    /// Unmaps it without wiping, for the writing side of a [`SecretFd`]: the bytes live on in the file until
    /// the other side, which wipes, lets go of it. Only for memory that came from [`SecretFd::map`]; any
    /// other is wiped as at drop.
    pub fn hand_over(mut self) {
        self.wipe_at_drop = self.kind == SecretKind::Locked;
    }
}

impl Drop for SecretMem {
    fn drop(&mut self) {
        if self.wipe_at_drop {
            self.pages.as_mut_slice().zeroize();
        }
    }
}

impl fmt::Debug for SecretMem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretMem({} bytes of {})", self.len, self.kind)
    }
}

/// A value that lives in secret memory, such as an expanded key schedule.
pub struct Secret<T> {
    mem: SecretMem,
    value: PhantomData<T>,
}

impl<T> Secret<T> {
    /// Makes the value with `make` and puts it into secret memory. `make` runs on a stack that is scrubbed
    /// afterwards, so that neither its intermediate values nor a moved-from copy of the result stay behind.
    ///
    /// # Errors
    /// As [`SecretMem::new`].
    pub fn new(make: impl FnOnce() -> T) -> Result<Self> {
        const { assert!(size_of::<T>() > 0 && align_of::<T>() <= 4096, "a page cannot hold this type") };
        let mut mem = SecretMem::new(size_of::<T>())?;
        let slot: *mut T = mem.as_mut_slice().as_mut_ptr().cast();
        on_scrubbed_stack(|| {
            // SAFETY: `mem` has size_of::<T>() writable bytes that begin a page, so that any alignment up to
            // a page's holds (asserted above), and nobody else has a pointer to them.
            unsafe { slot.write(make()) }
        });
        Ok(Secret { mem, value: PhantomData })
    }

    /// Which protection it has.
    pub fn kind(&self) -> SecretKind {
        self.mem.kind()
    }
}

impl<T> Deref for Secret<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` wrote a valid T at the start of the pages, and it stays there until drop.
        unsafe { &*self.mem.as_slice().as_ptr().cast() }
    }
}

impl<T> Drop for Secret<T> {
    fn drop(&mut self) {
        // SAFETY: the value was written by `new`, is dropped only here, and `mem` (wiped after this) does not
        // know of it.
        unsafe { std::ptr::drop_in_place(self.mem.as_mut_slice().as_mut_ptr().cast::<T>()) }
    }
}

// SAFETY: a Secret owns its T alone, as a Box would; PhantomData<T> and the pages carry nothing else.
unsafe impl<T: Send> Send for Secret<T> {}
// SAFETY: shared access gives out only &T.
unsafe impl<T: Sync> Sync for Secret<T> {}

fn check_len(len: usize) -> Result<()> {
    if (1..=MAX_LEN).contains(&len) {
        return Ok(());
    }
    Err(Error::new(Kind::Usage, format!("secret memory of {len} bytes: 1 to {MAX_LEN} bytes are possible")))
}
