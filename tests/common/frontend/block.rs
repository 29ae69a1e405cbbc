//! virtio-blk requests (virtio 1.3, section 5.2.6) of any shape: the bytes that the device reads (header and
//! data) and those it writes (data and status) are two streams, cut into descriptors wherever one likes.

use super::super::patience::limit;
use super::ring::{WRITE, linked};
use super::{Desc, Fault, GuestMem, Result, SplitRing, Used};

/// Request types.
pub const IN: u32 = 0;
/// Write.
pub const OUT: u32 = 1;
/// Empty the volatile cache.
pub const FLUSH: u32 = 4;
/// Read the serial.
pub const GET_ID: u32 = 8;
/// The data is no longer needed.
pub const DISCARD: u32 = 11;
/// Make the data zeros.
pub const WRITE_ZEROES: u32 = 13;

/// Status: done.
pub const OK: u8 = 0;
/// Status: failed.
pub const IOERR: u8 = 1;
/// Status: not supported.
pub const UNSUPP: u8 = 2;
/// What the status byte holds before the device writes it.
pub const UNTOUCHED: u8 = 0xee;

/// What the data buffer of a read holds before the device writes it.
pub const BLANK: u8 = 0xdd;

const GUARD: [u8; 8] = [0xa5; 8];
const HEADER: usize = 16;

/// Where the two streams are cut into descriptors. Data means what follows the header or precedes the status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Header, data, status: what most drivers do.
    Classic,
    /// The header in three descriptors.
    SplitHeader,
    /// Header and data to be written in one.
    HeaderWithData,
    /// Data to be read and status in one.
    DataWithStatus,
    /// As few descriptors as there can be.
    Compact,
    /// Data in pieces of these sizes, in turn, at odd addresses.
    Scattered(Vec<usize>),
    /// Any cuts, as byte positions in the stream that the device reads and in the one it writes.
    Cuts(Vec<usize>, Vec<usize>),
}

/// Where the descriptors lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the ring's table.
    Direct,
    /// All in one indirect table.
    Indirect,
    /// The first so many in the ring's table, the rest in an indirect table.
    DirectThenIndirect(usize),
}

/// One segment of a discard or write-zeroes.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub count: u32,
    /// Bit 0: unmap; the others are reserved.
    pub flags: u32,
}

/// A request, before it becomes descriptors.
#[derive(Clone, Debug)]
pub struct Request {
    /// The header's type, known or not.
    pub kind: u32,
    /// The header's sector.
    pub sector: u64,
    /// What the device reads after the header.
    pub out: Vec<u8>,
    /// How many bytes the device may write before the status.
    pub want: usize,
    /// Whether there is a status byte.
    pub status: bool,
    /// Where it is cut.
    pub framing: Framing,
    /// Where the descriptors lie.
    pub place: Place,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status byte; `UNTOUCHED` where the device wrote none.
    pub status: u8,
    /// What the device says it has written, bytes.
    pub used_len: u32,
    /// The data buffer of a read; `BLANK` where the device wrote nothing.
    pub data: Vec<u8>,
}

/// A request that is on the ring.
pub struct Pending {
    /// The head of its chain.
    pub head: u16,
    descs: Vec<u16>,
    written: Vec<(u64, usize)>,
    guards: Vec<u64>,
    taken: usize,
    status: bool,
}

impl Request {
    /// A request of any type with data in either direction.
    pub fn new(kind: u32, sector: u64, out: Vec<u8>, want: usize) -> Self {
        Request { kind, sector, out, want, status: true, framing: Framing::Classic, place: Place::Direct }
    }

    /// Reads `len` bytes.
    pub fn read(sector: u64, len: usize) -> Self {
        Self::new(IN, sector, Vec::new(), len)
    }

    /// Writes `data`.
    pub fn write(sector: u64, data: &[u8]) -> Self {
        Self::new(OUT, sector, data.to_vec(), 0)
    }

    /// Empties the volatile cache.
    pub fn flush() -> Self {
        Self::new(FLUSH, 0, Vec::new(), 0)
    }

    /// Reads the serial into a buffer of `len` bytes.
    pub fn get_id(len: usize) -> Self {
        Self::new(GET_ID, 0, Vec::new(), len)
    }

