//! A vhost-user-blk front-end for tests and for the load generator: the part of a VMM and of a guest's driver
//! that talks to the back-end, with every number of the protocol and of the rings in the caller's hand.
//!
//! `memory` is the guest's RAM, `ring` the guest driver's side of a split virtqueue, `block` makes virtio-blk
//! requests of any shape out of descriptors, `session` speaks vhost-user as the known VMMs do, `raw` speaks
//! it wrongly, `inflight` is the memory that a VMM keeps between back-ends, `load` makes requests whose
//! effects are known, `vmm` sends what each VMM sends, message by message, and `server` runs the back-end
//! under test. It knows nothing of sealblk: any vhost-user-blk back-end can be the peer. Every wait has a
//! limit, so that no test can hang.

// Each test binary uses its own part of this.
#![allow(dead_code, unused_imports)]

pub mod block;
pub mod config;
pub mod hostile;
pub mod inflight;
pub mod load;
pub mod log;
pub mod memory;
pub mod raw;
pub mod ring;
pub mod server;
pub mod session;
pub mod vmm;
pub mod watch;

pub use block::{Framing, Outcome, Place, Request, Segment};
pub use config::BlkConfig;
pub use load::Load;
pub use memory::{GuestMem, Layout, RegionSpec, Seals};
pub use raw::{RawSocket, Reply};
pub use ring::{Desc, SplitRing, Used};
pub use server::Server;
pub use session::{Acks, Options, Order, Session};
pub use vmm::Vmm;

use super::patience::limit;
use std::io;

/// Why an exchange with the back-end did not work.
#[derive(Debug)]
pub enum Fault {
    /// What was waited for until the limit: the back-end hangs.
    TimedOut(String),
    /// The back-end closed the connection.
    Closed(String),
    /// The back-end answered with a failure (REPLY_ACK not zero).
    Refused(String),
    /// The back-end's answer breaks the protocol, or the caller asked for what was not agreed.
    Protocol(String),
    /// The operating system said no.
    Io(io::Error),
}

impl Fault {
    /// Whether the back-end turned the exchange down, in either of the two ways it may.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Fault::Closed(_) | Fault::Refused(_))
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::TimedOut(what) => write!(f, "waited {:?} for this: {what}", limit()),
            Fault::Closed(what) => write!(f, "{what}: the back-end closed the connection"),
            Fault::Refused(what) => write!(f, "{what}: the back-end refused"),
            Fault::Protocol(what) => write!(f, "{what}"),
            Fault::Io(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for Fault {}

impl From<io::Error> for Fault {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
                Fault::Closed(e.to_string())
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Fault::TimedOut(e.to_string()),
            _ => Fault::Io(e),
        }
    }
}

/// The result of an exchange with the back-end.
pub type Result<T> = std::result::Result<T, Fault>;
