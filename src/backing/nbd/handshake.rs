//! The beginning of a connection: what the server and we agree on.
//!
//! The server is a stranger. Each of its messages has a bound on its length, each option one on its number of
//! replies, and all together one on their time. What comes out is [`Terms`], which are checked once.
//!
//! Only "fixed newstyle" is spoken, which every server has that is kept up. What a server lacks beyond that
//! is done without: structured replies, block status, sizes of blocks.
#![forbid(unsafe_code)]

use super::address::Server;
use super::protocol::*;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The most bytes of a reply to an option: the longest strings of the protocol have 4096 bytes.
const REPLY_MAX: usize = 16 << 10;
/// The most replies to one option.
const REPLIES_MAX: usize = 32;
/// The largest block that a layer can be written in: see `device::BLOCK`.
const BLOCK_MAX: u32 = 4096;
/// Bytes that a server has to take in one request: what a queue writes at once, and blocks that are written
/// with that.
const PAYLOAD_MIN: u32 = 512 << 10;
/// What transfers are multiples of in any case.
const SECTOR: u32 = 512;

/// What server and client agree on for one export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    /// Bytes of the export.
    pub size: u64,
    /// The flags by which the server tells what it can do.
    flags: u16,
    /// What offsets and lengths are multiples of: a power of two.
    block: u32,
    /// Whether replies are structured.
    pub(super) structured: bool,
    /// The number by which the server knows the map of zeros, if it has one.
    pub(super) map: Option<u32>,
}

impl Terms {
    /// Those of a server that can do nothing but read and write.
    #[cfg(test)]
    pub(super) fn for_test() -> Terms {
        Terms { size: 64 << 20, flags: 0, block: 1, structured: false, map: None }
    }

    /// Those of an RBD image of `size` bytes, as `helper::rbd` serves it.
    pub(crate) fn of_image(size: u64, read_only: bool) -> Terms {
        let can = SEND_FLUSH | SEND_FUA | SEND_WRITE_ZEROES;
        let flags = HAS_FLAGS | if read_only { READ_ONLY } else { can };
        Terms { size, flags, block: SECTOR, structured: true, map: Some(IMAGE_MAP) }
    }

    /// Whether nothing can be written.
    pub fn is_read_only(&self) -> bool {
        self.flags & READ_ONLY != 0
    }

    /// Whether the server can be asked to make durable what it has written. What one that cannot has
    /// completed counts as durable: there is nothing else to go by.
    pub fn can_flush(&self) -> bool {
        self.flags & SEND_FLUSH != 0
    }

    pub(super) fn can_write_durably(&self) -> bool {
        self.flags & SEND_FUA != 0
    }

    /// Whether the server makes zeros by itself. Its trim is not used: that promises no zeros.
    pub fn can_zero(&self) -> bool {
        self.flags & SEND_WRITE_ZEROES != 0
    }

    /// What transfers are multiples of: a power of two from 512 to 4096.
    pub fn unit(&self) -> u32 {
        self.block.max(SECTOR)
    }

    /// Looks whether an export with these terms can hold a layer.
    ///
    /// # Errors
    /// `Unsupported`, with what is in the way.
    pub(super) fn checked(self) -> io::Result<Self> {
        let refused = |message: String| Err(io::Error::new(ErrorKind::Unsupported, message));
        if !self.block.is_power_of_two() || self.block > BLOCK_MAX {
            let block = self.block;
            return refused(format!("its blocks have {block} bytes, and no more than {BLOCK_MAX} can be"));
        }
        if self.size > i64::MAX as u64 {
            return refused(format!("{} bytes are more than there can be", self.size));
        }
        match self.map.is_some() && !self.structured {
            true => refused("it has a map, and no structured replies to tell it by".into()),
            false => Ok(self),
        }
    }

