//! Building blocks of a front-end that means harm: bodies of messages with any numbers, and odd descriptors.

use super::memory::{self, Seals};
use super::raw::{NEED_REPLY, VERSION};
use super::{Fault, RawSocket, Reply, Result};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserProtocolFeatures as Protocol};

/// How a back-end took a message.
#[derive(Debug)]
pub enum Answer {
    /// It said that it worked, or gave what was asked for.
    Taken(Reply),
    /// It said no, or closed the connection.
    Refused,
}

impl Answer {
    /// Whether it was refused.
    pub fn is_refused(&self) -> bool {
        matches!(self, Answer::Refused)
    }
}

/// Sends a message that wants an acknowledgement. A back-end that stays silent is a fault.
pub fn ask(raw: &RawSocket, request: Req, body: &[u8], fds: &[RawFd]) -> Answer {
    match raw.ask(request as u32, VERSION | NEED_REPLY, body, fds) {
        Ok(reply) if carries_value(request) || matches!(reply.value(), Ok(0)) => Answer::Taken(reply),
        Ok(_) | Err(Fault::Closed(_)) => Answer::Refused,
        Err(fault) => panic!("{request:?}: {fault}"),
    }
}

/// Connects and agrees on all that the back-end offers, so that every message can be acknowledged.
pub fn agreed(path: &Path) -> Result<RawSocket> {
    let raw = RawSocket::connect(path)?;
    let offered = raw.ask(Req::GET_FEATURES as u32, VERSION, &[], &[])?.value()?;
    raw.message(Req::SET_FEATURES as u32, VERSION, &offered.to_le_bytes(), &[])?;
    let protocol = raw.ask(Req::GET_PROTOCOL_FEATURES as u32, VERSION, &[], &[])?.value()?;
    // Without its channel, what needs one is of no use.
    let protocol = protocol & !Protocol::BACKEND_REQ.bits();
    raw.message(Req::SET_PROTOCOL_FEATURES as u32, VERSION, &protocol.to_le_bytes(), &[])?;
    raw.message(Req::SET_OWNER as u32, VERSION, &[], &[])?;
    Ok(raw)
}

/// Little-endian words of 64 bits, as most bodies are made of.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Queue number and a number, each 32 bits.
pub fn state(queue: u32, number: u32) -> Vec<u8> {
    [queue.to_le_bytes(), number.to_le_bytes()].concat()
}

/// SET_VRING_ADDR: descriptor table, used ring and available ring at these user addresses.
pub fn ring_addresses(queue: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    [state(queue, 0), words(&[desc, used, avail, 0])].concat()
}

/// GET_CONFIG or SET_CONFIG of `size` bytes, with a payload of its own length.
pub fn config(offset: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    let head = [offset, size, 0].map(u32::to_le_bytes);
    [head.as_flattened(), payload].concat()
}

/// A region of a memory table: guest address, size, user address, offset in the file.
pub type Region = [u64; 4];

/// SET_MEM_TABLE that claims `count` regions and has these.
pub fn memory_table(count: u32, regions: &[Region]) -> Vec<u8> {
    [state(count, 0), words(regions.as_flattened())].concat()
}

/// ADD_MEM_REG or REM_MEM_REG.
pub fn memory_region(region: Region) -> Vec<u8> {
    [words(&[0]), words(&region)].concat()
}

/// Descriptors that are neither memory nor events, kept open together with what they need.
pub struct OddFiles {
    /// What each is, and its number.
    pub all: Vec<(&'static str, RawFd)>,
    _keep: Vec<Box<dyn AsRawFd>>,
}

impl OddFiles {
    /// One of each kind.
    pub fn new(dir: &Path) -> Result<OddFiles> {
        let (reader, writer) = std::io::pipe()?;
        let (one, other) = std::os::unix::net::UnixStream::pair()?;
        let file = dir.join("odd");
        std::fs::write(&file, vec![0; 1 << 16])?;
        let plain = std::fs::File::options().read(true).write(true).open(&file)?;
        let read_only = std::fs::File::open(&file)?;
        let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
        let folder = std::fs::File::open(dir)?;
        let memory = memory::memfd(1 << 16, Seals::Sealable)?;
        let timer = vmm_sys_util::timerfd::TimerFd::new().map_err(std::io::Error::from)?;
        let epoll = vmm_sys_util::epoll::Epoll::new()?;
        let all = vec![
            ("a pipe's reading end", reader.as_raw_fd()),
            ("a pipe's writing end", writer.as_raw_fd()),
            ("a socket", one.as_raw_fd()),
            ("a file", plain.as_raw_fd()),
            ("a file to read", read_only.as_raw_fd()),
            ("/dev/null", null.as_raw_fd()),
            ("a folder", folder.as_raw_fd()),
            ("a memory file", memory.as_raw_fd()),
            ("a timer", timer.as_raw_fd()),
            ("an epoll instance", epoll.as_raw_fd()),
        ];
        let _keep: Vec<Box<dyn AsRawFd>> = vec![
            Box::new(reader),
            Box::new(writer),
            Box::new(one),
            Box::new(other),
            Box::new(plain),
            Box::new(read_only),
            Box::new(null),
            Box::new(folder),
            Box::new(memory),
            Box::new(timer),
            Box::new(epoll),
        ];
        Ok(OddFiles { all, _keep })
    }
}

/// Whether the answer to a request is a value of its own instead of 0 for success.
fn carries_value(request: Req) -> bool {
    use Req::*;
    matches!(
        request,
        GET_FEATURES
            | GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | GET_VRING_BASE
            | GET_CONFIG
            | GET_MAX_MEM_SLOTS
            | GET_INFLIGHT_FD
            | SET_LOG_BASE
            | SET_DEVICE_STATE_FD
    )
}
