//! An RBD image that another process gets, which may give it back.
//!
//! Both have the image by one tenure, and at no time together: it is lent when nothing is under way and
//! everything is durable, and from then on this process asks for nothing. Whether the other one keeps it is
//! decided elsewhere (`host::upgrade`). If not, this process connects again, as after any connection that was
//! lost, and takes the image from whoever has it by the same tenure.
#![forbid(unsafe_code)]

use super::Engine;
use super::job::{Job, Work};
use crate::backing::nbd::address::Address;
use crate::backing::nbd::kept::Mark;
use crate::backing::nbd::protocol::FLAG_LEND;
use crate::backing::nbd::task::{Task, To};
use std::io;
use std::sync::mpsc::Sender;
use std::time::Duration;

/// How long the process that serves the image may take to let go of it: its operations are done by then.
const TIME: Duration = Duration::from_secs(14);

/// Whose the image is.
pub(super) enum Lending {
    Ours,
    /// It is lent when nothing is under way.
    Wanted(Sender<io::Result<()>>),
    Lent,
}

impl Engine {
    pub(super) fn take(&mut self, task: Task) {
        match task {
            Task::Do(ask, to) => self.waiting.push_back(Job::new(ask, to)),
            Task::Lend(told) => self.lending = Lending::Wanted(told),
            Task::TakeBack => self.take_back(),
        }
    }

    pub(super) fn is_lent(&self) -> bool {
        matches!(self.lending, Lending::Lent)
    }

    pub(super) fn is_to_be_lent(&self) -> bool {
        matches!(self.lending, Lending::Wanted(_))
    }

    pub(super) fn lend_if_wanted(&mut self, address: &Address) {
        if !self.is_to_be_lent() || self.connection.as_ref().is_some_and(|it| !it.under_way.is_empty()) {
            return;
        }
        let Lending::Wanted(told) = std::mem::replace(&mut self.lending, Lending::Ours) else { return };
        let lent = self.lend();
        if lent.is_ok() {
            log::debug!("{address}: it is another process's for now");
            self.lending = Lending::Lent;
        }
        // Whoever has waited no longer takes it back.
        let _ = told.send(lent);
    }

    fn lend(&mut self) -> io::Result<()> {
        if self.has_lost || self.is_anothers || !self.kept.is_empty() {
            return Err(io::Error::other("what was written there is not durable"));
        }
        let Some(connection) = self.connection.take() else {
            return Err(io::Error::other("its connection is lost at this moment"));
        };
        match self.say_goodbye(connection, FLAG_LEND, Some(TIME)) {
            true => Ok(()),
            false => Err(io::Error::other("the process that serves it does not let go of it")),
        }
    }

    fn take_back(&mut self) {
        self.lending = Lending::Ours;
        if self.connection.is_none() && !self.is_anothers && !self.flushes {
            // Nobody may ask for long, and others would take it for free.
            self.flushes = true;
            self.waiting.push_front(Job { work: Work::Flush(Mark::default()), to: To::Nobody });
        }
    }
}
