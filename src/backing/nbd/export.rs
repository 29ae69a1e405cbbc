//! An export as this process has it: whoever asks for something leaves it in a mailbox, and the export's
//! thread does it.
//!
//! A process has an export once, whoever uses it: many servers serve one connection at a time, and a flush
//! covers what was written by the same connection. The thread is there when something is asked for, and can
//! be [sent away](rest) in between, since a process is confined while it has one thread.
#![forbid(unsafe_code)]

use super::address::Address;
use super::dial;
use super::dial::How;
pub use super::dial::Right;
use super::engine::Engine;
use super::handshake::Terms;
use super::replies::{Given, Run};
use super::task::{Ask, Inbox, Outcome, Task, To, event};
use crate::backing::medium::Medium;
use crate::base::sync::Locked;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak, mpsc};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// Bytes that are moved by one request of those who move many.
const PIECE: usize = 256 << 10;
/// Pieces under way at a time then.
const PIECES: usize = 8;
/// Bytes of which the map is asked for at once: whole blocks, whatever their size.
const MAP_STEP: u64 = 1 << 30;

/// How long requests wait for a server that is gone, in milliseconds.
static PATIENCE: AtomicU64 = AtomicU64::new(30_000);
/// The exports of this process.
static EXPORTS: Mutex<BTreeMap<(Address, Right), Weak<Export>>> = Mutex::new(BTreeMap::new());
/// Who is told of an export that is lost for good, and why.
static WHEN_LOST: OnceLock<WhenLost> = OnceLock::new();

/// Is told of an export that is lost for good, and why.
pub type WhenLost = Box<dyn Fn(&Address, &str) + Send + Sync>;

/// From now on, and for good, `tell` is called when an export is lost to this process for good.
pub fn when_lost(tell: WhenLost) {
    let _ = WHEN_LOST.set(tell);
}

pub(super) fn tell_lost(address: &Address, why: &str) {
    if let Some(tell) = WHEN_LOST.get() {
        tell(address, why);
    }
}

/// Whether another process has the images that this one opens for writing, by the same tenure.
static BORROWS: AtomicBool = AtomicBool::new(false);

/// From now on, images that this process opens for writing are borrowed: another process has lent them, and
/// gets them back when this one is done with them. Or that is over, and they are this process's.
pub fn borrow_images(it: bool) {
    BORROWS.store(it, Ordering::Relaxed);
}

/// Whether images are borrowed.
pub(super) fn borrows() -> bool {
    BORROWS.load(Ordering::Relaxed)
}

/// Sets how long requests wait for a server that is gone, for all exports of this process.
pub fn set_patience(patience: Duration) {
    let milliseconds = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
    PATIENCE.store(milliseconds, Ordering::Relaxed);
}

/// How long requests wait for a server that is gone.
pub(super) fn patience() -> Duration {
    Duration::from_millis(PATIENCE.load(Ordering::Relaxed))
}

/// Waits until no export of this process has a thread. The next who asks for something starts it again.
/// Nobody asks meanwhile.
pub fn rest() {
    let exports: Vec<_> = EXPORTS.locked().values().filter_map(Weak::upgrade).collect();
    exports.iter().for_each(|export| export.send_away(Order::Rest));
}

/// What the thread is to do when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Wait,
    /// End, and leave the connection as it is.
    Rest,
    /// End, and take leave of the server.
    Leave,
}

/// What is on its way to the thread.
pub(super) struct Mailbox {
    tasks: Vec<Task>,
    order: Order,
    /// Whether there is a thread that looks at this again before it ends.
    is_served: bool,
}

/// Looks whether what a new connection leads to is the same export.
pub(super) type Check = Box<dyn Fn(&dyn Medium) -> io::Result<()> + Send>;

/// What the thread and those who ask have in common.
pub(super) struct Shared {
    pub(super) address: Address,
    pub(super) right: Right,
    mailbox: Mutex<Mailbox>,
    wake: EventFd,
    terms: Mutex<Terms>,
    check: Mutex<Option<Check>>,
    engine: Mutex<Engine>,
}

impl Shared {
    /// Takes what is asked for, if the thread goes on; `is_idle`: it has nothing to do. None: it has to end.
    pub(super) fn next_tasks(&self, is_idle: bool) -> Result<Vec<Task>, Order> {
        let mut mailbox = self.mailbox.locked();
        let tasks = std::mem::take(&mut mailbox.tasks);
        if tasks.is_empty() && is_idle && mailbox.order != Order::Wait {
            mailbox.is_served = false;
            return Err(mailbox.order);
        }
        Ok(tasks)
    }

