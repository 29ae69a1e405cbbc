//! How files below a store's root, and beside the root key, are opened, made, replaced and
//! removed: the one way to do it.
//!
//! Others may have left things there: a symbolic link where a record is looked for, a named pipe that never
//! ends, a folder that is a link to another one. So nothing here follows a symbolic link, in no part of a
//! path: the root's own path was resolved once, when the command began ([`crate::base::root::Root::new`]).
//! Nothing waits for a peer, and what is opened is what was asked for: a regular file, a folder, or, for a
//! layer, a block device. Names are looked up relative to the descriptor of the folder that they lie in.
//!
//! The kernel sees to the links (`openat2` with `RESOLVE_NO_SYMLINKS`). A process that is confined may not
//! make that call, whose flags lie in memory where its filter cannot judge them; there, and on a kernel that
//! does not have it, the last part of a path is guarded (`O_NOFOLLOW`), and the others by Landlock.
//!
//! What root makes in another user's folder is that user's: else a volume that root has changed could not be
//! attached by `attach --user` any more.

mod durable;
mod sockets;
#[cfg(test)]
mod tests;

pub(crate) use durable::create_local_folder;
pub use durable::{create_dir_durable, create_file, replace_file, sync_dir};
pub use sockets::connect;
pub(crate) use sockets::give_socket;

use crate::base::root::parent_of;
use crate::base::root::records;
use crate::base::root::users::name_of;
use crate::base::{Context, Result, spare};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchown, geteuid};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How often a name may come and go while it is opened.
const TRIES: u32 = 16;

/// What lies there is not what a store has there: a link, a pipe, a folder in place of a file. An
/// [`io::Error`] can carry it; as an [`crate::base::Error`] it is of the kind `Corrupt`.
#[derive(Debug)]
pub struct Strange(String);

impl fmt::Display for Strange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Strange {}

fn strange(what: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, Strange(what.into()))
}

/// Opens a regular file for reading.
pub fn open(path: &Path) -> io::Result<File> {
    open_with(path, OFlag::O_RDONLY)
}

/// Opens a regular file; one that is made has mode 0600, and the owner of the folder that it lies in.
pub fn open_with(path: &Path, flags: OFlag) -> io::Result<File> {
    open_if(path, flags, |kind| kind == SFlag::S_IFREG, "a regular file")
}

/// Makes a regular file where there is none, with mode 0600. It belongs to whoever `owners` belongs to, a
/// folder that may be another one than the file's own.
pub fn make_for_owner_of(owners: &Path, path: &Path) -> io::Result<File> {
    records::check_may_be_made(path)?;
    let owner = fstat(folder(owners)?)?;
    Ok(Place::of(path)?.make(path, OFlag::O_WRONLY, &owner)?.into())
}

/// Opens what can hold a layer's bytes: a regular file, or a block device.
pub fn open_layer(path: &Path, flags: OFlag) -> io::Result<File> {
    let holds = |kind| kind == SFlag::S_IFREG || kind == SFlag::S_IFBLK;
    open_if(path, flags, holds, "a regular file or a block device")
}

/// Opens what can be looked at: the caller sees what it is. A named pipe does not wait for its other end. A
/// block device is opened exclusively: nobody can mount it meanwhile.
///
/// # Errors
/// `ResourceBusy` for a block device that is mounted, or that another program has for itself.
pub(super) fn open_image(path: &Path) -> io::Result<File> {
    // Without O_CREAT, O_EXCL means nothing for anything but a block device.
    Ok(open_guarded(AT_FDCWD, path, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_EXCL)?.into())
}

/// Opens a folder, to look names up in it, to list it, or to lock it.
pub fn folder(path: &Path) -> io::Result<File> {
    Ok(open_guarded(AT_FDCWD, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?.into())
}

fn open_if(path: &Path, flags: OFlag, is_wanted: fn(SFlag) -> bool, wanted: &str) -> io::Result<File> {
    // A named pipe would wait for its other end.
    let file = open_or_make(path, flags | OFlag::O_NONBLOCK)?;
    let kind = kind_of(&fstat(&file)?);
    if !is_wanted(kind) {
        return Err(strange(format!("it is {}, not {wanted}", words(kind))));
    }
    // io_uring gives up at once what would have to wait, where this is set.
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK))?;
    Ok(file.into())
}

