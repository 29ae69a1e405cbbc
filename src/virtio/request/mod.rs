//! A descriptor chain parsed into a request, once, before anything has an effect.
//!
//! Framing is free (virtio 1.3, 2.7.4): header, data and status may share or span descriptors, so everything
//! is found by byte position: the first 16 readable bytes are the header, the last writable byte is the
//! status, what lies between is data.

use crate::virtio::chain::MAX_DESCRIPTORS;
use crate::virtio::{MAX_DISCARD_SECTORS, Shape, memory};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

/// Bytes in the request header: type, reserved, sector.
const HEADER_SIZE: usize = 16;
/// Bytes in one DISCARD or WRITE_ZEROES segment: sector, number of sectors, flags.
const RANGE_SIZE: usize = 16;
/// Bytes that GET_ID answers.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The status byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Failed, or the request was malformed.
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    /// A type or flag that this device does not know.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// A run of guest memory that a request's data lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address of its first byte; the whole run was checked to be guest memory.
    pub addr: GuestAddress,
    /// Its length in bytes, never 0.
    pub len: u32,
}

/// What the guest asks for. Sectors count 512 bytes and were checked against the disk's [`Shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the data segments from the disk.
    Read {
        /// First sector.
        sector: u64,
    },
    /// Store the data segments.
    Write {
        /// First sector.
        sector: u64,
    },
    /// Make completed writes durable.
    Flush,
    /// Put the serial into the data segments.
    GetId,
    /// The range holds nothing of interest any more.
    Discard {
        /// First sector.
        sector: u64,
        /// Number of sectors, possibly 0.
        count: u32,
    },
    /// The range shall read as zeros.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// Number of sectors, possibly 0.
        count: u32,
        /// Whether the space may be given back.
        unmap: bool,
    },
}

/// A chain with a place for its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The operation, or the status to answer at once.
    pub op: Result<Op, Status>,
    /// Where the status byte goes.
    pub status: GuestAddress,
    /// Writable bytes of the chain, status included: what the used ring reports.
    pub writable: u32,
    /// Bytes of data in the segments.
    pub data_len: u64,
}

/// Parses the chain, leaving its data runs in `data` (cleared first). `None` means that the chain has no
/// place for a status byte, or is broken (a loop, a bad `next`): nothing can be answered.
pub fn parse<M: GuestMemory>(
    mem: &M,
    chain: impl Iterator<Item = Descriptor>,
    shape: &Shape,
    data: &mut Vec<Segment>,
) -> Option<Parsed> {
    data.clear();
    let mut out_of_order = false;
    let mut complete = false;
    let mut last_writable = false;
    let mut readable = 0usize;
    let mut count = 0;
    for desc in chain {
        count += 1;
        if count > MAX_DESCRIPTORS {
            return None;
        }
        complete = !desc.has_next();
        let writable = desc.is_write_only();
        out_of_order |= !writable && readable < data.len();
        if desc.len() == 0 {
            continue;
        }
        data.push(Segment { addr: desc.addr(), len: desc.len() });
        last_writable = writable;
        if !writable && !out_of_order {
            readable = data.len();
        }
    }
    if !complete || !last_writable {
        return None;
    }
    // `data[..readable]` is device-readable, the rest device-writable, unless a readable descriptor stands
    // behind a writable one: then the chain is malformed, and only its last byte is of use.
    let writable_len: u64 = data[readable..].iter().map(|s| u64::from(s.len)).sum();
    let status = take_status(data)?;
    if !mem.check_range(status, 1, Permissions::Write) {
        return None;
    }
    let mut parsed = Parsed { op: Err(Status::IoErr), status, writable: 1, data_len: 0 };
    match u32::try_from(writable_len) {
        Ok(len) if !out_of_order => parsed.writable = len,
        // Longer than a chain may be (2.7.5.3.1), or malformed as said above.
        _ => return Some(parsed),
    }
    if let Some(header) = take_header(mem, data, &mut readable) {
        parsed.op = operation(mem, header, shape, data, readable);
        if parsed.op.is_ok() {
            parsed.data_len = data.iter().map(|s| u64::from(s.len)).sum();
        }
    }
    Some(parsed)
}

/// Removes the last byte of the writable runs and returns its address.
fn take_status(data: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = data.last_mut()?;
    let status = last.addr.checked_add(u64::from(last.len) - 1)?;
    last.len -= 1;
    if last.len == 0 {
        data.pop();
    }
    Some(status)
}