    /// Waits until something is asked for, or ordered, or the socket is as `interest` says, or the time is
    /// over. Returns what the socket is.
    pub(super) fn wait(
        &self,
        socket: Option<(BorrowedFd<'_>, PollFlags)>,
        time: Option<Duration>,
    ) -> PollFlags {
        let time = time.map_or(PollTimeout::NONE, |time| {
            // At least one, or it would not wait at all at the end.
            PollTimeout::try_from(time.as_millis().max(1)).unwrap_or(PollTimeout::MAX)
        });
        let wake = PollFd::new(self.wake.as_fd(), PollFlags::POLLIN);
        let mut fds: Vec<PollFd<'_>> =
            [wake].into_iter().chain(socket.map(|(fd, interest)| PollFd::new(fd, interest))).collect();
        match poll(&mut fds, time) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => log::error!("{}: waiting for the server: {e}", self.address),
        }
        if fds[0].any() == Some(true) {
            let _ = self.wake.read();
        }
        fds.get(1).and_then(PollFd::revents).unwrap_or(PollFlags::empty())
    }

    pub(super) fn terms(&self) -> Terms {
        self.terms.locked().clone()
    }

    /// A new connection goes on for one that was lost.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn go_on(&self, terms: &Terms, medium: &dyn Medium) -> io::Result<()> {
        let mut before = self.terms.locked();
        terms.go_on_for(&before)?;
        if let Some(check) = &*self.check.locked() {
            check(medium)?;
        }
        *before = terms.clone();
        Ok(())
    }
}

/// An export that this process has a connection to.
pub struct Export {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Export {
    /// The export at this address: connects to it, unless this process has it already.
    ///
    /// # Errors
    /// As [`super::handshake::connect_to`]; those of a Ceph cluster.
    pub fn at(address: &Address, right: Right) -> io::Result<Arc<Self>> {
        Self::or_made(address, right, None)
    }

    /// As [`Export::at`], for writing, and an RBD image that is not there is made, of `len` bytes.
    ///
    /// # Errors
    /// As for that.
    pub fn made_at(address: &Address, len: u64) -> io::Result<Arc<Self>> {
        Self::or_made(address, Right::Write, Some(len))
    }

    fn or_made(address: &Address, right: Right, make: Option<u64>) -> io::Result<Arc<Self>> {
        // Whoever may write may read, and a server knows no difference.
        let right = if address.image().is_none() { Right::Write } else { right };
        let mut exports = EXPORTS.locked();
        exports.retain(|_, export| export.strong_count() > 0);
        for had in [Right::Write, Right::Read].into_iter().filter(|had| *had >= right) {
            if let Some(export) = exports.get(&(address.clone(), had)).and_then(Weak::upgrade) {
                return Ok(export);
            }
        }
        let (socket, terms) = dial::connect(address, How { right, again: false, make })?;
        let shared = Shared {
            address: address.clone(),
            right,
            mailbox: Mutex::new(Mailbox { tasks: Vec::new(), order: Order::Wait, is_served: false }),
            wake: event()?,
            engine: Mutex::new(Engine::new(socket, &terms)),
            terms: Mutex::new(terms),
            check: Mutex::new(None),
        };
        let export = Arc::new(Export { shared: Arc::new(shared), thread: Mutex::new(None) });
        exports.insert((address.clone(), right), Arc::downgrade(&export));
        Ok(export)
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.shared.address
    }

    /// What was agreed on with the server last.
    pub fn terms(&self) -> Terms {
        self.shared.terms()
    }

    /// From now on, `check` is asked of each new connection whether it leads to the same export. It may read
    /// what is there.
    pub fn recognise_by(&self, check: impl Fn(&dyn Medium) -> io::Result<()> + Send + 'static) {
        *self.shared.check.locked() = Some(Box::new(check));
    }

    /// Asks for something; what becomes of it comes to `inbox`, with `number`.
    pub(crate) fn ask(&self, ask: Ask, inbox: &Arc<Inbox>, number: u32) {
        self.hand_over(Task::Do(ask, To::Queue(inbox.clone(), number)));
    }

    /// Makes everything durable that was written before.
    ///
    /// # Errors
    /// Those of the server; that it is gone, and does not come back in time.
    pub fn flush(&self) -> io::Result<()> {
        self.wait_for(Ask::Flush).map(drop)
    }

    /// Whether it is an RBD image that nobody but this process writes.
    pub fn is_exclusive(&self) -> bool {
        self.shared.address.image().is_some() && self.shared.right == Right::Write
    }

