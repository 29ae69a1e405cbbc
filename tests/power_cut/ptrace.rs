//! The little of ptrace(2) and seccomp(2) that the recorder needs: a process tree that stops at every system
//! call which is not known to be harmless, its arguments and its memory.

use super::harmless;
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::ffi::c_void;
use std::io::{self, IoSliceMut};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// One instruction of classic BPF: load the word at an offset, jump if equal, answer.
const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const ANSWER: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// AUDIT_ARCH_X86_64 (linux/audit.h).
const X86_64: u32 = 0xc000_003e;

/// A system call that a thread is about to make.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// What a traced thread did.
#[derive(Debug)]
pub enum Stop {
    /// It is about to make a system call that is not known to be harmless.
    Call(Call),
    /// It has made one, with this result (negative: -errno).
    Made(i64),
    /// It ended, with this wait status.
    Ended(i32),
    /// Something that does not matter; it must be let go on with this signal (0: none).
    Other(i32),
}

/// Lets the thread that spawns this command trace it and its descendants, from its first instruction on.
pub fn prepare(command: &mut Command) {
    let program = filter();
    // SAFETY: between fork and exec the closure only makes system calls (ptrace, prctl), with a pointer to
    // the filter, which it owns; it does not allocate.
    unsafe {
        command.pre_exec(move || {
            Errno::result(libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0))?;
            Errno::result(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
            Errno::result(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program))?;
            Ok(())
        });
    }
}

/// Asks the tracer about every call but the harmless ones.
fn filter() -> Vec<libc::sock_filter> {
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = vec![
        // The architecture, then the number, of struct seccomp_data.
        instruction(LOAD, 0, 0, 4),
        instruction(IF_EQUAL, 1, 0, X86_64),
        instruction(ANSWER, 0, 0, libc::SECCOMP_RET_TRACE),
        instruction(LOAD, 0, 0, 0),
    ];
    for number in harmless::CALLS {
        program.push(instruction(IF_EQUAL, 0, 1, *number as u32));
        program.push(instruction(ANSWER, 0, 0, libc::SECCOMP_RET_ALLOW));
    }
    program.push(instruction(ANSWER, 0, 0, libc::SECCOMP_RET_TRACE));
    program
}

/// Takes charge of a child that was spawned with [`prepare`], and of all that it will spawn;
/// they die with this thread.
pub fn take_charge(child: Pid) {
    let options = libc::PTRACE_O_TRACESECCOMP
        | libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_TRACEEXEC
        | libc::PTRACE_O_EXITKILL;
    let (_, stop) = wait(child).expect("the child has stopped at its exec");
    assert!(matches!(stop, Stop::Other(_)), "the child ended at once: {stop:?}");
    request(libc::PTRACE_SETOPTIONS, child, 0, options as usize).expect("it is stopped");
    go_on(child, 0);
}

/// The next stop of `thread`, or with -1 of any thread that this one traces; `None` when there is none left.
pub fn wait(thread: Pid) -> Option<(Pid, Stop)> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD;
    let found = loop {
        // SAFETY: `status` is ours and lives until the call returns.
        match unsafe { libc::waitpid(thread.as_raw(), &raw mut status, flags) } {
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return None,
            found => break Pid::from_raw(found),
        }
    };
    if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
        return Some((found, Stop::Ended(status)));
    }
    let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
    let stop = match (signal, event) {
        (_, libc::PTRACE_EVENT_SECCOMP) => call(found),
        (signal, 0) if signal == libc::SIGTRAP | 0x80 => made(found),
        // What a new thread or process begins with, and what tells of it.
        (libc::SIGSTOP | libc::SIGTRAP, _) => Stop::Other(0),
        (signal, _) => Stop::Other(signal),
    };
    Some((found, stop))
}

fn call(thread: Pid) -> Stop {
    let info = info(thread);
    assert_eq!(info.op, libc::PTRACE_SYSCALL_INFO_SECCOMP);
    // SAFETY: `op` says that this is the member which the kernel filled in.
    let seccomp = unsafe { info.u.seccomp };
    Stop::Call(Call { number: seccomp.nr as i64, arguments: seccomp.args })
}

fn made(thread: Pid) -> Stop {
    let info = info(thread);
    assert_eq!(info.op, libc::PTRACE_SYSCALL_INFO_EXIT);
    // SAFETY: `op` says that this is the member which the kernel filled in.
    Stop::Made(unsafe { info.u.exit }.sval)
}

fn info(thread: Pid) -> libc::ptrace_syscall_info {
    // SAFETY: all of its members are numbers, for which zero is a value.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::ptrace_syscall_info>();
    request(libc::PTRACE_GET_SYSCALL_INFO, thread, size, (&raw mut info) as usize).expect("it is stopped");
    info
}

/// Lets a stopped thread run, to its next call that matters.
pub fn go_on(thread: Pid, signal: i32) {
    resume(libc::PTRACE_CONT, thread, signal);
}

/// Lets a thread that is about to make a call make it.
pub fn make_call(thread: Pid) {
    resume(libc::PTRACE_SYSCALL, thread, 0);
}

fn resume(how: u32, thread: Pid, signal: i32) {
    match request(how, thread, 0, signal as usize) {
        // It was killed meanwhile.
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(e) => panic!("let thread {thread} go on: {e}"),
    }
}

fn request(what: u32, thread: Pid, address: usize, data: usize) -> nix::Result<()> {
    // SAFETY: of the requests made here, all of this module's, only GET_SYSCALL_INFO takes a pointer: to a
    // struct of its caller's, with its size, alive until this returns.
    let done = unsafe { libc::ptrace(what, thread.as_raw(), address as *mut c_void, data as *mut c_void) };
    Errno::result(done).map(drop)
}

/// `len` bytes of a stopped thread's memory.
pub fn memory(thread: Pid, address: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let remote = [RemoteIoVec { base: address as usize, len }];
    match process_vm_readv(thread, &mut [IoSliceMut::new(&mut bytes)], &remote)? {
        read if read == len => Ok(bytes),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The text that ends with a zero byte at an address of a stopped thread's memory.
pub fn text(thread: Pid, address: u64) -> io::Result<String> {
    const PAGE: u64 = 4096;
    let (mut bytes, mut at) = (Vec::new(), address);
    while bytes.len() < libc::PATH_MAX as usize {
        // Not across a page's end: what follows may not be there.
        let piece = memory(thread, at, (PAGE - at % PAGE) as usize)?;
        if let Some(end) = piece.iter().position(|&b| b == 0) {
            bytes.extend_from_slice(&piece[..end]);
            return String::from_utf8(bytes).map_err(io::Error::other);
        }
        at += piece.len() as u64;
        bytes.extend(piece);
    }
    Err(io::ErrorKind::InvalidData.into())
}
