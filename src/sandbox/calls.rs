//! The system calls of a confined process: an allow-list, by seccomp.
//!
//! The table says what each group is for. A call whose arguments matter has conditions in [`conditional`].
//! Paths lie in memory and cannot be judged here: they are the affair of [`crate::sandbox::files`].
//!
//! io_uring does what a ring is asked to do without asking this filter. So a confined process can make no
//! ring: those that it has were made before, and each takes only the operations that serving a layer needs
//! (`reactor::ring`).

use crate::base::{Error, Kind, Result};
use crate::sandbox::Mode;
use libc::c_long;
use seccompiler::SeccompCmpArgLen::{self, Dword, Qword};
use seccompiler::SeccompCmpOp::{self, Eq, Le, MaskedEq};
use seccompiler::{BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule};
use std::collections::BTreeMap;

/// What a group of calls is for, and the calls.
type Group = (&'static str, &'static [c_long]);

macro_rules! calls {
    ($($name:ident)*) => { &[$(libc::$name),*] };
}

/// Allowed whatever the arguments.
const ALLOWED: &[Group] = &[
    (
        "the data path: rings that are there, layers on memory file systems, event descriptors",
        calls! { SYS_io_uring_enter SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_preadv
        SYS_pwritev SYS_preadv2 SYS_pwritev2 SYS_lseek SYS_fsync SYS_fdatasync SYS_fallocate SYS_eventfd2 },
    ),
    (
        "files that Landlock lets through, and descriptors",
        calls! { SYS_openat2 SYS_close SYS_fstat SYS_newfstatat SYS_statx SYS_fstatfs SYS_statfs SYS_ftruncate SYS_flock
        SYS_getdents64 SYS_unlinkat SYS_renameat SYS_renameat2 SYS_readlinkat SYS_faccessat SYS_faccessat2
        SYS_getcwd SYS_dup SYS_dup3 SYS_memfd_create SYS_memfd_secret },
    ),
    (
        "sockets that are there: VMMs, the control socket, the service manager",
        calls! { SYS_accept SYS_accept4 SYS_recvfrom SYS_recvmsg SYS_sendmsg SYS_shutdown SYS_getsockname
        SYS_getpeername SYS_getsockopt },
    ),
    ("waiting", calls! { SYS_futex SYS_ppoll SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait }),
    (
        "memory",
        calls! { SYS_munmap SYS_mremap SYS_madvise SYS_brk SYS_mlock SYS_mlock2 SYS_munlock SYS_membarrier },
    ),
    (
        "threads: their life, their CPUs, their signals",
        calls! { SYS_exit SYS_exit_group SYS_gettid SYS_getpid SYS_set_robust_list SYS_rseq SYS_sigaltstack
        SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_restart_syscall SYS_sched_yield
        SYS_sched_getaffinity SYS_sched_setaffinity SYS_clone3 },
    ),
    (
        "time, chance, and who one is",
        calls! { SYS_clock_gettime SYS_clock_getres SYS_clock_nanosleep SYS_nanosleep SYS_gettimeofday SYS_getrandom
        SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getrusage SYS_uname },
    ),
];

/// Calls of [`ALLOWED`] under their old names, which newer architectures do not have: there the C library
/// makes those of [`ALLOWED`] for the same functions.
#[cfg(target_arch = "x86_64")]
const ALLOWED_BY_OLD_NAMES: &[Group] = &[(
    "the C library still uses them",
    calls! { SYS_poll SYS_epoll_wait SYS_stat SYS_lstat SYS_access SYS_unlink SYS_rename SYS_readlink SYS_time },
)];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_BY_OLD_NAMES: &[Group] = &[];

/// Allowed to a carrier besides, which has no key: files and folders of a place, and its network.
const ALLOWED_TO_CARRIERS: &[Group] = &[
    ("folders of a place, and what makes all of it durable", calls! { SYS_mkdirat SYS_linkat SYS_syncfs }),
    (
        "the network: names are looked up, and stores are connected to",
        calls! { SYS_socket SYS_connect SYS_bind SYS_sendto SYS_sendmmsg SYS_setsockopt SYS_pipe2 },
    ),
];

