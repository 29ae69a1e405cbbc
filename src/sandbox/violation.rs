//! The end of a process that attempts a forbidden system call: it says which one, and is gone.
//!
//! The kernel delivers SIGSYS to the thread that made the attempt, at that very place. In a thread that
//! has blocked the signal the kernel ends the process by the signal instead, without a word of ours; it
//! gets no further either way.

use crate::base::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The exit code of a process that was ended for a forbidden system call.
pub const EXIT_CODE: i32 = 9;
/// `si_code` of a SIGSYS that a filter caused (siginfo.h).
const SYS_SECCOMP: libc::c_int = 1;

/// The beginning of `siginfo_t` for SIGSYS (include/uapi/asm-generic/siginfo.h).
#[repr(C)]
struct SigSysInfo {
    signo: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
    arch: libc::c_uint,
}

/// From here on SIGSYS ends the process with a message on standard error and [`EXIT_CODE`].
pub(super) fn report() -> Result<()> {
    let action =
        SigAction::new(SigHandler::SigAction(end), SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK, SigSet::all());
    // SAFETY: the handler calls write and _exit alone, which are async-signal-safe; it takes no
    // lock and allocates nothing.
    unsafe { sigaction(Signal::SIGSYS, &action) }.context(|| "handle forbidden system calls")?;
    Ok(())
}

/// The keys are not wiped here: another thread would encrypt with what is left of them. The kernel clears
/// them as it frees the memory.
extern "C" fn end(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a whole siginfo_t, which for SIGSYS begins like this.
    let info = unsafe { &*info.cast::<SigSysInfo>() };
    let mut line = Line { bytes: [0; 240], len: 0 };
    if info.code == SYS_SECCOMP {
        line.add("sealblk: ended at the system call ");
        line.add(name(info.call.into()).unwrap_or("number"));
        line.add(" (");
        line.add_number(info.call.unsigned_abs());
        line.add(
            "), which a confined process may not use: a mistake in sealblk, or an attack. A volume that it \
             served is detached.\n",
        );
    } else {
        line.add(
            "sealblk: ended by SIGSYS, which somebody sent. A volume that this process served is detached.\n",
        );
    }
    // SAFETY: the bytes are there. Standard error may be closed; the exit code says the
    // same. Nothing comes after.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(EXIT_CODE)
    }
}

/// Text without an allocator.
struct Line {
    bytes: [u8; 240],
    len: usize,
}

impl Line {
    fn add(&mut self, text: &str) {
        for (to, from) in self.bytes[self.len..].iter_mut().zip(text.bytes()) {
            *to = from;
            self.len += 1;
        }
    }

    fn add_number(&mut self, number: u32) {
        let mut power = 1_000_000_000;
        while power > 1 && number / power == 0 {
            power /= 10;
        }
        while power > 0 {
            self.add(["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"][(number / power % 10) as usize]);
            power /= 10;
        }
    }
}

/// The name of a call that a process may want and must not have.
fn name(call: libc::c_long) -> Option<&'static str> {
    let (_, name) = NAMES.iter().chain(OLD_NAMES).find(|(number, _)| *number == call)?;
    Some(name.trim_start_matches("SYS_"))
}

macro_rules! names {
    ($($name:ident)*) => { &[$((libc::$name, stringify!($name))),*] };
}

