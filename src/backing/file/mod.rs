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

mod direct;
mod memory;
mod prefetch;
mod queue;
mod turns;
mod write_cache;

use crate::backing::coming::{Coming, ComingQueue};
use crate::backing::device::{self, DATA_START};
use crate::backing::medium::Medium;
use crate::backing::nbd::{Address, Export, Right};
use crate::backing::{Backing, Caps, Queue};
use crate::base::locks::{self, Bytes};
use crate::base::root::files;
use crate::base::space::Space;
use crate::base::zeros::is_zero;
use crate::reactor::{Reactor, pool};
use direct::{Found, SECTOR};
use memory::FileMemory;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek64};
use queue::{FileQueue, Reached};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use turns::Turns;
use write_cache::WriteCache;

/// The byte, beyond any layer's end, whose lock says that a queue may have writes in flight.
const IN_FLIGHT: Bytes = Bytes::one(i64::MAX - 1);
/// How long to wait for the writes of an earlier process.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
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
    fn memory_of(self, file: &File, size: u64) -> Option<Arc<FileMemory>> {
        match self {
            Access::Inline => FileMemory::map(file, size).map(Arc::new),
            Access::Direct | Access::Buffered | Access::Export => None,
        }
    }
}

/// What is known of the writes of processes that had a layer before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Earlier {
    /// Nothing: they are waited for.
    Awaited,
    /// None is on its way any more, though the process may have the layer open still.
    Done,
}

/// How a layer is reached, as it was decided when it was opened.
#[derive(Clone)]
struct Way {
    access: Access,
    /// What offsets and lengths of transfers are multiples of.
    unit: u64,
    /// Where that is larger than the volume's sectors and the layer is written: who writes what when.
    turns: Option<Arc<Turns>>,
}

