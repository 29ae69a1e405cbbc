//! Descriptor chains and rings that no driver makes, on the real process. A hostile guest makes them all. The
//! device may serve on, declare the ring broken, or end the connection; it may not hang, die or do damage.

use crate::common::disk::{Disk, FREE, each};
use crate::common::frontend::block::{IN, OK, OUT, Parts, parts};
use crate::common::frontend::ring::{INDIRECT, NEXT, WRITE, readable};
use crate::common::frontend::session::{F_INDIRECT, F_LOG_ALL};
use crate::common::frontend::{Desc, Layout, Options, RawSocket, SplitRing};
use crate::common::patience::{AtEnd, Deadline, limit};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const RAM: u64 = 16 << 20;
/// No memory of `Layout::flat(RAM)` is here.
const NOWHERE: u64 = 1 << 40;

fn read(ring: &SplitRing) -> Parts {
    parts(ring, IN, FREE.start)
}

fn write(ring: &SplitRing) -> Parts {
    parts(ring, OUT, FREE.start)
}

#[test]
fn chains_without_a_place_for_the_status() {
    each(&[
        ("a header alone", |ring| {
            let p = read(ring);
            ring.post_chain(&[p.header]);
        }),
        ("a write that ends with its data", |ring| {
            let p = write(ring);
            ring.post_chain(&[p.header, p.data]);
        }),
        ("a status of no bytes", |ring| {
            let p = write(ring);
            ring.post_chain(&[p.header, p.data, Desc { len: 0, ..p.status }]);
        }),
        ("a status that the device may only read", |ring| {
            let p = write(ring);
            ring.post_chain(&[p.header, p.data, Desc { flags: 0, ..p.status }]);
        }),
        ("one descriptor of nothing", |ring| {
            ring.post_chain(&[Desc::default()]);
        }),
        ("a status where no memory is", |ring| {
            let p = write(ring);
            ring.post_chain(&[p.header, p.data, Desc::writable(NOWHERE, 1)]);
        }),
        ("a status just beyond the memory", |ring| {
            let p = write(ring);
            ring.post_chain(&[p.header, p.data, Desc::writable(RAM, 1)]);
        }),
    ]);
}

#[test]
fn chains_without_a_whole_header() {
    each(&[
        ("a status alone", |ring| {
            let p = read(ring);
            ring.post_chain(&[p.status]);
        }),
        ("data to be written by the device and status alone", |ring| {
            let p = read(ring);
            ring.post_chain(&[p.data, p.status]);
        }),
        ("half a header", |ring| {
            let p = read(ring);
            ring.post_chain(&[Desc { len: 8, ..p.header }, p.data, p.status]);
        }),
        ("a header that the device may only write", |ring| {
            let p = read(ring);
            ring.post_chain(&[Desc { flags: WRITE, ..p.header }, p.data, p.status]);
        }),
        ("a header behind the data", |ring| {
            let p = read(ring);
            ring.post_chain(&[p.data, p.header, p.status]);
        }),
        ("a header where no memory is", |ring| {
            let p = read(ring);
            ring.post_chain(&[Desc::readable(NOWHERE, 16), p.data, p.status]);
        }),
        ("a header across the end of the memory", |ring| {
            let p = read(ring);
            ring.post_chain(&[Desc::readable(RAM - 8, 16), p.data, p.status]);
        }),
        ("a header at the end of all addresses", |ring| {
            let p = read(ring);
            ring.post_chain(&[Desc::readable(u64::MAX - 7, 16), p.data, p.status]);
        }),
    ]);
}

#[test]
fn data_where_no_memory_is_fails_with_a_status() {
    let mut disk = Disk::attach(&[]);
    for kind in [IN, OUT] {
        for (addr, len) in [
            (NOWHERE, 4096),
            (RAM, 512),
            (RAM - 512, 4096),
            (u64::MAX - 511, 512),
            (u64::MAX - 511, 4096),
            (!511, !511),
            (0x1000, !511),
        ] {
            let mut session = disk.open();
            let ring = &mut session.rings[0];
            let p = parts(ring, kind, FREE.start);
            ring.post_chain(&[p.header, Desc { addr, len, ..p.data }, p.status]);
            ring.kick();
            ring.wait_used().unwrap();
            assert_ne!(ring.mem.read(p.status.addr, 1)[0], OK, "{len:#x} bytes at {addr:#x}");
            disk.assert_survives(session);
        }
    }
}

#[test]
fn lengths_that_overflow_when_added_up() {
    each(&[
        ("three descriptors of 4 GiB", |ring| {
            let p = read(ring);
            let huge = Desc::writable(0, u32::MAX);
            ring.post_chain(&[p.header, huge, huge, huge, p.status]);
        }),
        ("a hundred of 4 GiB to write", |ring| {
            let p = write(ring);
            let mut chain = vec![p.header];
            chain.extend([Desc::readable(0, u32::MAX - 511); 100]);
            chain.push(p.status);
            ring.post_chain(&chain);
        }),
        ("4 GiB in all, wrapped to nothing", |ring| {
            let p = write(ring);
            let half = Desc::readable(0, 1 << 31);
            ring.post_chain(&[p.header, half, half, p.status]);
        }),
    ]);
}

