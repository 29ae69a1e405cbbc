//! Which process of two has the volume, while a guest moves from one VMM to another (docs/migration.md).
//!
//! The volume's lock decides: who has it may read and write, nobody else. The source lets go of it whenever
//! its VMM has stopped all rings and a destination waits for it, with everything drained and durable; the
//! destination takes it when its VMM starts a ring. Should the source's VMM go on instead, the source takes
//! it back in the same way.
//!
//! The queues' threads stay, with or without a disk: in a confined process their io_urings
//! cannot be made again.

use crate::base::sync::Locked;
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::VolumeId;
use crate::catalog::lock::{Announcements, Holder, LockFile, Turn, VolumeLock};
use crate::disk::Disk;
use crate::events::{Event, EventLog};
use crate::host::keyring::Keyring;
use crate::host::opener::Opener;
use crate::host::state::{Record, State as Held};
use crate::vhost::gate::Channel;
use crate::vhost::listener::Stop;
use crate::vhost::queue::counters::Counters;
use crate::vhost::queue::{Tuning, Worker};
use crate::vhost::tenure::{Serving, Tenure};
use crate::volume::layers::{self, PassedLocks};
use crate::volume::open::{Opened, shape};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

/// How long a ring that is to run waits for the process that has the volume. Its VMM has drained by then.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often to look whether it has let go: nothing tells, since it may be on another machine.
const LOOK: Duration = Duration::from_millis(5);

/// This process's part in who has the volume.
pub struct Handover {
    parts: Parts,
    workers: Arc<[Worker]>,
    /// Why a queue's thread died, which ends the process.
    failure: Arc<Mutex<Option<String>>>,
    state: Mutex<State>,
    /// What [`State::Has`] has, for whoever must not wait for the state.
    serving: Mutex<Weak<Serving>>,
    guest: Mutex<Guest>,
}

/// What a [`Handover`] is made of.
pub struct Parts {
    /// How the volume is opened.
    pub opener: Opener,
    /// The volume's lock file.
    pub lock_file: LockFile,
    /// What the lock's file says of this process.
    pub holder: Holder,
    /// What this process knows of the volume, with the lock, while it has it.
    pub record: Arc<Record>,
    /// The VMM's own channel.
    pub channel: Arc<Channel>,
    /// Ends the process when a queue's thread dies; ends waiting for the volume.
    pub stop: Arc<Stop>,
    /// Where it is told that a flush failed.
    pub events: EventLog,
    /// The `writeback` byte of the device.
    pub writeback: Arc<AtomicBool>,
    /// Called when this process has got the volume from another.
    pub taken: Box<dyn Fn() + Send + Sync>,
}

/// What is known of the guest here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// No VMM has connected yet; one that served it before may be about to.
    Unknown,
    /// The guest's VMM is connected.
    Here,
    /// The guest has left with its VMM.
    Gone,
}

enum State {
    /// This process's VMM is to start, once the source's has stopped.
    Waiting { _turn: Turn },
    /// This process has the volume; the lock is in the record. Whether rings run is `in_use`.
    Has { serving: Arc<Serving>, in_use: bool },
    /// This process has let go of the volume, or has not begun yet.
    LetGo,
}

impl Handover {
    /// Starts the queues' threads, which have no disk yet, bound to these CPUs, one after the other and
    /// from the beginning again.
    pub fn new(parts: Parts, queues: u16, cpus: &[usize], tuning: &Tuning) -> Result<Arc<Self>> {
        let failure: Arc<Mutex<Option<String>>> = Arc::default();
        let spawn = |index: usize| {
            let (stop, failure) = (parts.stop.clone(), failure.clone());
            let cpu = cpus.get(index % cpus.len().max(1)).copied();
            Worker::spawn(index, None, Tuning { cpu, ..tuning.clone() }, move |reason| {
                log::error!("{reason}");
                *failure.locked() = Some(reason);
                stop.stop();
            })
        };
        let workers: Vec<Worker> = (0..queues.into()).map(spawn).collect::<io::Result<_>>()?;
        let (state, guest) = (Mutex::new(State::LetGo), Mutex::new(Guest::Unknown));
        let (workers, serving) = (workers.into(), Mutex::default());
        Ok(Arc::new(Handover { parts, workers, failure, state, serving, guest }))
    }

