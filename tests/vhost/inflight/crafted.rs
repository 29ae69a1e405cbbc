//! What a region says, and what is made of regions that say what no crash could be timed to leave.

use crate::common::disk::{FREE, pattern};
use crate::common::frontend::block::{OK, Pending};
use crate::common::frontend::inflight::Region;
use crate::common::frontend::{Place, Request, SplitRing};
use crate::common::patience::{Deadline, limit, wait_for};
use crate::inflight::rig::{Rig, Shape, Way, seed, store};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::atomic::Ordering;

const PLAIN: Shape = Shape { queues: 1, event_idx: true, indirect: false };
const LEN: usize = 4096;

/// Where the `n`th of these tests' writes goes.
fn sector(n: usize) -> u64 {
    FREE.start + 8 * n as u64
}

/// What it writes; `again` is what it would write if it were done once more.
fn data(n: usize, again: bool) -> Vec<u8> {
    pattern(2 * n as u64 + u64::from(again) + 1, LEN)
}

/// Puts the `n`th write on the ring.
fn submit(ring: &mut SplitRing, n: usize) -> Pending {
    Request::write(sector(n), &data(n, false)).submit(ring).expect("room on the ring")
}

/// Puts other data into the write's buffer: that reaches the disk only if the write is done after this.
fn change(ring: &SplitRing, pending: &Pending, n: usize) {
    let desc = |index: u16| ring.mem.read(ring.desc + 16 * u64::from(index), 16);
    let header = desc(pending.head);
    let buffer = desc(u16::from_le_bytes([header[14], header[15]]));
    let addr = u64::from_le_bytes(buffer[..8].try_into().expect("eight bytes"));
    assert_eq!(ring.mem.read(addr, LEN), data(n, false));
    ring.mem.write(addr, &data(n, true));
}

/// Waits until the device has published that used index; takes nothing.
fn wait_published(ring: &SplitRing, used: u16) {
    wait_for(&format!("the used index is {used}"), || match ring.used_idx() {
        found if found == used => Ok(()),
        other => Err(other),
    });
}

/// The heads of the first `count` used entries.
fn answered(ring: &SplitRing, count: u16) -> Vec<u16> {
    (0..count)
        .map(|i| ring.mem.load::<u32>(ring.used + 4 + 8 * u64::from(i), Ordering::Relaxed) as u16)
        .collect()
}

/// Makes these heads the last batch, all of them still marked.
fn leave_batch(region: &Region, heads: &[u16]) {
    for (i, head) in heads.iter().enumerate() {
        region.set_mark(0, *head, true);
        if i > 0 {
            region.set_next(0, *head, heads[i - 1]);
        }
    }
    region.set_last_head(0, heads[heads.len() - 1]);
}

/// Reads, alone on the ring.
fn read(ring: &mut SplitRing, n: usize) -> Vec<u8> {
    let read = Request::read(sector(n), LEN).run(ring).expect("a read completes, and nothing else");
    assert_eq!(read.status, OK);
    read.data
}

#[test]
fn the_region_tells_what_is_in_flight_at_any_moment() {
    let store = store();
    let mut rig = Rig::start(&store, Way::Qemu, Shape { queues: 2, indirect: true, ..PLAIN }, 0, seed());
    let host = Pid::from_raw(rig.host().pid() as i32);
    let (mut seen, mut rounds, deadline) = (0, 0, Deadline::after(limit()));
    while rounds < 40 || seen == 0 {
        deadline.check("something is seen in flight", || format!("nothing in {rounds} rounds"));
        rounds += 1;
        rig.pump(100 * rounds, 100 * rounds);
        rig.submit(100 * rounds);
        kill(host, Signal::SIGSTOP).expect("it runs");
        wait_stopped(host);
        rig.take();
        let region = rig.session.inflight.as_ref().expect("agreed");
        for (queue, (load, ring)) in rig.loads.iter().zip(&rig.session.rings).enumerate() {
            let queue = queue as u16;
            assert_eq!(region.shape(queue), (1, 256));
            let (marks, flying) = (region.marks(queue), load.heads());
            // What is answered already is marked only until that is noted.
            let answered = marks.iter().filter(|m| !flying.contains(m)).count();
            let unnoted = ring.used_idx().wrapping_sub(region.used_idx(queue));
            assert!(answered <= usize::from(unnoted), "queue {queue}: {marks:?} of {flying:?}");
            seen += marks.len();
        }
        kill(host, Signal::SIGCONT).expect("it runs");
    }
    rig.pump(200 * rounds, 100 * rounds);
    rig.assert_whole();
}

/// Waits until every thread of the process is stopped.
fn wait_stopped(pid: Pid) {
    let stopped = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
        let all = tasks.map(|t| std::fs::read_to_string(t.expect("list").path().join("stat"))).all(|stat| {
            // A kernel thread for io_uring may be gone by now.
            stat.map_or(true, |s| s.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
        });
        all.then_some(())
    };
    wait_for(&format!("every thread of process {pid} is stopped"), || stopped().ok_or("one that runs"));
}