    /// Whether a connection with these terms can go on for one with `before`: nothing is missing that was
    /// built upon. The export may have grown.
    ///
    /// # Errors
    /// What is missing.
    pub(super) fn go_on_for(&self, before: &Terms) -> io::Result<()> {
        let lost = |flag| before.flags & flag != 0 && self.flags & flag == 0;
        let problem = if self.size < before.size {
            format!("it had {} bytes, and has {} now", before.size, self.size)
        } else if self.is_read_only() && !before.is_read_only() {
            "it cannot be written any more".into()
        } else if self.unit() > before.unit() {
            format!("its blocks had {} bytes, and have {} now", before.unit(), self.unit())
        } else if lost(SEND_WRITE_ZEROES) {
            "it can make no zeros any more".into()
        } else if lost(SEND_FLUSH) {
            "it can make nothing durable any more".into()
        } else {
            return Ok(());
        };
        Err(io::Error::new(ErrorKind::InvalidData, format!("another export is there by now: {problem}")))
    }
}

/// Connects to an export, which takes no longer than `within`.
///
/// # Errors
/// Those of the connection, in words for whoever runs the server; `Unsupported` for an export that can hold
/// no layer; `TimedOut` for a server that does not answer.
pub fn connect_to(address: &Server, within: Duration) -> io::Result<(UnixStream, Terms)> {
    let until = Instant::now() + within;
    let socket =
        UnixStream::from(socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?);
    let limit = TimeVal::new(within.as_secs() as i64, within.subsec_micros().into());
    // It is also how long one waits for a server that accepts nobody.
    setsockopt(&socket, sockopt::SendTimeout, &limit)?;
    let path = address.socket().display();
    connect(socket.as_raw_fd(), &UnixAddr::new(address.socket())?).map_err(|e| {
        let hint = match e {
            nix::Error::ENOENT | nix::Error::ECONNREFUSED => "; start the server that listens there",
            nix::Error::EACCES => "; who connects has to have the right to write to the socket",
            nix::Error::EAGAIN => "; the server accepts nobody",
            _ => "",
        };
        io::Error::new(io::Error::from(e).kind(), format!("connect to {path}: {}{hint}", e.desc()))
    })?;
    let mut talk = Talk { socket, until };
    let terms = talk.agree(address).map_err(|e| match e.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            let message = format!(
                "the server at {path} does not answer; perhaps it serves one client at a time, and has one \
                 (\"qemu-nbd\" serves more with --shared=0)"
            );
            io::Error::new(ErrorKind::TimedOut, message)
        }
        ErrorKind::UnexpectedEof => {
            io::Error::new(e.kind(), format!("the server at {path} has closed the connection"))
        }
        kind => io::Error::new(kind, format!("the server at {path}: {e}")),
    })?;
    talk.socket.set_read_timeout(None)?;
    talk.socket.set_write_timeout(None)?;
    Ok((talk.socket, terms))
}

/// One reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

struct Talk {
    socket: UnixStream,
    until: Instant,
}

