//! Rings whose surroundings change while they run, on the real process.

use crate::common::disk::{Disk, FREE, assert_carries, assert_kept};
use crate::common::frontend::block::OK;
use crate::common::frontend::hostile::{Answer, ask, memory_region, words};
use crate::common::frontend::{Layout, Options, Request, Session};
use std::os::fd::AsRawFd;
use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq as Req;

fn taken(answer: Answer, what: &str) {
    assert!(!answer.is_refused(), "{what} was refused");
}

/// Takes a region of the guest's memory away, as QEMU does before it gives it back with other bounds.
fn take_away(session: &Session, index: usize) {
    taken(ask(session.raw(), Req::REM_MEM_REG, &region(session, index), &[]), "REM_MEM_REG");
}

fn give_back(session: &Session, index: usize) {
    let fd = session.mem.fd(index);
    taken(ask(session.raw(), Req::ADD_MEM_REG, &region(session, index), &[fd]), "ADD_MEM_REG");
}

fn region(session: &Session, index: usize) -> Vec<u8> {
    let spec = session.mem.spec(index);
    memory_region([spec.guest, spec.size, spec.user, spec.offset])
}

#[test]
fn a_ring_goes_on_when_its_memory_comes_back() {
    let disk = Disk::attach(&[]);
    for layout in [Layout::flat(16 << 20), Layout::rings_apart(16 << 20), Layout::pc(16 << 20)] {
        let mut session = disk.open_with(&Options { layout, ..Options::default() });
        for _ in 0..3 {
            assert_carries(&mut session.rings[0], FREE.start, 4096);
            // Rings lie in the first region. The driver knows nothing of it and goes on asking.
            take_away(&session, 0);
            let pending = Request::read(FREE.start, 4096).submit(&mut session.rings[0]).unwrap();
            session.rings[0].kick_if_wanted();
            give_back(&session, 0);
            let used = session.rings[0].wait_used().unwrap();
            assert_eq!(pending.finish(&mut session.rings[0], used).unwrap().status, OK);
        }
        let data = session.mem.data_region();
        take_away(&session, data);
        give_back(&session, data);
        assert_kept(&mut session.rings[0]);
    }
}

#[test]
fn a_ring_goes_on_when_its_kick_comes_back() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open();
    for _ in 0..3 {
        assert_carries(&mut session.rings[0], FREE.start, 4096);
        const NO_FD: u64 = 1 << 8;
        taken(ask(session.raw(), Req::SET_VRING_KICK, &words(&[NO_FD]), &[]), "no kick");
        let kick = session.rings[0].kick_fd.as_raw_fd();
        taken(ask(session.raw(), Req::SET_VRING_KICK, &words(&[0]), &[kick]), "a kick");
    }
    assert_kept(&mut session.rings[0]);
}

#[test]
fn an_owner_that_is_reset_can_go_on() {
    // Deprecated, and back-ends are advised to ignore it; some front-ends send it when they stop.
    let disk = Disk::attach(&[]);
    let mut session = disk.open();
    session.stop().unwrap();
    session.ask("RESET_OWNER", |f| f.reset_owner()).unwrap();
    session.rings[0].reset(0);
    session.start().unwrap();
    assert_carries(&mut session.rings[0], FREE.start, 4096);
    session.ask("RESET_OWNER", |f| f.reset_owner()).unwrap();
    session.enable(false).unwrap();
    session.enable(true).unwrap();
    assert_kept(&mut session.rings[0]);
}
