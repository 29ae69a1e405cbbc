//! The load of the queues that one thread drives: all requests are laid out beforehand; in the loop only
//! sector, status and ring change.

use super::Pattern;
use super::frontend::block::{IN, OK, OUT, UNTOUCHED};
use super::frontend::ring::linked;
use super::frontend::{Desc, Fault, Result, SplitRing, Used};
use super::histogram::Histogram;
use super::patience::limit;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// Phase: run, but do not count.
pub const RAMP: u8 = 0;
/// Phase: count.
pub const MEASURE: u8 = 1;
/// Phase: submit nothing more and end.
pub const STOP: u8 = 2;

/// What a queue has to do.
pub struct Work {
    /// What is read or written where.
    pub pattern: Pattern,
    /// How many in a hundred requests of a mixed load are reads.
    pub reads: u8,
    /// Bytes of a request.
    pub bs: u64,
    /// Requests in flight on a queue.
    pub depth: u16,
    /// Queues that share the range when it is gone through in order.
    pub queues: u16,
    /// Bytes of the device to use, a multiple of `bs`.
    pub range: u64,
    /// Most bytes of a data descriptor.
    pub segment: u64,
    /// Descriptors in the ring's own table.
    pub direct: bool,
    /// Wait for interrupts.
    pub interrupts: bool,
    /// End after one pass over the range.
    pub once: bool,
}

/// What was done while it was measured.
#[derive(Default)]
pub struct Tally {
    /// Requests completed.
    pub done: u64,
    /// Requests completed with another status than OK, also before and after.
    pub failed: u64,
    /// Kicks sent.
    pub kicks: u64,
    /// Latencies.
    pub latency: Histogram,
}

impl Tally {
    /// Adds another queue's.
    pub fn add(&mut self, other: &Tally) {
        self.done += other.done;
        self.failed += other.failed;
        self.kicks += other.kicks;
        self.latency.add(&other.latency);
    }
}

/// One request's place in guest memory.
struct Slot {
    /// A chain that reads, and one that writes; either is there where the load has such requests.
    chains: [Option<Chain>; 2],
    status: u64,
    since: Instant,
}

struct Chain {
    head: u16,
    header: u64,
}

/// Loads queues `first`, `first + 1`, … until the phase says stop (or one pass is done) and every request has
/// come back. Several queues take turns, without waiting for one another.
pub fn run(rings: &mut [SplitRing], work: &Work, first: usize, phase: &AtomicU8) -> Result<Tally> {
    let load = |(index, ring)| Load::new(ring, work, first + index);
    let mut loads = rings.iter_mut().enumerate().map(load).collect::<Result<Vec<_>>>()?;
    let mut tally = Tally::default();
    let mut counting = RAMP;
    loop {
        let now = phase.load(Ordering::Relaxed);
        if now != counting && counting == RAMP {
            tally = Tally { failed: tally.failed, ..Tally::default() };
        }
        counting = now;
        let mut busy = false;
        for load in &mut loads {
            busy |= load.turn(counting, work.interrupts, &mut tally)?;
        }
        if !busy {
            return Ok(tally);
        }
    }
}

/// One queue and its requests.
struct Load<'a> {
    ring: &'a mut SplitRing,
    slots: Vec<Slot>,
    by_head: Vec<usize>,
    ready: Vec<usize>,
    places: Places,
    mix: Mix,
    /// When the device last completed something, and how long it may take to complete more.
    heard: Instant,
    limit: Duration,
}

impl<'a> Load<'a> {
    fn new(ring: &'a mut SplitRing, work: &Work, queue: usize) -> Result<Self> {
        let slots = (0..work.depth).map(|_| Slot::new(ring, work)).collect::<Result<Vec<_>>>()?;
        let mut by_head = vec![usize::MAX; usize::from(ring.size)];
        for (index, slot) in slots.iter().enumerate() {
            slot.chains.iter().flatten().for_each(|chain| by_head[usize::from(chain.head)] = index);
        }
        let ready = (0..slots.len()).collect();
        let (places, heard, limit) = (Places::new(work, queue), Instant::now(), limit());
        let mix = Mix { random: Random(queue as u64), reads: u64::from(work.reads) };
        Ok(Load { ring, slots, by_head, ready, places, mix, heard, limit })
    }

    /// Submits what is ready and takes what is done (waiting for an interrupt, if so wished). False when
    /// nothing is in flight any more.
    fn turn(&mut self, counting: u8, interrupts: bool, tally: &mut Tally) -> Result<bool> {
        if counting == STOP || self.places.over() {
            self.ready.clear();
        }
        if !self.ready.is_empty() {
            self.submit();
            self.ring.want_call(false);
            tally.kicks += u64::from(self.ring.kick_if_wanted());
        }
        if self.ring.avail_idx() == self.ring.last_used() {
            return Ok(false);
        }
        let mut next = if interrupts { Some(self.ring.wait_used()?) } else { self.ring.pop_used() };
        let seen = Instant::now();
        if next.is_some() {
            self.heard = seen;
        } else if seen - self.heard >= self.limit {
            return Err(Fault::TimedOut("the completion of a request that is polled for".into()));
        }
        while let Some(used) = next {
            self.complete(used, seen, counting, tally)?;
            next = self.ring.pop_used();
        }
        Ok(true)
    }

