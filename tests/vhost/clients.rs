//! Front-ends that come and go, stay silent, or never rest, on the real process.

use crate::common::disk::{Aftermath, Disk, FREE, SIZE, assert_carries, reads_on};
use crate::common::frontend::block::complete;
use crate::common::frontend::hostile::agreed;
use crate::common::frontend::raw::{VERSION, message};
use crate::common::frontend::{Options, Order, RawSocket, Request, Session};
use crate::common::patience::{AtEnd, limit};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq as Req;

#[test]
fn a_silent_client_delays_the_next_only_while_it_stays() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let silent = RawSocket::connect(disk.socket()).unwrap();
    let half = RawSocket::connect(disk.socket()).unwrap();
    half.send(&message(Req::GET_FEATURES as u32, VERSION, &[])[..7], &[]).unwrap();
    let path = disk.socket().to_owned();
    let next = std::thread::spawn(move || {
        let session = Session::open(&path, &Options::default());
        session.map(|mut s| assert_carries(&mut s.rings[0], FREE.start, 4096))
    });
    drop(silent);
    drop(half);
    next.join().unwrap().unwrap();
    disk.assert_nothing_stays(&before);
}

#[test]
fn a_second_client_does_not_disturb_the_first() {
    let mut disk = Disk::attach(&[]);
    let mut first = disk.open();
    let second = RawSocket::connect(disk.socket()).unwrap();
    second.message(Req::GET_FEATURES as u32, VERSION, &[], &[]).unwrap();
    for n in 0..50 {
        assert_carries(&mut first.rings[0], FREE.start + 8 * n, 4096);
    }
    drop(first);
    // It has waited, or was sent away; in either case it is not left hanging.
    assert!(second.reply().is_ok() || second.closes(Duration::ZERO).unwrap());
    drop(second);
    disk.assert_whole();
}

#[test]
fn a_thousand_connections_leave_nothing_behind() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    for n in 0..1000 {
        if n % 4 == 0 {
            agreed(disk.socket()).unwrap();
            continue;
        }
        let raw = RawSocket::connect(disk.socket()).unwrap();
        match n % 4 {
            1 => raw.message(Req::GET_FEATURES as u32, VERSION, &[], &[]).unwrap(),
            2 => raw.send(&[0xff; 64], &[]).unwrap(),
            _ => {}
        }
    }
    for n in 0..100 {
        let mut session = disk.open();
        for i in 0..16 {
            let write = Request::write(FREE.start + 128 * i, &[n; 65536]);
            let _ = write.submit(&mut session.rings[0]).unwrap();
        }
        session.rings[0].kick();
        // Dropped with everything in flight.
    }
    let after = disk.server.settle(|now| now.fds <= before.fds && now.threads <= before.threads).unwrap();
    assert!(after.rss_kib <= before.rss_kib + (8 << 10), "{before:?} grew to {after:?}");
    assert!(after.maps <= before.maps + 16, "{before:?} grew to {after:?}");
    disk.assert_nothing_stays(&before);
}

#[test]
fn a_guest_that_never_stops_kicking_does_not_starve_control_messages() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open();
    let over = AtomicBool::new(false);
    let mut rings = std::mem::take(&mut session.rings);
    let (first, started) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let _end = AtEnd(&over);
        let busy = scope.spawn(|| {
            let ring = &mut rings[0];
            while !over.load(Ordering::Relaxed) {
                let read = |n| Request::read(n % (SIZE / 512 - 8), 4096);
                let pending = (0..32).map(|n| read(8 * n).submit(ring).unwrap()).collect();
                ring.kick();
                complete(ring, pending).unwrap();
                let _ = first.send(());
            }
        });
        started.recv_timeout(limit()).unwrap();
        for _ in 0..200 {
            session.ask("GET_FEATURES", |f| f.get_features()).unwrap();
            assert_eq!(session.config().unwrap().capacity, SIZE / 512);
        }
        over.store(true, Ordering::Relaxed);
        busy.join().unwrap();
    });
    session.rings = rings;
    assert_eq!(reads_on(&mut session), Aftermath::Serves);
}

#[test]
fn a_front_end_that_lost_its_back_end_goes_on_with_the_same_rings() {
    let disk = Disk::attach(&[]);
    let mut options = Options { order: Order::CloudHypervisor, ..Options::default() };
    let mut session = disk.open_with(&options);
    options.order = Order::CloudHypervisorReconnect;
    for n in 0..5 {
        assert_carries(&mut session.rings[0], FREE.start + 8 * n, 4096);
        let (mem, rings) = session.abandon();
        session = Session::resume(disk.socket(), &options, mem, rings).unwrap();
        let next = session.rings[0].avail_idx();
        session.start_at(&[next]).unwrap();
    }
    assert_carries(&mut session.rings[0], FREE.start, 4096);
}
