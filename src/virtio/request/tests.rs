//! Chains in guest memory, as the device meets them.

use super::*;
use crate::virtio::chain::Chain;
use vm_memory::GuestMemoryMmap;

const READ: u32 = VIRTIO_BLK_T_IN;
const WRITE: u32 = VIRTIO_BLK_T_OUT;
const FLUSH: u32 = VIRTIO_BLK_T_FLUSH;
const GET_ID: u32 = VIRTIO_BLK_T_GET_ID;
const DISCARD: u32 = VIRTIO_BLK_T_DISCARD;
const ZEROES: u32 = VIRTIO_BLK_T_WRITE_ZEROES;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;

/// Guest memory: `0..END`, a hole, and `ISLAND..ISLAND + 0x1000`. Descriptors lie at 0.
const END: u64 = 0x10_000;
const ISLAND: u64 = 0x20_000;
const TABLE: u64 = 0x8000;
const HEADER: u64 = 0x1000;
/// Data that the guest gives lies right behind the header.
const GIVEN: u64 = HEADER + 16;
const WANTED: u64 = 0x4000;
const STATUS: u64 = 0x7000;

/// 1000 sectors, in blocks of 512 bytes.
const DISK: Shape = Shape { sectors: 1000, block_size: 512, read_only: false };
const DISK_4K: Shape = Shape { block_size: 4096, ..DISK };
const READ_ONLY: Shape = Shape { read_only: true, ..DISK };

/// Address and length of a descriptor that the device reads, or writes.
#[derive(Clone, Copy)]
enum Part {
    Out(u64, u32),
    In(u64, u32),
}
use Part::{In, Out};

struct Guest {
    mem: GuestMemoryMmap<()>,
    disk: Shape,
}

