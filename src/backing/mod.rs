//! Where ciphertext lies. A backing moves bytes; it never sees a key and does not know what they mean.
//!
//! A [`Backing`] is a chain of layers, most often of one: the top layer takes the writes, those below are
//! frozen and only read. Which of them has what it does not know. It is shared by all queues of a volume;
//! each queue's thread opens a [`Queue`] of its own, which reaches all layers, and drives it alone. Buffers
//! belong to the queue: a [`Buffer`] is handed over with [`Queue::submit`] and comes back with the
//! completion, so that nothing can touch it while the kernel does. What a thread waits with is its own, a
//! [`Reactor`], which its queue is lent.

pub mod chain;
pub mod coming;
pub mod device;
pub mod file;
pub mod medium;
pub mod nbd;

pub use crate::reactor::Buffer;

use crate::base::space::Space;
use crate::reactor::{Reactor, Token, Uring};
use std::ops::Range;
use std::rc::Rc;
use std::sync::MutexGuard;
use std::{fmt, io};
use vm_memory::VolatileSlice;

/// What a backing can do and how it is reached; for the log and for the limits that follow from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    /// How the bytes travel, in words for the operator: `io_uring, O_DIRECT`.
    pub access: String,
    /// Size in bytes: of the top layer.
    pub size: u64,
    /// What the offsets and lengths of [`Op::Zero`] are multiples of, and what transfers are best
    /// made of: a power of two.
    pub unit: u64,
    /// Whether [`Op::Zero`] can give space back. Where it cannot, it writes zeros, and nobody is helped by
    /// that who only has no use for the bytes any more.
    pub gives_back: bool,
}

/// One operation on a backing. Offsets and lengths count bytes.
#[derive(Debug)]
pub enum Op {
    /// Fill the buffer from `offset`.
    Read {
        /// Where from.
        offset: u64,
        /// What to fill.
        buffer: Buffer,
    },
    /// Fill a part of the buffer from `offset` of a layer below the top. What is in other
    /// parts of it may be lost.
    ReadBelow {
        /// Which: 1 is the one right below the top.
        layer: usize,
        /// Where from.
        offset: u64,
        /// Which bytes of the buffer to fill.
        part: Range<usize>,
        /// What to fill.
        buffer: Buffer,
    },
    /// Store the buffer at `offset`; durable at completion if asked for.
    Write {
        /// Where to.
        offset: u64,
        /// What to store.
        buffer: Buffer,
        /// Whether it shall survive a power cut once it is complete.
        durable: bool,
    },
    /// Make every completed write durable.
    Flush,
    /// The range, whole [units](Caps::unit), shall read as zeros; its space is given back,
    /// or kept if `keep_space`.
    Zero {
        /// Where from.
        offset: u64,
        /// How much.
        len: u64,
        /// Keep the space allocated, where the backing can.
        keep_space: bool,
    },
}

/// An operation that ended.
#[derive(Debug)]
pub struct Done {
    /// The tag it was submitted with.
    pub tag: u64,
    /// Its buffer, if it had one.
    pub buffer: Option<Buffer>,
    /// Whether it was done in full. A transfer shorter than what was to be moved is an error here.
    pub result: io::Result<()>,
}

/// In an error of a write: what had to be read first could not be, and nothing was written.
#[derive(Debug)]
pub struct NotBegun(io::Error);

impl fmt::Display for NotBegun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reading the rest of a block that is written in part: {}", self.0)
    }
}

impl std::error::Error for NotBegun {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// Bytes of a layer where they lie.
pub struct InMemory<'a> {
    /// The bytes, which may change while they are read.
    pub bytes: VolatileSlice<'a>,
    /// What keeps them there.
    pub(crate) _there: Option<MutexGuard<'a, ()>>,
}

/// A place for ciphertext.
pub trait Backing: Send + Sync {
    /// What it is and can do.
    fn caps(&self) -> &Caps;

    /// What a thread can wait with whose queue is to have at most `depth` operations in flight.
    ///
    /// # Errors
    /// Those of [`Uring::new`].
    fn reactor(&self, depth: u16) -> io::Result<Rc<dyn Reactor>> {
        Ok(Rc::new(Uring::new(depth)?))
    }

    /// A queue for at most `depth` operations in flight, for the thread that calls, whose `reactor` is.
    fn open_queue(&self, reactor: &Rc<dyn Reactor>, depth: u16) -> io::Result<Box<dyn Queue>>;

