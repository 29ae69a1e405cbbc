//! One chain between being taken and being answered.

use crate::disk::Disk;
use crate::vhost::queue::counters::{OpKind, Outcome, Stall};
use crate::virtio::{Op, SECTOR_SIZE, Segment, Status};
use std::io;
use vm_memory::GuestAddress;

/// A chain that is being served.
pub(super) struct Request {
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    pub(super) written: u32,
    pub(super) op: Op,
    /// The runs of guest memory that have its data.
    pub(super) segments: Vec<Segment>,
    pub(super) data_len: u64,
    /// Bytes of the disk that are seen to: handed to the disk, or in need of nothing.
    pub(super) started: u64,
    /// As what it is counted.
    pub(super) kind: OpKind,
    /// Why and since when it waits, if it is stalled.
    pub(super) stall: Option<Stall>,
    /// Nanoseconds for which it was stalled before.
    pub(super) waited: u64,
    /// Operations that the disk has.
    pub(super) pieces: u32,
    /// Whether it must be durable when it completes.
    pub(super) durable: bool,
    pub(super) stage: Stage,
    /// What it is answered, as far as is known: that it has failed stays so.
    pub(super) outcome: Status,
}

/// How far a request has come. It goes from each to the next, and leaves out what it does not need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The volume's limits have not let it in.
    Outside,
    /// The disk gets its pieces, and does them.
    Moving,
    /// All of it is done, except for the flush that makes it durable.
    Flushing,
}

impl Request {
    /// A free slot.
    pub(super) fn new() -> Self {
        Request {
            head: 0,
            status: GuestAddress(0),
            written: 0,
            op: Op::Flush,
            segments: Vec::new(),
            data_len: 0,
            started: 0,
            pieces: 0,
            kind: OpKind::Other,
            stall: None,
            waited: 0,
            durable: false,
            stage: Stage::Outside,
            outcome: Status::Ok,
        }
    }

    /// Bytes of the disk to be seen to, piece by piece.
    pub(super) fn total(&self) -> u64 {
        match self.op {
            Op::Read { .. } | Op::Write { .. } => self.data_len,
            Op::Discard { count, .. } | Op::WriteZeroes { count, .. } => u64::from(count) * SECTOR_SIZE,
            Op::Flush | Op::GetId => 0,
        }
    }

    /// What `disk` has done of it did not work.
    pub(super) fn fail(&mut self, e: &io::Error, disk: &Disk) {
        if !self.has_failed() {
            log::warn!("{:?} of {} bytes: {e}", self.op, self.data_len);
            disk.note_failure(e);
        }
        // A file system without holes: told so, a guest's kernel writes the zeros itself,
        // and discards no more.
        let zeroing = matches!(self.op, Op::Discard { .. } | Op::WriteZeroes { .. });
        let unsupported = zeroing && e.raw_os_error() == Some(libc::EOPNOTSUPP);
        self.outcome = match self.outcome {
            Status::Ok | Status::Unsupported if unsupported => Status::Unsupported,
            _ => Status::IoErr,
        };
    }

    /// Whether a part of it did not work.
    pub(super) fn has_failed(&self) -> bool {
        self.outcome != Status::Ok
    }

    /// Whether the disk gets no more of it.
    pub(super) fn is_handed_over(&self) -> bool {
        self.has_failed() || self.started == self.total()
    }

    /// Whether a flush has to make durable what was done: other durable requests are so by themselves.
    pub(super) fn needs_flush(&self) -> bool {
        self.durable
            && self.stage == Stage::Moving
            && matches!(self.op, Op::WriteZeroes { .. })
            && !self.has_failed()
    }

    /// As what an answer is counted.
    pub(super) fn counted(status: Status) -> Outcome {
        match status {
            Status::Ok => Outcome::Done,
            Status::IoErr => Outcome::Failed,
            Status::Unsupported => Outcome::Unsupported,
        }
    }
}
