//! What a layer can lie on beside a file of the store: a block device, or the export of an NBD server. A
//! header lies before the layer there.
#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;

/// Bytes that hold a header and a layer. Offsets count all of them.
pub trait Medium {
    /// How long it is, in bytes.
    ///
    /// # Errors
    /// Those of the device or server, as with all that follow.
    fn length(&self) -> io::Result<u64>;

    /// Reads bytes at `at`; where it is open past the page cache, both are multiples of its blocks, and the
    /// bytes lie at a page's beginning.
    fn fetch(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes bytes at `at`, as [`Medium::fetch`] reads them; not yet durably.
    fn store(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Makes bytes zeros, whole blocks, by the best way that it has; not yet durably.
    fn make_zeros(&self, bytes: Range<u64>) -> io::Result<()>;

    /// The next run of bytes in this range that may hold something; outside of such runs is nothing. All of
    /// it, where only reading tells more.
    fn next_data(&self, bytes: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok((!bytes.is_empty()).then_some(bytes))
    }

    /// Makes durable what was written.
    fn sync(&self) -> io::Result<()>;
}
