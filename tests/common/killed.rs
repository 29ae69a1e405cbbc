//! A command, or a thread's process, that is killed, as by `kill -9`, just before one of the system calls
//! by which it changes files.

use super::patience::wait_for;
use nix::errno::Errno;
use nix::libc::{self, c_long, c_void};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output};
use std::time::Duration;

/// The calls that change what a power cut or the next process would find. Of the opening
/// ones, those that create.
#[cfg(target_arch = "x86_64")]
const OLD_CHANGES: &[c_long] =
    &[libc::SYS_rename, libc::SYS_unlink, libc::SYS_rmdir, libc::SYS_mkdir, libc::SYS_chmod, libc::SYS_open];
#[cfg(not(target_arch = "x86_64"))]
const OLD_CHANGES: &[c_long] = &[];
const CHANGES: &[c_long] = &[
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_fchmodat,
    libc::SYS_fchmod,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_openat,
];

/// How a command that was to be killed ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// Before its call of that number.
    Killed,
    /// By itself: it has fewer such calls.
    Exited(i32),
}

/// Runs `command` and kills it just before the call number `step`, counted from 0, that changes files.
/// Processes that it starts are not counted.
pub fn killed_before(command: &mut Command, step: usize) -> End {
    match run_to(command, step) {
        Ok(mut child) => {
            kill(&mut child);
            End::Killed
        }
        Err(code) => End::Exited(code),
    }
}

/// As [`killed_before`], with the calls of all processes that it starts, and of those that they start: all of
/// them are killed at one moment.
#[expect(clippy::zombie_processes, reason = "its tracer waits for it")]
pub fn killed_with_all_before(command: &mut Command, step: usize) -> End {
    trace_me(command);
    let child = command.spawn().expect("start sealblk");
    let root = Pid::from_raw(child.id() as i32);
    assert!(
        matches!(waitpid(root, None), Ok(WaitStatus::Stopped(_, Signal::SIGTRAP))),
        "it stops as it begins"
    );
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_EXITKILL
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_TRACEEXEC;
    request(libc::PTRACE_SETOPTIONS, root, 0, options as usize).expect("it is traced");
    request(libc::PTRACE_SYSCALL, root, 0, 0).expect("it is stopped");
    let (mut steps, mut all, mut code) = (0, BTreeSet::from([root]), None);
    // Those that this thread traces, and no child of another test's.
    let any = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    while let Ok(status) = waitpid(Pid::from_raw(-1), Some(any)) {
        let thread = status.pid().expect("it waits for a change");
        let pass_on = match status {
            WaitStatus::Exited(_, found) => {
                all.remove(&thread);
                code = code.or((thread == root).then_some(found));
                continue;
            }
            WaitStatus::Signaled(..) => {
                all.remove(&thread);
                continue;
            }
            WaitStatus::PtraceSyscall(_) if code.is_none() && changes_files(thread) => {
                if steps == step {
                    for thread in &all {
                        // One that has ended is still there until it was waited for.
                        let _ = nix::sys::signal::kill(*thread, Signal::SIGKILL);
                    }
                }
                steps += 1;
                0
            }
            // What a new thread or process begins with.
            WaitStatus::Stopped(_, Signal::SIGSTOP | Signal::SIGTRAP) => {
                all.insert(thread);
                0
            }
            WaitStatus::Stopped(_, signal) => signal as usize,
            _ => 0,
        };
        // It may have been killed meanwhile.
        let _ = request(libc::PTRACE_SYSCALL, thread, 0, pass_on);
    }
    match code {
        Some(code) if steps <= step => End::Exited(code),
        _ => End::Killed,
    }
}

/// Runs `command` and sends it SIGTERM just before the call of that number, then lets it go on to its end.
/// `None` if it has fewer such calls; then it has ended with the exit code 0.
pub fn interrupted_before(command: &mut Command, step: usize) -> Option<Output> {
    match run_to(command, step) {
        Ok(child) => {
            let pid = Pid::from_raw(child.id() as i32);
            nix::sys::signal::kill(pid, Signal::SIGTERM).expect("it is there");
            request(libc::PTRACE_DETACH, pid, 0, 0).expect("it is stopped");
            Some(child.wait_with_output().expect("it is a child"))
        }
        Err(code) => {
            assert_eq!(code, 0);
            None
        }
    }
}

