//! Our `VringT`: what the front-end changes reaches the queue's thread through it.
//!
//! vhost-user-backend calls it for every change of a ring's state. A change that stops or alters a running
//! ring returns only after the thread has drained it, so that whatever the crate answers afterwards is true.
//! The crate's own event loop has no part in this: it runs without threads.

mod told;

use crate::base::sync::Locked;
use crate::vhost::cache_mode::CacheMode;
use crate::vhost::dirty::{DirtyLog, GuestMemory, RingLog};
use crate::vhost::queue::inflight::{Description, Inflight};
use crate::vhost::queue::ring::{Position, Ring};
use crate::vhost::queue::{Awaited, Setup, Worker};
use crate::vhost::tenure::{Serving, Tenure};
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion};

type Memory = GuestMemoryAtomic<GuestMemory>;

/// The rings of one session. The crate makes them one by one and tells them nothing but the memory, so they
/// find their queue's thread through [`Rings::while_current`].
pub struct Rings {
    tenure: Arc<dyn Tenure>,
    /// How many there may be.
    queues: usize,
    /// What runs them, once the first has started.
    serving: Mutex<Option<Arc<Serving>>>,
    cache_mode: Arc<CacheMode>,
    /// Where the front-end wants chains in flight to be noted.
    inflight: Mutex<Option<Arc<Inflight>>>,
    log: Arc<DirtyLog>,
    made: Mutex<Vec<Vring>>,
    /// The guest's memory, as it was given last.
    memory: Mutex<Option<Arc<GuestMemory>>>,
    /// Why a ring that was to run does not, since somebody asked last.
    failure: Mutex<Option<io::Error>>,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Rings>>> = const { RefCell::new(None) };
}

impl Rings {
    /// No rings yet; up to `queues` of them.
    pub fn new(tenure: Arc<dyn Tenure>, queues: usize, cache_mode: Arc<CacheMode>) -> Arc<Self> {
        Arc::new(Rings {
            tenure,
            queues,
            serving: Mutex::default(),
            cache_mode,
            inflight: Mutex::default(),
            log: Arc::default(),
            made: Mutex::default(),
            memory: Mutex::default(),
            failure: Mutex::default(),
        })
    }

    /// Runs `make` on this thread; the vrings that the crate makes in it are ours.
    pub fn while_current<T>(self: &Arc<Self>, make: impl FnOnce() -> T) -> T {
        CURRENT.set(Some(self.clone()));
        let made = make();
        CURRENT.set(None);
        made
    }

    /// Takes the memory in which rings that start from now on note their chains in flight.
    pub fn set_inflight(&self, inflight: Arc<Inflight>) {
        *self.inflight.locked() = Some(inflight);
    }

    /// Where the guest's memory that we write is logged.
    pub fn log(&self) -> &DirtyLog {
        &self.log
    }

    /// Logs what ring `index` writes into its used ring at guest address `at`, or not at all.
    pub fn log_used(&self, index: usize, at: Option<u64>) {
        if let Some(vring) = self.made.locked().get(index) {
            vring.log.set_used(at);
        }
    }

    /// Returns when everything that was written before logging changed is in guest memory, and everything
    /// that is written from now on is logged as it was said last.
    pub fn settle(&self) -> io::Result<()> {
        if !self.log.is_active() {
            return Ok(());
        }
        let Some(serving) = self.serving.locked().clone() else { return Ok(()) };
        serving.workers.iter().try_for_each(Worker::sync)
    }

    /// Whether a ring runs.
    pub fn any_runs(&self) -> bool {
        self.made.locked().iter().any(Vring::is_running)
    }

    /// Whether every ring that was to run does.
    ///
    /// # Errors
    /// Why one does not. It is told once.
    pub fn check(&self) -> io::Result<()> {
        self.failure.locked().take().map_or(Ok(()), Err)
    }

    /// Serves every ring that can run now in this memory, and none in what there was before.
    pub fn use_memory(&self, memory: &Memory) -> io::Result<()> {
        let memory = memory.memory().into_inner();
        let before = self.memory.locked().replace(memory.clone());
        if before.is_none_or(|before| !has_all_of(&memory, &before)) {
            self.made.locked().iter().for_each(Vring::restart);
            return Ok(());
        }
        // It has only become more: rings that run need not stop for that, nor one wait for another.
        let made = self.made.locked();
        let told = made.iter().filter_map(|vring| vring.give_memory(&memory).transpose());
        let told = told.collect::<io::Result<Vec<_>>>()?;
        told.into_iter().try_for_each(|(serving, index, answer)| serving.workers[index].wait(answer))?;
        // Rings that stopped when their memory went, which is back now.
        made.iter().filter(|vring| !vring.is_running()).for_each(Vring::restart);
        Ok(())
    }

