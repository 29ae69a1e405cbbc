//! The io_urings of a process: what they may do, and where they come from once no more can be made.
//!
//! The kernel does what a ring is asked to do without asking a system call filter, so each ring takes only
//! the operations that serve a layer, from its beginning to its end. A confined process cannot make rings at
//! all: it makes as many as it will need beforehand ([`prepare`]). A queue's thread has its own ([`claim`])
//! and gets the same one again and again; others share a few.

use super::pool::Pool;
use crate::base::sync::Locked;
use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;
use std::{fs, io};

/// What may be asked of a ring.
const OPERATIONS: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];
/// What may be registered with a ring (io_uring_register(2)): buffers, other files in the places that there
/// are for files, and that it is to begin.
pub const REGISTRATIONS: [u8; 4] = [BUFFERS, NO_BUFFERS, OTHER_FILES, ENABLE];
const BUFFERS: u8 = 0;
const NO_BUFFERS: u8 = 1;
const OTHER_FILES: u8 = 6;
const ENABLE: u8 = 12;
/// `IORING_ENTER_GETEVENTS` of io_uring_enter(2): completions are looked for.
const GET_EVENTS: u32 = 1;

/// Entries of a ring that is made before its use is known: what a thread submits at a time.
/// More waits in its queue.
const PREPARED_ENTRIES: u32 = 256;
/// Room for completions: more than a queue may have in flight.
const PREPARED_COMPLETIONS: u32 = 2048;

/// The most places for files, which are empty at first: the layers of a volume are there twice while it gets
/// other ones.
const FILES: usize = 256;

/// What was made beforehand; none at all in a process that makes rings as it needs them.
static PREPARED: Mutex<Option<Prepared>> = Mutex::new(None);

struct Prepared {
    /// One for each thread that claims one. Such a ring belongs to the thread that it begins with, which is
    /// faster.
    own: Vec<Made>,
    /// For whoever needs one for a while.
    shared: Vec<Made>,
}

thread_local! {
    /// This thread's own, as long as it does not use it.
    static KEPT: RefCell<Option<Made>> = const { RefCell::new(None) };
}

/// Makes rings for so many threads that will [`claim`] theirs, and for so many others at a time. From here on
/// no other is made, and who finds none left is told so.
pub fn prepare(claims: usize, others: usize) -> io::Result<()> {
    let make = |shared| build(PREPARED_ENTRIES, Some(PREPARED_COMPLETIONS), shared);
    let rings = |count, shared| (0..count).map(|_| make(shared)).collect::<io::Result<Vec<_>>>();
    let prepared = Prepared { own: rings(claims, false)?, shared: rings(others, true)? };
    *PREPARED.locked() = Some(prepared);
    Ok(())
}

/// Gives this thread a ring of its own, until it ends, if there is one.
pub fn claim() {
    if let Some(prepared) = &mut *PREPARED.locked() {
        KEPT.set(prepared.own.pop());
    }
}

struct Made {
    ring: IoUring,
    shared: bool,
    deferred: bool,
    begun: bool,
    /// How many places for files there are.
    places: usize,
    next_serial: u32,
}

/// A ring that this thread uses.
pub struct Ring {
    /// `None` only while it is being dropped.
    made: Option<Made>,
    /// Whether it holds nothing of its last user's.
    clean: bool,
}

impl Ring {
    /// A ring for `entries` submissions at a time; for fewer, where it was made beforehand.
    pub fn take(entries: u32) -> io::Result<Self> {
        let kept = KEPT.take();
        let mut made = kept.map_or_else(|| new_or_prepared(entries), Ok)?;
        if !made.begun {
            made.ring.submitter().register_enable_rings().map_err(explained)?;
            made.begun = true;
        }
        Ok(Ring { made: Some(made), clean: false })
    }

    /// How many places for files there are.
    pub(super) fn places(&self) -> usize {
        self.made.as_ref().expect("there until drop").places
    }

    /// A number that no other watch on this ring has or had, until they repeat.
    pub fn next_serial(&mut self) -> u32 {
        let made = self.made.as_mut().expect("there until drop");
        made.next_serial = made.next_serial.wrapping_add(1);
        made.next_serial
    }