    /// Publishes the ready slots as one batch.
    fn submit(&mut self) {
        let start = self.ring.avail_idx();
        let now = Instant::now();
        let mut count = 0;
        for index in self.ready.drain(..) {
            let Some(sector) = self.places.next() else { break };
            let slot = &mut self.slots[index];
            slot.since = now;
            let chain = match &slot.chains {
                [Some(read), Some(write)] => {
                    if self.mix.is_read() {
                        read
                    } else {
                        write
                    }
                }
                [Some(only), None] | [None, Some(only)] => only,
                [None, None] => unreachable!("every pattern reads or writes"),
            };
            self.ring.mem.store(chain.header + 8, sector, Ordering::Relaxed);
            self.ring.mem.store(slot.status, UNTOUCHED, Ordering::Relaxed);
            self.ring.put_head(start.wrapping_add(count), chain.head);
            count += 1;
        }
        self.ring.set_avail_idx(start.wrapping_add(count));
    }

    fn complete(&mut self, used: Used, seen: Instant, counting: u8, tally: &mut Tally) -> Result<()> {
        let index = self.by_head.get(used.id as usize).copied().unwrap_or(usize::MAX);
        let slot = self.slots.get(index).ok_or_else(|| Fault::Protocol(format!("{used:?} is not ours")))?;
        tally.failed += u64::from(self.ring.mem.load::<u8>(slot.status, Ordering::Relaxed) != OK);
        if counting != STOP {
            tally.done += 1;
            tally.latency.record((seen - slot.since).as_nanos() as u64);
        }
        self.ready.push(index);
        Ok(())
    }
}

impl Slot {
    fn new(ring: &mut SplitRing, work: &Work) -> Result<Slot> {
        let mem = ring.mem.clone();
        let data = mem.take(work.bs as usize, 4096);
        if work.pattern.writes() {
            let mut random = Random(data ^ u64::from(std::process::id()));
            let bytes: Vec<u8> = (0..work.bs / 8).flat_map(|_| random.next().to_le_bytes()).collect();
            mem.write(data, &bytes);
        }
        let status = mem.take(1, 1);
        let mut chain = |kind: u32, piece: fn(u64, u32) -> Desc| -> Result<Chain> {
            let header = mem.take(16, 16);
            mem.write(header, &[kind.to_le_bytes(), [0; 4], [0; 4], [0; 4]].concat());
            let mut chain = vec![Desc::readable(header, 16)];
            let mut at = 0;
            while at < work.bs {
                let len = work.segment.min(work.bs - at);
                chain.push(piece(data + at, len as u32));
                at += len;
            }
            chain.push(Desc::writable(status, 1));
            Ok(Chain { head: place(ring, &chain, work.direct)?, header })
        };
        let reads = work.pattern.reads().then(|| chain(IN, Desc::writable)).transpose()?;
        let writes = work.pattern.writes().then(|| chain(OUT, Desc::readable)).transpose()?;
        Ok(Slot { chains: [reads, writes], status, since: Instant::now() })
    }
}

/// Which requests of a mixed load are reads.
struct Mix {
    random: Random,
    reads: u64,
}

impl Mix {
    fn is_read(&mut self) -> bool {
        self.random.next() % 100 < self.reads
    }
}

/// Writes a chain into the ring's table, or into an indirect one; its head.
fn place(ring: &mut SplitRing, chain: &[Desc], direct: bool) -> Result<u16> {
    let entries = if direct { chain.len() } else { 1 };
    let lack = || Fault::Protocol("the ring is too short".into());
    let own = ring.take_descs(entries).ok_or_else(lack)?;
    if direct {
        for (index, desc) in own.iter().zip(linked(chain, |i| own[i])) {
            ring.write_desc(*index, desc);
        }
    } else {
        let table = ring.mem.take(16 * chain.len(), 16);
        ring.write_table(table, &linked(chain, |i| i as u16));
        ring.write_desc(own[0], Desc::table(table, 16 * chain.len() as u32));
    }
    Ok(own[0])
}

/// The sectors to go to, in turn.
struct Places {
    random: Option<Random>,
    blocks: u64,
    sectors: u64,
    at: u64,
    left: Option<u64>,
}

impl Places {
    fn new(work: &Work, queue: usize) -> Self {
        let blocks = work.range / work.bs;
        let seed = 0x5ea1_b10c_0000_0000 + queue as u64;
        Places {
            random: work.pattern.random().then_some(Random(seed)),
            blocks,
            sectors: work.bs / 512,
            at: blocks / u64::from(work.queues) * queue as u64,
            left: work.once.then_some(blocks),
        }
    }

    fn over(&self) -> bool {
        self.left == Some(0)
    }

    fn next(&mut self) -> Option<u64> {
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(1)?;
        }
        let block = match &mut self.random {
            // The upper half of the product is spread evenly over the blocks.
            Some(random) => ((u128::from(random.next()) * u128::from(self.blocks)) >> 64) as u64,
            None => self.at % self.blocks,
        };
        self.at = self.at.wrapping_add(1);
        Some(block * self.sectors)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): quick and good enough to choose blocks and fill buffers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