/// Runs `command` to just before the call of that number, where it is held; or to its end,
/// and returns its exit code.
fn run_to(command: &mut Command, step: usize) -> Result<Child, i32> {
    run_to_call(command, step, changes_files)
}

/// Runs `command` to just before it says something to another process for the time number `step`, counted
/// from 0; there `then` is done, which may kill that one or others, and it goes on. Returns how it ended, or
/// its exit code if it says less.
pub fn stopped_before_saying(
    command: &mut Command,
    step: usize,
    then: impl FnOnce(Pid),
) -> Result<Output, i32> {
    let child = run_to_call(command, step, says_something)?;
    let pid = Pid::from_raw(child.id() as i32);
    then(pid);
    // It may have been killed.
    let _ = request(libc::PTRACE_DETACH, pid, 0, 0);
    Ok(child.wait_with_output().expect("it is a child"))
}

#[expect(clippy::zombie_processes, reason = "its tracer waits for it")]
fn run_to_call(command: &mut Command, step: usize, is_step: fn(Pid) -> bool) -> Result<Child, i32> {
    trace_me(command);
    let child = command.spawn().expect("start sealblk");
    let pid = Pid::from_raw(child.id() as i32);
    assert!(
        matches!(waitpid(pid, None), Ok(WaitStatus::Stopped(_, Signal::SIGTRAP))),
        "it stops as it begins"
    );
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
    request(libc::PTRACE_SETOPTIONS, pid, 0, options as usize).expect("it is traced");
    let mut steps = 0;
    let mut pass_on = 0;
    loop {
        request(libc::PTRACE_SYSCALL, pid, 0, pass_on).expect("it is stopped");
        pass_on = 0;
        match waitpid(pid, None).expect("it is a child") {
            WaitStatus::Exited(_, code) => return Err(code),
            WaitStatus::PtraceSyscall(_) if is_step(pid) => {
                if steps == step {
                    return Ok(child);
                }
                steps += 1;
            }
            WaitStatus::PtraceSyscall(_) => {}
            WaitStatus::Stopped(_, signal) => pass_on = signal as usize,
            other => panic!("{pid}: {other:?}"),
        }
    }
}

/// Has the thread that starts it trace it, from its first instruction on.
fn trace_me(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes one system call, on no memory.
    unsafe {
        command.pre_exec(|| {
            let done = libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            Errno::result(done).map(drop).map_err(std::io::Error::from)
        });
    }
}

/// Whether a thread's process was killed.
#[derive(Debug, PartialEq, Eq)]
pub enum Killed {
    /// Before the call of that number.
    Yes,
    /// What was waited for came first.
    No,
}

/// The thread of `process` that is called so, which gives itself that name some time after it was made.
#[track_caller]
pub fn wait_for_thread(process: Pid, name: &str) -> Pid {
    let found = || thread(process, name).ok_or_else(|| format!("the threads {:?}", threads(process)));
    wait_for(&format!("process {process} has a thread \"{name}\""), found)
}

/// The thread of `process` that is called so, if there is one now.
pub fn thread(process: Pid, name: &str) -> Option<Pid> {
    threads(process).into_iter().find_map(|(thread, found)| (found == name).then_some(thread))
}

/// The threads of `process`, and what they are called; none if it is gone.
fn threads(process: Pid) -> Vec<(Pid, String)> {
    let named = |thread: std::io::Result<fs::DirEntry>| {
        let path = thread.ok()?.path();
        // It may be gone before it is asked.
        let name = fs::read_to_string(path.join("comm")).ok()?.trim().to_owned();
        Some((Pid::from_raw(path.file_name()?.to_str()?.parse().ok()?), name))
    };
    fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().filter_map(named).collect()
}

/// One thread of another process, held at each of its system calls.
pub struct Stepper(Pid);

impl Stepper {
    /// Traces a thread, which goes on running.
    pub fn seize(thread: Pid) -> Self {
        request(libc::PTRACE_SEIZE, thread, 0, libc::PTRACE_O_TRACESYSGOOD as usize).expect("root may trace");
        request(libc::PTRACE_INTERRUPT, thread, 0, 0).expect("it runs");
        Stepper(thread)
    }

