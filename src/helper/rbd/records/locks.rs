//! The locks of a process that changes records in a pool.
//!
//! **A lock** lasts [`LASTS`] and is renewed while this process lives. Whoever takes it writes down who it is
//! and by which client of Ceph's, under the lock; whoever lets go of it in peace takes that away before. So
//! who takes a lock and finds a name there knows that its owner was cut off, or is slow, and has that client
//! refused by Ceph (the blocklist) before anything is changed: what it has still under way is not done any
//! more. And a process that cannot renew a lock changes nothing more once its time is over, nor does it ever
//! again if another has had it meanwhile.
#![forbid(unsafe_code)]

use super::rados::{Part, Rados};
use super::wire::Problem;
use crate::base::sync::Locked;
use crate::helper::rbd::tenure::is_address;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a lock lasts that is not renewed.
const LASTS: Duration = Duration::from_secs(30);
/// How often locks are renewed.
const RENEWED: Duration = Duration::from_secs(7);
/// How long before its end a lock is not relied on any more.
const MARGIN: Duration = Duration::from_secs(3);
/// The key of who has a lock.
const HOLDER: &str = "holder";

/// Who has a lock, as its object says it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Holder {
    /// The client of Ceph's.
    client: String,
    /// What the process says of itself.
    pub(super) text: String,
}

/// A lock that this process has, or has lost.
struct HeldLock {
    cookie: String,
    /// What stands in its object.
    said: Vec<u8>,
    /// Until when it is this process's for certain.
    until: Instant,
    /// Why it never is again.
    lost: Option<String>,
}

/// The locks of this process.
pub(super) struct Locks {
    rados: Rados,
    held: Mutex<BTreeMap<String, HeldLock>>,
    /// A change was not answered, and may still be done: whoever comes next has to have this client refused.
    is_unsettled: AtomicBool,
}

impl Locks {
    /// None yet, of this client's.
    pub(super) fn of(rados: Rados) -> Self {
        Locks { rados, held: Mutex::default(), is_unsettled: AtomicBool::new(false) }
    }

    /// The client.
    pub(super) fn rados(&self) -> &Rados {
        &self.rados
    }