    /// Has the kernel do what it has left for the next time that it is entered.
    pub fn take_in(&self) -> io::Result<()> {
        // SAFETY: nothing is submitted, nothing is waited for, and there is no argument.
        unsafe { self.submitter().enter::<libc::sigset_t>(0, 0, GET_EVENTS, None) }.map(drop)
    }

    /// Forgets buffers, where there are some. Nothing may be in flight, and no file may be in its places.
    pub fn forget(&mut self, buffers: bool) {
        let forgotten = if buffers { self.submitter().unregister_buffers() } else { Ok(()) };
        // The kernel may let go of a request, and of the files it used, only when the ring is entered after
        // its completion. Should it refuse that now, it does so with the next queue that has the ring.
        let _ = self.take_in();
        match forgotten {
            Ok(()) => self.clean = true,
            Err(e) => log::error!("giving up an io_uring: {e}"),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let Some(made) = self.made.take().filter(|_| self.clean) else { return };
        // Where more can be made, this one goes.
        let mut prepared = PREPARED.locked();
        let Some(prepared) = &mut *prepared else { return };
        if made.shared {
            prepared.shared.push(made);
        } else {
            // A thread that is ending has no use for it.
            let _ = KEPT.try_with(|kept| kept.replace(Some(made)));
        }
    }
}

impl Deref for Ring {
    type Target = IoUring;

    fn deref(&self) -> &IoUring {
        &self.made.as_ref().expect("there until drop").ring
    }
}

impl DerefMut for Ring {
    fn deref_mut(&mut self) -> &mut IoUring {
        &mut self.made.as_mut().expect("there until drop").ring
    }
}

fn new_or_prepared(entries: u32) -> io::Result<Made> {
    match &mut *PREPARED.locked() {
        None => build(entries, None, false),
        Some(prepared) => {
            let none = || io::Error::other("every io_uring of this process is in use");
            prepared.shared.pop().ok_or_else(none)
        }
    }
}

/// A ring that has not begun. One that is not shared is for the thread that lets it begin.
fn build(entries: u32, completions: Option<u32>, shared: bool) -> io::Result<Made> {
    let mut builder = IoUring::builder();
    builder.setup_clamp().setup_submit_all().setup_r_disabled();
    if let Some(completions) = completions {
        builder.setup_cqsize(completions);
    }
    let mut best = builder.clone();
    if !shared {
        // Completions are worked off by this thread when it enters the kernel anyway, never by an interrupt.
        best.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    }
    let ring = best.build(entries).map(|ring| (ring, !shared)).or_else(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => Ok((builder.build(entries)?, false)),
        _ => Err(e),
    });
    let (ring, deferred) = ring.map_err(explained)?;
    // The kernel makes no more than a process may have files open.
    let places = getrlimit(Resource::RLIMIT_NOFILE).map_or(FILES, |(soft, _)| FILES.min(soft as usize));
    ring.submitter().register_files(&[-1; FILES][..places]).map_err(explained)?;
    let operations = OPERATIONS.map(Restriction::sqe_op);
    let registrations = REGISTRATIONS.map(Restriction::register_op);
    let flags = [Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits())];
    let mut all: Vec<Restriction> = operations.into_iter().chain(registrations).chain(flags).collect();
    ring.submitter().register_restrictions(&mut all).map_err(explained)?;
    Ok(Made { ring, shared, deferred, begun: false, places, next_serial: 0 })
}

/// What a trial of an io_uring has shown.
pub struct Tried {
    /// Completions cost no interrupt.
    pub deferred: bool,
    /// Why the kernel looks up the bounce buffers' pages for each request, where it does.
    pub no_buffers: Option<io::Error>,
    /// The bounce buffers lie in huge pages.
    pub huge_pages: bool,
}

/// Makes one as a queue has it, and gives it up.
///
/// # Errors
/// Those that a queue would meet, with what keeps the process from having one.
pub fn try_one() -> io::Result<Tried> {
    let made = build(PREPARED_ENTRIES, Some(PREPARED_COMPLETIONS), false)?;
    made.ring.submitter().register_enable_rings().map_err(explained)?;
    let pool = Pool::new(true)?;
    // SAFETY: the ring ends before the pool does: it is dropped first, at the end of this function, and
    // nothing is in flight.
    let registered = unsafe { made.ring.submitter().register_buffers(&[pool.iovec()]) };
    let deferred = made.deferred;
    drop(made);
    let huge_pages = pool.is_huge();
    Ok(Tried { deferred, no_buffers: registered.err().map(explained), huge_pages })
}

