//! What a VMM is told of the guest's memory while it moves the guest: every page that the
//! device wrote, and no other.

use crate::common::disk::{Disk, FREE, SECTORS, pattern};
use crate::common::frontend::block::{IOERR, OK, complete};
use crate::common::frontend::hostile::{Answer, ask, memory_region, state, words};
use crate::common::frontend::load::Random;
use crate::common::frontend::log::{Copy, Log, PAGE, set_logging, set_used_log};
use crate::common::frontend::memory::memfd;
use crate::common::frontend::session::F_EVENT_IDX;
use crate::common::frontend::{
    Framing, GuestMem, Layout, Options, Order, RegionSpec, Request, Seals, Segment, Session, SplitRing,
};
use crate::common::patience::{Deadline, limit, wait_for};
use std::collections::BTreeSet;
use std::io::Read;
use std::os::fd::AsRawFd;
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserProtocolFeatures as Protocol};

const RAM: u64 = 16 << 20;

fn options(layout: Layout) -> Options {
    let usual = Options::default();
    Options { protocol: usual.protocol | Protocol::LOG_SHMFD | Protocol::DEVICE_STATE, layout, ..usual }
}

fn taken(answer: Answer, what: &str) {
    assert!(!answer.is_refused(), "{what} was refused");
}

/// As a migration begins: QEMU's order.
fn start_logging(session: &Session, log: &Log) {
    taken(log.give(session), "SET_LOG_BASE");
    taken(set_logging(session, true), "SET_FEATURES");
    for (index, ring) in session.rings.iter().enumerate() {
        taken(set_used_log(session, index, Some(ring.used)), "SET_VRING_ADDR");
    }
}

/// Data on the disk that no buffer holds by chance.
fn fill_disk(session: &mut Session) {
    for at in (FREE.start..FREE.start + 4096).step_by(512) {
        let write = Request::write(at, &pattern(at, 512 * 512)).run(&mut session.rings[0]).unwrap();
        assert_eq!(write.status, OK);
    }
}

fn any_request(random: &mut Random) -> Request {
    let sector = FREE.start + random.below(4096 - 64);
    let len = 512 * (1 + random.below(40)) as usize;
    let segment = Segment { sector: FREE.start + 8192, count: 8, flags: 0 };
    let request = match random.below(12) {
        0..7 => Request::read(sector, len),
        7 => Request::write(FREE.start + 8192, &vec![7; len]),
        8 => Request::get_id(random.pick(&[20, 4, 9000])),
        9 => Request::discard(&[segment]),
        10 => Request::flush(),
        _ => Request::read(SECTORS - 1, 1024),
    };
    request.framed(random.pick(&[
        Framing::Classic,
        Framing::Compact,
        Framing::DataWithStatus,
        Framing::Scattered(vec![4096, 1000]),
    ]))
}

/// Everything that the device has done is in memory and in the log when the rings are stopped.
fn stop(session: &Session) {
    session.enable(false).unwrap();
}