    /// This process has the volume, opened so.
    pub(super) fn begin(&self, opened: Opened, lock: VolumeLock) -> Result<()> {
        *self.state() = State::Has { serving: self.serve(opened, lock)?, in_use: false };
        self.parts.record.begin_hydration();
        Ok(())
    }

    /// This process goes on where `predecessor`, who has the volume by `lock`, has stopped: the volume is
    /// opened, and `commit` makes it this process's. Returns once rings can run.
    ///
    /// # Errors
    /// What keeps the volume from being opened; what `commit` says. The volume is the predecessor's still.
    pub(super) fn succeed(
        &self,
        lock: VolumeLock,
        passed: &PassedLocks,
        commit: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let opened = self.parts.opener.open(&lock, passed)?;
        let serving = self.serve(opened, lock)?;
        if let Err(e) = commit() {
            // The lock is the predecessor's, and nothing here lets go of it.
            drop(self.parts.record.state().take());
            drop(self.give_up(serving));
            return Err(e);
        }
        for image_lock in &passed.image_locks {
            image_lock.keep();
        }
        *self.state() = State::Has { serving, in_use: false };
        Ok(())
    }

    /// What [`Handover::succeed`] leaves for when rings run: the volume says whose it is, and goes on being
    /// hydrated.
    pub(super) fn settle(&self) {
        if let Some(state) = &mut *self.parts.record.state() {
            state.lock.keep();
        }
        (self.parts.taken)();
        self.parts.record.begin_hydration();
    }

    /// Another process has the volume from now on, with the locks by which this one has it: nothing is
    /// written any more by this process, and no lock is let go of. The queues are drained.
    pub(super) fn leave(&self, held: &mut Option<Held>) {
        let state = std::mem::replace(&mut *self.state(), State::LetGo);
        if let Some(mut held) = held.take() {
            held.lock.leave();
            held.layers.iter().for_each(|layer| layer.image_lock.leave());
        }
        drop(state);
    }

    /// The volume.
    pub(super) fn volume(&self) -> VolumeId {
        self.parts.opener.volume
    }

    /// What is kept of its data keys.
    pub(super) fn keys(&self) -> Arc<Keyring> {
        self.parts.opener.keys.clone()
    }

    /// This process is to have it next.
    pub fn wait(&self, turn: Turn) -> Result<()> {
        *self.state() = State::Waiting { _turn: turn };
        Ok(())
    }

    /// How the volume is reached, and by which cipher engine, for people: by this disk, if there is one.
    pub(super) fn describe(&self, disk: Option<&Disk>) -> String {
        disk.map_or_else(|| self.parts.opener.how.clone(), Disk::describe)
    }

    /// What the queues serve, if this process has the volume. Waits while they stand still.
    pub(super) fn disk(&self) -> Option<Arc<Disk>> {
        self.serving().map(|serving| serving.disk())
    }

    /// As [`Handover::disk`], without waiting: `None` while the queues stand still.
    pub(super) fn disk_at_once(&self) -> Option<Option<Arc<Disk>>> {
        self.serving().map(|serving| serving.disk_at_once()).map_or(Some(None), |disk| disk.map(Some))
    }

    /// Lets go of the volume also if no ring ran any more when somebody came to wait for it: a guest that was
    /// paused before can be moved, too. It ends with this process.
    pub fn heed(self: &Arc<Self>, announcements: Announcements) -> Result<()> {
        let handover = Arc::downgrade(self);
        let heed = move || {
            while let Ok(()) = announcements.wait().inspect_err(|e| log::error!("{e}")) {
                // Not kept meanwhile: it has the data keys.
                let Some(handover) = handover.upgrade() else { return };
                handover.let_go_if_awaited();
            }
        };
        std::thread::Builder::new().name("hand-over".into()).spawn(heed)?;
        Ok(())
    }

