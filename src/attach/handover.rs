//! Which process of two has the volume, while a guest moves from one VMM to another (docs/migration.md).
//!
//! The volume's lock decides: who has it may read and write, nobody else. The source lets go of it whenever its VMM has
//! stopped all rings and a destination waits for it, with everything drained and durable; the destination takes it
//! when its VMM starts a ring. Should the source's VMM go on instead, the source takes it back in the same way.

use super::Opener;
use crate::error::{Error, Kind, Result};
use crate::observe::Timestamp;
use crate::vhost::gate::Channel;
use crate::vhost::server::Stop;
use crate::vhost::tenure::{Serving, Tenure};
use crate::vhost::worker::{Tuning, Worker};
use crate::volume::io::Disk;
use crate::volume::lock::{Holder, LockFile, Turn, VolumeLock};
use std::io;
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
}

/// What a [`Handover`] is made of.
pub struct Parts {
    /// How the volume is opened.
    pub opener: Opener,
    /// Its lock.
    pub lock_file: LockFile,
    /// What the lock's file says of this process.
    pub holder: Holder,
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
    /// Called when this process has got the volume from another.
    pub taken: Box<dyn Fn() + Send + Sync>,
}

enum State {
    /// Its VMM is to start, once the source's has stopped.
    Waiting { _turn: Turn },
    /// It has the volume. Dropped in this order: threads and the layer first.
    Has { serving: Arc<Serving>, lock: VolumeLock },
    /// It let go of the volume.
    LetGo,
}

impl Handover {
    /// For a process that has the volume.
    pub fn holding(parts: Parts, disk: Arc<Disk>, lock: VolumeLock) -> Result<Self> {
        let failure = Arc::default();
        let serving = parts.serve(&failure, disk)?;
        Ok(Handover { parts, failure, state: Mutex::new(State::Has { serving, lock }) })
    }

    /// For a process that is to have it next.
    pub fn waiting(parts: Parts, turn: Turn) -> Self {
        Handover { parts, failure: Arc::default(), state: Mutex::new(State::Waiting { _turn: turn }) }
    }

    /// Ends serving: threads end, then what they wrote is made durable, and with the disk its keys go. Answers the
    /// volume's lock, if this process has it still.
    pub fn end(&self) -> (Result<()>, Option<VolumeLock>) {
        let state = std::mem::replace(&mut *self.state(), State::LetGo);
        let State::Has { serving, lock } = state else { return (Ok(()), None) };
        let disk = serving.disk.clone();
        drop(serving);
        let flushed = disk.flush().map_err(|e| Error::from(e).context(format!("flush {}", lock.volume())));
        drop(disk);
        let result = match self.failure().take() {
            Some(reason) => Err(Error::new(Kind::Other, format!("serve {}: {reason}", lock.volume()))),
            None => flushed,
        };
        (result, Some(lock))
    }

    /// Takes the volume, waiting for who has it.
    fn take(&self) -> Result<(Arc<Serving>, VolumeLock)> {
        let lock = self.wait_for_lock()?;
        // Whoever had it may have changed all of it but what the data keys are: everything is read and proved anew.
        let before = self.parts.opener.geometry().now();
        let disk = self.parts.opener.open(&lock)?;
        if disk.geometry() != before {
            self.parts.channel.announce_config_change();
        }
        Ok((self.parts.serve(&self.failure, disk)?, lock))
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

    fn failure(&self) -> MutexGuard<'_, Option<String>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tenure for Handover {
    fn claim(&self) -> io::Result<Arc<Serving>> {
        let mut state = self.state();
        if let State::Has { serving, .. } = &*state {
            return Ok(serving.clone());
        }
        log::info!("a ring is to run: taking {}", self.parts.opener.volume());
        let (serving, lock) = self.take().map_err(io::Error::other)?;
        log::info!("{} is attached: {}", lock.volume(), serving.disk.describe());
        // With the state before goes the place of who is to have it next.
        *state = State::Has { serving: serving.clone(), lock };
        (self.parts.taken)();
        Ok(serving)
    }

    fn rest(&self) {
        let mut state = self.state();
        let State::Has { serving, lock } = &*state else { return };
        match self.parts.lock_file.is_awaited() {
            Ok(true) => {}
            Ok(false) => return,
            Err(e) => return log::error!("{e}; the volume stays here"),
        }
        // Rings have dropped theirs, and whoever has another may write; a thread that died may have lost requests.
        if Arc::strong_count(serving) > 1 || self.failure().is_some() {
            return log::error!("{} is in use yet; it stays here", lock.volume());
        }
        if let Err(e) = serving.disk.flush() {
            return log::error!("{}: {e}; it stays here, since data may be lost", lock.volume());
        }
        log::info!("no ring runs, and another process waits for {}: letting go of it", lock.volume());
        *state = State::LetGo;
    }

    fn vmm_left(&self) -> bool {
        !matches!(*self.state(), State::LetGo)
    }
}

impl Parts {
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
        Ok(Arc::new(Serving { workers, disk }))
    }
}
