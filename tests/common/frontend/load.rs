//! Load on one ring whose every effect is known: each sector holds the number of the write that
//! was acknowledged last, so that a request which was lost, done twice, or done after a later
//! one shows in what is read.

use super::super::patience::limit;
use super::block::{OK, Pending};
use super::{Fault, Framing, Place, Request, Result, Segment, SplitRing};
use std::collections::HashMap;
use std::ops::Range;

const SECTOR: usize = 512;
/// More descriptors than any request here takes.
const MOST_DESCS: usize = 24;
/// More bytes of the guest's memory than any request here takes.
const MOST_MEMORY: u64 = 64 << 10;

/// Numbers that are the same for the same seed (xorshift, Marsaglia 2003).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % end
    }

    /// One of these.
    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}

/// What a request does to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Nothing,
    Read,
    /// They hold this write's number, or zeros if it is 0.
    Hold(u64),
    /// They hold zeros, or what they held.
    Discard,
}

#[derive(Clone, Copy, Default)]
struct Sector {
    /// The number of the write that it holds; 0 for zeros.
    holds: u64,
    readers: u32,
    written: bool,
}

struct Doing {
    pending: Pending,
    sectors: Range<usize>,
    effect: Effect,
}

/// The load.
pub struct Load {
    random: Random,
    /// First sector on the disk.
    first: u64,
    sectors: Vec<Sector>,
    /// What sectors may hold instead, that a guest was writing when it vanished.
    unsure: HashMap<usize, Vec<u64>>,
    doing: Vec<Doing>,
    writes: u64,
    /// Requests put on the ring so far.
    pub submitted: u64,
    /// Requests completed so far.
    pub completed: u64,
    /// Heads in the order in which they were put on the ring, where the answers must come in that order.
    order: Option<std::collections::VecDeque<u16>>,
    indirect: bool,
    /// Whether a discard may leave data where it is, as one does where a snapshot has the same sectors.
    pub discards_may_keep: bool,
}

impl Load {
    /// On these sectors, which hold zeros and are nobody else's.
    pub fn new(seed: u64, sectors: Range<u64>, indirect: bool) -> Self {
        let count = (sectors.end - sectors.start) as usize;
        Load {
            random: Random::new(seed),
            first: sectors.start,
            sectors: vec![Sector::default(); count],
            unsure: HashMap::new(),
            doing: Vec::new(),
            writes: 0,
            submitted: 0,
            completed: 0,
            order: None,
            indirect,
            discards_may_keep: false,
        }
    }

    /// Completions must come in the order of submission.
    pub fn in_order(mut self) -> Self {
        self.order = Some(Default::default());
        self
    }

    /// The heads in flight.
    pub fn heads(&self) -> Vec<u16> {
        self.doing.iter().map(|d| d.pending.head).collect()
    }

    /// Puts one request on the ring; false if that or the guest's memory has no room until
    /// others have completed.
    pub fn submit(&mut self, ring: &mut SplitRing) -> Result<bool> {
        if ring.free_descs() < MOST_DESCS || ring.mem.room() < MOST_MEMORY {
            return Ok(false);
        }
        let (request, sectors, effect) = self.next_request();
        for sector in &mut self.sectors[sectors.clone()] {
            match effect {
                Effect::Read => sector.readers += 1,
                Effect::Hold(_) | Effect::Discard => sector.written = true,
                Effect::Nothing => {}
            }
        }
        let pending = self.shaped(request).submit(ring)?;
        if let Some(order) = &mut self.order {
            order.push_back(pending.head);
        }
        self.doing.push(Doing { pending, sectors, effect });
        self.submitted += 1;
        Ok(true)
    }

    /// Takes one completion, if there is one, and checks it.
    pub fn take(&mut self, ring: &mut SplitRing) -> Result<bool> {
        let Some(used) = ring.pop_used() else { return Ok(false) };
        let wrong = |what: String| Err(Fault::Protocol(what));
        let Some(at) = self.doing.iter().position(|d| u32::from(d.pending.head) == used.id) else {
            return wrong(format!("{used:?} is not, or no more, in flight"));
        };
        if let Some(order) = &mut self.order {
            let oldest = order.pop_front();
            if oldest.map(u32::from) != Some(used.id) {
                return wrong(format!("{used:?} before {oldest:?}, which is older"));
            }
        }
        let Doing { pending, sectors, effect } = self.doing.swap_remove(at);
        let outcome = pending.finish(ring, used)?;
        if outcome.status != OK {
            return wrong(format!("{effect:?} of {sectors:?} ended with status {}", outcome.status));
        }
        if effect == Effect::Read {
            self.check(sectors.clone(), &outcome.data)?;
        }
        for index in sectors {
            let sector = &mut self.sectors[index];
            match effect {
                Effect::Read => sector.readers -= 1,
                Effect::Hold(number) => {
                    (sector.holds, sector.written) = (number, false);
                    self.unsure.remove(&index);
                }
                Effect::Discard => {
                    self.unsure.entry(index).or_default().push(sector.holds);
                    (sector.holds, sector.written) = (0, false);
                }
                Effect::Nothing => {}
            }
        }
        self.completed += 1;
        Ok(true)
    }

