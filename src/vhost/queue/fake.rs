//! For tests: a backing that does what it is told when it is told, and the driver of a ring.

use crate::backing::{Backing, Buffer, Caps, Done, InMemory, Op, Queue};
use crate::disk::Disk;
use crate::image::lock::{Access, ImageLock};
use crate::reactor::{Reactor, Token, Uring, Wait, Woken};
use crate::vhost::dirty::{GuestMemory, RingLog};
use crate::vhost::queue::Setup;
use crate::vhost::queue::ring::{Position, Ring};
use crate::virtio::Shape;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What a test sees of the backing, and tells it. It knows flushes only.
#[derive(Default)]
pub(super) struct Control {
    /// Flushes that were begun.
    pub begun: AtomicU32,
    /// Flushes that have ended.
    pub ended: AtomicU32,
    /// How many of them may end.
    pub may_end: AtomicU32,
    /// Those that end now fail.
    pub failing: AtomicBool,
    /// Waiting for anything fails.
    pub broken: AtomicBool,
    /// Whether the last wait was ended by a watch: a flush takes longer than anything else.
    woken: AtomicBool,
    /// What makes steps of different threads depend on each other, for the model: it tries
    /// such steps in both orders.
    #[cfg(feature = "model")]
    steps: loom::sync::atomic::AtomicUsize,
}

impl Control {
    /// Before anything that another thread can see, or that another thread's doing can be seen in.
    pub(super) fn step(&self) {
        #[cfg(feature = "model")]
        self.steps.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether a flush is to end now.
    fn ends(&self) -> bool {
        let ended = self.ended.load(Ordering::SeqCst);
        ended < self.begun.load(Ordering::SeqCst) && ended < self.may_end.load(Ordering::SeqCst)
    }

    /// Lets the others go on, for want of something to do.
    pub(super) fn give_way(&self) {
        self.step();
        #[cfg(feature = "model")]
        loom::thread::yield_now();
        #[cfg(not(feature = "model"))]
        std::thread::yield_now();
    }
}

struct FakeBacking {
    control: Arc<Control>,
    caps: Caps,
}

struct FakeQueue {
    control: Arc<Control>,
    flushes: VecDeque<u64>,
    done: VecDeque<Done>,
}

/// What the thread waits with: watches, and what a test tells the backing.
struct FakeReactor {
    control: Arc<Control>,
    watches: RefCell<Vec<RawFd>>,
    woken: RefCell<VecDeque<Woken>>,
}

/// A disk over such a backing.
pub(super) fn disk(control: &Arc<Control>) -> Arc<Disk> {
    let file = tempfile::NamedTempFile::new().expect("a file to lock");
    let lock = ImageLock::acquire(file.path(), Access::ReadWrite).expect("nobody has it");
    let shape = Shape { sectors: 2048, block_size: 512, read_only: false };
    let backing = FakeBacking {
        control: control.clone(),
        caps: Caps { access: "fake".into(), size: 1 << 20, unit: 512, gives_back: true },
    };
    Arc::new(Disk::new(shape, "", Box::new(backing), None, lock))
}

impl Backing for FakeBacking {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn reactor(&self, _depth: u16) -> io::Result<Rc<dyn Reactor>> {
        let control = self.control.clone();
        Ok(Rc::new(FakeReactor { control, watches: RefCell::default(), woken: RefCell::default() }))
    }

    fn open_queue(&self, _reactor: &Rc<dyn Reactor>, _depth: u16) -> io::Result<Box<dyn Queue>> {
        let control = self.control.clone();
        Ok(Box::new(FakeQueue { control, flushes: VecDeque::new(), done: VecDeque::new() }))
    }

    fn has_data(&self) -> io::Result<bool> {
        Ok(false)
    }
}

impl FakeReactor {
    fn look(&self) {
        self.control.step();
        for (token, &fd) in self.watches.borrow().iter().enumerate() {
            if fd < 0 {
                continue;
            }
            // SAFETY: whoever watches keeps it open until the next wait is over.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            // As io_uring's multishot poll: each signal is told once. An empty counter is an error.
            if nix::unistd::read(fd, &mut [0; 8]).is_ok() {
                self.woken.borrow_mut().push_back(Woken::Ready(Token(token as u32)));
            }
        }
        self.control.woken.store(!self.woken.borrow().is_empty(), Ordering::SeqCst);
    }

