//! Child processes that a test starts: none outlives it, none is waited for without end.

use super::patience::{Deadline, limit};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

/// The repository, where `ci/` is.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A program out of the Debian packages that `./ci/setup` unpacked: `qemu-img`, `cryptsetup`, …
pub fn tool(program: &str) -> Command {
    let mut command = Command::new(repository().join("ci/tool"));
    command.arg(program);
    command
}

/// Makes the child die with the thread that spawns it, so that a killed test leaves nothing running, and lets
/// it inherit `keep`. Signals mean to it what they mean to a program that a terminal starts, also where the
/// tests run in the background of a script.
///
/// The thread is the test's own: a child must not be spawned from a helper thread that ends earlier.
pub fn tie_to_test(command: &mut Command, keep: Vec<OwnedFd>) {
    let parent = nix::unistd::getpid();
    // SAFETY: between fork and exec the closure only makes system calls (prctl, getppid, sigaction, fcntl) on
    // values that it owns; it does not allocate.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            if nix::unistd::getppid() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            for of_terminals in [Signal::SIGINT, Signal::SIGQUIT] {
                signal(of_terminals, SigHandler::SigDfl)?;
            }
            for fd in &keep {
                nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
            }
            Ok(())
        });
    }
}

/// The number by which a child finds what it inherits: far from those that it opens, and from those that the
/// test has open when it starts the child, which the number would be taken from.
pub const INHERITED: i32 = 700;

/// Gives `command` the descriptor as number `number`.
pub fn inherit(command: &mut Command, descriptor: OwnedFd, number: i32) {
    // SAFETY: between fork and exec the closure makes one system call, on a descriptor that it owns.
    unsafe {
        command.pre_exec(move || match libc::dup2(descriptor.as_raw_fd(), number) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
}

/// Has `command` find no io_uring, as in most containers.
pub fn forbid_io_uring(command: &mut Command) {
    refuse_call(command, libc::SYS_io_uring_setup, libc::EPERM);
}

/// Has a system call fail with this error in a child and those that it starts.
pub fn refuse_call(command: &mut Command, call: libc::c_long, errno: i32) {
    // SAFETY: between fork and exec only prctl is called, on values of the child's own stack.
    unsafe { command.pre_exec(move || without(call, errno)) };
}

/// Has a child begin with these limits, the soft one and the hard one.
pub fn limit_resource(command: &mut Command, resource: Resource, soft: u64, hard: u64) {
    // SAFETY: between fork and exec only setrlimit is called.
    unsafe { command.pre_exec(move || Ok(setrlimit(resource, soft, hard)?)) };
}

/// Gives a process that runs another soft limit.
pub fn set_soft_limit(pid: nix::unistd::Pid, resource: Resource, soft: u64) {
    let mut limits = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call reads and writes the two structures, which outlive it.
    let done = unsafe {
        let none = std::ptr::null_mut();
        match libc::prlimit(pid.as_raw(), resource as _, none, &raw mut limits) {
            0 => {
                limits.rlim_cur = soft.min(limits.rlim_max);
                libc::prlimit(pid.as_raw(), resource as _, &raw const limits, none)
            }
            failed => failed,
        }
    };
    assert_eq!(done, 0, "prlimit: {}", io::Error::last_os_error());
}

/// Makes a system call fail in this process and its children.
fn without(call: libc::c_long, errno: i32) -> std::io::Result<()> {
    let load_number = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    let is_it = libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: call as u32 };
    let answer = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
    let refuse = answer(libc::SECCOMP_RET_ERRNO | errno as u32);
    let mut program = [load_number, is_it, refuse, answer(libc::SECCOMP_RET_ALLOW)];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: the filter and the program that it points to live through the call, which copies them.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// A process that is not a child of ours, whose end can be waited for.
pub struct Other(OwnedFd);

/// The process of this id, which runs now.
pub fn ended(pid: nix::unistd::Pid) -> Other {
    Other(pidfd(pid.as_raw()).expect("it runs"))
}

impl Other {
    /// Waits until it has ended, however.
    #[track_caller]
    pub fn wait(self) {
        self.waits();
    }

    /// As [`Other::wait`], for who needs it afterwards.
    #[track_caller]
    pub fn waits(&self) {
        assert!(ends_within(&self.0, limit()).expect("poll"), "the process still runs after {:?}", limit());
    }
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes a process id and flags, no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Waits until a child has ended by itself; an error when it takes longer than `limit`.
pub fn wait_within(child: &mut Child, limit: Duration) -> io::Result<ExitStatus> {
    // The id is that of a child which has not been waited for, so it cannot mean another process.
    match ends_within(&pidfd(child.id() as i32)?, limit)? {
        false => Err(io::Error::new(io::ErrorKind::TimedOut, format!("it still runs after {limit:?}"))),
        true => child.wait(),
    }
}

fn ends_within(process: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let deadline = Deadline::after(limit);
    loop {
        // Rounded up, so that the last fraction of a millisecond does not spin.
        let left = PollTimeout::try_from(deadline.left().as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) if deadline.left().is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(e.into()),
        }
    }
}
