//! Which process of two has the volume, while a guest moves from one VMM to another (docs/migration.md).
//!
//! The volume's lock decides: who has it may read and write, nobody else. The source lets go of it whenever its VMM has
//! stopped all rings and a destination waits for it, with everything drained and durable; the destination takes it
//! when its VMM starts a ring. Should the source's VMM go on instead, the source takes it back in the same way.

use super::Opener;
use super::record::Record;
use crate::error::{Error, Kind, Result};
use crate::observe::Timestamp;
use crate::vhost::gate::Channel;
use crate::vhost::server::Stop;
use crate::vhost::tenure::{Serving, Tenure};
use crate::vhost::worker::{Tuning, Worker};
use crate::volume::io::Disk;
use crate::volume::lock::{Holder, LockFile, Turn, VolumeLock};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a ring that is to run waits for the process that has the volume. Its VMM has drained by then.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often to look whether it has let go: nothing tells, since it may be on another machine.
const LOOK: Duration = Duration::from_millis(5);

/// This process's part in who has the volume.
pub struct Handover {
    parts: Parts,
    /// Why a queue's thread died, which ends the process.
    failure: Arc<Mutex<Option<String>>>,
    state: Mutex<State>,
    guest: Mutex<Guest>,
}

/// What is known of the guest here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// No VMM has started a ring yet; one that served it before may be about to.
    Unknown,
    /// Its VMM is connected.
    Here,
    /// It has left with its VMM.
    Gone,
}

/// What a [`Handover`] is made of.
pub struct Parts {
    /// How the volume is opened.
    pub opener: Opener,
    /// Its lock.
    pub lock_file: LockFile,
    /// What the lock's file says of this process.
    pub holder: Holder,
    /// Where the lock is kept while this process has it.
    pub record: Arc<Record>,
    /// Queues, each with a thread.
    pub queues: u16,
    /// CPUs to bind the threads to, one after the other and from the beginning again; none: unbound.
    pub cpus: Vec<usize>,
    /// How queues are served, but for the CPU.
    pub tuning: Tuning,
    /// The VMM's own channel.
    pub channel: Arc<Channel>,
    /// Ends the process when a queue's thread dies; ends waiting for the volume.
    pub stop: Arc<Stop>,
    /// The `writeback` byte of the device.
    pub writeback: Arc<AtomicBool>,
    /// Called when this process has got the volume from another.
    pub taken: Box<dyn Fn() + Send + Sync>,
}

enum State {
    /// Its VMM is to start, once the source's has stopped.
    Waiting { _turn: Turn },
    /// It has the volume; the lock is in the record.
    Has(Arc<Serving>),
    /// It let go of the volume.
    LetGo,
}

impl Handover {
    /// For a process that has the volume.
    pub fn holding(parts: Parts, disk: Arc<Disk>, lock: VolumeLock) -> Result<Self> {
        let failure = Arc::default();
        let serving = parts.serve(&failure, disk)?;
        parts.hold(lock);
        Ok(Self::new(parts, failure, State::Has(serving)))
    }

    /// For a process that is to have it next.
    pub fn waiting(parts: Parts, turn: Turn) -> Self {
        Self::new(parts, Arc::default(), State::Waiting { _turn: turn })
    }

    fn new(parts: Parts, failure: Arc<Mutex<Option<String>>>, state: State) -> Self {
        Handover { parts, failure, state: Mutex::new(state), guest: Mutex::new(Guest::Unknown) }
    }

    /// Ends serving: threads end, then what they wrote is made durable. The lock stays in the record.
    pub fn end(&self) -> Result<()> {
        let volume = self.parts.opener.volume();
        let State::Has(serving) = std::mem::replace(&mut *self.state(), State::LetGo) else { return Ok(()) };
        if *self.guest() == Guest::Gone {
            self.parts.record.note_write_through(false);
        }
        let disk = serving.disk();
        drop(serving);
        let flushed = disk.flush().map_err(|e| Error::from(e).context(format!("flush {volume}")));
        match self.failure().take() {
            Some(reason) => Err(Error::new(Kind::Other, format!("serve {volume}: {reason}"))),
            None => flushed,
        }
    }

    /// Takes the volume, waiting for who has it.
    fn take(&self) -> Result<Arc<Serving>> {
        let lock = self.wait_for_lock()?;
        // Whoever had it may have changed all of it but what the data keys are: everything is read and proved anew.
        let (disk, grew) = self.parts.opener.open(&lock)?;
        if grew {
            self.parts.channel.announce_config_change();
        }
        log::info!("{} is attached: {}", lock.volume(), disk.describe());
        let serving = self.parts.serve(&self.failure, disk)?;
        self.parts.hold(lock);
        Ok(serving)
    }

