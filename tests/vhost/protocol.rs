//! The block device as a driver sees it, through the real process: every request type in every shape, and
//! every number that is out of bounds. QEMU and Linux would never send most of this.

use crate::common::disk::{Disk, FREE, SECTORS, SERIAL, assert_carries, assert_kept, pattern};
use crate::common::frontend::block::{BLANK, FLUSH, IOERR, OK, OUT, UNSUPP, complete};
use crate::common::frontend::session::{F_DISCARD, F_EVENT_IDX, F_INDIRECT, F_LOG_ALL, F_RO, F_WRITE_ZEROES};
use crate::common::frontend::{
    BlkConfig, Framing, Layout, Options, Order, Place, Request, Segment, Session, SplitRing,
};

const RAM: u64 = 16 << 20;

fn framings() -> Vec<Framing> {
    vec![
        Framing::Classic,
        Framing::SplitHeader,
        Framing::HeaderWithData,
        Framing::DataWithStatus,
        Framing::Compact,
        Framing::Scattered(vec![511, 1, 1000, 37, 4096]),
        Framing::Scattered(vec![97]),
        Framing::Cuts(vec![1, 2, 16, 17, 600], vec![1, 600]),
    ]
}

fn run(ring: &mut SplitRing, request: Request) -> u8 {
    let outcome = request.run(ring).expect("every request is answered");
    assert!(outcome.used_len >= 1, "a status byte was written, but used.len is 0");
    outcome.status
}

fn segment(sector: u64, count: u32) -> Segment {
    Segment { sector, count, flags: 0 }
}

#[test]
fn every_framing_carries_data_for_every_vmm() {
    let disk = Disk::attach(&[]);
    let places = [Place::Direct, Place::Indirect, Place::DirectThenIndirect(1), Place::DirectThenIndirect(2)];
    for (order, layout) in [
        (Order::Qemu7, Layout::flat(RAM)),
        (Order::Qemu10, Layout::pc(RAM)),
        (Order::CloudHypervisor, Layout::rings_apart(RAM)),
    ] {
        for without in [0, F_EVENT_IDX] {
            let options = Options {
                order,
                layout: layout.clone(),
                features: !(F_LOG_ALL | without),
                ..Options::default()
            };
            let mut session = disk.open_with(&options);
            let ring = &mut session.rings[0];
            for (n, framing) in framings().iter().enumerate() {
                for (m, place) in places.iter().enumerate() {
                    let sector = FREE.start + 64 * (4 * n + m) as u64;
                    let data = pattern(sector, 8192);
                    let shape = |r: Request| r.framed(framing.clone()).placed(*place);
                    let write = shape(Request::write(sector, &data)).run(ring).unwrap();
                    assert_eq!((write.status, write.used_len), (OK, 1), "{framing:?} {place:?}");
                    let read = shape(Request::read(sector, 8192)).run(ring).unwrap();
                    assert_eq!((read.status, read.used_len), (OK, 8193), "{framing:?} {place:?}");
                    assert!(read.data == data, "{framing:?} {place:?} {order:?}");
                }
            }
            assert_kept(ring);
        }
    }
}

#[test]
fn a_driver_without_indirect_descriptors_is_served() {
    let disk = Disk::attach(&[]);
    let options = Options { features: !(F_LOG_ALL | F_INDIRECT | F_EVENT_IDX), ..Options::default() };
    let mut session = disk.open_with(&options);
    let pieces = Framing::Scattered(vec![4096]);
    let data = pattern(1, 120 * 4096);
    let ring = &mut session.rings[0];
    assert_eq!(run(ring, Request::write(FREE.start, &data).framed(pieces.clone())), OK);
    let read = Request::read(FREE.start, data.len()).framed(pieces).run(ring).unwrap();
    assert!(read.data == data);
}

#[test]
fn large_sectors_accept_whole_blocks_only() {
    let disk = Disk::with_sectors(4096, &[]);
    let mut session = disk.open();
    let config = session.config().unwrap();
    assert_eq!((config.blk_size, config.capacity), (4096, SECTORS));
    let ring = &mut session.rings[0];
    assert_carries(ring, FREE.start, 4096);
    assert_carries(ring, FREE.start + 8, 64 << 10);
    for (sector, len) in [(FREE.start, 512), (FREE.start + 1, 4096), (FREE.start, 4608)] {
        assert_eq!(run(ring, Request::write(sector, &vec![7; len])), IOERR, "{len} bytes at {sector}");
        assert_eq!(run(ring, Request::read(sector, len)), IOERR, "{len} bytes at {sector}");
    }
    assert_eq!(run(ring, Request::discard(&[segment(FREE.start + 1, 8)])), IOERR);
    let read = Request::read(FREE.start, 4096).run(ring).unwrap();
    assert!(read.data == pattern(FREE.start ^ 4096, 4096), "a refused request changed the disk");
}