impl Guest {
    /// With a request's header in memory.
    fn new(disk: Shape, kind: u32, sector: u64) -> Self {
        let ranges = [(GuestAddress(0), END as usize), (GuestAddress(ISLAND), 0x1000)];
        let guest = Guest { mem: GuestMemoryMmap::from_ranges(&ranges).unwrap(), disk };
        guest.put(HEADER, &kind.to_le_bytes());
        guest.put(HEADER + 8, &sector.to_le_bytes());
        guest
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// A range of DISCARD or WRITE_ZEROES behind the header.
    fn range(self, sector: u64, count: u32, flags: u32) -> Self {
        self.put(GIVEN, &sector.to_le_bytes());
        self.put(GIVEN + 8, &count.to_le_bytes());
        self.put(GIVEN + 12, &flags.to_le_bytes());
        self
    }

    fn table(&self, at: u64, parts: &[Part]) {
        for (i, part) in parts.iter().enumerate() {
            let (addr, len, flags) = match *part {
                Out(addr, len) => (addr, len, 0),
                In(addr, len) => (addr, len, WRITABLE),
            };
            let next = if i + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(at, i as u16, Descriptor::new(addr, len, flags | next, i as u16 + 1));
        }
    }

    fn descriptor(&self, table: u64, index: u16, desc: Descriptor) {
        self.mem.write_obj(desc, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Parses the chain that begins with descriptor 0 of a table of 64.
    fn pop(&self) -> (Option<Parsed>, Vec<(u64, u32)>) {
        let chain = Chain::new(&self.mem, GuestAddress(0), 64, 0);
        let mut data = vec![Segment { addr: GuestAddress(1), len: 1 }];
        let parsed = parse(&self.mem, chain, &self.disk, &mut data);
        (parsed, data.iter().map(|s| (s.addr.0, s.len)).collect())
    }

    fn parse(&self, parts: &[Part]) -> (Option<Parsed>, Vec<(u64, u32)>) {
        self.table(0, parts);
        self.pop()
    }

    /// The operation of a chain that has a status, and its data.
    fn accept(&self, parts: &[Part]) -> (Op, Vec<(u64, u32)>) {
        let (parsed, data) = self.parse(parts);
        let parsed = parsed.expect("a status can be written");
        let writable = |p: &Part| if let In(_, len) = p { *len } else { 0 };
        assert_eq!(parsed.writable, parts.iter().map(writable).sum::<u32>());
        assert_eq!(parsed.data_len, data.iter().map(|d| u64::from(d.1)).sum::<u64>());
        (parsed.op.expect("a request in order"), data)
    }

    /// The status with which a chain is refused.
    fn refuse(&self, parts: &[Part]) -> Status {
        let parsed = self.parse(parts).0.expect("a status can be written");
        assert_eq!(parsed.data_len, 0);
        parsed.op.expect_err("refused")
    }
}

/// Header, `len` bytes of data to the device, status.
fn giving(len: u32) -> [Part; 3] {
    [Out(HEADER, 16), Out(GIVEN, len), In(STATUS, 1)]
}

/// Header, `len` bytes of data from the device, status.
fn wanting(len: u32) -> [Part; 3] {
    [Out(HEADER, 16), In(WANTED, len), In(STATUS, 1)]
}

/// Runs that touch, made one.
fn joined(data: &[(u64, u32)]) -> Vec<(u64, u32)> {
    let mut out: Vec<(u64, u32)> = Vec::new();
    for &(addr, len) in data {
        match out.last_mut() {
            Some(last) if last.0 + u64::from(last.1) == addr => last.1 += len,
            _ => out.push((addr, len)),
        }
    }
    out
}

#[test]
fn each_operation_in_three_descriptors() {
    let of = |kind, parts: &[Part]| Guest::new(DISK, kind, 7).range(8, 9, 1).accept(parts);
    assert_eq!(of(READ, &wanting(1024)), (Op::Read { sector: 7 }, vec![(WANTED, 1024)]));
    assert_eq!(of(WRITE, &giving(1024)), (Op::Write { sector: 7 }, vec![(GIVEN, 1024)]));
    assert_eq!(of(FLUSH, &[Out(HEADER, 16), In(STATUS, 1)]), (Op::Flush, vec![]));
    assert_eq!(of(GET_ID, &wanting(20)), (Op::GetId, vec![(WANTED, 20)]));
    let zeroes = Op::WriteZeroes { sector: 8, count: 9, unmap: true };
    assert_eq!(of(ZEROES, &giving(16)), (zeroes, vec![]));
    let discard = Guest::new(DISK, DISCARD, 7).range(8, 9, 0).accept(&giving(16));
    assert_eq!(discard, (Op::Discard { sector: 8, count: 9 }, vec![]));
}

#[test]
fn the_status_is_the_last_writable_byte() {
    let guest = Guest::new(DISK, READ, 0);
    for (parts, status) in [
        (&[Out(HEADER, 16), In(STATUS, 1)][..], STATUS),
        (&[Out(HEADER, 16), In(WANTED, 513)], WANTED + 512),
        (&[Out(HEADER, 16), In(WANTED, 500), In(STATUS, 13)], STATUS + 12),
        (&[Out(HEADER, 16), In(WANTED, 513), In(STATUS, 0)], WANTED + 512),
        (&[Out(HEADER, 16), In(ISLAND, 512), In(END - 1, 1)], END - 1),
    ] {
        let parsed = guest.parse(parts).0.unwrap();
        assert_eq!(parsed.status, GuestAddress(status));
        assert!(parsed.op.is_ok());
    }
}

#[test]
fn readable_bytes_may_be_cut_anywhere() {
    let whole = 16 + 1024;
    for first in 1..whole {
        for second in [first + 1, first + 15, first + 16, first + 511].into_iter().filter(|&s| s < whole) {
            let (a, b) = (u64::from(first), u64::from(second));
            let parts = [
                Out(HEADER, first),
                Out(HEADER + a, second - first),
                Out(HEADER + b, whole - second),
                In(STATUS, 1),
            ];
            let (op, data) = Guest::new(DISK, WRITE, 5).accept(&parts);
            assert_eq!((op, joined(&data)), (Op::Write { sector: 5 }, vec![(GIVEN, 1024)]));
        }
    }
}

#[test]
fn writable_bytes_may_be_cut_anywhere() {
    let guest = Guest::new(DISK, READ, 5);
    for cut in 1..1025 {
        let parts =
            [Out(HEADER, 3), Out(HEADER + 3, 13), In(WANTED, cut), In(WANTED + u64::from(cut), 1025 - cut)];
        let (op, data) = guest.accept(&parts);
        assert_eq!((op, joined(&data)), (Op::Read { sector: 5 }, vec![(WANTED, 1024)]));
        assert!(data.iter().all(|run| run.1 > 0));
    }
}

#[test]
fn a_range_may_be_cut_anywhere_too() {
    for cut in 1..32 {
        let parts = [Out(HEADER, cut), Out(HEADER + u64::from(cut), 32 - cut), In(STATUS, 1)];
        let (op, data) = Guest::new(DISK, DISCARD, 0).range(8, 9, 0).accept(&parts);
        assert_eq!((op, data), (Op::Discard { sector: 8, count: 9 }, vec![]));
    }
}

#[test]
fn descriptors_of_no_bytes_change_nothing() {
    let expected = Guest::new(DISK, READ, 5).parse(&wanting(512));
    let nowhere = 0xdead_0000_0000;
    for place in 0..=3 {
        let empty = if place < 2 { Out(nowhere, 0) } else { In(nowhere, 0) };
        let mut parts = wanting(512).to_vec();
        parts.insert(place, empty);
        assert_eq!(Guest::new(DISK, READ, 5).parse(&parts), expected, "at {place}");
    }
    // One that the device may write, ahead of the header, puts nothing behind anything.
    let parts = [In(nowhere, 0), Out(HEADER, 16), In(WANTED, 512), In(STATUS, 1)];
    assert_eq!(Guest::new(DISK, READ, 5).parse(&parts), expected);
}

#[test]
fn sectors_are_inside_the_disk_whatever_they_are_multiplied_by() {
    let table = [
        (0, 512, true),
        (0, 512 * 30, true),
        (999, 512, true),
        (999, 1024, false),
        (1000, 512, false),
        (1000, 0, true),
        (1001, 0, false),
        (1 << 54, 512, false),
        (1 << 55, 512, false),
        (1 << 55, 0, false),
        ((1 << 55) - 1, 1024, false),
        (u64::MAX, 512, false),
        (u64::MAX, 0, false),
        (u64::MAX - 1, 1024, false),
        (u64::MAX / 512, 1024, false),
        (0, 511, false),
        (0, 513, false),
        (0, 1, false),
    ];
    for (sector, len, good) in table {
        let read = Guest::new(DISK, READ, sector);
        let write = Guest::new(DISK, WRITE, sector);
        if good {
            assert_eq!(read.accept(&wanting(len)).0, Op::Read { sector });
            assert_eq!(write.accept(&giving(len)).0, Op::Write { sector });
        } else {
            assert_eq!(read.refuse(&wanting(len)), Status::IoErr, "read {len} bytes at {sector}");
            assert_eq!(write.refuse(&giving(len)), Status::IoErr, "write {len} bytes at {sector}");
        }
    }
}

#[test]
fn a_disk_as_large_as_a_number_ends_all_the_same() {
    let disk = Shape { sectors: u64::MAX, ..DISK };
    let last = Guest::new(disk, READ, u64::MAX - 1);
    assert_eq!(last.accept(&wanting(512)).0, Op::Read { sector: u64::MAX - 1 });
    assert_eq!(last.refuse(&wanting(1024)), Status::IoErr);
}

#[test]
fn large_blocks_are_moved_whole() {
    for (sector, len, good) in [
        (0, 4096, true),
        (992, 4096, true),
        (8, 8192, true),
        (1, 4096, false),
        (4, 4096, false),
        (8, 512, false),
        (8, 4608, false),
        (996, 4096, false),
    ] {
        let guest = Guest::new(DISK_4K, READ, sector);
        match good {
            true => assert_eq!(guest.accept(&wanting(len)).0, Op::Read { sector }),
            false => assert_eq!(guest.refuse(&wanting(len)), Status::IoErr, "{len} bytes at {sector}"),
        }
        let range = Guest::new(DISK_4K, DISCARD, 0).range(sector, len / 512, 0).parse(&giving(16));
        assert_eq!(range.0.unwrap().op.is_ok(), good, "discard {len} bytes at {sector}");
    }
}

#[test]
fn a_read_only_disk_is_only_read() {
    assert_eq!(Guest::new(READ_ONLY, WRITE, 0).refuse(&giving(512)), Status::IoErr);
    assert_eq!(Guest::new(READ_ONLY, WRITE, 0).refuse(&giving(0)), Status::IoErr);
    for kind in [DISCARD, ZEROES] {
        let guest = Guest::new(READ_ONLY, kind, 0).range(0, 1, 0);
        assert_eq!(guest.refuse(&giving(16)), Status::Unsupported);
    }
    assert_eq!(Guest::new(READ_ONLY, READ, 0).accept(&wanting(512)).0, Op::Read { sector: 0 });
    assert_eq!(Guest::new(READ_ONLY, FLUSH, 0).accept(&wanting(0)).0, Op::Flush);
    assert_eq!(Guest::new(READ_ONLY, GET_ID, 0).accept(&wanting(20)).0, Op::GetId);
}

#[test]
fn ranges_are_one_and_inside_the_disk() {
    let disk = Shape { sectors: 1 << 30, ..DISK };
    let most = MAX_DISCARD_SECTORS;
    for kind in [DISCARD, ZEROES] {
        for (sector, count, expected) in [
            (0, 0, None),
            (0, most, None),
            ((1 << 30) - 1, 1, None),
            (1 << 30, 0, None),
            (0, most + 1, Some(Status::IoErr)),
            (0, u32::MAX, Some(Status::IoErr)),
            ((1 << 30) - 1, 2, Some(Status::IoErr)),
            (1 << 30, 1, Some(Status::IoErr)),
            (1 << 55, 1, Some(Status::IoErr)),
            (u64::MAX, 1, Some(Status::IoErr)),
            (u64::MAX, u32::MAX, Some(Status::IoErr)),
        ] {
            let parsed = Guest::new(disk, kind, 0).range(sector, count, 0).parse(&giving(16)).0.unwrap();
            assert_eq!(parsed.op.err(), expected, "{count} sectors at {sector}");
        }
        // Any but one range, and ranges that are cut short.
        for (len, status) in [
            (0, Status::IoErr),
            (1, Status::IoErr),
            (15, Status::IoErr),
            (17, Status::IoErr),
            (32, Status::Unsupported),
            (48, Status::Unsupported),
        ] {
            let guest = Guest::new(disk, kind, 0).range(0, 1, 0);
            assert_eq!(guest.refuse(&giving(len)), status, "{len} bytes of ranges");
        }
    }
}

#[test]
fn only_write_zeroes_may_unmap_and_other_flags_are_unknown() {
    for flags in [0, 1, 2, 3, 1 << 31, u32::MAX] {
        let op = |kind| Guest::new(DISK, kind, 0).range(1, 2, flags).parse(&giving(16)).0.unwrap().op;
        let discard = Op::Discard { sector: 1, count: 2 };
        let zeroes = Op::WriteZeroes { sector: 1, count: 2, unmap: flags == 1 };
        let known = |op, good: bool| if good { Ok(op) } else { Err(Status::Unsupported) };
        assert_eq!(op(DISCARD), known(discard, flags == 0), "discard, flags {flags:#x}");
        assert_eq!(op(ZEROES), known(zeroes, flags <= 1), "write zeroes, flags {flags:#x}");
    }
}

#[test]
fn an_id_goes_into_whatever_room_there_is() {
    let guest = Guest::new(DISK, GET_ID, u64::MAX);
    for len in [1, 19, 20, 21, 4096] {
        assert_eq!(guest.accept(&wanting(len)), (Op::GetId, vec![(WANTED, len)]));
    }
    assert_eq!(guest.accept(&wanting(0)), (Op::GetId, vec![]));
    let parts = [Out(HEADER, 16), In(WANTED, 7), In(END, 13), In(STATUS, 1)];
    assert_eq!(guest.refuse(&parts), Status::IoErr);
}

#[test]
fn unknown_kinds_are_unsupported() {
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 15, 16, 0x100, 1 << 31, u32::MAX] {
        assert_eq!(Guest::new(DISK, kind, 0).refuse(&wanting(512)), Status::Unsupported, "kind {kind}");
    }
}

#[test]
fn a_header_that_is_short_or_elsewhere_is_an_error() {
    let guest = Guest::new(DISK, FLUSH, 0);
    for header in [Out(HEADER, 15), Out(HEADER, 0), Out(END, 16), Out(END - 8, 16), Out(u64::MAX - 8, 16)] {
        assert_eq!(guest.refuse(&[header, In(STATUS, 1)]), Status::IoErr);
    }
    assert_eq!(guest.refuse(&[In(STATUS, 1)]), Status::IoErr);
    assert_eq!(guest.refuse(&[In(WANTED, 16), In(STATUS, 1)]), Status::IoErr);
}

#[test]
fn data_of_the_wrong_direction_is_no_data() {
    let parts = [Out(HEADER, 16), Out(GIVEN, 512), In(WANTED, 1024), In(STATUS, 1)];
    let (op, data) = Guest::new(DISK, READ, 3).accept(&parts);
    assert_eq!((op, data), (Op::Read { sector: 3 }, vec![(WANTED, 1024)]));
    let (op, data) = Guest::new(DISK, WRITE, 3).accept(&parts);
    assert_eq!((op, data), (Op::Write { sector: 3 }, vec![(GIVEN, 512)]));
    let (op, data) = Guest::new(DISK, FLUSH, 3).accept(&parts);
    assert_eq!((op, data), (Op::Flush, vec![]));
}

#[test]
fn without_a_place_for_the_status_there_is_no_answer() {
    let guest = Guest::new(DISK, FLUSH, 0);
    for parts in [
        &[Out(HEADER, 16)][..],
        &[Out(HEADER, 16), Out(GIVEN, 512)],
        &[Out(HEADER, 16), In(STATUS, 0)],
        &[Out(HEADER, 0)],
        &[In(STATUS, 1), Out(HEADER, 16)],
        // Bytes that are not the guest's, or not even addresses.
        &[Out(HEADER, 16), In(END, 1)],
        &[Out(HEADER, 16), In(END - 1, 2)],
        &[Out(HEADER, 16), In(ISLAND - 1, 1)],
        &[Out(HEADER, 16), In(ISLAND + 0x1000, 1)],
        &[Out(HEADER, 16), In(u64::MAX, 1)],
        &[Out(HEADER, 16), In(u64::MAX, 2)],
    ] {
        assert_eq!(guest.parse(parts).0, None);
    }
}

#[test]
fn readable_behind_writable_is_refused_and_touches_one_byte() {
    for parts in [
        &[In(WANTED, 512), Out(HEADER, 16), In(STATUS, 1)][..],
        &[Out(HEADER, 8), In(WANTED, 512), Out(HEADER + 8, 8), In(STATUS, 1)],
        &[Out(HEADER, 16), In(WANTED, 512), Out(GIVEN, 0), In(STATUS, 1)],
        &[Out(HEADER, 16), In(WANTED, 512), In(STATUS, 1), Out(GIVEN, 0)],
    ] {
        let parsed = Guest::new(DISK, READ, 0).parse(parts).0.expect("a status can be written");
        assert_eq!((parsed.op, parsed.writable), (Err(Status::IoErr), 1));
        assert_eq!(parsed.status, GuestAddress(STATUS));
    }
}

#[test]
fn data_is_in_guest_memory_to_its_last_byte() {
    for (addr, len, good) in [
        (END - 512, 512, true),
        (ISLAND, 4096, true),
        (END - 511, 512, false),
        (END, 512, false),
        (ISLAND - 512, 1024, false),
        (ISLAND + 0xe01, 512, false),
        (END - 512, (ISLAND - END) as u32 + 1024, false),
        (u64::MAX - 511, 512, false),
        (u64::MAX - 510, 512, false),
        (u64::MAX, 512, false),
    ] {
        let disk = Shape { sectors: 1 << 30, ..DISK };
        let read = [Out(HEADER, 16), In(WANTED, 512), In(addr, len), In(STATUS, 1)];
        let write = [Out(HEADER, 16), Out(GIVEN, 512), Out(addr, len), In(STATUS, 1)];
        for (kind, parts) in [(READ, read), (WRITE, write)] {
            let op = Guest::new(disk, kind, 0).parse(&parts).0.expect("a status can be written").op;
            assert_eq!(op.is_ok(), good, "{len} bytes at {addr:#x}");
        }
    }
}

#[test]
fn broken_chains_have_no_answer() {
    let chain = |descriptors: &[Descriptor]| {
        let guest = Guest::new(DISK, FLUSH, 0);
        for (i, desc) in descriptors.iter().enumerate() {
            guest.descriptor(0, i as u16, *desc);
        }
        guest.pop().0
    };
    let header = Descriptor::new(HEADER, 16, NEXT, 1);
    let status = |flags, next| Descriptor::new(STATUS, 1, WRITABLE | flags, next);
    assert!(chain(&[header, status(0, 0)]).is_some_and(|p| p.op == Ok(Op::Flush)));
    assert_eq!(chain(&[Descriptor::new(HEADER, 16, NEXT, 0)]), None, "a loop of one");
    assert_eq!(chain(&[header, status(NEXT, 0)]), None, "a loop of two");
    assert_eq!(chain(&[header, status(NEXT, 64)]), None, "a next beyond the ring");
    assert_eq!(chain(&[header, status(NEXT, u16::MAX)]), None, "a next far beyond the ring");
    let indirect = |addr, len| Descriptor::new(addr, len, INDIRECT, 0);
    assert_eq!(chain(&[indirect(TABLE, 0)]), None, "an empty table");
    assert_eq!(chain(&[indirect(TABLE, 15)]), None, "a table of no whole descriptors");
    assert_eq!(chain(&[indirect(END, 32)]), None, "a table outside memory");
    let followed = Descriptor::new(TABLE, 32, INDIRECT | NEXT, 1);
    assert_eq!(chain(&[followed, status(0, 0)]), None, "a descriptor behind a table");
}

#[test]
fn indirect_tables_are_chains_like_any_other() {
    let guest = Guest::new(DISK, READ, 6);
    guest.table(TABLE, &wanting(512));
    guest.descriptor(0, 0, Descriptor::new(TABLE, 48, INDIRECT, 0));
    let (parsed, data) = guest.pop();
    assert_eq!((parsed.unwrap().op, data), (Ok(Op::Read { sector: 6 }), vec![(WANTED, 512)]));

    // Behind direct descriptors (virtio 1.3, 2.7.5.3.1).
    guest.table(TABLE, &wanting(512)[1..]);
    guest.descriptor(0, 0, Descriptor::new(HEADER, 16, NEXT, 1));
    guest.descriptor(0, 1, Descriptor::new(TABLE, 32, INDIRECT, 0));
    let (parsed, data) = guest.pop();
    assert_eq!((parsed.unwrap().op, data), (Ok(Op::Read { sector: 6 }), vec![(WANTED, 512)]));

    // A table that names itself.
    guest.descriptor(TABLE, 0, Descriptor::new(TABLE, 32, INDIRECT, 0));
    assert_eq!(guest.pop().0, None);
}

#[test]
fn chains_end_at_the_largest_ring() {
    for (count, answered) in [(MAX_DESCRIPTORS, true), (MAX_DESCRIPTORS + 1, false)] {
        let guest = Guest::new(Shape { sectors: 2000, ..DISK }, READ, 0);
        let data = (2..count).map(|_| In(WANTED, 512));
        let parts: Vec<Part> = [Out(HEADER, 16)].into_iter().chain(data).chain([In(STATUS, 1)]).collect();
        guest.table(TABLE, &parts);
        guest.descriptor(0, 0, Descriptor::new(TABLE, 16 * count, INDIRECT, 0));
        let parsed = guest.pop().0;
        assert_eq!(parsed.is_some(), answered, "{count} descriptors");
        assert!(parsed.is_none_or(|p| p.data_len == 512 * (u64::from(count) - 2)));
    }
}

/// Its size is the guest's word, and whoever believes it walks through all memory.
#[test]
fn a_table_with_more_entries_than_a_chain_may_have_is_refused() {
    let guest = Guest::new(DISK, READ, 6);
    guest.table(TABLE, &wanting(512));
    for (entries, answered) in
        [(3, true), (MAX_DESCRIPTORS, true), (MAX_DESCRIPTORS + 1, false), (u32::MAX >> 4, false)]
    {
        guest.descriptor(0, 0, Descriptor::new(TABLE, 16 * entries, INDIRECT, 0));
        assert_eq!(guest.pop().0.is_some(), answered, "{entries} entries");
    }
}

#[test]
fn more_bytes_than_a_chain_may_have_are_refused() {
    let most = u32::MAX;
    let guest = Guest::new(Shape { sectors: u64::MAX, ..DISK }, READ, 0);
    let parts = [Out(HEADER, 16), In(WANTED, most), In(WANTED, most), In(STATUS, 1)];
    let parsed = guest.parse(&parts).0.expect("a status can be written");
    assert_eq!((parsed.op, parsed.writable), (Err(Status::IoErr), 1));
}
