//! Which operations on files a system call means. What is not understood fails the test.

use super::ptrace::{self, Call};
use super::recorder::Ledger;
use super::trace::{Ino, Kind, Op};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A name in a folder that is recorded.
#[derive(Debug)]
pub struct Place {
    folder: Ino,
    name: String,
    path: PathBuf,
}

/// Where in a file a call writes.
#[derive(Debug)]
pub enum At {
    /// Here.
    Offset(u64),
    /// Where the descriptor stands, before or (O_APPEND) at the end.
    Position,
    /// At the number at this address, which is moved on, or where the descriptor stands if it is null.
    Pointer(u64),
}

/// What a call will do if it succeeds.
#[derive(Debug)]
pub enum Plan {
    /// Nothing to a file that is recorded.
    Nothing,
    /// Something is said on standard output.
    Print,
    Open {
        place: Place,
        existed: bool,
        truncate: bool,
    },
    Make {
        place: Place,
    },
    Write {
        ino: Ino,
        fd: u64,
        at: At,
        durable: bool,
    },
    Operations(Vec<Op>),
    /// If it succeeds, it does something to a recorded file that is not modelled.
    NotModelled(String),
}

const CWD: u64 = libc::AT_FDCWD as u32 as u64;

/// What `call`, about to be made by `thread`, is going to do.
pub fn plan(thread: Pid, call: &Call, ledger: &Ledger) -> Plan {
    let [a, b, c, d, e, _] = call.arguments;
    let known = |fd: u64| ledger.file(thread, fd);
    let place = |folder: u64, path: u64| ledger.place(thread, folder, path);
    let operations = |ops: Option<Op>| ops.map_or(Plan::Nothing, |op| Plan::Operations(vec![op]));
    let write = |fd: u64, at: At, flags: u64| write(thread, ledger, fd, at, flags);
    match call.number {
        libc::SYS_open => open(thread, ledger, CWD, a, b),
        libc::SYS_creat => open(thread, ledger, CWD, a, (libc::O_CREAT | libc::O_TRUNC) as u64),
        libc::SYS_openat => open(thread, ledger, a, b, c),
        libc::SYS_openat2 => open(thread, ledger, a, b, number(thread, c)),
        libc::SYS_mkdir => make(place(CWD, a)),
        libc::SYS_mkdirat => make(place(a, b)),
        libc::SYS_bind => bind(thread, ledger, b, c),
        libc::SYS_write | libc::SYS_writev if a == 1 && known(a).is_none() => Plan::Print,
        libc::SYS_write | libc::SYS_writev => write(a, At::Position, 0),
        libc::SYS_pwrite64 | libc::SYS_pwritev => write(a, At::Offset(d), 0),
        libc::SYS_pwritev2 if d == u64::MAX => write(a, At::Position, call.arguments[5]),
        libc::SYS_pwritev2 => write(a, At::Offset(d), call.arguments[5]),
        libc::SYS_sendfile => write(a, At::Position, 0),
        libc::SYS_copy_file_range | libc::SYS_splice => write(c, At::Pointer(d), 0),
        libc::SYS_ftruncate => operations(known(a).map(|ino| Op::SetLen { ino, len: b })),
        libc::SYS_fallocate => known(a).map_or(Plan::Nothing, |ino| allocate(thread, ino, a, b, c, d)),
        libc::SYS_fchmod => operations(known(a).map(|ino| Op::Mode { ino, mode: b as u32 })),
        libc::SYS_chmod => operations(place(CWD, a).map(|p| Op::Mode { ino: p.ino(), mode: b as u32 })),
        libc::SYS_fchmodat | libc::SYS_fchmodat2 => {
            operations(place(a, b).map(|p| Op::Mode { ino: p.ino(), mode: c as u32 }))
        }
        libc::SYS_fsync => operations(known(a).map(|ino| Op::Sync { ino, all: true })),
        libc::SYS_fdatasync => operations(known(a).map(|ino| Op::Sync { ino, all: false })),
        // It promises nothing that survives a power cut (sync_file_range(2)).
        libc::SYS_sync_file_range => Plan::Nothing,
        // Of a place outside, which no cut hits. What is recorded is not taken for synced by it.
        libc::SYS_syncfs => Plan::Nothing,
        libc::SYS_rename => rename(place(CWD, a), place(CWD, b), 0),
        libc::SYS_renameat => rename(place(a, b), place(c, d), 0),
        libc::SYS_renameat2 => rename(place(a, b), place(c, d), e),
        libc::SYS_link => link(place(CWD, a), place(CWD, b)),
        libc::SYS_linkat => link(place(a, b), place(c, d)),
        libc::SYS_unlink | libc::SYS_rmdir => operations(place(CWD, a).map(Place::removed)),
        libc::SYS_unlinkat => operations(place(a, b).map(Place::removed)),
        libc::SYS_mmap => {
            let shared = matches!(d & libc::MAP_TYPE as u64, 1 | 3) && c & libc::PROT_WRITE as u64 != 0;
            let recorded = shared && known(e).is_some();
            if recorded { Plan::NotModelled("a mapping that can be written".into()) } else { Plan::Nothing }
        }
        libc::SYS_mprotect if c & libc::PROT_WRITE as u64 != 0 => ledger.check_mappings(thread, a, b),
        libc::SYS_mprotect => Plan::Nothing,
        libc::SYS_io_uring_enter if b == 0 => Plan::Nothing,
        libc::SYS_io_uring_enter => check_submissions(thread),
        libc::SYS_ioctl => ioctl(known(a), b),
        number => {
            panic!("thread {thread} makes system call {number}, which the recorder does not know: {call:?}")
        }
    }
}

