//! What was done to the files under a folder, in order, and when the test was told what.

use super::expect::Expect;
use super::model::Model;
use std::fmt;
use std::sync::Arc;

/// A file or folder, whatever it is called: its inode number.
pub type Ino = u64;

/// What a new name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file, empty.
    File,
    /// A folder, empty.
    Folder,
    /// A Unix socket.
    Socket,
}

/// One operation that succeeded.
#[derive(Clone, Debug)]
pub enum Op {
    /// A new file, folder or socket, and its name.
    Make { folder: Ino, name: String, ino: Ino, kind: Kind, mode: u32 },
    /// Another name for a file.
    Link { folder: Ino, name: String, ino: Ino },
    /// A name moves, over another one if that is there.
    Rename { folder: Ino, from: String, to: String },
    /// A name goes.
    Remove { folder: Ino, name: String },
    /// Bytes are written; with `durable` they are on the disk before the next operation (O_DSYNC, RWF_DSYNC).
    Write { ino: Ino, offset: u64, data: Vec<u8>, durable: bool },
    /// A file becomes shorter or longer.
    SetLen { ino: Ino, len: u64 },
    /// A range becomes zeros, by a hole or otherwise; the length stays.
    Zero { ino: Ino, offset: u64, len: u64 },
    /// The permissions.
    Mode { ino: Ino, mode: u32 },
    /// fsync or, without `all`, fdatasync of a file or folder.
    Sync { ino: Ino, all: bool },
}

impl Op {
    /// The file or folder that it changes or syncs.
    pub fn subject(&self) -> Ino {
        match self {
            Op::Make { folder, .. }
            | Op::Link { folder, .. }
            | Op::Rename { folder, .. }
            | Op::Remove { folder, .. } => *folder,
            Op::Write { ino, .. }
            | Op::SetLen { ino, .. }
            | Op::Zero { ino, .. }
            | Op::Mode { ino, .. }
            | Op::Sync { ino, .. } => *ino,
        }
    }
}

/// A point at which what may be expected after a power cut changes.
#[derive(Clone)]
pub struct Mark {
    /// In words.
    pub label: String,
    /// How it changes.
    pub apply: Arc<dyn Fn(&mut Expect) + Send + Sync>,
}

/// One line of a trace.
#[derive(Clone)]
pub enum Entry {
    /// The files changed.
    Op(Op),
    /// The expectations changed.
    Mark(Mark),
}

/// A whole recording.
#[derive(Clone)]
pub struct Trace {
    /// The folder that all of it is under.
    pub top: Ino,
    /// What happened.
    pub entries: Vec<Entry>,
    /// Where the part begins that is to be cut.
    pub start: usize,
}

impl Trace {
    /// Each entry in words: `sync root/volumes/vol-…/volume.json`. A file is called what it
    /// was called at that moment.
    pub fn lines(&self) -> Vec<String> {
        let mut model = Model::new(self.top);
        let line = |entry: &Entry| match entry {
            Entry::Mark(mark) => format!("-- {}", mark.label),
            Entry::Op(op) => {
                // A name that goes is known before only, a new one after.
                let before = describe(&model, op);
                model.apply(op);
                before
            }
        };
        self.entries.iter().map(line).collect()
    }

    /// The place of the first entry at `from` or later whose line is like this.
    #[track_caller]
    pub fn find(&self, from: usize, like: impl Fn(&str) -> bool) -> usize {
        let lines = self.lines();
        let found = (from..lines.len()).find(|&i| like(&lines[i]));
        found.unwrap_or_else(|| panic!("no such operation was recorded:\n{}", lines[from..].join("\n")))
    }

    /// This trace without the entry at `place`.
    pub fn without(mut self, place: usize) -> Self {
        self.entries.remove(place);
        self
    }

    /// This trace with the entry at `from` done before the one at `to`.
    pub fn moved(mut self, from: usize, to: usize) -> Self {
        let entry = self.entries.remove(from);
        self.entries.insert(to, entry);
        self
    }
}

fn describe(model: &Model, op: &Op) -> String {
    let path = model.path(op.subject());
    match op {
        Op::Make { name, kind, .. } => format!("make {kind:?} {path}/{name}"),
        Op::Link { name, ino, .. } => format!("link {} as {path}/{name}", model.path(*ino)),
        Op::Rename { from, to, .. } => format!("rename {path}/{from} to {to}"),
        Op::Remove { name, .. } => format!("remove {path}/{name}"),
        Op::Write { offset, data, durable, .. } => {
            format!("write{} {path} {offset}+{}", if *durable { " durably" } else { "" }, data.len())
        }
        Op::SetLen { len, .. } => format!("set length {path} {len}"),
        Op::Zero { offset, len, .. } => format!("zero {path} {offset}+{len}"),
        Op::Mode { mode, .. } => format!("mode {path} {mode:o}"),
        Op::Sync { all, .. } => format!("{} {path}", if *all { "sync" } else { "datasync" }),
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines().iter().enumerate().try_for_each(|(i, line)| writeln!(f, "{i:5} {line}"))
    }
}