    /// Discards the segments.
    pub fn discard(segments: &[Segment]) -> Self {
        Self::new(DISCARD, 0, segment_bytes(segments), 0)
    }

    /// Zeros the segments.
    pub fn write_zeroes(segments: &[Segment]) -> Self {
        Self::new(WRITE_ZEROES, 0, segment_bytes(segments), 0)
    }

    /// This request, cut otherwise.
    pub fn framed(mut self, framing: Framing) -> Self {
        self.framing = framing;
        self
    }

    /// This request, its descriptors elsewhere.
    pub fn placed(mut self, place: Place) -> Self {
        self.place = place;
        self
    }

    /// This request without a status byte.
    pub fn without_status(mut self) -> Self {
        self.status = false;
        self
    }

    /// Puts the request on the ring, kicks the device if it wants that and waits for the completion.
    pub fn run(&self, ring: &mut SplitRing) -> Result<Outcome> {
        let pending = self.submit(ring)?;
        ring.kick_if_wanted();
        let used = ring.wait_used()?;
        pending.finish(ring, used)
    }

    /// Puts the request on the ring without kicking the device.
    pub fn submit(&self, ring: &mut SplitRing) -> Result<Pending> {
        let mem = ring.mem.clone();
        let mut pending = Pending {
            head: 0,
            descs: Vec::new(),
            written: Vec::new(),
            guards: Vec::new(),
            taken: 0,
            status: self.status,
        };
        let chain = self.lay_out(&mem, &mut pending);
        let direct = match self.place {
            Place::Direct => chain.len(),
            Place::Indirect => 0,
            Place::DirectThenIndirect(n) => n.min(chain.len() - 1),
        };
        let entries = direct + usize::from(direct < chain.len());
        let descs = ring.take_descs(entries).ok_or_else(|| {
            mem.release(pending.taken);
            Fault::Protocol(format!("the ring has no {entries} free descriptors"))
        })?;
        let mut own: Vec<Desc> = chain[..direct].to_vec();
        if direct < chain.len() {
            let table = &chain[direct..];
            let addr = pending.take(&mem, 16 * table.len(), 16);
            ring.write_table(addr, &linked(table, |i| i as u16));
            own.push(Desc::table(addr, 16 * table.len() as u32));
        }
        for (index, desc) in descs.iter().zip(linked(&own, |i| descs[i])) {
            ring.write_desc(*index, desc);
        }
        pending.head = descs[0];
        pending.descs = descs;
        ring.publish(pending.head);
        Ok(pending)
    }

    fn header(&self) -> Vec<u8> {
        let mut bytes = self.kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(self.sector.to_le_bytes());
        bytes
    }

    /// Buffers for both streams, filled; the chain without its links.
    fn lay_out(&self, mem: &GuestMem, pending: &mut Pending) -> Vec<Desc> {
        let readable = [self.header(), self.out.clone()].concat();
        let mut writable = vec![BLANK; self.want];
        writable.extend(self.status.then_some(UNTOUCHED));
        let (read_cuts, write_cuts) = self.cuts(readable.len());
        let align = if matches!(self.framing, Framing::Scattered(_)) { 1 } else { 512 };
        let mut chain = Vec::new();
        for piece in pieces(&readable, &read_cuts) {
            let addr = pending.buffer(mem, piece, align);
            chain.push(Desc::readable(addr, piece.len() as u32));
        }
        for piece in pieces(&writable, &write_cuts) {
            let addr = pending.buffer(mem, piece, align);
            pending.written.push((addr, piece.len()));
            chain.push(Desc::writable(addr, piece.len() as u32));
        }
        chain
    }

    fn cuts(&self, readable: usize) -> (Vec<usize>, Vec<usize>) {
        match &self.framing {
            Framing::Classic => (vec![HEADER], vec![self.want]),
            Framing::SplitHeader => (vec![4, 9, HEADER], vec![self.want]),
            Framing::HeaderWithData => (vec![], vec![self.want]),
            Framing::DataWithStatus => (vec![HEADER], vec![]),
            Framing::Compact => (vec![], vec![]),
            Framing::Scattered(sizes) => (steps(HEADER, readable, sizes), steps(0, self.want, sizes)),
            Framing::Cuts(read, write) => (read.clone(), write.clone()),
        }
    }
}