    /// Kills the process just before the thread's call number `step`, counted from 0, that changes files;
    /// unless `done` comes true before.
    pub fn kill_before(self, step: usize, mut done: impl FnMut() -> bool) -> Killed {
        let mut steps = 0;
        loop {
            let mut pass_on = 0;
            // A thread is waited for by who traces it, and there is no descriptor to poll.
            let flags =
                WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
            match waitid(Id::Pid(self.0), flags).expect("it is traced") {
                WaitStatus::StillAlive if done() => {
                    self.let_go();
                    return Killed::No;
                }
                WaitStatus::StillAlive => {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                WaitStatus::PtraceSyscall(_) if changes_files(self.0) => {
                    if steps == step {
                        nix::sys::signal::kill(self.0, Signal::SIGKILL).expect("it is there");
                        // The process is not reported to its parent before its threads were to their tracers.
                        let flags = WaitPidFlag::WEXITED | WaitPidFlag::__WALL;
                        waitid(Id::Pid(self.0), flags).expect("it is traced");
                        return Killed::Yes;
                    }
                    steps += 1;
                }
                // The thread has come to its end, and the process goes on.
                WaitStatus::Exited(..) => return Killed::No,
                WaitStatus::Stopped(_, signal) => pass_on = signal as usize,
                WaitStatus::PtraceSyscall(_) | WaitStatus::PtraceEvent(..) => {}
                other => panic!("{}: {other:?}", self.0),
            }
            request(libc::PTRACE_SYSCALL, self.0, 0, pass_on).expect("it is stopped");
        }
    }

    fn let_go(&self) {
        request(libc::PTRACE_INTERRUPT, self.0, 0, 0).expect("it runs");
        waitid(Id::Pid(self.0), WaitPidFlag::WSTOPPED | WaitPidFlag::__WALL).expect("it stops");
        request(libc::PTRACE_DETACH, self.0, 0, 0).expect("it is stopped");
    }
}

fn kill(child: &mut Child) {
    child.kill().expect("it is there");
    child.wait().expect("it is a child");
}

/// Whether the call that it is about to make changes files; false after a call.
fn changes_files(pid: Pid) -> bool {
    let Some((call, args)) = call(pid) else { return false };
    let creates = |flags: u64| flags & (libc::O_CREAT as u64) != 0;
    match call {
        libc::SYS_openat => creates(args[2]),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open => creates(args[1]),
        _ => CHANGES.contains(&call) || OLD_CHANGES.contains(&call),
    }
}

/// Whether it is about to write to a socket.
fn says_something(pid: Pid) -> bool {
    let Some((call, args)) = call(pid) else { return false };
    let socket = fs::read_link(format!("/proc/{pid}/fd/{}", args[0]));
    [libc::SYS_write, libc::SYS_sendto, libc::SYS_sendmsg].contains(&call)
        && socket.is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
}

/// The call that it is about to make, and its arguments; none after a call.
fn call(pid: Pid) -> Option<(c_long, [u64; 6])> {
    // SAFETY: it is plain numbers, for which zero is a value.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let (size, place) = (size_of_val(&info), (&raw mut info) as usize);
    match request(libc::PTRACE_GET_SYSCALL_INFO, pid, size, place) {
        // Another process has ended it meanwhile, or its parent's end has.
        Err(Errno::ESRCH) => return None,
        looked => looked.expect("it is at a call"),
    }
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: at an entry the kernel has filled this member in.
    let entry = unsafe { info.u.entry };
    Some((entry.nr as c_long, entry.args))
}

fn request(what: u32, pid: Pid, address: usize, data: usize) -> nix::Result<()> {
    // SAFETY: of the requests made here, all of this module's, only GET_SYSCALL_INFO takes a pointer, to
    // memory of its caller's of the size that it gives, alive until this returns.
    let done = unsafe { libc::ptrace(what, pid.as_raw(), address as *mut c_void, data as *mut c_void) };
    Errno::result(done).map(drop)
}
