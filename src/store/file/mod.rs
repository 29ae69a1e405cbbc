//! A layer in a file: its bytes are the volume's ciphertext, offset for offset.
//!
//! How the file is best reached depends on where it lies. On a disk's file system and on block devices:
//! io_uring with O_DIRECT, so that the page cache does not hold everything twice. Where O_DIRECT is refused, or
//! wants larger blocks than the volume has: io_uring through the page cache. On tmpfs, where io_uring would
//! hand each request to a kernel thread only to copy memory: `pread` and `pwrite` on the spot.

mod pool;
mod queue;

use super::{Caps, Queue, Store};
use nix::errno::Errno;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek64};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// How the bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// io_uring with O_DIRECT.
    Direct,
    /// io_uring through the page cache.
    Buffered,
    /// `pread` and `pwrite` by the queue's thread.
    Inline,
}

impl Access {
    fn words(self) -> &'static str {
        match self {
            Access::Direct => "io_uring, O_DIRECT",
            Access::Buffered => "io_uring, buffered",
            Access::Inline => "pread/pwrite (memory file system)",
        }
    }
}

/// A file or block device that holds one layer.
pub struct FileStore {
    file: Arc<File>,
    access: Access,
    caps: Caps,
}

impl FileStore {
    /// Opens the file at `path`, which must exist and be a regular file or a block device, for transfers in
    /// multiples of `block_size` bytes (512 or 4096).
    pub fn open(path: &Path, read_only: bool, block_size: u32) -> io::Result<Self> {
        let open = |flags| {
            OpenOptions::new().read(true).write(!read_only).custom_flags(flags | libc::O_NOFOLLOW).open(path)
        };
        let plain = open(0)?;
        let kind = plain.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        let (file, access) = if fstatfs(&plain)?.filesystem_type() == TMPFS_MAGIC {
            (plain, Access::Inline)
        } else {
            match open(libc::O_DIRECT) {
                Ok(direct) if takes_blocks_of(&direct, block_size) => (direct, Access::Direct),
                _ => (plain, Access::Buffered),
            }
        };
        let size = lseek64(&file, 0, Whence::SeekEnd)? as u64;
        Ok(FileStore { file: Arc::new(file), access, caps: Caps { access: access.words().into(), size } })
    }

    /// The open file, for locks.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Store for FileStore {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(queue::FileQueue::new(self.file.clone(), self.access, depth)?))
    }

    fn has_data(&self) -> io::Result<bool> {
        let mut room = Aligned::new(1 << 20);
        let mut from = 0;
        loop {
            let start = match lseek64(&*self.file, from, Whence::SeekData) {
                Ok(start) => start as u64,
                Err(Errno::ENXIO) => return Ok(false),
                Err(e) => return Err(e.into()),
            };
            let end = lseek64(&*self.file, start as i64, Whence::SeekHole)? as u64;
            // What is allocated may still be zeros: of a copy, say, that knew no holes.
            let mut at = start;
            while at < end {
                let chunk = room.bytes((end - at).min(1 << 20) as usize);
                self.file.read_exact_at(chunk, at)?;
                if chunk.iter().any(|&byte| byte != 0) {
                    return Ok(true);
                }
                at += chunk.len() as u64;
            }
            from = end as i64;
        }
    }
}

/// Whether an O_DIRECT transfer of one block is accepted: a trial says it better than any table.
fn takes_blocks_of(file: &File, block_size: u32) -> bool {
    let mut room = Aligned::new(block_size as usize);
    match file.read_at(room.bytes(block_size as usize), u64::from(block_size)) {
        Ok(_) => true,
        Err(e) => {
            log::debug!("O_DIRECT in blocks of {block_size} bytes on fd {}: {e}", file.as_raw_fd());
            false
        }
    }
}

/// Page-aligned bytes, as O_DIRECT wants them.
struct Aligned {
    room: Vec<u8>,
    skip: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let room = vec![0; len + pool::PAGE];
        let skip = room.as_ptr().align_offset(pool::PAGE);
        Aligned { room, skip }
    }

    /// The first `len` of them, at most as many as there are.
    fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.room[self.skip..self.skip + len]
    }
}
