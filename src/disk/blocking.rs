//! A queue for one who has nothing to do but wait for it: copies, transfers, the flush at the end.

use crate::backing::{Buffer, Event, Wait};
use crate::disk::guest::GuestData;
use crate::disk::queue::DiskQueue;
use std::io;
use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

impl DiskQueue {
    /// Waits for the next operation to end, and answers its buffer, if it had one.
    fn next_done(&mut self) -> io::Result<Option<Buffer>> {
        loop {
            match self.next_event() {
                Some(Event::Done { buffer, result, .. }) => {
                    return match (result, buffer) {
                        (Ok(()), buffer) => Ok(buffer),
                        (Err(e), buffer) => {
                            buffer.into_iter().for_each(|buffer| self.free(buffer));
                            Err(e)
                        }
                    };
                }
                Some(_) => {}
                None => self.wait(Wait::Event)?,
            }
        }
    }

    /// Waits for the next write to end.
    pub(crate) fn finish_one(&mut self) -> io::Result<()> {
        if let Some(buffer) = self.next_done()? {
            self.free(buffer);
        }
        Ok(())
    }

    /// Reads from `sector` by way of `buffer` into `guest`, and waits for it. Nothing else is in flight.
    pub(crate) fn read_and_wait<M>(
        &mut self,
        sector: u64,
        buffer: Buffer,
        guest: GuestData<'_, M>,
    ) -> io::Result<()>
    where
        M: GuestMemory,
        M::Bitmap: for<'b> WithBitmapSlice<'b, S = ()>,
    {
        self.read(0, sector, buffer);
        loop {
            let Some(buffer) = self.next_done()? else { continue };
            if self.deliver(0, sector, buffer, GuestData { ..guest })? {
                return Ok(());
            }
        }
    }

    /// Makes everything durable whose writing has ended, and waits for it. Nothing is in flight.
    pub(crate) fn flush_and_wait(&mut self) -> io::Result<()> {
        self.flush(0)?;
        let result = self.next_done().map(drop);
        self.flushed(result)
    }
}

/// Where plaintext is that goes through a queue without a guest, to which it is a guest's memory. Wiped at the end.
pub(crate) struct Scratch {
    memory: GuestMemoryMmap<()>,
    len: usize,
}

impl Scratch {
    /// With room for `len` bytes, from address 0 on.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]);
        Ok(Scratch { memory: memory.map_err(io::Error::other)?, len })
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = self.memory.write_slice(&vec![0; self.len], GuestAddress(0)) {
            log::error!("wiping what was copied last: {e}");
        }
    }
}
