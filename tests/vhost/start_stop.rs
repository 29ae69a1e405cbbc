//! Starting, stopping and resetting the device as VMMs do it, on the real process.

use crate::common::disk::{Disk, FREE, assert_carries, assert_kept, kept, pattern};
use crate::common::frontend::block::{OK, complete};
use crate::common::frontend::ring::readable;
use crate::common::frontend::{Options, Order, Place, Request, Session};
use crate::common::patience::limit;
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[test]
fn a_kick_before_the_enable_is_not_lost() {
    let disk = Disk::attach(&[]);
    let options = Options::default();
    let mut session = Session::connect(disk.socket(), &options).unwrap();
    session.ask("SET_FEATURES", |f| f.set_features(session.features)).unwrap();
    session.rings[0].event_idx = true;
    session.set_mem_table().unwrap();
    session.set_ring(0, 0).unwrap();
    let pending = Request::read(0, 65536).submit(&mut session.rings[0]).unwrap();
    session.rings[0].kick();
    session.enable(true).unwrap();
    let used = session.rings[0].wait_used().unwrap();
    let read = pending.finish(&mut session.rings[0], used).unwrap();
    assert!(read.data == kept(0));
}

#[test]
fn a_stop_waits_for_what_is_in_flight() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open();
    for round in 0..20 {
        let start = session.rings[0].avail_idx();
        let data = pattern(round, 65536);
        let pending: Vec<_> = (0..32)
            .map(|n| {
                let write = Request::write(FREE.start + 128 * n, &data).placed(Place::Indirect);
                write.submit(&mut session.rings[0]).unwrap()
            })
            .collect();
        session.rings[0].kick();
        let base = session.stop().unwrap()[0];
        // What was taken is done; what was not taken is still there for the next start.
        assert_eq!(base, session.rings[0].used_idx());
        assert!(base.wrapping_sub(start) <= 32);
        session.start_at(&[base]).unwrap();
        let outcomes = complete(&mut session.rings[0], pending).unwrap();
        assert!(outcomes.iter().all(|o| o.status == OK));
    }
    assert_kept(&mut session.rings[0]);
}

#[test]
fn a_reset_device_starts_again() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open_with(&Options { order: Order::Qemu10, ..Options::default() });
    for _ in 0..3 {
        assert_carries(&mut session.rings[0], FREE.start, 4096);
        session.stop().unwrap();
        session.reset_device().unwrap();
        session.reset_device().unwrap();
        session.rings[0].reset(0);
        session.start().unwrap();
    }
    assert_kept(&mut session.rings[0]);
}

#[test]
fn a_queue_that_was_never_set_up_can_be_enabled() {
    // A machine's firmware sets up its first queue only, and QEMU enables them all.
    let disk = Disk::attach(&["--queues", "2"]);
    let options = Options { queues: 2, ..Options::default() };
    let mut session = Session::connect(disk.socket(), &options).unwrap();
    session.ask("SET_FEATURES", |f| f.set_features(session.features)).unwrap();
    session.rings[0].event_idx = true;
    session.set_mem_table().unwrap();
    session.set_ring(0, 0).unwrap();
    session.enable(true).unwrap();
    assert_carries(&mut session.rings[0], FREE.start, 4096);
    // Then comes the kernel, which uses both.
    session.stop().unwrap();
    session.rings[0].reset(0);
    session.start().unwrap();
    for ring in &mut session.rings {
        assert_carries(ring, FREE.start, 4096);
    }
}

#[test]
fn a_device_added_again_on_its_connection_works() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open();
    for _ in 0..3 {
        assert_carries(&mut session.rings[0], FREE.start, 4096);
        session.stop().unwrap();
        session.ask("SET_OWNER", |f| f.set_owner()).unwrap();
        session.rings[0].reset(0);
        session.start().unwrap();
    }
    assert_kept(&mut session.rings[0]);
}

#[test]
fn a_new_call_descriptor_is_signalled_once() {
    // The last back-end may have died between a completion and its interrupt.
    let disk = Disk::attach(&[]);
    let mut session = disk.open();
    let fresh = EventFd::new(EFD_NONBLOCK).unwrap();
    session.ask("SET_VRING_CALL", |f| f.set_vring_call(0, &fresh)).unwrap();
    assert!(readable(&fresh, limit()).unwrap());
    session.rings[0].call_fd = fresh;
    assert_kept(&mut session.rings[0]);
}
