//! Hydration in the host process: while the volume is attached, a thread copies up what its leaving layers
//! hold, and then takes them out of its chain.
//!
//! It begins whenever this process serves a volume that is marked for it, and is stopped before anything else
//! changes the volume's layers, and before the volume is let go of. There is at most one job at a time.
//! Whatever goes wrong in it is reported and tried again, and never is the guest's affair.
//!
//! What is left when the layers have left the chain is their files: this process, which is confined, reaches
//! none but those in its volume's folder. They are removed by whoever comes next
//! ([`crate::catalog::leaving`]).

use super::switch;
use crate::base::root::files;
use crate::base::space::{Reserve, Shortage};
use crate::base::sync::Locked;
use crate::base::{Context, Result};
use crate::catalog::lock::VolumeLock;
use crate::catalog::{Catalog, LayerId, Metadata, SnapshotId, VolumeId, leaving};
use crate::crypt::SealKey;
use crate::disk::Disk;
use crate::disk::hydrate::{End, Hydration, TellOfSpace};
use crate::events::{Event, EventLog};
use crate::helper::grants::Keeper;
use crate::host::keyring::Keyring;
use crate::host::keys_held::KeysHeld;
use crate::host::state::{Record, State};
use crate::host::status::Progress;
use crate::kms::KmsKey;
use crate::volume::layers::{self, Layer};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long after a freeze layers stay in the chain: whoever makes the snapshot notes it by then, which takes
/// that its volume still names them.
const GRACE: Duration = Duration::from_secs(5);
/// How long to wait after a failure: at first, and at most.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How long after an event that a copy waits for space there is no other: the guest may free and fill
/// a little again and again.
const QUIET: Duration = Duration::from_secs(600);

/// What has to do with the data keys of an attached volume.
pub(crate) struct Keys {
    /// The keys.
    pub(crate) ring: Arc<Keyring>,
    /// What the audit log is told of them.
    pub(crate) held: Arc<Mutex<Option<KeysHeld>>>,
    /// The grants by which they were unwrapped.
    pub(crate) grants: Arc<Keeper>,
}

/// What hydrates an attached volume.
pub struct Hydrator {
    record: Weak<Record>,
    keys: Keys,
    events: EventLog,
    rate: AtomicU64,
    /// What is left free of the file system.
    reserve: Mutex<Reserve>,
    /// When an event has told that the copy waits for space.
    told_of_shortage: Mutex<Option<Instant>>,
    /// Snapshots that are being noted, and until when layers stay for each at most.
    noting: Mutex<Vec<(SnapshotId, Instant)>>,
    current: Mutex<Option<Current>>,
    /// By which KMS keys the data keys were unwrapped, in the order of the volume's keys.
    unwrapped_by: Mutex<Vec<KmsKey>>,
}

struct Current {
    job: Arc<Job>,
    thread: JoinHandle<()>,
}

impl Hydrator {
    /// One that reports to `events`, at `rate` bytes a second (0: no limit), and leaves `reserve` free.
    pub(crate) fn new(keys: Keys, events: EventLog, rate: u64, reserve: Reserve) -> Self {
        Hydrator {
            record: Weak::new(),
            keys,
            events,
            rate: rate.into(),
            reserve: Mutex::new(reserve),
            told_of_shortage: Mutex::default(),
            noting: Mutex::default(),
            current: Mutex::default(),
            unwrapped_by: Mutex::default(),
        }
    }

    /// This hydrator, for the volume of this record.
    pub(crate) fn of(self, record: Weak<Record>) -> Self {
        Hydrator { record, ..self }
    }

    /// Has layers stay until a snapshot is [noted](Hydrator::noted), or a moment has passed.
    pub(crate) fn stay_for(&self, snapshot: SnapshotId) {
        let now = Instant::now();
        let mut noting = self.noting.locked();
        noting.retain(|(_, until)| *until > now);
        noting.push((snapshot, now + GRACE));
    }

    /// A snapshot is noted: layers need not stay for it.
    pub(crate) fn noted(&self, snapshot: SnapshotId) {
        self.noting.locked().retain(|(id, _)| *id != snapshot);
    }

    /// Until when layers stay in the chain.
    fn stay_until(&self) -> Instant {
        self.noting.locked().iter().map(|(_, until)| *until).max().unwrap_or_else(Instant::now)
    }

