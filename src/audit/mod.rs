//! The audit log: every use of a key by the embedded KMS and every step in the life of a data key, in
//! `<root>/audit.jsonl`.
//!
//! Each record names the one before by its hash, and has a MAC where its writer has the audit key; marks
//! beside the KMS's root key say how far the log reached. docs/audit.md describes the bytes, and what can be
//! found out by them. Any number of processes append: one at a time, by an flock on the file.
//!
//! Knows nothing of keys but their names, and nothing of what is done with a record that cannot be written:
//! that is for whoever was going to do something.

mod entry;
pub mod line;
pub mod mark;
mod tail;
pub mod verify;

pub use entry::{Entry, Process, Step, name_command};
pub use line::{AuditKey, KMS_SOURCE, Position};

use crate::base::root::{Root, create_dir_durable, files, sync_dir};
use crate::base::sync::Locked;
use crate::base::{Context, Error, Kind, Result, locks, spare};
use crate::crypt::secret_mem::on_scrubbed_stack;
use mark::{Mark, Marks, folder_hash};
use nix::fcntl::{Flock, OFlag};
use serde::Serialize;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tail::Tail;
use uuid::Uuid;

/// The log's name in the store's folder.
const FILE: &str = "audit.jsonl";

/// A store's audit log, to be written.
#[derive(Debug)]
pub struct AuditLog {
    folder: PathBuf,
    config: PathBuf,
    process: Process,
    opened: Mutex<Option<Opened>>,
}

/// The files, open. A process that is confined later has them open by then.
#[derive(Debug)]
struct Opened {
    file: File,
    /// The log's id and its marks, for one who has the audit key or one who has not.
    marks: Option<(Uuid, mark::Kind, Marks)>,
    folder_hash: [u8; 32],
}

#[derive(Serialize)]
struct Recorded<'a> {
    #[serde(flatten)]
    entry: &'a Entry,
    process: &'a Process,
}

/// Where the log of the store at `root` lies.
pub fn path(root: &Root) -> PathBuf {
    root.path().join(FILE)
}

impl AuditLog {
    /// The log of the store at `root`, with its marks in [`Root::config_dir`]. Nothing is opened or made yet.
    pub fn new(root: &Root) -> Result<Self> {
        Ok(Self::at(root.path(), &Root::config_dir()?))
    }

    /// The log in `folder`, with its marks in `config`.
    pub fn at(folder: &Path, config: &Path) -> Self {
        AuditLog {
            folder: folder.to_owned(),
            config: config.to_owned(),
            process: Process::this(),
            opened: Mutex::new(None),
        }
    }

    /// Appends a record; it is durable when this returns. With `key` it has a MAC.
    ///
    /// A log whose end was cut off is continued where the marks say that it had been, so that what is
    /// missing stays found out.
    pub fn append(&self, entry: &Entry, key: Option<&AuditKey>) -> Result<()> {
        let attempt = || format!("write to the audit log {}", self.path().display());
        let mut opened = self.opened.locked();
        let result = on_scrubbed_stack(|| self.append_to(&mut opened, entry, key)).context(attempt);
        if result.is_err() {
            *opened = None;
        }
        result
    }

    /// Appends a record without a MAC. For those who cannot take back what they have done:
    /// a failure is logged.
    pub fn record(&self, entry: &Entry) {
        if let Err(e) = self.append(entry, None) {
            log::error!("an audit record was lost: {e}");
        }
    }

