//! Whether anybody has a file open for writing, as far as this machine's kernel can tell.
//!
//! A read lease (fcntl(2), F_SETLEASE) is given for a file that nobody has open for writing. It is taken, and
//! given back at once: it says how things are at that moment. The kernel counts every open file and every
//! shared, writable mapping, those of processes that cannot be seen from here included. It does not know of
//! writers on other machines that share the file system, nor of whoever opens the file later. Some file
//! systems have no leases, and another user's file gets none without CAP_LEASE.

use nix::errno::Errno;
use nix::sys::statfs::{FsType, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, fstatfs};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Of fcntl.h; the crate `libc` lacks it for most systems.
const F_SETSIG: libc::c_int = 10;
/// A file system of whose files only the server knows who writes to them: it gives a lease or refuses one for
/// its own reasons.
const CIFS: FsType = FsType(0xff53_4d42);
const SMB2: FsType = FsType(0xfe53_4d42);

/// What could be found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writers {
    /// Nobody has it open for writing.
    Nobody,
    /// Somebody has.
    Somebody,
    /// It cannot be told.
    Unknown,
}

/// Whether somebody has this file open for writing. `file` itself is open for reading alone.
pub(super) fn of(file: &File) -> Writers {
    // Whoever opens the file for writing while there is a lease has its holder told by a signal. SIGIO, which
    // is what is sent otherwise, would end the process; SIGURG does nothing.
    if lease(file, F_SETSIG, libc::SIGURG).is_err() {
        return Writers::Unknown;
    }
    match lease(file, libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => {
            // With an error the lease ends when the file is closed.
            let _ = lease(file, libc::F_SETLEASE, libc::F_UNLCK);
            Writers::Nobody
        }
        Err(Errno::EAGAIN) if !is_of_a_server(file) => Writers::Somebody,
        Err(_) => Writers::Unknown,
    }
}

fn lease(file: &File, command: libc::c_int, value: libc::c_int) -> Result<(), Errno> {
    // SAFETY: both commands that this is called with take a number, and no pointer; `file` keeps the
    // descriptor open.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, value) }).map(drop)
}

fn is_of_a_server(file: &File) -> bool {
    let found = fstatfs(file).map(|found| found.filesystem_type());
    found.is_ok_and(|found| [NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, CIFS, SMB2].contains(&found))
}

/// A process that has this file open for writing, of those that the caller may look at: "process 12 (cp)".
pub(super) fn one_of(file: &File) -> Option<String> {
    let ours = file.metadata().ok()?;
    let processes = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let numbered = |path: &Path| path.file_name().is_some_and(|n| n.as_encoded_bytes()[0].is_ascii_digit());
    processes.filter(|path| numbered(path)).find_map(|process| {
        let opened = fs::read_dir(process.join("fd")).ok()?.flatten();
        let writes = |fd: fs::DirEntry| {
            let is_it = fs::metadata(fd.path()).is_ok_and(|there| {
                (there.dev(), there.ino(), there.file_type()) == (ours.dev(), ours.ino(), ours.file_type())
            });
            is_it && is_writable(&process.join("fdinfo").join(fd.file_name()))
        };
        opened.into_iter().any(writes).then(|| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            format!("process {} ({})", process.file_name().unwrap_or_default().display(), name.trim())
        })
    })
}

/// Whether a descriptor is for writing, by its `fdinfo` (proc_pid_fdinfo(5)).
fn is_writable(info: &Path) -> bool {
    let info = fs::read_to_string(info).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::lock::{Access, ImageLock};

    #[test]
    fn a_writer_is_seen_while_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let writer = File::create(&path).unwrap();
        let file = File::open(&path).unwrap();
        // On a file system without leases nothing can be said, and nothing is.
        if of(&file) == Writers::Unknown {
            return;
        }
        assert_eq!(of(&file), Writers::Somebody);
        assert!(one_of(&file).unwrap().starts_with(&format!("process {} (", std::process::id())));
        drop(writer);
        let _reader = File::open(&path).unwrap();
        // Not at once: a process that another test starts at this moment has the file open until it runs.
        let lock = ImageLock::of(&file, &path, Access::Read).unwrap();
        assert!(lock.check_nobody_writes(&path).unwrap());
        assert_eq!(one_of(&file), None);
    }
}
