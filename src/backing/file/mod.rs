//! A layer in a file: its bytes are the volume's ciphertext, offset for offset.
//!
//! How the file is best reached depends on where it lies. On a disk's file system and on block devices:
//! io_uring with O_DIRECT, so that the page cache does not hold everything twice; where the disk's blocks are
//! larger than the volume's sectors ([`direct`]), what is not whole blocks is read and written back
//! ([`queue`]). Where O_DIRECT is refused, or the layer to be written does not end where a block does:
//! io_uring through the page cache. On tmpfs, where io_uring would hand each request to a kernel thread only
//! to copy memory: reads from the file's memory itself ([`memory`]), and `pread` and `pwrite` on the spot.
//!
//! A layer behind an NBD server is reached by none of these: its [`Export`] takes what is asked for, and the
//! queue goes on with what comes back as if the kernel had done it.
//!
//! A layer is reached in one way for as long as it is open, by all of its queues: never is the page cache
//! mixed with what goes past it.

mod aligned;
mod direct;
mod in_flight;
mod memory;
mod open;
mod prefetch;
mod queue;
#[cfg(test)]
mod tests;
mod turns;
mod way;
mod write_cache;

pub(crate) use aligned::Aligned;

use crate::backing::coming::{Coming, ComingQueue};
use crate::backing::device;
use crate::backing::medium::Medium;
use crate::backing::nbd::{Address, Export};
use crate::backing::{Backing, Caps, Queue};
use crate::base::locks;
use crate::base::space::Space;
use crate::base::zeros::is_zero;
use crate::reactor::{Reactor, pool};
use direct::Found;
use in_flight::{lock_in_flight, nothing_in_flight};
use memory::FileMemory;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use queue::{FileQueue, Reached};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use way::{Access, Way};
use write_cache::WriteCache;

/// What is known of the writes of processes that had a layer before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Earlier {
    /// Nothing: they are waited for.
    Awaited,
    /// None is on its way any more, though the process may have the layer open still.
    Done,
}

/// Where a layer's bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file or block device.
    pub path: PathBuf,
    /// Of a block device or export with a header: how many bytes of it are the layer's, from
    /// [`device::DATA_START`] on. None where everything is the layer's, from the first byte on.
    pub on_device: Option<u64>,
    /// Where the bytes lie, if that is behind an NBD server. Then the file at `path` is the one of the store
    /// that says so, and is there to be locked.
    pub behind: Option<Address>,
}

impl Place {
    /// All of a file or device.
    pub fn whole(path: impl Into<PathBuf>) -> Self {
        Place { path: path.into(), on_device: None, behind: None }
    }

    /// Behind the NBD server at `address`, a layer of `size` bytes; `said_in` is the file that says so.
    pub fn behind(address: Address, said_in: PathBuf, size: u64) -> Self {
        Place { path: said_in, on_device: Some(size), behind: Some(address) }
    }
}

/// A file, block device or export that holds one layer.
#[derive(Clone)]
pub struct FileBacking {
    /// The file or device; of an export, the file that says where it is.
    file: Arc<File>,
    export: Option<Arc<Export>>,
    /// Where in the file the layer begins.
    start: u64,
    is_device: bool,
    /// What is known of O_DIRECT there; nothing of a file that is memory.
    found: Option<Found>,
    block_size: u32,
    way: Way,
    read_only: bool,
    caps: Caps,
    /// Where the file is memory.
    memory: Option<Arc<FileMemory>>,
    /// Where it is a block device that is written past the page cache.
    write_cache: Option<Arc<WriteCache>>,
    /// Where it is a layer of which not everything is there yet.
    coming: Option<Arc<Coming>>,
}

impl FileBacking {
    /// This layer, which is still coming: what is not here is waited for. It cannot be a top.
    pub fn with_coming(self, coming: Arc<Coming>) -> Self {
        FileBacking { coming: Some(coming), ..self }
    }