    /// At most so many bytes a second are copied; 0: no limit.
    pub(crate) fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    /// What is left free of the file system.
    pub(crate) fn reserve(&self) -> Reserve {
        *self.reserve.locked()
    }

    /// Begins, if there is something to be copied up; none is at it.
    pub(crate) fn begin(&self, state: &State) {
        if state.read_only || state.metadata.layout().leaving() == 0 {
            return;
        }
        if let Err(e) = self.start(state) {
            log::error!("{} is not hydrated: {e}; the next attach does it", state.metadata.id());
        }
    }

    fn start(&self, state: &State) -> Result<()> {
        let disk = state.serving()?.disk();
        let hydration = Hydration::new(disk, self.rate.load(Ordering::Relaxed))?;
        hydration.set_reserve(*self.reserve.locked());
        let until = self.stay_until();
        let job = Arc::new(Job::new(hydration));
        let (record, run) = (self.record.clone(), job.clone());
        let (volume, key) = (state.metadata.id(), kms_key(&state.metadata).map(String::from));
        let work = move || {
            let finish = || record.upgrade()?.finish_hydration(&run);
            let failed = |cause: &str| {
                if let Some(record) = record.upgrade() {
                    record.report_failed_hydration(&run, cause);
                }
            };
            // Whoever stops the copy waits for this, and may have the record: the volume is known beforehand.
            let told = |short: Option<&Shortage>| {
                if let Some(record) = record.upgrade() {
                    record.hydrator.tell_of_space(volume, key.as_deref(), short);
                }
            };
            run.work(until, finish, failed, &told);
        };
        let thread = std::thread::Builder::new().name("hydration".into()).spawn(work)?;
        log::info!("{}: hydrating it from its lower layers", state.metadata.id());
        *self.current() = Some(Current { job, thread });
        Ok(())
    }

    /// Ends what is going on, which is to be begun anew. Nothing is copied any more when this returns,
    /// and nobody has the disk.
    pub(crate) fn stop(&self) {
        let current = self.current().take();
        if let Some(current) = current {
            current.job.stop();
        }
    }

    /// Ends it for good, and wipes the data keys that would be needed to open the volume again.
    pub(crate) fn end(&self) {
        self.keys.ring.wipe();
        let current = self.current().take();
        if let Some(Current { job, thread }) = current {
            job.stop();
            if thread.join().is_err() {
                log::error!("the hydration's thread panicked");
            }
        }
    }

    /// Whether a snapshot may still be being noted, which takes that its volume names all of its layers.
    pub(super) fn is_noting(&self) -> bool {
        self.stay_until() > Instant::now()
    }

    fn is_current(&self, job: &Arc<Job>) -> bool {
        self.current().as_ref().is_some_and(|current| Arc::ptr_eq(&current.job, job))
    }

    fn current(&self) -> MutexGuard<'_, Option<Current>> {
        self.current.locked()
    }

    /// The volume has got a data key: nothing is done with it before that is on record.
    pub(crate) fn note_new_key(&self, volume: &Metadata) -> Result<()> {
        match &mut *self.keys.held.locked() {
            Some(held) => held.follow(volume),
            None => Ok(()),
        }
    }

    /// Keeps a data key that the volume has got.
    pub(crate) fn keyring(&self) -> &Keyring {
        &self.keys.ring
    }

    /// The volume has fewer data keys: wipes the others.
    pub(crate) fn forget_old_keys(&self, volume: &Metadata) {
        self.keys.ring.keep(volume);
        if let Err(e) = self.note_new_key(volume) {
            log::error!("a data key was wiped, and the audit log does not tell: {e}");
        }
    }

    /// By which KMS keys the volume's data keys were unwrapped, in its order.
    pub(crate) fn unwrapped_by(&self) -> MutexGuard<'_, Vec<KmsKey>> {
        self.unwrapped_by.locked()
    }

    /// Says that the copy waits for space, or that it goes on; how often, the guest must not decide.
    fn tell_of_space(&self, volume: VolumeId, key: Option<&str>, short: Option<&Shortage>) {
        let mut told = self.told_of_shortage.locked();
        let Some(short) = short else {
            return log::info!("{volume}: there is space again: the copy from its lower layers goes on");
        };
        if told.is_some_and(|told| told.elapsed() < QUIET) {
            return;
        }
        *told = Some(Instant::now());
        log::warn!("{volume}: the copy from its lower layers waits: {short}");
        self.events.record(&Event::hydrate_waits(volume, key, short.to_string()));
    }

    /// Reports how far it has come.
    pub(crate) fn report(&self, volume: &Metadata, result: &'static str) {
        self.events.record(&Event::hydrate_volume(volume.id(), kms_key(volume), result));
    }
}