    /// Drains, stops and forgets every ring: the session is over.
    pub fn end(&self) {
        for vring in std::mem::take(&mut *self.made.locked()) {
            vring.stop();
        }
        *self.memory.locked() = None;
        self.rest_if_idle();
    }

    /// The guest's memory, as it was given last.
    pub fn memory(&self) -> Option<Arc<GuestMemory>> {
        self.memory.locked().clone()
    }

    /// The in-flight region that the front-end gave, and its file once more.
    pub fn inflight_shared(&self) -> io::Result<Option<(Description, OwnedFd)>> {
        self.inflight.locked().as_ref().map(|inflight| inflight.shared()).transpose()
    }

    /// Every ring as the front-end has set it up, and where it stands, which is right while it is stopped.
    pub fn states(&self) -> io::Result<Vec<RingState>> {
        self.made.locked().iter().map(Vring::now).collect()
    }

    /// Drains every ring that runs, all at one time, and has it stand still until [`Rings::go_on`], or until
    /// it is stopped for good. Nothing is given back that rings need to run.
    ///
    /// # Errors
    /// Why one could not be halted.
    pub fn halt(&self) -> io::Result<()> {
        let made = self.made.locked();
        let asked = made.iter().map(Vring::ask_to_halt).collect::<io::Result<Vec<_>>>()?;
        made.iter().zip(asked).try_for_each(|(vring, asked)| vring.halted(asked))
    }

    /// Has the rings run on that were halted.
    pub fn go_on(&self) {
        for vring in &*self.made.locked() {
            if let Some(serving) = vring.running()
                && let Err(e) = serving.workers[vring.index].go_on()
            {
                log::error!("ring {}: {e}", vring.index);
            }
        }
    }

    fn claim(&self) -> io::Result<Arc<Serving>> {
        let mut serving = self.serving.locked();
        if let Some(serving) = &*serving {
            return Ok(serving.clone());
        }
        let claimed = self.tenure.claim()?;
        // Who had the volume may have left word of what the guest chose.
        self.cache_mode.decide();
        Ok(serving.insert(claimed).clone())
    }

    /// Lets another process have the volume if no ring runs.
    fn rest_if_idle(&self) {
        if !self.any_runs() && self.serving.locked().take().is_some() {
            self.tenure.rest();
        }
    }
}

/// What belongs to a ring and the crate does not keep for us.
#[derive(Default)]
struct Seat {
    kick: Option<File>,
    call: Option<File>,
    err: Option<File>,
    /// What runs the ring, while it does.
    running: Option<Arc<Serving>>,
    /// Whether the ring was running until its addresses were given anew just now.
    moving: bool,
}

/// A ring as the front-end has set it up.
pub struct RingState {
    /// Entries.
    pub size: u16,
    /// Guest addresses of the descriptor table, the available ring and the used ring; `None` before they are
    /// given.
    pub addresses: Option<[u64; 3]>,
    /// The next available index to look at.
    pub next_avail: u16,
    /// Where writes into the used ring are logged.
    pub log_used: Option<u64>,
    /// Whether it is enabled.
    pub enabled: bool,
    /// Where the driver announces chains, once more.
    pub kick: Option<File>,
    /// Where used entries are announced, once more.
    pub call: Option<File>,
    /// Where a broken ring is announced, once more.
    pub err: Option<File>,
}

/// One ring, from the crate's side.
#[derive(Clone)]
pub struct Vring {
    index: usize,
    rings: Arc<Rings>,
    /// The crate's own state. Its kick is a descriptor that nobody signals: it only says that there is one.
    state: VringMutex<Memory>,
    mem: Memory,
    log: RingLog,
    seat: Arc<Mutex<Seat>>,
}

impl Vring {
    /// Starts, or leaves alone, according to the state: a ring runs while it is ready,
    /// enabled and has a kick.
    fn start_if_due(&self) {
        if let Err(e) = self.try_start() {
            log::error!("ring {} does not run: {e}", self.index);
            self.fail(&e);
        }
    }