    /// The guest vanishes with all that it has in flight: of a sector that was being written, nobody knows
    /// whether it was. The next read of it tells.
    pub fn vanish(&mut self) {
        for Doing { sectors, effect, .. } in self.doing.drain(..) {
            for index in sectors {
                let sector = &mut self.sectors[index];
                match effect {
                    Effect::Read => sector.readers -= 1,
                    Effect::Hold(number) => {
                        sector.written = false;
                        self.unsure.entry(index).or_default().push(number);
                    }
                    Effect::Discard => {
                        sector.written = false;
                        self.unsure.entry(index).or_default().push(0);
                    }
                    Effect::Nothing => {}
                }
            }
        }
        if let Some(order) = &mut self.order {
            order.clear();
        }
    }

    /// Reads everything, with nothing in flight, and checks it.
    pub fn verify(&mut self, ring: &mut SplitRing) -> Result<()> {
        assert!(self.doing.is_empty(), "something is in flight");
        const STEP: usize = 256;
        for from in (0..self.sectors.len()).step_by(STEP) {
            let sectors = from..self.sectors.len().min(from + STEP);
            let read = Request::read(self.first + from as u64, sectors.len() * SECTOR).run(ring)?;
            self.submitted += 1;
            self.completed += 1;
            if read.status != OK {
                return Err(Fault::Protocol(format!("reading {sectors:?}: status {}", read.status)));
            }
            self.check(sectors, &read.data)?;
        }
        Ok(())
    }

    fn check(&mut self, sectors: Range<usize>, data: &[u8]) -> Result<()> {
        for (index, found) in sectors.zip(data.chunks(SECTOR)) {
            let sector = self.first + index as u64;
            let instead = self.unsure.remove(&index).unwrap_or_default();
            if let Some(&number) = instead.iter().find(|&&number| found == content(sector, number)) {
                self.sectors[index].holds = number;
            }
            let number = self.sectors[index].holds;
            if found != content(sector, number) {
                let words: Vec<u64> =
                    found.chunks(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect();
                return Err(Fault::Protocol(format!(
                    "sector {sector}: write {number} was acknowledged last; found {:?}",
                    &words[..4]
                )));
            }
        }
        Ok(())
    }

    fn next_request(&mut self) -> (Request, Range<usize>, Effect) {
        let kind = self.random.below(100);
        // Sizes of all orders of magnitude.
        let magnitude = self.random.below(7);
        let len = 1 + self.random.below(1 << magnitude) as usize;
        let sectors = (0..8).find_map(|_| {
            let from = self.random.below((self.sectors.len() - len) as u64) as usize;
            let there = &self.sectors[from..from + len];
            let free = |s: &Sector| !s.written && (kind < 35 || s.readers == 0);
            there.iter().all(free).then_some(from..from + len)
        });
        let Some(sectors) = sectors else { return (Request::flush(), 0..0, Effect::Nothing) };
        let first = self.first + sectors.start as u64;
        let segment = Segment { sector: first, count: len as u32, flags: 0 };
        match kind {
            0..35 => (Request::read(first, len * SECTOR), sectors, Effect::Read),
            35..85 => {
                self.writes += 1;
                let data = (first..first + len as u64).flat_map(|s| content(s, self.writes));
                (Request::write(first, &data.collect::<Vec<_>>()), sectors, Effect::Hold(self.writes))
            }
            85..90 => {
                let effect = if self.discards_may_keep { Effect::Discard } else { Effect::Hold(0) };
                (Request::discard(&[segment]), sectors, effect)
            }
            90..95 => (Request::write_zeroes(&[segment]), sectors, Effect::Hold(0)),
            _ => (Request::flush(), 0..0, Effect::Nothing),
        }
    }

    fn shaped(&mut self, request: Request) -> Request {
        let framings = [
            Framing::Classic,
            Framing::SplitHeader,
            Framing::Compact,
            Framing::Scattered(vec![4096]),
            Framing::Scattered(vec![8000, 3000]),
        ];
        let request = request.framed(self.random.pick(&framings));
        let places = [Place::Direct, Place::Indirect, Place::DirectThenIndirect(1)];
        request.placed(if self.indirect { self.random.pick(&places) } else { Place::Direct })
    }
}

/// What sector `sector` of the disk holds after write `number`; zeros after 0.
pub fn content(sector: u64, number: u64) -> Vec<u8> {
    if number == 0 {
        return vec![0; SECTOR];
    }
    [sector.to_le_bytes(), number.to_le_bytes()].concat().repeat(SECTOR / 16)
}

/// Takes completions, waiting for interrupts, until nothing is in flight any more.
pub fn settle(loads: &mut [Load], rings: &mut [SplitRing]) -> Result<()> {
    for (load, ring) in loads.iter_mut().zip(rings) {
        while !load.doing.is_empty() {
            ring.want_call(true);
            if !load.take(ring)? && !ring.wait_call(limit())? {
                let (flying, all) = (load.doing.len(), load.submitted);
                return Err(Fault::TimedOut(format!("the last {flying} of {all} requests")));
            }
        }
    }
    Ok(())
}
