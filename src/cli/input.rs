//! Small files that a command reads whole, or "-" for standard input.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use std::fs::File;
use std::io::{Read, stdin};
use std::path::Path;

/// What `file`, or standard input, holds.
///
/// # Errors
/// `Usage` for more than `max` bytes; those of the file system.
pub(super) fn read(file: &Path, max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut read = |from: &mut dyn Read| from.take(max + 1).read_to_end(&mut bytes);
    match file == Path::new("-") {
        true => read(&mut stdin().lock())?,
        false => read(&mut File::open(file)?)?,
    };
    match bytes.len() as u64 > max {
        true => Err(Error::new(Kind::Usage, format!("it is longer than {max} bytes"))),
        false => Ok(bytes),
    }
}
