//! Descriptor chains over any guest memory, against a model that does its sums with room to spare.

use super::input::Input;
use sealblk::virtio::chain::Chain;
use sealblk::virtio::{MAX_DISCARD_SECTORS, Op, Parsed, Segment, Shape, Status, parse};
use std::sync::LazyLock;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What is guest memory: two regions side by side, and two by themselves.
const REGIONS: [(u64, usize); 4] = [(0, 0x8000), (0x8000, 0x2000), (0x1_0000, 0x1000), (HIGH, 0x1000)];
/// Almost the end of what an address can say.
const HIGH: u64 = 0xffff_ffff_ffff_e000;
/// Most descriptors in a chain that is answered: the largest ring, header and status.
const MOST: usize = 1026;

static MEM: LazyLock<Memory> = LazyLock::new(|| {
    let ranges = REGIONS.map(|(start, len)| (GuestAddress(start), len));
    Memory::from_ranges(&ranges).expect("four mappings")
});

type Memory = GuestMemoryMmap<()>;
type Run = (u64, u32);

/// A disk, a ring, and what lies in memory from address 0, where the descriptor table is.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let block_size = if input.coin() { 4096 } else { 512 };
    let block_sectors = u64::from(block_size) / 512;
    let sectors = input.u64() >> (input.u8() % 64) & !(block_sectors - 1);
    let shape = Shape { sectors, block_size, read_only: input.coin() };
    let size = 2u16 << (input.u8() % 6);
    let head = u16::from(input.u8()) % size;

    // Threads of a test replay one input each.
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let mem = &*MEM;
    fill(mem, input.bytes(0x8000));
    let descriptors = walk(mem, size, head);
    let mut segments = vec![Segment { addr: GuestAddress(1), len: 1 }];
    let parsed = parse(mem, Chain::new(mem, GuestAddress(0), size, head), &shape, &mut segments);

    let Some(parsed) = parsed else { return assert_eq!(model(mem, &descriptors, &shape), None) };
    let expected = model(mem, &descriptors, &shape).expect("a chain that cannot be answered");
    assert_eq!(parsed, expected.0);
    if parsed.op.is_ok() {
        let runs: Vec<Run> = segments.iter().map(|s| (s.addr.0, s.len)).collect();
        assert_eq!(runs, expected.1);
        check(&parsed, &runs, &shape);
    }
}

/// What must hold for whoever executes the request, whatever the model says.
fn check(parsed: &Parsed, runs: &[Run], shape: &Shape) {
    assert!(inside(parsed.status.0, 1));
    assert!(runs.iter().all(|&(addr, len)| len > 0 && inside(addr, len)));
    assert_eq!(parsed.data_len, runs.iter().map(|&(_, len)| u64::from(len)).sum::<u64>());
    let (sector, count) = match parsed.op {
        Ok(Op::Read { sector } | Op::Write { sector }) => (sector, parsed.data_len / 512),
        Ok(Op::Discard { sector, count } | Op::WriteZeroes { sector, count, .. }) => {
            assert!(count <= MAX_DISCARD_SECTORS);
            (sector, u64::from(count))
        }
        _ => (0, 0),
    };
    assert!(u128::from(sector) + u128::from(count) <= u128::from(shape.sectors));
    let block = u64::from(shape.block_size) / 512;
    assert!(sector.is_multiple_of(block) && count.is_multiple_of(block));
    if matches!(parsed.op, Ok(Op::Write { .. } | Op::Discard { .. } | Op::WriteZeroes { .. })) {
        assert!(!shape.read_only);
    }
}

fn fill(mem: &Memory, image: &[u8]) {
    for (start, len) in REGIONS {
        mem.write_slice(&vec![0; len], GuestAddress(start)).expect("a region");
    }
    mem.write_slice(image, GuestAddress(0)).expect("the first region");
}

/// The chain's descriptors, as far as it keeps to the rules, and no more than make it too long.
fn walk(mem: &Memory, size: u16, head: u16) -> Vec<Descriptor> {
    let (mut table, mut entries, mut index, mut steps) = (0u64, u32::from(size), u32::from(head), 0);
    let mut indirect = false;
    let mut chain: Vec<Descriptor> = Vec::new();
    while index < entries && steps < entries && chain.len() <= MOST {
        let Some(at) = table.checked_add(16 * u64::from(index)).filter(|&at| inside(at, 16)) else { break };
        let desc: Descriptor = mem.read_obj(GuestAddress(at)).expect("16 bytes of memory");
        steps += 1;
        if desc.flags() & 4 != 0 {
            if indirect || desc.has_next() || !desc.len().is_multiple_of(16) {
                break;
            }
            (table, entries, index, steps) = (desc.addr().0, desc.len() / 16, 0, 0);
            indirect = true;
            continue;
        }
        chain.push(desc);
        if !desc.has_next() {
            break;
        }
        index = desc.next().into();
    }
    chain
}

