//! What the kernel is asked for, and what is left of that when it has done a part.

use crate::reactor::Files;
use crate::reactor::pool::{Pool, Span};
use io_uring::{opcode, squeue, types};
use std::io;

/// The top layer, among the files.
pub(super) const TOP: u32 = 0;
/// Hole punching keeps the file's size in both cases.
pub(super) const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
pub(super) const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// What the kernel is asked for.
#[derive(Clone, Copy)]
pub(super) enum Work {
    Move(Move),
    Sync,
    Zero { offset: u64, len: u64, mode: i32 },
}

/// Bytes to be moved between a file and the pool.
#[derive(Clone, Copy)]
pub(super) struct Move {
    /// Which way, and what else the kernel is to do.
    pub(super) way: Way,
    /// Which layer: 0 is the top.
    pub(super) file: u32,
    pub(super) offset: u64,
    pub(super) span: Span,
    /// How many of them must be moved: what lies behind the end of a file cannot be read.
    pub(super) need: u32,
    /// What offsets and lengths are multiples of.
    pub(super) unit: u32,
}

#[derive(Clone, Copy)]
pub(super) enum Way {
    Read,
    Write { flags: i32 },
}

/// What is left to do after the kernel has moved some bytes.
pub(super) enum Left {
    Nothing,
    Rest(Work),
    /// Less than one unit was moved: nothing is gained.
    All,
}

impl Work {
    /// How many bytes are moved.
    pub(super) fn bytes(&self) -> u32 {
        match self {
            Work::Move(moving) => moving.span.len,
            Work::Sync | Work::Zero { .. } => 0,
        }
    }

    /// Which layer it is about.
    pub(super) fn file(&self) -> u32 {
        match self {
            Work::Move(moving) => moving.file,
            Work::Sync | Work::Zero { .. } => TOP,
        }
    }

    /// What is left when the kernel has moved `moved` bytes.
    pub(super) fn after(&self, moved: u32) -> Left {
        let Work::Move(moving) = *self else { return Left::Nothing };
        if moved >= moving.need {
            return Left::Nothing;
        }
        match moved - moved % moving.unit {
            0 => Left::All,
            n => Left::Rest(Work::Move(Move {
                offset: moving.offset + u64::from(n),
                span: moving.span.from(n),
                need: moving.need - n,
                ..moving
            })),
        }
    }

    /// What it means that the kernel moves nothing at all.
    pub(super) fn stuck(&self) -> io::Error {
        match self {
            Work::Move(Move { way: Way::Read, .. }) => io::ErrorKind::UnexpectedEof.into(),
            _ => io::ErrorKind::WriteZero.into(),
        }
    }

    /// What the kernel is told. `registered`: it knows the pool as fixed buffer 0. `start`: where in its file
    /// the layer begins.
    pub(super) fn entry(&self, files: &Files, pool: &Pool, registered: bool, start: u64) -> squeue::Entry {
        match *self {
            Work::Sync => opcode::Fsync::new(files.number(TOP)).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Zero { offset, len, mode } => {
                opcode::Fallocate::new(files.number(TOP), len).offset(start + offset).mode(mode).build()
            }
            Work::Move(Move { way, file, offset, span, .. }) => {
                let (file, ptr, offset) = (files.number(file), pool.ptr(span), start + offset);
                match (way, registered) {
                    (Way::Read, true) => {
                        opcode::ReadFixed::new(file, ptr, span.len, 0).offset(offset).build()
                    }
                    (Way::Read, false) => opcode::Read::new(file, ptr, span.len).offset(offset).build(),
                    (Way::Write { flags }, true) => {
                        let write = opcode::WriteFixed::new(file, ptr, span.len, 0);
                        write.offset(offset).rw_flags(flags).build()
                    }
                    (Way::Write { flags }, false) => {
                        opcode::Write::new(file, ptr, span.len).offset(offset).rw_flags(flags).build()
                    }
                }
            }
        }
    }
}