#[test]
fn loops_and_links_that_lead_nowhere() {
    each(&[
        ("a descriptor that follows itself", |ring| {
            let p = read(ring);
            ring.post(1, |own| vec![p.header.then(own[0])]);
        }),
        ("a chain that comes back to its head", |ring| {
            let p = read(ring);
            ring.post(3, |own| vec![p.header.then(own[1]), p.data.then(own[2]), p.status.then(own[0])]);
        }),
        ("a loop behind a whole request", |ring| {
            let p = read(ring);
            ring.post(3, |own| vec![p.header.then(own[1]), p.data.then(own[2]), p.status.then(own[1])]);
        }),
        ("a loop of writable bytes", |ring| {
            let p = read(ring);
            ring.post(2, |own| vec![p.header.then(own[1]), p.data.then(own[1])]);
        }),
        ("a next just beyond the ring", |ring| {
            let (p, beyond) = (read(ring), ring.size);
            ring.post(3, |own| vec![p.header.then(own[1]), p.data.then(beyond), p.status]);
        }),
        ("a next far beyond the ring", |ring| {
            let p = read(ring);
            ring.post(3, |own| vec![p.header.then(own[1]), p.data.then(u16::MAX), p.status]);
        }),
        ("a status that has a next, but nowhere", |ring| {
            let p = read(ring);
            ring.post(3, |own| vec![p.header.then(own[1]), p.data.then(own[2]), p.status.then(u16::MAX)]);
        }),
    ]);
}

fn table(ring: &SplitRing, entries: &[Desc]) -> Desc {
    let addr = ring.mem.take(16 * entries.len(), 16);
    ring.write_table(addr, entries);
    Desc::table(addr, 16 * entries.len() as u32)
}

#[test]
fn indirect_tables_that_break_the_rules() {
    each(&[
        ("a table of no entries", |ring| {
            let p = read(ring);
            let empty = Desc { len: 0, ..table(ring, &[p.header]) };
            ring.post_chain(&[empty]);
        }),
        ("a table that ends within an entry", |ring| {
            let p = read(ring);
            let odd = Desc { len: 47, ..table(ring, &[p.header.then(1), p.data.then(2), p.status]) };
            ring.post_chain(&[odd]);
        }),
        ("a table where no memory is", |ring| {
            ring.post_chain(&[Desc::table(NOWHERE, 48)]);
        }),
        ("a table across the end of the memory", |ring| {
            ring.post_chain(&[Desc::table(RAM - 16, 48)]);
        }),
        ("a table at the end of all addresses", |ring| {
            ring.post_chain(&[Desc::table(u64::MAX - 15, 48)]);
        }),
        ("a table of 4 GiB", |ring| {
            ring.post_chain(&[Desc::table(0x1000, !15)]);
        }),
        ("a table in a table", |ring| {
            let p = read(ring);
            let inner = table(ring, &[p.header.then(1), p.data.then(2), p.status]);
            let outer = table(ring, &[inner]);
            ring.post_chain(&[outer]);
        }),
        ("a table that is continued", |ring| {
            let p = read(ring);
            let all = table(ring, &[p.header.then(1), p.data]);
            ring.post(2, |own| vec![all.then(own[1]), p.status]);
        }),
        ("a table in the middle of a chain", |ring| {
            let p = read(ring);
            let middle = table(ring, &[p.data]);
            ring.post(3, |own| vec![p.header.then(own[1]), middle.then(own[2]), p.status]);
        }),
        ("a table that the device may write", |ring| {
            let p = read(ring);
            let all = table(ring, &[p.header.then(1), p.data.then(2), p.status]);
            ring.post_chain(&[Desc { flags: INDIRECT | WRITE, ..all }]);
        }),
        ("a loop in a table", |ring| {
            let p = read(ring);
            let all = table(ring, &[p.header.then(1), p.data.then(0), p.status]);
            ring.post_chain(&[all]);
        }),
        ("a next beyond the table", |ring| {
            let p = read(ring);
            let all = table(ring, &[p.header.then(1), p.data.then(3), p.status]);
            ring.post_chain(&[all]);
        }),
        ("every flag at once", |ring| {
            let p = read(ring);
            ring.post_chain(&[Desc { flags: u16::MAX, ..p.header }]);
        }),
    ]);
}

#[test]
fn the_longest_indirect_table_is_bounded() {
    let mut disk = Disk::attach(&[]);
    let mut session = disk.open();
    let ring = &mut session.rings[0];
    let p = write(ring);
    // 65535 entries, more than any ring has: a header, a byte each, a status.
    let mut entries = vec![p.header.then(1)];
    entries.extend((2..=65534).map(|n| Desc { len: 1, ..p.data }.then(n)));
    entries.push(p.status);
    let all = table(ring, &entries);
    let head = ring.post_chain(&[all]);
    ring.kick();
    assert_eq!(ring.wait_used().unwrap().id, u32::from(head));
    assert_ne!(ring.mem.read(p.status.addr, 1)[0], OK);
    disk.assert_survives(session);
}