#[test]
fn the_pages_that_were_written_are_those_that_are_marked() {
    let disk = Disk::attach(&["--queues", "2"]);
    for (layout, without) in [(Layout::pc(RAM), 0), (Layout::flat(RAM), F_EVENT_IDX)] {
        let usual = options(layout);
        let features = usual.features & !without;
        let mut session = disk.open_with(&Options { queues: 2, features, ..usual });
        fill_disk(&mut session);
        let log = Log::new(&session.mem).unwrap();
        start_logging(&session, &log);
        stop(&session);
        log.take();
        let mut random = Random::new(3);
        let mut marked_in_all = 0;
        for round in 0..60 {
            let ring = &mut session.rings[round % 2];
            let requests = (0..1 + random.below(12)).map(|_| any_request(&mut random));
            let pending: Vec<_> = requests.map(|r| r.submit(ring).unwrap()).collect();
            // From here to the stop, nobody but the device writes; and it writes nothing that is there
            // already, such as the wish for kicks of a ring that rests.
            let before = Copy::of(&session.mem);
            let enable = ask(session.raw(), Req::SET_VRING_ENABLE, &state(round as u32 % 2, 1), &[]);
            taken(enable, "SET_VRING_ENABLE");
            session.rings[round % 2].kick();
            wait_until_served(&session.rings[round % 2]);
            stop(&session);
            let (marked, written) = (log.take(), before.differs(&Copy::of(&session.mem)));
            assert_eq!(marked, written, "round {round}: {:x?} too many", marked.difference(&written));
            marked_in_all += marked.len();
            for outcome in complete_all(&mut session, round % 2, pending) {
                assert!([OK, IOERR].contains(&outcome));
            }
        }
        assert!(marked_in_all > 500, "{marked_in_all} pages: that was no load");
        taken(set_logging(&session, false), "SET_FEATURES");
        session.enable(true).unwrap();
        assert_eq!(Request::read(FREE.start, 65536).run(&mut session.rings[0]).unwrap().status, OK);
        stop(&session);
        assert!(log.take().is_empty(), "it was switched off");
    }
}

/// Waits until everything on the ring is answered, and takes nothing.
#[track_caller]
fn wait_until_served(ring: &SplitRing) {
    wait_for("the requests are completed", || match (ring.used_idx(), ring.avail_idx()) {
        (used, avail) if used == avail => Ok(()),
        (used, avail) => Err(format!("used index {used}, available index {avail}")),
    });
}

fn complete_all(
    session: &mut Session,
    ring: usize,
    pending: Vec<crate::common::frontend::block::Pending>,
) -> Vec<u8> {
    complete(&mut session.rings[ring], pending).unwrap().iter().map(|o| o.status).collect()
}

/// A VMM that copies memory, then what was marked since, has all of it, whenever it begins.
#[test]
fn nothing_is_lost_when_logging_begins_under_load() {
    let disk = Disk::attach(&[]);
    let layout = Layout { regions: vec![RegionSpec::at(0, 48 << 20)], ..Layout::flat(RAM) };
    let mut session = disk.open_with(&options(layout));
    fill_disk(&mut session);
    let mut random = Random::new(11);
    let (mut under_way, mut round, deadline) = (0, 0, Deadline::after(limit()));
    while round < 30 || under_way == 0 {
        round += 1;
        deadline.check("logging begins in the middle of the load", || format!("not in {round} rounds"));
        let log = Log::new(&session.mem).unwrap();
        let ring = &mut session.rings[0];
        // Before the first request: a device that is awake still serves it without a kick.
        let first = ring.used_idx();
        let read = |_| Request::read(FREE.start + 8 * random.below(400), 256 << 10).submit(ring).unwrap();
        let pending: Vec<_> = (0..40).map(read).collect();
        session.rings[0].kick();
        // When so many are done, however long that takes.
        let enough = random.below(40) as u16;
        let served = || session.rings[0].used_idx().wrapping_sub(first);
        while served() < enough {
            deadline.check("some requests are served", || format!("{} of {enough}", served()));
        }
        start_logging(&session, &log);
        let done = session.rings[0].used_idx().wrapping_sub(first);
        under_way += u32::from((1..40).contains(&done));
        let mut copy = Copy::of(&session.mem);
        // Another bitmap, as when memory is plugged in: what is marked in the old one counts as well.
        let more = Log::new(&session.mem).unwrap();
        taken(more.give(&session), "SET_LOG_BASE");
        let mut marked = log.take();
        wait_until_served(&session.rings[0]);
        stop(&session);
        assert!(log.take().is_empty(), "another bitmap has taken over");
        marked.extend(more.take());
        copy.update(&session.mem, &marked);
        let lost = copy.differs(&Copy::of(&session.mem));
        assert!(lost.is_empty(), "round {round}: not marked: {lost:x?}");
        taken(set_logging(&session, false), "SET_FEATURES");
        session.enable(true).unwrap();
        complete_all(&mut session, 0, pending);
    }
}

