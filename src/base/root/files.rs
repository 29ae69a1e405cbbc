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

use crate::base::root::parent_of;
use crate::base::root::users::name_of;
use crate::base::{Context, Result, spare};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag};
use nix::sys::socket::{self as net, AddressFamily, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, fstatat};
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchown, fchownat, geteuid};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

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

/// Reads a regular file whole, up to `max` bytes; a longer one is refused.
pub fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
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

/// Whether there is anything of that name; where that cannot be told, there is not.
pub fn exists(path: &Path) -> bool {
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

/// Gives the socket that this process has just made at `path` to this user and group, and these permissions,
/// each as far as it is given.
///
/// # Errors
/// [`Strange`] for what is no socket: another user may have put a file in its place.
pub(crate) fn give_socket(
    path: &Path,
    user: Option<Uid>,
    group: Option<Gid>,
    mode: Option<Mode>,
) -> io::Result<()> {
    let socket = open_socket(path)?;
    fchownat(&socket, c"", user, group, AtFlags::AT_EMPTY_PATH)?;
    match mode {
        // A descriptor that was opened as a path alone has no other way to this.
        Some(mode) => Ok(fchmodat(AT_FDCWD, &*by_descriptor(&socket), mode, FchmodatFlags::FollowSymlink)?),
        None => Ok(()),
    }
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
    let inner = folder(path)?;
    for name in names(path)? {
        nix::unistd::unlinkat(&inner, &*name, UnlinkatFlags::NoRemoveDir)?;
    }
    let Place { folder, name } = Place::of(path)?;
    Ok(nix::unistd::unlinkat(&folder, name, UnlinkatFlags::RemoveDir)?)
}

/// Gives a file another name; one that has it loses it.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
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

/// Makes a regular file or block device have these permissions.
pub fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    let file = open_layer(path, OFlag::O_RDONLY)?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))
}

/// Connects to the socket of that name, which is no symbolic link's: else somebody could have one process
/// talked to in place of another. Where so many wait already that there is no room for one more, that is
/// waited for as long as `patience`.
pub fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = open_socket(path)?;
    // The path of a socket is at most 107 bytes long, and the store's may be longer.
    let address = UnixAddr::new(by_descriptor(&socket).as_str())?;
    let client = net::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let client = UnixStream::from(client);
    // The kernel waits so long in connect(2) as well.
    client.set_write_timeout(Some(patience))?;
    match net::connect(client.as_raw_fd(), &address) {
        Ok(()) => client.set_write_timeout(None)?,
        Err(Errno::EAGAIN) => {
            let message = "so many clients wait there already that there is no room for one more";
            return Err(io::Error::new(ErrorKind::TimedOut, message));
        }
        Err(e) => return Err(e.into()),
    }
    Ok(client)
}

fn by_descriptor(file: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn open_socket(path: &Path) -> io::Result<OwnedFd> {
    let socket = open_guarded(AT_FDCWD, path, OFlag::O_PATH)?;
    // With these flags a symbolic link is opened itself.
    let kind = kind_of(&fstat(&socket)?);
    if kind != SFlag::S_IFSOCK {
        return Err(strange(format!("it is {}, not a socket", words(kind))));
    }
    Ok(socket)
}

/// Makes `dir` and its parents, mode 0700, each for the owner of the folder that it lies in, and makes the
/// new entries durable.
pub fn create_dir_durable(dir: &Path) -> Result<()> {
    let attempt = || format!("create folder {}", dir.display());
    match folder(dir) {
        Ok(_) => return Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e).context(attempt),
    }
    let parent = parent_of(dir);
    if parent != dir {
        create_dir_durable(parent)?;
    }
    let Place { folder: inside, name } = Place::of(dir).context(attempt)?;
    match spare::with(|| Ok(nix::sys::stat::mkdirat(&inside, name, Mode::S_IRWXU)?)) {
        Ok(()) => {
            let owner = fstat(&inside).context(attempt)?;
            let made = open_guarded(&inside, Path::new(name), OFlag::O_RDONLY | OFlag::O_DIRECTORY);
            made.and_then(|made| give(&made, dir, &owner)).context(attempt)?;
            inside.sync_all().context(|| format!("sync folder {}", parent.display()))
        }
        Err(e) if e.kind() == ErrorKind::AlreadyExists => folder(dir).map(drop).context(attempt),
        Err(e) => Err(e).context(attempt),
    }
}

/// fsyncs a folder, so that names made, renamed or removed in it survive a power cut.
pub fn sync_dir(dir: &Path) -> Result<()> {
    folder(dir).and_then(|d| d.sync_all()).context(|| format!("sync folder {}", dir.display()))
}

/// Replaces `path` with `bytes`, mode 0600, atomically and durably: temporary file, fsync, rename,
/// fsync of the folder. After a power cut the file holds the old bytes or the new, never a mixture.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    write_and(path, bytes, rename)
}

/// As [`replace_file`], where there is no such file yet.
///
/// # Errors
/// `Other`, if there is one: it stays as it is.
pub fn create_file(path: &Path, bytes: &[u8]) -> Result<()> {
    write_and(path, bytes, |tmp, path| {
        link(&open(tmp)?, tmp, path)?;
        remove(tmp)
    })
}

