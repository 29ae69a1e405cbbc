//! A connection that serves an export: what is sent, and what comes.
#![forbid(unsafe_code)]

use super::job::{Job, Work, zeros};
use crate::backing::nbd::handshake::Terms;
use crate::backing::nbd::kept::{Content, Write};
use crate::backing::nbd::protocol::{self, *};
use crate::backing::nbd::replies::{Answer, Replies, Wanted};
use nix::sys::socket::{MsgFlags, recv, sendmsg};
use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

/// Requests that are under way at most.
const UNDER_WAY_MAX: usize = 256;
/// Parts that are sent at once.
const PARTS: usize = 32;

/// A part of what is sent: a request's head, and bytes of a write.
pub(super) struct Out {
    cookie: u64,
    head: [u8; REQUEST_LEN],
    payload: Option<Arc<Vec<u8>>>,
    len: usize,
}

impl Out {
    /// What follows its first `sent` bytes.
    fn rest(&self, sent: usize) -> impl Iterator<Item = &[u8]> {
        let payload = self.payload.as_ref().map_or(&[][..], |payload| &payload[..self.len]);
        let head = &self.head[sent.min(REQUEST_LEN)..];
        let payload = &payload[sent.saturating_sub(REQUEST_LEN)..];
        [head, payload].into_iter().filter(|part| !part.is_empty())
    }

    fn total(&self) -> usize {
        REQUEST_LEN + self.len
    }
}

/// A request, and what is to come for it.
struct Asking {
    kind: u16,
    flags: u16,
    offset: u64,
    len: u32,
    /// As many of these bytes are sent with it as its length says.
    payload: Option<Arc<Vec<u8>>>,
    wanted: Wanted,
}

impl Asking {
    fn of(kind: u16, offset: u64, len: u32, wanted: Wanted) -> Self {
        Asking { kind, flags: 0, offset, len, payload: None, wanted }
    }
}

/// A connection that serves the export.
pub(super) struct Connection {
    pub(super) socket: UnixStream,
    pub(super) terms: Terms,
    replies: Replies,
    pub(super) under_way: HashMap<u64, Job>,
    pub(super) out: VecDeque<Out>,
    /// Bytes of the first that are sent.
    sent: usize,
    pub(super) heard: Instant,
}

/// How a connection ended.
pub(super) enum End {
    Lost(String),
    Violated(String),
}