    fn append_to(&self, opened: &mut Option<Opened>, entry: &Entry, key: Option<&AuditKey>) -> Result<()> {
        let (file, is_new) = self.current(opened)?;
        // Unlocked when it is dropped, on every way out.
        let mut file = locks::lock_whole(file)?;
        let opened = opened.as_mut().expect("current() has opened it");
        let found = tail::read(&file)?;
        let kind = if key.is_some() { mark::Kind::Signed } else { mark::Kind::Plain };
        let (log, before) = self.place(opened, kind, &found)?;
        let (line, after) = line::encode(log, &before, &Recorded { entry, process: &self.process }, key)
            .ok_or_else(|| {
                Error::new(Kind::Corrupt, "its records have no next number; look at the log's end")
            })?;
        if line.len() > line::LINE_MAX {
            return Err(Error::new(Kind::Other, "the record is too long"));
        }
        write(&mut file, found.torn, &line)?;
        if is_new {
            sync_dir(&self.folder)?;
        }
        let mark = Mark { log, position: after, folder: opened.folder_hash };
        let (.., marks) = opened.marks.as_ref().expect("place() has opened them");
        marks.write(&mark, key).context(|| format!("note that in {}", self.config.display()))
    }

    /// The log's file, and whether it was just made.
    fn current(&self, opened: &mut Option<Opened>) -> Result<(File, bool)> {
        if let Some(Opened { file, .. }) = opened
            && is_at(file, &self.path())?
        {
            return Ok((file.try_clone()?, false));
        }
        create_dir_durable(&self.folder)?;
        let path = self.path();
        let is_new = !files::exists(&path);
        let file = files::open_with(&path, OFlag::O_RDWR | OFlag::O_APPEND | OFlag::O_CREAT)?;
        let folder_hash = folder_hash(&self.folder);
        *opened = Some(Opened { file: file.try_clone()?, marks: None, folder_hash });
        Ok((file, is_new))
    }

    /// The log's id and the record that the next one follows: the last one that was `found` in the
    /// file, or that a mark names.
    fn place(&self, opened: &mut Opened, kind: mark::Kind, found: &Tail) -> Result<(Uuid, Position)> {
        let of_folder = || mark::of_folder(&self.config, &self.folder);
        // Without a record in the file, there may have been one.
        let log = found.steady.map(|(log, _)| log).or_else(|| of_folder().map(|mark| mark.log));
        let log = log.unwrap_or_else(Uuid::new_v4);
        let are_open = opened.marks.as_ref().is_some_and(|(of, as_kind, _)| (*of, *as_kind) == (log, kind));
        if !are_open {
            opened.marks = Some((log, kind, Marks::open(&self.config, log, kind)?));
        }
        let (.., marks) = opened.marks.as_ref().expect("just opened");
        let place =
            |record: Option<(Uuid, Position)>| record.map_or(Position::START, |(_, position)| position);
        let (last, steady) = (place(found.last), place(found.steady));
        // A number that leaps is one that a mark with a MAC knows of, or nobody's that counts.
        let here = match mark::is_near(last.seq, marks.signed().max(steady.seq)) {
            true => last,
            false => steady,
        };
        let Some(noted) = marks.furthest(here.seq).filter(|noted| noted.seq >= here.seq) else {
            return Ok((log, here));
        };
        if noted != here {
            log::error!(
                "{}: record {} was written, but is not there any more; \"sealblk audit verify\" says more",
                self.path().display(),
                noted.seq
            );
        }
        Ok((log, noted))
    }

    fn path(&self) -> PathBuf {
        self.folder.join(FILE)
    }
}

/// Appends `line` in one write, behind the end of what a crash has left of another.
fn write(file: &mut Flock<File>, torn: bool, line: &[u8]) -> Result<()> {
    let before = file.metadata()?.len();
    let bytes = if torn { [b"\n", line].concat() } else { line.to_vec() };
    let append = || {
        let written = match file.write(&bytes) {
            Ok(written) if written == bytes.len() => file.sync_data(),
            Ok(_) => Err(std::io::Error::new(ErrorKind::StorageFull, "the file system is full")),
            Err(e) => Err(e),
        };
        // Rather no record than half of one; what cannot be taken back is passed over by whoever reads.
        written.inspect_err(|_| drop(file.set_len(before).and_then(|()| file.sync_data())))
    };
    Ok(spare::with(append)?)
}

/// Whether `path` leads to this file, as far as a process may look that has given up its
/// rights since it opened it.
fn is_at(file: &File, path: &Path) -> std::io::Result<bool> {
    match files::is_at(file, path) {
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Ok(true),
        known => known,
    }
}
