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
    /// Whether the volume's limits have let it in.
    pub(super) admitted: bool,
    /// Whether it must be durable when it completes.
    pub(super) durable: bool,
    /// Whether everything is done except for the flush that makes the request durable.
    pub(super) flushing: bool,
    pub(super) failed: bool,
    /// Whether it failed only because the disk cannot do such a thing.
    pub(super) unsupported: bool,
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
            admitted: false,
            durable: false,
            flushing: false,
            failed: false,
            unsupported: false,
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
        if !self.failed {
            log::warn!("{:?} of {} bytes: {e}", self.op, self.data_len);
            disk.note_failure(e);
        }
        // A file system without holes: told so, a guest's kernel writes the zeros itself,
        // and discards no more.
        let zeroing = matches!(self.op, Op::Discard { .. } | Op::WriteZeroes { .. });
        let unsupported = zeroing && e.raw_os_error() == Some(libc::EOPNOTSUPP);
        self.unsupported = unsupported && (self.unsupported || !self.failed);
        self.failed = true;
    }

    /// As what an answer is counted.
    pub(super) fn counted(status: Status) -> Outcome {
        match status {
            Status::Ok => Outcome::Done,
            Status::IoErr => Outcome::Failed,
            Status::Unsupported => Outcome::Unsupported,
        }
    }

    /// What it is answered when it is done.
    pub(super) fn outcome(&self) -> Status {
        match (self.failed, self.unsupported) {
            (false, _) => Status::Ok,
            (true, false) => Status::IoErr,
            (true, true) => Status::Unsupported,
        }
    }
}