impl Talk {
    fn agree(&mut self, address: &Server) -> io::Result<Terms> {
        if u64::from_be_bytes(self.take()?) != GREETING {
            return Err(strange("it is no NBD server"));
        }
        if u64::from_be_bytes(self.take()?) != OPTION {
            return Err(strange("it speaks the old form of NBD, which has no options"));
        }
        let flags = u16::from_be_bytes(self.take()?);
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(strange("it does not speak NBD's fixed newstyle"));
        }
        self.say(&u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes())?;
        let structured = self.wants_structured()?;
        let map = if structured { self.map_of(address.export())? } else { None };
        self.go(address, structured, map)?.checked()
    }

    fn wants_structured(&mut self) -> io::Result<bool> {
        self.ask(OPT_STRUCTURED_REPLY, &[])?;
        Ok(self.reply(OPT_STRUCTURED_REPLY)?.kind == REP_ACK)
    }

    /// The number of the export's map of zeros, if the server has that.
    fn map_of(&mut self, export: &str) -> io::Result<Option<u32>> {
        let mut data = string(export);
        data.extend(1u32.to_be_bytes());
        data.extend(string(ALLOCATION));
        self.ask(OPT_SET_META_CONTEXT, &data)?;
        let mut found = None;
        for _ in 0..REPLIES_MAX {
            let Reply { kind, data } = self.reply(OPT_SET_META_CONTEXT)?;
            match kind {
                REP_ACK => return Ok(found),
                REP_META_CONTEXT => {
                    let (number, name) = data.split_first_chunk().ok_or_else(short)?;
                    if name == ALLOCATION.as_bytes() {
                        found = Some(u32::from_be_bytes(*number));
                    }
                }
                // It has no maps; an export that is not there is told by the next option.
                kind if kind & REP_ERROR != 0 => return Ok(None),
                _ => return Err(strange("an unknown reply to what it was asked")),
            }
        }
        Err(strange("too many replies to what it was asked"))
    }

    /// The last option: from here on, the export is served.
    fn go(&mut self, address: &Server, structured: bool, map: Option<u32>) -> io::Result<Terms> {
        let mut data = string(address.export());
        data.extend(1u16.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.ask(OPT_GO, &data)?;
        let (mut export, mut block, mut most) = (None, 1, u32::MAX);
        for _ in 0..REPLIES_MAX {
            let Reply { kind, data } = self.reply(OPT_GO)?;
            match kind {
                REP_ACK => {
                    let (size, flags) = export.ok_or_else(|| strange("it does not tell the size"))?;
                    if most < PAYLOAD_MIN {
                        let message =
                            format!("it takes {most} bytes at a time, and {PAYLOAD_MIN} are needed");
                        return Err(io::Error::new(ErrorKind::Unsupported, message));
                    }
                    return Ok(Terms { size, flags, block, structured, map });
                }
                REP_INFO => {
                    let (info, data) = data.split_first_chunk().ok_or_else(short)?;
                    match u16::from_be_bytes(*info) {
                        INFO_EXPORT => export = Some(size_and_flags(data)?),
                        INFO_BLOCK_SIZE => (block, most) = block_sizes(data)?,
                        _ => {}
                    }
                }
                kind if kind & REP_ERROR != 0 => return Err(refusal(kind, address.export(), &data)),
                _ => return Err(strange("an unknown reply to what it was asked")),
            }
        }
        Err(strange("too many replies to what it was asked"))
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut message = OPTION.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.say(&message)
    }

    fn reply(&mut self, option: u32) -> io::Result<Reply> {
        let magic = u64::from_be_bytes(self.take()?);
        if magic != OPTION_REPLY || u32::from_be_bytes(self.take()?) != option {
            return Err(strange("it does not keep to the protocol"));
        }
        let kind = u32::from_be_bytes(self.take()?);
        let len = u32::from_be_bytes(self.take()?) as usize;
        if len > REPLY_MAX {
            return Err(strange("a reply is too long"));
        }
        let mut data = vec![0; len];
        self.fill(&mut data)?;
        Ok(Reply { kind, data })
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.read(bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => bytes = &mut bytes[count..],
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.socket.write_all(bytes) {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Err(ErrorKind::UnexpectedEof.into()),
            said => said,
        }
    }
}

/// A string as options have it.
fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn size_and_flags(data: &[u8]) -> io::Result<(u64, u16)> {
    let data: &[u8; 10] = data.try_into().map_err(|_| short())?;
    let (size, flags) = data.split_first_chunk().ok_or_else(short)?;
    let flags = u16::from_be_bytes([flags[0], flags[1]]);
    // Without this one, the others mean nothing.
    Ok((u64::from_be_bytes(*size), if flags & HAS_FLAGS == 0 { 0 } else { flags }))
}

/// The smallest block and the largest transfer.
fn block_sizes(data: &[u8]) -> io::Result<(u32, u32)> {
    let data: &[u8; 12] = data.try_into().map_err(|_| short())?;
    let number = |at: usize| u32::from_be_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
    Ok((number(0), number(8)))
}

fn refusal(kind: u32, export: &str, words: &[u8]) -> io::Error {
    let words = String::from_utf8_lossy(words);
    let (kind, message) = match kind {
        REP_ERR_UNKNOWN if export.is_empty() => {
            (ErrorKind::NotFound, "it has no default export; name one (?export=NAME)".into())
        }
        REP_ERR_UNKNOWN => (ErrorKind::NotFound, format!("it has no export {export:?}")),
        REP_ERR_TLS_REQD => (ErrorKind::Unsupported, "it wants TLS, which is not spoken here".into()),
        REP_ERR_POLICY => (ErrorKind::PermissionDenied, format!("it refuses: {words}")),
        _ => (ErrorKind::Other, format!("it refuses: {words}")),
    };
    io::Error::new(kind, message)
}

fn strange(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

fn short() -> io::Error {
    strange("a reply has another length than it should")
}