fn open(thread: Pid, ledger: &Ledger, folder: u64, path: u64, flags: u64) -> Plan {
    let has = |flag: i32| flags & flag as u64 == flag as u64;
    if has(libc::O_TMPFILE) && ledger.place(thread, folder, path).is_some() {
        return Plan::NotModelled("a file without a name (O_TMPFILE)".into());
    }
    if !has(libc::O_CREAT) && !has(libc::O_TRUNC) {
        return Plan::Nothing;
    }
    let Some(place) = ledger.place(thread, folder, path) else { return Plan::Nothing };
    let existed = place.path.symlink_metadata().is_ok();
    Plan::Open { place, existed, truncate: has(libc::O_TRUNC) }
}

fn make(place: Option<Place>) -> Plan {
    place.map_or(Plan::Nothing, |place| Plan::Make { place })
}

fn bind(thread: Pid, ledger: &Ledger, address: u64, len: u64) -> Plan {
    let bytes = ptrace::memory(thread, address, len as usize).expect("read an address");
    let is_named = bytes.len() > 2 && bytes[..2] == (libc::AF_UNIX as u16).to_ne_bytes() && bytes[2] != 0;
    make(is_named.then(|| ledger.place(thread, CWD, address + 2)).flatten())
}

fn write(thread: Pid, ledger: &Ledger, fd: u64, at: At, flags: u64) -> Plan {
    let Some(ino) = ledger.file(thread, fd) else { return Plan::Nothing };
    let opened = u64::from_str_radix(&fdinfo(thread, fd, "flags"), 8).expect("flags in octal");
    let durable = flags & (libc::RWF_DSYNC | libc::RWF_SYNC) as u64 | opened & libc::O_DSYNC as u64 != 0;
    let at = match at {
        At::Pointer(0) => At::Position,
        // pwrite(2): on a file that is open for appending, the offset is ignored on Linux.
        At::Offset(_) if opened & libc::O_APPEND as u64 != 0 => {
            return Plan::NotModelled("a write at an offset of a file open for appending".into());
        }
        at => at,
    };
    Plan::Write { ino, fd, at, durable }
}

fn allocate(thread: Pid, ino: Ino, fd: u64, mode: u64, offset: u64, len: u64) -> Plan {
    let keeps = mode & libc::FALLOC_FL_KEEP_SIZE as u64 != 0;
    let zero = Op::Zero { ino, offset, len };
    let size = fs::metadata(format!("/proc/{thread}/fd/{fd}")).expect("it is open").len();
    let longer = (!keeps && offset + len > size).then_some(Op::SetLen { ino, len: offset + len });
    match mode as i32 & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Plan::Operations(longer.into_iter().collect()),
        libc::FALLOC_FL_PUNCH_HOLE => Plan::Operations(vec![zero]),
        libc::FALLOC_FL_ZERO_RANGE => Plan::Operations(longer.into_iter().chain([zero]).collect()),
        _ => Plan::NotModelled(format!("fallocate in mode {mode}")),
    }
}