    /// Opens the layer's file once more. The kernel reports a write-back that failed to each open file once:
    /// queues that shared one could flush at the same time, and one of them be told that all is well.
    fn open_again(&self) -> io::Result<File> {
        match self.export {
            // Nothing is written there.
            Some(_) => self.file.try_clone(),
            None => self.open_as(self.way.access),
        }
    }

    fn open_as(&self, access: Access) -> io::Result<File> {
        let flags = if access == Access::Direct { libc::O_DIRECT } else { 0 };
        let mut how = OpenOptions::new();
        let how = how.read(true).write(!self.read_only).custom_flags(flags);
        let file = how.open(self.by_descriptor())?;
        if !self.read_only {
            lock_in_flight(&file, locks::Kind::Shared)?;
        }
        Ok(file)
    }

    /// This layer for reading alone, once it is frozen.
    pub fn frozen(&self) -> io::Result<Self> {
        let direct = if self.way.access == Access::Direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).custom_flags(direct).open(self.by_descriptor())?;
        let way = Way { turns: None, ..self.way.clone() };
        Ok(FileBacking { file: Arc::new(file), way, read_only: true, write_cache: None, ..self.clone() })
    }

    /// This layer after it was made longer: `size` bytes, if it lies on a device with a header. Nothing may
    /// be in flight when what is returned is used.
    pub fn lengthened(&self, size: u64) -> io::Result<Self> {
        let len = self.medium().length()?;
        let size = if self.start == 0 { len } else { size };
        if self.start.checked_add(size).is_none_or(|end| end > len) {
            return Err(device::too_short(len, size));
        }
        if self.export.is_some() {
            let caps = Caps { size, ..self.caps.clone() };
            return Ok(FileBacking { caps, memory: None, write_cache: None, coming: None, ..self.clone() });
        }
        let mut way = Way::to(self.found.as_ref(), size, self.block_size, self.read_only);
        let file = if way.access == self.way.access {
            way = self.way.clone();
            self.file.clone()
        } else {
            Arc::new(self.open_as(way.access)?)
        };
        let write_cache = self.write_cache.clone();
        let (start, is_device) = (self.start, self.is_device);
        let mut same =
            Self::of(file, start, is_device, self.found, self.block_size, way, self.read_only, size);
        same.caps.gives_back = self.caps.gives_back;
        Ok(FileBacking { write_cache, ..same })
    }

    /// A queue over this layer as the top and `below`, which are frozen, from the one right below it.
    pub(super) fn open_queue_over(
        &self,
        below: &[Arc<FileBacking>],
        reactor: &Rc<dyn Reactor>,
        depth: u16,
    ) -> io::Result<Box<dyn Queue>> {
        let uring = reactor.clone().uring().ok_or(io::ErrorKind::Unsupported)?;
        let reached = |layer: &FileBacking, file| Reached {
            file,
            start: layer.start,
            is_device: layer.is_device,
            inline: layer.way.access == Access::Inline,
            export: layer.export.clone(),
            memory: layer.memory.clone(),
            unit: layer.way.unit as u32,
        };
        if self.coming.is_some() {
            return Err(io::Error::other("a layer that is still coming is no volume's top"));
        }
        let top = reached(self, Arc::new(self.open_again()?));
        let coming: Vec<_> = below.iter().map(|layer| layer.coming.clone()).collect();
        let below = below.iter().map(|layer| reached(layer, layer.file.clone())).collect();
        let queue = FileQueue::new(&uring, top, below, depth)?;
        let queue = queue.with_write_cache(self.write_cache.clone());
        let queue: Box<dyn Queue> = Box::new(queue.with_turns(&uring, self.way.turns.clone())?);
        match coming.iter().any(Option::is_some) {
            true => Ok(Box::new(ComingQueue::over(queue, reactor, coming)?)),
            false => Ok(queue),
        }
    }

    /// Whether it is read from the file's memory.
    pub fn is_memory(&self) -> bool {
        self.memory.is_some()
    }

    /// Has nobody look at the memory of these bytes from now on: somebody else is going to make a hole there.
    /// Nobody is looking at this moment.
    pub fn forget_memory(&self, bytes: Range<u64>) {
        if let Some(memory) = &self.memory {
            memory.given_back(bytes.start, bytes.end - bytes.start);
        }
    }

    /// See [`Backing::next_data`].
    pub(super) fn next_data_from(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        // Once all of it is there, commands may move data into it.
        if let Some(coming) = self.coming.as_ref().filter(|it| !it.is_all_here()) {
            return Ok(coming.next_data(from));
        }
        if let Some(export) = &self.export {
            let found = export.next_data(self.start + from..self.start + self.caps.size)?;
            return Ok(found.map(|found| found.start - self.start..found.end - self.start));
        }
        if self.is_device {
            // Only reading all of it would tell more.
            return Ok((from < self.caps.size).then_some(from..self.caps.size));
        }
        next_data_of(&self.file, from)
    }

    /// A path that means this file, whatever its name means by now.
    fn by_descriptor(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    /// The open file, for locks.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The export, if the layer lies on one.
    pub fn export(&self) -> Option<&Export> {
        self.export.as_deref()
    }

    /// What the layer lies on, from its very beginning.
    pub fn medium(&self) -> &dyn Medium {
        match &self.export {
            Some(export) => &**export,
            None => &*self.file,
        }
    }

    /// Whether it lies on a block device or export, of which nobody can make more.
    pub fn is_on_device(&self) -> bool {
        self.is_device
    }

    /// Makes durable what was written through whichever queue.
    ///
    /// # Errors
    /// Those of the file, device or server.
    pub fn sync_data(&self) -> io::Result<()> {
        match &self.export {
            Some(export) => export.flush(),
            None => self.file.sync_data(),
        }
    }

    /// Reads at `at` of the layer; fewer bytes where it ends.
    fn read_at(&self, room: &mut [u8], at: u64) -> io::Result<usize> {
        match &self.export {
            Some(export) => {
                let len = room.len().min((self.caps.size - at.min(self.caps.size)) as usize);
                export.fetch(&mut room[..len], self.start + at).map(|()| len)
            }
            None => self.file.read_at(room, self.start + at),
        }
    }
}

