//! What becomes of what was asked for, once the server has answered.
#![forbid(unsafe_code)]

use super::Engine;
use super::connection::End;
use super::job::{Job, Work, errno, zeros};
use crate::backing::nbd::export::Shared;
use crate::backing::nbd::kept::{Mark, Write};
use crate::backing::nbd::protocol::*;
use crate::backing::nbd::replies::{Answer, Given};
use crate::backing::nbd::task::To;

impl Engine {
    /// # Errors
    /// That the server is going to end.
    pub(super) fn answered(&mut self, shared: &Shared, Answer { cookie, given }: Answer) -> Result<(), End> {
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
}