#[test]
fn a_batch_that_the_driver_saw_is_not_served_again() {
    const BATCH: usize = 5;
    const ALL: usize = 16;
    for way in [Way::Qemu, Way::CloudHypervisor] {
        let store = store();
        let mut rig = Rig::start(&store, way, PLAIN, 0, 1);
        let ring = &mut rig.session.rings[0];
        let mut pending: Vec<_> = (0..BATCH).map(|n| submit(ring, n)).collect();
        ring.kick();
        wait_published(ring, BATCH as u16);
        rig.crash();
        // More are there by now; one of them was taken, and nothing came of it.
        let ring = &mut rig.session.rings[0];
        pending.extend((BATCH..ALL).map(|n| submit(ring, n)));
        let region = rig.session.inflight.as_ref().expect("agreed");
        leave_batch(region, &answered(ring, BATCH as u16));
        region.set_used_idx(0, 0);
        region.set_mark(0, pending[BATCH].head, true);
        for (n, pending) in pending.iter().enumerate() {
            change(ring, pending, n);
        }
        rig.attach_again();
        let mut rig = rig.reconnect();
        let ring = &mut rig.session.rings[0];
        wait_published(ring, ALL as u16);
        for _ in 0..pending.len() {
            let used = ring.pop_used().expect("published");
            let at = pending.iter().position(|p| u32::from(p.head) == used.id).expect("answered once");
            assert_eq!(pending.swap_remove(at).finish(ring, used).expect("the request is whole").status, OK);
        }
        for n in 0..ALL {
            assert!(read(ring, n) == data(n, n >= BATCH), "{way:?}: write {n}");
        }
    }
}

#[test]
fn a_batch_that_the_driver_did_not_see_is_served_again() {
    const BATCH: usize = 5;
    for way in [Way::Qemu, Way::CloudHypervisor] {
        let store = store();
        let mut rig = Rig::start(&store, way, PLAIN, 0, 1);
        let ring = &mut rig.session.rings[0];
        let pending: Vec<_> = (0..BATCH).map(|n| submit(ring, n)).collect();
        ring.kick();
        wait_published(ring, BATCH as u16);
        let heads = answered(ring, BATCH as u16);
        rig.crash();
        let ring = &mut rig.session.rings[0];
        ring.mem.store(ring.used + 2, 2u16, Ordering::Release);
        let region = rig.session.inflight.as_ref().expect("agreed");
        leave_batch(region, &heads[2..]);
        region.set_used_idx(0, 2);
        for (n, pending) in pending.iter().enumerate() {
            change(ring, pending, n);
        }
        let seen = |n: usize| heads[..2].contains(&pending[n].head);
        rig.attach_again();
        let mut rig = rig.reconnect();
        let ring = &mut rig.session.rings[0];
        wait_published(ring, BATCH as u16);
        let all = answered(ring, BATCH as u16);
        assert_eq!(all[..2], heads[..2]);
        assert!(heads.iter().all(|h| all.contains(h)), "{heads:?} became {all:?}");
        while ring.pop_used().is_some() {}
        for n in 0..BATCH {
            assert!(read(ring, n) == data(n, !seen(n)), "{way:?}: write {n}");
        }
    }
}

#[test]
fn marks_of_a_ring_that_was_set_up_anew_mean_nothing() {
    // The guest starts over while the host process is dead, and the VMM keeps the region.
    for way in [Way::Qemu, Way::CloudHypervisor] {
        for noted in [1000, 0x8000, 4, 0, 65535, 65530] {
            let store = store();
            let mut rig = Rig::start(&store, way, PLAIN, 0, 1);
            let ring = &mut rig.session.rings[0];
            let pending: Vec<_> = (0..4).map(|n| submit(ring, n)).collect();
            ring.kick();
            wait_published(ring, 4);
            rig.crash();
            let ring = &mut rig.session.rings[0];
            for (n, pending) in pending.iter().enumerate() {
                change(ring, pending, n);
            }
            let region = rig.session.inflight.as_ref().expect("agreed");
            pending.iter().for_each(|p| region.set_mark(0, p.head, true));
            region.set_used_idx(0, noted);
            // The descriptors of the old life are still there: serving them again would show.
            let ring = &mut rig.session.rings[0];
            let table = ring.mem.read(ring.desc, 16 * usize::from(ring.size));
            ring.reset(0);
            ring.mem.write(ring.desc, &table);
            rig.attach_again();
            let mut rig = rig.reconnect();
            let ring = &mut rig.session.rings[0];
            for n in 0..4 {
                assert!(read(ring, n) == data(n, false), "{way:?}, {noted} noted: write {n} was done again");
            }
            assert_eq!(ring.used_idx(), 4, "{way:?}, {noted} noted");
        }
    }
}

#[test]
fn a_device_that_is_stopped_while_it_serves_what_was_left_is_drained() {
    // More than is taken in one turn, and than there are buffers for.
    const LEFT: usize = 200;
    for way in [Way::Qemu, Way::CloudHypervisor] {
        let store = store();
        let mut rig = Rig::start(&store, way, PLAIN, 0, 1);
        rig.crash();
        let region = rig.session.inflight.take().expect("agreed");
        let ring = &mut rig.session.rings[0];
        for n in 0..LEFT {
            let write = Request::write(sector(16 * n), &pattern(n as u64, 16 * LEN)).placed(Place::Indirect);
            region.set_mark(0, write.submit(ring).expect("room on the ring").head, true);
        }
        region.set_shape(0, 1, ring.size);
        rig.session.inflight = Some(region);
        rig.attach_again();
        let rig = rig.reconnect();
        // At once: whoever gives up the region now must know that nothing is left in it.
        let bases = rig.session.stop().expect("the device stops");
        let region = rig.session.inflight.as_ref().expect("agreed");
        assert_eq!(bases[0], rig.session.rings[0].used_idx(), "{way:?}");
        assert_eq!((region.marks(0), bases[0]), (vec![], LEFT as u16), "{way:?}");
    }
}