const NAMES: &[(libc::c_long, &str)] = names! {
    SYS_accept SYS_acct SYS_add_key SYS_adjtimex SYS_bind SYS_bpf SYS_capget SYS_capset SYS_chdir SYS_chroot
    SYS_clock_adjtime SYS_clock_settime SYS_clone SYS_clone3 SYS_close_range SYS_connect SYS_copy_file_range
    SYS_delete_module SYS_epoll_pwait2 SYS_execve SYS_execveat SYS_fadvise64 SYS_fanotify_init SYS_fchdir
    SYS_fchmod SYS_fchmodat SYS_fchown SYS_fchownat SYS_fcntl SYS_fgetxattr SYS_finit_module SYS_fsconfig
    SYS_fsetxattr SYS_fsmount SYS_fsopen SYS_getgroups SYS_getpgid SYS_getppid SYS_getpriority SYS_getresgid
    SYS_getresuid SYS_getrlimit SYS_getsid SYS_getxattr SYS_init_module SYS_inotify_add_watch
    SYS_inotify_init1 SYS_io_cancel SYS_io_destroy SYS_io_getevents SYS_io_setup SYS_io_submit
    SYS_io_uring_register SYS_io_uring_setup SYS_ioctl SYS_ioprio_set SYS_kcmp SYS_kexec_file_load
    SYS_kexec_load SYS_keyctl SYS_kill SYS_landlock_add_rule SYS_landlock_create_ruleset
    SYS_landlock_restrict_self SYS_lgetxattr SYS_linkat SYS_listen SYS_mincore SYS_mkdirat SYS_mknodat
    SYS_mlockall SYS_mmap SYS_mount SYS_move_mount SYS_mprotect SYS_msync SYS_munlockall SYS_name_to_handle_at
    SYS_open_by_handle_at SYS_open_tree SYS_openat SYS_openat2 SYS_perf_event_open SYS_personality
    SYS_pidfd_getfd SYS_pidfd_open SYS_pidfd_send_signal SYS_pipe2 SYS_pivot_root SYS_pkey_alloc
    SYS_pkey_mprotect SYS_prctl SYS_prlimit64 SYS_process_madvise SYS_process_vm_readv SYS_process_vm_writev
    SYS_ptrace SYS_quotactl SYS_reboot SYS_recvmmsg SYS_remap_file_pages SYS_request_key SYS_rt_sigpending
    SYS_rt_sigqueueinfo SYS_rt_sigsuspend SYS_rt_sigtimedwait SYS_rt_tgsigqueueinfo SYS_sched_setattr
    SYS_sched_setparam SYS_sched_setscheduler SYS_seccomp SYS_semget SYS_sendfile SYS_sendmmsg SYS_sendto
    SYS_setdomainname SYS_setfsgid SYS_setfsuid SYS_setgid SYS_setgroups SYS_sethostname SYS_setitimer
    SYS_setns SYS_setpgid SYS_setpriority SYS_setregid SYS_setresgid SYS_setresuid SYS_setreuid SYS_setrlimit
    SYS_setsid SYS_setsockopt SYS_settimeofday SYS_setuid SYS_setxattr SYS_shmat SYS_shmget SYS_signalfd4
    SYS_socket SYS_socketpair SYS_splice SYS_swapon SYS_symlinkat SYS_sync SYS_sync_file_range SYS_syncfs
    SYS_sysinfo SYS_syslog SYS_tee SYS_tgkill SYS_timer_create SYS_timerfd_create SYS_timerfd_settime
    SYS_tkill SYS_truncate SYS_umask SYS_umount2 SYS_unshare SYS_userfaultfd SYS_utimensat SYS_vmsplice
    SYS_wait4 SYS_waitid
};

/// Those that newer architectures do not have.
#[cfg(target_arch = "x86_64")]
const OLD_NAMES: &[(libc::c_long, &str)] = names! {
    SYS_alarm SYS_arch_prctl SYS_chmod SYS_chown SYS_creat SYS_dup2 SYS_epoll_create SYS_eventfd SYS_fork
    SYS_getdents SYS_getpgrp SYS_inotify_init SYS_ioperm SYS_iopl SYS_lchown SYS_link SYS_mkdir SYS_mknod
    SYS_open SYS_pause SYS_pipe SYS_rmdir SYS_select SYS_symlink SYS_vfork
};
#[cfg(not(target_arch = "x86_64"))]
const OLD_NAMES: &[(libc::c_long, &str)] = &[];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_words_and_numbers_and_never_more_than_fits() {
        let mut line = Line { bytes: [0; 240], len: 0 };
        line.add("a ");
        for number in [0, 7, 10, 425, u32::MAX] {
            line.add_number(number);
            line.add(" ");
        }
        assert_eq!(&line.bytes[..line.len], b"a 0 7 10 425 4294967295 ");
        line.add(&"x".repeat(500));
        assert_eq!(line.len, 240);
    }

    #[test]
    fn calls_have_the_names_that_people_know() {
        assert_eq!(name(libc::SYS_execve), Some("execve"));
        assert_eq!(name(libc::SYS_io_uring_setup), Some("io_uring_setup"));
        assert_eq!(name(-1), None);
    }
}
