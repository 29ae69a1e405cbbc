//! What the thread of an export does: it sends requests, takes answers, and connects again.
//!
//! **A connection that is lost.** What was not answered is asked for again on the next one; nobody has been
//! told of it. Before that, what had completed and was not durable yet ([`kept`](super::kept)) is written
//! again, in its order: the server may have lost it. So whoever asks sees a pause, and nothing else. If
//! the server does not come back in time, everything that waits fails, and so does what comes later, until it
//! is there again.
//!
//! **Two writes to the same bytes** are never under way together. The server may do them in any order; a
//! reader could have seen one order, and writing them again bring the other.
//!
//! **A server that does not keep to the protocol** is not asked again for what was under way: that fails. The
//! next connection is no better or worse than any.
//!
//! **An RBD image that another host has taken** is lost for good ([`dial::Lost`]): everything fails, and
//! nothing is asked again. What waits here to be written would land on top of what the other host writes.
//!
//! **A flush that fails** says that writes are lost which had completed. No later one succeeds.
#![forbid(unsafe_code)]

use super::address::Address;
use super::dial::{self, How, Lost};
use super::export::{Ask, Outcome, Shared, Task, To, patience, tell_lost};
use super::handshake::Terms;
use super::kept::{Content, ENOUGH, Kept, Mark, TOO_MUCH, Write};
use super::protocol::{self, *};
use super::replies::{Answer, Given, Replies, Wanted};
use crate::backing::medium::Medium;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv, sendmsg};
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, IoSlice, Read, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Requests that are under way at most.
const UNDER_WAY_MAX: usize = 256;
/// Bytes that the server makes zeros by one request, and bytes of zeros that are written by one.
const ZEROED: u64 = 64 << 20;
const ZEROS: u64 = 256 << 10;
/// Bytes that are received at once.
const ROOM: usize = 256 << 10;
/// Parts that are sent at once.
const PARTS: usize = 32;
/// How long to wait between two attempts to connect.
const RETRY: Duration = Duration::from_millis(200);
/// How long to wait after a violation: such a server is likely to do it again.
const CALM: Duration = Duration::from_secs(1);
/// How long the process that serves an RBD image may take to let go of it.
const LET_GO: Duration = Duration::from_secs(20);
/// After so much time without a word from the server, the log tells.
const SILENCE: Duration = Duration::from_secs(30);

/// Something that is being done.
struct Job {
    work: Work,
    to: To,
}

enum Work {
    Read {
        offset: u64,
        len: u32,
    },
    Write {
        write: Write,
        durable: bool,
    },
    /// What is left of a range that becomes zeros.
    Zero {
        range: Range<u64>,
        keep_space: bool,
    },
    /// A flush; the mark is where the writes were when it was sent.
    Flush(Mark),
    Map {
        offset: u64,
        len: u32,
    },
    /// A write that had completed on an earlier connection.
    Again(Write),
}

impl Job {
    /// Which bytes a server would change that does the next part of it.
    fn changes(&self, terms: &Terms) -> Option<Range<u64>> {
        match &self.work {
            Work::Write { write, .. } | Work::Again(write) => Some(write.range()),
            Work::Zero { range, keep_space } => Some(zeros(range, *keep_space, terms).range()),
            Work::Read { .. } | Work::Flush(_) | Work::Map { .. } => None,
        }
    }
}

/// The first part of a range that becomes zeros.
fn zeros(range: &Range<u64>, keep_space: bool, terms: &Terms) -> Write {
    let most = if terms.can_zero() { ZEROED } else { ZEROS };
    let len = (range.end - range.start).min(most) as u32;
    Write { offset: range.start, content: Content::Zeros { len, keep_space } }
}

impl From<Task> for Job {
    fn from(Task { ask, to }: Task) -> Job {
        let work = match ask {
            Ask::Read { offset, len } => Work::Read { offset, len },
            Ask::Write { offset, bytes, durable } => {
                Work::Write { write: Write { offset, content: Content::Bytes(Arc::new(bytes)) }, durable }
            }
            Ask::Zero { offset, len, keep_space } => Work::Zero { range: offset..offset + len, keep_space },
            Ask::Flush => Work::Flush(Mark::default()),
            Ask::Map { offset, len } => Work::Map { offset, len },
        };
        Job { work, to }
    }
}