    /// Lends an image to another process, which has got its tenure: from now on this one asks for nothing
    /// there. Everything that was written is durable already.
    ///
    /// # Errors
    /// Why it cannot be lent within `time`; whoever asked takes it back then as well.
    pub fn lend(&self, time: Duration) -> io::Result<()> {
        let (tell, told) = mpsc::channel();
        self.hand_over(Task::Lend(tell));
        told.recv_timeout(time).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Has the image again, which the other process has not kept: that is seen to at once. Requests wait for
    /// it.
    pub fn take_back(&self) {
        self.hand_over(Task::TakeBack);
    }

    /// The next run of bytes in this range that may hold something; outside of such runs it holds nothing.
    /// None: nothing from there to its end. All of it where the server has no map.
    ///
    /// # Errors
    /// As [`Export::flush`].
    pub fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        if self.terms().map.is_none() {
            return Ok((!range.is_empty()).then_some(range));
        }
        let mut at = range.start;
        let mut found: Option<Range<u64>> = None;
        while at < range.end {
            let len = (range.end - at).min(MAP_STEP) as u32;
            let Given::Map(runs) = self.wait_for(Ask::Map { offset: at, len })? else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let before = at;
            for Run { len, zero } in runs {
                let end = at.saturating_add(len.into()).min(range.end);
                match &mut found {
                    Some(_) if zero => return Ok(found),
                    Some(found) => found.end = end,
                    None if zero => {}
                    None => found = Some(at..end),
                }
                at = end;
            }
            // Runs have at least a byte, and there is one at least.
            debug_assert!(at > before);
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn wait_for(&self, ask: Ask) -> Outcome {
        let (to, from) = mpsc::channel();
        self.hand_over(Task::Do(ask, To::Caller(to)));
        from.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }

    /// Asks for each of `pieces`, several at a time, and has `take` see what came of each, in their order.
    fn in_pieces(
        &self,
        len: usize,
        ask: impl Fn(Range<usize>) -> Ask,
        mut take: impl FnMut(Range<usize>, Given),
    ) -> io::Result<()> {
        let piece = |n: usize| n * PIECE..len.min((n + 1) * PIECE);
        let count = len.div_ceil(PIECE);
        let mut under_way = std::collections::VecDeque::new();
        let mut result = Ok(());
        for n in 0..count + PIECES {
            if n < count && result.is_ok() {
                let (to, from) = mpsc::channel();
                self.hand_over(Task::Do(ask(piece(n)), To::Caller(to)));
                under_way.push_back((piece(n), from));
            }
            if n + 1 < PIECES {
                continue;
            }
            let Some((piece, from)) = under_way.pop_front() else { continue };
            match from.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into())) {
                Ok(given) => take(piece, given),
                // What is under way is waited for all the same: it may be written.
                Err(e) => result = result.and(Err(e)),
            }
        }
        result
    }

    fn hand_over(&self, task: Task) {
        let is_first = {
            let mut mailbox = self.shared.mailbox.locked();
            mailbox.tasks.push(task);
            let is_first = mailbox.tasks.len() == 1;
            if !mailbox.is_served {
                mailbox.is_served = true;
                mailbox.order = Order::Wait;
                self.start();
            }
            is_first
        };
        if is_first {
            let _ = self.shared.wake.write(1);
        }
    }

    fn start(&self) {
        let shared = self.shared.clone();
        let run = move || {
            let mut engine = shared.engine.locked();
            if catch_unwind(AssertUnwindSafe(|| engine.run(&shared))).is_err() {
                // Requests would wait for it for ever.
                log::error!("{}: its thread has failed", shared.address);
                std::process::abort();
            }
        };
        let mut thread = self.thread.locked();
        if let Some(before) = thread.take() {
            // It has looked at the mailbox for the last time.
            let _ = before.join();
        }
        match Builder::new().name("nbd".into()).spawn(run) {
            Ok(started) => *thread = Some(started),
            Err(e) => {
                log::error!("{}: its thread does not start: {e}", self.shared.address);
                std::process::abort();
            }
        }
    }

    /// Has the thread end when there is nothing to do, and waits for that.
    fn send_away(&self, order: Order) {
        let Some(thread) = self.thread.locked().take() else { return };
        self.shared.mailbox.locked().order = order;
        let _ = self.shared.wake.write(1);
        // It does not fail: the process ends first.
        let _ = thread.join();
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.send_away(Order::Leave);
        if let Ok(mut engine) = self.shared.engine.try_lock() {
            engine.leave(&self.shared.address);
        }
    }
}

impl Medium for Export {
    fn length(&self) -> io::Result<u64> {
        Ok(self.terms().size)
    }

    fn fetch(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let ask =
            |piece: Range<usize>| Ask::Read { offset: at + piece.start as u64, len: piece.len() as u32 };
        self.in_pieces(bytes.len(), ask, |piece, given| {
            if let Given::Bytes(come) = given {
                bytes[piece].copy_from_slice(&come);
            }
        })
    }

    fn store(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let ask = |piece: Range<usize>| {
            let offset = at + piece.start as u64;
            Ask::Write { offset, bytes: bytes[piece].to_vec(), durable: false }
        };
        self.in_pieces(bytes.len(), ask, |_, _| {})
    }

    fn make_zeros(&self, bytes: Range<u64>) -> io::Result<()> {
        let (offset, len) = (bytes.start, bytes.end - bytes.start);
        self.wait_for(Ask::Zero { offset, len, keep_space: false }).map(drop)
    }

    fn next_data(&self, bytes: Range<u64>) -> io::Result<Option<Range<u64>>> {
        // A server of others' may be wrong about that; what is made of it here cannot be undone.
        match self.shared.address.image() {
            Some(_) => Export::next_data(self, bytes),
            None => Ok((!bytes.is_empty()).then_some(bytes)),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.flush()
    }
}
