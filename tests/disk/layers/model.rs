//! What every sector of a volume may hold.

use crate::common::frontend::block::{DISCARD, OUT, WRITE_ZEROES};

pub const SECTOR: usize = 512;

/// For each sector the numbers of the writes that it may hold; 0 stands for zeros.
#[derive(Clone)]
pub struct Model(Vec<Vec<u64>>);

/// A request and its place.
#[derive(Clone, Debug)]
pub struct Step {
    pub kind: u32,
    pub sector: u64,
    pub sectors: u64,
    /// The number of a write; for WRITE_ZEROES, whether to unmap.
    pub number: u64,
}

impl Step {
    pub fn overlaps(&self, other: &Step) -> bool {
        self.sector < other.sector + other.sectors && other.sector < self.sector + self.sectors
    }

    /// The data of a write.
    pub fn data(&self) -> Vec<u8> {
        (self.sector..self.sector + self.sectors).flat_map(|sector| content(self.number, sector)).collect()
    }
}

/// What write `number` puts into a sector.
pub fn content(number: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if number == 0 {
        return bytes;
    }
    let mut state = (number << 32 | sector).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    // Some begin or end with zeros, as data does.
    let zeros = [0, 0, 0, 8, 504, 511][(number % 6) as usize];
    for byte in &mut bytes[zeros..] {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 56) as u8;
    }
    bytes[SECTOR - 1] |= 1;
    bytes
}

impl Model {
    /// Zeros.
    pub fn new(sectors: u64) -> Self {
        Model(vec![vec![0]; sectors as usize])
    }

    pub fn sectors(&self) -> u64 {
        self.0.len() as u64
    }

    /// The volume becomes larger.
    pub fn grow(&mut self, sectors: u64) {
        self.0.resize(sectors as usize, vec![0]);
    }

    /// A step was done.
    pub fn apply(&mut self, step: &Step) {
        for held in &mut self.0[step.sector as usize..(step.sector + step.sectors) as usize] {
            match step.kind {
                OUT => *held = vec![step.number],
                WRITE_ZEROES => *held = vec![0],
                DISCARD if !held.contains(&0) => held.push(0),
                _ => {}
            }
        }
    }

    /// A step may or may not have been done, or in part.
    pub fn apply_perhaps(&mut self, step: &Step) {
        let before = self.clone();
        self.apply(step);
        for (held, before) in self.0.iter_mut().zip(before.0) {
            held.extend(before);
            held.sort_unstable();
            held.dedup();
        }
    }

    /// Compares what was read at `sector`; what may have been several things is one from then on.
    pub fn check(&mut self, sector: u64, data: &[u8], what: &str) {
        for (sector, bytes) in (sector..).zip(data.chunks(SECTOR)) {
            let held = &mut self.0[sector as usize];
            held.retain(|&number| content(number, sector) == bytes);
            assert!(!held.is_empty(), "{what}: sector {sector} holds something else");
        }
    }
}