#[test]
fn a_used_ring_is_logged_only_where_the_vmm_says() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open_with(&options(Layout::rings_apart(RAM)));
    let log = Log::new(&session.mem).unwrap();
    taken(log.give(&session), "SET_LOG_BASE");
    taken(set_logging(&session, true), "SET_FEATURES");
    let used = session.rings[0].used;
    for (at, page) in [(None, None), (Some(used), Some(used)), (Some(5 * PAGE), Some(5 * PAGE)), (None, None)]
    {
        taken(set_used_log(&session, 0, at), "SET_VRING_ADDR");
        stop(&session);
        log.take();
        session.enable(true).unwrap();
        assert_eq!(Request::read(FREE.start, 512).run(&mut session.rings[0]).unwrap().status, OK);
        stop(&session);
        // Rings lie in the first region, buffers in the last.
        let in_first: BTreeSet<u64> = log.take().range(..1 << 30).copied().collect();
        assert_eq!(in_first, page.into_iter().collect(), "logged at {at:x?}");
        session.enable(true).unwrap();
    }
    assert!(set_used_log(&session, 0, Some(1 << 40)).is_refused());
}

#[test]
fn memory_that_comes_later_is_logged_and_what_the_log_does_not_cover_is_refused() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open_with(&options(Layout::rings_apart(RAM)));
    let data = session.mem.data_region();
    let spec = session.mem.spec(data);
    let region = memory_region([spec.guest, spec.size, spec.user, spec.offset]);
    let small = Log::covering(1 << 20).unwrap();
    taken(ask(session.raw(), Req::REM_MEM_REG, &region, &[]), "REM_MEM_REG");
    let log = Log::new(&session.mem).unwrap();
    start_logging(&session, &log);
    taken(ask(session.raw(), Req::ADD_MEM_REG, &region, &[session.mem.fd(data)]), "ADD_MEM_REG");
    assert_eq!(Request::read(FREE.start, 512).run(&mut session.rings[0]).unwrap().status, OK);
    stop(&session);
    assert!(log.take().range(spec.guest..).next().is_some(), "what was added is not logged");
    // As large as what is there, and not a byte more: the next region is beyond it.
    let next = memory_region([spec.guest + (1 << 30), spec.size, spec.user + (1 << 30), 0]);
    let file = memfd(spec.size, Seals::Sealable).unwrap();
    assert!(ask(session.raw(), Req::ADD_MEM_REG, &next, &[file.as_raw_fd()]).is_refused());
    let session = disk.open_with(&options(Layout::rings_apart(RAM)));
    assert!(small.give(&session).is_refused(), "a log that does not cover what is there");
}

#[test]
fn logs_that_cannot_be_are_refused() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let size = RAM / PAGE / 8;
    let whole = memfd(size, Seals::Sealable).unwrap();
    let unsealable = memfd(size, Seals::Unsealable).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    for (body, fds) in [
        (words(&[size - 1, 0]), vec![whole.as_raw_fd()]),
        (words(&[size + 1, 0]), vec![whole.as_raw_fd()]),
        (words(&[size, 4096]), vec![whole.as_raw_fd()]),
        (words(&[size, 1]), vec![whole.as_raw_fd()]),
        (words(&[size, u64::MAX]), vec![whole.as_raw_fd()]),
        (words(&[u64::MAX, 0]), vec![whole.as_raw_fd()]),
        (words(&[0, 0]), vec![whole.as_raw_fd()]),
        (words(&[size, 0]), vec![unsealable.as_raw_fd()]),
        (words(&[size, 0]), vec![null.as_raw_fd()]),
        (words(&[size, 0]), vec![]),
        (words(&[size]), vec![]),
    ] {
        let session = disk.open_with(&options(Layout::flat(RAM)));
        assert!(ask(session.raw(), Req::SET_LOG_BASE, &body, &fds).is_refused(), "{body:x?} {fds:?}");
    }
    let session = disk.open();
    let log = Log::new(&session.mem).unwrap();
    assert!(log.give(&session).is_refused(), "LOG_SHMFD was not agreed");
    // Has no feature of its own, and no VMM sends it.
    let session = disk.open_with(&options(Layout::flat(RAM)));
    let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    assert!(ask(session.raw(), Req::SET_LOG_FD, &[], &[event.as_raw_fd()]).is_refused());
    drop(session);
    disk.assert_nothing_stays(&before);
}