impl Pending {
    /// Takes the result of a completion that is this request's, and gives its memory back.
    pub fn finish(self, ring: &mut SplitRing, used: Used) -> Result<Outcome> {
        if used.id != u32::from(self.head) {
            return Err(Fault::Protocol(format!("head {} was submitted, {used:?} completed", self.head)));
        }
        let mem = ring.mem.clone();
        let mut data = Vec::new();
        for (addr, len) in &self.written {
            data.extend(mem.read(*addr, *len));
        }
        if self.guards.iter().any(|g| mem.read(*g, GUARD.len()) != GUARD) {
            return Err(Fault::Protocol("the device wrote outside the descriptors".into()));
        }
        let status = if self.status { data.pop().unwrap_or(UNTOUCHED) } else { UNTOUCHED };
        mem.release(self.taken);
        ring.give_descs(self.descs);
        Ok(Outcome { status, used_len: used.len, data })
    }

    fn take(&mut self, mem: &GuestMem, len: usize, align: u64) -> u64 {
        self.taken += 1;
        mem.take(len, align)
    }

    fn buffer(&mut self, mem: &GuestMem, content: &[u8], align: u64) -> u64 {
        let addr = self.take(mem, content.len() + GUARD.len(), align);
        mem.write(addr, content);
        let guard = addr + content.len() as u64;
        mem.write(guard, &GUARD);
        self.guards.push(guard);
        addr
    }
}

/// Buffers of one request, laid out but not yet linked.
pub struct Parts {
    /// The header.
    pub header: Desc,
    /// 4096 bytes that the device reads or writes, according to the type.
    pub data: Desc,
    /// The status byte.
    pub status: Desc,
}

/// Header, data and status of a request, for chains made by hand.
pub fn parts(ring: &SplitRing, kind: u32, sector: u64) -> Parts {
    let header = ring.mem.take(16, 16);
    ring.mem.write(header, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    let data = ring.mem.take(4096, 512);
    ring.mem.write(data, &[BLANK; 4096]);
    let status = ring.mem.take(1, 1);
    ring.mem.write(status, &[UNTOUCHED]);
    let flags = if kind == IN { WRITE } else { 0 };
    let data = Desc { addr: data, len: 4096, flags, next: 0 };
    Parts { header: Desc::readable(header, 16), data, status: Desc::writable(status, 1) }
}

/// Waits until all of these are done, in whatever order; their outcomes in the order given. Each head must
/// come back exactly once.
pub fn complete(ring: &mut SplitRing, pending: Vec<Pending>) -> Result<Vec<Outcome>> {
    let mut pending: Vec<_> = pending.into_iter().map(Some).collect();
    let mut outcomes: Vec<_> = pending.iter().map(|_| None).collect();
    for _ in 0..pending.len() {
        let used = ring.wait_used()?;
        let is_it = |p: &Option<Pending>| p.as_ref().is_some_and(|p| u32::from(p.head) == used.id);
        let index = pending.iter().position(is_it);
        let index =
            index.ok_or_else(|| Fault::Protocol(format!("{used:?} is not, or no more, in flight")))?;
        let done = pending[index].take().expect("found above");
        outcomes[index] = Some(done.finish(ring, used)?);
    }
    Ok(outcomes.into_iter().flatten().collect())
}

fn pieces<'a>(stream: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut ends: Vec<usize> = cuts.iter().copied().filter(|c| *c < stream.len()).collect();
    ends.push(stream.len());
    let mut start = 0;
    let mut out = Vec::new();
    for end in ends {
        if end > start {
            out.push(&stream[start..end]);
            start = end;
        }
    }
    out
}

fn steps(start: usize, end: usize, sizes: &[usize]) -> Vec<usize> {
    let mut cuts = vec![start];
    for size in sizes.iter().cycle() {
        let next = cuts[cuts.len() - 1] + size;
        if next >= end {
            break;
        }
        cuts.push(next);
    }
    cuts.push(end);
    cuts
}

fn segment_bytes(segments: &[Segment]) -> Vec<u8> {
    let bytes = |s: &Segment| {
        let mut bytes = s.sector.to_le_bytes().to_vec();
        bytes.extend(s.count.to_le_bytes());
        bytes.extend(s.flags.to_le_bytes());
        bytes
    };
    segments.iter().flat_map(bytes).collect()
}
