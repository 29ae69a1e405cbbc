//! The highest number that an entry has had, as this host knows it.
#![forbid(unsafe_code)]

use crate::base::{Context, Error, Kind, Result, spare};
use std::fs::File;
use std::os::unix::fs::FileExt;

pub(super) fn write_mark(mark: &File, number: u64) -> std::io::Result<()> {
    spare::with(|| mark.write_all_at(format!("{number:020}\n").as_bytes(), 0)).and_then(|()| mark.sync_all())
}

/// The number in a mark; an empty one is of an entry that is being made.
pub(super) fn read_mark(mark: &File) -> Result<u64> {
    let mut bytes = [0; 32];
    let len = mark.read_at(&mut bytes, 0).context(|| "read the mark")?;
    let text = std::str::from_utf8(&bytes[..len]).unwrap_or("?").trim_end();
    if text.is_empty() {
        return Ok(0);
    }
    let damaged = |_| Error::new(Kind::Corrupt, "a mark in the configuration folder is damaged");
    text.parse().map_err(damaged)
}