fn rename(from: Option<Place>, to: Option<Place>, flags: u64) -> Plan {
    match (from, to) {
        (None, None) => Plan::Nothing,
        (Some(from), Some(to))
            if from.folder == to.folder && flags & !u64::from(libc::RENAME_NOREPLACE) == 0 =>
        {
            Plan::Operations(vec![Op::Rename { folder: from.folder, from: from.name, to: to.name }])
        }
        other => Plan::NotModelled(format!("a rename with flags {flags}: {other:?}")),
    }
}

fn link(from: Option<Place>, to: Option<Place>) -> Plan {
    match (from, to) {
        (_, None) => Plan::Nothing,
        (Some(from), Some(to)) => {
            Plan::Operations(vec![Op::Link { folder: to.folder, name: to.name, ino: from.ino() }])
        }
        (None, Some(to)) => Plan::NotModelled(format!("a link from elsewhere to {}", to.path.display())),
    }
}

fn ioctl(file: Option<Ino>, request: u64) -> Plan {
    /// FS_IOC_FIEMAP (linux/fiemap.h).
    const FIEMAP: u64 = 0xc020_660b;
    match (file, request) {
        (None, _) | (_, FIEMAP) => Plan::Nothing,
        _ => Plan::NotModelled(format!("ioctl {request:#x}")),
    }
}

/// Looks at every entry of every submission queue of the process: none may write. On a memory file system
/// sealblk uses io_uring to wait and nothing else.
fn check_submissions(thread: Pid) -> Plan {
    /// IORING_OFF_SQES (linux/io_uring.h).
    const ENTRIES: &str = "10000000";
    /// IORING_OP_NOP, POLL_ADD, POLL_REMOVE, TIMEOUT, TIMEOUT_REMOVE, ASYNC_CANCEL, READ, READ_FIXED, READV.
    const HARMLESS: [u8; 9] = [0, 6, 7, 11, 12, 14, 22, 4, 1];
    for (range, line) in mappings(thread) {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        if fields.get(5).is_some_and(|name| name.contains("[io_uring]")) && fields[2] == ENTRIES {
            let bytes = ptrace::memory(thread, range.start, (range.end - range.start) as usize);
            let bytes = bytes.unwrap_or_else(|e| panic!("read a submission queue: {e}"));
            let writes = bytes.chunks(64).find(|entry| !HARMLESS.contains(&entry[0]));
            if let Some(entry) = writes {
                return Plan::NotModelled(format!("io_uring operation {}", entry[0]));
            }
        }
    }
    Plan::Nothing
}

/// Notes what a call has done; `result` is what it answered, which is no error.
pub fn carried_out(thread: Pid, plan: Plan, result: u64, ledger: &mut Ledger) {
    match plan {
        Plan::Nothing | Plan::Print => {}
        Plan::Open { place, existed: false, .. } | Plan::Make { place } => ledger.push(place.made()),
        Plan::Open { place, truncate: true, .. } => ledger.push(Op::SetLen { ino: place.ino(), len: 0 }),
        Plan::Open { .. } => {}
        Plan::Write { ino, fd, at, durable } => {
            let offset = match at {
                At::Offset(offset) => offset,
                At::Position => fdinfo(thread, fd, "pos").parse::<u64>().expect("a position") - result,
                At::Pointer(address) => number(thread, address) - result,
            };
            let mut data = vec![0; result as usize];
            let file = fs::File::open(format!("/proc/{thread}/fd/{fd}")).expect("open it once more");
            file.read_exact_at(&mut data, offset).expect("it was written just now");
            ledger.push(Op::Write { ino, offset, data, durable });
        }
        Plan::Operations(ops) => ops.into_iter().for_each(|op| ledger.push(op)),
        Plan::NotModelled(what) => panic!("thread {thread} does what the recorder cannot record: {what}"),
    }
}