impl To {
    fn tell(self, outcome: Outcome) {
        match self {
            To::Queue(inbox, number) => inbox.put(number, outcome),
            // Whoever waited has gone.
            To::Caller(caller) => drop(caller.send(outcome)),
            To::Nobody => {}
        }
    }
}

/// A part of what is sent: a request's head, and bytes of a write.
struct Out {
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
struct Connection {
    socket: UnixStream,
    terms: Terms,
    replies: Replies,
    under_way: HashMap<u64, Job>,
    out: VecDeque<Out>,
    /// Bytes of the first that are sent.
    sent: usize,
    heard: Instant,
}

/// How a connection ended.
enum End {
    Lost(String),
    Violated(String),
}

impl Connection {
    fn new(socket: UnixStream, terms: Terms) -> Self {
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

    fn is_full(&self) -> bool {
        self.under_way.len() >= UNDER_WAY_MAX
    }

    /// Whether something is under way that changes one of these bytes.
    fn changes_one_of(&self, bytes: &Range<u64>) -> bool {
        let mut changed = self.under_way.values().filter_map(|job| job.changes(&self.terms));
        changed.any(|other| other.start < bytes.end && bytes.start < other.end)
    }

    /// Sends the next request of a job.
    fn begin(&mut self, cookie: u64, job: Job, zeros: &Arc<Vec<u8>>) {
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
    fn is_sent(&self, cookie: u64) -> bool {
        self.out.iter().all(|out| out.cookie != cookie)
    }

    /// Sends as much as the socket takes.
    fn send(&mut self) -> Result<(), End> {
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
    fn receive(&mut self, room: &mut [u8]) -> (Vec<Answer>, Option<End>) {
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

/// That the connection is lost, until a server has answered something again: one that only accepts and closes
/// is no better than none.
struct Outage {
    /// Since when somebody waits.
    since: Option<Instant>,
    next_try: Instant,
    why: String,
    is_told: bool,
}

impl Outage {
    fn new(next_try: Instant) -> Self {
        Outage { since: None, next_try, why: String::new(), is_told: false }
    }
}

/// What the thread has, and leaves behind when it ends.
pub(super) struct Engine {
    connection: Option<Connection>,
    /// What is to be done, the oldest first.
    waiting: VecDeque<Job>,
    kept: Kept,
    /// Which of those that are kept is to be written again next; none when all are.
    again: Option<usize>,
    /// The thread flushes for itself.
    flushes: bool,
    /// A flush has failed.
    has_lost: bool,
    outage: Option<Outage>,
    /// The export is this process's no more.
    is_anothers: bool,
    next_cookie: u64,
    zeros: Arc<Vec<u8>>,
    room: Vec<u8>,
}

impl Engine {
    pub(super) fn new(socket: UnixStream, terms: &Terms) -> Self {
        Engine {
            connection: Some(Connection::new(socket, terms.clone())),
            waiting: VecDeque::new(),
            kept: Kept::default(),
            again: None,
            flushes: false,
            has_lost: false,
            outage: None,
            is_anothers: false,
            next_cookie: 0,
            zeros: Arc::new(vec![0; ZEROS as usize]),
            room: vec![0; ROOM],
        }
    }

    /// Does what is asked for, until there is nothing to do and the thread shall end.
    pub(super) fn run(&mut self, shared: &Shared) {
        while let Ok(tasks) = shared.next_tasks(self.is_idle()) {
            self.waiting.extend(tasks.into_iter().map(Job::from));
            self.begin();
            match self.connection.is_some() {
                true => self.exchange(shared),
                false => self.go_without(shared),
            }
        }
    }

    /// Takes leave of the server. Of an RBD image, waits until it is free for others.
    pub(super) fn leave(&mut self, address: &Address) {
        let Some(Connection { mut socket, .. }) = self.connection.take() else { return };
        let goodbye = protocol::request(0, CMD_DISC, 0, 0, 0);
        let _ = socket.set_write_timeout(Some(RETRY)).and_then(|()| socket.write_all(&goodbye));
        if address.image().is_none() {
            return;
        }
        let until = Instant::now() + LET_GO;
        let left = || until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        while socket.set_read_timeout(Some(left())).is_ok() {
            match socket.read(&mut self.room) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        log::warn!("{address}: the process that serves it has not let go of it within {LET_GO:?}");
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.connection.as_ref().is_none_or(|it| it.under_way.is_empty())
    }

    /// Begins with as much as can be under way.
    fn begin(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        let mut cookie = || {
            self.next_cookie += 1;
            self.next_cookie
        };
        if let Some(next) = &mut self.again {
            // In their order: what overlaps waits, and all that follow wait with it.
            while let Some(write) = self.kept.get(*next)
                && !connection.is_full()
                && !connection.changes_one_of(&write.range())
            {
                let job = Job { work: Work::Again(write.clone()), to: To::Nobody };
                connection.begin(cookie(), job, &self.zeros);
                *next += 1;
            }
            if self.kept.get(*next).is_some() || !connection.under_way.is_empty() {
                return;
            }
            self.again = None;
        }
        if self.kept.cost() > ENOUGH && !self.flushes {
            self.flushes = true;
            self.waiting.push_front(Job { work: Work::Flush(Mark::default()), to: To::Nobody });
        }
        let mut held = Vec::new();
        while let Some(mut job) = self.waiting.pop_front_if(|_| !connection.is_full()) {
            let is_held = job
                .changes(&connection.terms)
                .is_some_and(|bytes| self.kept.cost() > TOO_MUCH || connection.changes_one_of(&bytes));
            if is_held {
                held.push(job);
                continue;
            }
            if let Work::Flush(mark) = &mut job.work {
                if self.has_lost {
                    job.to.tell(Err(errno(libc::EIO)));
                    continue;
                }
                if !connection.terms.can_flush() {
                    job.to.tell(Ok(Given::Nothing));
                    continue;
                }
                *mark = self.kept.mark();
            }
            connection.begin(cookie(), job, &self.zeros);
        }
        held.into_iter().rev().for_each(|job| self.waiting.push_front(job));
    }

    /// Sends and receives, and waits for more.
    fn exchange(&mut self, shared: &Shared) {
        let Some(connection) = &mut self.connection else { return };
        if let Err(end) = connection.send() {
            return self.ended(shared, end);
        }
        let interest = match connection.out.is_empty() {
            true => PollFlags::POLLIN,
            false => PollFlags::POLLIN | PollFlags::POLLOUT,
        };
        let is_asked = !connection.under_way.is_empty();
        let time = is_asked.then(|| SILENCE.saturating_sub(connection.heard.elapsed()));
        let found = shared.wait(Some((connection.socket.as_fd(), interest)), time);
        if !found.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            if is_asked && connection.heard.elapsed() >= SILENCE {
                connection.heard = Instant::now();
                let count = connection.under_way.len();
                log::warn!(
                    "{}: {} has not answered for {SILENCE:?}; {count} requests wait",
                    shared.address,
                    shared.address.who()
                );
            }
            return;
        }
        let (answers, mut end) = connection.receive(&mut self.room);
        for answer in answers {
            if let Err(e) = self.answered(shared, answer) {
                end = end.or(Some(e));
            }
        }
        if let Some(end) = end {
            self.ended(shared, end);
        }
    }

    /// # Errors
    /// That the server is going to end.
    fn answered(&mut self, shared: &Shared, Answer { cookie, given }: Answer) -> Result<(), End> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        if given == Err(ESHUTDOWN) {
            // The job is under way until the connection has ended.
            return Err(End::Lost("the server is shutting down".into()));
        }
        // What waits to be sent is limited by what is under way.
        if !connection.is_sent(cookie) {
            return Err(End::Violated("an answer to what was not sent yet".into()));
        }
        let Some(job) = connection.under_way.remove(&cookie) else { return Ok(()) };
        if !matches!(job.work, Work::Again(_)) {
            self.outage = None;
        }
        match given {
            Ok(given) => self.done(job, given),
            Err(error) => self.failed(shared, job, error),
        }
        Ok(())
    }

    fn done(&mut self, job: Job, given: Given) {
        let Some(connection) = &self.connection else { return };
        let terms = &connection.terms;
        let Job { work, to } = job;
        match work {
            Work::Read { .. } | Work::Map { .. } => to.tell(Ok(given)),
            Work::Again(_) => {}
            Work::Write { write, durable } => {
                let then_flush = durable && !terms.can_write_durably() && terms.can_flush();
                self.keep(write);
                match then_flush {
                    true => self.waiting.push_front(Job { work: Work::Flush(Mark::default()), to }),
                    false => to.tell(Ok(given)),
                }
            }
            Work::Zero { range, keep_space } => {
                let write = zeros(&range, keep_space, terms);
                let rest = write.range().end..range.end;
                self.keep(write);
                match rest.is_empty() {
                    true => to.tell(Ok(given)),
                    false => {
                        self.waiting.push_front(Job { work: Work::Zero { range: rest, keep_space }, to })
                    }
                }
            }
            Work::Flush(mark) => {
                self.kept.is_durable(mark);
                if matches!(to, To::Nobody) {
                    self.flushes = false;
                }
                to.tell(Ok(given));
            }
        }
    }

    /// Keeps a write until it is durable. That it was durable by itself makes no difference: an earlier one
    /// of the same bytes may be kept, and must not be written again without it.
    fn keep(&mut self, write: Write) {
        let can_flush = self.connection.as_ref().is_some_and(|it| it.terms.can_flush());
        if can_flush && !self.has_lost {
            self.kept.push(write);
        }
    }

    fn failed(&mut self, shared: &Shared, job: Job, error: u32) {
        let Job { work, to } = job;
        let what = match &work {
            Work::Read { offset, .. } => format!("a read at {offset}"),
            Work::Write { write, .. } => format!("a write at {}", write.offset),
            Work::Zero { range, .. } => format!("zeros at {}", range.start),
            Work::Flush(_) => "a flush".into(),
            Work::Map { offset, .. } => format!("its map at {offset}"),
            Work::Again(write) => format!("a write at {}, after it came back", write.offset),
        };
        let why = match error {
            ENOSPC => "there is no space".into(),
            ETIMEDOUT => "it has not answered in time, and whether that is done is not known".into(),
            error => format!("error {error}"),
        };
        log::warn!("{}: {} refuses {what}: {why}", shared.address, shared.address.who());
        if matches!(work, Work::Flush(_) | Work::Again(_)) {
            self.has_lost = true;
            self.flushes = false;
            self.kept.clear();
            self.again = None;
        }
        let error = if error == ENOSPC { libc::ENOSPC } else { libc::EIO };
        to.tell(Err(errno(error)));
    }

    /// The connection has ended: what was under way is asked for again on the next one, or fails.
    fn ended(&mut self, shared: &Shared, end: End) {
        let Some(connection) = self.connection.take() else { return };
        let mut jobs: Vec<(u64, Job)> = connection.under_way.into_iter().collect();
        jobs.retain(|(_, job)| !matches!(job.work, Work::Again(_)));
        // In the order in which they were begun, and before what has not begun.
        jobs.sort_by_key(|(cookie, _)| std::cmp::Reverse(*cookie));
        let now = Instant::now();
        let (why, next_try) = match end {
            End::Lost(why) => {
                jobs.into_iter().for_each(|(_, job)| self.waiting.push_front(job));
                (why, if self.outage.is_some() { now + RETRY } else { now })
            }
            End::Violated(why) => {
                jobs.into_iter().for_each(|(_, job)| self.give_up(job));
                (format!("the server does not keep to the protocol: {why}"), now + CALM)
            }
        };
        log::warn!("{}: the connection is lost: {why}", shared.address);
        self.again = (!self.kept.is_empty()).then_some(0);
        let outage = self.outage.get_or_insert_with(|| Outage::new(now));
        (outage.next_try, outage.why) = (next_try, why);
    }

    fn give_up(&mut self, job: Job) {
        if matches!((&job.work, &job.to), (Work::Flush(_), To::Nobody)) {
            self.flushes = false;
        }
        job.to.tell(Err(errno(libc::EIO)));
    }

    /// Without a connection: makes one, if somebody needs it, and lets go of those who have waited enough.
    fn go_without(&mut self, shared: &Shared) {
        if self.waiting.is_empty() {
            shared.wait(None, None);
            return;
        }
        let now = Instant::now();
        let outage = self.outage.get_or_insert_with(|| Outage::new(now));
        let since = *outage.since.get_or_insert(now);
        if !self.is_anothers && now >= outage.next_try {
            match connect(shared) {
                Ok((socket, terms)) => {
                    log::info!("{}: connected again", shared.address);
                    self.connection = Some(Connection::new(socket, terms));
                    return;
                }
                Err(e) if e.get_ref().is_some_and(|e| e.is::<Lost>()) => {
                    outage.is_told = true;
                    self.is_anothers = true;
                    self.has_lost = true;
                    self.flushes = false;
                    self.kept.clear();
                    self.again = None;
                    log::error!(
                        "{}: it is lost to this process, and every request fails: {e}",
                        shared.address
                    );
                    tell_lost(&shared.address, &e.to_string());
                }
                Err(e) => {
                    outage.next_try = Instant::now() + RETRY;
                    outage.why = e.to_string();
                }
            }
        }
        if self.is_anothers || since.elapsed() >= patience() {
            if !outage.is_told {
                outage.is_told = true;
                let why = &outage.why;
                log::error!("{}: requests fail until the server is back: {why}", shared.address);
            }
            for job in std::mem::take(&mut self.waiting) {
                self.give_up(job);
            }
            return;
        }
        let left = (since + patience()).min(outage.next_try);
        shared.wait(None, Some(left.saturating_duration_since(Instant::now())));
    }
}

impl Write {
    fn len(&self) -> u32 {
        // No buffer is longer, nor a part that becomes zeros.
        (self.range().end - self.offset) as u32
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Connects again, to what was there before.
fn connect(shared: &Shared) -> io::Result<(UnixStream, Terms)> {
    let how = How { right: shared.right, again: true, make: None };
    let (socket, terms) = dial::connect(&shared.address, how)?;
    // A cluster may be about to recover.
    socket.set_read_timeout(Some(if shared.address.image().is_some() { SILENCE } else { dial::TIME }))?;
    let fresh = Fresh { socket, terms, next_cookie: AtomicU64::new(0) };
    shared.go_on(&fresh.terms, &fresh)?;
    fresh.socket.set_read_timeout(None)?;
    Ok((fresh.socket, fresh.terms))
}

/// A connection on which nothing else is asked yet: to look what it leads to.
struct Fresh {
    socket: UnixStream,
    terms: Terms,
    next_cookie: AtomicU64,
}

impl Medium for Fresh {
    fn length(&self) -> io::Result<u64> {
        Ok(self.terms.size)
    }

    fn fetch(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let mut replies = Replies::new(&self.terms);
        for (n, piece) in bytes.chunks_mut(ZEROS as usize).enumerate() {
            let (offset, len) = (at + n as u64 * ZEROS, piece.len() as u32);
            let cookie = self.next_cookie.fetch_add(1, Ordering::Relaxed);
            (&self.socket).write_all(&protocol::request(0, CMD_READ, cookie, offset, len))?;
            replies.ask(cookie, Wanted::Bytes { offset, len });
            let (mut room, mut answers) = ([0; 4096], Vec::new());
            while answers.is_empty() {
                let count = (&self.socket).read(&mut room)?;
                if count == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                let fed = replies.feed(&room[..count], &mut answers);
                fed.map_err(|violation| io::Error::new(ErrorKind::InvalidData, violation.to_string()))?;
            }
            match answers.pop().map(|answer| answer.given) {
                Some(Ok(Given::Bytes(come))) => piece.copy_from_slice(&come),
                _ => return Err(errno(libc::EIO)),
            }
        }
        Ok(())
    }

    fn store(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn make_zeros(&self, _: Range<u64>) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