    /// Does not burn the CPU, where somebody else is to use it.
    fn doze(&self) {
        if cfg!(feature = "model") {
            return;
        }
        // SAFETY: as in `look`.
        let fd = |&fd: &RawFd| unsafe { BorrowedFd::borrow_raw(fd) };
        let watches = self.watches.borrow();
        let open = watches.iter().filter(|&&fd| fd >= 0);
        let mut fds: Vec<_> = open.map(fd).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let _ = poll(&mut fds, PollTimeout::from(1u8));
    }
}

impl Reactor for FakeReactor {
    fn watch(&self, fd: RawFd) -> Token {
        self.watches.borrow_mut().push(fd);
        Token(self.watches.borrow().len() as u32 - 1)
    }

    fn unwatch(&self, token: Token) {
        self.watches.borrow_mut()[token.0 as usize] = -1;
    }

    fn wait(&self, wait: Wait) -> io::Result<()> {
        loop {
            if self.control.broken.load(Ordering::SeqCst) {
                return Err(io::Error::other("a backing that shall be broken"));
            }
            self.look();
            if self.is_ready() || self.control.ends() || wait != Wait::Event {
                return Ok(());
            }
            self.control.give_way();
            self.doze();
        }
    }

    fn is_ready(&self) -> bool {
        !self.woken.borrow().is_empty()
    }

    fn next_woken(&self) -> Option<Woken> {
        self.woken.borrow_mut().pop_front()
    }

    fn uring(self: Rc<Self>) -> Option<Rc<Uring>> {
        None
    }
}

impl Queue for FakeQueue {
    fn alloc(&mut self, _offset: u64, _len: usize) -> Option<Buffer> {
        None
    }

    fn free(&mut self, _buffer: Buffer) {}

    fn max_buffer(&self) -> usize {
        4096
    }

    fn bytes<'a>(&'a mut self, _buffer: &'a mut Buffer) -> &'a mut [u8] {
        &mut []
    }

    fn places(&self) -> usize {
        1
    }

    fn in_flight(&self) -> usize {
        self.flushes.len()
    }

    fn in_memory(&self, _layer: usize, _offset: u64, _len: usize) -> Option<InMemory<'_>> {
        None
    }

    fn has_room(&self) -> bool {
        // Asked between the last look at the ring and sleep.
        self.control.step();
        true
    }

    fn submit(&mut self, tag: u64, op: Op) {
        assert!(matches!(op, Op::Flush), "{op:?}");
        self.flushes.push_back(tag);
        self.control.begun.fetch_add(1, Ordering::SeqCst);
    }

    fn collect(&mut self) -> io::Result<()> {
        if self.control.woken.load(Ordering::SeqCst) {
            return Ok(());
        }
        while self.control.ends()
            && let Some(tag) = self.flushes.pop_front()
        {
            self.control.ended.fetch_add(1, Ordering::SeqCst);
            let failing = self.control.failing.load(Ordering::SeqCst);
            let result = if failing { Err(io::Error::other("a flush that shall fail")) } else { Ok(()) };
            self.done.push_back(Done { tag, buffer: None, result });
        }
        Ok(())
    }

    fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    fn next_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }
}

const SIZE: u16 = 16;
const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x4000;
/// Of a chain that is not answered yet.
const UNANSWERED: u8 = 0xff;

/// The driver of a ring with EVENT_IDX, whose only requests are flushes. Each uses entries of its own, so
/// there are [`Driver::MOST`] in all.
pub(super) struct Driver {
    mem: Arc<GuestMemory>,
    kick: EventFd,
    put: u16,
    control: Arc<Control>,
}

impl Driver {
    /// The most requests.
    pub(super) const MOST: u16 = SIZE / 2;

