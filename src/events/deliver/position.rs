//! How far a sink has been served: `<root>/event-sinks/<name>.json`, replaced after each event.
//!
//! It says where in `events.jsonl` the last delivered event begins, and that event's id, so that a log that
//! was replaced meanwhile is not read from the middle.

use crate::base::root::{Root, create_dir_durable, files, replace_file};
use crate::base::{Context, Error, Kind, Result};
use crate::events::read::{EventReader, Recorded, Want};
use nix::fcntl::{Flock, FlockArg, OFlag};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::{Path, PathBuf};

/// The longest position in bytes.
const MAX_LEN: u64 = 4096;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    /// Where the last delivered event begins, in bytes.
    start: u64,
    /// Its id; none before the first.
    last: Option<String>,
}

/// The events that the sink `name` is still to get, as far as one can tell from outside: whoever serves the
/// sink goes on meanwhile. `take` gets them, oldest first.
pub(super) fn undelivered(root: &Root, name: &str, mut take: impl FnMut(&Recorded)) -> Result<()> {
    let mut take = |event: &Recorded| {
        take(event);
        Ok(Want::More)
    };
    let written = read(&root.event_sinks().join(format!("{name}.json")))?;
    let Some(Written { start, last: Some(id) }) = written else {
        return EventReader::new(root).read(take).map(drop);
    };
    let mut found = false;
    let behind = EventReader::at(root, start).read(|event| match found {
        true => take(event),
        false => {
            found = event.id() == Some(&id);
            Ok(if found { Want::More } else { Want::Enough })
        }
    })?;
    match behind {
        Want::More => Ok(()),
        // The log was replaced: all of it is to be delivered.
        Want::Enough => EventReader::new(root).read(take).map(drop),
    }
}

/// A sink's place in the log, held by one process at a time.
#[derive(Debug)]
pub(super) struct Position {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Position {
    /// Takes the position of the sink `name`.
    ///
    /// # Errors
    /// `Busy` if another process serves the sink.
    pub(super) fn acquire(root: &Root, name: &str) -> Result<Self> {
        let folder = root.event_sinks();
        create_dir_durable(&folder)?;
        let path = folder.join(format!("{name}.lock"));
        let attempt = || format!("lock {}", path.display());
        let file = files::open_with(&path, OFlag::O_WRONLY | OFlag::O_CREAT);
        let lock = Flock::lock(file.context(attempt)?, FlockArg::LockExclusiveNonblock).map_err(
            |(_, e)| match e {
                nix::errno::Errno::EWOULDBLOCK => {
                    let message = format!("another process delivers events to {name:?}");
                    Error::new(Kind::Busy, message)
                }
                e => Error::from(e).context(attempt()),
            },
        )?;
        Ok(Position { path: folder.join(format!("{name}.json")), _lock: lock })
    }

    /// A reader of what has not been delivered. A new sink's begins with the first event, or behind the last
    /// one, if it shall have only what happens from now on.
    pub(super) fn reader(&self, root: &Root, new_from_now: bool) -> Result<EventReader> {
        let Some(written) = self.read()? else {
            let mut reader = EventReader::new(root);
            if new_from_now {
                let mut last = None;
                reader.read(|event| {
                    last = Some(event.clone());
                    Ok(Want::More)
                })?;
                self.write(last.as_ref())?;
            }
            return Ok(reader);
        };
        let Some(id) = written.last else { return Ok(EventReader::new(root)) };
        let is_last = |event: &Recorded| event.id() == Some(&id);
        let mut reader = EventReader::at(root, written.start);
        let mut found = false;
        reader.read(|event| {
            found = is_last(event);
            Ok(Want::Enough)
        })?;
        if found {
            return Ok(reader);
        }
        // Somebody has edited or replaced the log: it may have moved.
        let mut reader = EventReader::new(root);
        reader.read(|event| {
            found = is_last(event);
            Ok(if found { Want::Enough } else { Want::More })
        })?;
        if found {
            return Ok(reader);
        }
        log::warn!(
            "{}: event {id} is not in the log any more, which was replaced: delivering it from its beginning",
            self.path.display()
        );
        Ok(EventReader::new(root))
    }

    /// Notes that everything up to this event is delivered, durably.
    pub(super) fn write(&self, event: Option<&Recorded>) -> Result<()> {
        let last = event.and_then(|event| event.id().map(str::to_owned));
        let written = Written { start: event.map_or(0, |event| event.start), last };
        replace_file(&self.path, &serde_json::to_vec(&written).expect("a number and a string"))
    }

    fn read(&self) -> Result<Option<Written>> {
        read(&self.path)
    }
}

fn read(path: &Path) -> Result<Option<Written>> {
    let attempt = || format!("read {}", path.display());
    match files::read(path, MAX_LEN) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => match serde_json::from_slice(&read.context(attempt)?) {
            Ok(written) => Ok(Some(written)),
            Err(e) => {
                let message = format!("{e}; remove the file to have every event delivered again");
                Err(Error::of(Kind::Corrupt, e).reworded(message).context(attempt()))
            }
        },
    }
}