/// QEMU and cloud-hypervisor give running rings their addresses again. What the guest has written where the
/// device's index belongs does not count.
#[test]
fn a_running_ring_that_gets_its_addresses_again_goes_on_where_it_was() {
    let disk = Disk::attach(&[]);
    for order in [Order::Qemu10, Order::CloudHypervisor] {
        let mut session = disk.open_with(&Options { order, ..options(Layout::flat(RAM)) });
        for _ in 0..3 {
            assert_eq!(Request::flush().run(&mut session.rings[0]).unwrap().status, OK);
        }
        let ring = &mut session.rings[0];
        let (used, at) = (ring.used_idx(), ring.used);
        assert_eq!(used, 3);
        ring.mem.store(at + 2, 77u16, std::sync::atomic::Ordering::Release);
        taken(set_used_log(&session, 0, Some(at)), "SET_VRING_ADDR");
        let ring = &mut session.rings[0];
        let pending = Request::read(FREE.start, 512).submit(ring).unwrap();
        ring.kick();
        // Not by what the rings remember: the used index was another in between.
        wait_for("the used index is 4", || match ring.used_idx() {
            4 => Ok(()),
            other => Err(other),
        });
        let used = ring.pop_used().unwrap();
        assert_eq!(pending.finish(ring, used).unwrap().status, OK);
    }
}

#[test]
fn a_stopped_disk_has_an_empty_state_and_takes_no_other() {
    const NO_FD: u64 = 1 << 8;
    let disk = Disk::attach(&[]);
    let session = disk.open_with(&options(Layout::flat(RAM)));
    let transfer = |direction: u64, fd: &dyn AsRawFd| {
        let reply =
            session.raw().ask(Req::SET_DEVICE_STATE_FD as u32, 1, &words(&[direction]), &[fd.as_raw_fd()]);
        reply.unwrap().value().unwrap()
    };
    let check = || session.raw().ask(Req::CHECK_DEVICE_STATE as u32, 1, &[], &[]).unwrap().value().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    assert_ne!(transfer(0, &writer) & 0xff, 0, "it runs");
    assert_ne!(check(), 0);
    session.stop().unwrap();
    assert_eq!(transfer(0, &writer), NO_FD);
    drop(writer);
    let mut saved = Vec::new();
    (&reader).read_to_end(&mut saved).unwrap();
    assert_eq!((saved, check()), (vec![], 0));
    for bytes in [&b""[..], b"what is this"] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        assert_eq!(transfer(1, &reader), NO_FD);
        std::io::Write::write_all(&mut writer, bytes).unwrap();
        drop(writer);
        assert_eq!(check() == 0, bytes.is_empty());
    }
}

/// So that the helper above counts in pages of the right size.
#[test]
fn a_copy_tells_which_pages_differ() {
    let mem = GuestMem::new(&Layout::pc(RAM)).unwrap();
    let before = Copy::of(&mem);
    mem.write((1 << 32) + 2 * PAGE - 1, &[1, 1]);
    let mut after = Copy::of(&mem);
    let pages = before.differs(&after);
    assert_eq!(pages, BTreeSet::from([(1 << 32) + PAGE, (1 << 32) + 2 * PAGE]));
    mem.write((1 << 32) + 2 * PAGE - 1, &[0, 0]);
    after.update(&mem, &pages);
    assert!(before.differs(&after).is_empty());
}
