//! Power cuts at every step of writing, freezing and hydrating: what was flushed is there, what was
//! not is old or new, and a snapshot is what it was when it was recorded. Two orders that are wrong
//! on purpose must not pass.
//!
//! The seed of each life is printed; `SEALBLK_MODEL_SEED` repeats one.

use crate::common::frontend::block::{DISCARD, FLUSH, OUT, WRITE_ZEROES};
use crate::common::frontend::load::Random;
use crate::layers::model::{Model, SECTOR, Step};
use crate::layers::recorded::{Entry, Journal, Recorded, World};
use crate::layers::rig::{Keys, LayerFile, Places, read_whole};
use sealblk::disk::hydrate::{End, Hydration};
use sealblk::disk::{Disk, DiskQueue, Event, GuestData, Layers, Zeroing};
use sealblk::image::lock::Access;
use sealblk::reactor::Wait;
use sealblk::virtio::{Segment, Shape};
use sealblk::volume::layers::{Layer, chain};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SECTORS: u64 = 1200;

/// In which order things are made durable.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Right,
    /// The frozen top is not flushed before the record that says that it is frozen.
    NoFlushBeforeCommit,
    /// The record says that there is one layer before all of it is in that.
    RecordBeforeHydrated,
}

/// A volume, whose every step goes into the journal.
struct Life {
    random: Random,
    places: Places,
    keys: Keys,
    order: Order,
    journal: Journal,
    /// All that were ever made, by number.
    files: Vec<LayerFile>,
    /// The volume's, the top first.
    stack: Vec<usize>,
    layers: Vec<Layer>,
    disk: Arc<Disk>,
    model: Model,
    number: u64,
}

const SHAPE: Shape = Shape { sectors: SECTORS, block_size: 512, read_only: false };

impl Life {
    fn new(seed: u64, order: Order) -> Self {
        let mut random = Random::new(seed);
        let (mut places, keys) = (Places::new(), Keys::new(512));
        let file = places.file(1, random.pick(&[None, Some(0)]), SECTORS);
        let layers = keys.open_all(std::slice::from_ref(&file), Access::ReadWrite, 512);
        let journal = Journal::default();
        let disk = Arc::new(Disk::layered(SHAPE, "power", recorded(&layers, 0, &journal)).unwrap());
        let model = Model::new(SECTORS);
        let (files, stack) = (vec![file], vec![0]);
        Life { random, places, keys, order, journal, files, stack, layers, disk, model, number: 0 }
    }

    fn live(mut self) -> (Vec<Entry>, Vec<LayerFile>) {
        for _ in 0..3 {
            self.guest();
            if self.random.below(3) > 0 {
                self.freeze();
                self.guest();
            }
            if self.stack.len() > 1 && self.random.below(2) == 0 {
                self.hydrate();
            }
        }
        let journal = std::mem::take(&mut *self.journal.lock().unwrap());
        (journal, self.files)
    }

    fn note(&self, entry: Entry) {
        self.journal.lock().unwrap().push(entry);
    }

    /// What a guest does for a while.
    fn guest(&mut self) {
        let mut queue = self.disk.open_queue(8).unwrap();
        for _ in 0..self.random.below(14) {
            let step = self.step();
            self.note(Entry::Begun { step: step.clone() });
            perform(&mut queue, &step);
            self.note(Entry::Acknowledged);
            self.model.apply(&step);
        }
    }

    fn step(&mut self) -> Step {
        let kind = self.random.pick(&[OUT, OUT, OUT, OUT, WRITE_ZEROES, DISCARD, FLUSH, FLUSH]);
        let sectors = if kind == FLUSH { 0 } else { 1 + self.random.below(24) };
        let sector = self.random.below(SECTORS - sectors + 1);
        self.number += 1;
        let number = if kind == WRITE_ZEROES { self.random.below(2) } else { self.number };
        Step { kind, sector, sectors, number }
    }

    /// A new top above what there is: flush, the new file, the record.
    fn freeze(&mut self) {
        if self.order != Order::NoFlushBeforeCommit {
            self.disk.flush().unwrap();
        }
        let key = self.random.below(self.keys.count() as u64) as usize;
        let (number, file) = (self.files.len(), self.places.file(1, Some(key), SECTORS));
        self.layers[0] = self.layers[0].frozen().unwrap();
        self.layers.insert(0, self.keys.open(&file, Access::ReadWrite, 512));
        self.files.push(file);
        let frozen = self.stack.clone();
        self.stack.insert(0, number);
        let disk = self.disk.with_new_top(recorded(&self.layers, number, &self.journal)).unwrap();
        self.disk = Arc::new(disk.hydrating());
        self.note(Entry::Record { files: self.stack.clone() });
        self.note(Entry::Snapshot { files: frozen, model: self.model.clone() });
    }

