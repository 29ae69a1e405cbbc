//! Getting a queue's thread out of a system call that waits for something which a VMM can withhold.

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

/// Nobody else in this program uses it.
const SIGNAL: Signal = Signal::SIGUSR2;

extern "C" fn nothing(_: libc::c_int) {}

/// Makes the signal interrupt system calls, and do nothing else.
pub(super) fn prepare() -> io::Result<()> {
    // Without SA_RESTART: the call is to end.
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is async-signal-safe.
    unsafe { sigaction(SIGNAL, &action) }.map(drop).map_err(Errno::into)
}

/// Interrupts the system call that the thread waits in, if any.
pub(super) fn interrupt<T>(thread: &JoinHandle<T>) {
    // SAFETY: whoever has its handle has not joined it, so the id is that thread's.
    let failed = unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGNAL as libc::c_int) };
    if failed != 0 {
        log::debug!("interrupting a queue's thread: {}", io::Error::from_raw_os_error(failed));
    }
}
