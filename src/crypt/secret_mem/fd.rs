//! Secret memory that one process fills and another reads, handed over as a file descriptor.
//!
//! The reader creates it, gives the descriptor to a helper it starts, waits for the helper's end and maps it:
//! so the two never use the bytes at the same time. Pages that are not locked by themselves the reader maps
//! at once, so that they are locked from the beginning to the end. The descriptor is close-on-exec: giving it
//! to a child needs an explicit step, and no other child gets it by accident.

use crate::base::{Context, Error, Kind, Result};
use crate::crypt::secret_mem::pages::Pages;
use crate::crypt::secret_mem::{SecretKind, SecretMem, check_len};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::fstatfs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `f_type` of files made by memfd_secret (linux/magic.h).
const SECRETMEM_MAGIC: i64 = 0x5345_434d;

/// A memory file for secrets whose size is fixed for good.
pub struct SecretFd {
    fd: OwnedFd,
    len: usize,
    kind: SecretKind,
    /// The maker's mapping where it is what locks the pages, which must not lapse when a helper's
    /// mapping goes. Wiped with this.
    locked: Option<SecretMem>,
}

impl SecretFd {
    /// A file of `len` zero bytes, 1..=[`crate::crypt::secret_mem::MAX_LEN`]: of `memfd_secret` where the
    /// kernel has it, else a sealed `memfd_create`.
    ///
    /// # Errors
    /// `Usage` for a bad length; the kernel's error where no memory file can be made.
    pub fn create(len: usize) -> Result<Self> {
        Self::with_kind(SecretKind::MemfdSecret, len).or_else(|e| match e.kind() {
            Kind::Usage => Err(e),
            _ => Self::with_kind(SecretKind::LockedMemfd, len),
        })
    }

    /// A file of `len` zero bytes, of this kind and no other; `Locked` is not a file, and refused.
    ///
    /// # Errors
    /// As [`SecretFd::create`], and `Unsupported` where the kernel does not have this kind.
    pub fn with_kind(kind: SecretKind, len: usize) -> Result<Self> {
        check_len(len)?;
        let fd = match kind {
            SecretKind::MemfdSecret => memfd_secret()?,
            SecretKind::LockedMemfd => {
                memfd_create("sealblk-key", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
                    .context(|| "create a memory file for a key")?
            }
            SecretKind::Locked => {
                return Err(Error::new(Kind::Usage, "private locked memory cannot be shared by descriptor"));
            }
        };
        nix::unistd::ftruncate(&fd, len as i64).context(|| "size a memory file for a key")?;
        if kind == SecretKind::LockedMemfd {
            // A memfd_secret file cannot be resized once it has a size; this one must be told so.
            fcntl(&fd, FcntlArg::F_ADD_SEALS(fixed_size() | SealFlag::F_SEAL_SEAL))
                .context(|| "seal a memory file for a key")?;
        }
        let mut secret = SecretFd { fd, len, kind, locked: None };
        if kind == SecretKind::LockedMemfd {
            secret.locked = Some(secret.mapping()?);
        }
        Ok(secret)
    }

    /// Takes a descriptor that came from [`SecretFd::create`], here or in another process.
    ///
    /// # Errors
    /// `Usage` when it is anything else: another sort of file could shrink under the mapping (and end the
    /// process), or keep the key somewhere.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let stat = nix::sys::stat::fstat(&fd).context(|| "inspect the descriptor for a key")?;
        let len = usize::try_from(stat.st_size).unwrap_or(0);
        check_len(len)?;
        let kind = kind_of(fd.as_fd())?;
        Ok(SecretFd { fd, len, kind, locked: None })
    }

    /// Maps the file and closes the descriptor. What is mapped is wiped at drop, for every holder: the side
    /// that only writes ends with [`SecretMem::hand_over`].
    ///
    /// No other process may use the bytes while this one does; wait for the helper's end first.
    ///
    /// # Errors
    /// `Unsupported` where the memory cannot be locked (`RLIMIT_MEMLOCK`).
    pub fn map(mut self) -> Result<SecretMem> {
        self.locked.take().map_or_else(|| self.mapping(), Ok)
    }

    fn mapping(&self) -> Result<SecretMem> {
        let pages = Pages::shared(self.fd.as_fd(), self.len, self.kind == SecretKind::MemfdSecret)?;
        Ok(SecretMem { pages, len: self.len, kind: self.kind, wipe_at_drop: true })
    }

    /// Lets go of it without wiping: another process that was given the descriptor has mapped it, and wipes.
    pub fn give_away(mut self) {
        if let Some(locked) = self.locked.take() {
            locked.hand_over();
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty one cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Which protection its memory has.
    pub fn kind(&self) -> SecretKind {
        self.kind
    }
}

impl AsFd for SecretFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn memfd_secret() -> Result<OwnedFd> {
    // SAFETY: the call takes one flags argument and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(Error::of(Kind::Unsupported, io::Error::last_os_error()).context("memfd_secret"));
    }
    // SAFETY: the kernel just made this descriptor for us; nobody else owns it. It fits a c_int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn fixed_size() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW
}

fn kind_of(fd: BorrowedFd<'_>) -> Result<SecretKind> {
    let magic = fstatfs(fd).context(|| "inspect the descriptor for a key")?.filesystem_type().0;
    if magic == SECRETMEM_MAGIC {
        return Ok(SecretKind::MemfdSecret);
    }
    // Only memory files know seals; on every other file the call fails.
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    if seals.is_ok_and(|s| s.contains(fixed_size())) {
        return Ok(SecretKind::LockedMemfd);
    }
    let number = fd.as_raw_fd();
    Err(Error::new(Kind::Usage, format!("descriptor {number} is not a sealed memory file for a key")))
}
