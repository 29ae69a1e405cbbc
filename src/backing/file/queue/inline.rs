//! Operations that a queue's thread does by itself, on the spot: where files are memory,
//! the kernel would only copy.

use super::FileQueue;
use crate::backing::{Done, Op};
use std::os::unix::fs::FileExt;

impl FileQueue {
    /// Does the operation now, by this thread.
    pub(super) fn run_inline(&mut self, tag: u64, op: Op) {
        let (buffer, result) = match op {
            Op::Read { offset, mut buffer } => {
                let bytes = self.pool.bytes(&mut buffer);
                let read = |bytes: &mut [u8]| self.file.read_exact_at(bytes, offset);
                let result = match &self.memory {
                    Some(memory) => memory.read(offset, bytes, read),
                    None => read(bytes),
                };
                (Some(buffer), result)
            }
            Op::ReadBelow { layer, offset, part, mut buffer } => {
                let bytes = &mut self.pool.bytes(&mut buffer)[part];
                let below = &self.below[layer - 1];
                let result = below.file.read_exact_at(bytes, offset);
                // As with who looks at it: nobody makes a hole where somebody reads.
                if let (Ok(()), Some(memory)) = (&result, &below.memory) {
                    memory.found(offset, bytes);
                }
                (Some(buffer), result)
            }
            Op::Write { offset, mut buffer, durable } => {
                let bytes = self.pool.bytes(&mut buffer);
                let result = match &self.memory {
                    Some(memory) => {
                        let len = bytes.len() as u64;
                        memory.write(offset, len, || self.file.write_all_at(bytes, offset))
                    }
                    None => self.file.write_all_at(bytes, offset),
                };
                let sync = |()| if durable { self.file.sync_data() } else { Ok(()) };
                (Some(buffer), result.and_then(sync))
            }
            Op::Flush => (None, self.file.sync_data()),
            Op::Zero { offset, len, .. } => {
                use nix::fcntl::{FallocateFlags, fallocate};
                let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let punch = |at: u64, len: u64| Ok(fallocate(&*self.file, mode, at as i64, len as i64)?);
                let result = match &self.memory {
                    Some(memory) => memory.give_back(offset, len, punch),
                    None => punch(offset, len),
                };
                (None, result)
            }
        };
        self.done.push_back(Done { tag, buffer, result });
    }
}
