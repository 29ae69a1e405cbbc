//! Reading `events.jsonl`, and following it as it grows.

use crate::base::root::{Root, create_dir_durable, files};
use crate::base::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

/// Whether whoever takes the events wants more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The next one, please.
    More,
    /// No more.
    Enough,
}

/// One event as it was recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// The line, without its end.
    pub text: String,
    /// What it says, a JSON object.
    pub event: Value,
    /// Where its line begins in the log, in bytes.
    pub start: u64,
}

impl Recorded {
    /// The event's id, by which who gets it twice knows it.
    pub fn id(&self) -> Option<&str> {
        self.event["id"].as_str()
    }
}

/// A reader of a store's events, from the first one on.
#[derive(Debug)]
pub struct EventReader {
    path: PathBuf,
    file: Option<BufReader<File>>,
    /// Where the next line begins.
    start: u64,
    /// The beginning of a line whose end is not there yet.
    partial: Vec<u8>,
}

impl EventReader {
    /// The events of the store at `root`, which may have none yet.
    pub fn new(root: &Root) -> Self {
        Self::at(root, 0)
    }

    /// The events of the store at `root`, from the line on that begins at byte `start`.
    pub fn at(root: &Root, start: u64) -> Self {
        EventReader { path: root.events(), file: None, start, partial: Vec::new() }
    }

    /// Hands on every event that has been written since the last call, oldest first. Lines that are no
    /// JSON objects, such as one that a power cut tore, are passed over with a warning; a last line
    /// without its end waits for it.
    ///
    /// # Errors
    /// Those of reading, and of `take`.
    pub fn read(&mut self, mut take: impl FnMut(&Recorded) -> Result<Want>) -> Result<Want> {
        let attempt = || self.path.display().to_string();
        self.file = match self.file.take() {
            Some(file) => Some(file),
            None => open(&self.path, self.start).context(attempt)?,
        };
        let Some(file) = &mut self.file else { return Ok(Want::More) };
        loop {
            file.read_until(b'\n', &mut self.partial).context(attempt)?;
            if self.partial.pop_if(|last| *last == b'\n').is_none() {
                return Ok(Want::More);
            }
            let (line, start) = (std::mem::take(&mut self.partial), self.start);
            self.start += line.len() as u64 + 1;
            match recorded(line, start) {
                Some(event) if take(&event)? == Want::Enough => return Ok(Want::Enough),
                Some(_) => {}
                None => log::warn!("{}: passing over a line that is no event", self.path.display()),
            }
        }
    }

    /// As [`EventReader::read`], and then waits for more, until `take` has enough or `stop` becomes readable.
    /// A log that was replaced or cut is read from its new beginning.
    pub fn follow(
        &mut self,
        stop: BorrowedFd<'_>,
        mut take: impl FnMut(&Recorded) -> Result<Want>,
    ) -> Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new(".")).to_path_buf();
        create_dir_durable(&folder)?;
        let attempt = || format!("watch {}", folder.display());
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).context(attempt)?;
        // The folder, not the file: it need not be there yet, and may be replaced.
        let what = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
        inotify.add_watch(&folder, what).context(attempt)?;
        loop {
            if self.read(&mut take)? == Want::Enough {
                return Ok(());
            }
            let read_on = self.drop_if_replaced().context(attempt)?;
            if !read_on && wait(&inotify, stop).context(attempt)? {
                return Ok(());
            }
        }
    }

    /// Goes over to the file that the log's name leads to now; true if that is another one.
    fn drop_if_replaced(&mut self) -> std::io::Result<bool> {
        let Some(file) = &mut self.file else { return Ok(false) };
        let ours = file.get_ref().metadata()?;
        let same = match self.path.symlink_metadata() {
            Ok(there) => files::is_same(&ours, &there),
            // Moved away: what is still written to it is still ours.
            Err(_) => true,
        };
        if !same || self.start > ours.len() {
            self.file = None;
            self.start = 0;
            self.partial.clear();
            return Ok(true);
        }
        if file.stream_position()? > ours.len() {
            // The writer took back a line that it could not write whole.
            file.seek(SeekFrom::Start(self.start))?;
            self.partial.clear();
        }
        Ok(false)
    }
}

fn recorded(line: Vec<u8>, start: u64) -> Option<Recorded> {
    let text = String::from_utf8(line).ok()?;
    let event: Value = serde_json::from_str(&text).ok().filter(Value::is_object)?;
    Some(Recorded { text, event, start })
}

fn open(path: &Path, start: u64) -> std::io::Result<Option<BufReader<File>>> {
    match files::open(path) {
        Ok(mut file) => {
            file.seek(SeekFrom::Start(start))?;
            Ok(Some(BufReader::new(file)))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Waits for news of the folder; true if `stop` became readable.
fn wait(inotify: &Inotify, stop: BorrowedFd<'_>) -> nix::Result<bool> {
    let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN), PollFd::new(stop, PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(e) => return Err(e),
    }
    if fds[1].any().unwrap_or(true) {
        return Ok(true);
    }
    match inotify.read_events() {
        Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(false),
        Err(e) => Err(e),
    }
}