    /// Ends serving: what was written is made durable. The lock stays in the record.
    pub fn end(&self) -> Result<()> {
        let volume = self.parts.opener.volume;
        if *self.guest() == Guest::Gone {
            self.parts.record.note_write_through(false);
        }
        let state = std::mem::replace(&mut *self.state(), State::LetGo);
        let State::Has { serving, .. } = state else { return Ok(()) };
        let flushed = serving.disk().flush().context(|| format!("flush {volume}"));
        let dropped = self.give_up(serving);
        match self.failure().take() {
            Some(reason) => Err(Error::new(Kind::Other, format!("serve {volume}: {reason}"))),
            None => flushed.and(dropped),
        }
    }

    /// Takes the volume, waiting for the process that has it.
    fn take(&self) -> Result<Arc<Serving>> {
        let lock = self.wait_for_lock()?;
        // Whoever had it may have changed all of it but what the data keys are: everything
        // is read and proved anew.
        let opened = self.parts.opener.open(&lock, &PassedLocks::default())?;
        let serving = self.serve(opened, lock)?;
        self.parts.record.begin_hydration();
        Ok(serving)
    }

    fn serve(&self, opened: Opened, lock: VolumeLock) -> Result<Arc<Serving>> {
        let Parts { opener, record, channel, writeback, .. } = &self.parts;
        let Opened { metadata, seal_key, layers, unwrapped_by } = opened;
        let shape = shape(metadata.geometry(), opener.options.read_only);
        let disk = Disk::layered(shape, &opener.serial(), layers::chain(&layers));
        let leaving = if shape.read_only { 0 } else { metadata.layout().leaving() };
        let disk = Arc::new(disk.context(|| "open its layers")?.hydrating_lowest(leaving));
        disk.hear_of_failed_flush(self.tells_of_failed_flush());
        disk.hear_of_refusals(self.tells_of_refusals());
        for worker in &*self.workers {
            worker.hold(Some(disk.clone()))?;
        }
        if opener.shape.grow(shape.sectors) {
            channel.announce_config_change();
        }
        // Its guest wants what it wanted of the process before.
        writeback.store(!lock.write_through(), Ordering::Relaxed);
        let serving = Serving::new(disk, self.workers.clone());
        *self.serving.locked() = Arc::downgrade(&serving);
        let read_only = shape.read_only;
        *record.hydrator.unwrapped_by() = unwrapped_by;
        record.hold(Held { lock, metadata, read_only, seal_key, layers, serving: Arc::downgrade(&serving) });
        Ok(serving)
    }

