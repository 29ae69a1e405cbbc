//! A whole disk in or out: plaintext that this process has, or wants, instead of a guest.
//!
//! It goes the way that a guest's data goes, through a queue of the [`Disk`], so that ciphers, layers and the
//! all-zero rule are the same. Plaintext is in two places of this process's memory besides the queue's
//! buffers, both of which are wiped at the end.
#![forbid(unsafe_code)]

use crate::base::zeros::is_zero;
use crate::base::{Context, Error, Kind, Result};
use crate::disk::{Disk, WaitingQueue};
use crate::virtio::SECTOR_SIZE;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use zeroize::Zeroizing;

/// Bytes at a time; a buffer's length.
pub(crate) const CHUNK: usize = 256 << 10;
/// What is zeros from one multiple of this to the next is not written: a page and a file system's block.
const BLOCK: usize = 4096;
/// Operations at a time.
const DEPTH: u16 = 16;

/// Is told how many bytes of how many have been copied; an error ends it.
pub type Watch<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// Where the next data is, at or after a byte of a disk.
pub(crate) type NextData<'a> = &'a dyn Fn(u64) -> Result<Option<Range<u64>>>;

/// Goes through the data of a disk of `size` bytes, whole blocks of it and whole sectors, in chunks: `copy`
/// gets the place of each and room for it.
pub(crate) fn each_chunk(
    size: u64,
    next_data: NextData<'_>,
    watch: Watch<'_>,
    copy: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    // Also so that what is wrong with a source is found before much is copied.
    let total = bytes_of(size, next_data)?;
    let mut room = Zeroizing::new(vec![0; CHUNK]);
    let mut done = 0;
    each_run(size, next_data, &mut |run| {
        let mut at = run.start;
        while at < run.end {
            watch(done, total)?;
            let chunk = &mut room[..(run.end - at).min(CHUNK as u64) as usize];
            copy(at, chunk)?;
            at += chunk.len() as u64;
            done += chunk.len() as u64;
        }
        Ok(())
    })?;
    watch(done, total)
}

/// How many bytes of a disk of `size` bytes may hold data, in whole blocks of it.
pub(crate) fn bytes_of(size: u64, next_data: NextData<'_>) -> Result<u64> {
    let mut bytes = 0;
    each_run(size, next_data, &mut |run| {
        bytes += run.end - run.start;
        Ok(())
    })?;
    Ok(bytes)
}

fn each_run(size: u64, next_data: NextData<'_>, f: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
    let block = BLOCK as u64;
    let mut at = 0;
    while let Some(data) = next_data(at)?.filter(|data| data.start < size) {
        // Data begins and ends at blocks of its source's own size, which may be smaller.
        let start = at.max(data.start - data.start % block);
        at = data.end.next_multiple_of(block).min(size);
        f(start..at)?;
    }
    Ok(())
}

/// The way to a disk for whoever has no guest.
pub(crate) struct Transfer(WaitingQueue);

impl Transfer {
    pub(crate) fn new(disk: &Arc<Disk>) -> Result<Self> {
        let queue = disk.open_queue(DEPTH).context(|| "open a queue")?;
        Ok(Transfer(WaitingQueue::new(queue, CHUNK)?))
    }

    /// Writes `bytes`, at most [`CHUNK`] and whole sectors, at byte `at`. Blocks that are zeros are left out:
    /// the layer then has holes in their place. What is written is durable after [`Transfer::flush`].
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.0.memory().write_slice(bytes, GuestAddress(0)).map_err(io::Error::other)?;
        for (start, len) in runs(bytes) {
            let at = at + start as u64;
            let written = self.0.write(at / SECTOR_SIZE, start, len);
            written.context(|| format!("write {len} bytes at {at}"))?;
        }
        Ok(())
    }

    /// Reads bytes, at most [`CHUNK`] and whole sectors, from byte `at`.
    pub(crate) fn read(&mut self, at: u64, into: &mut [u8]) -> Result<()> {
        let read = self.0.read(at / SECTOR_SIZE, into.len());
        read.context(|| format!("read {} bytes at {at}", into.len()))?;
        Ok(self.0.memory().read_slice(into, GuestAddress(0)).map_err(io::Error::other)?)
    }

    /// Waits for what is written and makes it durable.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.0.flush().context(|| "make the data durable")
    }
}

/// The runs of blocks that are not zeros: beginning and length of each, in bytes.
pub(crate) fn runs(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (n, block) in bytes.chunks(BLOCK).enumerate() {
        if is_zero(block) {
            continue;
        }
        match runs.last_mut() {
            Some((start, len)) if *start + *len == n * BLOCK => *len += block.len(),
            _ => runs.push((n * BLOCK, block.len())),
        }
    }
    runs
}

/// What one is told whose command was interrupted by a signal.
pub fn interrupted() -> Error {
    Error::new(Kind::Other, "it was interrupted; nothing of it is left")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_data_are_whole_blocks_once_each_and_end_with_the_disk() {
        let data = [100..200, 5000..8192, 8192..8193, 20_000..30_000];
        let next =
            |from| Ok(data.iter().find(|data| data.end > from).map(|data| data.start.max(from)..data.end));
        let mut runs = Vec::new();
        let mut keep = |run| {
            runs.push(run);
            Ok(())
        };
        each_run(20_992, &next, &mut keep).unwrap();
        assert_eq!(runs, [0..4096, 4096..8192, 8192..12_288, 16_384..20_992]);
    }

    #[test]
    fn only_blocks_of_zeros_are_left_out() {
        let mut bytes = vec![0; 5 * BLOCK + 512];
        bytes[BLOCK] = 1;
        bytes[3 * BLOCK - 1] = 1;
        *bytes.last_mut().unwrap() = 1;
        assert_eq!(runs(&bytes), [(BLOCK, 2 * BLOCK), (5 * BLOCK, 512)]);
        assert_eq!(runs(&[0; 3 * BLOCK]), []);
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[1; 512]), [(0, 512)]);
    }
}