/// As [`ALLOWED_BY_OLD_NAMES`], of [`ALLOWED_TO_CARRIERS`].
#[cfg(target_arch = "x86_64")]
const ALLOWED_TO_CARRIERS_BY_OLD_NAMES: &[Group] = &[("folders", calls! { SYS_mkdir SYS_link })];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_TO_CARRIERS_BY_OLD_NAMES: &[Group] = &[];

/// What a carrier does without: io_uring, which asks no filter.
const DENIED_TO_CARRIERS: &[c_long] =
    &[libc::SYS_io_uring_enter, libc::SYS_io_uring_register, libc::SYS_memfd_secret, libc::SYS_memfd_create];

/// Allowed besides to a process that loads a stranger's library: its code, its locks and folders, its
/// devices. The network stands in [`ALLOWED_TO_CARRIERS`].
const ALLOWED_TO_MODULES: &[Group] = &[
    ("code that is loaded, and what it does with devices", calls! { SYS_mmap SYS_mprotect SYS_ioctl }),
    (
        "files and folders of its own",
        calls! { SYS_openat SYS_mkdirat SYS_linkat SYS_fchmod SYS_fchmodat SYS_umask SYS_utimensat SYS_msync
        SYS_fadvise64 },
    ),
    ("waiting, and what threads tell each other", calls! { SYS_pselect6 SYS_pipe2 }),
    (
        "what libraries ask",
        calls! { SYS_getppid SYS_sysinfo SYS_getgroups SYS_getresuid SYS_getresgid SYS_getpriority
        SYS_sched_getparam SYS_sched_getscheduler SYS_clock_nanosleep SYS_times },
    ),
];

/// As [`ALLOWED_BY_OLD_NAMES`], of [`ALLOWED_TO_MODULES`].
#[cfg(target_arch = "x86_64")]
const ALLOWED_TO_MODULES_BY_OLD_NAMES: &[Group] = &[(
    "files and folders",
    calls! { SYS_open SYS_mkdir SYS_rmdir SYS_chmod SYS_dup2 SYS_pipe SYS_select SYS_epoll_create },
)];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_TO_MODULES_BY_OLD_NAMES: &[Group] = &[];

