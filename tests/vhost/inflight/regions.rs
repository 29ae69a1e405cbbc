//! GET_INFLIGHT_FD and SET_INFLIGHT_FD: their shapes, and regions that are not what they should be. Whatever
//! a front-end gives: it is refused or does no harm, and the next front-end is served.

use crate::common::disk::{Disk, FREE, assert_carries, pattern};
use crate::common::frontend::hostile::{OddFiles, agreed, ask};
use crate::common::frontend::inflight::{Info, Region};
use crate::common::frontend::memory::{Seals, memfd};
use crate::common::frontend::raw::VERSION;
use crate::common::frontend::{Options, Order, RawSocket, Request, Session};
use crate::common::patience::limit;
use std::os::fd::{AsRawFd, RawFd};
use vhost::VhostBackend;
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserProtocolFeatures as Protocol};

fn options(queues: usize) -> Options {
    let protocol = Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::INFLIGHT_SHMFD;
    Options { protocol, queues, ..Options::default() }
}

#[test]
fn a_region_is_given_with_and_without_padding_in_the_message() {
    let mut disk = Disk::attach(&["--queues", "2"]);
    let before = disk.idle();
    for len in [20, 24] {
        for (queues, queue_size) in [(1, 2), (2, 128), (1, 1024), (2, 1024)] {
            let raw = agreed(disk.socket()).unwrap();
            let region = Region::get(&raw, Info::wish(queues, queue_size), len).unwrap();
            assert_eq!(region.info, Info::exact(queues, queue_size));
            assert_eq!(region.file.metadata().unwrap().len(), region.info.size);
            for queue in 0..queues {
                assert_eq!((region.shape(queue), region.marks(queue)), ((0, 0), vec![]), "not fresh");
            }
            // A front-end keeps it for longer than a back-end lives: nobody may take it from under us.
            region.file.set_len(0).expect_err("it can be cut");
            assert!(!region.give(&raw, len).is_refused());
        }
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn regions_of_impossible_shapes_are_refused() {
    let mut disk = Disk::attach(&["--queues", "2", "--queue-size", "256"]);
    let before = disk.idle();
    let own = Region::own(64, 1024).unwrap();
    for (queues, queue_size) in
        [(0, 128), (1, 0), (1, 3), (1, 512), (3, 128), (65535, 128), (1, 65535), (0, 0)]
    {
        for len in [20, 24] {
            let raw = agreed(disk.socket()).unwrap();
            let wish = Info::wish(queues, queue_size);
            assert!(ask(&raw, Req::GET_INFLIGHT_FD, &wish.body(len), &[]).is_refused(), "{wish:?}");
            let raw = agreed(disk.socket()).unwrap();
            let gift = Info { size: own.info.size, ..wish };
            let fd = [own.file.as_raw_fd()];
            assert!(ask(&raw, Req::SET_INFLIGHT_FD, &gift.body(len), &fd).is_refused(), "{gift:?}");
        }
    }
    for len in [0, 8, 16, 19, 25, 32, 300] {
        let body = vec![1; len];
        for (request, fds) in
            [(Req::GET_INFLIGHT_FD, &[][..]), (Req::SET_INFLIGHT_FD, &[own.file.as_raw_fd()])]
        {
            let raw = agreed(disk.socket()).unwrap();
            assert!(ask(&raw, request, &body, fds).is_refused(), "{request:?} of {len} bytes");
        }
    }
    // Nobody has agreed on it.
    let raw = RawSocket::connect(disk.socket()).unwrap();
    raw.message(Req::GET_INFLIGHT_FD as u32, VERSION, &Info::wish(1, 128).body(24), &[]).unwrap();
    assert!(raw.closes(limit()).unwrap());
    disk.assert_nothing_stays(&before);
}

#[test]
fn regions_that_do_not_fit_their_files_are_refused() {
    let mut disk = Disk::attach(&["--queues", "2"]);
    let before = disk.idle();
    let good = Info::exact(2, 128);
    let whole = memfd(2 << 20, Seals::Sealed).unwrap();
    let exact = memfd(good.size, Seals::Sealed).unwrap();
    let empty = memfd(0, Seals::Sealable).unwrap();
    for (what, info, file) in [
        ("too small for its queues", Info { size: good.size - 1, ..good }, &whole),
        ("no bytes", Info { size: 0, ..good }, &whole),
        ("one page too long", Info { size: good.size + 4096, ..good }, &exact),
        ("longer than anything", Info { size: u64::MAX, ..good }, &whole),
        ("longer than any mapping", Info { size: 1 << 62, ..good }, &whole),
        ("an odd offset", Info { offset: 1, ..good }, &whole),
        ("an offset within a page", Info { offset: 512, ..good }, &whole),
        ("an offset at the end", Info { offset: 2 << 20, ..good }, &whole),
        ("an offset beyond the end", Info { offset: 1 << 40, ..good }, &whole),
        ("an offset that wraps", Info { offset: u64::MAX - 4095, ..good }, &whole),
        ("an empty file", good, &empty),
        ("larger rings than it has room for", Info { queue_size: 1024, ..good }, &exact),
    ] {
        for len in [20, 24] {
            let raw = agreed(disk.socket()).unwrap();
            let fd = [file.as_raw_fd()];
            assert!(ask(&raw, Req::SET_INFLIGHT_FD, &info.body(len), &fd).is_refused(), "{what}");
        }
    }
    // In a larger file, at an offset, there is nothing wrong with it.
    let raw = agreed(disk.socket()).unwrap();
    let info = Info { offset: 8192, ..good };
    assert!(!ask(&raw, Req::SET_INFLIGHT_FD, &info.body(24), &[whole.as_raw_fd()]).is_refused());
    drop(raw);
    disk.assert_nothing_stays(&before);
}

#[test]
fn files_that_are_no_lasting_memory_are_refused() {
    let mut disk = Disk::attach(&["--queues", "2"]);
    let before = disk.idle();
    let body = Info::exact(1, 128).body(24);
    let folder = tempfile::tempdir().unwrap();
    let odd = OddFiles::new(folder.path()).unwrap();
    // It could be cut while the back-end looks at it.
    let unsealable = memfd(1 << 16, Seals::Unsealable).unwrap();
    let mut all = odd.all.clone();
    all.retain(|(what, _)| *what != "a memory file");
    all.push(("a memory file that cannot be sealed", unsealable.as_raw_fd()));
    for (what, fd) in all {
        let raw = agreed(disk.socket()).unwrap();
        assert!(ask(&raw, Req::SET_INFLIGHT_FD, &body, &[fd]).is_refused(), "{what}");
    }
    let own = Region::own(1, 128).unwrap();
    for count in [0, 2, 3, 32] {
        let raw = agreed(disk.socket()).unwrap();
        let fds: Vec<RawFd> = vec![own.file.as_raw_fd(); count];
        assert!(ask(&raw, Req::SET_INFLIGHT_FD, &body, &fds).is_refused(), "{count} descriptors");
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn a_region_cannot_be_cut_once_it_is_given() {
    let disk = Disk::attach(&["--queues", "1"]);
    let mut session = Session::connect(disk.socket(), &options(1)).unwrap();
    let info = Info::exact(1, 128);
    session.inflight = Some(Region::new(info, memfd(info.size, Seals::Sealable).unwrap()).unwrap());
    session.start().unwrap();
    session.inflight.as_ref().unwrap().file.set_len(0).expect_err("it was cut");
    assert_carries(&mut session.rings[0], FREE.start, 65536);
}

#[test]
fn regions_of_other_numbers_than_the_device_has() {
    let mut disk = Disk::attach(&["--queues", "2"]);
    let before = disk.idle();
    // Larger rings and more queues than are used: there is room for all.
    for (queues, queue_size, used) in [(2, 128, 1), (1, 1024, 1), (2, 512, 2)] {
        let mut session = Session::connect(disk.socket(), &options(used)).unwrap();
        session.inflight = Some(Region::own(queues, queue_size).unwrap());
        session.start().unwrap();
        for (queue, ring) in session.rings.iter_mut().enumerate() {
            assert_carries(ring, FREE.start + 1024 * queue as u64, 65536);
        }
        let region = session.inflight.as_ref().unwrap();
        for queue in 0..queues {
            let expected = if usize::from(queue) < used { (1, 128) } else { (0, 0) };
            assert_eq!(region.shape(queue), expected);
        }
    }
    // A ring without room in it is refused, since its requests could not be noted.
    for (queues, queue_size, used) in [(1, 128, 2), (1, 64, 1)] {
        let mut session = Session::connect(disk.socket(), &options(used)).unwrap();
        session.inflight = Some(Region::own(queues, queue_size).unwrap());
        assert!(session.start().unwrap_err().is_refusal());
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn a_region_that_was_used_with_other_numbers_starts_over() {
    let disk = Disk::attach(&["--queues", "1"]);
    for (version, entries) in [(0, 128), (1, 64), (1, 0), (2, 128), (0xffff, 0xffff)] {
        let mut session = Session::connect(disk.socket(), &options(1)).unwrap();
        let region = Region::own(1, 128).unwrap();
        region.set_shape(0, version, entries);
        (0..128).for_each(|head| region.set_mark(0, head, true));
        session.inflight = Some(region);
        session.start().unwrap();
        let ring = &mut session.rings[0];
        assert_carries(ring, FREE.start, 4096);
        assert_eq!(ring.used_idx(), 2, "something else was served");
        let region = session.inflight.as_ref().unwrap();
        assert_eq!((region.shape(0), region.marks(0), region.used_idx(0)), ((1, 128), vec![], 2));
    }
}

#[test]
fn garbage_in_a_region_does_no_harm() {
    let mut disk = Disk::attach(&["--queues", "2"]);
    let before = disk.idle();
    for seed in 0..200 {
        let order = if seed % 2 == 0 { Order::Qemu7 } else { Order::CloudHypervisor };
        let mut session = Session::connect(disk.socket(), &Options { order, ..options(2) }).unwrap();
        let region = Region::own(2, 128).unwrap();
        region.write(0, &pattern(seed, region.info.size as usize));
        for queue in 0..2 {
            region.set_shape(queue, 1, 128);
            // From "as the driver saw it" to anything.
            if seed % 4 != 0 {
                region.set_used_idx(queue, (seed % 128) as u16);
            }
            (0..128)
                .filter(|head| (u64::from(*head) ^ seed) % 3 == 0)
                .for_each(|h| region.set_mark(queue, h, true));
        }
        session.inflight = Some(region);
        for ring in &mut session.rings {
            for n in 0..seed % 40 {
                let _ = Request::read(8 * n, 4096).submit(ring).unwrap();
            }
            ring.kick();
        }
        session.start().unwrap();
        // It takes messages still.
        session.ask("GET_FEATURES", |f| f.get_features()).unwrap();
        session.stop().unwrap();
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn a_region_that_changes_while_it_is_used_does_no_harm() {
    let mut disk = Disk::attach(&["--queues", "1"]);
    let before = disk.idle();
    let mut session = Session::open(disk.socket(), &options(1)).unwrap();
    let region = session.inflight.take().unwrap();
    for n in 0..300 {
        region.write(0, &pattern(n, region.info.size as usize));
        assert_carries(&mut session.rings[0], FREE.start + 8 * (n % 64), 4096);
    }
    // And restarted with what is left in it.
    session.set_mem_table().unwrap();
    session.enable(false).unwrap();
    session.enable(true).unwrap();
    drop(session);
    disk.assert_nothing_stays(&before);
}

#[test]
fn regions_replaced_again_and_again_leave_nothing_behind() {
    let mut disk = Disk::attach(&["--queues", "2"]);
    let before = disk.idle();
    let raw = agreed(disk.socket()).unwrap();
    for _ in 0..500 {
        let region = Region::get(&raw, Info::wish(2, 1024), 24).unwrap();
        assert!(!region.give(&raw, 24).is_refused());
    }
    let during = disk.server.holdings().unwrap();
    assert!(
        during.fds <= before.fds + 16 && during.maps <= before.maps + 64,
        "{before:?} grew to {during:?}"
    );
    drop(raw);
    disk.assert_nothing_stays(&before);
}