/// Opens what has the name, or makes it. Which of the two it was has to be known: only what this process has
/// made is its to give away. A link to a file of root's could have the name as well.
fn open_or_make(path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    if !flags.contains(OFlag::O_CREAT) {
        return open_guarded(AT_FDCWD, path, flags);
    }
    records::check_may_be_made(path)?;
    let there = flags - OFlag::O_CREAT - OFlag::O_EXCL;
    let make = || {
        let place = Place::of(path)?;
        place.make(path, there, &fstat(&place.folder)?)
    };
    if flags.contains(OFlag::O_EXCL) {
        return make();
    }
    for _ in 0..TRIES {
        match open_guarded(AT_FDCWD, path, there) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            opened => return opened,
        }
        match make() {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            made => return made,
        }
    }
    Err(replaced())
}

/// `path` is relative to `folder`.
fn open_guarded(folder: impl AsFd, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    // The kernel takes no other flag with O_PATH, which opens no terminal in any case.
    let flags = if flags.contains(OFlag::O_PATH) { flags } else { flags | OFlag::O_NOCTTY };
    let mode = if flags.contains(OFlag::O_CREAT) { Mode::from_bits_truncate(0o600) } else { Mode::empty() };
    let resolve = ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(flags).mode(mode).resolve(resolve);
    let open = || match nix::fcntl::openat2(&folder, path, how) {
        // No such call here: of an old kernel, or of whatever keeps this process from it.
        Err(Errno::ENOSYS | Errno::EPERM) => nix::fcntl::openat(&folder, path, flags, mode),
        opened => opened,
    };
    // A new name can take a block of its folder.
    let opened = spare::with(|| Ok(open()?));
    opened.map_err(|e: io::Error| match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ELOOP) => strange("it is a symbolic link, or lies below one, and none is followed here"),
        Some(Errno::ENOTDIR) => match fstatat(&folder, path, AtFlags::AT_SYMLINK_NOFOLLOW) {
            // What O_NOFOLLOW with O_DIRECTORY says of a link.
            Ok(found) if kind_of(&found) == SFlag::S_IFLNK => {
                strange("it is a symbolic link, and none is followed here")
            }
            _ => e,
        },
        // A named pipe that nobody reads, or a socket.
        Some(Errno::ENXIO) => strange("it is no file"),
        _ => e,
    })
}

fn kind_of(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits())
}

fn words(kind: SFlag) -> &'static str {
    match kind {
        SFlag::S_IFDIR => "a folder",
        SFlag::S_IFIFO => "a named pipe",
        SFlag::S_IFSOCK => "a socket",
        SFlag::S_IFCHR => "a character device",
        SFlag::S_IFBLK => "a block device",
        SFlag::S_IFLNK => "a symbolic link",
        _ => "a file",
    }
}

/// Reads a regular file, or a record, whole, up to `max` bytes; a longer one is refused.
pub fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    if let Some((records, record)) = records::record(path) {
        return records.read(record, max);
    }
    let file = open(path)?;
    // Two calls, if nobody lengthens it meanwhile.
    let mut bytes = Vec::with_capacity(file.metadata()?.len().min(max) as usize + 32);
    file.take(max + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 <= max {
        true => Ok(bytes),
        false => Err(strange(format!("it is longer than {max} bytes"))),
    }
}

/// The names in a folder, in no order.
pub fn names(path: &Path) -> io::Result<Vec<OsString>> {
    if let Some((records, folder)) = records::folder(path) {
        return Ok(records.names(folder)?.into_iter().map(OsString::from).collect());
    }
    local_names(path)
}