/// Calls that start a program: libraries that look for credentials may want to, and are
/// told that they may not.
#[cfg(target_arch = "x86_64")]
const PROGRAMS: &[c_long] = &[libc::SYS_execve, libc::SYS_execveat, libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const PROGRAMS: &[c_long] = &[libc::SYS_execve, libc::SYS_execveat];

/// The longest name that `connect` takes: a family and up to three characters, which in
/// [`crate::sandbox::WORKING_FOLDER`] can only name a descriptor.
const ADDRESS_LEN_MAX: u64 = size_of::<libc::sa_family_t>() as u64 + 4;

/// Conditions on one argument.
struct Argument {
    index: u8,
    len: SeccompCmpArgLen,
    op: SeccompCmpOp,
    value: u64,
}

fn arg(index: u8, op: SeccompCmpOp, value: u64) -> Argument {
    Argument { index, len: Dword, op, value }
}

/// No bit of `mask` is set.
fn without(index: u8, mask: u64) -> Argument {
    Argument { index, len: Qword, op: MaskedEq(mask), value: 0 }
}

fn null(index: u8) -> Argument {
    Argument { index, len: Qword, op: Eq, value: 0 }
}

/// Allowed if one of the rules fits: each is a list of conditions that must all hold.
fn conditional() -> Vec<(c_long, Vec<Vec<Argument>>)> {
    let one_of =
        |index: u8, values: &[u64]| values.iter().map(|&v| vec![arg(index, Eq, v)]).collect::<Vec<_>>();
    let own_pid = u64::from(std::process::id());
    let stream = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC) as u64;
    let executable = libc::PROT_EXEC as u64;
    vec![
        // Paths alone open nothing that could be connected to or entered.
        (libc::SYS_openat, vec![vec![without(2, libc::O_PATH as u64)]]),
        // The pair of sockets of each VMM's session (`vhost::session::Inlet`).
        (libc::SYS_socket, vec![vec![arg(0, Eq, libc::AF_UNIX as u64), arg(1, Eq, stream)]]),
        (libc::SYS_socketpair, vec![vec![arg(0, Eq, libc::AF_UNIX as u64)]]),
        (libc::SYS_connect, vec![vec![arg(2, Le, ADDRESS_LEN_MAX)]]),
        // To whom a socket is connected, and to nobody else.
        (libc::SYS_sendto, vec![vec![null(4)]]),
        (libc::SYS_setsockopt, vec![vec![arg(1, Eq, libc::SOL_SOCKET as u64)]]),
        // No new code.
        (libc::SYS_mmap, vec![vec![without(2, executable)]]),
        (libc::SYS_mprotect, vec![vec![without(2, executable)]]),
        // Threads, no processes. Its arguments lie in memory for clone3, which is said not to exist.
        (libc::SYS_clone, vec![vec![thread_flag()]]),
        (libc::SYS_tgkill, vec![vec![arg(0, Eq, own_pid)]]),
        (libc::SYS_prctl, one_of(0, &[libc::PR_SET_NAME as u64, libc::PR_SET_VMA as u64])),
        // To ask, not to set.
        (libc::SYS_prlimit64, vec![vec![arg(0, Eq, 0), null(2)]]),
        (libc::SYS_ioctl, one_of(1, &[libc::FIONBIO, libc::FIONREAD, libc::TCGETS])),
        (
            libc::SYS_fcntl,
            one_of(
                1,
                &[
                    libc::F_DUPFD_CLOEXEC,
                    libc::F_GETFD,
                    libc::F_SETFD,
                    libc::F_GETFL,
                    libc::F_SETFL,
                    libc::F_OFD_SETLK,
                    libc::F_OFD_SETLKW,
                    libc::F_OFD_GETLK,
                    libc::F_ADD_SEALS,
                    libc::F_GET_SEALS,
                ]
                .map(|command| command as u64),
            ),
        ),
        (libc::SYS_io_uring_register, one_of(1, &crate::reactor::ring::REGISTRATIONS.map(u64::from))),
    ]
}

fn thread_flag() -> Argument {
    let thread = libc::CLONE_THREAD as u64;
    Argument { index: 0, len: Qword, op: MaskedEq(thread), value: thread }
}

/// Puts the filter in force, for this thread and those that it starts.
pub(super) fn filter(mode: Mode) -> Result<()> {
    let forbidden = if mode == Mode::Log { SeccompAction::Log } else { SeccompAction::Trap };
    for program in [said_not_to_exist()?, allow_list(forbidden)?] {
        seccompiler::apply_filter(&program).map_err(refused)?;
    }
    Ok(())
}

/// Whether the kernel, and whatever this runs in, takes filters that report the call.
pub fn check_seccomp() -> Result<()> {
    let action: u32 = libc::SECCOMP_RET_TRAP;
    // SAFETY: the call reads the action, a number, and changes nothing.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &action) };
    if answer == 0 { Ok(()) } else { Err(refused(std::io::Error::last_os_error())) }
}

fn refused(e: impl std::fmt::Display) -> Error {
    Error::new(
        Kind::Unsupported,
        format!(
            "the system call filter is refused ({e}): allow seccomp() in the container's own profile, or \
             attach with --sandbox=off"
        ),
    )
}

/// Calls whose flags lie in memory, where no filter can judge them, and which are done without: the
/// C library uses clone where there is no clone3, and [`crate::base::root::files`] uses openat
/// where there is no openat2.
fn said_not_to_exist() -> Result<BpfProgram> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new()), (libc::SYS_openat2, Vec::new())]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

