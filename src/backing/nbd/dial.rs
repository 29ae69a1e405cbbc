//! Who makes connections to servers: this process, or another one for it.
//!
//! A confined process cannot connect to a socket that has a name in the file system. So before it is
//! confined it starts a process that can (`helper::dial`), and makes that known here. An RBD image is served
//! by a process of its own in any case (`helper::rbd`), which whoever runs this program makes known.
#![forbid(unsafe_code)]

use super::address::{Address, Server};
use super::handshake::{self, Terms};
use super::image::Image;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;
use std::{fmt, io};

/// How long a server may take until it serves an export.
pub const TIME: Duration = Duration::from_secs(5);

/// How connections to NBD servers are made.
pub type Dial = Box<dyn Fn(&Server) -> io::Result<(UnixStream, Terms)> + Send + Sync>;
/// How RBD images are opened.
pub type OpenImage = Box<dyn Fn(&Image, How) -> io::Result<(UnixStream, Terms)> + Send + Sync>;

static BY_ANOTHER: OnceLock<Dial> = OnceLock::new();
static IMAGES_BY: OnceLock<OpenImage> = OnceLock::new();

/// What one wants to do with an export. Of an NBD server, it makes no difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Read it.
    Read,
    /// Read and write it: nobody else may write meanwhile.
    Write,
}

/// How an RBD image is opened.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// What for.
    pub right: Right,
    /// It goes on for a connection that was lost: then the image must be this process's still.
    pub again: bool,
    /// The size in bytes of an image to be made, if there is none of that name.
    pub make: Option<u64>,
}

/// In an error: an export is lost to this process for good. What else it could write there would land on
/// top of what somebody else has written.
#[derive(Debug)]
pub struct Lost(pub String);

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Lost {}

/// From now on, and for good, `dial` makes the connections of this process to NBD servers.
pub fn make_by(dial: Dial) {
    // Whoever came first is as good.
    let _ = BY_ANOTHER.set(dial);
}

/// From now on, and for good, `open` opens RBD images for this process.
pub fn open_images_by(open: OpenImage) {
    let _ = IMAGES_BY.set(open);
}

/// Connects to an export.
///
/// # Errors
/// As [`handshake::connect_to`]; those of the process that makes the connection; with [`Lost`], where it can
/// not be this process's any more.
pub(super) fn connect(address: &Address, how: How) -> io::Result<(UnixStream, Terms)> {
    let (socket, terms) = match (address, BY_ANOTHER.get()) {
        (Address::Rbd(image), _) => {
            let none = || io::Error::new(io::ErrorKind::Unsupported, "this process opens no RBD images");
            IMAGES_BY.get().ok_or_else(none)?(image, how)?
        }
        (Address::Server(server), Some(dial)) => dial(server)?,
        (Address::Server(server), None) => return handshake::connect_to(server, TIME),
    };
    Ok((socket, terms.checked()?))
}