impl Way {
    /// The best one to a layer of `size` bytes.
    fn to(found: Option<&Found>, size: u64, block_size: u32, read_only: bool) -> Self {
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

    fn words(&self, found: Option<&Found>) -> String {
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

/// Where a layer's bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file or block device.
    pub path: PathBuf,
    /// Of a block device or export with a header: how many bytes of it are the layer's, from [`DATA_START`]
    /// on. None where everything is the layer's, from the first byte on.
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
    /// Opens the file at `path`, which must exist and be a regular file or a block device, for transfers in
    /// multiples of `block_size` bytes (512 or 4096). `near` is another layer of the same volume, which may
    /// know more of the disk than can be found out of a file without data.
    pub fn open(
        path: &Path,
        read_only: bool,
        block_size: u32,
        near: Option<&FileBacking>,
    ) -> io::Result<Self> {
        Self::open_after(&Place::whole(path), read_only, block_size, near, Earlier::Awaited)
    }

    /// As [`FileBacking::open`], of what lies at `place`, and where it is known what became of the writes of
    /// earlier processes.
    ///
    /// # Errors
    /// `UnexpectedEof` if a device is not as long as the layer on it.
    pub fn open_after(
        place: &Place,
        read_only: bool,
        block_size: u32,
        near: Option<&FileBacking>,
        earlier: Earlier,
    ) -> io::Result<Self> {
        if let (Some(address), Some(size)) = (&place.behind, place.on_device) {
            return Self::open_export(address, size, &place.path, read_only, block_size);
        }
        let plain = files::open_layer(&place.path, if read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR })?;
        let is_device = plain.metadata()?.file_type().is_block_device();
        let direct = || {
            let mut how = OpenOptions::new();
            let how = how.read(true).write(!read_only).custom_flags(libc::O_DIRECT);
            // The file that was looked at, whatever its name means by now.
            how.open(format!("/proc/self/fd/{}", plain.as_raw_fd()))
        };
        let len = lseek64(&plain, 0, Whence::SeekEnd)? as u64;
        let (start, size) = match place.on_device {
            Some(size) => (DATA_START, size),
            None => (0, len),
        };
        if start.checked_add(size).is_none_or(|end| end > len) {
            return Err(device::too_short(len, size));
        }
        // Device nodes lie on a file system that is memory.
        let (direct, found) = if !is_device && fstatfs(&plain)?.filesystem_type() == TMPFS_MAGIC {
            (None, None)
        } else {
            let direct = direct().ok();
            let data = if is_device { Some(0..len) } else { next_data_of(&plain, 0)? };
            let near = near.and_then(|near| near.found.as_ref());
            let found = Found::of(direct.as_ref().unwrap_or(&plain), direct.is_some(), data, near)?;
            (direct, Some(found))
        };
        let way = Way::to(found.as_ref(), size, block_size, read_only);
        let file = direct.filter(|_| way.access == Access::Direct).unwrap_or(plain);
        match earlier {
            Earlier::Awaited if !read_only => wait_for_earlier_writes(&file)?,
            Earlier::Done if !read_only => lock_in_flight(&file, locks::Kind::Shared)?,
            _ => {}
        }
        let write_cache = match way.access {
            Access::Direct if is_device => WriteCache::of(&file).map(Arc::new),
            _ => None,
        };
        let opened = Self::of(Arc::new(file), start, is_device, found, block_size, way, read_only, size);
        Ok(FileBacking { write_cache, ..opened })
    }

    /// Opens a layer of `size` bytes behind an NBD server. Whatever an earlier process has asked the server
    /// for cannot be waited for: see docs/storage.md.
    fn open_export(
        address: &Address,
        size: u64,
        said_in: &Path,
        read_only: bool,
        block_size: u32,
    ) -> io::Result<Self> {
        let file = files::open_layer(said_in, OFlag::O_RDONLY)?;
        let right = if read_only { Right::Read } else { Right::Write };
        let export = Export::at(address, right)?;
        let terms = export.terms();
        if DATA_START.checked_add(size).is_none_or(|end| end > terms.size) {
            return Err(device::too_short(terms.size, size));
        }
        if !read_only && terms.is_read_only() {
            return Err(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                "the server lets nobody write there",
            ));
        }
        let unit = u64::from(terms.unit());
        let turns = (unit > u64::from(block_size) && !read_only).then(|| Arc::new(Turns::new()));
        let way = Way { access: Access::Export, unit, turns };
        let opened = Self::of(Arc::new(file), DATA_START, true, None, block_size, way, read_only, size);
        let durable = if terms.can_flush() { "" } else { ", which counts what it completes as durable" };
        let access = match address {
            Address::Server(_) => format!("NBD server{durable}"),
            Address::Rbd(_) => "RBD image, by librbd in a process of its own".into(),
        };
        let caps = Caps { access, gives_back: terms.can_zero(), ..opened.caps.clone() };
        Ok(FileBacking { export: Some(export), caps, ..opened })
    }