/// Puts the filter of a carrier in force, for this thread and those that it starts. Without `network`, it has
/// none.
pub(super) fn filter_carrier(network: bool) -> Result<()> {
    let mut rules = allowed()?;
    DENIED_TO_CARRIERS.iter().for_each(|call| drop(rules.remove(call)));
    let more = if network { ALLOWED_TO_CARRIERS } else { &ALLOWED_TO_CARRIERS[..1] };
    let more = more.iter().chain(ALLOWED_TO_CARRIERS_BY_OLD_NAMES);
    rules.extend(more.flat_map(|(_, calls)| calls.iter()).map(|&call| (call, Vec::new())));
    let programs = PROGRAMS.iter().map(|&call| (call, Vec::new()));
    // A process that is no thread would be one that starts a program.
    let clone = SeccompCondition::new(0, Qword, MaskedEq(libc::CLONE_THREAD as u64), 0)
        .and_then(|no_thread| SeccompRule::new(vec![no_thread]))
        .map_err(refused)?;
    let programs = programs.chain([(libc::SYS_clone, vec![clone])]).collect();
    let filters = [
        said_not_to_exist()?,
        compile(programs, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))?,
        compile(with_programs(rules), SeccompAction::Trap, SeccompAction::Allow)?,
    ];
    filters.iter().try_for_each(|program| seccompiler::apply_filter(program).map_err(refused))
}

/// Puts the filter of a dialler in force, for this thread and those that it starts: sockets of this machine,
/// whatever their names, and no other. It makes no thread.
pub(super) fn filter_dialler() -> Result<()> {
    let mut rules = allowed()?;
    let denied = DENIED_TO_CARRIERS.iter().chain(&[libc::SYS_clone, libc::SYS_bind]);
    denied.for_each(|call| drop(rules.remove(call)));
    rules.insert(libc::SYS_connect, Vec::new());
    let filters = [said_not_to_exist()?, compile(rules, SeccompAction::Trap, SeccompAction::Allow)?];
    filters.iter().try_for_each(|program| seccompiler::apply_filter(program).map_err(refused))
}

/// Puts the filter of a fetcher in force, for this thread and those that it starts: files, threads, and the
/// sockets that it has.
pub(super) fn filter_fetcher() -> Result<()> {
    let mut rules = allowed()?;
    let sockets = [libc::SYS_socket, libc::SYS_socketpair, libc::SYS_connect, libc::SYS_bind];
    let denied = DENIED_TO_CARRIERS.iter().chain(&sockets).chain(&[libc::SYS_accept, libc::SYS_accept4]);
    denied.for_each(|call| drop(rules.remove(call)));
    // A layer that is whole is nobody's to write.
    rules.insert(libc::SYS_fchmod, Vec::new());
    let filters = [said_not_to_exist()?, compile(rules, SeccompAction::Trap, SeccompAction::Allow)?];
    filters.iter().try_for_each(|program| seccompiler::apply_filter(program).map_err(refused))
}

/// Puts the filter of a process in force that loads a stranger's library, for this thread and those that it
/// starts. Without `network`, it can make no socket.
pub(super) fn filter_module(network: bool) -> Result<()> {
    let mut rules = allowed()?;
    DENIED_TO_CARRIERS.iter().for_each(|call| drop(rules.remove(call)));
    let groups = ALLOWED_TO_MODULES.iter().chain(ALLOWED_TO_MODULES_BY_OLD_NAMES);
    let groups = groups.chain(if network { &ALLOWED_TO_CARRIERS[1..] } else { &[] });
    rules.extend(groups.flat_map(|(_, calls)| calls.iter()).map(|&call| (call, Vec::new())));
    // Locks of processes as well: but nobody to send signals to when something can be read.
    let locks = [libc::F_DUPFD, libc::F_GETLK, libc::F_SETLK, libc::F_SETLKW].map(|command| command as u64);
    for command in locks {
        let is_it = SeccompCondition::new(1, Dword, Eq, command).and_then(|it| SeccompRule::new(vec![it]));
        rules.entry(libc::SYS_fcntl).or_default().push(is_it.map_err(refused)?);
    }
    if !network {
        [libc::SYS_socket, libc::SYS_connect].iter().for_each(|call| drop(rules.remove(call)));
    }
    let refused_softly = SeccompAction::Errno(libc::EPERM as u32);
    let filters = [said_not_to_exist()?, compile(rules, refused_softly, SeccompAction::Allow)?];
    filters.iter().try_for_each(|program| seccompiler::apply_filter(program).map_err(refused))
}

