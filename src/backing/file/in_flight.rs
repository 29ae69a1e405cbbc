//! Writes that an earlier process has left in flight: a lock of each queue's open file tells of them.

use crate::base::locks::{self, Bytes};
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

/// The byte, beyond any layer's end, whose lock says that a queue may have writes in flight.
const IN_FLIGHT: Bytes = Bytes::one(i64::MAX - 1);
/// How long to wait for the writes of an earlier process.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until no write of an earlier process can reach the file any more. The kernel ends the requests
/// of a killed process only after the process itself, and what is on its way then would land on top of
/// what is written now. Each queue's open file carries a lock, which the kernel keeps for as long as a
/// request uses that open file; a queue that has seen all its requests complete gives it up itself
/// ([`nothing_in_flight`]).
pub(super) fn wait_for_earlier_writes(file: &File) -> io::Result<()> {
    let limit = Instant::now() + PATIENCE;
    loop {
        match lock_in_flight(file, locks::Kind::Exclusive) {
            // Shared from here on: our own queues take it as well.
            Ok(()) => return lock_in_flight(file, locks::Kind::Shared),
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
            Err(_) if Instant::now() > limit => {
                let message = "writes of an earlier host process are still on their way to it";
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
            }
            Err(_) => std::thread::sleep(PATIENCE / 6000),
        }
    }
}

/// Takes the lock that says "a queue may have writes in flight" for this open file.
pub(super) fn lock_in_flight(file: &File, kind: locks::Kind) -> io::Result<()> {
    match locks::try_lock(file, kind, IN_FLIGHT)? {
        true => Ok(()),
        false => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Gives up that lock: every request by this open file has completed. The kernel may still hold the file:
/// what carried out a request (a thread of its own, for a flush) lets go of it after the completion, and an
/// io_uring that is kept without being used notices that only when it is used again.
pub(super) fn nothing_in_flight(file: &File) {
    locks::unlock(file, IN_FLIGHT);
}
