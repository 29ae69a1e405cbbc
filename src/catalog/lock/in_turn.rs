//! Waiting for a volume that another command has for a moment: of two commands at a time, one comes second.
#![forbid(unsafe_code)]

use super::{Held, Holder, LockFile, Purpose, VolumeLock};
use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::VolumeId;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long one command is waited for: as long as a KMS may keep it, by default.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a holder is waited for that does not say who it is: those that will do so take a moment.
const PATIENCE_WITH_UNKNOWN: Duration = Duration::from_secs(30);
/// How long all of them together are waited for that come before this process.
const PATIENCE_WITH_ALL: Duration = Duration::from_secs(600);
/// After what time the log says who is waited for.
const SILENCE: Duration = Duration::from_secs(2);
/// How often to look whether the volume is free: nothing tells.
const LOOK: Duration = Duration::from_millis(20);

impl LockFile {
    /// As [`LockFile::acquire`], except that a command that has the volume for a moment is waited for.
    /// Whoever calls this has no lock that such a command could want.
    ///
    /// # Errors
    /// As for [`LockFile::acquire`]; `Busy` also if the volume does not become free within the time that such
    /// commands take.
    pub fn acquire_in_turn(&self, holder: &Holder) -> Result<VolumeLock> {
        let mut queue = Queue::new(self.volume);
        loop {
            let busy = match self.acquire(&Holder { since: Timestamp::now(), ..holder.clone() }) {
                Err(e) if e.kind() == Kind::Busy => e,
                done => return done,
            };
            let held = self.held()?;
            let is_worth_it = match &held {
                Held::By(holder) | Held::Elsewhere(holder) => holder.purpose.is_brief(),
                Held::Unknown => true,
                // Just let go of; or it is to be handed over, which may be in hours.
                Held::Free => !self.is_awaited()?,
            };
            match is_worth_it {
                true => queue.wait(held, busy)?,
                false => return Err(busy),
            }
        }
    }
}

impl VolumeLock {
    /// As [`VolumeLock::acquire`], except that a command that has the volume for a moment is waited for.
    ///
    /// # Errors
    /// As for [`LockFile::acquire_in_turn`].
    pub fn acquire_in_turn(folder: &Path, volume: VolumeId, holder: &Holder) -> Result<Self> {
        LockFile::open(folder, volume)?.acquire_in_turn(holder)
    }
}

impl Purpose {
    /// Whether a command has a volume no longer than it takes to write a record and to ask a KMS.
    fn is_brief(self) -> bool {
        match self {
            Purpose::Snapshot
            | Purpose::Resize
            | Purpose::Recover
            | Purpose::Rewrap
            | Purpose::Mark
            | Purpose::Rename => true,
            Purpose::Attach | Purpose::Create | Purpose::Delete | Purpose::Export | Purpose::Hydrate => false,
        }
    }
}

/// Those that come before this process.
struct Queue {
    volume: VolumeId,
    begun: Instant,
    /// Who has the volume now, and when this process saw that first.
    first: Option<(Held, Instant)>,
    is_told: bool,
}

impl Queue {
    fn new(volume: VolumeId) -> Self {
        Queue { volume, begun: Instant::now(), first: None, is_told: false }
    }

    /// Waits a moment for `held`.
    ///
    /// # Errors
    /// `busy`, if that has taken too long.
    fn wait(&mut self, held: Held, busy: Error) -> Result<()> {
        let since = match &self.first {
            Some((first, since)) if *first == held => *since,
            _ => self.first.insert((held, Instant::now())).1,
        };
        let patience = match &self.first {
            Some((Held::Unknown, _)) => PATIENCE_WITH_UNKNOWN,
            _ => PATIENCE,
        };
        if since.elapsed() >= patience || self.begun.elapsed() >= PATIENCE_WITH_ALL {
            return Err(busy);
        }
        if self.begun.elapsed() >= SILENCE && !self.is_told {
            self.is_told = true;
            match &self.first {
                Some((Held::By(holder), _)) => log::warn!("{} {holder}; this is waited for", self.volume),
                Some((Held::Elsewhere(holder), _)) => {
                    log::warn!("{} {}; this is waited for", self.volume, holder.doing_anywhere());
                }
                _ => log::warn!("{} is in use by another process; this is waited for", self.volume),
            }
        }
        std::thread::sleep(LOOK);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(purpose: Purpose) -> Holder {
        Holder::this_process(purpose, None).unwrap()
    }

    #[test]
    fn who_comes_for_a_moment_is_waited_for_and_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let id = VolumeId::random();
        let acquire = |purpose| VolumeLock::acquire_in_turn(dir.path(), id, &holder(purpose));
        for purpose in [Purpose::Attach, Purpose::Hydrate, Purpose::Export, Purpose::Create] {
            let _lock = acquire(purpose).unwrap();
            assert_eq!(acquire(Purpose::Snapshot).unwrap_err().kind(), Kind::Busy);
        }
        let brief = [
            Purpose::Snapshot,
            Purpose::Resize,
            Purpose::Recover,
            Purpose::Rewrap,
            Purpose::Mark,
            Purpose::Rename,
        ];
        std::thread::scope(|threads| {
            let first = acquire(Purpose::Snapshot).unwrap();
            let others = brief.map(|purpose| threads.spawn(move || acquire(purpose).map(drop)));
            drop(first);
            others.into_iter().for_each(|other| other.join().unwrap().unwrap());
        });
    }

    #[test]
    fn who_is_to_have_it_next_may_be_long_in_coming() {
        let dir = tempfile::tempdir().unwrap();
        let file = LockFile::open(dir.path(), VolumeId::random()).unwrap();
        let next = LockFile::open(dir.path(), VolumeId::random()).unwrap();
        let _turn = next.announce().unwrap();
        let e = file.acquire_in_turn(&holder(Purpose::Snapshot)).unwrap_err();
        assert!(e.to_string().contains("handed over"), "{e}");
    }

    #[test]
    fn each_has_its_time_and_all_of_them_have_one() {
        let busy = || Error::new(Kind::Busy, "busy");
        let mut queue = Queue::new(VolumeId::random());
        let long_ago = |wait| Instant::now().checked_sub(wait).expect("the machine runs for longer");
        let one = Held::By(holder(Purpose::Snapshot));
        queue.wait(one.clone(), busy()).unwrap();
        queue.first = Some((one.clone(), long_ago(PATIENCE)));
        assert!(queue.wait(one.clone(), busy()).is_err());
        // Another one has its own time.
        queue.wait(Held::By(holder(Purpose::Resize)), busy()).unwrap();
        queue.begun = long_ago(PATIENCE_WITH_ALL);
        assert!(queue.wait(one, busy()).is_err());
    }
}
