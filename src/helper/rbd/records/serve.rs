//! The process that reaches the records of a store in a pool.
//!
//! | object | has |
//! |---|---|
//! | `sealblk/volumes` | a key for each volume's folder |
//! | `sealblk/volumes/<id>` | the records of that volume, each a key with its value |
//! | `sealblk/snapshots`, `sealblk/ledger`, `sealblk/layers`, `sealblk/store` | the records there, likewise |
//! | `sealblk.lock/<name>` | a lock (cls_lock), and in the key `holder` who has it |
//!
//! **A change is one operation on one object**: Ceph does all of it or nothing. What was read is compared by
//! the same operation, so that of two who have read the same, one is refused. A rename is within a folder, so
//! it is one operation as well.
//!
//! **A lock** lasts [`LASTS`] and is renewed while this process lives. Whoever takes it writes down who it is
//! and by which client of Ceph's, under the lock; whoever lets go of it in peace takes that away before. So
//! who takes a lock and finds a name there knows that its owner was cut off, or is slow, and has that client
//! refused by Ceph (the blocklist) before anything is changed: what it has still under way is not done any
//! more. And a process that cannot renew a lock changes nothing more once its time is over, nor does it ever
//! again if another has had it meanwhile.
//!
//! The process ends when nobody is at the other end of its socket, and lets go of its locks then: whoever had
//! them changes nothing any more.
#![forbid(unsafe_code)]

use super::rados::{Part, Rados};
use super::wire::{
    Answer, Begin, MAX_HOLDER, MAX_LINE, MAX_RECORD, Problem, Request, VOLUMES, is_folder, is_lock, is_name,
    of_volume,
};
use crate::backing::nbd::Image;
use crate::base::hardened::Hardened;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, child};
use crate::helper::rbd::keeper::reach;
use crate::helper::rbd::tenure::is_address;
use crate::sandbox::{self, stranger};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a lock lasts that is not renewed.
const LASTS: Duration = Duration::from_secs(30);
/// How often locks are renewed.
const RENEWED: Duration = Duration::from_secs(7);
/// How long before its end a lock is not relied on any more.
const MARGIN: Duration = Duration::from_secs(3);
/// How long an image is waited for that somebody has open: a client that has died is forgotten by then.
const OPEN: Duration = Duration::from_secs(45);
const LOOK: Duration = Duration::from_millis(200);
/// The key of who has a lock.
const HOLDER: &str = "holder";
/// What stands in the list of volumes' folders.
const IS_THERE: &[u8] = b"1";

/// The process's whole life.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(_: Hardened) -> Result<()> {
    let socket = child::begin()?;
    // It ends when its socket does, once it has let go of its locks.
    child::outlive_parent()?;
    let attempt = || "take a request: this command is started by sealblk alone";
    let mut lines = Lines::of_at_most(MAX_LINE);
    let line = lines.next(&socket).context(attempt)?.unwrap_or_default();
    let begin: Begin = serde_json::from_slice(&line).map_err(io::Error::from).context(attempt)?;
    let image = Image::named(&begin.image)?;
    let rules = reach(&image);
    // The log may go by a descriptor, whose number is another's from here on.
    log::set_max_level(log::LevelFilter::Off);
    stranger::keep_standard_streams()?;
    let begun = sandbox::confine_module(&rules, true)
        .and_then(|()| stranger::be_silent())
        .and_then(|()| Rados::connect(&image))
        .and_then(|rados| Ok((rados.fsid()?, rados)));
    let (fsid, rados) = match begun {
        Ok(begun) => begun,
        Err(e) => return Ok(wire::say(&socket, &failed(&e))?),
    };
    let pool = Pool {
        user: image.id().to_owned(),
        locks: Arc::new(Locks { rados, held: Mutex::default(), is_unsettled: AtomicBool::new(false) }),
        seen: HashMap::new(),
        narrow: None,
    };
    let renewing = pool.locks.clone();
    std::thread::Builder::new().name("locks".into()).spawn(move || {
        loop {
            std::thread::sleep(RENEWED);
            renewing.renew();
        }
    })?;
    wire::say(&socket, &Answer::Ready(fsid))?;
    pool.serve(&socket, lines)
}

fn failed(e: &Error) -> Answer {
    Answer::Failed(Problem::of_error(e), e.to_string())
}

