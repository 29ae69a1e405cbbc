//! Who makes connections to servers: this process, or another one for it.
//!
//! A confined process cannot connect to a socket that has a name in the file system. So before it is
//! confined it starts a process that can (`helper::dial`), and makes that known here.
#![forbid(unsafe_code)]

use super::address::Address;
use super::handshake::{self, Terms};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

/// How long a server may take until it serves an export.
pub const TIME: Duration = Duration::from_secs(5);

/// How connections are made.
pub type Dial = Box<dyn Fn(&Address) -> io::Result<(UnixStream, Terms)> + Send + Sync>;

static BY_ANOTHER: OnceLock<Dial> = OnceLock::new();

/// From now on, and for good, `dial` makes the connections of this process.
pub fn make_by(dial: Dial) {
    // Whoever came first is as good.
    let _ = BY_ANOTHER.set(dial);
}

/// Connects to an export.
///
/// # Errors
/// As [`handshake::connect_to`]; those of the process that makes the connection.
pub(super) fn connect(address: &Address) -> io::Result<(UnixStream, Terms)> {
    match BY_ANOTHER.get() {
        Some(dial) => {
            let (socket, terms) = dial(address)?;
            Ok((socket, terms.checked()?))
        }
        None => handshake::connect_to(address, TIME),
    }
}