fn write_and(path: &Path, bytes: &[u8], name: impl Fn(&Path, &Path) -> io::Result<()>) -> Result<()> {
    let tmp = {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.tmp", uuid::Uuid::new_v4().simple()));
        path.with_file_name(name)
    };
    let write = || -> io::Result<()> {
        let mut file = open_with(&tmp, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        name(&tmp, path)
    };
    // Best effort: the error that matters is the first one.
    let write = || write().inspect_err(|_| drop(remove(&tmp)));
    spare::with(write).context(|| format!("write {}", path.display()))?;
    sync_dir(parent_of(path))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn place() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        (dir, top)
    }

    #[test]
    fn no_part_of_a_path_is_a_link() {
        let (_dir, top) = place();
        std::fs::create_dir(top.join("real")).unwrap();
        std::fs::write(top.join("real/file"), "x").unwrap();
        symlink("real", top.join("link")).unwrap();
        symlink("real/file", top.join("name")).unwrap();
        assert_eq!(read(&top.join("real/file"), 1).unwrap(), b"x");
        for path in ["link/file", "name"].map(|path| top.join(path)) {
            let e = open(&path).unwrap_err();
            assert_eq!(crate::base::Error::from(e).kind(), crate::base::Kind::Corrupt, "{}", path.display());
        }
        assert!(folder(&top.join("link")).is_err() && names(&top.join("link")).is_err());
        assert!(
            remove(&top.join("link/file")).is_err()
                && rename(&top.join("link/file"), &top.join("x")).is_err()
        );
        assert!(
            set_mode(&top.join("name"), 0o777).is_err() && create_dir_durable(&top.join("link/new")).is_err()
        );
        assert!(remove_folder(&top.join("link")).is_err() && top.join("real/file").exists());
        assert!(replace_file(&top.join("link/file"), b"y").is_err());
        // A link that has the name is what is replaced or removed, and not what it leads to.
        replace_file(&top.join("name"), b"z").unwrap();
        assert_eq!(
            (read(&top.join("name"), 1).unwrap(), read(&top.join("real/file"), 1).unwrap()),
            (b"z".into(), b"x".into())
        );
        symlink("real/file", top.join("again")).unwrap();
        remove(&top.join("again")).unwrap();
        assert!(top.join("real/file").exists());
    }

    #[test]
    fn the_last_part_is_guarded_where_the_kernel_lacks_the_call() {
        let (_dir, top) = place();
        std::fs::write(top.join("file"), "x").unwrap();
        symlink("file", top.join("link")).unwrap();
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        assert_eq!(nix::fcntl::open(&top.join("link"), flags, Mode::empty()).unwrap_err(), Errno::ELOOP);
    }

    #[test]
    fn what_is_opened_is_what_was_asked_for() {
        let (_dir, top) = place();
        nix::unistd::mkfifo(&top.join("pipe"), Mode::S_IRWXU).unwrap();
        std::os::unix::net::UnixListener::bind(top.join("socket")).unwrap();
        std::fs::create_dir(top.join("folder")).unwrap();
        for name in ["pipe", "socket", "folder"] {
            for flags in [OFlag::O_RDONLY, OFlag::O_WRONLY, OFlag::O_RDWR] {
                assert!(open_with(&top.join(name), flags).is_err(), "{name}");
                assert!(open_layer(&top.join(name), flags).is_err(), "{name}");
            }
        }
        std::fs::write(top.join("file"), "four").unwrap();
        let file = open_with(&top.join("file"), OFlag::O_RDWR | OFlag::O_APPEND).unwrap();
        let flags = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        let flags = OFlag::from_bits_retain(flags);
        assert!(flags.contains(OFlag::O_APPEND) && !flags.contains(OFlag::O_NONBLOCK));
        assert!(read(&top.join("file"), 3).is_err() && read(&top.join("file"), 4).is_ok());
    }

    #[test]
    fn a_file_that_is_there_is_not_created_again() {
        let (_dir, top) = place();
        let path = top.join("record");
        create_file(&path, b"first").unwrap();
        let e = create_file(&path, b"second").unwrap_err();
        assert!(e.to_string().contains("exists"), "{e}");
        assert_eq!(read(&path, 100).unwrap(), b"first");
        assert_eq!(names(&top).unwrap(), ["record"], "no temporary file is left");
    }

    #[test]
    fn a_name_is_given_and_taken_for_the_file_that_is_open_alone() {
        let (_dir, top) = place();
        let (a, b, c) = (top.join("a"), top.join("b"), top.join("c"));
        std::fs::write(&a, "a").unwrap();
        std::fs::write(&b, "b").unwrap();
        let file = open(&a).unwrap();
        assert!(link(&file, &b, &c).is_err() && !c.exists(), "it is another file's name");
        link(&file, &a, &c).unwrap();
        assert!(is_at(&file, &c).unwrap());
        assert!(link(&file, &a, &b).is_err(), "the name is in use");
        assert!(remove_name_of(&file, &b).is_err() && b.exists());
        remove_name_of(&file, &c).unwrap();
        assert!(a.exists() && !c.exists());
    }

    #[test]
    fn a_socket_is_connected_to_by_its_own_name() {
        let (_dir, top) = place();
        let long = top.join("long".repeat(30));
        create_dir_durable(&long).unwrap();
        let _listener = inside(&long, || Ok(std::os::unix::net::UnixListener::bind("s")?)).unwrap();
        let connect = |path: &Path| super::connect(path, Duration::from_millis(50));
        connect(&long.join("s")).unwrap();
        symlink(long.join("s"), top.join("link")).unwrap();
        assert!(connect(&top.join("link")).is_err());
        // Nobody takes them in: there is an end to how many may wait.
        let mut waiting = Vec::new();
        let refused = loop {
            match connect(&long.join("s")) {
                Ok(client) => waiting.push(client),
                Err(e) => break e,
            }
        };
        assert_eq!(refused.kind(), ErrorKind::TimedOut);
    }
}