#[test]
fn requests_out_of_range_fail_and_change_nothing() {
    let mut disk = Disk::attach(&[]);
    let layer = std::fs::read_dir(disk.root().join("layers")).unwrap().next().unwrap().unwrap().path();
    let size = std::fs::metadata(&layer).unwrap().len();
    let mut session = disk.open();
    let ring = &mut session.rings[0];
    let mut wrong = vec![
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (SECTORS - 7, 4096),
        (SECTORS + 1, 4096),
        (1 << 32, 512),
        (u64::from(u32::MAX), 4096),
    ];
    // Times 512 these wrap around to the start of the disk, or nearly.
    wrong
        .extend([1 << 55, (1 << 55) + 8, 1 << 63, u64::MAX, u64::MAX - 7, u64::MAX / 512].map(|s| (s, 4096)));
    for (sector, len) in wrong {
        assert_eq!(run(ring, Request::write(sector, &pattern(3, len))), IOERR, "write at {sector:#x}");
        let read = Request::read(sector, len).run(ring).unwrap();
        assert_eq!(read.status, IOERR, "read at {sector:#x}");
        assert!(read.data.iter().all(|b| *b == BLANK), "a refused read gave data");
    }
    assert_kept(ring);
    drop(session);
    assert_eq!(std::fs::metadata(&layer).unwrap().len(), size, "the layer file grew");
    disk.assert_whole();
}

#[test]
fn odd_lengths_and_empty_requests_are_answered() {
    let mut disk = Disk::attach(&[]);
    let mut session = disk.open();
    let ring = &mut session.rings[0];
    for len in [1, 511, 513, 1000, 4097] {
        assert_eq!(run(ring, Request::write(FREE.start, &vec![9; len])), IOERR, "{len} bytes");
        assert_eq!(run(ring, Request::read(FREE.start, len)), IOERR, "{len} bytes");
    }
    // Nothing to move is neither right nor wrong in the specification, but it has an end.
    for request in [Request::read(FREE.start, 0), Request::write(FREE.start, &[]), Request::get_id(0)] {
        assert!([OK, IOERR].contains(&run(ring, request)));
    }
    let read = Request::read(FREE.start, 8192).run(ring).unwrap();
    assert!(read.data.iter().all(|b| *b == 0), "a refused write left something");
    drop(session);
    disk.assert_whole();
}

#[test]
fn unknown_types_are_not_supported() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open();
    let ring = &mut session.rings[0];
    // 2, 3, 6, 7: SCSI and what was never given out; 10, 12: between ours; 14 to 26: secure erase and zones.
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 24, 26, 77, 0x100, 1 << 31, u32::MAX] {
        for want in [0, 512] {
            assert_eq!(run(ring, Request::new(kind, 0, vec![1; 512], want)), UNSUPP, "type {kind:#x}");
        }
    }
    assert_kept(ring);
}

#[test]
fn the_serial_fits_into_any_buffer() {
    let disk = Disk::attach(&["--serial", SERIAL]);
    let mut session = disk.open();
    let mut full = SERIAL.as_bytes().to_vec();
    full.resize(20, 0);
    for len in [1, 5, 15, 16, 19, 20, 21, 512, 4096] {
        for framing in [Framing::Classic, Framing::Compact, Framing::Scattered(vec![3, 100])] {
            let id = Request::get_id(len).framed(framing).run(&mut session.rings[0]).unwrap();
            let part = len.min(20);
            assert_eq!((id.status, &id.data[..part]), (OK, &full[..part]), "{len} bytes");
            assert!(
                id.data[part..].iter().all(|b| [0, BLANK].contains(b)),
                "more than a serial in {len} bytes"
            );
        }
    }
}