impl Backing for FileBacking {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn open_queue(&self, reactor: &Rc<dyn Reactor>, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.open_queue_over(&[], reactor, depth)
    }

    fn has_data(&self) -> io::Result<bool> {
        if let Some(coming) = self.coming.as_ref().filter(|it| !it.is_all_here()) {
            return Ok(coming.next_data(0).is_some());
        }
        let mut room = Aligned::new(1 << 20);
        let mut from = 0;
        while let Some(data) = self.next_data_from(from)? {
            // What is allocated may still be zeros: of a copy, say, that knew no holes.
            let mut at = data.start - data.start % pool::PAGE as u64;
            while at < data.end {
                // Whole blocks; the file may end within one.
                let len = (data.end - at).next_multiple_of(pool::PAGE as u64).min(1 << 20) as usize;
                let n = match self.read_at(room.bytes(len), at) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    read => read?,
                };
                // A device may go on behind the layer.
                let n = n.min((self.caps.size - at.min(self.caps.size)) as usize);
                if !is_zero(room.bytes(n)) {
                    return Ok(true);
                }
                match n - n % pool::PAGE {
                    0 => break,
                    n => at += n as u64,
                }
            }
            from = data.end;
        }
        Ok(false)
    }

    fn next_data(&self, _layer: usize, from: u64) -> io::Result<Option<Range<u64>>> {
        self.next_data_from(from)
    }

    fn space(&self) -> io::Result<Option<Space>> {
        if self.export.is_some() { Ok(None) } else { Space::of(&self.file) }
    }
}

/// The next run of bytes at or after `from` that the file may hold something in; outside of such runs it
/// holds nothing. `None`: nothing from there to its end.
pub(crate) fn next_data_of(file: &File, from: u64) -> io::Result<Option<Range<u64>>> {
    let start = match lseek64(file, from as i64, Whence::SeekData) {
        Ok(start) => start as u64,
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    Ok(Some(start..lseek64(file, start as i64, Whence::SeekHole)? as u64))
}