/// The KMS key under which everything is going to be.
pub(crate) fn kms_key(volume: &Metadata) -> Option<&str> {
    volume.top().key.map(|n| volume.keys()[n].first().wrapped.key_id.as_str())
}

impl Record {
    /// Begins to copy up what is to be, if anything.
    pub(crate) fn begin_hydration(&self) {
        if let Some(state) = &*self.state() {
            self.hydrator.begin(state);
        }
    }

    /// How far it has come; `None` if nothing is being copied up.
    pub fn hydration(&self) -> Option<Progress> {
        let current = self.hydrator.current();
        let job = &current.as_ref()?.job;
        let slot = job.slot();
        let left = slot.hydration.as_ref()?.left();
        let rate = self.hydrator.rate.load(Ordering::Relaxed);
        let short = slot.hydration.as_ref()?.shortage();
        let problem = short.as_ref().map(ToString::to_string).or_else(|| slot.problem.clone());
        let reserve = self.hydrator.reserve.locked().given();
        Some(Progress { left, rate, problem, waits_for_space: short.is_some(), reserve })
    }

    /// Changes the rate, bytes a second, of what is being and will be copied up; 0: no limit.
    pub fn set_hydrate_rate(&self, rate: u64) {
        self.hydrator.rate.store(rate, Ordering::Relaxed);
        if let Some(current) = &*self.hydrator.current()
            && let Some(hydration) = &current.job.slot().hydration
        {
            hydration.set_rate(rate);
        }
    }

    /// Changes what is left free of the file system by what is being and will be copied up.
    pub fn set_space_reserve(&self, reserve: Reserve) {
        *self.hydrator.reserve.locked() = reserve;
        if let Some(current) = &*self.hydrator.current()
            && let Some(hydration) = &current.job.slot().hydration
        {
            hydration.set_reserve(reserve);
        }
    }

    /// Everything was copied up: the layers leave, unless the job is another's meanwhile. The queues are
    /// paused while `volume.json` is replaced. As long as it names the lower layers, a hole in the top would
    /// let their old data show through; once it does not, the queues may make holes.
    fn finish_hydration(&self, job: &Arc<Job>) -> Option<Result<()>> {
        let mut guard = self.state();
        let state = guard.as_mut().filter(|_| self.hydrator.is_current(job))?;
        if let Err(e) = self.let_layers_leave(state) {
            job.note(Some(e.to_string()));
            return Some(Err(e));
        }
        self.hydrator.report(&state.metadata, "completed");
        let volume = state.metadata.clone();
        // With it go the layers that have left, and their ciphers.
        drop(job.slot().hydration.take());
        drop(guard);
        // That takes a while.
        self.hydrator.keys.grants.retire_others_than_of(&volume);
        let mut current = self.hydrator.current();
        // This thread ends by itself.
        drop(current.take_if(|current| Arc::ptr_eq(&current.job, job)));
        Some(Ok(()))
    }

    fn let_layers_leave(&self, state: &mut State) -> Result<()> {
        let left: Vec<_> = state.metadata.layout().leaving_layers().iter().map(|l| l.id).collect();
        self.take_out(state, &left, leaving::commit)
    }

