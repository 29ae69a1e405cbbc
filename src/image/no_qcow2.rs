//! In place of `qcow2` where the program is built without it: it says so, whatever image it is given.

use super::{BackingFiles, Held, foreign};
use crate::base::{Error, Kind, Result};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// A disk in a qcow2 image; here there is none.
pub(super) enum Qcow2 {}

impl Qcow2 {
    pub(super) fn open(path: &Path, _: File, _: Held, _: BackingFiles) -> Result<(Self, Vec<Held>)> {
        let message = format!(
            "qcow2 images are read by the feature qcow2, without which this sealblk was built; make the \
             image a raw one with \"{}\"",
            foreign::command("qemu-img convert -f qcow2 -O raw {in} {out}.img", path)
        );
        Err(Error::new(Kind::Unsupported, message))
    }

    pub(super) fn size(&self) -> u64 {
        match *self {}
    }

    pub(super) fn next_data(&self, _: u64) -> Result<Option<Range<u64>>> {
        match *self {}
    }

    pub(super) fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
        match *self {}
    }
}