    #[allow(clippy::too_many_arguments, reason = "each is a field")]
    fn of(
        file: Arc<File>,
        start: u64,
        is_device: bool,
        found: Option<Found>,
        block_size: u32,
        way: Way,
        read_only: bool,
        size: u64,
    ) -> Self {
        // A process that is confined could not ask any more.
        let gives_back = !is_device || device::gives_back(&file);
        let caps = Caps { access: way.words(found.as_ref()), size, unit: way.unit, gives_back };
        let memory = way.access.memory_of(&file, size);
        FileBacking {
            file,
            export: None,
            start,
            is_device,
            found,
            block_size,
            way,
            read_only,
            caps,
            memory,
            write_cache: None,
            coming: None,
        }
    }

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
        Ok(FileBacking {
            file: Arc::new(file),
            way: Way { turns: None, ..self.way.clone() },
            read_only: true,
            caps: self.caps.clone(),
            memory: self.memory.clone(),
            export: self.export.clone(),
            write_cache: None,
            coming: self.coming.clone(),
            ..*self
        })
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
            let (export, way) = (self.export.clone(), self.way.clone());
            let caps = Caps { size, ..self.caps.clone() };
            return Ok(FileBacking {
                file: self.file.clone(),
                export,
                way,
                caps,
                memory: None,
                write_cache: None,
                coming: None,
                ..*self
            });
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

/// Waits until no write of an earlier process can reach the file any more. The kernel ends the requests
/// of a killed process only after the process itself, and what is on its way then would land on top of
/// what is written now. Each queue's open file carries a lock, which the kernel keeps for as long as a
/// request uses that open file; a queue that has seen all its requests complete gives it up itself
/// ([`nothing_in_flight`]).
fn wait_for_earlier_writes(file: &File) -> io::Result<()> {
    let limit = Instant::now() + PATIENCE;
    loop {
        match lock_in_flight(file, locks::Kind::Exclusive) {
            // Shared from here on: our own queues take it as well.
            Ok(()) => return lock_in_flight(file, locks::Kind::Shared),
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
            Err(_) if Instant::now() > limit => {
                let message = "writes of an earlier host process are still on their way to it";
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
            }
            Err(_) => std::thread::sleep(PATIENCE / 6000),
        }
    }
}

/// Takes the lock that says "a queue may have writes in flight" for this open file.
fn lock_in_flight(file: &File, kind: locks::Kind) -> io::Result<()> {
    match locks::try_lock(file, kind, IN_FLIGHT)? {
        true => Ok(()),
        false => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Gives up that lock: every request by this open file has completed. The kernel may still hold the file:
/// what carried out a request (a thread of its own, for a flush) lets go of it after the completion, and an
/// io_uring that is kept without being used notices that only when it is used again.
fn nothing_in_flight(file: &File) {
    locks::unlock(file, IN_FLIGHT);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::Uring;

    fn reactor() -> Rc<dyn Reactor> {
        Rc::new(Uring::new(1).unwrap())
    }

    /// Every descriptor of this process that is open on `file`.
    fn opened(file: &File) -> Vec<std::path::PathBuf> {
        use std::os::unix::fs::MetadataExt;
        let id = |m: std::fs::Metadata| (m.dev(), m.ino());
        let ours = id(file.metadata().unwrap());
        let all = std::fs::read_dir("/proc/self/fd").unwrap().map(|fd| fd.unwrap().path());
        all.filter(|fd| std::fs::metadata(fd).is_ok_and(|m| id(m) == ours)).collect()
    }

    #[test]
    fn a_file_is_not_opened_for_writing_while_another_queue_may_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let file = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let backing = FileBacking::open(&path, false, 512, None).unwrap();
        let queue = backing.open_queue(&reactor(), 1).unwrap();
        drop(backing);
        // The open file of a queue is what the kernel keeps while requests are in flight,
        // whoever else is gone.
        let busy = lock_in_flight(&file(), locks::Kind::Exclusive).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
        let waiting = std::thread::scope(|scope| {
            let opens = scope.spawn(|| FileBacking::open(&path, false, 512, None).map(drop));
            drop(queue);
            opens.join().unwrap()
        });
        waiting.unwrap();
    }

    #[test]
    fn a_queue_that_ends_has_no_writes_on_their_way_whoever_still_holds_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let backing = FileBacking::open(&path, false, 512, None).unwrap();
        // The kernel may hold it like this for as long as an io_uring is kept and not used.
        let held = Arc::new(backing.open_again().unwrap());
        drop(backing);
        let top = Reached {
            file: held.clone(),
            start: 0,
            is_device: false,
            inline: false,
            export: None,
            memory: None,
            unit: 512,
        };
        let queue = FileQueue::new(&Rc::new(Uring::new(1).unwrap()), top, Vec::new(), 1).unwrap();
        let other = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        assert!(lock_in_flight(&other, locks::Kind::Exclusive).is_err());
        drop(queue);
        lock_in_flight(&other, locks::Kind::Exclusive).unwrap();
    }

    #[test]
    fn every_queue_has_an_open_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        for read_only in [false, true] {
            let backing = FileBacking::open(&path, read_only, 512, None).unwrap();
            std::fs::rename(&path, dir.path().join("moved")).unwrap();
            let queues = [(); 2].map(|()| backing.open_queue(&reactor(), 1).unwrap());
            let files = opened(backing.file());
            assert_eq!(files.len(), 3);
            // A seek moves the position of one open file, whatever descriptors it has.
            lseek64(backing.file(), 77, Whence::SeekSet).unwrap();
            let positions = files.iter().map(|fd| {
                let info = fd.to_str().unwrap().replace("/fd/", "/fdinfo/");
                std::fs::read_to_string(info).unwrap().lines().next().unwrap().to_owned()
            });
            assert_eq!(positions.filter(|line| line.ends_with("77")).count(), 1);
            drop(queues);
            std::fs::rename(dir.path().join("moved"), &path).unwrap();
        }
    }
}