/// What `parse` should answer, and which runs it should leave.
fn model(mem: &Memory, chain: &[Descriptor], shape: &Shape) -> Option<(Parsed, Vec<Run>)> {
    if chain.len() > MOST || chain.last()?.has_next() {
        return None;
    }
    let filled: Vec<_> = chain.iter().filter(|d| d.len() > 0).collect();
    let last = filled.last().filter(|d| d.is_write_only())?;
    let status = u128::from(last.addr().0) + u128::from(last.len()) - 1;
    let status = u64::try_from(status).ok().filter(|&at| inside(at, 1))?;
    let failed = |writable| {
        let status = GuestAddress(status);
        (Parsed { op: Err(Status::IoErr), status, writable, data_len: 0 }, Vec::new())
    };
    let first_writable = chain.iter().position(|d| d.is_write_only() && d.len() > 0)?;
    if chain[first_writable..].iter().any(|d| !d.is_write_only()) {
        return Some(failed(1));
    }
    let runs = |writable| {
        filled.iter().filter(move |d| d.is_write_only() == writable).map(|d| (d.addr().0, d.len()))
    };
    let writable: u64 = runs(true).map(|(_, len)| u64::from(len)).sum();
    // More than one chain may have in all.
    let Ok(writable) = u32::try_from(writable) else { return Some(failed(1)) };
    let mut wanted: Vec<Run> = runs(true).collect();
    wanted.last_mut()?.1 -= 1;
    wanted.retain(|run| run.1 > 0);
    let (mut parsed, _) = failed(writable);
    let Some((header, given)) = take_16(mem, runs(false).collect()) else { return Some(failed(writable)) };
    let (op, data) = operation(mem, &header, given, wanted, shape);
    parsed.op = op;
    if op.is_ok() {
        parsed.data_len = data.iter().map(|&(_, len)| u64::from(len)).sum();
    }
    Some((parsed, data))
}

fn operation(
    mem: &Memory,
    header: &[u8; 16],
    given: Vec<Run>,
    wanted: Vec<Run>,
    shape: &Shape,
) -> (Result<Op, Status>, Vec<Run>) {
    let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
    let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
    let ok_if = |fine: bool, op| if fine { Ok(op) } else { Err(Status::IoErr) };
    let in_memory = |runs: &[Run]| runs.iter().all(|&(addr, len)| inside(addr, len));
    let bytes = |runs: &[Run]| runs.iter().map(|&(_, len)| u128::from(len)).sum::<u128>();
    match kind {
        0 => {
            let fine = fits(sector, bytes(&wanted), shape) && in_memory(&wanted);
            (ok_if(fine, Op::Read { sector }), wanted)
        }
        1 => {
            let fine = !shape.read_only && fits(sector, bytes(&given), shape) && in_memory(&given);
            (ok_if(fine, Op::Write { sector }), given)
        }
        4 => (Ok(Op::Flush), Vec::new()),
        8 => (ok_if(in_memory(&wanted), Op::GetId), wanted),
        11 | 13 => (range(mem, kind == 11, given, shape), Vec::new()),
        _ => (Err(Status::Unsupported), Vec::new()),
    }
}

/// DISCARD and WRITE_ZEROES.
fn range(mem: &Memory, discard: bool, given: Vec<Run>, shape: &Shape) -> Result<Op, Status> {
    let len: u64 = given.iter().map(|&(_, len)| u64::from(len)).sum();
    match len {
        _ if shape.read_only => return Err(Status::Unsupported),
        16 => {}
        n if n > 0 && n.is_multiple_of(16) => return Err(Status::Unsupported),
        _ => return Err(Status::IoErr),
    }
    let (bytes, _) = take_16(mem, given).ok_or(Status::IoErr)?;
    let words: [u32; 4] =
        std::array::from_fn(|i| u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("4 bytes")));
    let sector = u64::from(words[1]) << 32 | u64::from(words[0]);
    let (count, flags) = (words[2], words[3]);
    if flags > 1 || discard && flags == 1 {
        return Err(Status::Unsupported);
    }
    if count > MAX_DISCARD_SECTORS || !fits(sector, u128::from(count) * 512, shape) {
        return Err(Status::IoErr);
    }
    Ok(if discard {
        Op::Discard { sector, count }
    } else {
        Op::WriteZeroes { sector, count, unmap: flags == 1 }
    })
}

/// Whether so many bytes from `sector` are whole blocks of the disk.
fn fits(sector: u64, bytes: u128, shape: &Shape) -> bool {
    let (start, block) = (u128::from(sector) * 512, u128::from(shape.block_size));
    start.is_multiple_of(block)
        && bytes.is_multiple_of(block)
        && start + bytes <= u128::from(shape.sectors) * 512
}

/// The first 16 bytes, one by one, and what is left of the runs.
fn take_16(mem: &Memory, runs: Vec<Run>) -> Option<([u8; 16], Vec<Run>)> {
    let (mut bytes, mut rest) = (Vec::new(), Vec::new());
    for (addr, len) in runs {
        let taken = len.min(16 - bytes.len() as u32);
        for i in 0..taken {
            let at = addr.checked_add(u64::from(i)).filter(|&at| inside(at, 1))?;
            bytes.push(mem.read_obj::<u8>(GuestAddress(at)).ok()?);
        }
        if taken < len {
            rest.push((addr + u64::from(taken), len - taken));
        }
    }
    Some((bytes.try_into().ok()?, rest))
}

/// Whether `len` bytes at `addr` are guest memory.
fn inside(addr: u64, len: u32) -> bool {
    let (start, end) = (u128::from(addr), u128::from(addr) + u128::from(len));
    // The two regions side by side are one to a run of bytes.
    let areas = [(0, 0xa000u128), (0x1_0000, 0x1000), (u128::from(HIGH), 0x1000)];
    areas.iter().any(|&(first, size)| start >= first && end <= first + size)
}
