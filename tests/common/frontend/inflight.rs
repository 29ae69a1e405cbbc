//! The memory in which a back-end notes what is in flight, as a VMM keeps it from one back-end to the next,
//! with every number in the caller's hand.
//!
//! Source: vhost-user protocol, "Inflight I/O tracking", split virtqueue. Parts of queues begin at multiples
//! of 64, as in QEMU's library.

use super::hostile::{Answer, ask};
use super::memory::{Seals, memfd};
use super::{Fault, RawSocket, Result};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserInflight};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

/// What GET_INFLIGHT_FD and SET_INFLIGHT_FD say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bytes.
    pub size: u64,
    /// Where they begin in the file.
    pub offset: u64,
    /// Queues.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
}

impl Info {
    /// What asks for a region.
    pub fn wish(queues: u16, queue_size: u16) -> Self {
        Info { size: 0, offset: 0, queues, queue_size }
    }

    /// A region that is exactly large enough.
    pub fn exact(queues: u16, queue_size: u16) -> Self {
        Info { size: u64::from(queues) * part(queue_size), ..Self::wish(queues, queue_size) }
    }

    /// The body of a message, of `len` bytes: 20 or, with padding, 24.
    pub fn body(&self, len: usize) -> Vec<u8> {
        let mut body = [self.size.to_le_bytes(), self.offset.to_le_bytes()].concat();
        body.extend(self.queues.to_le_bytes());
        body.extend(self.queue_size.to_le_bytes());
        body.resize(len, 0);
        body
    }

    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self> {
        if body.len() < 20 {
            return Err(Fault::Protocol(format!("an in-flight description of {} bytes", body.len())));
        }
        let long = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
        let short = |at: usize| u16::from_le_bytes([body[at], body[at + 1]]);
        Ok(Info { size: long(0), offset: long(8), queues: short(16), queue_size: short(18) })
    }
}

impl From<Info> for VhostUserInflight {
    fn from(i: Info) -> Self {
        VhostUserInflight::new(i.size, i.offset, i.queues, i.queue_size)
    }
}

impl From<VhostUserInflight> for Info {
    fn from(i: VhostUserInflight) -> Self {
        Info { size: i.mmap_size, offset: i.mmap_offset, queues: i.num_queues, queue_size: i.queue_size }
    }
}

/// A region, mapped.
pub struct Region {
    /// Its description.
    pub info: Info,
    /// The memory file.
    pub file: File,
    map: MmapRegion,
}

impl Region {
    /// Maps what the back-end gave.
    pub fn new(info: Info, file: File) -> Result<Self> {
        let place = FileOffset::new(file.try_clone()?, info.offset);
        let map = MmapRegion::from_file(place, info.size as usize)
            .map_err(|e| Fault::Protocol(format!("map {info:?}: {e}")))?;
        Ok(Region { info, file, map })
    }

    /// A region of our own: zeros, which mean "never used".
    pub fn own(queues: u16, queue_size: u16) -> Result<Self> {
        let info = Info::exact(queues, queue_size);
        Self::new(info, memfd(info.size, Seals::Sealed)?)
    }

    /// Asks the back-end for one, with a body of `len` bytes.
    pub fn get(raw: &RawSocket, wish: Info, len: usize) -> Result<Self> {
        let Answer::Taken(mut reply) = ask(raw, Req::GET_INFLIGHT_FD, &wish.body(len), &[]) else {
            return Err(Fault::Refused("GET_INFLIGHT_FD".into()));
        };
        if reply.body.len() != len {
            return Err(Fault::Protocol(format!("{} bytes asked, {} answered", len, reply.body.len())));
        }
        let file = reply.file.take().ok_or_else(|| Fault::Protocol("no descriptor".into()))?;
        Self::new(Info::parse(&reply.body)?, file)
    }

    /// Gives it to a back-end, with a body of `len` bytes.
    pub fn give(&self, raw: &RawSocket, len: usize) -> Answer {
        ask(raw, Req::SET_INFLIGHT_FD, &self.info.body(len), &[self.file.as_raw_fd()])
    }

    /// Version and entries of queue `queue`'s part: 0 and 0 before its first use.
    pub fn shape(&self, queue: u16) -> (u16, u16) {
        (self.load(queue, 8), self.load(queue, 10))
    }

    /// Says that the part is in use.
    pub fn set_shape(&self, queue: u16, version: u16, entries: u16) {
        self.store(queue, 8, version);
        self.store(queue, 10, entries);
    }

    /// The head that was answered last.
    pub fn last_head(&self, queue: u16) -> u16 {
        self.load(queue, 12)
    }

    /// Sets it.
    pub fn set_last_head(&self, queue: u16, head: u16) {
        self.store(queue, 12, head);
    }

    /// The used index as last noted.
    pub fn used_idx(&self, queue: u16) -> u16 {
        self.load(queue, 14)
    }

    /// Sets it.
    pub fn set_used_idx(&self, queue: u16, index: u16) {
        self.store(queue, 14, index);
    }

    /// The heads that are marked as in flight.
    pub fn marks(&self, queue: u16) -> Vec<u16> {
        (0..self.info.queue_size).filter(|&h| self.load::<u8>(queue, entry(h)) != 0).collect()
    }

    /// Marks a head or takes its mark away.
    pub fn set_mark(&self, queue: u16, head: u16, mark: bool) {
        self.store(queue, entry(head), u8::from(mark));
    }

    /// The head that was answered before this one.
    pub fn next(&self, queue: u16, head: u16) -> u16 {
        self.load(queue, entry(head) + 6)
    }

    /// Sets it.
    pub fn set_next(&self, queue: u16, head: u16, next: u16) {
        self.store(queue, entry(head) + 6, next);
    }

    /// Writes bytes anywhere.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        self.map.as_volatile_slice().write_slice(bytes, at).expect("inside the region");
    }

    fn at(&self, queue: u16, offset: usize) -> usize {
        usize::from(queue) * part(self.info.queue_size) as usize + offset
    }

    fn load<T: AtomicAccess>(&self, queue: u16, offset: usize) -> T {
        let at = self.at(queue, offset);
        self.map.as_volatile_slice().load(at, Ordering::Acquire).expect("inside the region")
    }

    fn store<T: AtomicAccess>(&self, queue: u16, offset: usize, value: T) {
        let at = self.at(queue, offset);
        self.map.as_volatile_slice().store(value, at, Ordering::Release).expect("inside the region");
    }
}

fn entry(head: u16) -> usize {
    16 + 16 * usize::from(head)
}

fn part(queue_size: u16) -> u64 {
    (16 + 16 * u64::from(queue_size)).next_multiple_of(64)
}
