//! How a layer is reached.

use super::direct::{Found, SECTOR};
use super::memory::FileMemory;
use super::turns::Turns;
use std::fs::File;
use std::sync::Arc;

/// How the bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// io_uring with O_DIRECT.
    Direct,
    /// io_uring through the page cache.
    Buffered,
    /// The file's memory, `pread` and `pwrite`, by the queue's thread.
    Inline,
    /// An NBD server.
    Export,
}

impl Access {
    pub(super) fn memory_of(self, file: &File, size: u64) -> Option<Arc<FileMemory>> {
        match self {
            Access::Inline => FileMemory::map(file, size).map(Arc::new),
            Access::Direct | Access::Buffered | Access::Export => None,
        }
    }
}

/// How a layer is reached, as it was decided when it was opened.
#[derive(Clone)]
pub(super) struct Way {
    pub(super) access: Access,
    /// What offsets and lengths of transfers are multiples of.
    pub(super) unit: u64,
    /// Where that is larger than the volume's sectors and the layer is written: who writes what when.
    pub(super) turns: Option<Arc<Turns>>,
}

impl Way {
    /// The best one to a layer of `size` bytes.
    pub(super) fn to(found: Option<&Found>, size: u64, block_size: u32, read_only: bool) -> Self {
        let plain = |access| Way { access, unit: SECTOR, turns: None };
        let Some(found) = found else { return plain(Access::Inline) };
        let Some(unit) = found.unit else { return plain(Access::Buffered) };
        let has_parts = unit > u64::from(block_size);
        // Its last block could not be written as a whole without making the file longer.
        if has_parts && !read_only && !size.is_multiple_of(unit) {
            return plain(Access::Buffered);
        }
        let turns = (has_parts && !read_only).then(|| Arc::new(Turns::new()));
        Way { access: Access::Direct, unit, turns }
    }

    pub(super) fn words(&self, found: Option<&Found>) -> String {
        match (self.access, found.and_then(|found| found.unit)) {
            (Access::Inline, _) => "memory file system".into(),
            (Access::Export, _) => "NBD server".into(),
            (Access::Direct, _) if self.turns.is_none() => "io_uring, O_DIRECT".into(),
            (Access::Direct, _) => format!(
                "io_uring, O_DIRECT in the disk's blocks of {} bytes: what is written of a block is written \
                 after the rest was read",
                self.unit
            ),
            (Access::Buffered, None) => "io_uring, buffered".into(),
            (Access::Buffered, Some(unit)) => format!(
                "io_uring, buffered: the volume does not end with one of the disk's blocks, of {unit} bytes"
            ),
        }
    }
}
