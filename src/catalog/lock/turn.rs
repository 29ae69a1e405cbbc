//! Who is to have a volume next: in a live migration the process that will take it over announces itself,
//! beside the one that has it.

use super::LockFile;
use crate::base::locks::{self, Bytes};
use crate::base::{Context, Error, Kind, Result};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::fs::FileTimes;
use std::time::{Duration, SystemTime};

/// The byte of the lock file whose lock says that a process waits to have the volume.
const AWAITED: Bytes = Bytes::one(1 << 62);
/// How often to look for announcements where nothing tells of them.
const LOOK: Duration = Duration::from_secs(1);

impl LockFile {
    /// Announces that this process is to have the volume next. It takes nothing from the process
    /// that has the volume now.
    ///
    /// # Errors
    /// `Busy` if another process is to have it next.
    pub fn announce(&self) -> Result<Turn> {
        if !self.lock(AWAITED).context(|| format!("lock {}", self.path.display()))? {
            let message = format!("another process waits for {} already; end that first", self.volume);
            return Err(Error::new(Kind::Busy, message));
        }
        // Who holds it may be asleep: see `Announcements`.
        let now = SystemTime::now();
        // Both, which is what makes it a change of attributes to inotify.
        let times = FileTimes::new().set_accessed(now).set_modified(now);
        self.file.set_times(times).context(|| format!("touch {}", self.path.display()))?;
        Ok(Turn(self.clone()))
    }

    /// What tells of announcements, as far as they are made on this machine.
    pub fn announcements(&self) -> Announcements {
        let watch = || {
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
            inotify.add_watch(&self.path, AddWatchFlags::IN_ATTRIB)?;
            Ok(inotify)
        };
        watch().map_or_else(
            |e: Errno| {
                // A user has 128 of them by default, which is soon as many as there are volumes.
                log::info!(
                    "no inotify for {} ({e}; fs.inotify.max_user_instances): it is looked at once a second",
                    self.path.display()
                );
                Announcements(None)
            },
            |inotify| Announcements(Some(inotify)),
        )
    }

    /// Whether another process has announced itself.
    pub fn is_awaited(&self) -> Result<bool> {
        locks::is_locked_against(&self.file, locks::Kind::Shared, AWAITED)
            .context(|| format!("look at {}", self.path.display()))
    }
}

/// Tells when a process may have announced itself: at once, or, where the kernel has no inotify for it, a
/// second later.
pub struct Announcements(Option<Inotify>);

impl Announcements {
    /// Waits for the next time.
    pub fn wait(&self) -> Result<()> {
        let Some(inotify) = &self.0 else {
            std::thread::sleep(LOOK);
            return Ok(());
        };
        match inotify.read_events() {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(Error::from(e).context("wait for announcements")),
        }
    }
}

/// Held by the process that is to have a volume next. While it lives, no other process can announce itself.
#[derive(Debug)]
pub struct Turn(LockFile);

impl Drop for Turn {
    fn drop(&mut self) {
        locks::unlock(&self.0.file, AWAITED);
    }
}