    /// Waits until nobody else has a hold of it, who could write.
    fn is_alone(&self, serving: &Arc<Serving>) -> bool {
        let limit = Instant::now() + PATIENCE;
        while Arc::strong_count(serving) > 1 {
            if Instant::now() > limit {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    fn wait_for_lock(&self) -> Result<VolumeLock> {
        let limit = Instant::now() + PATIENCE;
        loop {
            let holder = Holder { since: Timestamp::now(), ..self.parts.holder.clone() };
            match self.parts.lock_file.acquire_awaited(&holder) {
                Err(e)
                    if e.kind() == Kind::Busy && Instant::now() < limit && !self.parts.stop.is_stopped() =>
                {
                    std::thread::sleep(LOOK);
                }
                result => return result,
            }
        }
    }

    /// Lets go of the volume if somebody waits for it and no ring runs: also when both came about in the other order, the
    /// guest having been paused first. It ends with this process.
    pub fn heed_announcements(self: &Arc<Self>) -> Result<()> {
        let announcements = self.parts.lock_file.announcements()?;
        let handover = Arc::downgrade(self);
        let heed = move || {
            while let Ok(()) = announcements.wait().inspect_err(|e| log::error!("{e}")) {
                // Not kept meanwhile: it has the data keys.
                let Some(handover) = handover.upgrade() else { return };
                handover.let_go_if_awaited(false);
            }
        };
        std::thread::Builder::new().name("hand-over".into()).spawn(heed)?;
        Ok(())
    }

    /// With `drained`, the rings have dropped what they had of it, and whoever else has it is about to.
    fn let_go_if_awaited(&self, drained: bool) {
        let mut state = self.state();
        let State::Has(serving) = &*state else { return };
        if !drained && Arc::strong_count(serving) > 1 {
            return;
        }
        let volume = self.parts.opener.volume();
        match self.parts.lock_file.is_awaited() {
            Ok(true) => {}
            Ok(false) => return,
            Err(e) => return log::error!("{e}; the volume stays here"),
        }
        // A thread that died may have lost requests.
        if !self.is_alone(serving) || self.failure().is_some() {
            return log::error!("{volume} is in use yet; it stays here");
        }
        if let Err(e) = serving.disk().flush() {
            return log::error!("{volume}: {e}; it stays here, since data may be lost");
        }
        log::info!("no ring runs, and another process waits for {volume}: letting go of it");
        // Threads end and layers are closed with this; only then may another have it.
        *state = State::LetGo;
        self.parts.record.release();
        if *self.guest() != Guest::Here {
            // There is nobody who could want it back.
            self.parts.stop.stop();
        }
    }

    fn failure(&self) -> MutexGuard<'_, Option<String>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tenure for Handover {
    fn claim(&self) -> io::Result<Arc<Serving>> {
        *self.guest() = Guest::Here;
        let mut state = self.state();
        if let State::Has(serving) = &*state {
            return Ok(serving.clone());
        }
        log::info!("a ring is to run: taking {}", self.parts.opener.volume());
        let serving = self.take().map_err(io::Error::other)?;
        // With the state before goes the place of who is to have it next.
        *state = State::Has(serving.clone());
        (self.parts.taken)();
        Ok(serving)
    }

    fn serving(&self) -> Option<Arc<Serving>> {
        match &*self.state() {
            State::Has(serving) => Some(serving.clone()),
            State::Waiting { .. } | State::LetGo => None,
        }
    }

    fn rest(&self) {
        self.let_go_if_awaited(true);
    }

    fn guest_chose(&self, write_through: bool) {
        self.parts.record.note_write_through(write_through);
    }

    fn vmm_left(&self) -> bool {
        *self.guest() = Guest::Gone;
        self.let_go_if_awaited(false);
        !matches!(*self.state(), State::LetGo)
    }
}

impl Parts {
    /// The volume is this process's, and its guest wants what it wanted of the one before.
    fn hold(&self, lock: VolumeLock) {
        self.writeback.store(!lock.write_through(), Ordering::Relaxed);
        self.record.hold(lock);
    }

    /// Starts a thread for each queue.
    fn serve(&self, failure: &Arc<Mutex<Option<String>>>, disk: Arc<Disk>) -> Result<Arc<Serving>> {
        let spawn = |index: usize| {
            let (stop, failure) = (self.stop.clone(), failure.clone());
            let cpu = self.cpus.get(index % self.cpus.len().max(1)).copied();
            let tuning = Tuning { cpu, ..self.tuning.clone() };
            Worker::spawn(index, disk.clone(), tuning, move |reason| {
                log::error!("{reason}");
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                stop.stop();
            })
        };
        let workers: Vec<Worker> = (0..self.queues.into()).map(spawn).collect::<io::Result<_>>()?;
        Ok(Serving::new(disk, workers))
    }
}
