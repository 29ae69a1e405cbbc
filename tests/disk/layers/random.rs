//! Random lives of volumes. The seed of each is printed; `SEALBLK_MODEL_SEED` repeats one, and
//! `SEALBLK_MODEL_SECONDS` says how long to go on with others.

use crate::common::frontend::block::{DISCARD, FLUSH, IN, OK, OUT, Pending, WRITE_ZEROES};
use crate::common::frontend::load::Random;
use crate::common::frontend::{Framing, Request, Segment};
use crate::common::loop_disk::Kind;
use crate::common::patience::limit;
use crate::layers::model::{Model, SECTOR, Step};
use crate::layers::rig::{Hydrating, Keys, LayerFile, Places, QUEUES, Served, read_whole};
use sealblk::disk::Disk;
use sealblk::disk::hydrate::End;
use sealblk::image::lock::Access;
use sealblk::vhost::queue::Tuning;
use sealblk::virtio::Shape;
use sealblk::volume::layers::chain;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Layers at most: a life that has reached them goes on without freezing.
const MOST_LAYERS: usize = 40;

/// A volume's life.
struct Life {
    random: Random,
    places: Places,
    keys: Keys,
    block: u32,
    /// The top first.
    files: Vec<LayerFile>,
    model: Model,
    /// What was frozen, with what it must hold.
    frozen: Vec<(Vec<LayerFile>, Model)>,
    /// The number of the last write.
    number: u64,
}

impl Life {
    fn at(seed: u64, mut places: Places) -> Self {
        let mut random = Random::new(seed);
        let block = random.pick(&[512, 4096]);
        let keys = Keys::new(block);
        let odd = if block == 512 && random.below(2) == 0 { random.below(8) } else { 0 };
        let sectors = (1 + random.below(400)) * 8 + odd;
        let key = random.pick(&[None, Some(0), Some(1)]);
        let file = places.file(random.below(2) as usize, key, sectors);
        let model = Model::new(sectors);
        Life { random, places, keys, block, files: vec![file], model, frozen: Vec::new(), number: 0 }
    }

    fn shape(&self) -> Shape {
        Shape { sectors: self.model.sectors(), block_size: self.block, read_only: false }
    }

    fn serve(&mut self) -> Served {
        let layers = self.keys.open_all(&self.files, Access::ReadWrite, self.block);
        let tuning = Tuning { in_order: self.random.below(4) == 0, ..Tuning::default() };
        let disk = Disk::layered(self.shape(), "rig", chain(&layers)).unwrap();
        let disk = if self.random.below(2) == 0 { disk.hydrating() } else { disk };
        Served::new(self.places.folder(), Arc::new(disk), layers, &tuning)
    }

    /// A new top layer, of a key of any kind: encrypted, since it lies above another.
    fn new_top(&mut self, sectors: u64) -> LayerFile {
        let key = self.random.below(self.keys.count() as u64) as usize;
        self.places.file(self.random.below(2) as usize, Some(key), sectors)
    }

    fn live(&mut self) {
        for _ in 0..1 + self.random.below(4) {
            let mut served = self.serve();
            let mut hydrating = None;
            for _ in 0..self.random.below(60) {
                if hydrating.is_none() && self.random.below(8) == 0 {
                    let rate = self.random.pick(&[0, 8 << 20, 64 << 20]);
                    hydrating = served.hydrate(rate);
                }
                let steps = self.steps();
                let started = self.start(&mut served, &steps);
                if self.files.len() < MOST_LAYERS && self.random.below(4) == 0 {
                    hydrating.take().map(Hydrating::stop);
                    self.freeze(&mut served, &steps);
                }
                if let Some(over) = hydrating.take_if(|h| h.is_over()) {
                    assert_eq!((over.hydration.left(), over.wait()), (Some(0), End::Complete));
                    self.files.truncate(served.drop_lower_layers());
                }
                self.finish(&mut served, started);
            }
            hydrating.map(Hydrating::stop);
            let disk = served.device.disk();
            drop(served);
            disk.flush().unwrap();
            self.compare(&disk);
            drop(disk);
            if self.random.below(3) == 0 && self.files.len() < MOST_LAYERS {
                self.clone_larger();
            }
        }
        for (files, mut model) in std::mem::take(&mut self.frozen) {
            let sectors = model.sectors();
            let shape = Shape { sectors, block_size: self.block, read_only: true };
            let layers = self.keys.open_all(&files, Access::Read, self.block);
            let disk = Arc::new(Disk::layered(shape, "rig", chain(&layers)).unwrap());
            model.check(0, &read_whole(&disk, 64 << 10), "a frozen state");
        }
    }

    /// The whole volume, while the map may not be ready and when it is.
    fn compare(&mut self, disk: &Arc<Disk>) {
        let piece = self.random.pick(&[4096, 64 << 10, 256 << 10]);
        self.model.check(0, &read_whole(disk, piece), "the whole");
        if let Some(map) = disk.map() {
            assert!(map.wait(limit()) && map.is_ready(), "the map was not made");
        }
        self.model.check(0, &read_whole(disk, piece), "the whole, by the map");
    }