/// An error of the kernel's about an io_uring, with what is behind it, in words for who can change that.
pub(super) fn explained(e: io::Error) -> io::Error {
    let why = match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => who_forbids(fs::read_to_string(DISABLED).ok().as_deref()),
        Some(libc::ENOSYS) => "this kernel has none, or a container's filter of system calls says so".into(),
        Some(libc::EINVAL) => "this kernel's is too old: it takes Linux 5.11".into(),
        Some(libc::ENOMEM) => match getrlimit(Resource::RLIMIT_MEMLOCK) {
            Ok((soft, _)) if soft != RLIM_INFINITY => format!(
                "there is no memory, or this process may lock no more than {} KiB of it (\"ulimit -l\", \
                 LimitMEMLOCK= in a systemd unit)",
                soft >> 10
            ),
            _ => "there is no memory, or the control group has no more".into(),
        },
        Some(libc::EMFILE) => match getrlimit(Resource::RLIMIT_NOFILE) {
            Ok((soft, _)) => format!(
                "this process may have {soft} open files (\"ulimit -n\", LimitNOFILE= in a systemd unit)"
            ),
            Err(_) => "this process has too many open files".into(),
        },
        Some(libc::ENFILE) => "the machine has too many open files (fs.file-max)".into(),
        _ => return io::Error::new(e.kind(), format!("io_uring is not available: {e}")),
    };
    io::Error::new(io::ErrorKind::Unsupported, format!("io_uring is not available: {e}; {why}"))
}

/// Where the kernel says who may have one.
const DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";

/// Why a process may not have an io_uring, given what the file says.
fn who_forbids(disabled: Option<&str>) -> String {
    match disabled.map(str::trim) {
        Some("2") => "nobody on this machine may have one: the sysctl kernel.io_uring_disabled is 2".into(),
        Some("1") => {
            let why = "the sysctl kernel.io_uring_disabled is 1: it takes CAP_SYS_ADMIN on the host, which \
                       root in a user namespace does not have, or the group that kernel.io_uring_group names";
            why.into()
        }
        _ => {
            let why = "a filter of system calls forbids it: a container's seccomp profile, or \
                       SystemCallFilter= in a systemd unit";
            why.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::types::Fd;

    /// What becomes of one operation.
    fn result(ring: &mut IoUring, entry: squeue::Entry) -> i32 {
        // SAFETY: the entries below refer to no memory.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn what_keeps_a_process_from_having_a_ring_is_told_apart() {
        assert!(who_forbids(Some("2\n")).contains("io_uring_disabled is 2"));
        assert!(who_forbids(Some("1\n")).contains("user namespace"));
        for no_reason in [Some("0\n"), None] {
            assert!(who_forbids(no_reason).contains("seccomp profile"));
        }
        for (errno, word) in [
            (libc::ENOSYS, "this kernel has none"),
            (libc::EMFILE, "LimitNOFILE="),
            (libc::ENFILE, "fs.file-max"),
            (libc::ENOMEM, "no memory"),
            (libc::EINVAL, "Linux 5.11"),
        ] {
            let said = explained(io::Error::from_raw_os_error(errno));
            assert_eq!(said.kind(), io::ErrorKind::Unsupported);
            assert!(said.to_string().contains(word), "{said}");
        }
        assert!(try_one().is_ok());
    }

    #[test]
    fn a_ring_does_what_serves_a_layer_and_nothing_else() {
        let mut ring = Ring::take(8).unwrap();
        let socket = opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build();
        assert_eq!(result(&mut ring, socket), -libc::EACCES);
        assert_eq!(result(&mut ring, opcode::AsyncCancel::new(1).build()), -libc::EACCES);
        let linked = opcode::Fsync::new(Fd(-1)).build();
        assert_eq!(result(&mut ring, linked.clone().flags(squeue::Flags::ASYNC)), -libc::EACCES);
        assert_eq!(result(&mut ring, linked), -libc::EBADF);
        let refused = ring.submitter().register_eventfd(0).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    }
}
