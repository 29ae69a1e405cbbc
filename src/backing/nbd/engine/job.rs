//! What the thread of an export does for somebody, or for itself.
#![forbid(unsafe_code)]

use crate::backing::nbd::handshake::Terms;
use crate::backing::nbd::kept::{Content, Mark, Write};
use crate::backing::nbd::task::{Ask, Outcome, To};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Bytes that the server makes zeros by one request, and bytes of zeros that are written by one.
const ZEROED: u64 = 64 << 20;
pub(super) const ZEROS: u64 = 256 << 10;

/// Something that is being done.
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) to: To,
}

pub(super) enum Work {
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
    pub(super) fn changes(&self, terms: &Terms) -> Option<Range<u64>> {
        match &self.work {
            Work::Write { write, .. } | Work::Again(write) => Some(write.range()),
            Work::Zero { range, keep_space } => Some(zeros(range, *keep_space, terms).range()),
            Work::Read { .. } | Work::Flush(_) | Work::Map { .. } => None,
        }
    }
}

/// The first part of a range that becomes zeros.
pub(super) fn zeros(range: &Range<u64>, keep_space: bool, terms: &Terms) -> Write {
    let most = if terms.can_zero() { ZEROED } else { ZEROS };
    let len = (range.end - range.start).min(most) as u32;
    Write { offset: range.start, content: Content::Zeros { len, keep_space } }
}

impl Job {
    pub(super) fn new(ask: Ask, to: To) -> Job {
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
    pub(super) fn tell(self, outcome: Outcome) {
        match self {
            To::Queue(inbox, number) => inbox.put(number, outcome),
            // Whoever waited has gone.
            To::Caller(caller) => drop(caller.send(outcome)),
            To::Nobody => {}
        }
    }
}

pub(super) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
