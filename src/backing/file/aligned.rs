//! Memory as O_DIRECT wants it.

use crate::reactor::pool;

/// Page-aligned bytes, as O_DIRECT wants them.
pub(crate) struct Aligned {
    room: Vec<u8>,
    skip: usize,
}

impl Aligned {
    /// Zeros.
    pub(crate) fn new(len: usize) -> Self {
        let room = vec![0; len + pool::PAGE];
        let skip = room.as_ptr().align_offset(pool::PAGE);
        Aligned { room, skip }
    }

    /// The first `len` of them, at most as many as there are.
    pub(crate) fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.room[self.skip..self.skip + len]
    }
}