impl Connection {
    pub(super) fn new(socket: UnixStream, terms: Terms) -> Self {
        Connection {
            socket,
            replies: Replies::new(&terms),
            terms,
            under_way: HashMap::new(),
            out: VecDeque::new(),
            sent: 0,
            heard: Instant::now(),
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.under_way.len() >= UNDER_WAY_MAX
    }

    /// Whether something is under way that changes one of these bytes.
    pub(super) fn changes_one_of(&self, bytes: &Range<u64>) -> bool {
        let mut changed = self.under_way.values().filter_map(|job| job.changes(&self.terms));
        changed.any(|other| other.start < bytes.end && bytes.start < other.end)
    }

    /// Sends the next request of a job.
    pub(super) fn begin(&mut self, cookie: u64, job: Job, zeros: &Arc<Vec<u8>>) {
        let Asking { kind, flags, offset, len, payload, wanted } = self.asking(&job.work, zeros);
        let head = protocol::request(flags, kind, cookie, offset, len);
        let sent_with = if payload.is_some() { len as usize } else { 0 };
        self.out.push_back(Out { cookie, head, payload, len: sent_with });
        if self.under_way.is_empty() {
            self.heard = Instant::now();
        }
        self.replies.ask(cookie, wanted);
        self.under_way.insert(cookie, job);
    }

    /// What the next request of a job is.
    fn asking(&self, work: &Work, zeros: &Arc<Vec<u8>>) -> Asking {
        match *work {
            Work::Read { offset, len } => Asking::of(CMD_READ, offset, len, Wanted::Bytes { offset, len }),
            Work::Map { offset, len } => Asking::of(CMD_BLOCK_STATUS, offset, len, Wanted::Map),
            Work::Flush(_) => Asking::of(CMD_FLUSH, 0, 0, Wanted::Nothing),
            Work::Write { ref write, durable } => {
                let flags = if durable && self.terms.can_write_durably() { FLAG_FUA } else { 0 };
                self.bringing(write, flags, zeros)
            }
            Work::Again(ref write) => self.bringing(write, 0, zeros),
            Work::Zero { ref range, keep_space } => {
                self.bringing(&self::zeros(range, keep_space, &self.terms), 0, zeros)
            }
        }
    }

    fn bringing(&self, write: &Write, flags: u16, zeros: &Arc<Vec<u8>>) -> Asking {
        let (kind, more, payload) = match &write.content {
            Content::Bytes(bytes) => (CMD_WRITE, 0, Some(bytes.clone())),
            Content::Zeros { keep_space, .. } if self.terms.can_zero() => {
                (CMD_WRITE_ZEROES, if *keep_space { FLAG_NO_HOLE } else { 0 }, None)
            }
            Content::Zeros { .. } => (CMD_WRITE, 0, Some(zeros.clone())),
        };
        let asking = Asking::of(kind, write.offset, write.len(), Wanted::Nothing);
        Asking { flags: flags | more, payload, ..asking }
    }

    /// Whether all of a request is sent.
    pub(super) fn is_sent(&self, cookie: u64) -> bool {
        self.out.iter().all(|out| out.cookie != cookie)
    }

    /// Sends as much as the socket takes.
    pub(super) fn send(&mut self) -> Result<(), End> {
        while let Some(first) = self.out.front() {
            let rest = self.out.iter().skip(1).flat_map(|out| out.rest(0));
            let parts = first.rest(self.sent).chain(rest).take(PARTS);
            let parts: Vec<IoSlice<'_>> = parts.map(IoSlice::new).collect();
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match sendmsg::<()>(self.socket.as_raw_fd(), &parts, &[], flags, None) {
                Ok(count) => self.sent += count,
                Err(nix::Error::EAGAIN) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(End::Lost(e.desc().into())),
            }
            while let Some(first) = self.out.front().filter(|first| first.total() <= self.sent) {
                self.sent -= first.total();
                self.out.pop_front();
            }
        }
        Ok(())
    }

    /// Receives what has come. Returns the answers.
    pub(super) fn receive(&mut self, room: &mut [u8]) -> (Vec<Answer>, Option<End>) {
        let mut answers = Vec::new();
        let end = loop {
            match recv(self.socket.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => break Some(End::Lost("the server has closed it".into())),
                Ok(count) => {
                    self.heard = Instant::now();
                    if let Err(violation) = self.replies.feed(&room[..count], &mut answers) {
                        break Some(End::Violated(violation.to_string()));
                    }
                    // More may be there; what has come is worth being told before.
                    if count < room.len() {
                        break None;
                    }
                }
                Err(nix::Error::EAGAIN) => break None,
                Err(nix::Error::EINTR) => {}
                Err(e) => break Some(End::Lost(e.desc().into())),
            }
        };
        (answers, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::nbd::task::To;
    use std::io::Read;

    #[test]
    fn a_request_is_sent_when_the_socket_has_taken_all_of_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(ours, Terms::for_test());
        for cookie in 1..=4 {
            let write = Write { offset: 0, content: Content::Bytes(Arc::new(vec![7; 4 << 20])) };
            let job = Job { work: Work::Write { write, durable: false }, to: To::Nobody };
            connection.begin(cookie, job, &Arc::default());
        }
        assert!(connection.send().is_ok());
        assert!(!connection.is_sent(1) && !connection.is_sent(4), "nobody has read it");
        let mut first = vec![0; REQUEST_LEN + (4 << 20)];
        let mut read = 0;
        while read < first.len() {
            read += theirs.read(&mut first[read..]).unwrap();
            assert!(connection.send().is_ok());
        }
        assert!(connection.is_sent(1) && !connection.is_sent(4));
    }
}