    /// Has the queues go on without the layers `left`, which `commit` takes out of the record.
    ///
    /// # Errors
    /// As [`switch`]; what `commit` says.
    pub(super) fn take_out(
        &self,
        state: &mut State,
        left: &[LayerId],
        commit: impl FnOnce(&Catalog, &VolumeLock, &mut Metadata, Option<&SealKey>) -> Result<()>,
    ) -> Result<()> {
        let stays: Vec<bool> =
            state.metadata.layers().iter().map(|layer| !left.contains(&layer.id)).collect();
        let is_used = |n: usize| {
            state.metadata.layers().iter().zip(&stays).any(|(layer, &stays)| stays && layer.key == Some(n))
        };
        let keys: Vec<bool> = (0..state.metadata.keys().len()).map(is_used).collect();
        let next = |disk: &Arc<Disk>, state: &State| {
            let next = state.layers.iter().zip(&stays).filter(|(_, stays)| **stays);
            let next: Vec<Layer> = next.map(|(layer, _)| layer.clone()).collect();
            let disk = disk.with_layers(disk.shape(), layers::chain(&next));
            Ok((disk.context(|| "open its layers")?, next))
        };
        let ((), pause) = switch(state, next, |state| {
            commit(&self.catalog, &state.lock, &mut state.metadata, state.seal_key.as_ref())
        })?;
        let id = state.metadata.id();
        log::info!("{id}: {} layers have left its chain; the queues stood still for {pause:?}", left.len());
        for &layer in left {
            // Those that this process has made have a second name, in its own folder.
            let _ = files::remove(&self.catalog.own_layer_path(id, layer));
        }
        let mut keys = keys.into_iter();
        self.hydrator.unwrapped_by().retain(|_| keys.next().unwrap_or(true));
        self.hydrator.forget_old_keys(&state.metadata);
        Ok(())
    }

    /// Reports that a hydration does not go on.
    fn report_failed_hydration(&self, job: &Arc<Job>, cause: &str) {
        let state = self.state();
        let Some(state) = state.as_ref().filter(|_| self.hydrator.is_current(job)) else { return };
        let (id, key) = (state.metadata.id(), kms_key(&state.metadata));
        log::error!("hydrating {id}: {cause}; it is tried again");
        self.hydrator.events.record(&Event::hydrate_failed(id, key, cause));
    }
}

/// One hydration, from its beginning until it is complete or stopped.
struct Job {
    slot: Mutex<Slot>,
    changed: Condvar,
}

struct Slot {
    /// `None` once the copy is stopped.
    hydration: Option<Arc<Hydration>>,
    running: bool,
    problem: Option<String>,
}

impl Job {
    fn new(hydration: Arc<Hydration>) -> Self {
        let slot = Slot { hydration: Some(hydration), running: false, problem: None };
        Job { slot: Mutex::new(slot), changed: Condvar::new() }
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.locked()
    }

    fn note(&self, problem: Option<String>) {
        self.slot().problem = problem;
    }

    /// Returns when nothing is copied any more, and nobody has the disk.
    fn stop(&self) {
        let mut slot = self.slot();
        if let Some(hydration) = slot.hydration.take() {
            hydration.stop();
        }
        self.changed.notify_all();
        while slot.running {
            slot = self.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until then; returns whether it was not stopped.
    fn wait_until(&self, due: Instant) -> bool {
        let mut slot = self.slot();
        while slot.hydration.is_some() {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            slot = self.changed.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// Copies, once.
    fn copy(&self, told: TellOfSpace<'_>) -> std::io::Result<End> {
        let hydration = {
            let mut slot = self.slot();
            let Some(hydration) = slot.hydration.clone() else { return Ok(End::Stopped) };
            slot.running = true;
            hydration
        };
        let result = hydration.run_telling(told);
        drop(hydration);
        let mut slot = self.slot();
        slot.running = false;
        slot.problem = result.as_ref().err().map(ToString::to_string);
        self.changed.notify_all();
        result
    }

    /// The thread: copies everything, and then has `finish` done, not before `until`; as often as it
    /// takes. `finish` returns nothing if there is nothing to finish any more. `failed` is told of each
    /// reason for another try once, and `told` of waiting for space.
    fn work(
        &self,
        until: Instant,
        finish: impl Fn() -> Option<Result<()>>,
        failed: impl Fn(&str),
        told: TellOfSpace<'_>,
    ) {
        let (mut pause, mut reported, mut is_complete) = (RETRY, String::new(), false);
        loop {
            let copied = if is_complete { Ok(End::Complete) } else { self.copy(told) };
            let cause = match copied {
                Ok(End::Stopped) => return,
                Ok(End::Complete) => {
                    is_complete = true;
                    if !self.wait_until(until) {
                        return;
                    }
                    match finish() {
                        None | Some(Ok(())) => return,
                        Some(Err(e)) => e.to_string(),
                    }
                }
                Err(e) if e.kind() == ErrorKind::ResourceBusy => return,
                Err(e) => e.to_string(),
            };
            if reported != cause {
                failed(&cause);
                reported = cause;
            }
            if !self.wait_until(Instant::now() + pause) {
                return;
            }
            pause = (pause * 2).min(RETRY_MAX);
        }
    }
}