#[test]
fn discard_and_write_zeroes_keep_their_limits() {
    let mut disk = Disk::attach(&[]);
    let mut session = disk.open();
    let config = session.config().unwrap();
    assert_eq!((config.max_discard_seg, config.max_write_zeroes_seg), (1, 1));
    assert_eq!(session.features & (F_DISCARD | F_WRITE_ZEROES), F_DISCARD | F_WRITE_ZEROES);
    let ring = &mut session.rings[0];
    let one = segment(FREE.start, 8);
    type Make = fn(&[Segment]) -> Request;
    let kinds: [(Make, u32); 2] = [
        (Request::discard, config.max_discard_sectors),
        (Request::write_zeroes, config.max_write_zeroes_sectors),
    ];
    for (make, most) in kinds {
        assert_eq!(run(ring, make(&[one, segment(FREE.start + 8, 8)])), UNSUPP, "two segments");
        for flags in [2, 4, 1 << 31, u32::MAX] {
            assert_eq!(run(ring, make(&[Segment { flags, ..one }])), UNSUPP, "flags {flags:#x}");
        }
        for (sector, count) in [
            (0, most.saturating_add(1)),
            (0, u32::MAX),
            (SECTORS, 8),
            (SECTORS - 8, 16),
            (1 << 55, 8),
            (u64::MAX, 1),
            (u64::MAX - 7, 16),
        ] {
            assert_eq!(run(ring, make(&[segment(sector, count)])), IOERR, "{count} at {sector:#x}");
        }
        // Half a segment, none, and one and a half.
        let kind = make(&[one]).kind;
        for len in [0, 1, 8, 15, 17, 24] {
            assert_ne!(run(ring, Request::new(kind, 0, vec![0; len], 0)), OK, "{len} bytes of segment");
        }
    }
    // The unmap flag belongs to write-zeroes alone.
    assert_eq!(run(ring, Request::discard(&[Segment { flags: 1, ..one }])), UNSUPP);
    assert_kept(ring);
    drop(session);
    disk.assert_whole();
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zeros_and_their_neighbours_do_not() {
    for sector_size in [512, 4096] {
        let disk = Disk::with_sectors(sector_size, &[]);
        let mut session = disk.open();
        let ring = &mut session.rings[0];
        // Aligned to what the file system allocates, and not.
        let ranges = if sector_size == 512 {
            vec![(16, 8), (16, 1), (19, 42), (8, 64)]
        } else {
            vec![(16, 8), (8, 64)]
        };
        for (offset, count) in ranges {
            for flags in [0, 1] {
                let zero = Segment { sector: FREE.start + offset, count, flags };
                zero_between(ring, Request::write_zeroes(&[zero]), offset, count);
            }
            zero_between(ring, Request::discard(&[segment(FREE.start + offset, count)]), offset, count);
        }
        // Written again after they were given back.
        assert_carries(ring, FREE.start + 16, 4096);
    }
}

fn zero_between(ring: &mut SplitRing, request: Request, offset: u64, count: u32) {
    let mut data = pattern(offset, 128 * 512);
    assert_eq!(run(ring, Request::write(FREE.start, &data)), OK);
    assert_eq!(run(ring, request.clone()), OK);
    let start = offset as usize * 512;
    data[start..start + count as usize * 512].fill(0);
    let read = Request::read(FREE.start, data.len()).run(ring).unwrap();
    assert!(read.data == data, "{request:?}");
}

#[test]
fn a_read_only_disk_refuses_what_would_change_it() {
    let mut disk = Disk::attach(&["--read-only"]);
    let mut session = disk.open();
    assert_ne!(session.offered & F_RO, 0);
    let ring = &mut session.rings[0];
    assert_eq!(run(ring, Request::write(FREE.start, &[1; 512])), IOERR);
    assert_eq!(run(ring, Request::new(OUT, 0, vec![1; 65536], 0).framed(Framing::Compact)), IOERR);
    assert_ne!(run(ring, Request::discard(&[segment(0, 8)])), OK);
    assert_ne!(run(ring, Request::write_zeroes(&[segment(0, 8)])), OK);
    assert_eq!(run(ring, Request::flush()), OK);
    assert_kept(ring);
    drop(session);
    disk.assert_whole();
}

#[test]
fn the_write_cache_can_be_switched() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open();
    assert_eq!(session.config().unwrap().writeback, 1);
    for writeback in [0, 1, 0] {
        session.write_config(32, &[writeback]).unwrap();
        assert_eq!(session.config().unwrap().writeback, writeback);
        assert_carries(&mut session.rings[0], FREE.start, 4096);
        assert_eq!(run(&mut session.rings[0], Request::flush()), OK);
    }
    // The next front-end may be the last one come back, whose guest does not choose again.
    drop(session);
    let session = disk.open();
    assert_eq!(session.config().unwrap().writeback, 0);
    session.reset_device().unwrap();
    assert_eq!(session.config().unwrap().writeback, 1);
}