/// Who has a lock, as its object says it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Holder {
    /// The client of Ceph's.
    client: String,
    /// What the process says of itself.
    text: String,
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
struct Locks {
    rados: Rados,
    held: Mutex<BTreeMap<String, HeldLock>>,
    /// A change was not answered, and may still be done: whoever comes next has to have this client refused.
    is_unsettled: AtomicBool,
}

impl Locks {
    /// Takes a lock that nobody has, or whose time is over. Returns who has it otherwise.
    fn take(&self, name: &str, text: String) -> io::Result<std::result::Result<(), Option<String>>> {
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
    fn holder(&self, name: &str) -> io::Result<Option<(Holder, Vec<u8>)>> {
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

    fn release(&self, name: &str) -> io::Result<()> {
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
    fn forget(&self, name: &str) -> io::Result<()> {
        self.held.locked().remove(name);
        self.rados.remove_object(&object_of_lock(name))
    }

    /// Lets go of all.
    fn release_all(&self) {
        let names: Vec<String> = self.held.locked().keys().cloned().collect();
        for name in names {
            // What cannot be let go of is free after its time.
            let _ = self.release(&name);
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
    fn change(&self, object: &str, parts: &[Part<'_>]) -> io::Result<()> {
        self.check()?;
        let done = self.rados.change(object, parts);
        if done.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ETIMEDOUT)) {
            self.is_unsettled.store(true, Ordering::Relaxed);
        }
        done
    }

    /// # Errors
    /// If one of the locks is not this process's for certain.
    fn check(&self) -> io::Result<()> {
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

fn object_of_lock(name: &str) -> String {
    format!("sealblk.lock/{name}")
}

fn object_of(folder: &str) -> String {
    format!("sealblk/{folder}")
}

/// The pool, for one client.
struct Pool {
    /// As which user of the cluster.
    user: String,
    locks: Arc<Locks>,
    /// What records said when they were read; none: they were not there.
    seen: HashMap<(String, String), Option<Vec<u8>>>,
    /// What is still reached, once there is a bound.
    narrow: Option<Narrow>,
}

/// What a client reaches that is confined: the records of one volume, and what leads to its layers.
struct Narrow {
    folder: String,
    layers: Vec<String>,
}

/// # Errors
/// For what is not a name, and for what this client may not ask any more.
fn check(request: &Request, narrow: Option<&Narrow>) -> std::result::Result<(), &'static str> {
    let is_record = |folder: &str, file: &str| is_folder(folder) && is_name(file);
    let is_meant = match request {
        Request::Read { folder, file } | Request::Remove { folder, file } => is_record(folder, file),
        Request::Create { folder, file, text } | Request::Replace { folder, file, text } => {
            is_record(folder, file) && (1..=MAX_RECORD).contains(&text.len())
        }
        Request::Rename { folder, file, to } => is_record(folder, file) && is_name(to),
        Request::Names { folder } | Request::MakeFolder { folder } => is_folder(folder) || folder == VOLUMES,
        Request::RemoveFolder { folder } | Request::Narrow { folder, .. } => of_volume(folder).is_some(),
        Request::Lock { name, holder } | Request::BreakLock { name, holder } => {
            is_lock(name) && holder.len() <= MAX_HOLDER
        }
        Request::Unlock { name } | Request::Holder { name } => is_lock(name),
        Request::RemoveImage { name } | Request::MakeImageLonger { name, .. } => is_name(name),
    };
    if !is_meant {
        return Err("it names nothing that a store in a pool has");
    }
    let Some(narrow) = narrow else { return Ok(()) };
    let is_near = match request {
        Request::Read { folder, file } => {
            *folder == narrow.folder || folder == "layers" && narrow.layers.contains(file)
        }
        Request::Names { folder }
        | Request::Create { folder, .. }
        | Request::Replace { folder, .. }
        | Request::Remove { folder, .. }
        | Request::Rename { folder, .. } => *folder == narrow.folder,
        // Its own locks are all that it can let go of.
        Request::Unlock { .. } | Request::Holder { .. } => true,
        _ => false,
    };
    is_near.then_some(()).ok_or("this process reaches the records of one volume alone")
}

impl Pool {
    fn serve(mut self, socket: &UnixStream, mut lines: Lines) -> Result<()> {
        while let Ok(Some(line)) = lines.next(socket) {
            let answer = match serde_json::from_slice(&line) {
                Ok(request) => self.answer(request).unwrap_or_else(|e| self.explained(&e)),
                Err(e) => Answer::Failed(Problem::Usage, format!("no request: {e}")),
            };
            if wire::say(socket, &answer).is_err() {
                break;
            }
        }
        self.locks.release_all();
        Ok(())
    }

    fn explained(&self, e: &io::Error) -> Answer {
        let problem = match e.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(e) => Problem::of_error(e),
            None => Problem::of_io(e),
        };
        let hint = match e.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => {
                format!("; the caps of client.{} are to be those of docs/ceph.md", self.user)
            }
            Some(libc::ESHUTDOWN) => {
                "; another host has taken a lock over from this process, which is kept away from now on"
                    .into()
            }
            Some(libc::ETIMEDOUT) => {
                "; the cluster has not answered: whether it was done is not known".into()
            }
            Some(libc::ECANCELED) => {
                let message = "another process has changed it meanwhile; nothing was done, try again";
                return Answer::Failed(Problem::Busy, message.into());
            }
            _ => String::new(),
        };
        Answer::Failed(problem, format!("{e}{hint}"))
    }

    fn answer(&mut self, request: Request) -> io::Result<Answer> {
        check(&request, self.narrow.as_ref()).map_err(|e| Problem::Usage.error(e.into()))?;
        let done = |()| Answer::Done;
        match request {
            Request::Read { folder, file } => match self.read(folder, file)? {
                None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
                Some(bytes) if bytes.len() > MAX_RECORD => {
                    Err(Problem::Corrupt.error(format!("it is longer than {MAX_RECORD} bytes")))
                }
                Some(bytes) => match String::from_utf8(bytes) {
                    Ok(text) => Ok(Answer::Text(text)),
                    Err(_) => Err(Problem::Corrupt.error("it is no text".into())),
                },
            },
            Request::Names { folder } => self.names(&folder),
            Request::Create { folder, file, text } => self.create(folder, file, text.into_bytes()).map(done),
            Request::Replace { folder, file, text } => {
                self.replace(folder, file, text.into_bytes()).map(done)
            }
            Request::Remove { folder, file } => self.remove(folder, file).map(done),
            Request::Rename { folder, file, to } => self.rename(&folder, file, to).map(done),
            Request::MakeFolder { folder } => self.make_folder(&folder).map(done),
            Request::RemoveFolder { folder } => self.remove_folder(&folder).map(done),
            Request::Lock { name, holder } => Ok(match self.locks.take(&name, holder)? {
                Ok(()) => Answer::Done,
                Err(who) => Answer::Anothers(who),
            }),
            Request::Unlock { name } => self.locks.release(&name).map(done),
            Request::Holder { name } => {
                Ok(Answer::HeldBy(self.locks.holder(&name)?.map(|(holder, _)| holder.text)))
            }
            Request::BreakLock { name, holder } => self.break_lock(&name, &holder).map(done),
            Request::RemoveImage { name } => self.remove_image(&name).map(done),
            Request::MakeImageLonger { name, len } => {
                self.locks.check()?;
                self.rados().make_longer(&name, len).map(done)
            }
            Request::Narrow { folder, layers } => {
                self.narrow = Some(Narrow { folder, layers });
                Ok(Answer::Done)
            }
        }
    }

    fn rados(&self) -> &Rados {
        &self.locks.rados
    }

    /// What makes a change be of a folder that is there. Those of volumes are made before their records.
    fn of_folder(folder: &str) -> Part<'static> {
        if of_volume(folder).is_some() { Part::IsThere } else { Part::Make }
    }

    fn read(&mut self, folder: String, file: String) -> io::Result<Option<Vec<u8>>> {
        let found = self.rados().value(&object_of(&folder), &file)?.filter(|value| !value.is_empty());
        self.seen.insert((folder, file), found.clone());
        Ok(found)
    }

    fn names(&self, folder: &str) -> io::Result<Answer> {
        let found = self.rados().keys(&object_of(folder))?;
        let names = match found {
            Some(names) => names,
            // One that is being made, or removed.
            None => match of_volume(folder) {
                None => Vec::new(),
                Some(volume) => match self.rados().value(&object_of(VOLUMES), volume)? {
                    Some(_) => Vec::new(),
                    None => return Err(io::Error::from_raw_os_error(libc::ENOENT)),
                },
            },
        };
        // What is no name of ours is somebody else's, and nothing is done with it.
        Ok(Answer::Names(names.into_iter().filter(|name| is_name(name)).collect()))
    }

    /// Does this to the object of a folder, and notes what its records say then. What is known of the record
    /// afterwards is known only if it was done.
    fn change(
        &mut self,
        folder: &str,
        files: &[(&str, Option<&[u8]>)],
        parts: &[Part<'_>],
    ) -> io::Result<()> {
        let done = self.locks.change(&object_of(folder), parts);
        for (file, value) in files {
            let key = (folder.to_owned(), (*file).to_owned());
            match done {
                Ok(()) => self.seen.insert(key, value.map(<[u8]>::to_vec)),
                Err(_) => self.seen.remove(&key),
            };
        }
        done
    }

    fn create(&mut self, folder: String, file: String, text: Vec<u8>) -> io::Result<()> {
        let parts = [Self::of_folder(&folder), Part::Has(&file, None), Part::Set(&file, &text)];
        self.change(&folder, &[(&file, Some(&text))], &parts).map_err(|e| match e.raw_os_error() {
            Some(libc::ECANCELED) => io::Error::from_raw_os_error(libc::EEXIST),
            _ => e,
        })
    }

    fn replace(&mut self, folder: String, file: String, text: Vec<u8>) -> io::Result<()> {
        let seen = self.seen.get(&(folder.clone(), file.clone())).cloned();
        let mut parts = vec![Self::of_folder(&folder)];
        if let Some(seen) = &seen {
            parts.push(Part::Has(&file, seen.as_deref()));
        }
        parts.push(Part::Set(&file, &text));
        self.change(&folder, &[(&file, Some(&text))], &parts)
    }

    /// What a record says that is going to be removed: what was read of it, if it was.
    fn there(&mut self, folder: &str, file: &str) -> io::Result<Vec<u8>> {
        let seen = match self.seen.get(&(folder.to_owned(), file.to_owned())) {
            Some(Some(seen)) => Some(seen.clone()),
            _ => self.read(folder.to_owned(), file.to_owned())?,
        };
        seen.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }

    fn remove(&mut self, folder: String, file: String) -> io::Result<()> {
        let there = self.there(&folder, &file)?;
        let parts = [Part::IsThere, Part::Has(&file, Some(&there)), Part::Unset(&file)];
        match self.change(&folder, &[(&file, None)], &parts) {
            // It may have gone meanwhile.
            Err(e) if e.raw_os_error() == Some(libc::ECANCELED) => {
                self.read(folder.clone(), file.clone())?
                    .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
                return Err(e);
            }
            done => done?,
        }
        // The lock of its entry, which nobody wants any more.
        if let Some(id) = file.strip_suffix(".json").filter(|_| folder == "ledger") {
            let _ = self.locks.forget(&format!("ledger/{id}"));
        }
        Ok(())
    }

    fn rename(&mut self, folder: &str, file: String, to: String) -> io::Result<()> {
        let there = self.there(folder, &file)?;
        let parts =
            [Part::IsThere, Part::Has(&file, Some(&there)), Part::Set(&to, &there), Part::Unset(&file)];
        self.change(folder, &[(&file, None), (&to, Some(&there))], &parts)
    }

    fn make_folder(&self, folder: &str) -> io::Result<()> {
        let Some(volume) = of_volume(folder) else { return Ok(()) };
        // First the list: what is in it and not there is cleared away, what is not in it nobody would find.
        self.locks.change(&object_of(VOLUMES), &[Part::Make, Part::Set(volume, IS_THERE)])?;
        self.locks.change(&object_of(folder), &[Part::Make])
    }

    fn remove_folder(&mut self, folder: &str) -> io::Result<()> {
        let Some(volume) = of_volume(folder) else { return Ok(()) };
        self.locks.check()?;
        self.rados().remove_object(&object_of(folder))?;
        self.seen.retain(|(of, _), _| of != folder);
        self.locks.change(&object_of(VOLUMES), &[Part::Make, Part::Unset(volume)])?;
        // Its lock goes with it: whoever has it has a lock of nothing.
        self.locks.forget(folder)
    }

    fn break_lock(&self, name: &str, text: &str) -> io::Result<()> {
        let object = object_of_lock(name);
        match self.locks.holder(name)? {
            Some((holder, _)) if holder.text == text => {}
            // It was let go of, or is another's by now.
            _ => return Ok(()),
        }
        for locker in self.rados().lockers(&object)? {
            match self.rados().break_lock(&object, &locker) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    fn remove_image(&self, name: &str) -> io::Result<()> {
        let until = Instant::now() + OPEN;
        loop {
            self.locks.check()?;
            match self.rados().remove_image(name) {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until => {
                    std::thread::sleep(LOOK);
                }
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    let message = format!("the image {name} is open somewhere, so it is not removed");
                    return Err(io::Error::new(ErrorKind::ResourceBusy, Error::new(Kind::Busy, message)));
                }
                done => return done,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Request {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_a_store_does_not_have_is_not_asked_of_the_pool() {
        let is_meant = |text: &str| check(&request(text), None).is_ok();
        for text in [
            r#"{"read":{"folder":"ledger","file":"vol-1.json"}}"#,
            r#"{"names":{"folder":"volumes"}}"#,
            r#"{"lock":{"name":"volumes/vol-1","holder":"{}"}}"#,
            r#"{"remove-image":{"name":"sealblk-1"}}"#,
        ] {
            assert!(is_meant(text), "{text}");
        }
        for text in [
            r#"{"read":{"folder":"volumes","file":"vol-1"}}"#,
            r#"{"read":{"folder":"ledger","file":"../x"}}"#,
            r#"{"read":{"folder":"rbd_directory","file":"x"}}"#,
            r#"{"create":{"folder":"ledger","file":"x","text":""}}"#,
            r#"{"rename":{"folder":"ledger","file":"x","to":"a/b"}}"#,
            r#"{"remove-folder":{"folder":"ledger"}}"#,
            r#"{"lock":{"name":"../x","holder":"{}"}}"#,
            r#"{"remove-image":{"name":"a/b"}}"#,
        ] {
            assert!(!is_meant(text), "{text}");
        }
        let long = Request::Lock { name: "x".into(), holder: "x".repeat(MAX_HOLDER + 1) };
        assert!(check(&long, None).is_err());
    }

    #[test]
    fn a_confined_process_reaches_its_own_volume_alone() {
        let narrow = Narrow { folder: "volumes/vol-1".into(), layers: vec!["1.device".into()] };
        let may = |text: &str| check(&request(text), Some(&narrow)).is_ok();
        for text in [
            r#"{"read":{"folder":"volumes/vol-1","file":"volume.json"}}"#,
            r#"{"replace":{"folder":"volumes/vol-1","file":"volume.json","text":"x"}}"#,
            r#"{"read":{"folder":"layers","file":"1.device"}}"#,
            r#"{"unlock":{"name":"volumes/vol-1"}}"#,
        ] {
            assert!(may(text), "{text}");
        }
        for text in [
            r#"{"read":{"folder":"volumes/vol-2","file":"volume.json"}}"#,
            r#"{"read":{"folder":"layers","file":"2.device"}}"#,
            r#"{"names":{"folder":"layers"}}"#,
            r#"{"replace":{"folder":"layers","file":"1.device","text":"x"}}"#,
            r#"{"replace":{"folder":"ledger","file":"vol-1.json","text":"x"}}"#,
            r#"{"remove-folder":{"folder":"volumes/vol-1"}}"#,
            r#"{"make-folder":{"folder":"volumes/vol-1"}}"#,
            r#"{"lock":{"name":"volumes","holder":"{}"}}"#,
            r#"{"break-lock":{"name":"volumes/vol-1","holder":"{}"}}"#,
            r#"{"remove-image":{"name":"sealblk-1"}}"#,
            r#"{"make-image-longer":{"name":"sealblk-1","len":1}}"#,
            r#"{"narrow":{"folder":"volumes/vol-2","layers":[]}}"#,
        ] {
            assert!(!may(text), "{text}");
        }
    }
}