    /// Whether it holds any data at all, that is, whether something was ever written.
    fn has_data(&self) -> io::Result<bool>;

    /// The lengths in bytes of the layers below the top, from the one right below it.
    fn below(&self) -> &[u64] {
        &[]
    }

    /// The next run of bytes at or after `from` in which the layer (0: the top) may hold data; outside of
    /// such runs it holds none that was written before this was asked. `None`: nothing from there to its end.
    fn next_data(&self, layer: usize, from: u64) -> io::Result<Option<Range<u64>>> {
        let size = if layer == 0 { self.caps().size } else { self.below()[layer - 1] };
        Ok((from < size).then_some(from..size))
    }

    /// How much space there is for what the top layer does not have yet; none where that is not limited, or
    /// not known.
    fn space(&self) -> io::Result<Option<Space>> {
        Ok(None)
    }
}

/// Whether a thread could serve it now.
///
/// # Errors
/// What would keep the thread from it.
pub(crate) fn check_queue(backing: &dyn Backing) -> io::Result<()> {
    let reactor = backing.reactor(1)?;
    backing.open_queue(&reactor, 1).map(drop)
}

/// One thread's way to a backing. Dropping it waits for what is in flight.
pub trait Queue {
    /// A buffer of `len` bytes (1..=[`Queue::max_buffer`]) for what is at `offset`, whole sectors of 512
    /// bytes; or `None` until others have come back.
    fn alloc(&mut self, offset: u64, len: usize) -> Option<Buffer>;

    /// Gives a buffer back.
    fn free(&mut self, buffer: Buffer);

    /// How many buffers there can be, and more than any [`Buffer::place`].
    fn places(&self) -> usize;

    /// The most bytes of one buffer.
    fn max_buffer(&self) -> usize;

    /// The bytes of a buffer of this queue.
    fn bytes<'a>(&'a mut self, buffer: &'a mut Buffer) -> &'a mut [u8];

    /// The bytes at `offset` of a layer (0: the top) themselves, where that is memory: neither an operation
    /// nor a copy is needed to read them. The top's may change while they are read. `None` where they are to
    /// be read by an operation.
    fn in_memory(&self, layer: usize, offset: u64, len: usize) -> Option<InMemory<'_>>;

    /// What is at `offset` of a layer will be asked for soon: a hint.
    fn expect(&self, layer: usize, offset: u64, len: usize) {
        let _ = (layer, offset, len);
    }

    /// Whether another operation may be submitted, beside one for each [`Done`] that was not taken yet.
    fn has_room(&self) -> bool;

    /// Operations that were submitted and have not ended yet.
    fn in_flight(&self) -> usize;

    /// Hands an operation over; it goes to the kernel with the next [`Reactor::wait`] at the latest. Never
    /// more than the depth at a time: see [`Queue::has_room`]. Whoever has just taken a [`Done`] may submit
    /// one operation without asking.
    fn submit(&mut self, tag: u64, op: Op);

    /// Takes reads back that have not begun, since they wait for what may take long: with their tags. Whoever
    /// stands still for a moment hands them over anew later.
    fn take_back(&mut self) -> Vec<(u64, Buffer)> {
        Vec::new()
    }

    /// Whether reads may have to wait for what is still to come from elsewhere.
    fn is_coming(&self) -> bool {
        false
    }

    /// Whether an operation waits for what does not come at the moment.
    fn waits_in_vain(&self) -> bool {
        false
    }

    /// Reads that wait for what may take long fail from now on where that does not come at the moment:
    /// whoever drains this queue is not to be kept.
    fn stop_waiting(&mut self) {}

    /// Takes what the thread's reactor has for this queue: to be called after each of its waits.
    ///
    /// # Errors
    /// Those of [`Reactor::wait`].
    fn collect(&mut self) -> io::Result<()>;

    /// Whether a watch of this queue's own woke the thread; then the queue has taken it in.
    fn woken(&mut self, token: Token) -> bool {
        let _ = token;
        false
    }

    /// Whether an operation has ended that [`Queue::next_done`] returns, at the latest after
    /// [`Queue::collect`].
    fn has_done(&self) -> bool;

    /// The next operation that has ended, if there is one.
    fn next_done(&mut self) -> Option<Done>;
}