    fn try_start(&self) -> io::Result<()> {
        let mut seat = self.seat.locked();
        let state = self.state.get_ref();
        if seat.running.is_some() || !state.is_enabled() || !state.get_queue().ready() {
            return Ok(());
        }
        let Some(kick) = seat.kick.as_ref() else { return Ok(()) };
        let queue = Queue::try_from(state.get_queue().state()).map_err(io::Error::other)?;
        // Front-ends enable rings that they never set up; a ring without addresses just does not run.
        if queue.desc_table() == 0 && queue.avail_ring() == 0 {
            return Ok(());
        }
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        // Before the ring is looked at: where it stands is true once nobody else serves the volume.
        let serving = self.rings.claim()?;
        let ring = Ring::new(self.mem.memory().into_inner(), queue, self.log.clone());
        let ring = ring.ok_or_else(|| invalid("its addresses are not in guest memory"))?;
        let inflight = self.rings.inflight.locked().clone();
        let inflight = match inflight.map(|region| region.queue(self.index, ring.size())) {
            Some(None) => return Err(invalid("it does not fit the in-flight region")),
            part => part.flatten().map(|part| part.for_unanswered(ring.unanswered())),
        };
        let copy = |file: &Option<File>| file.as_ref().map(File::try_clone).transpose();
        let setup = Setup {
            ring,
            kick: kick.try_clone()?,
            call: copy(&seat.call)?,
            err: copy(&seat.err)?,
            write_through: self.rings.cache_mode.durable().clone(),
            inflight,
        };
        serving.workers[self.index].start(setup)?;
        seat.running = Some(serving);
        log::debug!("ring {} runs", self.index);
        Ok(())
    }

    /// Drains and stops; the positions go back into the crate's state. Returns whether it was running.
    fn stop(&self) -> bool {
        let mut seat = self.seat.locked();
        let Some(serving) = seat.running.take() else { return false };
        match serving.workers[self.index].stop() {
            Ok(Some(position)) => self.stands_at(position),
            Ok(None) => {}
            Err(e) => log::error!("ring {}: {e}", self.index),
        }
        log::debug!("ring {} is drained", self.index);
        true
    }

    fn ask_to_halt(&self) -> io::Result<Option<Awaited>> {
        self.running().map(|serving| serving.workers[self.index].halt()).transpose()
    }

    /// Takes note of where it stands, once it does.
    fn halted(&self, asked: Option<Awaited>) -> io::Result<()> {
        let (Some(asked), Some(serving)) = (asked, self.running()) else { return Ok(()) };
        if let Some(position) = serving.workers[self.index].position(asked)? {
            self.stands_at(position);
        }
        Ok(())
    }

    fn running(&self) -> Option<Arc<Serving>> {
        self.seat.locked().running.clone()
    }

    fn stands_at(&self, position: Position) {
        let mut state = self.state.get_mut();
        state.get_queue_mut().set_next_avail(position.next_avail);
        state.get_queue_mut().set_next_used(position.next_used);
    }

    /// The VMM wants it stopped: if it was the last, another process may have the volume.
    fn stop_for_good(&self) {
        self.stop();
        self.rings.rest_if_idle();
    }

    /// Starts it even if it did not run: it may have stopped when its memory went, which is back now.
    fn restart(&self) {
        self.stop();
        if let Err(e) = self.try_start() {
            log::warn!("ring {} does not run until its memory is back: {e}", self.index);
        }
    }

    /// Hands the thread of a ring that runs memory which has all that the ring uses; nothing if it does not
    /// run.
    fn give_memory(&self, memory: &Arc<GuestMemory>) -> io::Result<Option<(Arc<Serving>, usize, Awaited)>> {
        let Some(serving) = self.running() else { return Ok(None) };
        let answer = serving.workers[self.index].give_memory(memory.clone())?;
        Ok(Some((serving, self.index, answer)))
    }

    /// What the crate has no place for in an answer: the gate asks for it.
    fn fail(&self, e: &io::Error) {
        let e = io::Error::new(e.kind(), format!("ring {}: {e}", self.index));
        self.rings.failure.locked().get_or_insert(e);
    }

    fn is_running(&self) -> bool {
        self.seat.locked().running.is_some()
    }

    fn now(&self) -> io::Result<RingState> {
        let seat = self.seat.locked();
        let state = self.state.get_ref();
        let queue = state.get_queue();
        let addresses = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
        let copy = |file: &Option<File>| file.as_ref().map(File::try_clone).transpose();
        Ok(RingState {
            size: queue.size(),
            addresses: (addresses[..2] != [0, 0]).then_some(addresses),
            next_avail: queue.next_avail(),
            log_used: self.log.used(),
            enabled: state.is_enabled(),
            kick: copy(&seat.kick)?,
            call: copy(&seat.call)?,
            err: copy(&seat.err)?,
        })
    }
}

/// Whether `memory` has every region of `before`, mapped where it was.
fn has_all_of(memory: &GuestMemory, before: &GuestMemory) -> bool {
    before.iter().all(|region| {
        let now = memory.find_region(region.start_addr());
        now.is_some_and(|now| (now.as_ptr(), now.len()) == (region.as_ptr(), region.len()))
    })
}
