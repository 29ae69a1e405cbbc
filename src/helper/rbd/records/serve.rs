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
//! What keeps other processes away meanwhile is in [`locks`](super::locks).
//!
//! The process ends when nobody is at the other end of its socket, and lets go of its locks then: whoever had
//! them changes nothing any more.
#![forbid(unsafe_code)]

use super::locks::{Locks, object_of_lock};
use super::narrow::{Narrow, check};
use super::rados::{Part, Rados};
use super::wire::{Answer, Begin, MAX_LINE, MAX_RECORD, Problem, Request, VOLUMES, is_name, of_volume};
use crate::base::hardened::Hardened;
use crate::base::wire::{self, Lines};
use crate::base::{Error, Kind, Result};
use crate::helper::rbd::keeper::{Begun, begin};
use crate::sandbox::{self, stranger};
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an image is waited for that somebody has open: a client that has died is forgotten by then.
const OPEN: Duration = Duration::from_secs(45);
const LOOK: Duration = Duration::from_millis(200);
/// What stands in the list of volumes' folders.
const IS_THERE: &[u8] = b"1";

/// The process's whole life.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(_: Hardened) -> Result<()> {
    let Begun { socket, lines, image, rules, .. } = begin(MAX_LINE, |it: &Begin| &it.image)?;
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
        locks: Arc::new(Locks::of(rados)),
        seen: HashMap::new(),
        narrow: None,
    };
    let renewing = pool.locks.clone();
    std::thread::Builder::new().name("locks".into()).spawn(move || renewing.renew_for_ever())?;
    wire::say(&socket, &Answer::Ready(fsid))?;
    pool.serve(&socket, lines)
}

fn failed(e: &Error) -> Answer {
    Answer::Failed(Problem::of_error(e), e.to_string())
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
        self.locks.rados()
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
