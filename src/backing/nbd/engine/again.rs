//! A connection that is lost, and the next one.
#![forbid(unsafe_code)]

use super::connection::{Connection, End};
use super::job::{Job, Work, ZEROS, errno};
use super::{Engine, Outage, RETRY, SILENCE};
use crate::backing::medium::Medium;
use crate::backing::nbd::dial::{self, How, Lost};
use crate::backing::nbd::export::{Right, Shared, borrows, patience, tell_lost};
use crate::backing::nbd::handshake::Terms;
use crate::backing::nbd::protocol::{self, CMD_READ};
use crate::backing::nbd::replies::{Given, Replies, Wanted};
use crate::backing::nbd::task::To;
use std::io::{self, ErrorKind, Read, Write as _};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long to wait after a violation: such a server is likely to do it again.
const CALM: Duration = Duration::from_secs(1);

impl Engine {
    /// The connection has ended: what was under way is asked for again on the next one, or fails.
    pub(super) fn ended(&mut self, shared: &Shared, end: End) {
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

    pub(super) fn give_up(&mut self, job: Job) {
        if matches!((&job.work, &job.to), (Work::Flush(_), To::Nobody)) {
            self.flushes = false;
        }
        job.to.tell(Err(errno(libc::EIO)));
    }

    /// Without a connection: makes one, if somebody needs it, and lets go of those who have waited enough.
    pub(super) fn go_without(&mut self, shared: &Shared) {
        if self.is_lent() {
            // It may not come back, and whoever looks through it in the background is to end then.
            std::mem::take(&mut self.waiting).into_iter().for_each(|job| self.give_up(job));
        }
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

/// Connects again, to what was there before.
fn connect(shared: &Shared) -> io::Result<(UnixStream, Terms)> {
    if shared.right == Right::Write && shared.address.image().is_some() && borrows() {
        // Whoever has lent it may be taking it back at this moment.
        return Err(io::Error::other(Lost("another process has lent it, and not given it yet".into())));
    }
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
