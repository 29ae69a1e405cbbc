//! A backing that keeps a journal of what reaches its top layer and when, and what a disk may hold after a
//! power cut at any place in it.

use crate::common::forward::forward;
use sealblk::backing::{Backing, Done, Op, Queue};
use sealblk::reactor::Reactor;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use crate::common::frontend::load::Random;
use crate::layers::model::{Model, SECTOR, Step};

/// What happened, in order.
pub type Journal = Arc<Mutex<Vec<Entry>>>;

/// One thing that happened. `id` tells the end of an operation to its beginning.
#[derive(Clone)]
pub enum Entry {
    /// Bytes are on their way to a file; zeros also where a hole is made.
    Write { id: u64, file: usize, offset: u64, bytes: Vec<u8> },
    /// A file's writes that have ended are being made durable.
    Flush { id: u64, file: usize },
    /// An operation has ended.
    Done { id: u64 },
    /// `volume.json` was replaced, durably: these are the layers, the top first.
    Record { files: Vec<usize> },
    /// A snapshot was recorded, durably: these layers hold this from now on.
    Snapshot { files: Vec<usize>, model: Model },
    /// The guest has begun something; a FLUSH is a step as well.
    Begun { step: Step },
    /// The guest's last step has ended.
    Acknowledged,
}

/// A backing whose top is the file of that number.
pub struct Recorded {
    pub backing: Arc<dyn Backing>,
    pub file: usize,
    pub journal: Journal,
}

struct RecordedQueue {
    queue: Box<dyn Queue>,
    file: usize,
    journal: Journal,
    /// By tag: the operation that has it.
    ids: HashMap<u64, u64>,
}

impl Backing for Recorded {
    forward!(caps has_data below next_data);

    fn open_queue(&self, reactor: &Rc<dyn Reactor>, depth: u16) -> io::Result<Box<dyn Queue>> {
        let (queue, journal) = (self.backing.open_queue(reactor, depth)?, self.journal.clone());
        Ok(Box::new(RecordedQueue { queue, file: self.file, journal, ids: HashMap::new() }))
    }
}

impl Queue for RecordedQueue {
    forward!(alloc free places max_buffer bytes in_memory in_flight collect woken has_done);

    fn has_room(&self) -> bool {
        // A tag stands for one operation: the copier gives all of its own the same.
        self.ids.is_empty() && self.queue.has_room()
    }

    fn submit(&mut self, tag: u64, mut op: Op) {
        let mut journal = self.journal.lock().unwrap();
        let (id, file) = (journal.len() as u64, self.file);
        match &mut op {
            Op::Write { offset, buffer, .. } => {
                let bytes = self.queue.bytes(buffer).to_vec();
                journal.push(Entry::Write { id, file, offset: *offset, bytes });
            }
            Op::Zero { offset, len, .. } => {
                journal.push(Entry::Write { id, file, offset: *offset, bytes: vec![0; *len as usize] });
            }
            Op::Flush => journal.push(Entry::Flush { id, file }),
            Op::Read { .. } | Op::ReadBelow { .. } => return self.queue.submit(tag, op),
        }
        assert!(self.ids.insert(tag, id).is_none(), "a tag is used twice at a time");
        self.queue.submit(tag, op)
    }

    fn next_done(&mut self) -> Option<Done> {
        let done = self.queue.next_done()?;
        if let Some(id) = self.ids.remove(&done.tag) {
            self.journal.lock().unwrap().push(Entry::Done { id });
        }
        Some(done)
    }
}

/// What is known of the world at a place in the journal.
#[derive(Clone)]
pub struct World {
    files: HashMap<usize, Disk>,
    /// The layers of the volume.
    pub volume: Vec<usize>,
    pub snapshots: Vec<(Vec<usize>, Model)>,
    /// What the guest may find.
    pub guest: Model,
    /// What it has done since it last flushed, and how much of that was acknowledged when
    /// it began to flush again.
    since: Vec<Step>,
    flushing: Option<usize>,
    /// What it holds for sure.
    solid: Model,
}

/// A file's bytes, and what may be lost of them.
#[derive(Clone, Default)]
struct Disk {
    durable: Vec<u8>,
    /// Writes that no flush has seen end, in order.
    loose: Vec<Loose>,
    flushing: Option<(u64, Vec<u64>)>,
}

#[derive(Clone)]
struct Loose {
    id: u64,
    offset: usize,
    bytes: Vec<u8>,
    done: bool,
}

impl World {
    /// Before the journal: a volume of one file of zeros.
    pub fn new(sectors: u64) -> Self {
        let zeros = Model::new(sectors);
        World {
            files: HashMap::new(),
            volume: vec![0],
            snapshots: Vec::new(),
            guest: zeros.clone(),
            since: Vec::new(),
            flushing: None,
            solid: zeros,
        }
    }

    /// One thing more has happened.
    pub fn take(&mut self, entry: &Entry) {
        let len = self.guest.sectors() as usize * SECTOR;
        match entry {
            Entry::Write { id, file, offset, bytes } => {
                let loose = Loose { id: *id, offset: *offset as usize, bytes: bytes.clone(), done: false };
                self.files.entry(*file).or_default().loose.push(loose);
            }
            Entry::Flush { id, file } => {
                let disk = self.files.entry(*file).or_default();
                let seen = disk.loose.iter().filter(|l| l.done).map(|l| l.id).collect();
                disk.flushing = Some((*id, seen));
            }
            Entry::Done { id } => self.files.values_mut().for_each(|disk| disk.done(*id, len)),
            Entry::Record { files } => self.volume = files.clone(),
            Entry::Snapshot { files, model } => self.snapshots.push((files.clone(), model.clone())),
            Entry::Begun { step } if step.sectors == 0 => self.flushing = Some(self.since.len()),
            Entry::Begun { step } => {
                self.guest.apply_perhaps(step);
                self.since.push(step.clone());
            }
            Entry::Acknowledged => {
                if let Some(count) = self.flushing.take() {
                    self.since.drain(..count).for_each(|step| self.solid.apply(&step));
                    self.guest = self.solid.clone();
                }
            }
        }
    }

    /// The files after a power cut now: of what was not flushed, some sectors, all or none are there.
    pub fn cut(&self, file: usize, random: &mut Random) -> Vec<u8> {
        let Some(disk) = self.files.get(&file) else {
            return vec![0; self.guest.sectors() as usize * SECTOR];
        };
        let mut bytes = disk.durable.clone();
        bytes.resize(self.guest.sectors() as usize * SECTOR, 0);
        let kept = random.below(3);
        for loose in &disk.loose {
            for (i, sector) in loose.bytes.chunks(SECTOR).enumerate() {
                if kept == 0 || kept == 1 && random.below(2) == 0 {
                    bytes[loose.offset + i * SECTOR..][..SECTOR].copy_from_slice(sector);
                }
            }
        }
        bytes
    }
}

impl Disk {
    fn done(&mut self, id: u64, len: usize) {
        if let Some((_, seen)) = self.flushing.take_if(|(flush, _)| *flush == id) {
            self.durable.resize(len, 0);
            for loose in self.loose.extract_if(.., |l| seen.contains(&l.id)) {
                self.durable[loose.offset..][..loose.bytes.len()].copy_from_slice(&loose.bytes);
            }
        }
        self.loose.iter_mut().filter(|l| l.id == id).for_each(|l| l.done = true);
    }
}