#[test]
fn indirect_descriptors_that_were_not_agreed() {
    let mut disk = Disk::attach(&[]);
    let mut session = disk.open_with(&Options { features: !(F_LOG_ALL | F_INDIRECT), ..Options::default() });
    let ring = &mut session.rings[0];
    let p = read(ring);
    let all = table(ring, &[p.header.then(1), p.data.then(2), p.status]);
    ring.post_chain(&[all]);
    ring.kick();
    disk.assert_survives(session);
}

#[test]
fn a_request_that_changes_while_it_is_read_stays_within_bounds() {
    let mut disk = Disk::attach(&[]);
    let mut session = disk.open();
    let raw = RawSocket::new(session.raw().socket().unwrap());
    let ring = &mut session.rings[0];
    let p = write(ring);
    let own = ring.take_descs(3).unwrap();
    let (header, over) = (p.header.addr, AtomicBool::new(false));
    let place = |index: usize| ring.desc + 16 * u64::from(own[index]);
    let (data, status) = (place(1), place(2));
    ring.write_desc(own[0], p.header.then(own[1]));
    ring.write_desc(own[1], p.data.then(own[2]));
    ring.write_desc(own[2], p.status);
    let mem = ring.mem.clone();
    std::thread::scope(|scope| {
        let _end = AtEnd(&over);
        scope.spawn(|| {
            let mut turn = 0u64;
            while !over.load(Ordering::Relaxed) {
                let pick = |values: &[u64]| values[turn as usize % values.len()];
                let store = |at, value: u64| mem.store(at, value, Ordering::Relaxed);
                // Valid and out of range in turn, so that a second look would see another request.
                store(header + 8, pick(&[FREE.start, 1 << 55, u64::MAX, FREE.start + 8]));
                store(data, pick(&[p.data.addr, NOWHERE, p.data.addr, u64::MAX - 100, p.data.addr]));
                mem.store(
                    data + 8,
                    pick(&[4096, 4096, 512, 0, u64::from(u32::MAX)]) as u32,
                    Ordering::Relaxed,
                );
                let flags = pick(&[
                    u64::from(NEXT),
                    0,
                    u64::from(NEXT),
                    u64::from(NEXT | WRITE),
                    u64::from(INDIRECT),
                ]);
                mem.store(data + 12, flags as u16, Ordering::Relaxed);
                mem.store(status + 8, pick(&[1, 1, 1, 0]) as u32, Ordering::Relaxed);
                turn += 1;
            }
        });
        for _ in 0..3000 {
            ring.publish(own[0]);
            ring.kick_if_wanted();
            // A ring that the device gave up is as good as a served one; assert_survives tells them apart.
            ring.want_call(false);
            let deadline = Deadline::after(limit());
            let given_up = loop {
                let broken =
                    readable(&ring.err_fd, Duration::ZERO).unwrap() || raw.closes(Duration::ZERO).unwrap();
                match ring.pop_used() {
                    Some(_) => break false,
                    None if broken => break true,
                    None => deadline.check("a completion, or a ring that is broken", || ring.used_idx()),
                }
                std::thread::yield_now();
            };
            if given_up {
                break;
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    // The connection ends with the last of its descriptors.
    drop(raw);
    disk.assert_survives(session);
}

#[test]
fn large_requests_do_not_make_the_process_grow() {
    let mut disk = Disk::attach(&[]);
    let before = disk.server.holdings().unwrap();
    let options = Options { layout: Layout::flat(64 << 20), ..Options::default() };
    let mut session = disk.open_with(&options);
    let ring = &mut session.rings[0];
    // All of them into the same 32 MiB: what the guest holds itself is not what is looked at.
    let (len, p) = (32 << 20, read(ring));
    let buffer = ring.mem.take(len, 4096);
    ring.mem.write(p.header.addr + 8, &0u64.to_le_bytes());
    let mut heads: Vec<u16> =
        (0..40).map(|_| ring.post_chain(&[p.header, Desc::writable(buffer, len as u32), p.status])).collect();
    ring.kick();
    let (mut most, deadline) = (0, Deadline::after(limit()));
    while !heads.is_empty() {
        deadline.check("40 reads of 32 MiB", || format!("{} that are not completed", heads.len()));
        ring.wait_call(Duration::from_millis(5)).unwrap();
        ring.want_call(true);
        while let Some(used) = ring.pop_used() {
            let at = heads.iter().position(|h| u32::from(*h) == used.id).expect("every head comes back once");
            heads.swap_remove(at);
        }
        most = most.max(disk.server.holdings().unwrap().rss_kib);
    }
    assert_eq!(ring.mem.read(p.status.addr, 1)[0], OK);
    // Tables for the memory map, and the pool of buffers: nothing that goes with 40 times 32 MiB.
    assert!(most < before.rss_kib + (64 << 10), "{before:?} grew to {most} KiB");
    drop(session);
    disk.assert_whole();
}