/// Removes the first 16 bytes of the readable runs and returns them.
fn take_header<M: GuestMemory>(
    mem: &M,
    data: &mut Vec<Segment>,
    readable: &mut usize,
) -> Option<[u8; HEADER_SIZE]> {
    let first = data[..*readable].first_mut()?;
    if first.len as usize == HEADER_SIZE {
        // As drivers lay it out.
        let header = memory::read::<u128>(mem, first.addr).ok()?;
        data.remove(0);
        *readable -= 1;
        return Some(header.to_ne_bytes());
    }
    let mut header = [0; HEADER_SIZE];
    let mut filled = 0;
    let mut used_up = 0;
    for segment in &mut data[..*readable] {
        let n = (HEADER_SIZE - filled).min(segment.len as usize);
        mem.read_slice(&mut header[filled..filled + n], segment.addr).ok()?;
        filled += n;
        segment.addr = segment.addr.checked_add(n as u64)?;
        segment.len -= n as u32;
        used_up += usize::from(segment.len == 0);
        if filled == HEADER_SIZE {
            break;
        }
    }
    data.drain(..used_up);
    *readable -= used_up;
    (filled == HEADER_SIZE).then_some(header)
}

/// Checks every number of the request. `data[..readable]` is what the guest gives, the rest what it wants.
fn operation<M: GuestMemory>(
    mem: &M,
    header: [u8; HEADER_SIZE],
    shape: &Shape,
    data: &mut Vec<Segment>,
    readable: usize,
) -> Result<Op, Status> {
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut sector = [0; 8];
    sector.copy_from_slice(&header[8..]);
    let sector = u64::from_le_bytes(sector);
    match kind {
        VIRTIO_BLK_T_IN => {
            data.drain(..readable);
            transfer(mem, shape, data, sector, Permissions::Write)?;
            Ok(Op::Read { sector })
        }
        VIRTIO_BLK_T_OUT => {
            writable_disk(shape)?;
            data.truncate(readable);
            transfer(mem, shape, data, sector, Permissions::Read)?;
            Ok(Op::Write { sector })
        }
        VIRTIO_BLK_T_FLUSH => {
            data.clear();
            Ok(Op::Flush)
        }
        VIRTIO_BLK_T_GET_ID => {
            data.drain(..readable);
            in_memory(mem, data, Permissions::Write)?;
            Ok(Op::GetId)
        }
        VIRTIO_BLK_T_DISCARD => {
            let (sector, count, flags) = range(mem, shape, data, readable)?;
            // The unmap flag belongs to WRITE_ZEROES alone (virtio 1.3, 5.2.6.2).
            if flags != 0 {
                return Err(Status::Unsupported);
            }
            check_range(shape, sector, count)?;
            Ok(Op::Discard { sector, count })
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            let (sector, count, flags) = range(mem, shape, data, readable)?;
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                return Err(Status::Unsupported);
            }
            check_range(shape, sector, count)?;
            Ok(Op::WriteZeroes { sector, count, unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 })
        }
        _ => Err(Status::Unsupported),
    }
}

fn transfer<M: GuestMemory>(
    mem: &M,
    shape: &Shape,
    data: &[Segment],
    sector: u64,
    access: Permissions,
) -> Result<(), Status> {
    let len: u64 = data.iter().map(|s| u64::from(s.len)).sum();
    if !len.is_multiple_of(crate::virtio::SECTOR_SIZE)
        || !shape.contains(sector, len / crate::virtio::SECTOR_SIZE)
    {
        return Err(Status::IoErr);
    }
    in_memory(mem, data, access)
}

fn in_memory<M: GuestMemory>(mem: &M, data: &[Segment], access: Permissions) -> Result<(), Status> {
    let inside = data.iter().all(|s| mem.check_range(s.addr, s.len as usize, access));
    if inside { Ok(()) } else { Err(Status::IoErr) }
}

fn writable_disk(shape: &Shape) -> Result<(), Status> {
    if shape.read_only { Err(Status::IoErr) } else { Ok(()) }
}

/// Reads the one range of a DISCARD or WRITE_ZEROES request: sector, number of sectors, flags.
fn range<M: GuestMemory>(
    mem: &M,
    shape: &Shape,
    data: &mut Vec<Segment>,
    mut readable: usize,
) -> Result<(u64, u32, u32), Status> {
    // Not offered by a read-only device.
    if shape.read_only {
        return Err(Status::Unsupported);
    }
    data.truncate(readable);
    let len: u64 = data.iter().map(|s| u64::from(s.len)).sum();
    if len == 0 || !len.is_multiple_of(RANGE_SIZE as u64) {
        return Err(Status::IoErr);
    }
    if len != RANGE_SIZE as u64 {
        // More segments than max_discard_seg and max_write_zeroes_seg say.
        return Err(Status::Unsupported);
    }
    let bytes = take_header(mem, data, &mut readable).ok_or(Status::IoErr)?;
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
    Ok((sector, word(8), word(12)))
}

fn check_range(shape: &Shape, sector: u64, count: u32) -> Result<(), Status> {
    let fits = count <= MAX_DISCARD_SECTORS && shape.contains(sector, u64::from(count));
    if fits { Ok(()) } else { Err(Status::IoErr) }
}

#[cfg(test)]
mod tests;