#[test]
fn nothing_but_the_write_cache_can_be_set() {
    let mut disk = Disk::attach(&[]);
    let fixed = |session: &Session| BlkConfig { writeback: 0, ..session.config().unwrap() };
    for (offset, bytes) in
        [(0, &[9u8; 8][..]), (32, &[2]), (31, &[0, 0]), (20, &[1, 0, 0, 0]), (0, &[0xff; 60])]
    {
        let session = disk.open();
        let before = fixed(&session);
        match session.write_config(offset, bytes) {
            // A device may pass over what cannot be written.
            Ok(()) => {
                assert_eq!(fixed(&session), before, "{bytes:?} at {offset}");
                assert!(session.config().unwrap().writeback < 2, "{bytes:?} at {offset}");
            }
            Err(fault) => assert!(fault.is_refusal(), "{bytes:?} at {offset}: {fault}"),
        }
        drop(session);
        assert_eq!(fixed(&disk.open()), before);
    }
    disk.assert_whole();
}

#[test]
fn the_configuration_reads_the_same_in_any_pieces() {
    let disk = Disk::attach(&["--queues", "2"]);
    let session = disk.open();
    let whole = session.config_bytes(0, 60).unwrap();
    for offset in 0..60 {
        for len in 1..=60 - offset {
            let part = session.config_bytes(offset, len).unwrap();
            assert_eq!(part, whole[offset as usize..(offset + len) as usize], "{len} bytes at {offset}");
        }
    }
    let config = session.config().unwrap();
    assert_eq!((config.capacity, config.blk_size, config.num_queues), (SECTORS, 512, 2));
    assert!(config.seg_max > 0 && config.max_discard_sectors > 0 && config.max_write_zeroes_sectors > 0);
}

#[test]
fn two_queues_work_side_by_side() {
    let disk = Disk::attach(&["--queues", "2"]);
    let mut session = disk.open_with(&Options { queues: 2, ..Options::default() });
    let [one, two] = &mut session.rings[..] else { panic!("two rings") };
    std::thread::scope(|scope| {
        for (n, ring) in [one, two].into_iter().enumerate() {
            scope.spawn(move || {
                for i in 0..200 {
                    assert_carries(ring, FREE.start + 1000 * n as u64 + i * 2, 4096);
                }
            });
        }
    });
    // What one queue wrote, the other reads.
    let last = FREE.start + 199 * 2;
    let read = Request::read(last, 4096).run(&mut session.rings[1]).unwrap();
    assert!(read.data == pattern(last ^ 4096, 4096));
}

#[test]
fn a_full_ring_of_requests_comes_back_whole() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open();
    let ring = &mut session.rings[0];
    for round in 0..4 {
        let data = |n: u64| pattern(n + 1000 * round, 4096);
        batch(ring, |n| Request::write(FREE.start + 8 * n, &data(n)).placed(Place::Indirect));
        let read = batch(ring, |n| Request::read(FREE.start + 8 * n, 4096).placed(Place::Indirect));
        assert!(read.iter().enumerate().all(|(n, got)| *got == data(n as u64)), "round {round}");
    }
}

/// Puts a request into every descriptor of the ring, kicks once, and gives the data of all, in order.
fn batch(ring: &mut SplitRing, request: impl Fn(u64) -> Request) -> Vec<Vec<u8>> {
    let pending = (0..u64::from(ring.size)).map(|n| request(n).submit(ring).unwrap()).collect();
    ring.kick_if_wanted();
    let outcomes = complete(ring, pending).unwrap();
    assert!(outcomes.iter().all(|o| o.status == OK));
    outcomes.into_iter().map(|o| o.data).collect()
}

#[test]
fn the_ring_indices_wrap_around() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open_with(&Options { queue_size: 16, ..Options::default() });
    let ring = &mut session.rings[0];
    for _ in 0..66_000 {
        let pending = Request::new(FLUSH + 1, 0, vec![], 0).submit(ring).unwrap();
        ring.kick_if_wanted();
        let used = ring.poll_used().unwrap();
        assert_eq!(pending.finish(ring, used).unwrap().status, UNSUPP);
    }
    assert!(ring.used_idx() < 1000, "the index has wrapped");
    assert_kept(ring);
}
