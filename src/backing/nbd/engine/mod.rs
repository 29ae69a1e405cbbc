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
//! **An RBD image that is [lent](lend)** to another process is asked for nothing until it is taken back.
//!
//! **A flush that fails** says that writes are lost which had completed. No later one succeeds.
#![forbid(unsafe_code)]

mod again;
mod answers;
mod connection;
mod job;
mod lend;

use super::address::Address;
use super::export::{Shared, borrows};
use super::handshake::Terms;
use super::kept::{ENOUGH, Kept, Mark, TOO_MUCH};
use super::protocol::{self, CMD_DISC, FLAG_LEND};
use super::replies::Given;
use super::task::To;
use connection::Connection;
use job::{Job, Work, ZEROS, errno};
use lend::Lending;
use nix::poll::PollFlags;
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that are received at once.
const ROOM: usize = 256 << 10;
/// How long to wait between two attempts to connect.
const RETRY: Duration = Duration::from_millis(200);
/// How long the process that serves an RBD image may take to let go of it.
const LET_GO: Duration = Duration::from_secs(20);
/// After so much time without a word from the server, the log tells.
const SILENCE: Duration = Duration::from_secs(30);

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
    lending: Lending,
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
            lending: Lending::Ours,
            next_cookie: 0,
            zeros: Arc::new(vec![0; ZEROS as usize]),
            room: vec![0; ROOM],
        }
    }

    /// Does what is asked for, until there is nothing to do and the thread shall end.
    pub(super) fn run(&mut self, shared: &Shared) {
        while let Ok(tasks) = shared.next_tasks(self.is_idle()) {
            tasks.into_iter().for_each(|task| self.take(task));
            self.lend_if_wanted(&shared.address);
            self.begin();
            match self.connection.is_some() {
                true => self.exchange(shared),
                false => self.go_without(shared),
            }
        }
    }

    /// Takes leave of the server. Of an RBD image, waits until it is free for others.
    pub(super) fn leave(&mut self, address: &Address) {
        let Some(connection) = self.connection.take() else { return };
        let is_image = address.image().is_some();
        let flags = if is_image && borrows() { FLAG_LEND } else { 0 };
        if !self.say_goodbye(connection, flags, is_image.then_some(LET_GO)) {
            log::warn!("{address}: the process that serves it has not let go of it within {LET_GO:?}");
        }
    }

    /// Says goodbye to the server, and waits until it has ended, for so long if at all. Returns whether it
    /// has.
    fn say_goodbye(&mut self, mut connection: Connection, flags: u16, wait: Option<Duration>) -> bool {
        let socket = &mut connection.socket;
        let goodbye = protocol::request(flags, CMD_DISC, 0, 0, 0);
        let _ = socket.set_write_timeout(Some(RETRY)).and_then(|()| socket.write_all(&goodbye));
        let Some(time) = wait else { return true };
        let until = Instant::now() + time;
        let left = || until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        while socket.set_read_timeout(Some(left())).is_ok() {
            match socket.read(&mut self.room) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        false
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.connection.as_ref().is_none_or(|it| it.under_way.is_empty())
    }

    /// Begins with as much as can be under way.
    fn begin(&mut self) {
        if self.is_to_be_lent() {
            return;
        }
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
}