fn local_names(path: &Path) -> io::Result<Vec<OsString>> {
    let mut folder = nix::dir::Dir::from_fd(folder(path)?.into())?;
    let mut names = Vec::new();
    for entry in folder.iter() {
        let name = entry?.file_name().to_bytes().to_owned();
        if name != b"." && name != b".." {
            names.push(std::os::unix::ffi::OsStringExt::from_vec(name));
        }
    }
    Ok(names)
}

/// The names in a folder, in no order; none where there is no folder.
pub fn names_if_there(path: &Path) -> Result<Vec<OsString>> {
    match names(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        names => names.context(|| format!("list {}", path.display())),
    }
}

/// Whether there is anything of that name; where that cannot be told, there is not. Of a record of which that
/// cannot be told there is: reading it will say why.
pub fn exists(path: &Path) -> bool {
    let is_there = |found: io::Result<()>| !found.is_err_and(|e| e.kind() == ErrorKind::NotFound);
    if let Some((records, record)) = records::record(path) {
        return is_there(records.read(record, u64::MAX).map(drop));
    }
    if let Some((records, folder)) = records::folder(path) {
        return is_there(records.names(folder).map(drop));
    }
    path.symlink_metadata().is_ok()
}

/// Whether two of these are of one file.
pub fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Whether `path` means the file that is open.
pub fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match path.symlink_metadata() {
        Ok(there) => Ok(is_same(&ours, &there)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// A name in a folder that is open.
struct Place<'a> {
    folder: File,
    name: &'a OsStr,
}

impl<'a> Place<'a> {
    fn of(path: &'a Path) -> io::Result<Self> {
        let name = path.file_name().ok_or_else(|| strange("it is no file's name"))?;
        Ok(Place { folder: folder(parent_of(path))?, name })
    }

    /// Whether the name is this file's, and not another's by now.
    fn means(&self, file: &File) -> io::Result<bool> {
        let (ours, there) = (fstat(file)?, fstatat(&self.folder, self.name, AtFlags::AT_SYMLINK_NOFOLLOW)?);
        Ok((ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino))
    }

    fn unlink(&self) -> io::Result<()> {
        Ok(nix::unistd::unlinkat(&self.folder, self.name, UnlinkatFlags::NoRemoveDir)?)
    }

    /// Makes the file, where there is none, for the user that has what `owner` is about; `path` is its own.
    fn make(&self, path: &Path, flags: OFlag, owner: &FileStat) -> io::Result<OwnedFd> {
        let flags = flags | OFlag::O_CREAT | OFlag::O_EXCL;
        let made = open_guarded(&self.folder, Path::new(self.name), flags)?;
        give(&made, path, owner).inspect_err(|_| {
            let _ = self.unlink();
        })?;
        Ok(made)
    }
}

/// Gives what this process has just made at `path` to the user that has what `owner` is about. What is in a
/// folder of root's may stay the caller's: root can use it.
///
/// # Errors
/// `PermissionDenied` if this process cannot give anything away.
fn give(made: &impl AsFd, path: &Path, owner: &FileStat) -> io::Result<()> {
    let maker = fstat(made)?.st_uid;
    if owner.st_uid == 0 || owner.st_uid == maker {
        return Ok(());
    }
    // A confined process could not even ask.
    if !geteuid().is_root() {
        let message = format!(
            "its folder, {}, belongs to {}, who could not use a file of {}'s: run this as that user, or as \
             root",
            parent_of(path).display(),
            name_of(owner.st_uid),
            name_of(maker)
        );
        return Err(io::Error::new(ErrorKind::PermissionDenied, message));
    }
    Ok(fchown(made, Some(Uid::from_raw(owner.st_uid)), Some(Gid::from_raw(owner.st_gid)))?)
}

/// The owner of a folder.
pub(crate) fn owner_of(path: &Path) -> io::Result<Uid> {
    Ok(Uid::from_raw(fstat(folder(path)?)?.st_uid))
}

fn replaced() -> io::Error {
    io::Error::new(ErrorKind::ResourceBusy, "it was replaced by another file just now")
}

/// Removes a name that is no folder's: what a symbolic link leads to stays.
pub fn remove(path: &Path) -> io::Result<()> {
    if let Some((records, record)) = records::record(path) {
        return records.remove(record);
    }
    Place::of(path)?.unlink()
}

/// As [`remove`]; a name that is not there is as good.
pub fn remove_if_there(path: &Path) -> io::Result<()> {
    match remove(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes the name of a file that is open, unless another file has the name by now.
pub fn remove_name_of(file: &File, path: &Path) -> io::Result<()> {
    let place = Place::of(path)?;
    if !place.means(file)? {
        return Err(replaced());
    }
    place.unlink()
}

/// Removes a folder and the files in it; one with a folder in it stays.
pub fn remove_folder(path: &Path) -> io::Result<()> {
    match records::folder(path) {
        None => remove_local_folder(path),
        Some((records, folder)) => {
            records.remove_folder(folder)?;
            // What this host has of it, which nobody else knows.
            let _ = remove_local_folder(path);
            Ok(())
        }
    }
}

fn remove_local_folder(path: &Path) -> io::Result<()> {
    let inner = folder(path)?;
    for name in local_names(path)? {
        nix::unistd::unlinkat(&inner, &*name, UnlinkatFlags::NoRemoveDir)?;
    }
    let Place { folder, name } = Place::of(path)?;
    Ok(nix::unistd::unlinkat(&folder, name, UnlinkatFlags::RemoveDir)?)
}

/// Gives a file another name; one that has it loses it.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    if let (Some((records, record)), Some((_, to))) = (records::record(from), records::record(to)) {
        return match record.folder == to.folder {
            true => records.rename(record, to.file),
            false => Err(strange("a record stays in its folder")),
        };
    }
    let (from, to) = (Place::of(from)?, Place::of(to)?);
    spare::with(|| Ok(nix::fcntl::renameat(&from.folder, from.name, &to.folder, to.name)?))
}

/// Gives the file that is open as `file`, and has the name `from`, the name `to` as well,
/// which nothing has yet.
///
/// # Errors
/// `ResourceBusy` if `from` means another file by now: nothing has the name `to` then.
pub fn link(file: &File, from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (Place::of(from)?, Place::of(to)?);
    let link = || nix::unistd::linkat(&from.folder, from.name, &to.folder, to.name, LinkatFlags::empty());
    spare::with(|| Ok(link()?))?;
    if to.means(file)? {
        return Ok(());
    }
    // This process has made that name just now, whatever it means.
    to.unlink()?;
    Err(replaced())
}

/// Makes an empty file of this host's that has the path of a record of a store in a pool, for its locks.
pub(crate) fn stand_in(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_err() {
        create_local_folder(parent_of(path))?;
        open_with(path, OFlag::O_WRONLY | OFlag::O_CREAT).context(|| format!("make {}", path.display()))?;
    }
    Ok(())
}

/// Removes what [`stand_in`] has made.
pub(crate) fn forget_stand_in(path: &Path) {
    if records::record(path).is_some()
        && let Ok(place) = Place::of(path)
    {
        let _ = place.unlink();
    }
}

/// Whether the path means a record of a store in a pool, and no file.
pub fn is_record(path: &Path) -> bool {
    records::record(path).is_some()
}

/// Makes a regular file or block device have these permissions.
pub fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    let file = open_layer(path, OFlag::O_RDONLY)?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))
}

/// Runs `f` with `path` as the working folder. Only while the process has one thread.
pub fn inside<T>(path: &Path, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = File::open(".").context(|| "find the working folder")?;
    let folder = folder(path).context(|| format!("enter {}", path.display()))?;
    nix::unistd::fchdir(folder.as_fd()).context(|| format!("enter {}", path.display()))?;
    let result = f();
    nix::unistd::fchdir(before.as_fd()).context(|| "go back to the working folder")?;
    result
}
