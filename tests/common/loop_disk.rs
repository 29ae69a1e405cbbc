//! A disk of the test's own with a file system on it: a loop device with blocks of a size
//! that the test chooses.
//!
//! Nothing of it can be left behind, whatever becomes of the test: the disk's bytes are a file without a
//! name, the loop device ends with its last user, and it is mounted in a mount namespace that only the test's
//! thread is in, and what that starts.

#![allow(dead_code, reason = "each test program uses its own part of this")]

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use std::ffi::CString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const GET_FREE: libc::c_ulong = 0x4c82;
const CONFIGURE: libc::c_ulong = 0x4c0a;
const SET_CAPACITY: libc::c_ulong = 0x4c07;
/// The device is let go when nobody has it open.
const AUTOCLEAR: u32 = 4;

/// A disk with a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Bytes in a block of the disk.
    pub block: u32,
    /// `ext4`, `xfs` or `btrfs`.
    pub file_system: &'static str,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on a disk with blocks of {} bytes", self.file_system, self.block)
    }
}

/// A disk that is mounted until this is dropped.
pub struct LoopDisk {
    _mounted: Mounted,
    /// Its block device.
    pub device: PathBuf,
}

/// `struct loop_config` of linux/loop.h, as far as it is used.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    unused: [u64; 5],
    more_unused: [u32; 3],
    flags: u32,
    rest: [u8; 64 + 64 + 32 + 16 + 64],
}

impl LoopDisk {
    /// Makes such a disk of 320 MiB, empty, and mounts it on a folder, which is made. Where this
    /// machine or this user cannot, that is said on standard error, also where the output of tests is
    /// not shown, and there is none.
    pub fn mount(kind: Kind, folder: &Path) -> Option<Self> {
        Self::attempt(kind, folder)
            .inspect_err(|why| {
                // Not by a macro, whose output is captured.
                let _ = writeln!(io::stderr(), "NOT TESTED on {kind}, which cannot be had here: {why}");
            })
            .ok()
    }

    fn attempt(kind: Kind, folder: &Path) -> Result<Self, String> {
        let said = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
        be_alone()?;
        let bytes = tempfile::tempfile().expect("a temporary file");
        bytes.set_len(320 << 20).expect("make it longer");
        let (_in_use, device) = attach(&bytes, kind.block).map_err(said("a loop device"))?;
        let format = format!("mkfs.{}", kind.file_system);
        let quiet: &[&str] = if kind.file_system == "ext4" { &["-q", "-F"] } else { &["-q", "-f"] };
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("ci/tool");
        let made = Command::new(tool).arg(&format).args(quiet).arg(&device).output().expect("start ci/tool");
        let words = String::from_utf8_lossy(&made.stderr);
        if !made.status.success() && words.contains("ci/setup") {
            return Err(words.trim().into());
        }
        assert!(made.status.success(), "{format}: {words}");
        std::fs::create_dir_all(folder).expect("make a folder");
        let device_name = device.to_str().expect("UTF-8");
        match mount(device_name, folder, kind.file_system, None) {
            Ok(()) => Ok(LoopDisk { _mounted: Mounted(folder.to_owned()), device }),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Err("the kernel does not know it".into()),
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => Err(format!("mount: {e}")),
            // Of a kernel whose pages are smaller than the blocks, say.
            Err(e) => panic!("mount {kind}: {e}"),
        }
    }
}

/// A disk without a file system, which is there until this is dropped.
pub struct BareDisk {
    /// Its block device.
    pub device: PathBuf,
    in_use: File,
    bytes: File,
}

impl BareDisk {
    /// Makes one of so many bytes, all of them 0xff, with blocks of a size.
    pub fn new(len: u64, block: u32) -> Option<Self> {
        let mut bytes = tempfile::tempfile().expect("a temporary file");
        for _ in 0..len / 4096 {
            bytes.write_all(&[0xff; 4096]).expect("fill it");
        }
        Self::of(bytes, block)
    }

    /// Makes one of so many bytes, all of them zero, with blocks of a size.
    pub fn zeros(len: u64, block: u32) -> Option<Self> {
        let bytes = tempfile::tempfile().expect("a temporary file");
        bytes.set_len(len).expect("make it longer");
        Self::of(bytes, block)
    }

    fn of(bytes: File, block: u32) -> Option<Self> {
        match attach(&bytes, block) {
            Ok((in_use, device)) => Some(BareDisk { device, in_use, bytes }),
            Err(why) => {
                let _ =
                    writeln!(io::stderr(), "NOT TESTED on a block device, which cannot be had here: {why}");
                None
            }
        }
    }

    /// Its block device, as an argument.
    pub fn name(&self) -> &str {
        self.device.to_str().expect("UTF-8")
    }

