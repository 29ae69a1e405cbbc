//! What a front-end that comes back may count on, on the real process.

use crate::common::disk::{Disk, FREE};
use crate::common::frontend::block::{OK, complete};
use crate::common::frontend::{Layout, Options, Place, Request, Session};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures as Protocol};

/// A region for the only queue in which these heads are in flight, as a back-end that was killed leaves it.
fn left_behind(session: &Session, size: u16, heads: &[u16]) {
    let wish = VhostUserInflight::new(0, 0, 1, size);
    let (area, file): (VhostUserInflight, File) =
        session.ask("GET_INFLIGHT_FD", |f| f.get_inflight_fd(&wish)).unwrap();
    file.write_all_at(&1u16.to_le_bytes(), 8).unwrap();
    file.write_all_at(&size.to_le_bytes(), 10).unwrap();
    for (counter, head) in heads.iter().enumerate() {
        let at = 16 + 16 * u64::from(*head);
        file.write_all_at(&(counter as u64).to_le_bytes(), at + 8).unwrap();
        file.write_all_at(&[1], at).unwrap();
    }
    session.ask("SET_INFLIGHT_FD", |f| f.set_inflight_fd(&area, file.as_raw_fd())).unwrap();
}

#[test]
fn a_stop_waits_for_what_an_earlier_back_end_took() {
    let disk = Disk::attach(&[]);
    let options = Options {
        protocol: Options::default().protocol | Protocol::INFLIGHT_SHMFD,
        layout: Layout::flat(80 << 20),
        ..Options::default()
    };
    let mut session = Session::connect(disk.socket(), &options).unwrap();
    session.ask("SET_FEATURES", |f| f.set_features(session.features)).unwrap();
    session.rings[0].event_idx = true;
    // More than the back-end has buffers for, so that it cannot begin all of them at once.
    let read = Request::read(FREE.start, 512 << 10).placed(Place::Indirect);
    let pending: Vec<_> = (0..100).map(|_| read.clone().submit(&mut session.rings[0]).unwrap()).collect();
    let heads: Vec<u16> = pending.iter().map(|p| p.head).collect();
    left_behind(&session, options.queue_size, &heads);
    session.set_mem_table().unwrap();
    session.set_ring(0, 0).unwrap();
    session.enable(true).unwrap();
    let base = session.stop().unwrap()[0];
    assert_eq!(base, session.rings[0].used_idx(), "requests are neither done nor left to the next");
    session.start_at(&[base]).unwrap();
    session.rings[0].kick();
    assert!(complete(&mut session.rings[0], pending).unwrap().iter().all(|o| o.status == OK));
}

#[test]
fn a_front_end_that_comes_back_finds_the_cache_mode_that_its_guest_chose() {
    let disk = Disk::attach(&[]);
    let session = disk.open();
    session.write_config(32, &[0]).unwrap();
    // Its guest sends no flushes any more, and nobody tells the back-end again after a reconnect.
    let (mem, rings) = session.abandon();
    let mut session = Session::resume(disk.socket(), &Options::default(), mem, rings).unwrap();
    session.start().unwrap();
    assert_eq!(session.config().unwrap().writeback, 0);
    session.stop().unwrap();
    session.reset_device().unwrap();
    assert_eq!(session.config().unwrap().writeback, 1, "a reset makes it the back-end's own choice");
}
