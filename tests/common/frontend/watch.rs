//! A time limit for calls of the `vhost` crate, which know none: a thread that shuts the socket down when an
//! answer is overdue, so that the call fails instead of waiting for ever.

use super::super::patience::limit;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;

/// The guard of one connection.
pub struct Watch {
    steps: Option<Sender<()>>,
    fired: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Guards `socket`.
    pub fn new(socket: UnixStream) -> Self {
        let (steps, seen) = channel();
        let fired = Arc::new(AtomicBool::new(false));
        let flag = fired.clone();
        let thread = Some(std::thread::spawn(move || guard(&seen, &socket, &flag)));
        Watch { steps: Some(steps), fired, thread }
    }

    /// Runs `call`; the socket is shut down if it takes longer than the limit.
    pub fn run<T>(&self, call: impl FnOnce() -> T) -> T {
        self.step();
        let result = call();
        self.step();
        result
    }

    /// Whether the limit was ever overrun.
    pub fn fired(&self) -> bool {
        self.fired.load(Ordering::SeqCst)
    }

    fn step(&self) {
        // The guard may be gone already, having fired.
        let _ = self.steps.as_ref().map(|s| s.send(()));
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.steps.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn guard(steps: &Receiver<()>, socket: &UnixStream, fired: &AtomicBool) {
    while steps.recv().is_ok() {
        match steps.recv_timeout(limit()) {
            Ok(()) => {}
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                fired.store(true, Ordering::SeqCst);
                let _ = socket.shutdown(Shutdown::Both);
                return;
            }
        }
    }
}