    /// A driver with an empty ring in memory of its own.
    pub(super) fn new(control: &Arc<Control>) -> Self {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 0x5000)]).expect("some memory");
        // VIRTIO_BLK_T_FLUSH, reserved, sector 0.
        mem.write_obj(4u32, GuestAddress(HEADER)).expect("in memory");
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an event descriptor");
        Driver { mem: Arc::new(mem), kick, put: 0, control: control.clone() }
    }

    #[cfg(feature = "model")]
    /// Another view of it, from another thread; only one of them may put requests.
    pub(super) fn view(&self) -> Self {
        let kick = self.kick.try_clone().expect("dup");
        Driver { mem: self.mem.clone(), kick, put: self.put, control: self.control.clone() }
    }

    /// What a worker needs to serve the ring from `position` on.
    pub(super) fn setup(&self, position: Position) -> Box<Setup> {
        let mut queue = virtio_queue::Queue::new(SIZE).expect("a size");
        let low = |address: u64| Some(address as u32);
        queue.set_desc_table_address(low(DESC), Some(0));
        queue.set_avail_ring_address(low(AVAIL), Some(0));
        queue.set_used_ring_address(low(USED), Some(0));
        queue.set_event_idx(true);
        queue.set_next_avail(position.next_avail);
        queue.set_next_used(position.next_used);
        queue.set_ready(true);
        let ring = Ring::new(self.mem.clone(), queue, RingLog::new(Arc::default())).expect("a valid ring");
        let kick = self.kick.try_clone().expect("dup").into_raw_fd();
        // SAFETY: the descriptor was just made and given up by its only owner.
        let kick = unsafe { File::from_raw_fd(kick) };
        let write_through = Arc::new(AtomicBool::new(false));
        Box::new(Setup { ring, kick, call: None, err: None, write_through, inflight: None })
    }

    /// Puts `count` flushes on the ring, and kicks if the device wants it.
    pub(super) fn put(&mut self, count: u16) {
        let before = self.put;
        for _ in 0..count {
            self.put_one();
        }
        self.control.step();
        self.mem.store(self.put, GuestAddress(AVAIL + 2), Ordering::SeqCst).expect("in memory");
        self.control.step();
        // vring_need_event: virtio 1.3, 2.7.7.1.
        let event = self.avail_event();
        if self.put.wrapping_sub(event).wrapping_sub(1) < self.put.wrapping_sub(before) {
            self.control.step();
            self.kick.write(1).expect("an event counter has room");
        }
    }

    fn put_one(&mut self) {
        assert!(self.put < Self::MOST, "entries are used once");
        let (n, head) = (u64::from(self.put), 2 * self.put);
        let status = STATUS + n;
        self.mem.write_obj(UNANSWERED, GuestAddress(status)).expect("in memory");
        for (at, address, len, flags, next) in
            [(head, HEADER, 16u32, 1u16, head + 1), (head + 1, status, 1, 2, 0)]
        {
            let place = DESC + 16 * u64::from(at);
            self.mem.write_obj(address, GuestAddress(place)).expect("in memory");
            self.mem.write_obj(len, GuestAddress(place + 8)).expect("in memory");
            self.mem.write_obj(flags, GuestAddress(place + 12)).expect("in memory");
            self.mem.write_obj(next, GuestAddress(place + 14)).expect("in memory");
        }
        let place = AVAIL + 4 + 2 * (n % u64::from(SIZE));
        self.mem.write_obj(head, GuestAddress(place)).expect("in memory");
        self.put += 1;
    }

    /// How many requests the device had taken when it last wanted to be told of more.
    pub(super) fn avail_event(&self) -> u16 {
        let place = GuestAddress(USED + 4 + 8 * u64::from(SIZE));
        self.mem.load(place, Ordering::SeqCst).expect("in memory")
    }

    /// How many requests are answered.
    pub(super) fn used(&self) -> u16 {
        self.control.step();
        self.mem.load(GuestAddress(USED + 2), Ordering::SeqCst).expect("in memory")
    }

    /// The status bytes of the first `count` requests; none for one that has none yet.
    pub(super) fn statuses(&self, count: u16) -> Vec<Option<u8>> {
        let status = |n| self.mem.read_obj::<u8>(GuestAddress(STATUS + u64::from(n))).expect("in memory");
        (0..count).map(status).map(|s| Some(s).filter(|&s| s != UNANSWERED)).collect()
    }

    #[cfg(feature = "model")]
    /// How many others have the guest's memory.
    pub(super) fn holders(&self) -> usize {
        Arc::strong_count(&self.mem) - 1
    }
}