    /// Requests that do not meet.
    fn steps(&mut self) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        for _ in 0..1 + self.random.below(12) {
            let step = self.step();
            if !steps.iter().any(|s| s.overlaps(&step)) {
                steps.push(step);
            }
        }
        steps
    }

    fn step(&mut self) -> Step {
        let unit = u64::from(self.block) / SECTOR as u64;
        let kind = self.random.pick(&[OUT, OUT, OUT, OUT, IN, IN, IN, WRITE_ZEROES, DISCARD, FLUSH]);
        let units = self.model.sectors() / unit;
        let most = self.random.pick(&[unit, 8, 8, 40, 1200]).div_ceil(unit).min(units);
        let count = 1 + self.random.below(most);
        // Often in the same few places.
        let from = match self.random.below(units - count + 1) {
            at if self.random.below(2) == 0 => at % (units - count + 1).min(64),
            at => at,
        };
        self.number += 1;
        let number = match kind {
            // A guest writes zeros as well.
            OUT if self.random.below(8) == 0 => 0,
            WRITE_ZEROES => self.random.below(2),
            _ => self.number,
        };
        let sectors = if kind == FLUSH { 0 } else { count * unit };
        Step { kind, sector: from * unit, sectors, number }
    }

    /// Freezes the top while `steps` are in flight.
    fn freeze(&mut self, served: &mut Served, steps: &[Step]) {
        let top = self.new_top(self.model.sectors());
        let leaving = self.random.below(self.files.len() as u64 + 1) as usize;
        served.freeze(self.keys.open(&top, Access::ReadWrite, self.block), leaving);
        self.frozen.push((self.files.clone(), self.perhaps(steps)));
        self.files.insert(0, top);
    }

    /// What is, while `steps` are in flight.
    fn perhaps(&self, steps: &[Step]) -> Model {
        let mut state = self.model.clone();
        steps.iter().for_each(|step| state.apply_perhaps(step));
        state
    }

    /// Puts the steps on the rings, and kicks.
    fn start(&mut self, served: &mut Served, steps: &[Step]) -> [Vec<(Step, Pending)>; QUEUES] {
        let mut started = [const { Vec::new() }; QUEUES];
        for step in steps {
            let segment =
                Segment { sector: step.sector, count: step.sectors as u32, flags: step.number as u32 };
            let request = match step.kind {
                IN => Request::read(step.sector, step.sectors as usize * SECTOR),
                OUT => Request::write(step.sector, &step.data()),
                FLUSH => Request::flush(),
                DISCARD => Request::discard(&[Segment { flags: 0, ..segment }]),
                _ => Request::write_zeroes(&[segment]),
            };
            let framing = match self.random.below(4) {
                0 => Framing::Scattered(vec![1, 511, 4096 * 9, 513, 70_000, 200_000, 300_000]),
                _ => Framing::Classic,
            };
            let ring = self.random.below(QUEUES as u64) as usize;
            let pending = request.framed(framing).submit(&mut served.session.rings[ring]).unwrap();
            started[ring].push((step.clone(), pending));
        }
        for ring in &mut served.session.rings {
            ring.kick_if_wanted();
        }
        started
    }

    fn finish(&mut self, served: &mut Served, started: [Vec<(Step, Pending)>; QUEUES]) {
        for (ring, mut started) in served.session.rings.iter_mut().zip(started) {
            while !started.is_empty() {
                let used = ring.wait_used().unwrap();
                let index = started.iter().position(|(_, p)| u32::from(p.head) == used.id).unwrap();
                let (step, pending) = started.swap_remove(index);
                let outcome = pending.finish(ring, used).unwrap();
                assert_eq!(outcome.status, OK, "{step:?}");
                if step.kind == IN {
                    self.model.check(step.sector, &outcome.data, "a read");
                }
                self.model.apply(&step);
            }
        }
    }

    /// A larger volume over what there is, as a clone has it.
    fn clone_larger(&mut self) {
        let sectors = self.model.sectors() + 8 * self.random.below(100);
        let top = self.new_top(sectors);
        self.frozen.push((self.files.clone(), self.model.clone()));
        self.files.insert(0, top);
        self.model.grow(sectors);
    }
}

/// Lives, one after the other, in places of their own.
fn live(seconds: u64, mut places: impl FnMut(u64) -> Option<Places>) {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect(name));
    let seconds = number("SEALBLK_MODEL_SECONDS").unwrap_or(seconds);
    let begun = Instant::now();
    let first = number("SEALBLK_MODEL_SEED");
    for seed in first.unwrap_or_else(|| u64::from(std::process::id())).. {
        println!("SEALBLK_MODEL_SEED={seed}");
        let Some(places) = places(seed) else { return };
        Life::at(seed, places).live();
        if begun.elapsed() >= Duration::from_secs(seconds) || first.is_some() {
            return;
        }
    }
}

#[test]
fn volumes_of_many_layers_hold_what_was_written() {
    live(8, |_| Some(Places::new()));
}

#[test]
fn so_they_do_on_disks_with_larger_blocks_than_theirs() {
    for kind in [(4096, "ext4"), (4096, "xfs"), (512, "btrfs"), (2048, "xfs")] {
        let kind = Kind { block: kind.0, file_system: kind.1 };
        live(4, |seed| Places::on(kind, seed % 2 == 0));
    }
}