impl Ledger {
    /// The recorded file that a descriptor of a thread leads to.
    fn file(&self, thread: Pid, fd: u64) -> Option<Ino> {
        let found = fs::metadata(format!("/proc/{thread}/fd/{}", fd as i32)).ok()?;
        let ours = found.dev() == self.device && (found.is_file() || found.is_dir());
        if ours && !self.known.contains(&found.ino()) {
            let path = fs::read_link(format!("/proc/{thread}/fd/{}", fd as i32)).unwrap_or_default();
            assert!(!path.starts_with(&self.top), "{} was made behind the recorder's back", path.display());
        }
        (ours && self.known.contains(&found.ino())).then(|| found.ino())
    }

    /// The name that a path means for a thread, if it lies in a recorded folder.
    fn place(&self, thread: Pid, folder: u64, path: u64) -> Option<Place> {
        let path = ptrace::text(thread, path).expect("read a path");
        let start = match folder as i32 {
            libc::AT_FDCWD => format!("/proc/{thread}/cwd"),
            fd => format!("/proc/{thread}/fd/{fd}"),
        };
        if path.starts_with("/proc/") {
            let end = fs::read_link(path.replacen("/proc/self/", &format!("/proc/{thread}/"), 1));
            assert!(!end.is_ok_and(|p| p.starts_with(&self.top)), "{path} leads to what is recorded");
            return None;
        }
        let path = fs::read_link(start).unwrap_or_default().join(path);
        let (parent, name) = (path.parent()?.canonicalize().ok()?, path.file_name()?.to_str()?.to_owned());
        if !parent.starts_with(&self.top) {
            return None;
        }
        let folder = fs::metadata(&parent).expect("it is there").ino();
        assert!(self.known.contains(&folder), "{} was made behind the recorder's back", parent.display());
        Some(Place { folder, path: parent.join(&name), name })
    }

    /// Whether a range of memory that is going to be writable belongs to a recorded file.
    fn check_mappings(&self, thread: Pid, address: u64, len: u64) -> Plan {
        let top = self.top.display().to_string();
        let touched = mappings(thread)
            .into_iter()
            .filter(|(range, _)| range.start < address + len && address < range.end);
        match touched.into_iter().find(|(_, line)| line.contains(&top) && line.contains("s ")) {
            Some((_, line)) => Plan::NotModelled(format!("a mapping is made writable: {line}")),
            None => Plan::Nothing,
        }
    }
}

impl Place {
    fn ino(&self) -> Ino {
        let found = self.path.symlink_metadata().unwrap_or_else(|e| panic!("{}: {e}", self.path.display()));
        assert!(!found.is_symlink(), "{} is a symbolic link", self.path.display());
        found.ino()
    }

    fn made(self) -> Op {
        let found = self.path.symlink_metadata().expect("it was made just now");
        let kind = match found.file_type() {
            kind if kind.is_file() => Kind::File,
            kind if kind.is_dir() => Kind::Folder,
            kind if kind.is_socket() => Kind::Socket,
            kind => panic!("{} is a {kind:?}, which is not modelled", self.path.display()),
        };
        Op::Make { folder: self.folder, name: self.name, ino: found.ino(), kind, mode: found.mode() & 0o7777 }
    }

    fn removed(self) -> Op {
        Op::Remove { folder: self.folder, name: self.name }
    }
}

/// A line of a descriptor's file in /proc.
fn fdinfo(thread: Pid, fd: u64, name: &str) -> String {
    let path = format!("/proc/{thread}/fdinfo/{fd}");
    let text = fs::read_to_string(Path::new(&path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.expect("every descriptor has it").trim().to_owned()
}

/// Where the process of a thread has what in its memory: lines of /proc/<pid>/maps.
fn mappings(thread: Pid) -> Vec<(std::ops::Range<u64>, String)> {
    let text = fs::read_to_string(format!("/proc/{thread}/maps")).expect("it is stopped");
    let address = |text: &str| u64::from_str_radix(text, 16).expect("an address");
    let line = |line: &str| {
        let (start, rest) = line.split_once('-').expect("a range");
        let end = rest.split(' ').next().expect("a range");
        (address(start)..address(end), line.to_owned())
    };
    text.lines().map(line).collect()
}

/// The number at an address of a thread.
fn number(thread: Pid, address: u64) -> u64 {
    let bytes = ptrace::memory(thread, address, 8).expect("read a number");
    u64::from_ne_bytes(bytes.try_into().expect("eight bytes"))
}