    /// Takes a lock that nobody has, or whose time is over. Returns who has it otherwise.
    pub(super) fn take(
        &self,
        name: &str,
        text: String,
    ) -> io::Result<std::result::Result<(), Option<String>>> {
        let mut held = self.held.locked();
        if held.contains_key(name) {
            return Ok(Err(None));
        }
        let (object, cookie) = (object_of_lock(name), Uuid::new_v4().to_string());
        let begun = Instant::now();
        match self.rados.lock(&object, &cookie, LASTS, false) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                return Ok(Err(self.holder(name)?.map(|(holder, _)| holder.text)));
            }
            Err(e) => return Err(e),
        }
        let said = self.keep_others_away(&object).and_then(|before| {
            let client = self.rados.address().to_owned();
            let said = serde_json::to_vec(&Holder { client, text })?;
            // If that has taken longer than the lock lasts, another one may stand there by now.
            let is_as_it_was = Part::Has(HOLDER, before.as_deref());
            self.rados.change(&object, &[Part::IsThere, is_as_it_was, Part::Set(HOLDER, &said)])?;
            Ok(said)
        });
        let said = said.inspect_err(|_| drop(self.rados.unlock(&object, &cookie)))?;
        held.insert(name.to_owned(), HeldLock { cookie, said, until: begun + LASTS, lost: None });
        Ok(Ok(()))
    }

    /// The lock is this process's, and its object may still name another one, which was cut off. Returns what
    /// stands there.
    fn keep_others_away(&self, object: &str) -> io::Result<Option<Vec<u8>>> {
        let said = self.rados.value(object, HOLDER)?;
        let before = said.as_ref().and_then(|said| serde_json::from_slice::<Holder>(said).ok());
        let is_anothers = |client: &String| is_address(client) && client != self.rados.address();
        match before.map(|holder| holder.client).filter(is_anothers) {
            None => Ok(said),
            Some(client) => self.rados.refuse(&client).map(|()| said),
        }
    }

    /// Who has a lock, as it says itself and as it stands there; none: nobody.
    pub(super) fn holder(&self, name: &str) -> io::Result<Option<(Holder, Vec<u8>)>> {
        let object = object_of_lock(name);
        if self.rados.lockers(&object)?.is_empty() {
            return Ok(None);
        }
        let said = self.rados.value(&object, HOLDER)?.unwrap_or_default();
        // One that has not said it yet.
        let holder =
            serde_json::from_slice(&said).unwrap_or(Holder { client: String::new(), text: String::new() });
        Ok(Some((holder, said)))
    }

    pub(super) fn release(&self, name: &str) -> io::Result<()> {
        let Some(lock) = self.held.locked().remove(name) else { return Ok(()) };
        let object = object_of_lock(name);
        if self.is_unsettled.load(Ordering::Relaxed) {
            return self.rados.unlock(&object, &lock.cookie);
        }
        // First what says that somebody may be cut off. If it is another's by now, it stays.
        match self
            .rados
            .change(&object, &[Part::IsThere, Part::Has(HOLDER, Some(&lock.said)), Part::Unset(HOLDER)])
        {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::ECANCELED | libc::ENOENT)) => return Ok(()),
            Err(e) => return Err(e),
        }
        match self.rados.unlock(&object, &lock.cookie) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// What it is the lock of is gone, and so it goes as well.
    pub(super) fn forget(&self, name: &str) -> io::Result<()> {
        self.held.locked().remove(name);
        self.rados.remove_object(&object_of_lock(name))
    }

    /// Lets go of all.
    pub(super) fn release_all(&self) {
        let names: Vec<String> = self.held.locked().keys().cloned().collect();
        for name in names {
            // What cannot be let go of is free after its time.
            let _ = self.release(&name);
        }
    }

    /// Renews them as long as this process lives.
    pub(super) fn renew_for_ever(&self) -> ! {
        loop {
            std::thread::sleep(RENEWED);
            self.renew();
        }
    }

    fn renew(&self) {
        for (name, lock) in self.held.locked().iter_mut() {
            self.renew_one(name, lock);
        }
    }

    fn renew_one(&self, name: &str, lock: &mut HeldLock) {
        if lock.lost.is_some() {
            return;
        }
        let (object, begun) = (object_of_lock(name), Instant::now());
        let lost = match self.rados.lock(&object, &lock.cookie, LASTS, true) {
            Ok(()) => None,
            Err(e) if e.kind() == ErrorKind::NotFound => self.take_again(&object, lock),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY)) => Some("another process has it".into()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESHUTDOWN | libc::EROFS)) => {
                Some("Ceph takes nothing more from this client".into())
            }
            // It is not known. Until its time is over, it holds.
            Err(_) => return,
        };
        match lost {
            None => lock.until = begun + LASTS,
            Some(_) => lock.lost = lost,
        }
    }

    /// Its time is over: it is this process's again if no other has had it meanwhile. Returns why it is not.
    fn take_again(&self, object: &str, lock: &HeldLock) -> Option<String> {
        if let Err(e) = self.rados.lock(object, &lock.cookie, LASTS, false) {
            return Some(format!("its time was over, and then: {e}"));
        }
        match self.rados.value(object, HOLDER) {
            Ok(Some(said)) if said == lock.said => None,
            _ => {
                let _ = self.rados.unlock(object, &lock.cookie);
                Some("another process has had it meanwhile".into())
            }
        }
    }

    /// Changes an object, if the locks hold.
    pub(super) fn change(&self, object: &str, parts: &[Part<'_>]) -> io::Result<()> {
        self.check()?;
        let done = self.rados.change(object, parts);
        if done.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ETIMEDOUT)) {
            self.is_unsettled.store(true, Ordering::Relaxed);
        }
        done
    }

    /// # Errors
    /// If one of the locks is not this process's for certain.
    pub(super) fn check(&self) -> io::Result<()> {
        for (name, lock) in self.held.locked().iter_mut() {
            if lock.until < Instant::now() + MARGIN {
                self.renew_one(name, lock);
            }
            let late =
                || (lock.until < Instant::now() + MARGIN).then(|| "it could not be renewed".to_owned());
            if let Some(why) = lock.lost.clone().or_else(late) {
                let message = format!(
                    "the lock \"{name}\" of the store is lost ({why}): nothing more is changed by this \
                     process"
                );
                return Err(Problem::Other.error(message));
            }
        }
        Ok(())
    }
}

pub(super) fn object_of_lock(name: &str) -> String {
    format!("sealblk.lock/{name}")
}