    /// Makes it longer, or shorter, as a volume manager does.
    pub fn set_len(&self, len: u64) {
        self.bytes.set_len(len).expect("give it another length");
        // SAFETY: this request has no argument.
        let done = unsafe { libc::ioctl(self.in_use.as_raw_fd(), SET_CAPACITY, 0) };
        Errno::result(done).expect("tell the device of its length");
    }

    /// Takes its bytes away behind the first so many, without the device's knowing: reads there fail.
    pub fn lose_behind(&self, len: u64) {
        self.bytes.set_len(len).expect("give it another length");
    }

    /// Overwrites bytes, past all caches.
    pub fn overwrite(&self, at: u64, bytes: &[u8]) {
        let device = OpenOptions::new().write(true).open(&self.device).expect("open the device");
        device.write_all_at(bytes, at).expect("write to the device");
        device.sync_all().expect("sync the device");
    }

    /// How much of its bytes' file is allocated.
    pub fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.bytes.sync_all().expect("sync it");
        self.bytes.metadata().expect("look at it").blocks() * 512
    }

    /// What it holds.
    pub fn content(&self) -> Vec<u8> {
        let len = (&self.in_use).seek(SeekFrom::End(0));
        let mut bytes = vec![0; len.expect("it has a length") as usize];
        self.in_use.read_exact_at(&mut bytes, 0).expect("read the device");
        bytes
    }
}

/// A memory file system that is mounted until this is dropped.
pub struct MemoryDisk(Mounted);

impl MemoryDisk {
    /// Mounts one of so many bytes, as [`LoopDisk::mount`] does.
    pub fn mount(size: u64, folder: &Path) -> Option<Self> {
        let attempt = || {
            be_alone()?;
            let options = CString::new(format!("size={size}")).expect("no zero byte");
            mount("tmpfs", folder, "tmpfs", Some(&options)).map_err(|e| format!("mount: {e}"))
        };
        match attempt() {
            Ok(()) => Some(MemoryDisk(Mounted(folder.to_owned()))),
            Err(why) => {
                let _ = writeln!(io::stderr(), "NOT TESTED on a tmpfs, which cannot be had here: {why}");
                None
            }
        }
    }

    /// From now on nobody writes to it.
    pub fn make_read_only(&self) {
        let folder = CString::new(self.folder().as_os_str().as_bytes()).expect("no zero byte");
        let (none, flags) = (c"none".as_ptr(), libc::MS_REMOUNT | libc::MS_RDONLY);
        // SAFETY: the texts end with a zero byte, and there are neither a type nor options.
        let done = unsafe { libc::mount(none, folder.as_ptr(), std::ptr::null(), flags, std::ptr::null()) };
        Errno::result(done).expect("remount it read-only");
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.0.0
    }
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let folder = CString::new(self.0.as_os_str().as_bytes()).expect("no zero byte");
        // SAFETY: the path ends with a zero byte. What still uses the mount keeps it until it ends.
        unsafe { libc::umount2(folder.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Gives the bytes of a file to a free loop device, which has them as long as somebody has the device open.
fn attach(bytes: &File, block: u32) -> io::Result<(File, PathBuf)> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    loop {
        // SAFETY: this request has no argument.
        let number = Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE) })?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(true).open(&path)?;
        let config = Config {
            fd: bytes.as_raw_fd() as u32,
            block_size: block,
            unused: [0; 5],
            more_unused: [0; 3],
            flags: AUTOCLEAR,
            rest: [0; 240],
        };
        const { assert!(size_of::<Config>() == 304) };
        // SAFETY: the request reads a `struct loop_config`, of the same size and layout.
        match Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), CONFIGURE, &config) }) {
            Ok(_) => return Ok((device, path)),
            // Somebody else was faster.
            Err(Errno::EBUSY) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Puts this thread into a mount namespace of its own, of which others see nothing.
fn be_alone() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("a mount namespace: {e}"))?;
    let (none, root, flags) = (c"none".as_ptr(), c"/".as_ptr(), libc::MS_REC | libc::MS_PRIVATE);
    // SAFETY: the texts end with a zero byte, and there are neither a type nor options.
    let done = unsafe { libc::mount(none, root, std::ptr::null(), flags, std::ptr::null()) };
    Errno::result(done).map(drop).map_err(|e| format!("private mounts: {e}"))
}

fn mount(what: &str, on: &Path, kind: &str, options: Option<&CString>) -> io::Result<()> {
    let text = |text: &str| CString::new(text).expect("no zero byte");
    let (what, kind) = (text(what), text(kind));
    let on = CString::new(on.as_os_str().as_bytes()).expect("no zero byte");
    let options = options.map_or(std::ptr::null(), |options| options.as_ptr().cast());
    // SAFETY: each text ends with a zero byte; options may be missing.
    let done = unsafe { libc::mount(what.as_ptr(), on.as_ptr(), kind.as_ptr(), 0, options) };
    Errno::result(done)?;
    Ok(())
}