/// Takes from this process, and from those that it makes, the right to start programs, and
/// io_uring, which asks no filter.
pub(super) fn filter_programs() -> Result<()> {
    let mut calls = vec![libc::SYS_execve, libc::SYS_execveat];
    calls.extend([libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register]);
    let rules = calls.into_iter().map(|call| (call, Vec::new())).collect();
    let program = compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))?;
    seccompiler::apply_filter(&program).map_err(refused)
}

/// The rules of a carrier, in whose allow-list the calls are that another filter refuses without ending the
/// process: of several filters, the strictest answer counts.
fn with_programs(mut rules: BTreeMap<c_long, Vec<SeccompRule>>) -> BTreeMap<c_long, Vec<SeccompRule>> {
    rules.extend(PROGRAMS.iter().map(|&call| (call, Vec::new())));
    rules.insert(libc::SYS_clone, Vec::new());
    rules
}

/// Takes the network from all threads of this process, and from whatever they start: they are
/// given no sockets but those of this machine, and no io_uring, which would make some without
/// asking. What is open stays.
pub(super) fn filter_network() -> Result<()> {
    let other = SeccompCondition::new(0, Dword, SeccompCmpOp::Ne, libc::AF_UNIX as u64)
        .and_then(|other| SeccompRule::new(vec![other]))
        .map_err(refused)?;
    let rules = BTreeMap::from([(libc::SYS_socket, vec![other]), (libc::SYS_io_uring_setup, Vec::new())]);
    let program = compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))?;
    seccompiler::apply_filter_all_threads(&program).map_err(refused)
}

fn allow_list(forbidden: SeccompAction) -> Result<BpfProgram> {
    compile(allowed()?, forbidden, SeccompAction::Allow)
}

fn allowed() -> Result<BTreeMap<c_long, Vec<SeccompRule>>> {
    let groups = ALLOWED.iter().chain(ALLOWED_BY_OLD_NAMES);
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        groups.flat_map(|(_, calls)| calls.iter()).map(|&call| (call, Vec::new())).collect();
    for (call, alternatives) in conditional() {
        let alternatives = alternatives.into_iter().map(|all| {
            let all = all.into_iter().map(|a| SeccompCondition::new(a.index, a.len, a.op, a.value));
            all.collect::<Result<Vec<_>, _>>().and_then(SeccompRule::new)
        });
        rules.insert(call, alternatives.collect::<Result<_, _>>().map_err(refused)?);
    }
    Ok(rules)
}

fn compile(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram> {
    let arch = std::env::consts::ARCH.try_into().map_err(refused)?;
    let filter =
        SeccompFilter::new(rules.into_iter().collect(), otherwise, matched, arch).map_err(refused)?;
    filter.try_into().map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What glibc's generic code calls where there is no call of the function's own name.
    #[test]
    fn what_the_c_library_calls_for_an_old_name_is_allowed() {
        let has = |groups: &[&[Group]], call| {
            let mut all = groups.iter().copied().flatten().flat_map(|(_, calls)| calls.iter());
            all.any(|&other| other == call)
        };
        let instead = calls! { SYS_accept SYS_ppoll SYS_epoll_pwait SYS_newfstatat SYS_faccessat SYS_unlinkat
        SYS_renameat SYS_readlinkat SYS_clock_gettime };
        let missing: Vec<_> = instead.iter().filter(|&&call| !has(&[ALLOWED], call)).collect();
        assert!(missing.is_empty(), "{missing:?}");
        for call in [libc::SYS_mkdirat, libc::SYS_linkat] {
            assert!(has(&[ALLOWED_TO_CARRIERS], call), "{call}");
        }
        let instead =
            calls! { SYS_openat SYS_mkdirat SYS_unlinkat SYS_fchmodat SYS_dup3 SYS_pipe2 SYS_pselect6 };
        for &call in instead {
            assert!(has(&[ALLOWED, ALLOWED_TO_MODULES], call), "{call}");
        }
    }

    #[test]
    fn no_call_stands_in_the_table_twice() {
        let groups = ALLOWED.iter().chain(ALLOWED_BY_OLD_NAMES);
        let mut all: Vec<c_long> = groups.flat_map(|(_, calls)| calls.iter().copied()).collect();
        // What is allowed with conditions must not be allowed without.
        all.extend(conditional().into_iter().map(|(call, _)| call));
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