    /// Reports a flush that failed.
    fn tells_of_failed_flush(&self) -> impl Fn(&io::Error) + Send + Sync + 'static {
        let (events, volume) = (self.parts.events.clone(), self.parts.opener.volume);
        move |e| report(&events, Event::flush_failed(volume, e.to_string()))
    }

    /// Reports requests that failed for want of space.
    fn tells_of_refusals(&self) -> impl Fn(u64, &io::Error) + Send + Sync + 'static {
        let (events, volume) = (self.parts.events.clone(), self.parts.opener.volume);
        move |requests, e| report(&events, Event::write_refused(volume, requests, e))
    }

    /// Whether a flush has failed since this process has the volume.
    pub(super) fn has_failed_flush(&self) -> bool {
        self.disk().is_some_and(|disk| disk.has_failed_flush())
    }

    /// Whether a queue's thread has died, which may have lost requests.
    pub(super) fn has_dead_queue(&self) -> bool {
        self.failure().is_some()
    }

    /// What each queue has counted.
    pub(super) fn counters(&self) -> impl Iterator<Item = &Counters> {
        self.workers.iter().map(Worker::counters)
    }

    fn wait_for_lock(&self) -> Result<VolumeLock> {
        let Parts { lock_file, holder, stop, .. } = &self.parts;
        let limit = Instant::now() + PATIENCE;
        loop {
            let holder = Holder { since: Timestamp::now(), ..holder.clone() };
            match lock_file.acquire_awaited(&holder) {
                Err(e) if e.kind() == Kind::Busy && Instant::now() < limit && !stop.is_stopped() => {
                    std::thread::sleep(LOOK);
                }
                result => return result,
            }
        }
    }

    /// Lets go of the volume if somebody waits for it and no ring runs.
    fn let_go_if_awaited(&self) {
        let mut state = self.state();
        let State::Has { serving, in_use: false } = &*state else { return };
        let volume = self.parts.opener.volume;
        match self.parts.lock_file.is_awaited() {
            Ok(true) => {}
            Ok(false) => return,
            Err(e) => return log::error!("{e}; the volume stays here"),
        }
        // A change that is under way is waited for, and none begins.
        let mut held = self.parts.record.state();
        // A thread that died may have lost requests.
        if self.failure().is_some() {
            return log::error!("{volume} stays here: a queue's thread died");
        }
        self.parts.record.hydrator.stop();
        if let Err(e) = serving.disk().flush() {
            return log::error!("{volume}: {e}; it stays here, since data may be lost");
        }
        log::info!("no ring runs, and another process waits for {volume}: letting go of it");
        let State::Has { serving, .. } = std::mem::replace(&mut *state, State::LetGo) else { return };
        if let Some(held) = &mut *held {
            held.layers.clear();
        }
        if let Err(e) = self.give_up(serving) {
            // Somebody may have the layers open.
            log::error!("{volume} stays here until this process ends: {e}");
            return self.parts.stop.stop();
        }
        // The layers are closed; with this the lock goes, and another may have it. What was made in the
        // volume's folder keeps its name there: the next may not reach the other.
        drop(held.take());
        drop(held);
        if *self.guest() != Guest::Here {
            // There is nobody who could want it back.
            self.parts.stop.stop();
        }
    }

    /// Takes the disk from the threads, and waits until nobody has it any more.
    fn give_up(&self, serving: Arc<Serving>) -> Result<()> {
        let (disk, limit) = (Arc::downgrade(&serving.disk()), Instant::now() + PATIENCE);
        drop(serving);
        self.workers.iter().try_for_each(|worker| worker.hold(None))?;
        while disk.strong_count() > 0 {
            if Instant::now() > limit {
                return Err(Error::new(Kind::Busy, "it is in use"));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn failure(&self) -> MutexGuard<'_, Option<String>> {
        self.failure.locked()
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.locked()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }
}

/// Reports an event by a thread of its own: the disk is in trouble, and a guest waits.
fn report(events: &EventLog, event: Event) {
    let events = events.clone();
    let told = std::thread::Builder::new().name("event".into()).spawn(move || events.record(&event));
    if let Err(e) = told {
        log::error!("an event was lost: {e}");
    }
}

impl Tenure for Handover {
    fn claim(&self) -> io::Result<Arc<Serving>> {
        let mut state = self.state();
        if let State::Has { serving, in_use } = &mut *state {
            *in_use = true;
            return Ok(serving.clone());
        }
        log::info!("a ring is to run: taking {}", self.parts.opener.volume);
        let serving = self.take().map_err(io::Error::other)?;
        log::info!("{} is attached: {}", self.parts.opener.volume, serving.disk().describe());
        // This drops the `Turn` of `Waiting`, so that another process may announce itself.
        *state = State::Has { serving: serving.clone(), in_use: true };
        (self.parts.taken)();
        Ok(serving)
    }

    fn serving(&self) -> Option<Arc<Serving>> {
        self.serving.locked().upgrade()
    }

    fn rest(&self) {
        if let State::Has { in_use, .. } = &mut *self.state() {
            *in_use = false;
        }
        self.let_go_if_awaited();
    }

    fn guest_chose(&self, write_through: bool) {
        self.parts.record.note_write_through(write_through);
    }

    // Not with its first ring: a guest that has not begun, or is only paused, wants its disk as well.
    fn vmm_came(&self) {
        *self.guest() = Guest::Here;
    }

    fn vmm_left(&self) -> bool {
        *self.guest() = Guest::Gone;
        self.let_go_if_awaited();
        !matches!(*self.state(), State::LetGo)
    }
}
