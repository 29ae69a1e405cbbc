//! The end of the audit log's file: its last record, and whether a crash has left the beginning of another.

use crate::audit::line::{self, LINE_MAX, Position};
use crate::audit::mark::is_near;
use std::fs::File;
use std::os::unix::fs::FileExt;
use uuid::Uuid;

/// How far from the end a record is looked for: what stands behind it can only be what crashes have left.
const REACH: u64 = 16 * LINE_MAX as u64;

/// What is at the end.
pub(super) struct Tail {
    /// The last record's log and place; `None` if there is none near the end.
    pub last: Option<(Uuid, Position)>,
    /// The last one whose number does not leap from the one before it. Any process may
    /// append that has the log open.
    pub steady: Option<(Uuid, Position)>,
    /// Whether the file ends in the middle of a line.
    pub torn: bool,
}

/// Reads the end of `file`.
pub(super) fn read(file: &File) -> std::io::Result<Tail> {
    // Most often the last line is short; the second look is for what a crash has left, or
    // somebody has put there.
    let near = read_from(file, LINE_MAX as u64)?;
    if near.last.is_some() { Ok(near) } else { read_from(file, REACH) }
}

fn read_from(file: &File, reach: u64) -> std::io::Result<Tail> {
    let len = file.metadata()?.len();
    let start = len.saturating_sub(reach);
    let mut bytes = vec![0; (len - start) as usize];
    file.read_exact_at(&mut bytes, start)?;
    let torn = bytes.last().is_some_and(|&b| b != b'\n');
    // Behind the last end of a line is nothing, or what is torn.
    let lines = bytes.split(|&b| b == b'\n').rev().skip(1);
    let mut records = lines.filter_map(line::parse).map(|line| (line.log, line.position)).peekable();
    let last = records.peek().copied();
    let mut steady = None;
    while let Some(record) = records.next() {
        steady = Some(record);
        if records.peek().is_none_or(|(_, before)| is_near(record.1.seq, before.seq)) {
            break;
        }
    }
    Ok(Tail { last, steady, torn })
}
