//! A process held still from outside, as a debugger of root's does it: with its registers, and at the moment
//! of its end, when everything that it wipes has been wiped and its memory is still there.

use super::patience::{Deadline, limit};
use nix::errno::Errno;
use nix::libc::{self, c_int, c_void};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::time::Duration;

/// The extended state of an x86 CPU: all vector registers (elf.h).
const NT_X86_XSTATE: usize = 0x202;

/// One thread that this thread traces, until it is dropped or has ended.
pub struct Traced(Pid);

impl Traced {
    /// Traces a thread, which goes on running. With `options` of PTRACE_SETOPTIONS.
    pub fn seize(thread: Pid, options: c_int) -> Self {
        request(libc::PTRACE_SEIZE, thread, 0, options as usize).expect("root may trace");
        Traced(thread)
    }

    /// Traces a thread which is to be held at its end.
    pub fn until_its_end(thread: Pid) -> Self {
        Self::seize(thread, libc::PTRACE_O_TRACEEXIT)
    }

    /// Stops it.
    pub fn interrupt(&self) {
        request(libc::PTRACE_INTERRUPT, self.0, 0, 0).expect("it runs");
        self.wait_for(libc::PTRACE_EVENT_STOP);
    }

    /// Lets it go on after [`Traced::interrupt`].
    pub fn go_on(&self) {
        request(libc::PTRACE_CONT, self.0, 0, 0).expect("it is stopped");
    }

    /// Waits until it ends; it stands still there, until this is dropped.
    pub fn wait_for_its_end(&self) {
        self.wait_for(libc::PTRACE_EVENT_EXIT);
    }

    /// Every vector register, as the kernel keeps them; the thread must have been stopped.
    pub fn vector_registers(&self) -> Vec<u8> {
        let mut state = vec![0u8; 16 << 10];
        let mut part = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
        request(libc::PTRACE_GETREGSET, self.0, NT_X86_XSTATE, (&raw mut part) as usize)
            .expect("it is stopped");
        state.truncate(part.iov_len);
        state
    }

    /// A thread is waited for by who traces it, and there is no descriptor to poll.
    fn wait_for(&self, event: c_int) {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
        let deadline = Deadline::after(limit());
        loop {
            match waitid(Id::Pid(self.0), flags).expect("it is traced") {
                WaitStatus::PtraceEvent(_, _, found) if found == event => return,
                WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(1)),
                // A signal is on its way to it, such as that a child has ended: it shall have it.
                WaitStatus::Stopped(_, signal) => {
                    request(libc::PTRACE_CONT, self.0, 0, signal as usize).expect("it is stopped");
                }
                other => panic!("{} was to stop with event {event}: {other:?}", self.0),
            }
            deadline.check(&format!("thread {} stops with event {event}", self.0), || "a thread that runs");
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // An error means that it has ended, or runs.
        let _ = request(libc::PTRACE_DETACH, self.0, 0, 0);
    }
}

fn request(what: u32, thread: Pid, address: usize, data: usize) -> nix::Result<()> {
    // SAFETY: of the requests made here, all of this module's, only GETREGSET takes a pointer, to an iovec
    // that names memory of its caller's, alive until this returns.
    let done = unsafe { libc::ptrace(what, thread.as_raw(), address as *mut c_void, data as *mut c_void) };
    Errno::result(done).map(drop)
}
