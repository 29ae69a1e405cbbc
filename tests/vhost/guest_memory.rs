//! Memory tables and memory files that lie, shrink or vanish, against the real process.

use crate::common::attach::{Place, write};
use crate::common::disk::{Disk, FREE, assert_carries};
use crate::common::frontend::block::{OK, complete};
use crate::common::frontend::hostile::{Answer, OddFiles, agreed, ask, memory_region, memory_table, state};
use crate::common::frontend::memory::{Seals, memfd};
use crate::common::frontend::{Desc, Layout, Options, Request, Session};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vhost::vhost_user::message::FrontendReq as Req;

const MEM: u64 = 1 << 20;

#[test]
fn memory_tables_that_lie() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let page = 0x1000;
    let good = [0, MEM, 0x7000_0000, 0];
    let tables: Vec<(&str, u32, Vec<[u64; 4]>)> = vec![
        ("no region", 0, vec![]),
        ("fewer than claimed", 2, vec![good]),
        ("more than claimed", 1, vec![good, [MEM, MEM, 0x7100_0000, 0]]),
        ("an impossible number", u32::MAX, vec![good]),
        ("a region of nothing", 1, vec![[0, 0, 0, 0]]),
        ("longer than the file", 1, vec![[0, MEM + page, 0, 0]]),
        ("much longer than the file", 1, vec![[0, 1 << 40, 0, 0]]),
        ("beginning beyond the file", 1, vec![[0, page, 0, MEM]]),
        ("beginning far beyond", 1, vec![[0, page, 0, 1 << 60]]),
        ("an offset that wraps", 1, vec![[0, MEM, 0, u64::MAX - page + 1]]),
        ("an offset off the page", 1, vec![[0, page, 0, 1]]),
        ("wrapping guest addresses", 1, vec![[u64::MAX - page + 1, 2 * page, 0, 0]]),
        ("wrapping user addresses", 1, vec![[0, 2 * page, u64::MAX - page + 1, 0]]),
        ("all of the address space", 1, vec![[0, u64::MAX, 0, 0]]),
        ("the same region twice", 2, vec![good, good]),
        ("overlapping guest addresses", 2, vec![good, [MEM - page, MEM, 0x7800_0000, 0]]),
    ];
    let memory = memfd(MEM, Seals::Sealable).unwrap();
    for (what, count, regions) in &tables {
        let raw = agreed(disk.socket()).unwrap();
        let fds = vec![memory.as_raw_fd(); regions.len()];
        let answer = ask(&raw, Req::SET_MEM_TABLE, &memory_table(*count, regions), &fds);
        assert!(answer.is_refused(), "SET_MEM_TABLE with {what}");
        if let [region] = regions[..]
            && *count == 1
        {
            let raw = agreed(disk.socket()).unwrap();
            let answer = ask(&raw, Req::ADD_MEM_REG, &memory_region(region), &[memory.as_raw_fd()]);
            assert!(answer.is_refused(), "ADD_MEM_REG with {what}");
        }
    }
    let raw = agreed(disk.socket()).unwrap();
    assert!(ask(&raw, Req::SET_MEM_TABLE, &memory_table(1, &[good]), &[]).is_refused(), "no descriptor");
    let raw = agreed(disk.socket()).unwrap();
    assert!(ask(&raw, Req::REM_MEM_REG, &memory_region(good), &[]).is_refused(), "removed what is not there");
    disk.assert_nothing_stays(&before);
}

#[test]
fn memory_that_is_no_memory() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let folder = tempfile::tempdir().unwrap();
    let odd = OddFiles::new(folder.path()).unwrap();
    for (what, fd) in &odd.all {
        let raw = agreed(disk.socket()).unwrap();
        let table = memory_table(1, &[[0, 1 << 16, 0, 0]]);
        let answer = ask(&raw, Req::SET_MEM_TABLE, &table, &[*fd]);
        // A file that can be mapped is memory, whatever it was meant for.
        assert!(answer.is_refused() || ["a file", "a memory file"].contains(what), "{what} as memory");
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn nine_hundred_memory_regions_are_bounded() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let memory = memfd(MEM, Seals::Sealable).unwrap();
    let raw = agreed(disk.socket()).unwrap();
    let most = match ask(&raw, Req::GET_MAX_MEM_SLOTS, &[], &[]) {
        Answer::Taken(reply) => reply.value().unwrap(),
        Answer::Refused => panic!("GET_MAX_MEM_SLOTS was refused"),
    };
    let add = |n: u64| {
        let region = memory_region([n * MEM, 0x1000, n * MEM, 0]);
        ask(&raw, Req::ADD_MEM_REG, &region, &[memory.as_raw_fd()])
    };
    let taken = (0..900).take_while(|n| !add(*n).is_refused()).count() as u64;
    assert!(taken == 900 || taken == most, "{most} were promised, {taken} taken");
    drop(raw);
    disk.assert_nothing_stays(&before);
}