    /// Everything into the top, the guest going on meanwhile; then the record.
    fn hydrate(&mut self) {
        let early = self.order == Order::RecordBeforeHydrated;
        if early {
            self.note(Entry::Record { files: vec![self.stack[0]] });
        }
        let hydration = Hydration::new(self.disk.clone(), 0).unwrap();
        let end = std::thread::scope(|scope| {
            let runs = scope.spawn(|| hydration.run().unwrap());
            self.guest();
            runs.join().unwrap()
        });
        assert_eq!(end, End::Complete);
        self.stack.truncate(1);
        self.layers.truncate(1);
        if !early {
            self.note(Entry::Record { files: self.stack.clone() });
        }
        let layers = recorded(&self.layers, self.stack[0], &self.journal);
        self.disk = Arc::new(self.disk.with_layers(SHAPE, layers).unwrap());
    }
}

fn recorded(layers: &[Layer], top: usize, journal: &Journal) -> Layers {
    let layers = chain(layers);
    let backing = Recorded { backing: layers.backing.clone(), file: top, journal: journal.clone() };
    Layers { backing: Arc::new(backing), ..layers }
}

/// Does one step of a guest's and waits for it.
fn perform(queue: &mut DiskQueue, step: &Step) {
    let len = step.sectors as usize * SECTOR;
    match step.kind {
        FLUSH => queue.flush(0).unwrap(),
        OUT => {
            let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), len)]).unwrap();
            mem.write_slice(&step.data(), GuestAddress(0)).unwrap();
            let segments = [Segment { addr: GuestAddress(0), len: len as u32 }];
            let guest = GuestData { mem: &mem, segments: &segments, skip: 0 };
            let buffer = loop {
                match queue.alloc(step.sector, len) {
                    Some(buffer) => break buffer,
                    None => queue.wait(Wait::Event).unwrap(),
                }
                while queue.next_event().is_some() {}
            };
            queue.write(0, step.sector, buffer, false, guest).unwrap();
        }
        kind => {
            let how = if kind == DISCARD { Zeroing::Discard } else { Zeroing::Unmap };
            let mut at = 0;
            while at < step.sectors {
                match queue.zero(0, step.sector + at, step.sectors - at, how) {
                    Some(part) => {
                        at += part.sectors;
                        if part.submitted {
                            wait_for(queue);
                        }
                    }
                    None => {
                        queue.wait(Wait::Event).unwrap();
                        while queue.next_event().is_some() {}
                    }
                }
            }
            return;
        }
    }
    wait_for(queue);
}

fn wait_for(queue: &mut DiskQueue) {
    loop {
        match queue.next_event() {
            Some(Event::Done { buffer, result, .. }) => {
                buffer.into_iter().for_each(|buffer| queue.free(buffer));
                return result.unwrap();
            }
            Some(_) => {}
            None => queue.wait(Wait::Event).unwrap(),
        }
    }
}

/// Cuts the power at every place of the journal and looks at what is left; panics where that is wrong.
fn cut_everywhere(journal: &[Entry], made: &[LayerFile], seed: u64) {
    let (mut random, mut world) = (Random::new(seed), World::new(SECTORS));
    let (mut places, keys) = (Places::new(), Keys::new(512));
    let files: Vec<LayerFile> = made.iter().map(|file| places.file(1, file.key, SECTORS)).collect();
    for (place, entry) in journal.iter().enumerate() {
        world.take(entry);
        for (number, file) in files.iter().enumerate() {
            std::fs::write(&file.path, world.cut(number, &mut random)).unwrap();
        }
        let snapshots = world.snapshots.iter().map(|(files, model)| (files, model, "snapshot"));
        let volume = (&world.volume, &world.guest, "volume");
        for (stack, model, what) in snapshots.chain([volume]) {
            let stack: Vec<_> = stack.iter().map(|&number| files[number].clone()).collect();
            let layers = keys.open_all(&stack, Access::Read, 512);
            let disk = Arc::new(Disk::layered(SHAPE, "power", chain(&layers)).unwrap());
            model.clone().check(0, &read_whole(&disk, 256 << 10), &format!("{what} after {place} entries"));
        }
    }
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_flushed() {
    let named = std::env::var("SEALBLK_MODEL_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let first = named.unwrap_or_else(|| u64::from(std::process::id()));
    for seed in first..first + if named.is_some() { 1 } else { 4 } {
        println!("SEALBLK_MODEL_SEED={seed}");
        let (journal, files) = Life::new(seed, Order::Right).live();
        cut_everywhere(&journal, &files, seed);
    }
}

/// Whether a power cut shows that an order is wrong, in one of a few lives.
fn is_caught(order: Order) -> bool {
    (1..=12).any(|seed| {
        let (journal, files) = Life::new(seed, order).live();
        std::panic::catch_unwind(|| cut_everywhere(&journal, &files, seed)).is_err()
    })
}

#[test]
fn a_layer_that_is_frozen_without_a_flush_is_caught() {
    assert!(is_caught(Order::NoFlushBeforeCommit));
}

#[test]
fn a_layer_that_is_dropped_before_all_of_it_is_above_is_caught() {
    assert!(is_caught(Order::RecordBeforeHydrated));
}