#[test]
fn memory_replaced_under_load_is_drained_first() {
    let mut disk = Disk::attach(&[]);
    let mut session = disk.open();
    for _ in 0..50 {
        let write = |n: u64| Request::write(FREE.start + 128 * n, &[n as u8 + 1; 65536]);
        let pending: Vec<_> = (0..32).map(|n| write(n).submit(&mut session.rings[0]).unwrap()).collect();
        session.rings[0].kick();
        session.set_mem_table().unwrap();
        let outcomes = complete(&mut session.rings[0], pending).unwrap();
        assert!(outcomes.iter().all(|o| o.status == OK));
    }
    drop(session);
    disk.assert_whole();
}

/// A ring that is drained answers what the volume's limits hold back.
#[test]
fn memory_that_is_added_disturbs_no_ring() {
    let place = Place::new(&[]);
    let host = place.attach(&["--queues", "2", "--throughput", "512"]);
    let options = Options { queues: 2, ..Options::default() };
    let mut session = Session::open(&place.socket(), &options).unwrap();
    // The first is let in, and the next has to wait for what it cost.
    write(&mut session.rings[0], FREE.start, &[7; 1 << 18]);
    let held_back = Request::write(FREE.start, &[7; 4096]).submit(&mut session.rings[0]).unwrap();
    session.rings[0].kick();
    let size = 1 << 20;
    let memory = memfd(size, Seals::Sealable).unwrap();
    // Three regions, the last of which has a request.
    for n in 1..=3 {
        let region = memory_region([n << 32, size, n << 32, 0]);
        assert!(!ask(session.raw(), Req::ADD_MEM_REG, &region, &[memory.as_raw_fd()]).is_refused());
    }
    let (at, ring) = (3 << 32, &mut session.rings[1]);
    memory.write_all_at(&4u32.to_le_bytes(), 0).unwrap();
    memory.write_all_at(&[0xff], 4096).unwrap();
    ring.post_chain(&[Desc::readable(at, 16), Desc::writable(at + 4096, 1)]);
    ring.kick();
    ring.wait_used().unwrap();
    let mut status = [0xff];
    memory.read_exact_at(&mut status, 4096).unwrap();
    assert_eq!(status, [OK], "a flush in memory that was added");
    assert!(session.rings[0].pop_used().is_none(), "the ring was drained for the new memory");
    // What is taken away again is not used any more, and that takes a drain.
    let region = memory_region([1 << 32, size, 1 << 32, 0]);
    assert!(!ask(session.raw(), Req::REM_MEM_REG, &region, &[]).is_refused());
    let outcomes = complete(&mut session.rings[0], vec![held_back]).unwrap();
    assert!(outcomes.iter().all(|o| o.status == OK));
    drop(session);
    host.end();
}

#[test]
fn memory_removed_under_the_ring_ends_in_order() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let session = disk.open();
    let spec = session.mem.spec(0);
    let region = memory_region([spec.guest, spec.size, spec.user, spec.offset]);
    if let Answer::Taken(_) = ask(session.raw(), Req::REM_MEM_REG, &region, &[]) {
        let mut session = session;
        let _ = Request::read(0, 4096).submit(&mut session.rings[0]).unwrap();
        session.rings[0].kick();
        let _ = ask(session.raw(), Req::GET_VRING_BASE, &state(0, 0), &[]);
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn a_memory_file_that_can_be_sealed_does_not_shrink_any_more() {
    for seals in [Seals::Sealed, Seals::Sealable] {
        let disk = Disk::attach(&[]);
        let layout = Layout { seals, ..Layout::rings_apart(16 << 20) };
        let mut session = disk.open_with(&Options { layout, ..Options::default() });
        assert!(
            session.mem.resize_file(session.mem.data_region(), 0).is_err(),
            "{seals:?} memory has shrunk"
        );
        assert_carries(&mut session.rings[0], FREE.start, 4096);
    }
}

#[test]
fn a_memory_file_that_shrinks_is_survived_or_ends_the_process_in_order() {
    let mut disk = Disk::attach(&[]);
    let layout = Layout { seals: Seals::Unsealable, ..Layout::rings_apart(16 << 20) };
    let mut session = match Session::open(disk.socket(), &Options { layout, ..Options::default() }) {
        Ok(session) => session,
        // Memory that can be taken away need not be accepted.
        Err(fault) if fault.is_refusal() => return,
        Err(fault) => panic!("{fault}"),
    };
    let data = session.mem.data_region();
    session.mem.resize_file(data, 0).unwrap();
    // Its pages are gone: this process must not touch them either, so the chain is written by hand.
    let addr = session.mem.spec(data).guest + 0x2000;
    let ring = &mut session.rings[0];
    ring.post_chain(&[
        Desc::readable(addr, 16),
        Desc::writable(addr + 512, 512),
        Desc::writable(addr + 1024, 1),
    ]);
    ring.kick();
    disk.assert_served_or_ended_in_order(session);
}
